"""Masks of every spelling become a band of positions and what remains; numbers stay the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.graph import arguments
from sparsify.passes.positions import Region

SIZES = [(1, 1), (2, 5), (1, 9), (3, 17)]
Build = Callable[..., torch.Tensor]
LOW = torch.finfo(torch.float32).min


class Attend(nn.Module):
    """Attention of x [b, s, 8] with itself under each of many masks ``build(self, x, keep)``."""

    def __init__(self, builds: list[Build], spelled: bool) -> None:
        super().__init__()
        self.builds, self.spelled = builds, spelled
        lower = torch.ones(32, 32).tril()
        self.register_buffer("lower", lower)
        self.register_buffer("band", lower.triu(-3).bool())
        self.register_buffer("holes", (lower * (torch.arange(32) != 3)).bool())
        self.register_buffer("added", torch.where(lower.bool(), 0.0, -torch.inf))

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> list[torch.Tensor]:
        h = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return [self.attend(h, build(self, x, keep)) for build in self.builds]

    def attend(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if not self.spelled:
            return F.scaled_dot_product_attention(h, h, h, mask).transpose(1, 2).flatten(2)
        scores = h @ h.transpose(2, 3) * 0.5
        if mask.is_floating_point():
            scores = scores + mask
        else:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ h).transpose(1, 2).flatten(2)


def positions(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.arange(x.shape[1])
    return at[:, None], at


def fused(builds: dict[str, Build], spelled: bool = False) -> dict[str, tuple[Any, str]]:
    """(operands of the attention, reason) by name, after comparing results on odd sizes."""
    torch.manual_seed(0)
    model = Attend(list(builds.values()), spelled).eval()
    programs = import_torch(model, (torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)))
    result = run_pipeline(programs, PORTABLE)
    program = result.programs["forward"]
    for batch, length in SIZES:
        x, keep = torch.randn(batch, length, 8), torch.rand(batch, length) < 0.7
        keep[:, 0] = True
        for name, got, expected in zip(builds, program.run(x, keep), model(x, keep), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)
    nodes = [n for n in program.graph.nodes if "fused_attention" in str(n.target)]
    reasons = [d.reason for d in result.decisions if d.made_by == "fuse_attention"]
    told = zip(map(arguments, nodes), reasons, strict=True)
    return dict(zip(builds, told, strict=True))


def band(options: Any) -> tuple[bool, int, int]:
    return options["causal"], options["window"], options["sinks"]


def by(rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Build:
    return lambda m, x, keep: rule(*positions(x))


def added(rule: Build, low: float) -> Build:
    return lambda m, x, keep: torch.where(rule(m, x, keep), 0.0, low)


def stored(name: str) -> Build:
    return lambda m, x, keep: getattr(m, name)[: x.shape[1], : x.shape[1]]


causal = by(lambda q, k: k <= q)
window = by(lambda q, k: (k <= q) & (k > q - 4))

WHOLE = {
    "causal": (causal, (True, 0, 0)),
    "not-above": (by(lambda q, k: ~(k > q)), (True, 0, 0)),
    "distance": (by(lambda q, k: q - k >= 0), (True, 0, 0)),
    "stored-numbers": (lambda m, x, k: stored("lower")(m, x, k) != 0, (True, 0, 0)),
    "stored-added": (stored("added"), (True, 0, 0)),
    "added": (added(causal, -torch.inf), (True, 0, 0)),
    "added-finite": (added(causal, LOW), (True, 0, 0)),
    "square-mask": (
        lambda m, x, k: nn.Transformer.generate_square_subsequent_mask(x.shape[1]),
        (True, 0, 0),
    ),
    "window": (window, (True, 4, 0)),
    "window-added-finite": (added(window, LOW), (True, 4, 0)),
    "window-of-distances": (by(lambda q, k: (q - k < 4) & (k - q <= 0)), (True, 4, 0)),
    "window-cut-twice": (
        lambda m, x, keep: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(-3),
        (True, 4, 0),
    ),
    "window-stored": (stored("band"), (True, 4, 0)),
    "both-sides": (by(lambda q, k: (q - k).abs() <= 3), (False, 4, 0)),
    "both-sides-apart": (by(lambda q, k: (k > q - 4) & (k < q + 4)), (False, 4, 0)),
    "sinks": (by(lambda q, k: (k <= q) & ((k > q - 4) | (k < 2))), (True, 4, 2)),
    "sinks-distributed": (
        by(lambda q, k: ((k <= q) & (q - k < 4)) | ((k <= q) & (k < 2))),
        (True, 4, 2),
    ),
}


@pytest.mark.parametrize("spelled", [False, True], ids=["sdpa", "spelled"])
def test_positions_alone_leave_no_mask(spelled: bool) -> None:
    found = fused({name: build for name, (build, _) in WHOLE.items()}, spelled)
    for name, (_, expected) in WHOLE.items():
        options, _ = found[name]
        assert (band(options), options["mask"]) == (expected, None), name


BESIDES = {
    "causal": lambda m, x, keep: causal(m, x, keep) & keep[:, None, None],
    "causal-then-placed": lambda m, x, keep: (causal(m, x, keep) & keep[:, None])[:, None],
    "added": added(lambda m, x, keep: causal(m, x, keep) & keep[:, None, None], -torch.inf),
}


def test_a_mask_of_keys_stays_beside_the_band() -> None:
    for name, (options, reason) in fused(BESIDES).items():
        assert band(options) == (True, 0, 0), name
        assert options["mask"].meta["val"].shape[1:3] == (1, 1), name
        assert "causal, and a mask of keys besides" in reason


WITHIN = {
    "chunks": (by(lambda q, k: (q // 4 == k // 4) & (k <= q)), (True, 4, 0)),
    "chunks-both-ways": (by(lambda q, k: q // 4 == k // 4), (False, 4, 0)),
    "stored-with-holes": (stored("holes"), (True, 0, 0)),
    "ahead": (by(lambda q, k: (k <= q + 2) & (q - k < 5)), (False, 5, 0)),
    "bias": (
        lambda m, x, keep: added(causal, -torch.inf)(m, x, keep) + (x @ x.mT)[:, None],
        (True, 0, 0),
    ),
}


def test_a_band_around_what_is_no_band() -> None:
    found = fused({name: build for name, (build, _) in WITHIN.items()})
    for name, (_, expected) in WITHIN.items():
        options, _ = found[name]
        assert band(options) == expected and options["mask"] is not None, name


OPAQUE = {
    "offset": (by(lambda q, k: k <= q + 2), "no window around the query"),
    "one-row": (
        # Spreads over queries: a mask of keys and no causality.
        lambda m, x, keep: torch.arange(1)[:, None] >= torch.arange(x.shape[1]),
        "hides keys",
    ),
    "keys": (lambda m, x, keep: keep[:, None, None], "hides keys"),
    "blind-rows": (
        added(lambda m, x, keep: causal(m, x, keep) & keep[:, None, None], LOW),
        "hide by minus infinity",
    ),
    "bias": (lambda m, x, keep: (x @ x.mT)[:, None], "does not tell what it hides"),
}


def test_a_mask_that_is_not_understood_stays_and_says_why() -> None:
    found = fused({name: build for name, (build, _) in OPAQUE.items()})
    for name, (_, why) in OPAQUE.items():
        options, reason = found[name]
        assert band(options) == (False, 0, 0) and options["mask"] is not None, name
        assert why in reason, name


def shown(region: Region, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    d = q - k
    seen = torch.ones_like(d, dtype=torch.bool)
    if region.low is not None:
        seen &= d >= region.low
    if region.high is not None:
        seen &= (d <= region.high) | (k < region.sinks)
    if region.prefix is not None:
        seen &= k < region.prefix
    if region.chunk:
        seen &= q // region.chunk == k // region.chunk
    return seen


def test_bands_hide_nothing_that_regions_show() -> None:
    from sparsify.band import Band

    q, k = torch.arange(12)[:, None], torch.arange(15)
    some = (None, -3, 0, 2)
    for low in some:
        for high in some:
            for sinks, prefix, chunk in ((0, None, 0), (2, None, 0), (0, 4, 0), (0, None, 4)):
                region = Region(low, high, sinks if high is not None else 0, prefix, chunk)
                seen = Band(*region.band)(0, 0, q, k)
                assert not bool((shown(region, q, k) & ~seen).any()), region
                if region.is_band:
                    assert torch.equal(seen, shown(region, q, k)), region
