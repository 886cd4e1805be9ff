"""Projections of one input that feed one attention become one linear."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sparsify.passes.fuse_attention import FuseAttention
from sparsify.passes.graph import arguments
from sparsify.passes.merge_projections import MergeProjections
from sparsify.passes.sites import is_disabled, member_names, merged_name
from sparsify.program import PassContext

HEADS, HEAD_DIM = 2, 3
FEATURES = HEADS * HEAD_DIM
FUSE = (FuseAttention(), MergeProjections())


class Attention(nn.Module):
    def __init__(
        self, biases: tuple[bool, bool, bool] = (True, True, True), kv: int = HEADS
    ) -> None:
        super().__init__()
        self.query = nn.Linear(FEATURES, FEATURES, bias=biases[0])
        self.key = nn.Linear(FEATURES, kv * HEAD_DIM, bias=biases[1])
        self.value = nn.Linear(FEATURES, kv * HEAD_DIM, bias=biases[2])

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        memory = x if memory is None else memory
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for t in (q, k, v))
        return sdpa(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def attention_of(result):
    (node,) = (n for n in result.programs["forward"].graph.nodes if "fused" in str(n.target))
    return node


def test_three_projections_become_one(import_model, apply, targets, same_results):
    model = Attention()
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), *FUSE)
    program = result.programs["forward"]
    assert targets(program)["linear"] == 1
    assert sorted(program.weights) == ["{query,key,value}.bias", "{query,key,value}.weight"]
    weight = torch.cat([model.query.weight, model.key.weight, model.value.weight])
    assert torch.equal(program.weights["{query,key,value}.weight"], weight)
    assert arguments(attention_of(result))["offsets"] == [0, FEATURES, 2 * FEATURES]
    same_results(model, program, [(torch.randn(b, s, FEATURES),) for b, s in ((1, 1), (3, 17))])
    merged = [d for d in result.decisions if d.made_by == "merge_projections"]
    assert [d.verdict for d in merged] == ["rewritten"]
    assert merged[0].site == "{query,key,value}" and merged[0].shape == (18, 6)


def test_a_missing_bias_is_filled_with_zeros(import_model, apply, same_results):
    model = Attention(biases=(True, False, True))
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), *FUSE)
    bias = result.programs.weights["{query,key,value}.bias"]
    assert torch.equal(bias[FEATURES : 2 * FEATURES], torch.zeros(FEATURES))
    same_results(model, result.programs["forward"], [(torch.randn(1, 9, FEATURES),)])


def test_no_bias_stays_no_bias(import_model, apply):
    model = Attention(biases=(False, False, False))
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), *FUSE)
    assert sorted(result.programs.weights) == ["{query,key,value}.weight"]


def test_grouped_heads_have_shorter_keys(import_model, apply, same_results):
    model = Attention(kv=1)
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), *FUSE)
    assert arguments(attention_of(result))["offsets"] == [0, FEATURES, FEATURES + HEAD_DIM]
    same_results(model, result.programs["forward"], [(torch.randn(3, 7, FEATURES),)])


def test_cross_attention_merges_keys_and_values(import_model, apply, targets, same_results):
    model = Attention()
    programs = import_model(model, torch.randn(2, 5, FEATURES), torch.randn(2, 7, FEATURES))
    result = apply(programs, *FUSE)
    assert targets(result.programs["forward"])["linear"] == 2
    assert arguments(attention_of(result))["offsets"] == [0, 0, FEATURES]
    assert "{key,value}.weight" in result.programs.weights
    pairs = [(torch.randn(3, 1, FEATURES), torch.randn(3, 20, FEATURES))]
    same_results(model, result.programs["forward"], pairs)


def test_a_projection_with_another_reader_stays(import_model, apply, targets, same_results):
    class Cached(Attention):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            key = self.key(x)
            q, k, v = self.query(x), key, self.value(x)
            q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for t in (q, k, v))
            return sdpa(q, k, v).transpose(1, 2).flatten(2), key

    model = Cached()
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), *FUSE)
    assert targets(result.programs["forward"])["linear"] == 2
    assert "{query,value}.weight" in result.programs.weights
    same_results(model, result.programs["forward"], [(torch.randn(1, 4, FEATURES),)])


def test_a_site_switched_off_is_not_merged_with_others(import_model, apply, targets):
    programs = import_model(Attention(), torch.randn(2, 5, FEATURES))
    context = PassContext(disabled_sites=frozenset({"query"}))
    result = apply(programs, *FUSE, context=context)
    assert "query.weight" in result.programs.weights
    assert "{key,value}.weight" in result.programs.weights


@pytest.mark.parametrize(
    ("names", "merged"),
    [
        (["a.q.weight", "a.k.weight"], "a.{q,k}.weight"),
        (["q", "k"], "{q,k}"),
        (["a.x.proj.w", "a.y.w"], "a.{x.proj,y}.w"),
        (["a.a.w", "a.w"], "a.{a,}.w"),
    ],
)
def test_merged_names_keep_what_is_common(names, merged):
    assert merged_name(names) == merged
    assert list(member_names(merged)) == names


def test_patterns_reach_the_members_of_a_merged_site():
    site = "layer.0.{query,key}"
    assert member_names(site) == ("layer.0.query", "layer.0.key")
    assert is_disabled(site, {"layer.*.key"}) and is_disabled(site, {site})
    assert not is_disabled(site, {"layer.1.*"})
