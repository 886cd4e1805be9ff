"""The vocabulary of CPU kernels: vectors, registers, lane groups, on TVM's IRBuilder.

Kernels are Python programs that emit TIR. They see activations as flat buffers of lane groups
(``[groups, features, 16]``) and vectors of the target's width: 16, 8 or 4 fp32 lanes, so one lane
group is 1, 2 or 4 vectors. One template thereby serves AVX-512, AVX2 and NEON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.layouts import LANES

Expr = Any
"""A TIR expression."""


def i64(value: Expr) -> Expr:
    return T.int64(value) if isinstance(value, int) else T.Cast("int64", value)


def ceil_div(value: Expr | int, divisor: Expr | int) -> Expr | int:
    """How many runs of ``divisor`` cover ``value``."""
    if isinstance(value, int) and isinstance(divisor, int):
        return -(-value // divisor)
    return bind(T.floordiv(value + (divisor - 1), divisor))


def bind(value: Expr) -> Expr:
    """Names a value, so that it is computed once."""
    return T.Bind(value)


def opaque(*values: Expr) -> list[Expr]:
    """Names int64 values that TVM's analyser does not look into: nested minima take it minutes."""
    slots = T.alloc_buffer((len(values),), "int64", scope="global")
    for index, value in enumerate(values):
        T.buffer_store(slots, value, [index])
    return [bind(slots[index]) for index in range(len(values))]


@contextmanager
def prim_func(name: str) -> Iterator[list[Any]]:
    """Opens a PrimFunc; the yielded list receives the finished function."""
    result: list[Any] = []
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "op_pattern": 8})
        yield result
    result.append(builder.get())


def symbol() -> Expr:
    """A dimension known only at run time."""
    return T.int64()


def size_of(extent: int | None) -> Expr | int:
    """An extent of a kernel's specification, where None is one that each call brings."""
    return symbol() if extent is None else extent


def in_name(value: float) -> str:
    """A number as a part of a kernel's name."""
    return f"{value:.9g}".replace(".", "d").replace("-", "m").replace("+", "")


def require(condition: Expr, message: str, error: str = "IndexError") -> None:
    """Fails the kernel's call with a Python error unless the condition holds."""
    with T.Assert(condition, message, error):
        T.evaluate(0)


@dataclass(frozen=True)
class Tensor:
    """A tensor parameter of a kernel; extents may be `symbol`s."""

    name: str
    shape: Sequence[Expr | int]
    dtype: str = "float32"


@dataclass(frozen=True)
class Integer:
    """An int64 scalar parameter of a kernel."""

    name: str


@dataclass(frozen=True)
class Number:
    """A fp32 scalar parameter of a kernel."""

    name: str


def arguments(*parameters: Tensor | Integer | Number | None) -> list[Expr]:
    """Declares all parameters of the kernel, tensors seen flat; None (absent) stays None."""
    declared = [p and T.arg(p.name, _declaration(p)) for p in parameters]
    matched = [
        (p, _matched(p, handle)) if isinstance(p, Tensor) else (p, handle)
        for p, handle in zip(parameters, declared, strict=True)
    ]
    return [_flat(p, value) if isinstance(p, Tensor) else value for p, value in matched]


def _declaration(parameter: Tensor | Integer | Number) -> Expr:
    if isinstance(parameter, Tensor):
        return T.handle()
    return T.int64() if isinstance(parameter, Integer) else T.float32()


def _matched(tensor: Tensor, handle: Expr) -> Expr:
    extents = [T.int64(e) if isinstance(e, int) else e for e in tensor.shape]
    return T.match_buffer(handle, tuple(extents), tensor.dtype)


def _flat(tensor: Tensor, buffer: Expr) -> Expr:
    if len(tensor.shape) == 1:
        return buffer
    count = T.int64(1)
    for extent in tensor.shape:
        count = count * extent
    return T.decl_buffer((count,), tensor.dtype, data=buffer.data)


def load(buffer: Expr, offset: Expr, width: int) -> Expr:
    return buffer[T.Ramp(offset, 1, width)] if width > 1 else buffer[offset]


def store(buffer: Expr, offset: Expr, value: Expr, width: int) -> None:
    T.buffer_store(buffer, value, [T.Ramp(offset, 1, width) if width > 1 else offset])


