"""What tests of passes share: import, apply with every check, compare with the module."""

from collections import Counter
from collections.abc import Callable, Iterable

import pytest
import torch
from torch.utils import _pytree

from sparsify.contracts import Pass, PassContext, PassResult
from sparsify.frontend.torch import import_torch
from sparsify.layouts import Layout, PackedDense, Sell
from sparsify.passes import run_pipeline
from sparsify.program import Program, ProgramSet


class FakeCost:
    """Time proportional to multiplications, with sparse ones costing 1.5 times as much."""

    def linear_seconds(
        self, layout: Layout, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        work = 1.5 * nnz if isinstance(layout, Sell) else shape[0] * shape[1]
        return work * tokens * 1e-11

    def candidates(self, shape: tuple[int, int], nnz: int, tokens: int) -> tuple[Layout, ...]:
        return Sell(rows=4, k_block=32, window=16), PackedDense(rows=6)


@pytest.fixture(scope="session")
def cost() -> FakeCost:
    return FakeCost()


@pytest.fixture
def import_model() -> Callable[..., ProgramSet]:
    """``import_model(module, *examples)``: one program with every dimension dynamic.

    With ``rows``, the first dimension alone is, up to so many.
    """

    def load(
        module: torch.nn.Module, *examples: torch.Tensor, rows: int | None = None
    ) -> ProgramSet:
        if rows is None:
            return import_torch(module.eval(), examples)
        shapes = tuple({0: torch.export.Dim("rows", min=1, max=rows)} for _ in examples)
        return import_torch(module.eval(), examples, dynamic_shapes=shapes)

    return load


@pytest.fixture
def apply() -> Callable[..., PassResult]:
    """Runs passes and checks what all must keep: numbers, purity, symbolic shapes."""

    def run(programs: ProgramSet, *passes: Pass, context: PassContext | None = None) -> PassResult:
        before = _state(programs)
        result = run_pipeline(programs, passes, context, verify="numeric")
        assert _state(programs) == before, "a pass changed its input"
        for old, new in zip(programs, result.programs, strict=True):
            assert new.exported.range_constraints == old.exported.range_constraints
            assert _symbols(old) == _symbols(new), "a dynamic dimension became constant"
        return result

    return run


@pytest.fixture
def targets() -> Callable[[Program], Counter[str]]:
    """How often each operator stands in a program, by name without overload."""

    def count(program: Program) -> Counter[str]:
        calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
        names = [str(getattr(t, "_schema", t)).split("(")[0].split(".")[0] for t in calls]
        return Counter(name.removeprefix("aten::").removeprefix("sparsify::") for name in names)

    return count


@pytest.fixture
def same_results() -> Callable[..., None]:
    """Compares a program with the module it came from on inputs of other sizes."""

    def compare(
        module: torch.nn.Module, program: Program, inputs: Iterable[tuple[torch.Tensor, ...]]
    ) -> None:
        compiled = program.exported.module()
        for arguments in inputs:
            with torch.no_grad():
                expected = _pytree.tree_leaves(module(*arguments))
                found = _pytree.tree_leaves(compiled(*arguments))
            for e, f in zip(expected, found, strict=True):
                torch.testing.assert_close(f, e, atol=2e-5, rtol=2e-5)

    return compare


def _state(programs: ProgramSet) -> list[tuple[str, str]]:
    return [(str(p.exported.graph), p.weights.digest()) for p in programs]


def _symbols(program: Program) -> list[set[str]]:
    return [
        set().union(*(_free(extent) for extent in node.meta["val"].shape))
        for node in program.user_inputs()
    ] + [set().union(*(_free(e) for e in _output_extents(program)))]


def _output_extents(program: Program) -> list[int | torch.SymInt]:
    output = next(n for n in program.graph.nodes if n.op == "output")
    return [e for node in output.args[0] if node is not None for e in node.meta["val"].shape]


def _free(extent: int | torch.SymInt) -> set[str]:
    return set() if isinstance(extent, int) else set(map(str, extent.node.expr.free_symbols))
