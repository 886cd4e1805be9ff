"""Every operator: schema, fake kernel and eager reference agree, and lanes equal rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sparsify import ops
from sparsify.block_mask import BlockMask
from sparsify.layouts import LANES, parse
from sparsify.ops import ACTIVATIONS, OPERATORS

LAYOUTS = ["csr", "dense", "packed_dense{rows=6}", "sell{rows=4,k_block=8,window=8}"]
TOKENS = [(1, 1), (3, 5), (2, 8), (1, 16), (5, 7)]
OUT, IN = 7, 9


@dataclass(frozen=True)
class Case:
    """One call: operator, operands, what it must return, and what it must write, by position."""

    operator: str
    args: tuple[Any, ...]
    expected: torch.Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    written: dict[int, torch.Tensor] = field(default_factory=dict)

    def own_args(self) -> tuple[Any, ...]:
        """The operands, with copies of those that the operator writes."""
        return tuple(a.clone() if i in self.written else a for i, a in enumerate(self.args))


def linear_cases(lanes: bool) -> list[Case]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(OUT, IN, generator=generator)
    weight *= torch.rand(OUT, IN, generator=generator) < 0.4
    bias = torch.randn(OUT, generator=generator)
    cases = []
    for number, tokens in enumerate(TOKENS):
        x = torch.randn(*tokens, IN, generator=generator)
        residual = torch.randn(*tokens, OUT, generator=generator)
        layout = LAYOUTS[number % len(LAYOUTS)]
        activation = list(ACTIVATIONS)[number % len(ACTIVATIONS)]
        packed = parse(layout).pack(weight)
        tensors = [packed[name] for name in parse(layout).tensors]
        y = F.linear(x, weight, bias if number % 2 else None)
        y = ACTIVATIONS[activation](y) + residual
        operands = (
            (ops.to_lanes.reference(x) if lanes else x),
            tensors,
            layout,
            OUT,
            IN,
            bias if number % 2 else None,
            activation,
            ops.to_lanes.reference(residual) if lanes else residual,
            lanes,
        )
        cases.append(Case("sparse_linear", operands, in_form(y, lanes), label=f"{layout}-{tokens}"))
    return cases


def norm_cases(lanes: bool) -> list[Case]:
    cases = []
    for tokens in TOKENS:
        for kind in ("layer", "rms"):
            x = torch.randn(*tokens, IN) * 4 + 1
            weight, bias = torch.rand(IN), torch.rand(IN) if kind == "layer" else None
            if kind == "layer":
                y = F.layer_norm(x, (IN,), weight, bias, 1e-3)
            else:
                y = x / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt().float() * weight
            x = ops.to_lanes.reference(x) if lanes else x
            args = (x, weight, bias, 1e-3, kind, lanes)
            cases.append(Case("fused_norm", args, in_form(y, lanes), label=f"{kind}-{tokens}"))
    return cases


def attention_cases(lanes: bool) -> list[Case]:
    cases = []
    for number, (batch, length) in enumerate(TOKENS):
        keys = length + 3 * (number % 2)
        causal = number == 2
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, keys, 17)
        masks = [
            None,
            torch.rand(batch, 1, 1, keys) > 0.3,
            torch.randn(batch, 4, length, keys),
            torch.randn(1, 1, length, keys),
        ]
        mask = masks[number % len(masks)]
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = True
        offsets, scale = [1, 2, 8], 0.4
        y = attention(query, memory, mask, offsets, scale, causal)
        extents = [batch, length, keys] if lanes else []
        if lanes:
            query, memory = ops.to_lanes.reference(query), ops.to_lanes.reference(memory)
        args = (query, memory, memory, mask, 4, 2, 3, offsets, scale, causal, extents)
        label = f"{batch}x{length}x{keys}"
        cases.append(Case("fused_attention", args, in_form(y, lanes), label=label))
    return cases


def banded_cases(lanes: bool) -> list[Case]:
    """Windows, sinks and soft caps, with a mask besides."""
    cases = []
    for batch, length, causal, window, sinks, softcap in (
        (2, 9, True, 3, 0, 0.0),
        (1, 17, True, 4, 2, 1.5),
        (3, 5, False, 2, 1, 0.0),
        (1, 8, False, 0, 0, 2.0),
    ):
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, length + 1, 17)
        i, j = torch.arange(length)[:, None], torch.arange(length + 1)
        seen = (j <= i) | torch.tensor(not causal)
        seen = seen & ((abs(i - j) < window) | (j < sinks)) if window else seen
        mask = torch.randn(batch, 4, length, length + 1)
        hidden = mask.masked_fill(~seen, -math.inf)
        y = attention(query, memory, hidden, [1, 2, 8], 0.4, False, softcap)
        if lanes:
            query, memory = ops.to_lanes.reference(query), ops.to_lanes.reference(memory)
        args = (query, memory, memory, mask, 4, 2, 3, [1, 2, 8], 0.4, causal)
        args = (*args, [batch, length, length + 1] if lanes else [], window, sinks, softcap)
        label = f"{batch}x{length}-{causal}-{window}-{sinks}-{softcap}"
        cases.append(Case("fused_attention", args, in_form(y, lanes), label=label))
    return cases


def block_cases(lanes: bool) -> list[Case]:
    """Random blocks, one list a key head, some queries without any."""
    cases = []
    for number, (batch, length) in enumerate([*TOKENS, (2, 37)]):
        keys, block = length + 40, (32, 16)
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, keys, 17)
        shape = (batch, 2, -(-length // 32), -(-keys // 16))
        kinds = torch.randint(0, 3, shape, dtype=torch.int8)
        causal, softcap = number % 2 == 1, [0.0, 0.0, 1.5][number % 3]
        masks = [None, torch.rand(batch, 1, 1, keys) > 0.3, torch.randn(batch, 4, length, keys)]
        mask = masks[number % 3]
        kind = kinds.repeat_interleave(2, 1)[:, :, torch.arange(length) // 32]
        kind = kind[..., torch.arange(keys) // 16]
        rule = torch.zeros(kind.shape) if mask is None else mask
        rule = torch.where(rule, 0.0, -math.inf) if rule.dtype == torch.bool else rule
        later = torch.arange(keys) > torch.arange(length)[:, None]
        rule = rule.masked_fill(later & torch.tensor(causal), -math.inf)
        added = torch.where(kind == 2, 0.0, torch.where(kind == 1, rule, -math.inf))
        y = attention(query, memory, added, [1, 2, 8], 0.4, False, softcap).nan_to_num(0.0)
        blocks = BlockMask.of_kinds(kinds, (length, keys), block).tensors
        if lanes:
            query, memory = ops.to_lanes.reference(query), ops.to_lanes.reference(memory)
        args = (query, memory, memory, blocks, mask, 4, 2, 3, [1, 2, 8], 0.4, block, causal)
        args = (*args, 0, 0, softcap, 0.0, [batch, length, keys] if lanes else [])
        label = f"{batch}x{length}x{keys}"
        cases.append(Case("block_attention", args, in_form(y, lanes), label=label))
    return cases


def attention(query, memory, mask, offsets, scale, causal, softcap=0.0):
    """Head by head in float64: 4 query heads of 3 features over 2 key heads."""
    heads = []
    for head in range(4):
        q = query[..., offsets[0] + head * 3 :][..., :3].double()
        k = memory[..., offsets[1] + head // 2 * 3 :][..., :3].double()
        v = memory[..., offsets[2] + head // 2 * 3 :][..., :3].double()
        scores = q @ k.mT * scale
        if softcap:
            scores = (scores / softcap).tanh() * softcap
        if mask is not None:
            own = mask.expand(query.shape[0], 4, *scores.shape[1:])[:, head]
            scores = (
                scores.masked_fill(~own, -math.inf) if own.dtype == torch.bool else scores + own
            )
        if causal:
            hidden = torch.arange(scores.shape[2]) > torch.arange(scores.shape[1])[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1).float()


def rotary_cases(lanes: bool) -> list[Case]:
    """Two heads of 4 features turned as complex numbers; the feature behind them is copied."""
    cases = []
    for tokens in TOKENS:
        x, angle = torch.randn(*tokens, IN), torch.randn(*tokens, 2)
        cos, sin = (f(torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))
        turn = torch.polar(torch.ones_like(angle).double(), angle.double()).unsqueeze(-2)
        heads = x[..., :8].double().unflatten(-1, (2, 2, 2))
        turned = torch.complex(heads[..., 0, :], heads[..., 1, :]) * turn
        y = torch.cat((turned.real, turned.imag), -1).flatten(-2).float()
        y = torch.cat((y, x[..., 8:]), -1)
        operands = (x, cos, sin)
        if lanes:
            operands = tuple(ops.to_lanes.reference(t) for t in operands)
        args = (*operands, 2, 4, lanes)
        cases.append(Case("rotary", args, in_form(y, lanes), label=str(tokens)))
    return cases


def gated_cases(lanes: bool) -> list[Case]:
    cases = []
    for number, tokens in enumerate(TOKENS):
        x = torch.randn(*tokens, 2 * IN)
        activation = list(ACTIVATIONS)[number]
        y = ACTIVATIONS[activation](x[..., :IN].double()) * x[..., IN:].double()
        args = (ops.to_lanes.reference(x) if lanes else x, activation, lanes)
        cases.append(Case("gated", args, in_form(y.float(), lanes), label=f"{activation}-{tokens}"))
    return cases


KV_HEADS, HEAD_DIM, LAYERS, LAYER = 2, 3, 2, 1


@dataclass(frozen=True)
class Cache:
    """A paged cache with pages in any order, and what each row of it holds."""

    keys: torch.Tensor
    values: torch.Tensor
    pages: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def random(cls, batch: int, length: int) -> "Cache":
        width = -(-(length + 20) // ops.PAGE)
        number = batch * width + 1
        pages = torch.randperm(number)[: batch * width].to(torch.int32).reshape(batch, width)
        keys = torch.randn(LAYERS, number, KV_HEADS, HEAD_DIM, ops.PAGE)
        values = torch.randn(LAYERS, number, KV_HEADS, ops.PAGE, HEAD_DIM)
        starts = torch.arange(batch) * 7 % 20
        counts = length - torch.arange(batch) % (length + 1)
        return cls(keys, values, pages, starts, counts)

    def at(self, row: int, position: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of one token: views of the cache."""
        page, slot = int(self.pages[row, position // ops.PAGE]), position % ops.PAGE
        return self.keys[LAYER, page, head, :, slot], self.values[LAYER, page, head, slot]


def append_cases(lanes: bool) -> list[Case]:
    cases = []
    for batch, length in TOKENS:
        cache = Cache.random(batch, length)
        key, value = torch.randn(batch, length, 7), torch.randn(batch, length, 9)
        offsets = [1, 2]
        after = Cache(cache.keys.clone(), cache.values.clone(), *tuple_of(cache)[2:])
        for row in range(batch):
            for token in range(int(cache.counts[row])):
                for head in range(KV_HEADS):
                    k, v = after.at(row, int(cache.starts[row]) + token, head)
                    k.copy_(key[row, token, 1 + head * HEAD_DIM :][:HEAD_DIM])
                    v.copy_(value[row, token, 2 + head * HEAD_DIM :][:HEAD_DIM])
        if lanes:
            key, value = ops.to_lanes.reference(key), ops.to_lanes.reference(value)
        args = (
            *(cache.keys, cache.values, key, value, cache.pages, cache.starts, cache.counts),
            *(LAYER, offsets, [batch, length] if lanes else []),
        )
        cases.append(
            Case(
                "kv_append",
                args,
                cache.starts + cache.counts,
                label=f"{batch}x{length}",
                written={0: after.keys, 1: after.values},
            )
        )
    return cases


def tuple_of(cache: Cache) -> tuple[torch.Tensor, ...]:
    return (cache.keys, cache.values, cache.pages, cache.starts, cache.counts)


def paged_cases(lanes: bool) -> list[Case]:
    cases = []
    for number, (batch, length) in enumerate(TOKENS):
        cache = Cache.random(batch, length)
        window, softcap = [0, 5, 1, 0, 3][number], [0.0, 0.0, 2.0, 1.5, 0.0][number]
        query, heads, offset, scale = torch.randn(batch, length, 14), 4, 1, 0.4
        y = torch.zeros(batch, length, heads, HEAD_DIM)
        for row in range(batch):
            for token in range(int(cache.counts[row])):
                for head in range(heads):
                    q = query[row, token, offset + head * HEAD_DIM :][:HEAD_DIM]
                    y[row, token, head] = attend(
                        cache, row, token, head // 2, q, scale, window, softcap
                    )
        if lanes:
            query = ops.to_lanes.reference(query)
        args = (
            *(query, cache.keys, cache.values, cache.pages, cache.starts + cache.counts),
            *(cache.counts, LAYER, heads, offset, scale, window, softcap),
            [batch, length] if lanes else [],
        )
        label = f"{batch}x{length}-{window}-{softcap}"
        cases.append(Case("paged_attention", args, in_form(y.flatten(2), lanes), label=label))
    return cases


def attend(cache, row, token, head, query, scale, window, softcap):
    """One query over the cache, position by position, in float64."""
    here = int(cache.starts[row]) + token
    first = max(0, here - window + 1) if window else 0
    found = [cache.at(row, position, head) for position in range(first, here + 1)]
    scores = torch.stack([query.double() @ k.double() for k, _ in found]) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    return (scores.softmax(0)[:, None] * torch.stack([v.double() for _, v in found])).sum(0)


def lane_cases(lanes: bool) -> list[Case]:
    cases = []
    for tokens in [*TOKENS, (), (4,), (2, 3, 4)]:
        x = torch.randn(*tokens, IN)
        if lanes:
            cases.append(Case("to_lanes", (x,), by_hand(x), label=str(tokens)))
        else:
            packed = by_hand(x)
            packed = torch.where(packed == 0, torch.nan, packed)
            cases.append(Case("from_lanes", (packed, list(tokens)), x, label=str(tokens)))
    return cases


def by_hand(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    lanes = torch.zeros(-(-len(rows) // LANES), x.shape[-1], LANES)
    for token, row in enumerate(rows):
        lanes[token // LANES, :, token % LANES] = row
    return lanes


def in_form(y: torch.Tensor, lanes: bool) -> torch.Tensor:
    return by_hand(y) if lanes else y


def list_cases(lanes: bool) -> list[Case]:
    """Maps with rows of no, some and all blocks."""
    cases = []
    for shape in [] if lanes else [(1, 1, 1, 1), (2, 3, 5, 9), (1, 2, 4, 33)]:
        marks = torch.rand(shape) < torch.rand(*shape[:3], 1)
        marks[..., 0, :], marks[..., -1, :] = False, True
        y = torch.zeros(shape, dtype=torch.int32)
        for row, found in zip(y.view(-1, shape[-1]), marks.view(-1, shape[-1]), strict=True):
            listed = [column for column, mark in enumerate(found.tolist()) if mark]
            row[: len(listed)] = torch.tensor(listed)
        cases.append(Case("list_blocks", (marks,), y, label="x".join(map(str, shape))))
    return cases


BUILDERS: list[Callable[[bool], list[Case]]] = [
    linear_cases,
    norm_cases,
    attention_cases,
    banded_cases,
    block_cases,
    list_cases,
    rotary_cases,
    gated_cases,
    append_cases,
    paged_cases,
    lane_cases,
]


def all_cases() -> list[Any]:
    torch.manual_seed(0)
    found = [
        (case, lanes) for build in BUILDERS for lanes in (False, True) for case in build(lanes)
    ]
    return [
        pytest.param(c, id=f"{c.operator}-{c.label}-{'lanes' if lanes else 'rows'}")
        for c, lanes in found
    ]


CASES = all_cases()


def test_every_operator_has_cases():
    assert {param.values[0].operator for param in CASES} == set(OPERATORS)


@pytest.mark.parametrize("case", CASES)
def test_result(case):
    """The unused lanes of the last group may hold anything; they are not compared."""
    args = case.own_args()
    found = OPERATORS[case.operator].overload(*args, **case.kwargs)
    assert found.is_contiguous()
    for position, expected in case.written.items():
        assert torch.equal(args[position], expected)
    known = case.expected != 0
    torch.testing.assert_close(found[known], case.expected[known], atol=1e-5, rtol=1e-5)
    assert found.shape == case.expected.shape


@pytest.mark.parametrize("case", CASES)
def test_fake_kernel(case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = OPERATORS[case.operator].overload(*case.own_args())
    with FakeTensorMode() as mode:
        as_fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, case.args)
        fake = OPERATORS[case.operator].overload(*as_fake)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("name", list(OPERATORS))
def test_only_what_the_schema_says_is_written(name):
    arguments = OPERATORS[name].overload._schema.arguments
    said = {
        i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
    }
    for case in (p.values[0] for p in CASES if p.values[0].operator == name):
        assert set(case.written) == said
        args = case.own_args()
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        OPERATORS[name].overload(*args)
        for position, (old, new) in enumerate(zip(before, args, strict=True)):
            if isinstance(old, torch.Tensor) and position not in said:
                assert torch.equal(old.nan_to_num(7), new.nan_to_num(7))


@pytest.mark.parametrize("name", list(OPERATORS))
def test_opcheck(name):
    """Schema, fake kernel and tracing with dynamic shapes, by PyTorch's own checker."""
    cases = [p.values[0] for p in CASES if p.values[0].operator == name]
    for case in (cases[1], cases[-1]):
        torch.library.opcheck(
            OPERATORS[name].overload,
            case.own_args(),
            test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"],
        )


def test_padding_queries_give_zeros():
    cache = Cache.random(3, 7)
    query = torch.randn(3, 7, 14)
    counts = torch.tensor([7, 2, 0])
    found = torch.ops.sparsify.paged_attention(
        query,
        cache.keys,
        cache.values,
        cache.pages,
        cache.starts + counts,
        counts,
        LAYER,
        4,
        1,
        0.4,
    )
    real = torch.arange(7) < counts[:, None]
    assert found[real].any(-1).all() and not found[~real].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_linear_of_every_layout_and_activation(layout, activation):
    weight = torch.randn(OUT, IN) * (torch.rand(OUT, IN) < 0.4)
    x, bias = torch.randn(6, IN), torch.randn(OUT)
    packed = parse(layout).pack(weight)
    found = torch.ops.sparsify.sparse_linear(
        x, [packed[t] for t in parse(layout).tensors], layout, OUT, IN, bias, activation
    )
    torch.testing.assert_close(found, ACTIVATIONS[activation](F.linear(x, weight, bias)))


def test_linear_refuses_a_wrong_number_of_features():
    weight = torch.randn(OUT, IN)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        x, fake = mode.from_tensor(torch.randn(3, IN + 1)), mode.from_tensor(weight)
        with pytest.raises(RuntimeError, match=r"x has 10 features.*the weight takes 9"):
            torch.ops.sparsify.sparse_linear(x, [fake], "dense", OUT, IN)


@pytest.mark.parametrize("tokens", TOKENS)
def test_lanes_round_trip(tokens):
    x = torch.randn(*tokens, IN)
    lanes = torch.ops.sparsify.to_lanes(x)
    count = math.prod(tokens)
    assert lanes.shape == (-(-count // LANES), IN, LANES)
    unused = lanes.transpose(1, 2).reshape(-1, IN)[count:]
    assert not unused.any()
    assert torch.equal(torch.ops.sparsify.from_lanes(lanes, tokens), x)


def test_garbage_in_unused_lanes_stays_there():
    """NaN past the last token must not reach a token, in any operator."""
    batch, length = 3, 7
    x = torch.randn(batch, length, IN)
    clean = ops.to_lanes.reference(x)
    dirty = clean.clone()
    dirty.transpose(1, 2).reshape(-1, IN)
    dirty[-1, :, batch * length % LANES :] = torch.nan
    weight = torch.randn(OUT, IN)

    def through(lanes):
        y = torch.ops.sparsify.sparse_linear(
            lanes, [weight], "dense", OUT, IN, None, "gelu", None, True
        )
        y = torch.ops.sparsify.fused_norm(y, None, None, 1e-5, "layer", True)
        extents = [batch, length, length]
        y = torch.ops.sparsify.fused_attention(
            y, y, y, None, 1, 1, OUT, [0, 0, 0], 0.3, False, extents
        )
        return torch.ops.sparsify.from_lanes(y, [batch, length])

    torch.testing.assert_close(through(dirty), through(clean))
