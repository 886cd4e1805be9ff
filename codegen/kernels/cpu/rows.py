"""What kernels for few tokens share: activations row-major, ``[tokens, features]``.

Lanes of a vector run along in_features, so that each sum ends in as many parts as a vector has
lanes. A task is a run of output rows. Its weights are read once from memory, a few rows at a time,
and used for all tokens while they are in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.math import ACTIVATIONS, Vector
from sparsify.codegen.kernels.cpu.simd import Expr, Registers, bind, i64, load, store

_TASK_ROWS = 64
"""Output rows of one parallel task, about."""


def row_share(out_features: int, unit: int) -> tuple[int, int]:
    """(tasks, units of ``unit`` rows of each but the last)."""
    units = -(-out_features // unit)
    share = -(-units // max(2, 2 * round(out_features / (2 * _TASK_ROWS))))
    return -(-units // share), share


def row_tasks(out_features: int, unit: int, body: Callable[[Expr, Expr], None]) -> None:
    """Runs ``body(first, count)`` in parallel over runs of whole units of ``unit`` rows.

    The tasks are even in number, so that two threads get the same share.
    """
    units = -(-out_features // unit)
    tasks, share = row_share(out_features, unit)
    with T.parallel(T.int64(tasks)) as task:
        first = bind(task * share)
        body(first, bind(T.min(T.int64(share), T.int64(units) - first)))


def token_tiles(tokens: Expr, widest: int, body: Callable[[Expr, int], None]) -> None:
    """Runs ``body(first, count)`` over tiles of ``widest`` tokens, a power of two.

    What is left goes by tiles of half as many, and so on.
    """
    with T.serial(T.floordiv(tokens, widest)) as tile:
        body(bind(tile * widest), widest)
    done = bind(T.floordiv(tokens, widest) * widest)
    width = widest // 2
    while width:
        with T.If(tokens - done >= width), T.Then():
            body(done, width)
        done = bind(T.floordiv(tokens, width) * width)
        width //= 2


def ahead(token: Expr, near: Expr | int, group: Expr | int) -> Expr:
    """How far ahead of its use a stream of weights is prefetched, in elements.

    The first tile of tokens waits for memory: it asks for what comes ``near`` elements later. Later
    tiles find their weights in cache; meanwhile they fetch the next row group, ``group`` elements
    on.
    """
    return bind(T.if_then_else(token == 0, i64(near), i64(group)))


def ragged_load(buffer: Expr, offset: Expr, count: int, width: int) -> Expr:
    """A vector of the ``count`` floats at ``offset``, the rest of its lanes zero; reads no more."""
    if count >= width:
        return load(buffer, offset, width)
    scalars = [buffer[offset + i] if i < count else T.float32(0) for i in range(width)]
    return T.Shuffle(scalars, list(range(width)))


def lane_sums(vectors: Sequence[Expr], width: int) -> list[Expr]:
    """The sum over each vector's lanes; sums come side by side, at most ``width`` in a vector.

    Args:
        vectors: a power of two of them.
        width: their lanes.
    """
    if len(vectors) > width:
        return [
            s
            for i in range(0, len(vectors), width)
            for s in lane_sums(vectors[i : i + width], width)
        ]
    count, lanes = 1, width
    while len(vectors) > 1:
        lanes //= 2
        vectors = [
            bind(
                _halves(vectors[i : i + 2], 0, lanes, count)
                + _halves(vectors[i : i + 2], lanes, lanes, count)
            )
            for i in range(0, len(vectors), 2)
        ]
        count *= 2
    (total,) = vectors
    while lanes > 1:
        lanes //= 2
        total = bind(_halves([total], 0, lanes, count) + _halves([total], lanes, lanes, count))
    return [total]


def _halves(vectors: Sequence[Expr], begin: int, lanes: int, count: int) -> Expr:
    """Of each run of ``2 * lanes`` lanes the half that begins at ``begin``, run after run."""
    runs = range(len(vectors) * count)
    return T.Shuffle(
        list(vectors), [run * 2 * lanes + begin + i for run in runs for i in range(lanes)]
    )


def store_rows(y: Expr, offset: Expr, sums: Sequence[Expr], count: int, left: Expr | None) -> None:
    """Stores ``count`` neighbouring outputs of one token; only the first ``left``, if given."""
    width = count // len(sums)

    def whole() -> None:
        for i, value in enumerate(sums):
            store(y, offset + i * width, value, width)

    if left is None:
        whole()
        return
    with T.If(left >= count):
        with T.Then():
            whole()
        with T.Else():
            parts = Registers(len(sums), width)
            for i, value in enumerate(sums):
                parts[i] = value
            for i in range(count):
                with T.If(left > i), T.Then():
                    store(y, offset + i, parts.lane(i), 1)


def finish_rows(
    isa: Isa,
    epilogue: Epilogue,
    out_features: int,
    tokens: Expr,
    y: Expr,
    bias: Expr | None,
    residual: Expr | None,
    first: Expr,
    count: Expr,
) -> None:
    """Makes ``activation(y + bias) + residual`` of a task's sums, which are still in cache."""
    if epilogue == Epilogue():
        return
    activation = ACTIVATIONS[epilogue.activation]

    def at(row: Expr, token: Expr, width: int) -> None:
        offset = bind(token * out_features + row)
        value = load(y, offset, width)
        if bias is not None:
            value = value + load(bias, row, width)
        value = activation(Vector(bind(value), width, isa)).value
        if residual is not None:
            value = value + load(residual, offset, width)
        store(y, offset, value, width)

    whole = bind(T.floordiv(count, isa.vector))
    with T.serial(tokens) as token:
        with T.serial(whole) as part:
            at(bind(first + part * isa.vector), token, isa.vector)
        with T.serial(count - whole * isa.vector) as rest:
            at(bind(first + whole * isa.vector + rest), token, 1)
