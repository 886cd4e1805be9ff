"""Block masks against the masks they stand for, element by element."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from sparsify import block_mask
from sparsify.band import Band
from sparsify.block_mask import FULL, HIDDEN, PARTIAL, BlockMask


def dense(band: Band, queries: int, keys: int) -> torch.Tensor:
    """By the definition, one pair at a time."""
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            near = not band.window or abs(i - j) < band.window or j < band.sinks
            seen[i, j] = near and (j <= i or not band.causal)
    return seen


def bands() -> list[tuple[Band, tuple[int, int], tuple[int, int]]]:
    chance = random.Random(0)
    return [
        (
            Band(chance.random() < 0.5, chance.choice((0, 1, 5, 16, 17, 40, 100)), sinks),
            (chance.randint(1, 90), chance.randint(1, 90)),
            (chance.choice((32, 64, 96)), chance.choice((16, 32, 48))),
        )
        for sinks in (0, 1, 4, 16, 20)
        for _ in range(8)
    ]


@pytest.mark.parametrize(("band", "lengths", "block"), bands())
def test_every_way_of_building_gives_the_same_blocks(band, lengths, block) -> None:
    seen = dense(band, *lengths)
    closed = BlockMask.of_band(band, lengths, block)
    assert torch.equal(closed.to_dense()[0, 0], seen)
    for other in (
        BlockMask.of_mask_mod(lambda *indices: band(*indices), lengths, block=block),
        BlockMask.of_dense(seen[None, None], block),
        BlockMask.of_kinds(closed.kinds, lengths, block, band),
        BlockMask.of_flex(closed.to_flex()),
    ):
        assert all(map(torch.equal, other.tensors, closed.tensors))
        assert torch.equal(other.to_dense(), closed.to_dense())


def test_kinds_say_what_their_blocks_hold() -> None:
    seen = torch.rand(2, 3, 70, 90) < 0.5
    seen[0, :, 32:64] = True
    seen[1, 1, :, 32:64] = False
    kinds = BlockMask.of_dense(seen, (32, 16)).kinds
    for b, h, row, column in torch.cartesian_prod(*map(torch.arange, kinds.shape)):
        part = seen[b, h, row * 32 : row * 32 + 32, column * 16 : column * 16 + 16]
        kind = FULL if part.all() else PARTIAL if part.any() else HIDDEN
        assert kinds[b, h, row, column] == kind


def test_flex_attention_makes_the_same_blocks() -> None:
    def mod(b, h, q, k):
        return (q >= k) & ((q - k < 40 * (h + 1)) | (k % 7 == b))

    flex = create_block_mask(mod, 2, 3, 128, 128, device="cpu", BLOCK_SIZE=32)
    ours = BlockMask.of_mask_mod(mod, (128, 128), 2, 3, (32, 32))
    assert all(map(torch.equal, BlockMask.of_flex(flex).tensors, ours.tensors))
    back = ours.to_flex()
    assert torch.equal(back.kv_num_blocks, flex.kv_num_blocks)
    assert torch.equal(back.full_kv_num_blocks, flex.full_kv_num_blocks)
    assert torch.equal(back.to_dense(), flex.to_dense())


def test_building_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions see runs of queries, and results are kept for each shape."""
    monkeypatch.setattr(block_mask, "_AT_ONCE", 32 * 64)
    calls = []

    def mod(b, h, q, k):
        calls.append(q.shape[0] * k.shape[0])
        return q >= k

    BlockMask.of_mask_mod(mod, (320, 64), block=(32, 16))
    assert len(calls) == 10 and set(calls) == {32 * 64}


def test_masks_of_a_function_are_kept_by_shape():
    def mod(b, h, q, k):
        return q >= k

    first = BlockMask.of_mask_mod(mod, (320, 64), block=(32, 16))
    assert BlockMask.of_mask_mod(mod, (320, 64), block=(32, 16)) is first
    assert BlockMask.of_mask_mod(mod, (352, 64), block=(32, 16)) is not first


def test_density_counts_blocks() -> None:
    mask = BlockMask.of_band(Band(causal=True), (128, 128), (32, 32))
    assert mask.density == 10 / 16
    assert BlockMask.of_band(Band(), (100, 100)).density == 1


def test_wrong_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        BlockMask.of_band(Band(), (64, 64), (48, 64))
    with pytest.raises(ValueError, match=r"need \[batch, heads, 4, 4\]"):
        BlockMask.of_kinds(torch.zeros(1, 1, 4, 5), (128, 128), (32, 32))
    with pytest.raises(ValueError, match="at least 0"):
        Band(window=-1)
    lists = BlockMask.of_kinds(torch.ones(1, 1, 4, 4), (128, 128), (32, 32))
    with pytest.raises(ValueError, match="mask_mod"):
        lists.to_dense()


def test_a_function_with_state_is_evaluated_each_time():
    documents = torch.arange(128) // 64

    def same_document(b, h, q, k):
        return documents[q] == documents[k]

    before = BlockMask.of_mask_mod(same_document, (128, 128), block=(32, 16))
    documents.zero_()
    after = BlockMask.of_mask_mod(same_document, (128, 128), block=[32, 16])
    assert (before.density, after.density) == (0.5, 1.0)


def test_a_mask_that_is_added_is_refused():
    with pytest.raises(TypeError, match=r"float32.*mask == 0"):
        BlockMask.of_dense(torch.zeros(1, 1, 128, 128))
    with pytest.raises(ValueError, match=r"\(128, 128\)"):
        BlockMask.of_dense(torch.ones(128, 128, dtype=torch.bool))
