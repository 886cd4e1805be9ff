"""Rotations of attention heads become one operator on row-major activations."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sparsify.passes.fuse_attention import FuseAttention
from sparsify.passes.fuse_rotary import FuseRotary
from sparsify.passes.graph import arguments
from sparsify.passes.merge_projections import MergeProjections
from sparsify.passes.simplify_views import SimplifyViews

HEADS, DIM = 3, 4
FEATURES = HEADS * DIM
SIZES = [(1, 1), (3, 7), (2, 17)]


def by_slices(x):
    return torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), dim=-1)


def by_chunk(x):
    lower, upper = x.chunk(2, dim=-1)
    return torch.cat((-upper, lower), dim=-1)


def by_split(x):
    lower, upper = x.split(DIM // 2, -1)
    return torch.cat([upper.neg(), lower], -1)


class Rotary(nn.Module):
    """A projection, split into heads, and turned; ``tokens_first`` leaves the heads behind."""

    def __init__(self, half=by_slices, *, tokens_first=False, turn=None) -> None:
        super().__init__()
        self.project = nn.Linear(FEATURES, FEATURES)
        self.half, self.tokens_first = half, tokens_first
        self.turn = turn or (lambda m, q, cos, sin: q * cos + m.half(q) * sin)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.project(x).unflatten(-1, (HEADS, DIM))
        steps = torch.arange(x.shape[1]).float()[None, :, None] + x[:, :1, :1]
        freqs = steps * torch.tensor([0.9, 0.3])
        cos, sin = (f(torch.cat((freqs, freqs), -1)) for f in (torch.cos, torch.sin))
        if self.tokens_first:
            return self.turn(self, q, cos.unsqueeze(2), sin.unsqueeze(2)).flatten(2)
        q = self.turn(self, q.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1))
        return q.transpose(1, 2).flatten(2)


def inputs():
    return [(torch.randn(b, s, FEATURES),) for b, s in SIZES]


def rotary_of(program):
    (node,) = (n for n in program.graph.nodes if "rotary" in str(n.target))
    return arguments(node)


@pytest.mark.parametrize("half", [by_slices, by_chunk, by_split])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_any_spelling_reads_the_projection(
    half, tokens_first, import_model, apply, targets, same_results
):
    model = Rotary(half, tokens_first=tokens_first)
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseRotary())
    program = result.programs["forward"]
    count = targets(program)
    assert count["rotary"] == 1 and not {"neg", "permute", "view"} & set(count)
    options = rotary_of(program)
    assert (options["heads"], options["head_dim"]) == (HEADS, DIM)
    assert options["x"].target == torch.ops.aten.linear.default
    same_results(model, program, inputs())
    (decision,) = result.decisions
    assert decision.verdict == "rewritten" and "straight from the projection" in decision.reason


@pytest.mark.parametrize(
    "turn",
    [
        lambda m, q, cos, sin: m.half(q) * sin + cos * q,
        lambda m, q, cos, sin: sin * m.half(q) + q * cos,
    ],
)
def test_the_order_of_operands_does_not_matter(turn, import_model, apply, targets, same_results):
    model = Rotary(turn=turn)
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseRotary())
    assert targets(result.programs["forward"])["rotary"] == 1
    same_results(model, result.programs["forward"], inputs())


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (
            lambda m, q, cos, sin: q.exp() * cos + m.half(q) * sin,
            "not those of the tensor beside them",
        ),
        (
            lambda m, q, cos, sin: q * cos + torch.cat((-q[..., 1:], q[..., :1]), -1) * sin,
            "not those of the tensor beside them",
        ),
        (
            lambda m, q, cos, sin: q * (cos + q.mean(-1, True)) + m.half(q) * sin,
            "the cosine differs from head to head",
        ),
    ],
)
def test_near_misses_say_why(turn, reason, import_model, apply, targets, same_results):
    model = Rotary(turn=turn)
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseRotary())
    (decision,) = result.decisions
    assert decision.verdict == "skipped" and reason in decision.reason
    assert targets(result.programs["forward"])["rotary"] == 0
    same_results(model, result.programs["forward"], inputs())


def test_a_rotation_without_a_negative_half_is_none(import_model, apply):
    model = Rotary(turn=lambda m, q, cos, sin: q * cos + torch.cat(q.chunk(2, -1)[::-1], -1) * sin)
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseRotary())
    assert result.decisions == ()


def test_heads_that_are_no_cut_of_rows_are_copied(import_model, apply, targets, same_results):
    model = Rotary(turn=lambda m, q, cos, sin: (z := q.tanh()) * cos + m.half(z) * sin)
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseRotary())
    assert targets(result.programs["forward"])["rotary"] == 1
    (decision,) = result.decisions
    assert "copied into rows first" in decision.reason
    same_results(model, result.programs["forward"], inputs())


class Encoder(nn.Module):
    """Attention with rotary embeddings, as encoders have it: fixed tables, one for the batch."""

    def __init__(self, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        if packed:
            self.qkv = nn.Linear(FEATURES, 3 * FEATURES)
        else:
            self.q, self.k, self.v = (nn.Linear(FEATURES, FEATURES) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in parts)
        freqs = torch.arange(x.shape[1]).float()[:, None] * torch.tensor([0.9, 0.3])
        cos, sin = (f(torch.cat((freqs, freqs), -1))[None, None] for f in (torch.cos, torch.sin))
        q, k = (t * cos + by_slices(t) * sin for t in (q, k))
        return sdpa(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_of_encoders_reads_rotated_rows(
    packed, import_model, apply, targets, same_results
):
    model = Encoder(packed=packed)
    passes = (FuseRotary(), FuseAttention(), SimplifyViews(), MergeProjections())
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), *passes)
    program = result.programs["forward"]
    count = targets(program)
    assert count["fused_attention"] == count["linear"] == 1
    assert count["rotary"] == (2 if packed else 1)
    assert not {"permute", "neg"} & set(count)
    same_results(model, program, inputs())
    if not packed:
        assert rotary_of(program)["heads"] == 2 * HEADS
