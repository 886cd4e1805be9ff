"""Every operator: schema, fake kernel and eager reference agree, and lanes equal rows."""

import math

import pytest
import torch
from torch.nn import functional as F

from sparsify import ops
from sparsify.layouts import LANES, parse
from sparsify.ops import ACTIVATIONS, OPERATORS
from tests.ops.eager import all_cases
from tests.ops.eager.case import IN, OUT, TOKENS
from tests.ops.eager.kv_cache import LAYER, Cache
from tests.ops.eager.linear import LAYOUTS

CASES = [
    pytest.param(case, id=f"{case.operator}-{case.label}-{'lanes' if lanes else 'rows'}")
    for case, lanes in all_cases()
]


def test_every_operator_has_cases():
    assert {param.values[0].operator for param in CASES} == set(OPERATORS)


@pytest.mark.parametrize("case", CASES)
def test_result(case):
    """The unused lanes of the last group may hold anything; they are not compared."""
    args = case.own_args()
    results = in_tuple(OPERATORS[case.operator].overload(*args, **case.kwargs))
    for position, expected in case.written.items():
        assert torch.equal(args[position], expected)
    for found, expected in zip(results, in_tuple(case.expected), strict=True):
        assert found.is_contiguous() and found.dtype == expected.dtype
        known = expected != 0
        torch.testing.assert_close(found[known], expected[known], atol=1e-5, rtol=1e-5)
        assert found.shape == expected.shape


def in_tuple(results):
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("case", CASES)
def test_fake_kernel(case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = OPERATORS[case.operator].overload(*case.own_args())
    with FakeTensorMode() as mode:
        as_fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, case.args)
        fake = OPERATORS[case.operator].overload(*as_fake)
    for f, r in zip(in_tuple(fake), in_tuple(real), strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


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


@pytest.mark.parametrize("expert", [5, 200, -2])
def test_an_expert_that_there_is_not_is_refused(expert):
    case = next(c for c, _ in all_cases() if c.operator == "experts")
    x, sent, *rest = case.args
    sent = sent.clone()
    sent[-1, 0] = expert
    with pytest.raises(IndexError, match="a token is sent to an expert that is none of 5"):
        torch.ops.sparsify.experts(x, sent, *rest)


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


def test_linears_of_active_features_refuse_what_does_not_fit():
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        x, weight, gate = map(mode.from_tensor, map(torch.randn, ((3, IN), (OUT, IN), (3, OUT))))
        wide = mode.from_tensor(torch.randn(3, IN + 1))
        with pytest.raises(RuntimeError, match=r"active_linear: x has 10 features"):
            torch.ops.sparsify.active_linear(wide, [weight], "dense", OUT, IN, 0.5)
        with pytest.raises(RuntimeError, match=r"active=1.5 is no share between 0 and 1"):
            torch.ops.sparsify.active_linear(x, [weight], "dense", OUT, IN, 1.5)
        with pytest.raises(RuntimeError, match=r"the gate has extent 9, the result 7"):
            torch.ops.sparsify.gated_linear(x, x, [weight], "dense", OUT, IN, 0.5)
        with pytest.raises(RuntimeError, match=r"the gate has shape \(3,\), the result \(3, 7\)"):
            torch.ops.sparsify.gated_linear(x, gate[:, 0], [weight], "dense", OUT, IN, 0.5)


def test_the_union_of_tokens_grows_with_them():
    assert ops.union_share(0.1, 1) == pytest.approx(0.1)
    assert ops.union_share(0.1, 8) == pytest.approx(1 - 0.9**8)
    assert ops.union_share(0.0, 16) == 0 and ops.union_share(1.0, 1) == 1
