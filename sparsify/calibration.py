"""Data on which recipes that change numbers decide, and measure what they changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export.graph_signature import InputKind
from torch.utils import _pytree

from sparsify.ops import PAGE, CacheShape, chunk_bounds
from sparsify.program import Program

Watch = Callable[[fx.Node, torch.Tensor], None]
"""Called with a node and its result, each time the node has run."""


class Calibration:
    """Inputs of a model, in the order in which they are run.

    Args:
        batches: arguments of one call each: a tensor, a tuple of arguments, or a dict of keyword
            arguments; NumPy arrays count as tensors. For a causal language model that is compiled
            to generate, the token ids of one text each: one-dimensional, or a sequence of ints.

    Raises:
        TypeError, ValueError: there is no batch, or one is none of these.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        arguments = tuple(map(_arguments, batches))
        self.batches = _pytree.tree_map_only(np.ndarray, torch.from_numpy, arguments)
        if not self.batches:
            raise ValueError("a calibration needs at least one batch of inputs")

    def __repr__(self) -> str:
        return f"Calibration({len(self.batches)} batches, {self.digest()[:16]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def digest(self) -> str:
        """SHA-256 over the structure and the bytes of all batches."""
        total = hashlib.sha256()
        leaves, structure = _pytree.tree_flatten(self.batches)
        total.update(str(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                plain = leaf.detach().contiguous()
                total.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
                total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
            else:
                total.update(repr(leaf).encode())
        return total.hexdigest()

    def run(
        self, program: Program, watch: Watch, nodes: Iterable[fx.Node], in_chunks: bool = False
    ) -> list[Any]:
        """Runs all batches eagerly; returns the outputs, flat, of each.

        Args:
            program: one that takes these inputs: the entry ``prefill`` of a language model,
                which then runs each text in an empty cache.
            watch: sees the results of ``nodes``, which it must not change.
            in_chunks: a text comes as a long prompt alone does, cut by `chunk_bounds`, and not at
                once; the outputs are those of its last chunk.
        """
        watcher = _Watcher(program, watch, frozenset(nodes))
        outputs = []
        with torch.no_grad():
            for batch in self.batches:
                for args, kwargs in self._calls(program, batch, in_chunks):
                    output = watcher.call(args, kwargs)
                outputs.append(output)
        return outputs

    def _calls(
        self, program: Program, batch: Any, in_chunks: bool
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        if program.state():
            yield from _prompt(program, batch, in_chunks)
        elif isinstance(batch, Mapping):
            yield (), dict(batch)
        else:
            yield batch, {}


def as_calibration(who: str, value: object) -> Calibration | None:
    """What a recipe was given as its calibration, once it is known to be one, or None.

    Args:
        who: the recipe that was given it, for the error.

    Raises:
        TypeError: it is neither a `Calibration` nor None.
    """
    return None if value is None else required_calibration(who, value)


def required_calibration(who: str, value: object) -> Calibration:
    """As `as_calibration`, of a recipe that needs one."""
    if isinstance(value, Calibration):
        return value
    raise TypeError(
        f"{who}: calibration must be a sparsify.Calibration, not {type(value).__name__}; "
        "sparsify.Calibration(batches) makes one of batches of inputs, or of texts as token ids"
    )


class _Watcher(fx.Interpreter):
    """Runs a program on PyTorch's own kernels and shows results on the way."""

    def __init__(self, program: Program, watch: Watch, nodes: frozenset[fx.Node]) -> None:
        super().__init__(program.exported.graph_module)
        self.program, self.watch, self.watched = program, watch, nodes

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        exported = self.program.exported
        spec = exported.call_spec.in_spec
        assert spec is not None
        order = spec.children()[1].context
        if set(order) != set(kwargs):
            raise TypeError(
                f"calibration: program {self.program.name!r} takes the keywords {list(order)}, "
                f"a batch has {list(kwargs)}"
            )
        leaves, found = _pytree.tree_flatten((tuple(args), {name: kwargs[name] for name in order}))
        if found != spec:
            raise TypeError(
                f"calibration: a batch has the structure {found}, program "
                f"{self.program.name!r} takes {spec}"
            )
        given = iter(leaves)
        inputs = [
            next(given)
            if part.kind == InputKind.USER_INPUT
            else exported.state_dict[str(part.target)]
            for part in exported.graph_signature.input_specs
        ]
        return self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.watched:
            self.watch(n, result)
        return result


def _arguments(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor | np.ndarray):
        return (batch,)
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and len(batch):
        if all(isinstance(item, int) and not isinstance(item, bool) for item in batch):
            return (torch.tensor(batch, dtype=torch.int64),)
        return tuple(batch)
    raise TypeError(
        f"calibration: {type(batch).__name__} is no batch; give a tensor, a tuple of arguments, a "
        "dict of keyword arguments, or token ids"
    )


def _prompt(
    program: Program, batch: Any, in_chunks: bool
) -> Iterator[tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]]:
    """A text as the arguments of ``prefill``: one row, in an empty cache that just holds it."""
    ids = batch[0] if isinstance(batch, tuple) and len(batch) == 1 else None
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
        raise TypeError(
            f"calibration: program {program.name!r} is of a language model; a batch must be the "
            "token ids of one text, int64 of one dimension"
        )
    if len(ids) == 0:
        raise ValueError("calibration: a text has no tokens; leave it out")
    names = {node.name: node for node in program.user_inputs()}
    layers, _, kv_heads, head_dim, _ = names["keys"].meta["val"].shape
    width = -(-len(ids) // PAGE)
    cache = CacheShape(int(layers), int(kv_heads), int(head_dim)).zeros(width)
    given = {
        "pages": torch.arange(width, dtype=torch.int32)[None],
        "keys": cache[0],
        "values": cache[1],
    }
    of_chunk = ("input_ids", "starts", "counts")
    beside = {
        name: torch.zeros(int(layers), width, *map(int, node.meta["val"].shape[2:]))
        for name, node in names.items()
        if name not in (*given, *of_chunk)
    }
    for first, end in pairwise(chunk_bounds(len(ids)) if in_chunks else (0, len(ids))):
        part = (ids[None, first:end], torch.tensor([first]), torch.tensor([end - first]))
        call = {**given, **dict(zip(of_chunk, part, strict=True))}
        yield tuple(call[name] for name in names if name in call), beside
