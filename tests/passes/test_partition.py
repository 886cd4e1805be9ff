"""Partition: few regions, each a program of its own that knows its sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from sparsify.contracts import PassContext
from sparsify.frontend.torch import import_torch
from sparsify.passes.partition import Partition
from sparsify.passes.pipeline import run_pipeline
from sparsify.plan import Plan, mark, marks_of
from sparsify.program import Program
from sparsify.report import Decision
from sparsify.rewriter import Rewriter
from sparsify.verification import verify


def refusing(*names: str) -> Callable[[fx.Node], str | None]:
    def unsupported(node: fx.Node) -> str | None:
        name = node.target._schema.name if hasattr(node.target, "_schema") else ""
        return f"no kernel for {name}" if name.removeprefix("aten::") in names else None

    return unsupported


def cut(
    model: nn.Module,
    *inputs: torch.Tensor,
    refused: tuple[str, ...] = (),
    min_nodes: int = 32,
) -> tuple[Program, Plan, tuple[Decision, ...]]:
    programs = import_torch(model.eval(), inputs)
    context = PassContext(unsupported=refusing(*refused))
    result = run_pipeline(programs, (Partition(min_nodes),), context, verify="numeric")
    program = result.programs["forward"]
    plan = Plan.of(program)
    for region in plan.regions:
        verify(region.program)
    return program, plan, result.decisions


def run(plan: Plan, program: Program, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Runs each region's program eagerly."""
    values = dict(zip(plan.inputs, inputs, strict=True))
    for region in plan.regions:
        outputs = region.program.run(*(values[name] for name in region.inputs))
        values.update(zip(region.outputs, outputs, strict=True))
    return [values[output.name] for output in plan.outputs]


def kinds(plan: Plan) -> list[str]:
    return [region.kind for region in plan.regions]


class Sandwich(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cumsum(self.first(x), 1))


def test_a_program_that_compiles_throughout_is_one_region() -> None:
    x = torch.randn(3, 5, 8)
    program, plan, decisions = cut(Sandwich(), x)
    assert kinds(plan) == ["compiled"]
    assert not decisions
    assert plan.regions[0].inputs == tuple(n.name for n in program.user_inputs())
    torch.testing.assert_close(run(plan, program, x)[0], program.run(x))


def test_an_operator_without_support_becomes_a_region_of_its_own() -> None:
    model, x = Sandwich(), torch.randn(3, 5, 8)
    program, plan, decisions = cut(model, x, refused=("cumsum",))
    assert kinds(plan) == ["compiled", "torch", "compiled"]
    other = torch.randn(2, 7, 8)
    torch.testing.assert_close(run(plan, program, other)[0], model(other))
    [decision] = decisions
    assert decision.verdict == "unsupported"
    assert decision.operator == "aten.cumsum.default"
    assert "no kernel for aten::cumsum" in decision.reason


def test_regions_share_the_weights_of_the_program() -> None:
    program, plan, _ = cut(Sandwich(), torch.randn(3, 5, 8), refused=("cumsum",))
    for region in plan.regions:
        for name, tensor in region.program.weights.items():
            assert tensor is program.exported.state_dict[name]
    names = [set(region.program.weights) for region in plan.regions]
    assert names == [
        {"first.weight", "first.bias"},
        set(),
        {"last.weight", "last.bias"},
    ]


def test_strict_names_the_operator() -> None:
    programs = import_torch(Sandwich().eval(), (torch.randn(3, 5, 8),))
    context = PassContext(unsupported=refusing("cumsum"), strict=True)
    with pytest.raises(ValueError, match=r"strict=True.*aten\.cumsum.*no kernel"):
        run_pipeline(programs, (Partition(),), context)


