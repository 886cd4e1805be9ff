"""Keys and values of the sequences in flight, in pages that are handed out as they are needed.

Address space for all pages is reserved at once; the system gives memory to a page when it is first
written. So a cache grows without a copy, and costs what it holds.

Source: Prabhu et al., "vAttention: Dynamic Memory Management for Serving LLMs without
PagedAttention", 2024, for the reservation; see `sparsify.ops.kv_cache` for the pages.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Mapping

import torch

from sparsify.layouts import FEW_TOKENS
from sparsify.ops import PAGE, CacheShape

_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE: address space only, of which any amount may be asked for."""


class CacheFull(MemoryError):
    """A sequence outgrew what the cache was made for."""


class PagedCache:
    """The state of ``batch`` sequences of at most ``max_tokens`` tokens each.

    Args:
        beside: by name, what a program keeps about each page beside keys and values: the shape of
            one page of one layer.

    Attributes:
        keys, values, pages: as `sparsify.ops.kv_append` takes them.
        lengths: int64 ``[batch]``, the tokens that each sequence holds.
        beside: float32 ``[layers, pages, ...]``, by name.
    """

    def __init__(
        self,
        shape: CacheShape,
        batch: int,
        max_tokens: int,
        beside: Mapping[str, tuple[int, ...]] = {},
    ) -> None:
        if batch < 1 or max_tokens < 1:
            raise ValueError(
                f"a cache for {batch} sequences of {max_tokens} tokens: both must be at least 1"
            )
        self.shape, self.max_tokens = shape, max_tokens
        width = -(-max_tokens // PAGE)
        self.keys, self.values = map(_reserved, shape.of_pages(batch * width))
        pools = (shape.layers, batch * width)
        self.beside = {name: _reserved((*pools, *page)) for name, page in beside.items()}
        self.pages = torch.zeros(batch, width, dtype=torch.int32)
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self._held = [0] * batch
        self._free = list(range(batch * width - 1, -1, -1))

    @property
    def batch(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        beside = sum(4 * math.prod(part.shape[2:]) for part in self.beside.values())
        page = PAGE * self.shape.token_bytes + self.shape.layers * beside
        return sum(self._held) * page

    def reserve(self, counts: torch.Tensor) -> None:
        """Gives each sequence the pages for so many more tokens.

        Raises:
            CacheFull: naming the sequence; no sequence has got a page then.
        """
        totals = (self.lengths + counts).tolist()
        for row, total in enumerate(totals):
            if total > self.max_tokens:
                raise CacheFull(
                    f"sequence {row} would hold {total} tokens, the cache was made for "
                    f"{self.max_tokens}; make one with a larger max_tokens"
                )
        for row, total in enumerate(totals):
            while self._held[row] * PAGE < total:
                self.pages[row, self._held[row]] = self._free.pop()
                self._held[row] += 1

    def advance(self, counts: torch.Tensor) -> None:
        """Notes that so many tokens were appended to each sequence."""
        self.lengths = self.lengths + counts

    def reset(self, row: int) -> None:
        """Empties one sequence; its pages serve others."""
        self._free.extend(self.pages[row, : self._held[row]].tolist())
        self._held[row] = 0
        self.lengths = self.lengths.clone()
        self.lengths[row] = 0


def largest_shapes(
    shape: CacheShape,
    batch: int,
    max_tokens: int,
    chunk: int,
    beside: Mapping[str, tuple[int, ...]] = {},
) -> dict[str, tuple[int, ...]]:
    """The largest shapes of what the programs of a language model take, by name.

    Args:
        batch, max_tokens: sequences, and tokens of each, that the cache holds.
        chunk: most tokens of one call of prefill, all rows together.
        beside: as `PagedCache` takes it.

    Raises:
        ValueError: more sequences than the programs take rows, or a size that holds nothing.
    """
    if not 1 <= batch <= FEW_TOKENS:
        raise ValueError(f"a batch of {batch} sequences; the programs take 1 to {FEW_TOKENS}")
    if max_tokens < 1 or chunk < batch:
        raise ValueError(
            f"{max_tokens} tokens a sequence and {chunk} a call; each of {batch} sequences needs "
            "at least one"
        )
    width = -(-max_tokens // PAGE)
    keys, values = shape.of_pages(batch * width)
    rows = dict.fromkeys(("starts", "counts"), (batch,))
    state = {"keys": keys, "values": values}
    state |= {name: (shape.layers, batch * width, *page) for name, page in beside.items()}
    return {"input_ids": (batch, chunk // batch), "pages": (batch, width), **rows, **state}


def _reserved(shape: tuple[int, ...]) -> torch.Tensor:
    """A zeroed float32 tensor that takes memory page by page as it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = mmap.mmap(-1, 4 * math.prod(shape), flags=flags)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)
