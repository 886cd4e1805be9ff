"""Static patterns are as dense as they may be."""

import pytest

from benchmarks.attention_quality import STATIC, fitting, share_of


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("blocks", [17, 33, 63])
def test_a_pattern_is_the_densest_within_the_density(name: str, blocks: int) -> None:
    """Or the sparsest of its kind."""
    shares = [share_of(STATIC[name](size), blocks) for size in range(1, blocks)]
    within = [share for share in shares if share <= 0.25]
    found = share_of(fitting(STATIC[name], blocks, 0.25), blocks)
    assert found == (max(within) if within else shares[0])


def test_a_share_is_of_what_causality_shows() -> None:
    """Of the ten pairs of four blocks; of the nine heads two read the first shard, one the next."""
    assert share_of(STATIC["window_sinks"](1), 4) == pytest.approx(0.9)
    assert share_of(STATIC["sharded"](1), 4) == pytest.approx((7 + (2 + 2 + 1) / 9) / 10)
