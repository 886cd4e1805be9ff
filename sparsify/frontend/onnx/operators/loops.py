"""Loop and Scan, unrolled: how often they run must be known while tracing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import NeedsSizes, Unsupported, operator
from sparsify.frontend.onnx.values import Constant, Value, known, traced, untraced

MOST_TURNS = 1024
"""A loop of more turns is refused: each turn becomes a part of the program."""


@operator("Loop", host=("turns", "condition"), constants=("carried",))
def loop(
    node: Node, turns: np.ndarray | None, condition: np.ndarray | None, *carried: Value
) -> tuple[Value, ...]:
    """Runs the body ``turns`` times, or until its condition is constant False."""
    body = node.require("body")
    limit = None if turns is None else turns.reshape(-1)[0]
    if isinstance(limit, torch.SymInt):
        raise NeedsSizes(f"a loop of {limit} turns, which is dynamic")
    goes_on = condition is None or bool(condition.item())
    state, gathered, turn = list(carried), [], 0
    while goes_on and (limit is None or turn < limit):
        if turn == MOST_TURNS:
            raise Unsupported(f"a loop of more than {MOST_TURNS} turns")
        again, *results = node.run(body, [_number(turn), _number(True), *state])
        state, turn = results[: len(carried)], turn + 1
        gathered.append(results[len(carried) :])
        goes_on = _decided(again)
    if not gathered and len(body.output) > 1 + len(carried):
        raise Unsupported("a loop that never runs, of whose results the shape is unknown")
    return (*state, *(_stacked(node, values, 0) for values in zip(*gathered, strict=True)))


def _number(value: int | bool) -> Constant:
    with untraced():
        return Constant(torch.tensor(value))


def _decided(condition: Value) -> bool:
    elements = known(condition)
    if elements is None:
        raise Unsupported("a loop whose end is computed from the model's inputs")
    return bool(elements.reshape(-1)[0])


def _stacked(node: Node, values: Sequence[Value], axis: int) -> Value:
    """The results of all turns along a new dim."""
    if all(isinstance(value, Constant) for value in values):
        with untraced():
            return Constant(torch.stack([v.tensor for v in values], axis))  # type: ignore[union-attr]
    return torch.stack([_tensor(node, value) for value in values], axis)


def _tensor(node: Node, value: Value) -> torch.Tensor:
    if isinstance(value, Constant):
        return node.parameter(value)
    if isinstance(value, np.ndarray):
        return traced(value)
    assert value is not None
    return value


@operator("Scan", since=8)
def batched_scan(
    node: Node, lengths: torch.Tensor | None, *operands: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Version 8 runs over dim 1 of each row of a batch."""
    if lengths is not None:
        raise Unsupported("lengths of sequences")
    body, count = node.require("body"), node.require("num_scan_inputs")
    rows = [
        _scan(node, body, count, [operand[row] for operand in operands])
        for row in range(_turns(operands[0], 0))
    ]
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


@operator("Scan", since=9)
def scan(node: Node, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Runs the body for each slice of the last operands; the first ones are carried along."""
    return tuple(_scan(node, node.require("body"), node.require("num_scan_inputs"), operands))


def _scan(
    node: Node, body: onnx.GraphProto, count: int, operands: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    first = len(operands) - count
    state: list[Value] = list(operands[:first])
    scanned = list(operands[first:])
    axes = node.get("scan_input_axes") or [0] * count
    back = node.get("scan_input_directions", node.get("directions")) or [0] * count
    turns = _turns(scanned[0], axes[0])
    gathered = []
    for turn in range(turns):
        slices = [
            x.select(axis, turns - 1 - turn if reverse else turn)
            for x, axis, reverse in zip(scanned, axes, back, strict=True)
        ]
        results = node.run(body, [*state, *slices])
        state = results[:first]
        gathered.append(results[first:])
    columns = list(zip(*gathered, strict=True))
    out_axes = node.get("scan_output_axes") or [0] * len(columns)
    out_back = node.get("scan_output_directions") or [0] * len(columns)
    stacked = [
        torch.stack([_tensor(node, v) for v in (reversed(column) if reverse else column)], axis)
        for column, axis, reverse in zip(columns, out_axes, out_back, strict=True)
    ]
    return [*(_tensor(node, value) for value in state), *stacked]


def _turns(x: torch.Tensor, axis: int) -> int:
    size = x.shape[axis]
    if not isinstance(size, int):
        raise NeedsSizes(f"a loop over a dynamic dim {size}")
    if size > MOST_TURNS:
        raise Unsupported(f"a loop of {size} turns, more than {MOST_TURNS}")
    return size
