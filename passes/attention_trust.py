"""What leaving keys out costs: density, attention mass and output error of every head, on data.

Every recipe that drops keys, static or dynamic, accounts with this one: the same visible pairs,
the same softmax, the same norm, so that their figures can be put side by side.

Source: Nawrot et al., "The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs", 2025.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from sparsify.ops import below_maximum
from sparsify.report import Decision

_ROWS = 256
"""Queries whose scores are in memory at once."""


class BudgetError(ValueError):
    """A recipe changes the output of a head by more than it was allowed to."""


@dataclass(frozen=True)
class HeadTrust:
    """What a recipe does to one head.

    Attributes:
        site: of the attention, as in the report; ``head`` of its query heads.
        density: pairs of query and key that are computed, over those that the mask shows.
        skipped: pairs whose values are not read as their scores are too low, over those computed,
            by the narrowest tiles: wider ones skip less, and cost no more.
        mass: share of the dense attention's weights that is on computed pairs, mean over queries;
            what is skipped counts as left out.
        error: norm of the change of the head's output over the norm of its dense output.
    """

    site: str
    head: int
    density: float
    mass: float
    error: float
    skipped: float = 0.0


@dataclass
class _Sums:
    """One site's sums over data, float64, one number a head."""

    visible: torch.Tensor
    kept: torch.Tensor
    queries: torch.Tensor
    mass: torch.Tensor
    change: torch.Tensor
    norm: torch.Tensor
    skipped: torch.Tensor

    @classmethod
    def zeros(cls, heads: int) -> _Sums:
        return cls(*torch.zeros(7, heads, dtype=torch.float64))


@dataclass
class AttentionTrust:
    """Collects what a recipe does to each head of each site; `observe` each call of each site."""

    _sites: dict[str, _Sums] = field(default_factory=dict)

    def observe(
        self,
        site: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kept: torch.Tensor,
        visible: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        scale: float = 1.0,
        softcap: float = 0.0,
        skip: float = 0.0,
        block: int = 1,
    ) -> None:
        """Adds one call of one attention.

        Args:
            query: ``[heads, queries, head_dim]`` of one sequence, or with a batch in front.
            key, value: ``[kv_heads, keys, head_dim]`` likewise.
            kept: bool, broadcastable to ``[..., heads, queries, keys]``: what the recipe computes.
            visible: bool likewise, what the model's mask shows; None: all. What is kept but not
                visible counts for nothing.
            bias: float likewise, added to the scores.
            scale, softcap: of the scores.
            skip: what is kept is skipped by `below_maximum`, in blocks of so many keys; 0: it is
                not.
        """
        if query.dim() == 3:
            query, key, value = query[None], key[None], value[None]
        heads, group = query.shape[1], query.shape[1] // key.shape[1]
        key, value = (x.float().repeat_interleave(group, 1) for x in (key, value))
        shape = (*query.shape[:3], key.shape[2])
        kept = kept.expand(shape)
        visible = torch.ones((), dtype=torch.bool).expand(shape) if visible is None else visible
        visible = visible.expand(shape)
        sums = self._sites.setdefault(site, _Sums.zeros(heads))
        for first in range(0, shape[2], _ROWS):
            rows = slice(first, first + _ROWS)
            scores = query[:, :, rows].float() @ key.transpose(2, 3) * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            if bias is not None:
                scores = scores + bias.expand(shape)[:, :, rows]
            seen = kept[:, :, rows] & visible[:, :, rows]
            low = torch.zeros_like(seen)
            if skip:
                low = seen & below_maximum(scores.masked_fill(~seen, -math.inf), skip, block)
            _add(sums, scores, value, visible[:, :, rows], seen, low)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self._sites)

    def heads(self, site: str | None = None) -> Iterator[HeadTrust]:
        """Every head of one site, or of all in the order in which they were seen."""
        for name in self._sites if site is None else (site,):
            s = self._sites[name]
            for head in range(len(s.norm)):
                yield HeadTrust(
                    name,
                    head,
                    _ratio(s.kept[head], s.visible[head]),
                    _ratio(s.mass[head], s.queries[head]),
                    _ratio(s.change[head], s.norm[head], 0.0) ** 0.5,
                    _ratio(s.skipped[head], s.kept[head], 0.0),
                )

    def check(self, recipe: str, budget_error: float | None) -> None:
        """Refuses a recipe that changes the output of any head by more than ``budget_error``.

        Raises:
            BudgetError: naming the site and head of the largest error.
        """
        worst = max(self.heads(), key=lambda h: h.error, default=None)
        if budget_error is None or worst is None or worst.error <= budget_error:
            return
        over = sum(head.error > budget_error for head in self.heads())
        raise BudgetError(
            f"{recipe}: head {worst.head} of {worst.site} changes its output by "
            f"{worst.error:.3g}, and budget_error is {budget_error:g}; it computes "
            f"{worst.density:.1%} of the pairs and keeps {worst.mass:.2%} of the attention. "
            f"{over} of {len(tuple(self.heads()))} heads break the budget: raise the density or "
            "the budget, or leave these sites out"
        )

    def decisions(self, made_by: str, what: str, sites: Iterable[str] = ()) -> Iterator[Decision]:
        """One of each site, with the worst of its heads, then one of each of its heads.

        Args:
            what: what the recipe did there, the beginning of the reason.
            sites: which; all that were seen by default.
        """
        for site in sites or self.sites:
            heads = tuple(self.heads(site))
            count = len(heads)
            worst = max(heads, key=lambda h: h.error)
            density = sum(h.density for h in heads) / count
            mass = sum(h.mass for h in heads) / count
            skipped = sum(h.skipped for h in heads) / count
            low = f", up to {skipped:.1%} of them skipped for low scores," * (skipped > 0)
            reason = (
                f"{what}; {density:.1%} of the pairs{low} keep "
                f"{mass:.2%} of the attention, and the "
                f"output of head {worst.head} changes most, by {worst.error:.2g}"
            )
            yield Decision(
                site,
                "attention",
                "rewritten",
                reason,
                made_by,
                density=density,
                error=worst.error,
                mass=mass,
            )
            for h in heads:
                yield Decision(
                    f"{site}.head{h.head}",
                    "attention head",
                    "rewritten",
                    f"keeps {h.mass:.2%} of the attention",
                    made_by,
                    density=h.density,
                    error=h.error,
                    mass=h.mass,
                )


def _add(
    sums: _Sums,
    scores: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    seen: torch.Tensor,
    low: torch.Tensor,
) -> None:
    """Adds queries ``[batch, heads, rows, keys]`` to the sums: what is seen but for what is low."""
    over = (0, 2, 3)
    kept = seen & ~low
    dense = _softmax(scores, visible)
    sparse = _softmax(scores, kept)
    sums.visible += visible.sum(over)
    sums.kept += seen.sum(over)
    sums.skipped += low.sum(over)
    sums.queries += visible.any(-1).sum((0, 2))
    sums.mass += (dense * kept).sum(over, dtype=torch.float64)
    expected = dense @ value
    sums.change += (sparse @ value - expected).double().square().sum(over)
    sums.norm += expected.double().square().sum(over)


def _softmax(scores: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Weights of what is shown; zeros where nothing is."""
    return scores.masked_fill(~shown, float("-inf")).softmax(-1).nan_to_num(0.0)


def _ratio(part: torch.Tensor, whole: torch.Tensor, of_nothing: float = 1.0) -> float:
    return float(part / whole) if whole > 0 else of_nothing
