"""How long prompts come: in chunks, each a call of prefill behind the tokens before it."""

from __future__ import annotations

from sparsify.block_mask import BLOCK

CHUNK_TOKENS = 512
"""Most tokens of one call of prefill, all rows together: more fall out of the second-level cache
between one operator and the next, fewer read the weights too often."""


def chunk_bounds(length: int, rows: int = 1) -> list[int]:
    """Where a prompt is cut, so that a call of prefill gets at most `CHUNK_TOKENS` of all rows.

    Cuts are at whole blocks: recipes choose what a block of queries reads, and a prompt must have
    the same blocks however many others it comes with.

    Args:
        length: tokens of the longest prompt, at least 1.
        rows: prompts that come together, at most 8.

    Returns:
        Ascending, from 0 to ``length``: a chunk lies between two that follow each other.
    """
    blocks = -(-length // BLOCK)
    chunks = -(-blocks // (CHUNK_TOKENS // (rows * BLOCK)))
    return [min(blocks * i // chunks * BLOCK, length) for i in range(chunks + 1)]
