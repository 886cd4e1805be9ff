"""RNN, GRU and LSTM in all their directions, unrolled: the length must be static."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sparsify.frontend.onnx.cells import (
    Activation,
    Cell,
    Gru,
    Lstm,
    Rnn,
    State,
    Weights,
    activation,
    run,
)
from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import NeedsSizes, Unsupported, operator
from sparsify.frontend.onnx.tables import table
from sparsify.frontend.onnx.values import Constant, known

_REVERSE = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
_DEFAULTS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
_CELLS: dict[str, type[Cell]] = {"RNN": Rnn, "GRU": Gru, "LSTM": Lstm}


@operator("RNN", "GRU", "LSTM", constants=("lengths",))
def recurrent(
    node: Node,
    x: torch.Tensor,
    x_weight: torch.Tensor,
    h_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    lengths: torch.Tensor | Constant | None = None,
    initial_h: torch.Tensor | None = None,
    initial_c: torch.Tensor | None = None,
    peephole: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    directions = _REVERSE[node.get("direction", "forward")]
    batch_first = bool(node.get("layout", 0))
    if batch_first:
        x = x.transpose(0, 1)
    steps, batch = x.shape[:2]
    if not isinstance(steps, int):
        raise NeedsSizes(f"a sequence of dynamic length {steps}")
    hidden = h_weight.shape[-1]
    given = [s for s in (initial_h, initial_c) if s is not None]
    if batch_first:
        given = [s.transpose(0, 1) for s in given]
    zeros = x.new_zeros((len(directions), batch, hidden))
    count = 2 if node.operator == "LSTM" else 1
    initial = (
        [*given, *[zeros] * count][:count]
        if initial_h is not None
        else [
            zeros,
            *given,
            *[zeros] * count,
        ][:count]
    )
    outputs, last = [], []
    for d, reverse in enumerate(directions):
        weights = _weights(x_weight[d], h_weight[d], bias, peephole, d)
        state: State = tuple(s[d] for s in initial)
        cell = _cell(node, d, len(directions))
        y, state = run(cell, x, state, weights, _lengths(lengths, steps), reverse)
        outputs.append(y)
        last.append(state)
    y = torch.stack(outputs, 1)
    final = [torch.stack(parts) for parts in zip(*last, strict=True)]
    if batch_first:
        y, final = y.permute(2, 0, 1, 3), [f.transpose(0, 1) for f in final]
    return (y, *final)


def _weights(
    x: torch.Tensor,
    h: torch.Tensor,
    bias: torch.Tensor | None,
    peephole: torch.Tensor | None,
    direction: int,
) -> Weights:
    if bias is None:
        return Weights(x, h, None, None, None if peephole is None else peephole[direction])
    x_bias, h_bias = bias[direction].chunk(2)
    return Weights(x, h, x_bias, h_bias, None if peephole is None else peephole[direction])


def _lengths(lengths: torch.Tensor | Constant | None, steps: int) -> torch.Tensor | None:
    """The lengths of rows where they may differ."""
    if isinstance(lengths, Constant):
        elements = known(lengths)
        if np.all(elements == steps):
            return None
        return table(elements, torch.int64)
    return None if lengths is None else lengths.long()


def _cell(node: Node, direction: int, directions: int) -> Cell:
    default = _DEFAULTS[node.operator]
    names = node.get("activations") or default * directions
    if len(names) != len(default) * directions:
        raise Unsupported(f"{len(names)} activations for {directions} directions")
    functions = _activations(names, node.get("activation_alpha"), node.get("activation_beta"))
    first = direction * len(default)
    return _CELLS[node.operator](
        tuple(functions[first : first + len(default)]),
        node.get("clip"),
        bool(node.get("input_forget", 0)),
        bool(node.get("linear_before_reset", 0)),
    )


def _activations(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None
) -> list[Activation]:
    """The functions; each takes the next alpha and beta if it has one."""
    alpha, beta = iter(alphas or ()), iter(betas or ())
    found = []
    for name in names:
        wants = _PARAMETERS.get(name.lower(), 0)
        a = next(alpha, None) if wants >= 1 else None
        b = next(beta, None) if wants >= 2 else None
        try:
            found.append(activation(name, a, b))
        except KeyError:
            raise Unsupported(f"the activation {name}") from None
    return found


_PARAMETERS = {
    **dict.fromkeys(("leakyrelu", "thresholdedrelu", "elu"), 1),
    **dict.fromkeys(("affine", "scaledtanh", "hardsigmoid"), 2),
}
