"""Learned gates of blocks: one matrix a head, distilled from attention on texts.

Source: Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", 2024, whose
target this is: the maxima of attention over blocks, each row as shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.calibration import Calibration
from sparsify.passes.selection_trust import Attended, each_attention
from sparsify.program import Program

_STEPS = 200
_RATE = 0.01
_EVERY = 10
"""Steps between two looks at the rows that are held out."""
_HELD_OUT = 4
"""Of so many rows one is held out."""


@dataclass(frozen=True)
class Lesson:
    """What one attention of one text teaches the gates of its heads.

    Attributes:
        queries: mean queries, ``[heads, rows, head_dim]``.
        keys: mean keys, times the scale, ``[heads, blocks, head_dim]``.
        seen: which blocks a row may see, ``[rows, blocks]``.
        target: shares of the blocks, ``[heads, rows, blocks]``.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    seen: torch.Tensor
    target: torch.Tensor

    @classmethod
    def of(cls, attended: Attended, queries: int, keys: int) -> Lesson:
        """Of blocks of so many queries and keys; rows that see a single block teach nothing."""
        scale = attended.options["scale"]
        assert isinstance(scale, float)
        group = len(attended.query) // len(attended.key)
        key = attended.key.repeat_interleave(group, 0)
        blocks = torch.stack([part.mean(1) for part in key.split(keys, 1)], 1)
        means, targets, seen = [], [], []
        for row, part in enumerate(attended.query.split(queries, 1)):
            first = row * queries
            last = first + part.shape[1] - 1
            visible = torch.arange(key.shape[1]) <= torch.arange(first, last + 1)[:, None]
            scores = (part @ key.mT * scale).masked_fill(~visible, float("-inf"))
            most = torch.stack([x.amax((1, 2)) for x in scores.softmax(-1).split(keys, 2)], 1)
            means.append(part.mean(1))
            targets.append(most / most.sum(1, keepdim=True))
            seen.append(torch.arange(most.shape[1]) * keys <= last)
        shown = torch.stack(seen)
        useful = shown.sum(1) > 1
        return cls(
            torch.stack(means, 1)[:, useful],
            blocks * scale,
            shown[useful],
            torch.stack(targets, 1)[:, useful],
        )

    def losses(self, gates: torch.Tensor) -> torch.Tensor:
        """Kullback-Leibler divergence of what gates say from the target, ``[heads, rows]``."""
        scores = torch.einsum("hrd,hde,hbe->hrb", self.queries, gates, self.keys)
        said = scores.masked_fill(~self.seen, -1e30).log_softmax(-1)
        known = torch.xlogy(self.target, self.target)
        return (known - self.target * said).masked_fill(~self.seen, 0.0).sum(-1)


def train_gates(
    program: Program, calibration: Calibration, queries: int, keys: int
) -> dict[int, torch.Tensor]:
    """Gates of every layer of a prefill program, float32 ``[heads, head_dim, head_dim]``.

    Training begins at the identity, which is pooling, and each head keeps the gate that was best on
    rows that were held out; so on these no gate is worse than pooling.

    Args:
        queries, keys: tokens of a block.

    Raises:
        ValueError: no text has blocks to choose from.
    """
    lessons: dict[int, list[Lesson]] = {}

    def visit(attended: Attended) -> None:
        layer = attended.options["layer"]
        assert isinstance(layer, int)
        lesson = Lesson.of(attended, queries, keys)
        if len(lesson.seen) >= _HELD_OUT:
            lessons.setdefault(layer, []).append(lesson)

    each_attention(program, calibration, visit)
    if not lessons:
        raise ValueError(
            f"gates are trained on texts of at least {_HELD_OUT + 1} blocks of {queries} tokens; "
            "the calibration has none that long"
        )
    return {layer: _trained(of_layer) for layer, of_layer in lessons.items()}


def _trained(lessons: list[Lesson]) -> torch.Tensor:
    heads, _, head_dim = lessons[0].queries.shape
    gates = torch.eye(head_dim).repeat(heads, 1, 1).requires_grad_()
    optimiser = torch.optim.Adam([gates], _RATE)
    best = gates.detach().clone()
    least = torch.full((heads,), torch.inf)
    for step in range(_STEPS + 1):
        with torch.enable_grad():
            rows = torch.cat([lesson.losses(gates) for lesson in lessons], 1)
            held = torch.arange(rows.shape[1]) % _HELD_OUT == _HELD_OUT - 1
            if step % _EVERY == 0:
                unseen = rows[:, held].mean(1).detach()
                best = torch.where((unseen < least)[:, None, None], gates.detach(), best)
                least = torch.minimum(least, unseen)
            optimiser.zero_grad()
            # Heads share no weights: the sum trains each by itself.
            rows[:, ~held].mean(1).sum().backward()
        optimiser.step()
    return best