def test_branches_do_not_alternate() -> None:
    """Three refused operators on parallel branches share one PyTorch region."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(linear(torch.cumsum(linear(x), 0)) for linear in self.linears)

    model, x = Branches(), torch.randn(4, 8)
    program, plan, _ = cut(model, x, refused=("cumsum",))
    assert kinds(plan) == ["compiled", "torch", "compiled"]
    torch.testing.assert_close(run(plan, program, x)[0], model(x))


def test_a_refused_operator_at_the_front_does_not_leave_an_empty_region() -> None:
    class Front(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.cumsum(x, 1))

    _, plan, _ = cut(Front(), torch.randn(4, 5, 8), refused=("cumsum",))
    assert kinds(plan) == ["torch", "compiled"]


def test_cheap_operators_between_refused_ones_stay_in_pytorch() -> None:
    class Cheap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.cumsum(torch.cumsum(x, 0) * 2 + 1, 1))

    x = torch.randn(4, 5, 8)
    program, plan, decisions = cut(Cheap(), x, refused=("cumsum",))
    assert kinds(plan) == ["torch", "compiled"]
    assert [d.verdict for d in decisions] == ["unsupported", "skipped"]
    torch.testing.assert_close(run(plan, program, x)[0], program.run(x))
    _, plan, _ = cut(Cheap(), x, refused=("cumsum",), min_nodes=1)
    assert kinds(plan) == ["torch", "compiled", "torch", "compiled"]


def test_a_region_derives_its_sizes_from_its_own_inputs() -> None:
    """The last region only gets a flattened tensor; it takes the model's input for its sizes."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, _ = x.shape
            flat = torch.cumsum(x.reshape(batch * length, 4), 0)
            return self.linear(flat.reshape(batch, length, 4)).reshape(length, batch, 4)

    model = Flat()
    program, plan, _ = cut(model, torch.randn(3, 5, 4), refused=("cumsum",))
    for region in plan.regions:
        if region.kind == "compiled":
            dims = [e for n in region.program.user_inputs() for e in n.meta["val"].shape]
            bound = {d.node.expr for d in dims if isinstance(d, torch.SymInt)}
            values = [n.meta["val"] for n in region.program.graph.nodes if "val" in n.meta]
            shapes = [v.shape for v in values if isinstance(v, torch.Tensor)]
            sizes = [e for shape in shapes for e in shape if isinstance(e, torch.SymInt)]
            assert {s for e in sizes for s in e.node.expr.free_symbols} <= bound
    x = torch.randn(2, 6, 4)
    torch.testing.assert_close(run(plan, program, x)[0], model(x))


def test_parts_of_a_tuple_stay_with_their_maker() -> None:
    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values, places = torch.topk(self.linear(x), 2)
            return self.linear(x) + values.sum(), places

    model, x = Top(), torch.randn(4, 8)
    program, plan, _ = cut(model, x, refused=("topk",))
    assert "torch" in kinds(plan)
    for found, expected in zip(run(plan, program, x), model(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_sizes_that_follow_from_values_stay_in_pytorch() -> None:
    class Select(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return y[y[:, 0] > 0]

    model, x = Select(), torch.randn(6, 8)
    program, plan, decisions = cut(model, x)
    assert kinds(plan) == ["compiled", "torch"]
    assert any("no dimension of any input" in d.reason for d in decisions)
    torch.testing.assert_close(run(plan, program, x)[0], model(x))


def test_a_size_may_be_a_result() -> None:
    class Sized(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x * 2, x.shape[0] * 3

    _, plan, _ = cut(Sized(), torch.randn(5, 4))
    assert [output.name is None for output in plan.outputs] == [False, True]
    assert str(plan.outputs[1].size).startswith("3*s")


def test_marks_can_be_taken_off_and_put_back() -> None:
    program, plan, _ = cut(Sandwich(), torch.randn(3, 5, 8), refused=("cumsum",))
    marks = marks_of(program)
    bare = Rewriter(program).finish()
    for node in bare.graph.nodes:
        node.meta.pop("sparsify_region", None)
    assert kinds(Plan.of(bare)) == ["compiled"]
    mark(bare, marks)
    assert Plan.of(bare).regions[1].outputs == plan.regions[1].outputs
