"""Constant sub-graphs become weights: which, under what name, and which stay."""

import torch
from torch import nn

from sparsify.contracts import PassContext
from sparsify.frontend.torch import import_torch
from sparsify.passes.fold_constants import FoldConstants

aten = torch.ops.aten


def fold(model, inputs, **options):
    programs = import_torch(model, inputs)
    before = str(programs["forward"].graph)
    result = FoldConstants(**options).run(programs, PassContext())
    assert str(programs["forward"].graph) == before
    program = result.programs["forward"]
    got, expected = program.run(*inputs), programs["forward"].run(*inputs)
    assert torch.equal(got, expected)
    return program, result.decisions


def targets(program):
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


def test_weight_norm_becomes_one_weight():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    program, (decision,) = fold(model, (torch.randn(2, 4),))
    assert targets(program) == [aten.linear.default]
    assert set(program.weights) == {"bias", "parametrizations.weight_folded"}
    assert torch.allclose(program.weights["parametrizations.weight_folded"], model.weight)
    assert decision.site == "parametrizations.weight_folded" and "computed once" in decision.reason


def test_transposed_weight_and_computed_table():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            angles = torch.arange(4)[:, None] * 0.5
            return x @ self.w + (torch.cos(angles) * torch.ones(3)).sum(0)

    program, decisions = fold(Table(), (torch.randn(2, 4),))
    assert targets(program) == [aten.matmul.default, aten.add.Tensor]
    assert len(decisions) == 1 and set(program.weights) > {"w"}


def test_two_results_of_one_weight_get_two_names():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x * self.w.exp() + self.w.sin() + self.w

    program, _ = fold(Two(), (torch.randn(2, 3),))
    assert set(program.weights) == {"w", "w_folded", "w_folded_1"}


class Expanded(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return x + (self.w * 2).expand(64, 8)


def test_large_expansion_stays_in_the_graph():
    program, (decision,) = fold(Expanded(), (torch.randn(64, 8),), max_bytes=1024)
    assert targets(program) == [aten.expand.default, aten.add.Tensor]
    assert decision.shape == (8,)
    program, (decision,) = fold(Expanded(), (torch.randn(64, 8),), max_bytes=2048)
    assert targets(program) == [aten.add.Tensor]
    assert decision.shape == (64, 8)


def test_fills_random_numbers_and_dynamic_shapes_stay():
    class Kept(nn.Module):
        def forward(self, x):
            return x + torch.ones(3) + torch.arange(x.shape[0])[:, None]

    program, decisions = fold(Kept(), (torch.randn(5, 3),))
    assert not decisions
    assert aten.full.default in targets(program)

    class Random(nn.Module):
        def forward(self, x):
            return x + torch.rand(3)

    programs = import_torch(Random(), (torch.randn(5, 3),))
    assert not FoldConstants().run(programs, PassContext()).decisions


def test_list_results():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            first, second = (self.w * 2).split([1, 3])
            return x + first + second.sum(0)

    program, _ = fold(Split(), (torch.randn(2, 3),))
    assert targets(program) == [aten.add.Tensor, aten.add.Tensor]


def test_minilm_has_nothing_to_fold(minilm):
    ones = torch.ones(1, 8, dtype=torch.long)
    example = {"input_ids": ones * 9, "attention_mask": ones, "token_type_ids": ones * 0}
    programs = import_torch(minilm, example)
    result = FoldConstants().run(programs, PassContext())
    assert result.programs.weights.digest() == programs.weights.digest()
