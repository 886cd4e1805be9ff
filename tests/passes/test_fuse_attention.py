"""Attention is recognised through every spelling of the split into heads."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sparsify.contracts import PassContext
from sparsify.passes.fuse_attention import FuseAttention
from sparsify.passes.graph import arguments

HEADS, HEAD_DIM = 3, 4
FEATURES = HEADS * HEAD_DIM
SIZES = [(1, 1), (2, 5), (3, 16), (1, 17)]


def inputs():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(b, s, FEATURES, generator=generator),) for b, s in SIZES]


class Attention(nn.Module):
    """Self attention, its split into heads spelled as named."""

    def __init__(self, spelling: str = "view_permute", **options) -> None:
        super().__init__()
        self.spelling, self.options = spelling, options
        self.q, self.k, self.v = (nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.out = nn.Linear(FEATURES, FEATURES)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        match self.spelling:
            case "view_permute":
                return x.view(b, s, HEADS, HEAD_DIM).permute(0, 2, 1, 3)
            case "view_transpose":
                return x.view(b, -1, HEADS, HEAD_DIM).transpose(1, 2)
            case "negative_transpose":
                return x.reshape(b, s, HEADS, HEAD_DIM).transpose(-3, -2)
            case "unflatten":
                return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            case "contiguous":
                return x.view(b, s, HEADS, HEAD_DIM).transpose(1, 2).contiguous()
            case _:
                return x.clone().view(b * s, FEATURES).view(b, s, HEADS, HEAD_DIM).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (self.split(p(x)) for p in (self.q, self.k, self.v))
        y = sdpa(q, k, v, **self.options)
        return self.out(y.transpose(1, 2).reshape(b, s, FEATURES))


@pytest.mark.parametrize(
    "spelling",
    [
        "view_permute",
        "view_transpose",
        "negative_transpose",
        "unflatten",
        "contiguous",
        "copies",
    ],
)
def test_spellings_of_the_split(spelling, import_model, apply, targets, same_results):
    model = Attention(spelling)
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseAttention())
    program = result.programs["forward"]
    found = targets(program)
    assert found["fused_attention"] == 1
    assert set(found) <= {"fused_attention", "linear", "sym_size"}, "the split is still there"
    same_results(model, program, inputs())
    (decision,) = result.decisions
    assert decision.verdict == "rewritten" and "straight from the projections" in decision.reason


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_options_of_the_attention(options, import_model, apply, same_results):
    model = Attention(**options)
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseAttention())
    program = result.programs["forward"]
    (call,) = (n for n in program.graph.nodes if "fused_attention" in str(n.target))
    assert arguments(call)["scale"] == options.get("scale", HEAD_DIM**-0.5)
    assert arguments(call)["causal"] == options.get("is_causal", False)
    same_results(model, program, inputs())


class Joined(nn.Module):
    """One projection for query, key and value, cut apart as named."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.qkv = nn.Linear(FEATURES, 3 * FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        y = self.qkv(x)
        match self.spelling:
            case "chunk":
                parts = [p.view(b, s, HEADS, HEAD_DIM).transpose(1, 2) for p in y.chunk(3, -1)]
            case "split":
                parts = [
                    p.view(b, s, HEADS, HEAD_DIM).transpose(1, 2) for p in y.split(FEATURES, 2)
                ]
            case "slice":
                parts = [
                    y[..., i * FEATURES : (i + 1) * FEATURES]
                    .view(b, s, HEADS, HEAD_DIM)
                    .transpose(1, 2)
                    for i in range(3)
                ]
            case "unbind":
                parts = list(y.view(b, s, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0))
            case _:
                turned = y.view(b, s, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
                parts = [turned[0], turned[1], turned[2]]
        return sdpa(*parts).transpose(1, 2).reshape(b, s, FEATURES)


@pytest.mark.parametrize("spelling", ["chunk", "split", "slice", "unbind", "select"])
def test_parts_of_one_projection_become_offsets(
    spelling, import_model, apply, targets, same_results
):
    model = Joined(spelling)
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseAttention())
    program = result.programs["forward"]
    (call,) = (n for n in program.graph.nodes if "fused_attention" in str(n.target))
    assert arguments(call)["offsets"] == [0, FEATURES, 2 * FEATURES]
    assert call.args[0] is call.args[1] is call.args[2]
    assert set(targets(program)) <= {"fused_attention", "linear", "sym_size"}
    same_results(model, program, inputs())


class Grouped(nn.Module):
    """Six query heads over two heads of keys and values, or over one."""

    def __init__(self, spelling: str, kv_heads: int = 2) -> None:
        super().__init__()
        self.spelling, self.kv_heads = spelling, kv_heads
        self.q = nn.Linear(FEATURES, 6 * HEAD_DIM)
        self.k, self.v = (nn.Linear(FEATURES, kv_heads * HEAD_DIM) for _ in range(2))

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        b, kv, s, d = x.shape
        times = 6 // kv
        match self.spelling:
            case "expand":
                return x[:, :, None].expand(b, kv, times, s, d).reshape(b, 6, s, d)
            case "repeat_interleave":
                return x.repeat_interleave(times, 1)
            case "tile":
                return x[:, None].expand(b, times, kv, s, d).reshape(b, 6, s, d)
            case _:
                return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 6, HEAD_DIM).transpose(1, 2)
        k, v = (p(x).view(b, s, self.kv_heads, HEAD_DIM).transpose(1, 2) for p in (self.k, self.v))
        if self.spelling == "enable_gqa":
            y = sdpa(q, k, v, enable_gqa=True)
        else:
            y = sdpa(q, self.repeat(k), self.repeat(v))
        return y.transpose(1, 2).reshape(b, s, 6 * HEAD_DIM)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("spelling", ["expand", "repeat_interleave", "enable_gqa"])
