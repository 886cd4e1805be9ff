"""TVM's importer against PyTorch, operator by operator: all in one module, built once.

Every case takes the same inputs, so that two symbols, batch and length, serve them all.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsify.contracts import PassContext
from sparsify.frontend.torch import import_torch
from sparsify.passes.canonicalize import Canonicalize

INF = float("inf")


def inputs(batch, length):
    torch.manual_seed(batch * 100 + length)
    return {
        "x": torch.randn(batch, length, 4),
        "y": torch.randn(batch, length, 4),
        "i": torch.randint(-9, 9, (batch, length)),
        "m": torch.rand(batch, length) > 0.5,
        "c": torch.randn(batch, 4, 9, 8),
    }


def seq(x):
    return torch.arange(x.shape[1])


def shifted(x):
    y = torch.zeros_like(x)
    y[:, :, 1:] = x[:, :, :-1]
    return y


W, B = torch.randn(6, 4), torch.randn(6)
K2, K1 = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3)
NEG = torch.finfo(torch.float32).min

_PLAIN = """abs neg exp sin cos tan tanh sigmoid erf floor ceil round trunc sign relu square expm1
    sinh cosh atan asinh isnan isinf isfinite logical_not reciprocal frac sgn"""
_POSITIVE = "log log2 log10 log1p sqrt rsqrt"
_ACTIVATIONS = """gelu silu elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus
    softsign mish hardshrink softshrink tanhshrink logsigmoid relu6"""
_BINARY = "add sub mul div maximum minimum atan2 fmod remainder eq ne lt le gt ge"
_LOGICAL = "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor"


def on_x(function, change=lambda x: x):
    return lambda x, y, i, m, c: function(change(x))


def on_two(function):
    return lambda x, y, i, m, c: function(x, y[:, :1])


def on_bools(function):
    return lambda x, y, i, m, c: function(m, x[..., 0] > 0)


def reduce(function, keep):
    return lambda x, y, i, m, c: function(x, dim=(-1,), keepdim=keep)


def convert(source, dtype):
    return lambda x, y, i, m, c: {"float": x * 3, "int": i, "bool": m}[source].to(dtype) + 0


ELEMENTWISE = {
    **{n: on_x(getattr(torch, n)) for n in _PLAIN.split()},
    **{n: on_x(getattr(torch, n), lambda x: x.abs() + 0.1) for n in _POSITIVE.split()},
    **{n: on_x(getattr(F, n), lambda x: x * 4) for n in _ACTIVATIONS.split()},
    **{f"{n} of two": on_two(getattr(torch, n)) for n in _BINARY.split()},
    **{f"{n} of bools": on_bools(getattr(torch, n)) for n in _LOGICAL.split()},
    **{
        f"{n}{' kept' * keep}": reduce(getattr(torch, n), keep)
        for n in ("sum", "mean", "var", "std")
        for keep in (False, True)
    },
    **{
        f"{source} to {str(dtype)[6:]}": convert(source, dtype)
        for source in ("float", "int", "bool")
        for dtype in (torch.float32, torch.int64, torch.int32, torch.float64)
    },
}

CASES = (
    ELEMENTWISE
    | {
        "gelu tanh": lambda x, y, i, m, c: F.gelu(x, approximate="tanh"),
        "round half": lambda x, y, i, m, c: torch.round(i * 0.5),
        "half floats and back": lambda x, y, i, m, c: (x * 300).half().float() + 0.5,
        "add alpha": lambda x, y, i, m, c: torch.add(x, y, alpha=2),
        "sub alpha": lambda x, y, i, m, c: torch.sub(x, y, alpha=3),
        "rsub alpha": lambda x, y, i, m, c: torch.rsub(x, 2.0, alpha=3),
        "int and float": lambda x, y, i, m, c: i[..., None] + x,
        "bool and float": lambda x, y, i, m, c: m[..., None] * x,
        "int by half": lambda x, y, i, m, c: i * 0.5 + 0.5,
        "int less half": lambda x, y, i, m, c: i < 0.5,
        "int over int": lambda x, y, i, m, c: i / (i.abs() + 1),
        "int over two": lambda x, y, i, m, c: i / 2,
        "floor divide": lambda x, y, i, m, c: i // 4,
        "floor divide by negative": lambda x, y, i, m, c: i // -4,
        "floor divide float": lambda x, y, i, m, c: x // 0.7,
        "trunc divide": lambda x, y, i, m, c: torch.div(i, -4, rounding_mode="trunc"),
        "floor divide tensors": lambda x, y, i, m, c: torch.div(x, y, rounding_mode="floor"),
        "remainder": lambda x, y, i, m, c: i % 4,
        "remainder by negative": lambda x, y, i, m, c: i % -4,
        "remainder float": lambda x, y, i, m, c: x % 0.7,
        "fmod int": lambda x, y, i, m, c: torch.fmod(i, 4),
        "square": lambda x, y, i, m, c: x**2,
        "cube of negative": lambda x, y, i, m, c: torch.pow(x, 3.0),
        "root": lambda x, y, i, m, c: x.abs() ** 0.5,
        "int square": lambda x, y, i, m, c: i**2,
        "two to the x": lambda x, y, i, m, c: 2.0**x,
        "not bool": lambda x, y, i, m, c: ~m,
        "not int": lambda x, y, i, m, c: ~i,
        "bools times": lambda x, y, i, m, c: (x > 0) * (x > 1),
        "bools plus": lambda x, y, i, m, c: (x > 0) + (x > 1),
        "bool equals": lambda x, y, i, m, c: (m == True) & (m != False),  # noqa: E712
        "where": lambda x, y, i, m, c: torch.where(m[..., None], x, 0.0),
        "where infinite": lambda x, y, i, m, c: torch.where(m, 0.0, -INF),
        "where promotes": lambda x, y, i, m, c: torch.where(m, i, 1.5),
        "masked fill": lambda x, y, i, m, c: x.masked_fill(m[..., None], -INF),
        "masked fill int": lambda x, y, i, m, c: i.masked_fill(m, 7),
        "mask to bias": lambda x, y, i, m, c: (1.0 - m[:, None, None, :].float()) * NEG,
        "clamp": lambda x, y, i, m, c: x.clamp(-0.5, 0.5),
        "clamp min": lambda x, y, i, m, c: x.clamp(min=0.1),
        "clamp int": lambda x, y, i, m, c: i.clamp(max=3),
        "clamp tensors": lambda x, y, i, m, c: torch.clamp(x, min=y),
        "lerp": lambda x, y, i, m, c: torch.lerp(x, y, 0.3),
        "addcmul": lambda x, y, i, m, c: torch.addcmul(x, y, y, value=0.5),
        "sum of two dims": lambda x, y, i, m, c: x.sum((0, 2)),
        "sum of all": lambda x, y, i, m, c: x.sum(),
        "mean of all": lambda x, y, i, m, c: x.mean(),
        "max of all": lambda x, y, i, m, c: x.max(),
        "sum of ints": lambda x, y, i, m, c: i.sum(-1),
        "sum of bools": lambda x, y, i, m, c: m.sum(-1),
        "sum as float": lambda x, y, i, m, c: m.sum(1, dtype=torch.float32),
        "biased variance over length": lambda x, y, i, m, c: x.var(1, correction=0),
        "argmax": lambda x, y, i, m, c: x.argmax(-1),
        "argmax of ties": lambda x, y, i, m, c: (i > 0).float().argmax(-1, keepdim=True),
        "argmin": lambda x, y, i, m, c: x.argmin(1),
        "any": lambda x, y, i, m, c: m.any(-1),
        "any of ints": lambda x, y, i, m, c: i.any(-1),
        "cumsum": lambda x, y, i, m, c: x.cumsum(1),
        "cumsum of bools": lambda x, y, i, m, c: m.cumsum(-1),
        "cumsum of int32": lambda x, y, i, m, c: i.int().cumsum(-1),
        "norm": lambda x, y, i, m, c: x.norm(dim=-1, keepdim=True),
        "normalize": lambda x, y, i, m, c: F.normalize(x, dim=-1),
        "cosine": lambda x, y, i, m, c: F.cosine_similarity(x, y, dim=-1),
        "amax": lambda x, y, i, m, c: x.amax(-1, keepdim=True),
        "amax of ints": lambda x, y, i, m, c: i.amax(1),
        "amin of all": lambda x, y, i, m, c: x.amin(),
        "product": lambda x, y, i, m, c: x.prod(-1),
        "product of int32": lambda x, y, i, m, c: i.int().prod(0),
        "sort": lambda x, y, i, m, c: x.sort(1, descending=True)[0],
        "argsort of ties": lambda x, y, i, m, c: torch.argsort(i, dim=1, stable=True),
        "largest": lambda x, y, i, m, c: x.topk(2, -1)[0],
        "softmax": lambda x, y, i, m, c: x.softmax(-1),
        "softmax over length": lambda x, y, i, m, c: x.softmax(1),
        "softmax of large": lambda x, y, i, m, c: (x * 1e4).softmax(-1),
        "softmax of infinite": lambda x, y, i, m, c: torch.cat(
            [x, torch.full_like(x, -INF)], -1
        ).softmax(-1),
        "softmax of ints": lambda x, y, i, m, c: F.softmax(i, -1, dtype=torch.float32),
        "log softmax": lambda x, y, i, m, c: x.log_softmax(-1),
        "first token": lambda x, y, i, m, c: x[:, 0],
        "last token": lambda x, y, i, m, c: x[:, -1],
        "last feature": lambda x, y, i, m, c: x.select(-1, -2),
        "slice": lambda x, y, i, m, c: x[:, 1:3],
        "slice from end": lambda x, y, i, m, c: x[:, -2:],
        "slice to end": lambda x, y, i, m, c: x[:, :-1],
        "slice beyond": lambda x, y, i, m, c: x[:, -100:, -100:],
        "slice in steps": lambda x, y, i, m, c: x[..., ::2],
        "gather": lambda x, y, i, m, c: x.gather(-1, i[..., None] % 4),
        "gather along length": lambda x, y, i, m, c: x.gather(
            1, (i % 2)[..., None].expand(-1, -1, 4)
        ),
        "index": lambda x, y, i, m, c: W[i % 6],
        "index negative": lambda x, y, i, m, c: W[i % 6 - 6],
        "index inner": lambda x, y, i, m, c: x[:, i[0] % 2],
        "index last negative": lambda x, y, i, m, c: x[..., i[0] % 4 - 4],
        "index pair": lambda x, y, i, m, c: x[torch.arange(x.shape[0]), m.sum(1) - 1],
        "index apart": lambda x, y, i, m, c: c[i[:, 0] % 1, :, i[:, 1] % 3],
        "index mask": lambda x, y, i, m, c: m[
            torch.arange(x.shape[0])[:, None, None, None], seq(x)[None, None, None]
        ],
        "index select": lambda x, y, i, m, c: x.index_select(2, torch.tensor([3, 0])),
        "embedding": lambda x, y, i, m, c: F.embedding(i % 6, W),
        "one hot": lambda x, y, i, m, c: F.one_hot(i % 6, 6).float(),
        "scatter": lambda x, y, i, m, c: x.scatter(2, i[..., None] % 4, 2.0),
        "expand": lambda x, y, i, m, c: x[:, None].expand(-1, 2, -1, -1) + 0.5,
        "view": lambda x, y, i, m, c: x.view(x.shape[0], -1) * 2,
        "heads": lambda x, y, i, m, c: x.view(*x.shape[:2], 2, -1).transpose(1, 2) * 2,
        "transposed reshape": lambda x, y, i, m, c: x.transpose(1, 2).reshape(x.shape[0], -1) * 2,
        "permute": lambda x, y, i, m, c: x.permute(-1, 0, -2) * 2,
        "unsqueeze": lambda x, y, i, m, c: x.unsqueeze(1).unsqueeze(-1).squeeze(1) * 2,
        "squeeze": lambda x, y, i, m, c: x[..., :1].squeeze(-1) * 2,
        "cat": lambda x, y, i, m, c: torch.cat([x, y], 1),
        "cat empty": lambda x, y, i, m, c: torch.cat([torch.empty(0), x, y], -1),
        "cat mixed": lambda x, y, i, m, c: torch.cat([x[..., 0], i], 1),
        "stack": lambda x, y, i, m, c: torch.stack([x, y], -1),
        "split": lambda x, y, i, m, c: x.split([1, 3], -1)[1] * 2,
        "chunk": lambda x, y, i, m, c: x.chunk(2, -1)[1] * 2,
        "unbind": lambda x, y, i, m, c: x.unbind(-1)[2] * 2,
        "repeat": lambda x, y, i, m, c: x.repeat(1, 2, 1),
        "repeat interleave": lambda x, y, i, m, c: x.repeat_interleave(2, -1),
        "flip": lambda x, y, i, m, c: x.flip((1, 2)),
        "roll": lambda x, y, i, m, c: x.roll(-1, -1),
        "rotate half": lambda x, y, i, m, c: torch.cat([-x[..., 2:], x[..., :2]], -1),
        "pad": lambda x, y, i, m, c: F.pad(x, (1, 0, 2, 1), value=3.0),
        "pad negative": lambda x, y, i, m, c: F.pad(x, (-1, 1)),
        "tril": lambda x, y, i, m, c: (x @ x.mT).tril(),
        "causal bias": lambda x, y, i, m, c: torch.full((x.shape[1], x.shape[1]), -INF).triu(1),
        "relative": lambda x, y, i, m, c: (seq(x)[None] - seq(x)[:, None]).abs().clamp(max=3),
        "arange": lambda x, y, i, m, c: torch.arange(2, x.shape[1] + 2),
        "full": lambda x, y, i, m, c: torch.full((x.shape[0], x.shape[1]), 2.5),
        "full of infinity": lambda x, y, i, m, c: torch.full_like(x, -INF),
        "ones": lambda x, y, i, m, c: torch.ones(x.shape[0], x.shape[1], dtype=torch.long),
        "int to bool": lambda x, y, i, m, c: i.bool(),
        "times a size": lambda x, y, i, m, c: x * x.shape[1],
        "more than a size": lambda x, y, i, m, c: x * 9 > x.shape[1],
        "over a size": lambda x, y, i, m, c: x.sum(1) / x.shape[1],
        "matmul": lambda x, y, i, m, c: x @ W.t(),
        "matmul of batches": lambda x, y, i, m, c: x @ y.mT,
        "matmul of heads": lambda x, y, i, m, c: x[:, None] @ y.mT[:, None].expand(-1, 2, -1, -1),
        "matrix times vector": lambda x, y, i, m, c: x @ W[0],
        "einsum": lambda x, y, i, m, c: torch.einsum("bij,bkj->bik", x, y),
        "linear": lambda x, y, i, m, c: F.linear(x, W, B),
        "linear without bias": lambda x, y, i, m, c: F.linear(x, W),
        "layer norm": lambda x, y, i, m, c: F.layer_norm(x, (4,), W[0], B[:4], 1e-3),
        "batch norm": lambda x, y, i, m, c: F.batch_norm(c, W[0], W[1].abs() + 0.1, W[2], W[3]),
        "group norm": lambda x, y, i, m, c: F.group_norm(c, 2, W[0], W[1]),
        "conv1d": lambda x, y, i, m, c: F.conv1d(x.mT, K1, B, padding=1),
        "conv2d": lambda x, y, i, m, c: F.conv2d(c, K2, B, stride=2, padding=1),
        "conv2d depthwise": lambda x, y, i, m, c: F.conv2d(c, K2[:4, :1], groups=4, padding="same"),
        "max pool": lambda x, y, i, m, c: F.max_pool2d(c, 3, 2, 1),
        "max pool ceil": lambda x, y, i, m, c: F.max_pool2d(c, 3, 2, ceil_mode=True),
        "average pool": lambda x, y, i, m, c: F.avg_pool2d(c, 3, 2, 1, count_include_pad=False),
        "global pool": lambda x, y, i, m, c: F.adaptive_avg_pool2d(c, 1),
        "adaptive pool": lambda x, y, i, m, c: F.adaptive_avg_pool2d(c, (3, 4)),
        "nearest": lambda x, y, i, m, c: F.interpolate(c, scale_factor=2, mode="nearest"),
        "bilinear": lambda x, y, i, m, c: F.interpolate(c, size=(12, 10), mode="bilinear"),
        "nearest by a fraction": lambda x, y, i, m, c: F.interpolate(
            c, scale_factor=(1.3, 0.7), mode="nearest"
        ),
        "nearest of a size": lambda x, y, i, m, c: F.interpolate(c, size=(13, 5), mode="nearest"),
        "nearest of integers": lambda x, y, i, m, c: F.interpolate(
            (c.abs() * 50).to(torch.uint8), size=(13, 16), mode="nearest"
        ).float(),
        "bilinear by a fraction": lambda x, y, i, m, c: F.interpolate(
            c, scale_factor=(1.7, 0.6), mode="bilinear"
        ),
        "bilinear with corners": lambda x, y, i, m, c: F.interpolate(
            c, size=(1, 20), mode="bilinear", align_corners=True
        ),
        "attention": lambda x, y, i, m, c: F.scaled_dot_product_attention(
            x[:, None], y[:, None], y[:, None]
        ),
        "causal attention": lambda x, y, i, m, c: F.scaled_dot_product_attention(
            x[:, None], y[:, None], y[:, None], is_causal=True
        ),
        "masked mean": lambda x, y, i, m, c: (
            (x * m[..., None].float()).sum(1) / m.sum(1, keepdim=True).clamp(min=1e-9)
        ),
        "positions": lambda x, y, i, m, c: i[:, :1] + seq(x),
        "angles": lambda x, y, i, m, c: torch.cat([i.unsqueeze(2).float() * W[0]] * 2, 2).cos(),
        "chosen token of each row": lambda x, y, i, m, c: x.flatten(0, 1).index_select(
            0, torch.arange(x.shape[0]) * x.shape[1] + (m.sum(1) - 1).clamp(min=0)
        ),
        "position ids": lambda x, y, i, m, c: (i.ne(1).int().cumsum(1) * i.ne(1).int()).long() + 1,
    }
)


class Every(nn.Module):
    def forward(self, x, y, i, m, c):
        return [case(x, y, i, m, c) for case in CASES.values()]


SIZES = {"static": [(3, 5)], "dynamic": [(3, 5), (2, 9), (1, 4)]}


@pytest.fixture(scope="module", params=["static", "dynamic"])
def results(request):
    """Pairs of (compiled, eager) results by case, at each size."""
    import tvm
    from tvm import relax

    from sparsify.codegen.build import build
    from sparsify.codegen.lower import lower
    from sparsify.codegen.support import unsupported_reason
    from sparsify.codegen.target import Target

    auto = torch.export.Dim.AUTO
    batch = {0: auto}
    spec = {"x": {0: auto, 1: auto}, "y": {0: auto, 1: auto}, "i": {0: auto, 1: auto}}
    spec |= {"m": {0: auto, 1: auto}, "c": batch}
    dynamic = spec if request.param == "dynamic" else None
    programs = import_torch(Every(), inputs(3, 5), dynamic_shapes=dynamic)
    program = Canonicalize().run(programs, PassContext()).programs["forward"]
    reasons = {n.name: unsupported_reason(n) for n in program.graph.nodes if n.op[:4] == "call"}
    assert not {k: v for k, v in reasons.items() if v is not None}
    target = Target.parse("native")
    machine = relax.VirtualMachine(build(lower({"forward": program}, target), target), tvm.cpu())
    weights = [program.weight_of(n) for n in program.graph.nodes if n.name in program.weight_names]
    found = {name: [] for name in CASES}
    for size in SIZES[request.param]:
        given = inputs(*size)
        operands = [given[n.name] for n in program.user_inputs()] + [w.detach() for w in weights]
        got = machine["forward"](*(tvm.runtime.tensor(t.numpy()) for t in operands))
        for (name, case), result in zip(CASES.items(), got, strict=True):
            found[name].append((torch.from_numpy(result.numpy()), case(**given)))
    return found


@pytest.mark.parametrize("name", CASES)
def test_importer_agrees_with_pytorch(results, name):
    for got, expected in results[name]:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
