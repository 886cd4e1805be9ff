"""The plan of the arena, and sizes as C."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import tirx

from sparsify.codegen.emit.c.arena import ALIGNMENT, Bounds, aligned, plan
from sparsify.codegen.emit.c.straight import Call, ExportError, Storage, StraightCode, View
from sparsify.codegen.emit.c.tables import c_expression

SYMBOL = tirx.Var("s", "int64")
SIZES = [tirx.IntImm("int64", n) for n in (1, 15, 16, 17, 400)]


def chain(uses: list[tuple[int, list[int]]]) -> StraightCode:
    """Calls that each read some earlier tensors and make one of a size of ``SIZES``."""
    code = StraightCode("net")
    code.inputs.append(View(Storage("input", 0), "float32", (SYMBOL,)))
    made: list[View] = []
    for size, reads in uses:
        new = View(Storage("arena", len(made)), "float32", (SIZES[size], SYMBOL))
        read = [made[r % len(made)] for r in reads if made]
        code.calls.append(Call("kernel", (*read, new)))
        made.append(new)
    return code


CALLS = st.lists(
    st.tuples(st.integers(0, 4), st.lists(st.integers(0, 30), max_size=3)), max_size=25
)


@given(CALLS, st.integers(1, 40))
def test_tensors_that_live_together_lie_apart(uses: list[tuple[int, list[int]]], most: int) -> None:
    code = chain(uses)
    bounds = Bounds(code, {"s": (1, most)})
    arena = plan(code, bounds)
    lives: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for time, call in enumerate(code.calls):
        for view in call.operands:
            lives.setdefault(view.storage.index, []).append(time)
            sizes[view.storage.index] = aligned(bounds.nbytes(view))
    assert arena.offsets.keys() == lives.keys()
    for a in lives:
        assert arena.offsets[a] % ALIGNMENT == 0
        assert arena.offsets[a] + sizes[a] <= arena.nbytes
        for b in lives:
            apart = (
                arena.offsets[a] + sizes[a] <= arena.offsets[b]
                or arena.offsets[b] + sizes[b] <= arena.offsets[a]
            )
            together = min(lives[a]) <= max(lives[b]) and min(lives[b]) <= max(lives[a])
            assert a == b or apart or not together


def test_a_chain_needs_two_places() -> None:
    code = chain([(4, [i]) for i in range(-1, 11)])
    arena = plan(code, Bounds(code, {"s": (1, 8)}))
    assert arena.nbytes == 2 * aligned(400 * 8 * 4)


def test_bounds_of_sizes_that_shrink() -> None:
    bounds = Bounds(chain([]), {"s": (2, 8)})
    assert (bounds.least(10 - SYMBOL), bounds.largest(10 - SYMBOL)) == (2, 8)
    assert (bounds.least(SYMBOL * 3), bounds.largest(SYMBOL * 3)) == (6, 24)
    assert bounds.least(SYMBOL - 5) == 0  # no size is less


@given(st.integers(0, 1000), st.integers(1, 50))
def test_sizes_as_c(s: int, divisor: int) -> None:
    constant = tirx.IntImm("int64", divisor)
    extent = tirx.max(
        tirx.floordiv(SYMBOL + 15, constant) * 16 - tirx.floormod(SYMBOL, constant),
        tirx.min(SYMBOL, tirx.IntImm("int64", 7)),
    )
    names = {
        "sparsify_floordiv": lambda a, b: a // b,
        "sparsify_floormod": lambda a, b: a % b,
        "sparsify_min": min,
        "sparsify_max": max,
        "s": s,
    }
    expected = max((s + 15) // divisor * 16 - s % divisor, min(s, 7))
    assert eval(c_expression(extent), names) == expected


def test_what_is_no_size() -> None:
    with pytest.raises(ExportError, match="has no C form"):
        c_expression(tirx.FloatImm("float32", 0.5))
