"""A rule in plain PyTorch, run once on small examples and written down as nodes of a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import fx
from torch.fx.experimental import _config
from torch.fx.experimental.proxy_tensor import make_fx

from sparsify.passes.graph import aten
from sparsify.rewriter import Rewriter

_SIZES = 3, 5
"""Of the examples: what differs between them depends on more than the elements."""
_ELEMENTWISE = (
    aten.floor_divide.default,
    aten.scalar_tensor.default,
    aten._to_copy.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
)
"""What is elementwise without PyTorch's tag for it."""


def record(
    rewriter: Rewriter,
    what: object,
    rule: Callable[..., tuple[torch.Tensor, ...]],
    operands: Sequence[fx.Node],
    examples: Callable[[int], Sequence[torch.Tensor]],
) -> list[fx.Node]:
    """The results of an elementwise rule on nodes, at the graph's insertion point.

    Args:
        what: stands for the rule in errors.
        examples: of the operands' ranks and of a size, on which the rule is run.

    Raises:
        ValueError: the rule uses an operator that is not elementwise, branches on values, or does
            something else for other sizes.
    """
    graph, other = (_traced(what, rule, examples(size)) for size in _SIZES)
    if _calls(graph) != _calls(other):
        raise ValueError(
            f"pattern {what}: keep does something else where there are {_SIZES[1]} blocks than "
            f"where there are {_SIZES[0]}; it may use the elements of its arguments, not their "
            "shapes, so that it serves any length"
        )
    made: dict[fx.Node, fx.Node] = {}
    given = iter(operands)
    for node in graph.nodes:
        if node.op == "placeholder":
            made[node] = next(given)
        elif node.op == "output":
            return [made[result] for result in node.args[0]]
        elif not _is_elementwise(node):
            raise ValueError(
                f"pattern {what}: {node.target} is not elementwise; keep must be made of "
                "arithmetic, comparisons and logic on its arguments, so that it serves any length"
            )
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
            made[node] = rewriter.call(node.target, args, kwargs)
    raise AssertionError("a traced graph has an output")


def _traced(
    what: object, rule: Callable[..., tuple[torch.Tensor, ...]], examples: Sequence[torch.Tensor]
) -> fx.Graph:
    try:
        # Tracing knows arguments by identity: a tensor given twice would be one argument.
        return make_fx(rule)(*(example.clone() for example in examples)).graph
    except RuntimeError as error:
        raise ValueError(
            f"pattern {what}: keep cannot be written down; it must be elementwise, without "
            f"branches on the values of its arguments: {error}"
        ) from error


def _calls(graph: fx.Graph) -> list[object]:
    """What a graph does, for comparisons."""
    places = {node: f"%{place}" for place, node in enumerate(graph.nodes)}
    return [
        (node.op, str(node.target), *fx.map_arg((node.args, node.kwargs), places.__getitem__))
        for node in graph.nodes
    ]


def _is_elementwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and (
        torch.Tag.pointwise in tags or node.target in _ELEMENTWISE
    )


def ramp(rewriter: Rewriter, count: int | fx.Node, trailing: int = 0) -> fx.Node:
    """``arange(count)`` with so many dimensions of 1 behind."""
    made = rewriter.call(aten.arange.start_step, (0, count))
    for _ in range(trailing):
        made = rewriter.call(aten.unsqueeze.default, (made, len(made.meta["val"].shape)))
    return made


@contextmanager
def unguarded(node: fx.Node) -> Iterator[None]:
    """Evaluates without assumptions on the number of blocks.

    Broadcasting takes a symbolic extent for 1 where the example inputs have one block, and would
    leave a program for one block alone; here it may only look at what is 1 for every input.
    """
    shape_env = node.meta["val"].fake_mode.shape_env
    quiet = nullcontext() if shape_env is None else shape_env.suppress_guards()
    with quiet, _config.patch(backed_size_oblivious=True):
        yield
