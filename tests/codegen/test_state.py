"""Kernels that store into their inputs: through TVM's pipeline the writes reach the caller."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from tvm import relax
from tvm.tirx.script.builder import ir as T

from sparsify.codegen import operators
from sparsify.codegen.build import compile_library
from sparsify.codegen.kernels.cpu.simd import Tensor, arguments, prim_func, symbol
from sparsify.codegen.lower import LoweringError, lower
from sparsify.codegen.runtime.executor import Entry, Executor
from sparsify.codegen.support import unsupported_reason
from sparsify.codegen.target import Target
from sparsify.plan import Plan
from sparsify.program import Program

LIBRARY = torch.library.Library("state_test", "DEF")
LIBRARY.define("state_add(Tensor(a!) state, Tensor x, Tensor row) -> Tensor")
LIBRARY.define("state_total(Tensor state, Tensor after) -> Tensor")
WIDTH = 40


def add(state: torch.Tensor, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    state[row] += x
    return x[:1].clone()


def total(state: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return state.sum(0)


LIBRARY.impl("state_add", add, "CompositeExplicitAutograd")
LIBRARY.impl("state_total", total, "CompositeExplicitAutograd")
FAKES = {
    "state_add": lambda state, x, row: x.new_empty((1,)),
    "state_total": lambda state, after: state.new_empty(state.shape[1:]),
}
for name, fake in FAKES.items():
    torch.library.register_fake(f"state_test::{name}", fake, lib=LIBRARY)
OPS = torch.ops.state_test


@dataclass(frozen=True)
class AddKernel:
    name: str = "state_add"

    def build(self) -> Any:
        """``(state[n, 40], x[40], row[1], y[1])``: adds to a row of the state."""
        with prim_func(self.name) as result:
            state, x, row, y = arguments(
                Tensor("state", (symbol(), WIDTH)),
                Tensor("x", (WIDTH,)),
                Tensor("row", (1,), "int64"),
                Tensor("y", (1,)),
            )
            with T.serial(T.int64(WIDTH)) as i:
                place = row[0] * WIDTH + i
                T.buffer_store(state, state[place] + x[i], [place])
            T.buffer_store(y, x[0], [0])
        return result[0]


@dataclass(frozen=True)
class TotalKernel:
    name: str = "state_total"

    def build(self) -> Any:
        """``(state[n, 40], after[1], y[40])``: sums over the rows, when there is ``after``."""
        with prim_func(self.name) as result:
            rows = symbol()
            state, _, y = arguments(
                Tensor("state", (rows, WIDTH)), Tensor("after", (1,)), Tensor("y", (WIDTH,))
            )
            with T.serial(T.int64(WIDTH)) as i:
                T.buffer_store(y, T.float32(0), [i])
            with T.serial(rows * WIDTH) as i:
                T.buffer_store(y, y[i % WIDTH] + state[i], [i % WIDTH])
        return result[0]


def convert_add(node: torch.fx.Node, lowering: Any) -> Any:
    return lowering.call_kernel(AddKernel(), [lowering.tensor(a) for a in node.args], (1,))


def convert_total(node: torch.fx.Node, lowering: Any) -> Any:
    return lowering.call_kernel(TotalKernel(), [lowering.tensor(a) for a in node.args], (WIDTH,))


@pytest.fixture(scope="module", autouse=True)
def converters() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(operators.CONVERTERS, "state_add.default", convert_add)
        patch.setitem(operators.CONVERTERS, "state_total.default", convert_total)
        yield


class Several(nn.Module):
    """Writes and reads in turn, each at a place where a wrong order, a copy or a loss shows.

    The second write depends on nothing that reads the first, and the last result of a write is
    read by nobody. The sums between are TVM's, which it may fuse and whose memory it may reuse.
    """

    def forward(
        self, x: torch.Tensor, row: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = OPS.state_total(state, OPS.state_add(state, x, row)) * 2
        after = OPS.state_add(state, torch.sin(x) + x, row)
        second = OPS.state_total(state, after) + first
        OPS.state_add(state, second - first, row + 1)
        return first, torch.cos(second) + x


def program_of(model: nn.Module) -> Program:
    inputs = (torch.randn(WIDTH), torch.tensor([1]), torch.zeros(5, WIDTH))
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(model, inputs, dynamic_shapes=(None, None, {0: rows}))
    return Program("forward", exported)


@pytest.fixture(scope="module")
def entry(converters: None, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    plan = Plan.of(program_of(Several()))
    (region,) = plan.regions
    path = tmp_path_factory.mktemp("state") / "several.so"
    compile_library({region.name: region.program}, Target.parse("native"), path)
    assert len(region.outputs) == 3  # the unread result of the last write is one of them
    call = Executor(path, 2).bind(region.name, [])

    def run(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = dict(zip(plan.inputs, inputs, strict=True))
        made = dict(zip(region.outputs, call([given[n] for n in region.inputs]), strict=True))
        return tuple(made[str(output.name)] for output in plan.outputs)

    return run


def check(entry: Entry, rows: int) -> None:
    x, row = torch.randn(WIDTH), torch.tensor([rows - 2])
    around = torch.full((rows + 16, WIDTH), float("nan"))  # what lies beside the state stays
    state = around[8 : 8 + rows]
    state.copy_(torch.randn(rows, WIDTH))
    expected, before = state.clone(), state.clone()
    for _ in range(2):  # the second call finds what the first one left
        wanted = Several()(x, row, expected)
        found = entry((x, row, state))
        for got, result in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, result, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(state, before)
    assert around[:8].isnan().all() and around[8 + rows :].isnan().all()


@pytest.mark.parametrize("rows", [2, 3, 7, 8, 33])
def test_writes_reach_the_caller_in_order(entry: Entry, rows: int) -> None:
    check(entry, rows)


def test_threads_have_state_of_their_own(entry: Entry) -> None:
    failures: list[BaseException] = []

    def work(rows: int) -> None:
        try:
            for _ in range(20):
                check(entry, rows)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (2, 5, 9, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_a_reader_that_forgets_the_write_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM would drop the write, which nothing then depends on."""

    def forgetful(node: torch.fx.Node, lowering: Any) -> Any:
        state = lowering.tensor(node.args[0])
        return lowering.block_builder.emit(relax.op.sum(state, axis=0))

    monkeypatch.setitem(operators.CONVERTERS, "state_total.default", forgetful)
    with pytest.raises(LoweringError, match=r"node state_add: .* changes state, but no result"):
        lower({"forward": program_of(Several())}, Target.parse("native"))


def test_operators_of_tvm_do_not_read_state() -> None:
    """They are fused and so moved, past the write that they came before."""

    class Reads(nn.Module):
        def forward(self, x: torch.Tensor, row: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            before = state * 2
            return before + OPS.state_total(state, OPS.state_add(state, x, row))

    program = program_of(Reads())
    reasons = {n.name: unsupported_reason(n) for n in program.graph.nodes if n.op != "output"}
    left = {name: reason for name, reason in reasons.items() if reason and "changes in" in reason}
    assert list(left) == ["mul"] and "aten.mul.Tensor reads a tensor that the prog" in left["mul"]
