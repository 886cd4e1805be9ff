"""Activations stay in lanes between kernels; each value is converted at most once each way."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from sparsify.frontend.normalise import normalise
from sparsify.passes import run_pipeline
from sparsify.passes.fuse_attention import FuseAttention
from sparsify.passes.fuse_epilogue import FuseEpilogue
from sparsify.passes.fuse_norm import FuseNorm
from sparsify.passes.graph import arguments
from sparsify.passes.merge_projections import MergeProjections
from sparsify.passes.propagate_lanes import PropagateLanes
from sparsify.passes.sparse_linear import SparseLinear

BEFORE = (FuseAttention(), MergeProjections(), SparseLinear(), FuseNorm(), FuseEpilogue())
SIZES = [(1, 1), (3, 5), (1, 16), (2, 17), (5, 33)]
INPUTS = [(torch.randn(b, s, 6),) for b, s in SIZES]


class Net(nn.Module):
    """Some linears and a norm of 6 features; ``body`` combines them."""

    def __init__(self, body) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.body = body

    def forward(self, x: torch.Tensor):
        return self.body(self, x)


@pytest.fixture
def run(import_model, apply, same_results, targets):
    """Applies everything to ``Net(body)``, compares all sizes, returns program and counts."""

    def go(body, *, fuse: bool = True):
        model = Net(body)
        programs = import_model(model, torch.randn(2, 5, 6))
        passes = BEFORE if fuse else (SparseLinear(), FuseNorm())
        result = apply(programs, *passes, PropagateLanes())
        program = result.programs["forward"]
        same_results(model, program, INPUTS)
        return program, targets(program), result.decisions

    return go


def conversions(count):
    return count["to_lanes"], count["from_lanes"]


def test_a_chain_is_converted_at_its_ends(run):
    program, count, decisions = run(lambda m, x: m.norm(m.b(F.gelu(m.a(x)))))
    assert conversions(count) == (1, 1)
    kernels = [n for n in program.graph.nodes if "sparse_linear" in str(n.target)]
    assert len(kernels) == 2 and all(arguments(n)["lanes"] for n in kernels)
    made = [d for d in decisions if d.made_by == "propagate_lanes"]
    assert [(d.operator, d.verdict) for d in made] == [
        ("to_lanes", "rewritten"),
        ("from_lanes", "rewritten"),
    ]
    assert "a reads it in lanes" in made[0].reason and "the output" in made[1].reason


def test_shapes_in_lanes_stay_symbolic(run):
    program, _, _ = run(lambda m, x: m.norm(m.a(x)))
    (norm,) = (n for n in program.graph.nodes if "fused_norm" in str(n.target))
    groups, features, lanes = norm.meta["val"].shape
    assert isinstance(groups, torch.SymInt) and (features, lanes) == (6, 16)


@pytest.mark.parametrize(
    "between",
    [
        torch.sigmoid,
        lambda y: y * 2 + 1,
        lambda y: torch.exp(-y),
        lambda y: y.clamp(-1, 1),
        lambda y: y.pow(2),
        lambda y: 1 / (1 + y.abs()),
        lambda y: F.leaky_relu(y, 0.1),
        lambda y: y / torch.tensor(3.0),
    ],
)
def test_elementwise_operators_between_kernels_run_in_lanes(between, run):
    _, count, _ = run(lambda m, x: m.b(between(m.a(x))))
    assert conversions(count) == (1, 1)


def test_a_vector_of_features_becomes_a_column(run):
    program, count, _ = run(lambda m, x: m.b(m.a(x) * m.scale + m.scale[None, None]))
    assert conversions(count) == (1, 1)
    (product,) = (n for n in program.graph.nodes if n.target == torch.ops.aten.mul.Tensor)
    assert tuple(product.args[1].meta["val"].shape) == (6, 1)


def test_gating_multiplies_in_lanes(run):
    _, count, _ = run(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)))
    assert conversions(count) == (1, 1)


def test_a_residual_from_far_is_not_converted_again(run):
    _, count, _ = run(lambda m, x: m.norm(x + m.b(F.relu(m.a(x)))))
    assert conversions(count) == (1, 1)


def test_a_value_read_both_ways_is_converted_once(run):
    def body(m, x):
        y = m.a(x)
        return m.b(y), y.cumsum(1), y.flip(1)

    _, count, _ = run(body)
    assert conversions(count) == (1, 2)


@pytest.mark.parametrize(
    "regroup",
    [
        lambda y: y.reshape(-1, 6),
        lambda y: y.flatten(0, 1).clone(),
        lambda y: y.unsqueeze(1),
        lambda y: y[None].squeeze(0),
    ],
)
def test_views_that_regroup_tokens_vanish(regroup, run):
    program, count, _ = run(lambda m, x: m.b(regroup(m.a(x))).reshape(x.shape))
    assert conversions(count) == (1, 1)
    in_lanes = [n for n in program.graph.nodes if "sparse_linear" in str(n.target)]
    assert in_lanes[1].args[0] is in_lanes[0]


def test_rows_regrouped_at_the_output(run):
    _, count, _ = run(lambda m, x: (m.a(x).reshape(-1, 6), m.a(x)))
    assert conversions(count)[0] == 1


def test_a_view_that_changes_features_is_a_border(run):
    _, count, _ = run(lambda m, x: m.b(m.a(x).reshape(-1, 3).reshape(-1, 6).reshape(x.shape)))
    assert conversions(count) == (2, 2)


def test_reading_across_tokens_is_a_border(run):
    _, count, decisions = run(lambda m, x: m.b(m.a(x).cumsum(1)))
    assert conversions(count) == (2, 2)
    reasons = [d.reason for d in decisions if d.operator == "from_lanes"]
    assert any("cumsum" in reason for reason in reasons)


def test_broadcasting_over_tokens_stays_row_major(run):
    def body(m, x):
        y = m.a(x)
        return m.b(y + y[:, :1])

    _, count, _ = run(body)
    assert conversions(count) == (2, 2)


def test_sums_before_the_first_kernel_stay_row_major(run):
    program, count, _ = run(lambda m, x: m.norm(x.sin() + x.cos()))
    assert conversions(count) == (1, 1)
    (entry,) = (n for n in program.graph.nodes if "to_lanes" in str(n.target))
    assert entry.args[0].target == torch.ops.aten.add.Tensor


@pytest.mark.parametrize(("rows", "expected"), [(8, (1, 1)), (9, (2, 2))])
def test_pooling_one_token_of_few_sequences_stays_row_major(
    rows, expected, import_model, apply, targets, same_results
):
    """At most 8 tokens are pooled: one group of lanes would be mostly empty."""
    model = Net(lambda m, x: torch.tanh(m.b(m.norm(m.a(x))[:, 0])))
    result = apply(import_model(model, torch.randn(2, 5, 6), rows=rows), *BEFORE, PropagateLanes())
    assert conversions(targets(result.programs["forward"])) == expected
    same_results(model, result.programs["forward"], [(torch.randn(n, 5, 6),) for n in (1, 8)])


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [(2, 8, (0, 0)), (8, 8, (0, 0)), (2, 9, (1, 1)), (9, 9, (1, 1)), (2, None, (1, 1))],
)
def test_few_tokens_stay_row_major_where_there_are_never_more(
    tokens, most, expected, import_model, apply, targets, same_results
):
    model = Net(lambda m, x: m.norm(m.b(torch.relu(m.a(x))) + x))
    programs = import_model(model, torch.randn(tokens, 6), rows=most)
    result = apply(programs, *BEFORE, PropagateLanes())
    assert conversions(targets(result.programs["forward"])) == expected
    sizes = range(1, most + 1) if most else (1, 8, 33)
    same_results(model, result.programs["forward"], [(torch.randn(n, 6),) for n in sizes])


def test_a_vector_input_without_tokens(import_model, apply, same_results, targets):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    result = apply(import_model(model, torch.randn(6)), *BEFORE, PropagateLanes())
    assert conversions(targets(result.programs["forward"])) == (0, 0)
    same_results(model, result.programs["forward"], [(torch.randn(6),)])


def test_a_vector_whose_size_export_has_fixed(targets):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(self.a(x)) * scale)

    model, inputs = Scaled().eval(), (torch.randn(20, 6), torch.randn(8))
    exported = torch.export.export(
        model, inputs, dynamic_shapes={"x": {0: Dim.DYNAMIC}, "scale": {0: Dim.AUTO}}
    )
    result = run_pipeline(normalise(exported), (*BEFORE, PropagateLanes()), verify="numeric")
    program = result.programs["forward"]
    (column,) = (n for n in program.graph.nodes if "reshape" in str(n.target))
    assert list(map(type, column.args[1])) == [int, int]
    assert conversions(targets(program)) == (1, 1)


class Attention(nn.Module):
    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.masked = masked

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (q, k, v))
        mask = None
        if self.masked:
            mask = (memory[..., 0] > -1)[:, None, None]
            mask = mask | (torch.arange(memory.shape[1]) == 0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_reads_and_writes_lanes(masked, import_model, apply, same_results, targets):
    model = Attention(masked)
    programs = import_model(model, torch.randn(2, 5, 6), torch.randn(2, 7, 6))
    result = apply(programs, *BEFORE, PropagateLanes())
    program = result.programs["forward"]
    assert conversions(targets(program)) == (2, 1)
    (attention,) = (n for n in program.graph.nodes if "fused_attention" in str(n.target))
    extents = arguments(attention)["extents"]
    assert [str(e.meta["val"]) for e in extents] == [
        str(e)
        for e in (
            *program.user_inputs()[0].meta["val"].shape[:2],
            program.user_inputs()[1].meta["val"].shape[1],
        )
    ]
    pairs = [(torch.randn(b, s, 6), torch.randn(b, 20 - s, 6)) for b, s in ((1, 1), (3, 16))]
    same_results(model, program, pairs)


def test_extents_come_from_the_inputs(run):
    """No row-major activation stays alive for its shape."""
    program, _, _ = run(lambda m, x: m.norm(m.b(m.a(x))))
    sizes = [n for n in program.graph.nodes if n.target == torch.ops.aten.sym_size.int]
    assert sizes and all(n.args[0].op == "placeholder" for n in sizes)


def test_a_program_without_kernels_is_unchanged(import_model, apply, targets):
    programs = import_model(nn.Softmax(-1), torch.randn(2, 5, 6))
    result = apply(programs, PropagateLanes())
    assert conversions(targets(result.programs["forward"])) == (0, 0)
    assert result.decisions == ()
