"""Pages are handed out as sequences grow, and memory with them."""

from pathlib import Path

import pytest
import torch

from sparsify.generation import CacheFull, PagedCache
from sparsify.ops import CacheShape

SHAPE = CacheShape(layers=2, kv_heads=3, head_dim=4)


def grown(cache: PagedCache, *counts: int) -> None:
    cache.reserve(torch.tensor(counts))
    cache.advance(torch.tensor(counts))


def pages_of(cache: PagedCache, row: int) -> list[int]:
    held = -(-int(cache.lengths[row]) // 16)
    return cache.pages[row, :held].tolist()


def test_every_page_belongs_to_one_sequence() -> None:
    cache = PagedCache(SHAPE, 3, 100)
    for counts in ((1, 40, 16), (15, 0, 1), (1, 20, 30)):
        grown(cache, *counts)
        held = [page for row in range(3) for page in pages_of(cache, row)]
        assert len(held) == len(set(held)) == sum(-(-n // 16) for n in cache.lengths.tolist())
        assert max(held) < cache.keys.shape[1]
    assert cache.lengths.tolist() == [17, 60, 47]
    assert cache.nbytes == (2 + 4 + 3) * 16 * SHAPE.token_bytes


def test_growing_keeps_pages_and_tensors() -> None:
    cache = PagedCache(SHAPE, 1, 64)
    grown(cache, 16)
    before, place = pages_of(cache, 0), cache.keys.data_ptr()
    grown(cache, 48)
    assert pages_of(cache, 0)[:1] == before
    assert cache.keys.data_ptr() == place


def test_a_full_cache_is_refused_whole() -> None:
    cache = PagedCache(SHAPE, 2, 20)
    grown(cache, 5, 20)
    with pytest.raises(CacheFull, match=r"sequence 1 would hold 21 tokens.*made for 20"):
        cache.reserve(torch.tensor([15, 1]))
    assert cache.lengths.tolist() == [5, 20]
    grown(cache, 15, 0)


def test_pages_of_an_emptied_sequence_serve_others() -> None:
    cache = PagedCache(SHAPE, 2, 32)
    grown(cache, 32, 32)
    cache.reset(0)
    assert cache.lengths.tolist() == [0, 32]
    grown(cache, 32, 0)
    assert set(pages_of(cache, 0)) | set(pages_of(cache, 1)) == set(range(4))


def test_memory_comes_with_use() -> None:
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("no /proc on this system")
    before = int(status.read_text().split()[1])
    cache = PagedCache(CacheShape(32, 8, 128), 8, 16_384)
    assert cache.keys.nbytes > 8 << 30
    assert int(status.read_text().split()[1]) - before < 5_000
    cache.keys[0, 0] = 1
    assert not cache.values[-1, -1].any()


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (1, 0)])
def test_an_empty_cache_is_refused(batch: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PagedCache(SHAPE, batch, tokens)
