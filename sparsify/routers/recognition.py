"""Which router some code is: the first one of ours that gives what the code gives.

What code computes is not read from it. Each kind of router says which of its kind the code may be,
given the constants in it (`Router.candidates`); logits are made up, and all of them must come out
the same: small and large, crowded on an expert, and so far below zero that a sigmoid tells them
apart where a clamp does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from sparsify.routers.base import ROUTERS, Candidate, Router, Seen

_TOKENS = 64
"""Of which there are at least so many in all."""

_TOLERANCE = 1e-5
"""Of the largest weight."""


def fitting(seen: Seen, width: int) -> Iterator[Candidate]:
    """The routers that code may be whose tokens have so many logits."""
    for kind in ROUTERS:
        for router, parameters in kind.candidates(seen):
            try:
                router.check(width, parameters)
                fits = router.experts(width) == seen.experts
            except ValueError:
                continue
            if fits and seen.slots in (None, router.slots(seen.experts)):
                yield router, parameters


def gates_of(experts: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """What each expert counts for each token, ``[tokens, count]``: 0 where it is not chosen."""
    gates = weights.new_zeros(len(weights), count + 1)
    places = torch.where(experts < 0, count, experts).long()
    return gates.scatter_add(1, places, weights)[:, :count]


def recognise(
    compute: Callable[[torch.Tensor], torch.Tensor], seen: Seen, tokens: int, width: int
) -> Candidate | None:
    """The router that code is, or None; also where it does not run on logits like these.

    Args:
        compute: the code: of logits ``[tokens, width]`` it gives what `gates_of` does.
    """
    try:
        probes = [(logits, compute(logits)) for logits in _logits(tokens, width)]
    except Exception:
        return None  # the code's own errors; those of our routers are not hidden
    for router, parameters in fitting(seen, width):
        if all(_agree(router, parameters, *probe, seen.experts) for probe in probes):
            return router, parameters
    return None


def _agree(
    router: Router,
    parameters: tuple[torch.Tensor, ...],
    logits: torch.Tensor,
    gates: torch.Tensor,
    count: int,
) -> bool:
    fair = router.decided(logits, *parameters)
    if not fair.any():
        return True
    found = gates_of(*router.route(logits, *parameters), count)[fair]
    wanted = gates[fair]
    if found.shape != wanted.shape or not wanted.isfinite().all():
        return False
    scale = wanted.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return bool((found - wanted).abs().max() <= _TOLERANCE * scale)


def _logits(tokens: int, width: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(tokens, width, generator=generator)

    for _ in range(-(-_TOKENS // (6 * tokens))):
        for scale in (1.0, 0.1, 3.0, 100.0):
            yield scale * normal()
        yield 5.0 - 30.0 * normal().abs()
        crowded = normal()
        crowded[:, 0] += 6.0
        yield crowded
