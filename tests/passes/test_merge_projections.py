"""Projections of one input that feed one attention become one linear."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sparsify.contracts import PassContext
from sparsify.passes.fuse_attention import FuseAttention
from sparsify.passes.graph import arguments
from sparsify.passes.merge_projections import MergeProjections
from sparsify.passes.sites import is_disabled, member_names, merged_name

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


class Turned(nn.Module):
    """Attention over a paged cache; ``turned`` names what has a rotary embedding."""

    def __init__(self, turned: str = "qk", kv: int = 1) -> None:
        super().__init__()
        self.query = nn.Linear(FEATURES, HEADS * 4, bias=False)
        self.key = nn.Linear(FEATURES, kv * 4)
        self.value = nn.Linear(FEATURES, kv * 4, bias=False)
        self.turned, self.kv = turned, kv

    def forward(self, x, pages, starts, counts, keys, values):
        steps = starts[:, None, None] + torch.arange(x.shape[1])[None, :, None]
        freqs = steps.float() * torch.tensor([0.9, 0.3])
        cos, sin = (f(torch.cat((freqs, freqs), -1)) for f in (torch.cos, torch.sin))
        q, k, v = self.query(x), self.key(x), self.value(x)
        if "q" in self.turned:
            q = torch.ops.sparsify.rotary(q, cos, sin, HEADS, 4)
        if "k" in self.turned:
            k = torch.ops.sparsify.rotary(k, cos, sin, self.kv, 4)
        lengths = torch.ops.sparsify.kv_append(keys, values, k, v, pages, starts, counts, 0, [0, 0])
        return torch.ops.sparsify.paged_attention(
            q, keys, values, pages, lengths, counts, 0, HEADS, 0, 0.5
        )


def paged_inputs(batch: int, length: int, kv: int = 1) -> tuple[torch.Tensor, ...]:
    width = -(-(length + 5) // 16)
    pages = torch.randperm(batch * width).to(torch.int32).reshape(batch, width)
    keys = torch.randn(1, batch * width, kv, 4, 16)
    starts = torch.arange(batch) % 5
    counts = (length - torch.arange(batch)).clamp(min=1)
    return torch.randn(batch, length, FEATURES), pages, starts, counts, keys, keys.mT.clone()


@pytest.mark.parametrize(
    ("turned", "order", "heads"),
    [
        ("qk", "{query,key,value}", HEADS + 1),
        ("", "{query,key,value}", None),
        ("q", "{query,key,value}", HEADS),
        ("k", "{key,query,value}", 1),
    ],
)
def test_projections_of_the_paged_cache(turned, order, heads, import_model, apply, targets):
    model = Turned(turned)
    result = apply(import_model(model, *paged_inputs(2, 5)), MergeProjections())
    program = result.programs["forward"]
    count = targets(program)
    assert count["linear"] == 1 and count["rotary"] == (heads is not None)
    assert sorted(program.weights)[-2:] == [f"{order}.bias", f"{order}.weight"]
    nodes = {
        str(n.target).split(".")[1]: n for n in program.graph.nodes if "sparsify" in str(n.target)
    }
    append, attend = (arguments(nodes[n]) for n in ("kv_append", "paged_attention"))
    assert append["key"] is append["value"] is attend["query"]
    starts = {"query": 0, "key": HEADS * 4} if turned != "k" else {"query": 4, "key": 0}
    assert attend["offset"] == starts["query"]
    assert append["offsets"] == [starts["key"], HEADS * 4 + 4]
    if heads is not None:
        assert arguments(nodes["rotary"])["heads"] == heads
    for batch, length in ((1, 1), (3, 17)):
        inputs = paged_inputs(batch, length)
        mine, other = ([t.clone() for t in inputs] for _ in range(2))
        with torch.no_grad():
            torch.testing.assert_close(program.run(*mine), model(*other), atol=2e-5, rtol=2e-5)
        for found, expected in zip(mine[-2:], other[-2:], strict=True):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_a_packed_projection_is_read_where_it_lies(import_model, apply, targets):
    class Packed(nn.Module):
        """As GPT-2 spells it, with the transpositions that a captured model has."""

        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(FEATURES, 3 * HEADS * 4)

        def forward(self, x, pages, starts, counts, keys, values):
            parts = self.project(x).split(HEADS * 4, -1)
            parts = (t.unflatten(-1, (HEADS, 4)).transpose(1, 2) for t in parts)
            q, k, v = (t.transpose(1, 2).flatten(2) for t in parts)
            lengths = torch.ops.sparsify.kv_append(
                keys, values, k, v, pages, starts, counts, 0, [0, 0]
            )
            return torch.ops.sparsify.paged_attention(
                q, keys, values, pages, lengths, counts, 0, HEADS, 0, 0.5
            )

    programs = import_model(Packed(), *paged_inputs(2, 5, HEADS))
    program = apply(programs, MergeProjections()).programs["forward"]
    count = targets(program)
    assert not {"split_with_sizes", "permute", "clone"} & set(count)
    (append,) = (n for n in program.graph.nodes if "kv_append" in str(n.target))
    assert arguments(append)["offsets"] == [HEADS * 4, HEADS * 8]
    assert arguments(append)["key"].target == torch.ops.aten.linear.default


def test_rotations_by_other_angles_stay_apart(import_model, apply, targets):
    class Opposite(Turned):
        def forward(self, x, pages, starts, counts, keys, values):
            cos, sin = x[..., :4].cos(), x[..., :4].sin()
            q = torch.ops.sparsify.rotary(self.query(x), cos, sin, HEADS, 4)
            k = torch.ops.sparsify.rotary(self.key(x), cos, -sin, 1, 4)
            lengths = torch.ops.sparsify.kv_append(
                keys, values, k, self.value(x), pages, starts, counts, 0, [0, 0]
            )
            return torch.ops.sparsify.paged_attention(
                q, keys, values, pages, lengths, counts, 0, HEADS, 0, 0.5
            )

    result = apply(import_model(Opposite(), *paged_inputs(2, 5)), MergeProjections())
    count = targets(result.programs["forward"])
    assert count["rotary"] == count["linear"] == 2
    assert "{query,value}.weight" in result.programs.weights


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
