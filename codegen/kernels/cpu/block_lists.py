"""Lists of key blocks as kernels read them: the four tensors of a `BlockMask`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.band import Reach, Visit
from sparsify.codegen.kernels.cpu.simd import Expr, Tensor, bind, i64, require, symbol

KEYS_AT_ONCE = 64
"""Keys of a block that are computed together at most: their weights stay in the first cache."""


class BlockLists:
    """The lists as parameters of one kernel.

    Attributes:
        tensors: the parameters, to be declared by the kernel and then bound.
    """

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel
        self._batch, self._heads, self._rows = symbol(), symbol(), symbol()
        self._most = (symbol(), symbol())
        each = (self._batch, self._heads, self._rows)
        self.tensors = tuple(
            Tensor(name, shape, "int32")
            for kind, most in zip(("", "full_"), self._most, strict=True)
            for name, shape in ((f"{kind}counts", each), (f"{kind}indices", (*each, most)))
        )

    def bind(
        self,
        declared: Sequence[Expr],
        block: tuple[Expr | int, Expr | int],
        rows: tuple[Expr, Expr],
        lengths: tuple[Expr, Expr],
    ) -> None:
        """Takes the declared lists, and checks that each block of queries has one.

        Args:
            block: queries and keys of a block.
            rows: sequences and heads in all, of which several may share lists.
            lengths: queries and keys of a sequence.
        """
        self._counts, self._indices = declared[::2], declared[1::2]
        self._block, self._of, self._keys = block, rows, lengths[1]
        needed, self._columns = (
            bind(T.floordiv(length + size - 1, size))
            for length, size in zip(lengths, block, strict=True)
        )
        require(
            self._rows == needed,
            f"{self._kernel}: there must be one list of blocks of keys for each block of queries",
            "ValueError",
        )

    def each_block(
        self, place: tuple[Expr, Expr], first: Expr, visit: Callable[[Expr, Expr, Expr], None]
    ) -> None:
        """``visit(begin, count, partial)`` for the keys of all blocks of the query ``first``.

        Partial blocks come first. A list that is longer than its row, or names a block that does
        not exist, is an error. One that is listed twice is visited twice: lists may have any order,
        so that to find it would take a mark for each block.
        """
        # At least one: TVM's analyser would try a division by zero sequences.
        batch, head = (
            T.floordiv(own * lists, T.max(all_of_them, T.int64(1)))
            for own, lists, all_of_them in zip(
                place, (self._batch, self._heads), self._of, strict=True
            )
        )
        row = bind((batch * self._heads + head) * self._rows + T.floordiv(first, self._block[0]))
        partial, full = (bind(i64(counts[row])) for counts in self._counts)
        for count, most in zip((partial, full), self._most, strict=True):
            require(
                T.And(count >= 0, count <= most),
                f"{self._kernel}: a list of blocks is longer than its row",
            )
        size = self._block[1]
        column = T.alloc_buffer((1,), "int64", scope="global")
        with T.serial(bind(partial + full)) as step:
            early = bind(step < partial)
            with T.If(early):
                with T.Then():
                    T.buffer_store(column, i64(self._indices[0][row * self._most[0] + step]), [0])
                with T.Else():
                    later = row * self._most[1] + (step - partial)
                    T.buffer_store(column, i64(self._indices[1][later]), [0])
            require(
                T.And(column[0] >= 0, column[0] < self._columns),
                f"{self._kernel}: a list names a block of keys that does not exist",
            )
            begin = bind(column[0] * size)
            end = bind(T.min(begin + size, self._keys))
            with T.serial(T.floordiv(end - begin + (KEYS_AT_ONCE - 1), KEYS_AT_ONCE)) as part:
                at = bind(begin + part * KEYS_AT_ONCE)
                visit(at, bind(T.min(T.int64(KEYS_AT_ONCE), end - at)), early)


def each_block(
    reach: Reach,
    lists: BlockLists | None,
    masked: bool,
    place: tuple[Expr, Expr],
    tile: tuple[Expr, Expr],
    keys: Expr,
    visit: Visit,
) -> None:
    """The blocks of keys of a tile: those that are listed, else all of which it may see any.

    Args:
        masked: whether a mask too may hide keys, but for those of full blocks.
        place: sequence and head.
        tile: the first query and the last.
    """
    first, last = tile

    def banded(begin: Expr, count: Expr, ruled: Expr | bool) -> None:
        visit(begin, count, True if masked else ruled)

    def listed(begin: Expr, count: Expr, partial: Expr) -> None:
        ruled = True if masked else reach.rules(begin, count, first, last)
        visit(begin, count, ruled if ruled is False else T.And(partial, ruled))

    if lists is None:
        reach.each_block(first, last, keys, KEYS_AT_ONCE, banded)
    else:
        lists.each_block(place, first, listed)
