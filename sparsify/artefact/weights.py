"""Weights between the forms in which a program stores them: canonical in files, packed to run.

encoder.dense.weight:csr.values ...  <->  encoder.dense.weight:sell{rows=8,...}.values ...
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from sparsify.artefact.container import ArtefactError
from sparsify.layouts import Csr, Dense, Layout, Stack, layout_names, parse
from sparsify.ops import LINEARS, experts
from sparsify.passes.graph import arguments
from sparsify.passes.sites import expert_stacks, linear_site, packed_name
from sparsify.program import Program, WeightStore

_PACKED = re.compile(
    r"(?P<weight>.*):(?P<spec>(?P<layout>\w+)(?:\{[^{}]*\})?)\.(?P<tensor>\w+)", re.DOTALL
)
_CANONICAL = (Csr(), Dense())
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Form:
    """How programs store a weight: in one layout, or one for each use.

    Attributes:
        shape: of the plain matrix, or of experts' plain matrices ``[experts, rows, columns]``.
        layouts: those that programs have.
        matrices: how many are stacked, 0 for the one of a linear.
    """

    shape: tuple[int, ...]
    layouts: tuple[Layout, ...]
    matrices: int = 0

    def pack(self, layout: Layout, plain: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._stack(layout).pack(plain) if self.matrices else layout.pack(plain)

    def unpack(self, layout: Layout, packed: dict[str, torch.Tensor]) -> torch.Tensor:
        """The plain weight, once it is clear that what is packed is well formed."""
        if not self.matrices:
            shape = (self.shape[0], self.shape[1])
            layout.validate(packed, shape)
            return layout.unpack(packed, shape)
        stack = self._stack(layout)
        if layout == Dense() and packed["weight"].shape == self.shape:
            packed = {"weight": packed["weight"].flatten(0, 1)}
        layout.validate(packed, stack.shape)
        return stack.unpack(packed).reshape(self.shape).contiguous()

    def _stack(self, layout: Layout) -> Stack:
        rows = self.shape[0] * self.shape[1] // self.matrices
        return Stack(layout, self.matrices, rows, self.shape[2])


def forms(programs: Iterable[Program]) -> dict[str, Form]:
    """The form of every weight that a linear, or the experts of a mixture, of the programs read."""
    found: dict[str, Form] = {}

    def note(weight: str, form: Form) -> None:
        known = found.setdefault(weight, form)
        layouts = tuple(dict.fromkeys((*known.layouts, *form.layouts)))
        found[weight] = replace(known, layouts=layouts)

    for program in programs:
        for node in program.graph.nodes:
            if node.target in LINEARS:
                site = linear_site(program, node)
                note(site.weight, Form(site.shape, (parse(arguments(node)["layout"]),)))
            elif node.target == experts.overload:
                for stack, weight in expert_stacks(program, node):
                    count = arguments(node)["count"]
                    shape = (count, stack.count * stack.rows // count, stack.columns)
                    note(weight, Form(shape, (stack.layout,), stack.count))
    return found


def converted(
    wanted: Iterable[str], stored: Mapping[str, torch.Tensor], known: Mapping[str, Form]
) -> WeightStore:
    """The wanted tensors, those in another form repacked; names that cannot be had are absent.

    Args:
        wanted: names in a store, such as ``w`` or ``w:csr.values``.
        known: the form of each weight in the specialised programs.
    """
    store: dict[str, torch.Tensor] = {}
    for name in wanted:
        if name in store:
            continue
        if name in stored:
            store[name] = stored[name]
            continue
        weight, layout = _form_named(name)
        dense = _dense(weight, stored, known)
        if dense is None:
            continue
        if layout is None:
            store[name] = dense
        else:
            packed = known[weight].pack(layout, dense)
            store.update({packed_name(weight, layout, t): packed[t] for t in layout.tensors})
    return WeightStore(store)


def can_convert(name: str, stored: Mapping[str, torch.Tensor], known: Mapping[str, Form]) -> bool:
    """Whether `converted` can give a tensor of this name."""
    return name in stored or _source(_form_named(name)[0], stored, known) is not None


def _form_named(name: str) -> tuple[str, Layout | None]:
    """The weight that a stored name belongs to, and its layout; None for a plain matrix."""
    match = _PACKED.fullmatch(name)
    if match is None or match["layout"] not in layout_names():
        return name, None
    return match["weight"], parse(match["spec"])


def _dense(
    weight: str, stored: Mapping[str, torch.Tensor], known: Mapping[str, Form]
) -> torch.Tensor | None:
    layout = _source(weight, stored, known)
    if layout is None:
        return None
    names = _stored_names(weight, layout, stored)
    tensors = (stored[name].detach() for name in names)
    packed = dict(zip(layout.tensors, tensors, strict=True))
    return known[weight].unpack(layout, packed)


def _source(
    weight: str, stored: Mapping[str, torch.Tensor], known: Mapping[str, Form]
) -> Layout | None:
    """The layout in which a linear's weight is stored."""
    if weight in known:
        for layout in (*known[weight].layouts, *_CANONICAL):
            if all(name in stored for name in _stored_names(weight, layout, stored)):
                return layout
    return None


def _stored_names(
    weight: str, layout: Layout, stored: Mapping[str, torch.Tensor]
) -> tuple[str, ...]:
    if layout.name == Dense.name and weight in stored:
        return (weight,)
    return tuple(packed_name(weight, layout, tensor) for tensor in layout.tensors)


def is_canonical(name: str) -> bool:
    """Whether a stored name is of a form that files hold."""
    layout = _form_named(name)[1]
    return layout is None or layout in _CANONICAL


def written(weights: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The weights as a safetensors file, piece by piece.

    Source: https://github.com/huggingface/safetensors, section Format.
    """
    header, end = {}, 0
    order = sorted(weights, key=lambda name: (-weights[name].element_size(), name))
    for name in order:
        tensor = weights[name]
        if tensor.dtype not in _NAMES:
            raise ArtefactError(f"weight {name!r} is {tensor.dtype}, which a file cannot hold")
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data starts at a multiple of 64
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        flat = weights[name].detach().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def read(data: memoryview) -> WeightStore:
    """The weights in a safetensors file, each copied to memory of its own.

    Raises:
        ArtefactError: the file contradicts itself.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop("__metadata__", None)
        return WeightStore({n: _tensor(data[8 + length :], r) for n, r in header.items()})
    except (ValueError, KeyError, TypeError) as cause:
        raise ArtefactError(f"the weights cannot be read: {cause}") from cause


def _tensor(data: memoryview, record: Mapping[str, list[int]]) -> torch.Tensor:
    dtype, shape = _DTYPES[str(record["dtype"])], record["shape"]
    begin, end = record["data_offsets"]
    if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"bytes {begin} to {end} do not hold a tensor {shape} of {dtype}")
    tensor = torch.empty(shape, dtype=dtype)
    if end > begin:
        tensor.reshape(-1).view(torch.uint8).numpy().data[:] = data[begin:end]
    return tensor
