"""The cells of RNN, LSTM and GRU, and how one runs along a sequence in one direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]
State = tuple[torch.Tensor, ...]
"""The hidden state, and for an LSTM the cell state, each ``[batch, hidden]``."""


@dataclass(frozen=True)
class Weights:
    """One direction's weights, the gates in ONNX's order along the first dim.

    Attributes:
        x: ``[gates * hidden, features]``, times the input.
        h: ``[gates * hidden, hidden]``, times the hidden state.
        x_bias, h_bias: ``[gates * hidden]``.
        peephole: an LSTM's ``[3 * hidden]``, for the gates i, o and f.
    """

    x: torch.Tensor
    h: torch.Tensor
    x_bias: torch.Tensor | None = None
    h_bias: torch.Tensor | None = None
    peephole: torch.Tensor | None = None


@dataclass(frozen=True)
class Cell:
    """One step: ``(what the input adds to the gates, state) -> state``.

    Attributes:
        activations: one for an RNN; of gates and candidate for a GRU; and of the output for an
            LSTM.
        clip: bound of what goes into activations; None for none.
        input_forget: an LSTM forgets what its input gate does not let in.
        linear_before_reset: a GRU resets the product with the hidden state, not the state.
    """

    activations: tuple[Activation, ...]
    clip: float | None = None
    input_forget: bool = False
    linear_before_reset: bool = False

    def step(self, x: torch.Tensor, state: State, weights: Weights) -> State:
        raise NotImplementedError

    def _clipped(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


class Rnn(Cell):
    """``f(x + h R + b)``."""

    def step(self, x: torch.Tensor, state: State, weights: Weights) -> State:
        return (
            self.activations[0](self._clipped(x + F.linear(state[0], weights.h, weights.h_bias))),
        )


class Gru(Cell):
    """Gates z (keep) and r (reset), candidate h."""

    def step(self, x: torch.Tensor, state: State, weights: Weights) -> State:
        (hidden,) = state
        gate, candidate = self.activations
        size = hidden.shape[-1]
        x_gates, x_candidate = x.split([2 * size, size], -1)
        if self.linear_before_reset:
            h = F.linear(hidden, weights.h, weights.h_bias)
            h_gates, h_candidate = h.split([2 * size, size], -1)
            z, r = gate(self._clipped(x_gates + h_gates)).chunk(2, -1)
            h_candidate = r * h_candidate
        else:
            bias = (
                (None, None) if weights.h_bias is None else weights.h_bias.split([2 * size, size])
            )
            matrices = weights.h.split([2 * size, size])
            h_gates = F.linear(hidden, matrices[0], bias[0])
            z, r = gate(self._clipped(x_gates + h_gates)).chunk(2, -1)
            h_candidate = F.linear(r * hidden, matrices[1], bias[1])
        new = candidate(self._clipped(x_candidate + h_candidate))
        return ((1 - z) * new + z * hidden,)


class Lstm(Cell):
    """Gates i (input), o (output), f (forget), candidate c."""

    def step(self, x: torch.Tensor, state: State, weights: Weights) -> State:
        hidden, cell = state
        gate, candidate, output = self.activations
        i, o, f, c = (x + F.linear(hidden, weights.h, weights.h_bias)).chunk(4, -1)
        peephole = None if weights.peephole is None else weights.peephole.chunk(3)
        if peephole is not None:
            i, f = i + peephole[0] * cell, f + peephole[2] * cell
        i = gate(self._clipped(i))
        f = 1 - i if self.input_forget else gate(self._clipped(f))
        cell = f * cell + i * candidate(self._clipped(c))
        if peephole is not None:
            o = o + peephole[1] * cell
        return gate(self._clipped(o)) * output(cell), cell


def run(
    cell: Cell,
    x: torch.Tensor,
    state: State,
    weights: Weights,
    lengths: torch.Tensor | None = None,
    reverse: bool = False,
) -> tuple[torch.Tensor, State]:
    """Runs a cell along a sequence of static length.

    Args:
        x: ``[length, batch, features]``.
        lengths: int ``[batch]``: steps after a row's end leave its state as it is and give zeros.
        reverse: from each row's last step to its first.

    Returns:
        ``[length, batch, hidden]``, in the order of the input, and the last state.
    """
    steps = x.shape[0]
    if reverse:
        x = _reversed(x, lengths)
    gates = F.linear(x, weights.x, weights.x_bias)
    outputs = []
    for t in range(steps):
        new = cell.step(gates[t], state, weights)
        if lengths is None:
            state, output = new, new[0]
        else:
            inside = (lengths > t).unsqueeze(-1)
            state = tuple(torch.where(inside, n, s) for n, s in zip(new, state, strict=True))
            output = torch.where(inside, new[0], 0)
        outputs.append(output)
    y = torch.stack(outputs)
    return (_reversed(y, lengths) if reverse else y), state


def _reversed(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Each row back to front; what follows its end stays there."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(x.shape[0]).unsqueeze(-1)
    source = torch.where(t < lengths, lengths - 1 - t, t)
    return x.gather(0, source.unsqueeze(-1).expand(x.shape))


def activation(name: str, alpha: float | None = None, beta: float | None = None) -> Activation:
    """An activation by ONNX's name of it, with its defaults.

    Raises:
        KeyError: there is none of this name.
    """
    make = _ACTIVATIONS[name.lower()]
    given: Sequence[float] = [v for v in (alpha, beta) if v is not None]
    return make(*given)


_ACTIVATIONS: dict[str, Callable[..., Activation]] = {
    "relu": lambda *_: torch.relu,
    "tanh": lambda *_: torch.tanh,
    "sigmoid": lambda *_: torch.sigmoid,
    "softsign": lambda *_: F.softsign,
    "softplus": lambda *_: F.softplus,
    "affine": lambda a=1.0, b=0.0: lambda x: a * x + b,
    "leakyrelu": lambda a=0.01, *_: lambda x: F.leaky_relu(x, a),
    "thresholdedrelu": lambda a=1.0, *_: lambda x: torch.where(x > a, x, 0.0),
    "scaledtanh": lambda a=1.0, b=1.0: lambda x: a * torch.tanh(b * x),
    "hardsigmoid": lambda a=0.2, b=0.5: lambda x: (a * x + b).clamp(0, 1),
    "elu": lambda a=1.0, *_: lambda x: F.elu(x, a),
}