def test_grouped_queries_read_unrepeated_keys(
    spelling, kv_heads, import_model, apply, targets, same_results
):
    model = Grouped(spelling, kv_heads)
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseAttention())
    program = result.programs["forward"]
    (call,) = (n for n in program.graph.nodes if "fused_attention" in str(n.target))
    assert arguments(call)["kv_heads"] == kv_heads and arguments(call)["heads"] == 6
    assert set(targets(program)) <= {"fused_attention", "linear", "sym_size"}
    same_results(model, program, inputs())


def test_keys_tiled_in_another_order_are_copied(import_model, apply, same_results):
    model = Grouped("tile")
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseAttention())
    (call,) = (n for n in result.programs["forward"].graph.nodes if "fused" in str(n.target))
    assert arguments(call)["kv_heads"] == 6
    assert "key and value are computed after the split" in result.decisions[0].reason
    same_results(model, result.programs["forward"], inputs())


def test_rotated_queries_are_transposed_first(import_model, apply, targets, same_results):
    class Rotated(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, s, _ = x.shape
            q, k, v = (self.split(p(x)) for p in (self.q, self.k, self.v))
            angle = torch.arange(s, dtype=torch.float32)[:, None] / 7
            q, k = q * angle.cos(), k * angle.sin()
            return sdpa(q, k, v).transpose(1, 2).reshape(b, s, FEATURES)

    model = Rotated()
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseAttention())
    assert targets(result.programs["forward"])["fused_attention"] == 1
    assert "query and key are computed after the split" in result.decisions[0].reason
    same_results(model, result.programs["forward"], inputs())


class Masked(Attention):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (self.split(p(x)) for p in (self.q, self.k, self.v))
        distance = (torch.arange(s)[:, None] - torch.arange(s)[None, :]).abs()
        match self.kind:
            case "bool":
                mask = (distance < 3)[None, None].expand(b, 1, s, s)
            case "float":
                mask = -distance.float()[None, None]
            case "rank2":
                mask = distance < 3
            case "rank3":
                mask = -distance.float()[None] * torch.arange(1, HEADS + 1)[:, None, None]
            case _:
                mask = (torch.arange(s) < s // 2 + 1)[None, None, None].expand(b, 1, 1, s)
        y = sdpa(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(b, s, FEATURES)


@pytest.mark.parametrize("kind", ["bool", "float", "rank2", "rank3", "keys"])
def test_masks_of_every_rank(kind, import_model, apply, same_results):
    model = Masked(kind)
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseAttention())
    program = result.programs["forward"]
    (call,) = (n for n in program.graph.nodes if "fused_attention" in str(n.target))
    found = arguments(call)
    if kind in ("bool", "rank2"):  # a mask of distances alone is a window
        assert found["mask"] is None and found["window"] == 3
    else:
        assert found["mask"].meta["val"].dim() == 4 and found["window"] == 0
    same_results(model, program, inputs())


def test_cross_attention(import_model, apply, targets, same_results):
    class Cross(Attention):
        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            b, s, _ = x.shape
            q, k, v = self.split(self.q(x)), self.split(self.k(memory)), self.split(self.v(memory))
            return sdpa(q, k, v).transpose(1, 2).reshape(b, s, FEATURES)

    model = Cross()
    programs = import_model(model, torch.randn(2, 5, FEATURES), torch.randn(2, 7, FEATURES))
    result = apply(programs, FuseAttention())
    assert targets(result.programs["forward"])["fused_attention"] == 1
    pairs = [(torch.randn(b, s, FEATURES), torch.randn(b, 20 - s, FEATURES)) for b, s in SIZES]
    same_results(model, result.programs["forward"], pairs)


def test_a_result_read_by_heads_keeps_the_split_there(import_model, apply, same_results):
    class PerHead(Attention):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            b, s, _ = x.shape
            y = sdpa(*(self.split(p(x)) for p in (self.q, self.k, self.v)))
            return y.sum(1), y.transpose(1, 2).reshape(b, s, FEATURES)

    model = PerHead()
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseAttention())
    same_results(model, result.programs["forward"], inputs())


def near_miss(kind: str) -> nn.Module:
    class Miss(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            if kind == "rank":
                return sdpa(q, k, v)
            if kind == "dropout":
                return sdpa(*map(self.split, (q, k, v)), dropout_p=0.5).sum(1)
            wide = self.split(torch.cat([v, v], -1)[..., :FEATURES])
            return sdpa(self.split(q), self.split(k), torch.cat([wide, wide], -1)).sum(1)

    return Miss()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("rank", "3 dimensions"),
        ("dropout", "dropout_p is 0.5"),
        ("value", "values have 8 features"),
    ],
)
def test_near_misses_say_why(kind, reason, import_model, targets):
    programs = import_model(near_miss(kind), torch.randn(2, 5, FEATURES))
    result = FuseAttention().run(programs, PassContext())
    (decision,) = result.decisions
    assert decision.verdict == "skipped" and reason in decision.reason
    assert targets(result.programs["forward"])["scaled_dot_product_attention"] == 1


def test_sequence_first_attention_of_torch(import_model, apply, targets, same_results):
    """nn.MultiheadAttention flattens sequence-major; that view must survive other strides."""

    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(FEATURES, HEADS, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    model = Torch()
    result = apply(import_model(model, torch.randn(2, 5, FEATURES)), FuseAttention())
    assert targets(result.programs["forward"])["fused_attention"] == 1
    same_results(model, result.programs["forward"], inputs())
