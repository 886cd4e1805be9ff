"""Which weights of a model can be pruned: those of linear and convolution layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.utils import parametrize

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

EXPERTS = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters that hold the matrices of all experts of a mixture, one for each."""

_ATEN = torch.ops.aten
_OPERATORS = (
    _ATEN.linear,
    _ATEN.conv1d,
    _ATEN.conv2d,
    _ATEN.conv3d,
    _ATEN.convolution,
    _ATEN.conv_transpose1d,
    _ATEN.conv_transpose2d,
    _ATEN.conv_transpose3d,
)


@dataclass(frozen=True, eq=False)
class PrunableWeight:
    """One weight and every qualified name it goes by; tied layers share one of these.

    Names are those of the layers, ``encoder.layer.0.output.dense``, as in compilation reports.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor

    @property
    def name(self) -> str:
        return self.names[0]

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches a name of the weight or a module around it."""
        return any(fnmatchcase(part, pattern) for name in self.names for part in _ancestors(name))


def prunable_weights(
    model: nn.Module | ExportedProgram, skip: Iterable[str] = ()
) -> list[PrunableWeight]:
    """Weights of linear and convolution layers, of attention's input projections and of experts.

    A weight shared with an embedding is an embedding, which is never pruned.

    Args:
        skip: globs over qualified names; ``pooler`` and ``pooler*`` both leave out all of it.

    Raises:
        TypeError: the model is neither a module nor an exported program.
        ValueError: a glob matches no layer, no layer is left, or a weight cannot be pruned.
    """
    if isinstance(model, ExportedProgram):
        named, embeddings = _of_program(model), _embeddings_of_program(model)
    elif isinstance(model, nn.Module):
        named, embeddings = list(_of_module(model)), _embeddings_of_module(model)
    else:
        raise TypeError(
            "prune: model must be a torch.nn.Module or torch.export.ExportedProgram, "
            f"not {type(model).__name__}"
        )
    groups: dict[object, PrunableWeight] = {}
    for name, tensor in named:
        key = _identity(tensor)
        known = groups.get(key)
        groups[key] = PrunableWeight((*known.names, name) if known else (name,), tensor)
    weights = list(groups.values())
    for pattern in skip:
        if not any(weight.matches(pattern) for weight in weights):
            names = ", ".join(weight.name for weight in weights[:4])
            raise ValueError(
                f"prune: skip pattern {pattern!r} matches no prunable layer; there are "
                f"{len(weights)}{f', such as {names}' if names else ''}"
            )
    embedded = {_identity(tensor) for tensor in embeddings}
    kept = [
        weight
        for weight in weights
        if _identity(weight.tensor) not in embedded and not any(map(weight.matches, skip))
    ]
    if not kept:
        raise ValueError(
            f"prune: {type(model).__name__} has no prunable layer left: of {len(weights)} linear "
            "and convolution layers, all are skipped or tied to an embedding"
        )
    for weight in kept:
        _check(weight)
    return kept


def _of_module(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LAYERS):
            _refuse_computed(name, module, "weight")
            yield name, module.weight
        elif isinstance(module, nn.MultiheadAttention):
            for part in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if getattr(module, part) is not None:
                    _refuse_computed(name, module, part)
                    yield f"{name}.{part}".lstrip("."), getattr(module, part)
        else:
            for part in EXPERTS:
                matrices = module._parameters.get(part)
                if matrices is not None and matrices.dim() == 3:
                    yield f"{name}.{part}".lstrip("."), matrices


def _embeddings_of_module(model: nn.Module) -> list[torch.Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]


def _of_program(program: ExportedProgram) -> list[tuple[str, torch.Tensor]]:
    return [
        (weight.removesuffix(".weight"), program.state_dict[weight])
        for weight in _weights_used_by(program, _OPERATORS)
    ]


def _embeddings_of_program(program: ExportedProgram) -> list[torch.Tensor]:
    used = _weights_used_by(program, (_ATEN.embedding,), operand=0)
    return [program.state_dict[weight] for weight in used]


def _weights_used_by(
    program: ExportedProgram, operators: tuple[object, ...], operand: int = 1
) -> list[str]:
    specs = program.graph_signature.input_specs
    stored = {s.arg.name: s.target for s in specs if s.kind == InputKind.PARAMETER and s.target}
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        if getattr(node.target, "overloadpacket", None) in operators:
            weight = stored.get(getattr(node.args[operand], "name", ""))
            if weight is not None:
                found[weight] = None
    return list(found)


def _refuse_computed(name: str, module: nn.Module, part: str) -> None:
    """A parametrised weight is made anew on each call: zeros written to it would be lost."""
    if parametrize.is_parametrized(module, part) or part not in module._parameters:
        raise ValueError(
            f"prune: {name}.{part} is computed from other parameters (a parametrization or weight "
            "norm); make it permanent first, with torch.nn.utils.parametrize."
            "remove_parametrizations or torch.nn.utils.prune.remove"
        )


def _check(weight: PrunableWeight) -> None:
    tensor = weight.tensor
    where = f"prune: weight of {weight.name}, shape {tuple(tensor.shape)},"
    if tensor.is_meta:
        raise ValueError(f"{where} is on the meta device and has no values; load the model first")
    if not tensor.is_floating_point():
        raise ValueError(f"{where} is {tensor.dtype}; pruning needs floating-point weights")
    if not bool(tensor.isfinite().all()):
        count = int((~tensor.isfinite()).sum())
        raise ValueError(f"{where} holds {count} NaN or infinite values; repair or skip the layer")


def _identity(tensor: torch.Tensor) -> object:
    storage = tensor.untyped_storage()
    place = storage.data_ptr() or id(tensor)
    return place, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _ancestors(name: str) -> Iterator[str]:
    """The name itself and the modules around it, innermost first."""
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
