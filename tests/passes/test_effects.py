"""Calls that change an input in place: never dropped, never moved past what reads the input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsify.contracts import GraphPass, PassContext
from sparsify.effects import is_view, is_written, order_of_effects, written_by
from sparsify.passes.graph import erase_dead
from sparsify.passes.partition import Partition
from sparsify.passes.pipeline import run_pipeline
from sparsify.plan import Plan
from sparsify.program import Program, ProgramSet
from sparsify.rewriter import Rewriter
from sparsify.verification import verify

LIBRARY = torch.library.Library("effects_test", "DEF")
LIBRARY.define("add_to(Tensor(a!) state, Tensor x) -> Tensor")
LIBRARY.define("total(Tensor state) -> Tensor")


def add_to(state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    state += x
    return x.clone()


LIBRARY.impl("add_to", add_to, "CompositeExplicitAutograd")
LIBRARY.impl("total", lambda state: state.sum(0), "CompositeExplicitAutograd")
torch.library.register_fake("effects_test::add_to", lambda s, x: x.new_empty(x.shape), lib=LIBRARY)
torch.library.register_fake("effects_test::total", lambda s: s.new_empty(s.shape[1:]), lib=LIBRARY)
OPS = torch.ops.effects_test


class Twice(nn.Module):
    """Reads the state between two writes; nothing reads what the writes return."""

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        OPS.add_to(state, x)
        between = OPS.total(state)
        OPS.add_to(state, torch.i0(x))
        return between, OPS.total(state) * 2


def program_of(model: nn.Module) -> Program:
    return Program("forward", torch.export.export(model, (torch.ones(3, 4), torch.zeros(3, 4))))


@pytest.fixture
def program() -> Program:
    return program_of(Twice())


def calls(program: Program, name: str) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if name in str(n.target)]


def test_writes_are_read_from_the_schema(program: Program) -> None:
    first, second = calls(program, "add_to")
    (state,) = program.state()
    assert state.name == "state" and is_written(state)
    assert written_by(first) == written_by(second) == (state,)
    assert not any(written_by(node) for node in calls(program, "total"))
    before = order_of_effects(program.graph.nodes)
    reads = calls(program, "total")
    assert first in before[reads[0]] and reads[0] in before[second] and first in before[second]
    assert before[reads[1]] == [second]


def test_a_write_that_nothing_reads_stays(program: Program) -> None:
    rewriter = Rewriter(program)
    for node in rewriter.nodes:
        erase_dead(rewriter, node)
    done = rewriter.finish()
    verify(done)
    assert len(calls(done, "add_to")) == 2
    state, x = torch.zeros(3, 4), torch.rand(3, 4)
    between, after = done.run(x, state)
    torch.testing.assert_close(between, x.sum(0))
    torch.testing.assert_close(state, x + torch.i0(x))
    torch.testing.assert_close(after, state.sum(0) * 2)


@pytest.mark.parametrize("refused", ["i0", "total", "add_to", "nothing"])
@pytest.mark.parametrize("kind", ["compiled", "torch"])
def test_partition_keeps_reads_between_writes(program: Program, refused: str, kind: str) -> None:
    """Without the order, all that is of one kind would run first: both writes, then the reads."""

    def unsupported(node: torch.fx.Node) -> str | None:
        return "no kernel" if (refused in str(node.target)) == (kind == "compiled") else None

    result = run_pipeline(
        ProgramSet((program,)), [Partition(min_nodes=0)], PassContext(unsupported=unsupported)
    )
    done = result.programs["forward"]
    plan = Plan.of(done)
    x, values = torch.rand(3, 4), {"state": torch.zeros(3, 4)}
    values["x"] = x
    for region in plan.regions:
        made = region.program.run(*(values[name] for name in region.inputs))
        values.update(zip(region.outputs, made, strict=True))
    between, after = (values[str(output.name)] for output in plan.outputs)
    torch.testing.assert_close(between, x.sum(0))
    torch.testing.assert_close(after, (x + torch.i0(x)).sum(0) * 2)
    given = {name for region in plan.regions for name in region.outputs}
    assert {node.name for node in calls(done, "add_to")} <= given


def test_only_inputs_may_be_written() -> None:
    class Hidden(nn.Module):
        def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            y = x * 2
            OPS.add_to(y, x)
            return y + state

    with pytest.raises(ValueError, match=r"changes mul in place, which is no input of the program"):
        verify(program_of(Hidden()))


def test_no_view_of_state_is_read() -> None:
    class View(nn.Module):
        def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            part = state[0]
            OPS.add_to(state, x)
            return part + 1

    program = program_of(View())
    assert any(map(is_view, program.graph.nodes))
    with pytest.raises(ValueError, match=r"node select .*is a view of state, which add_to changes"):
        verify(program)


class Forget(GraphPass):
    """Writes something else."""

    name = "forget"

    def rewrite(self, rewriter, context):
        last = [n for n in rewriter.nodes if "add_to" in str(n.target)][-1]
        state, _ = last.args
        last.args = (state, next(n for n in rewriter.nodes if n.name == "x"))
        return ()


def test_numeric_verification_sees_state(program: Program) -> None:
    class Write(nn.Module):
        def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            OPS.add_to(state, torch.i0(x))
            return x + 1

    programs = ProgramSet((replace(program_of(Write()), name="write"),))
    before = programs["write"].exported.example_inputs[0][1].clone()
    run_pipeline(programs, [Partition()], verify="numeric")
    assert torch.equal(programs["write"].exported.example_inputs[0][1], before)
    with pytest.raises(ValueError, match="'forget' changed the results of program 'write'"):
        run_pipeline(programs, [Forget()], verify="numeric")