def splat(value: Expr, width: int) -> Expr:
    if isinstance(value, (int, float)):
        value = T.float32(value)
    return T.Broadcast(value, width) if width > 1 else value


def lane_factors(buffer: Expr, offsets: Sequence[Expr]) -> list[Expr]:
    """Neighbouring scalars as factors of a 4-lane vector's multiply-adds, which take a lane each.

    They come by loads of four lanes, two and one.
    """
    factors: list[Expr] = []
    while len(factors) < len(offsets):
        left = len(offsets) - len(factors)
        count = 4 if left >= 4 else 2 if left >= 2 else 1
        lanes = bind(load(buffer, offsets[len(factors)], count))
        if count == 1:
            factors.append(bind(splat(lanes, 4)))
        else:
            whole = [lanes] * (4 // count)
            factors += [bind(T.Shuffle(whole, [i] * 4)) for i in range(count)]
    return factors


def remainder(count: int, width: int) -> Iterator[tuple[int, int]]:
    """What whole vectors leave of a run of elements, as ``(offset, width)`` of narrower ones."""
    done = count // width * width
    while done < count:
        width //= 2
        if count - done >= width:
            yield done, width
            done += width


def along(count: Expr | int, width: int, body: Callable[[Expr, int], None]) -> None:
    """Runs ``body(offset, width)`` along contiguous elements, in vectors and then narrower ones."""
    if not isinstance(count, int):
        whole = bind(T.floordiv(count, width))
        with T.serial(whole) as step:
            body(bind(step * width), width)
        with T.serial(count - whole * width) as rest:
            body(bind(whole * width + rest), 1)
        return
    if count >= width:
        with T.serial(T.int64(count // width)) as step:
            body(bind(step * width), width)
    for offset, narrow in remainder(count, width):
        body(T.int64(offset), narrow)


def reduce_lanes(
    value: Expr, width: int, combine: Callable[[Expr, Expr], Expr], lanes: int = 1
) -> Expr:
    """So many lanes, in log2(width / lanes) steps; lane i is of lanes i, i + lanes, and so on."""
    while width > lanes:
        width //= 2
        low, high = (T.Shuffle([value], list(range(start, start + width))) for start in (0, width))
        value = bind(combine(low, high))
    return value


def fold_neighbours(
    value: Expr, width: int, lanes: int, combine: Callable[[Expr, Expr], Expr]
) -> Expr:
    """So many lanes, each of ``width / lanes`` of the vector's that follow each other."""
    while width > lanes:
        even, odd = (T.Shuffle([value], list(range(start, width, 2))) for start in (0, 1))
        value = bind(combine(even, odd))
        width //= 2
    return value


def intrinsic(dtype: str, name: str, *operands: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, name, *operands)


def prefetch(buffer: Expr, offset: Expr, *, write: bool = False, near: bool = True) -> None:
    """Asks for a cache line; an address past the buffer is harmless.

    Args:
        near: into the first-level cache; else into the second, of which a core may wait for more
            lines at once.
    """
    line, locality = T.address_of(buffer[offset]), T.int32(3 if near else 2)
    T.evaluate(
        T.call_llvm_intrin("void", "llvm.prefetch", line, T.int32(write), locality, T.int32(1))
    )


class Registers:
    """A register file: ``count`` vectors of fp32.

    Each vector is its own "global" buffer: under 1 KB that becomes a stack slot which LLVM
    promotes to a register; "local" would become a workspace call.
    """

    def __init__(self, count: int, width: int) -> None:
        self.width = width
        self._slots = [T.alloc_buffer((width,), "float32", scope="global") for _ in range(count)]

    def __getitem__(self, index: int) -> Expr:
        return load(self._slots[index], 0, self.width)

    def __setitem__(self, index: int, value: Expr) -> None:
        store(self._slots[index], 0, value, self.width)

    def __len__(self) -> int:
        return len(self._slots)

    def clear(self) -> None:
        for index in range(len(self)):
            self[index] = splat(0.0, self.width)

    def lane(self, index: int) -> Expr:
        """One float, counted over all vectors."""
        return self._slots[index // self.width][index % self.width]


@dataclass(frozen=True)
class LaneTile:
    """A run of vectors side by side in the token direction.

    ``index`` counts tiles of ``vectors`` vectors from the first token. A feature's vectors lie
    ``features * 16`` floats apart from one lane group to the next.
    """

    isa: Isa
    vectors: int

    @property
    def pitch(self) -> int:
        """Floats from one feature to the next."""
        return LANES

    def base(self, index: Expr, features: int) -> Expr:
        """Offset of feature 0 of the tile's first vector in ``[groups, features, 16]``."""
        per_group = self.isa.vectors_per_group
        if self.vectors % per_group == 0:
            return index * (features * LANES * (self.vectors // per_group))
        first = index * self.vectors
        group, part = T.floordiv(first, per_group), T.floormod(first, per_group)
        return group * (features * LANES) + part * self.isa.vector

    def step(self, vector: int, features: int) -> int:
        """Offset of a vector of the tile from the tile's base."""
        group, part = divmod(vector, self.isa.vectors_per_group)
        return group * features * LANES + part * self.isa.vector


@dataclass(frozen=True)
class WideTile(LaneTile):
    """A tile whose tokens all lie side by side, features above: ``[features, tile's tokens]``.

    Tiles follow each other. The distances inside one do not depend on the number of features,
    which need not be known when a kernel is made.
    """

    @property
    def pitch(self) -> int:
        return self.vectors * self.isa.vector

    def base(self, index: Expr, features: Expr | int) -> Expr:
        return index * (features * self.pitch)

    def step(self, vector: int, features: Expr | int) -> int:
        return vector * self.isa.vector


def tiled_tasks(
    isa: Isa,
    groups: Expr,
    chunks: Expr | int,
    vectors: int,
    body: Callable[[LaneTile, Expr, Expr], None],
    kind: type[LaneTile] = LaneTile,
) -> None:
    """Runs ``body(tile, index, chunk)`` in parallel over row chunks and token tiles.

    Chunks are the outer order: each thread keeps to its part of the weights. The last tile, where
    fewer than ``vectors`` vectors are left, is covered by narrower tiles of half the width, a
    quarter ... down to one vector.

    Raises:
        ValueError: when such tiles would not begin at whole tiles, or would split a lane group.
    """
    widths = (vectors, *_narrower(vectors))
    group = isa.vectors_per_group
    if any(wide % narrow for wide, narrow in pairwise(widths)) or any(
        group % width and width % group for width in widths
    ):
        raise ValueError(
            f"a token tile of {vectors} vectors cannot be halved down to one on {isa.name}, where "
            f"a lane group has {group}; use a power of two"
        )
    total = bind(groups * isa.vectors_per_group)
    tiles = bind(T.floordiv(total + (vectors - 1), vectors))
    with T.parallel(tiles * chunks) as task:
        chunk, tile_index = bind(T.floordiv(task, tiles)), bind(T.floormod(task, tiles))
        with T.If((tile_index + 1) * vectors <= total):
            with T.Then():
                body(kind(isa, vectors), tile_index, chunk)
            with T.Else():
                done = bind(tile_index * vectors)
                for width in widths[1:]:
                    count = bind(T.floordiv(total - done, width))
                    with T.serial(count) as extra:
                        body(kind(isa, width), bind(T.floordiv(done, width) + extra), chunk)
                    done = bind(done + count * width)


_WORTH_THREADS = 32768
"""Elements whose arithmetic takes longer, at a few bytes a cycle, than waking a second thread."""


def share(tasks: Expr, elements: Expr, body: Callable[[Expr], None]) -> None:
    """Runs ``body(task)`` for each task: in parallel if ``elements`` in all are worth it.

    The kernels of a single token take less time than starting threads.
    """

    def alone() -> None:
        with T.serial(tasks) as task:
            body(task)

    def together() -> None:
        with T.parallel(tasks) as task:
            body(task)

    choose(True, elements >= _WORTH_THREADS, together, alone)


def _narrower(vectors: int) -> Iterator[int]:
    while vectors > 1:
        vectors //= 2
        yield vectors


def choose(dynamic: bool, condition: Expr, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """Emits ``if condition: yes else: no``, or only ``yes`` where there is nothing to choose."""
    if not dynamic:
        yes()
        return
    with T.If(condition):
        with T.Then():
            yes()
        with T.Else():
            no()


def either(condition: Expr | bool, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """Emits ``if condition: yes else: no``, or one of them where the condition is known."""
    if isinstance(condition, bool):
        (yes if condition else no)()
    else:
        choose(True, condition, yes, no)
