"""Operators that stay with PyTorch because TVM's importer gets them wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsify.codegen.support import unsupported_reason
from sparsify.contracts import PassContext
from sparsify.frontend.torch import import_torch
from sparsify.passes.canonicalize import Canonicalize

X, C = torch.randn(3, 5, 4), torch.randn(2, 4, 9, 8)
Q = torch.randn(2, 2, 5, 4)
attend = F.scaled_dot_product_attention


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def reasons(function, *inputs, dynamic="auto"):
    programs = import_torch(Call(function), inputs, dynamic_shapes=dynamic)
    program = Canonicalize().run(programs, PassContext()).programs["forward"]
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    return [reason for node in nodes if (reason := unsupported_reason(node)) is not None]


@pytest.mark.parametrize(
    "function,inputs,reason",
    [
        (lambda q: attend(q, q, q, scale=0.3), (Q,), "ignores the scale"),
        (lambda q, m: attend(q, q, q, m), (Q, torch.rand(5, 5) > 0.1), "no boolean mask"),
        (lambda q: attend(q, q[:, :1], q[:, :1], enable_gqa=True), (Q,), "grouped heads"),
        (lambda x: attend(x, x, x), (X,), "3 dims"),
        (lambda x: F.layer_norm(x, (4,)), (X,), "a weight and a bias"),
        (lambda c: F.group_norm(c, 2, torch.ones(4)), (C,), "a bias"),
        (lambda i: 2**i, (torch.arange(4),), "power that is a tensor"),
        (lambda x: x.var(1), (X,), "dynamic dim"),
        (lambda i: i @ i, (torch.arange(16).view(4, 4),), "int64 matrices"),
        (lambda x: x + torch.arange(x.shape[1] - 1, -1, -1)[:, None], (X,), "counts up only"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (C,), "divisor_override"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True), (C,), "does not compute the indices"),
        (lambda i: F.interpolate(i, size=(5, 5), mode="bilinear"), (C.byte(),), "are rounded"),
        (lambda x: x * (x.shape[1] / 3), (X,), "a fraction or a comparison of sizes"),
        (lambda x: x.topk(0).values, (X,), "count of 0"),
        (lambda x: torch.as_strided(x, (2, 2), (1, 2)), (X,), "contiguous strides"),
        (
            lambda x, y: x.index_put((torch.tensor([0, 2]),), y),
            (X, torch.randn(2, 5, 4)),
            "an index for every dim",
        ),
        (lambda x: (x.bfloat16() * 2).float(), (X,), "bfloat16"),
        (lambda x: x.logcumsumexp(1), (X,), "has no lowering"),
        (lambda x: x.view(x.shape[0], -1).chunk(2, -1)[1] * 2, (X,), "input's shape"),
        (lambda x: torch.slice_scatter(x, x[:, 1:3], 1, 1, 3), (X,), "dynamic shape"),
        (lambda w, i: F.embedding(i, w), (X[0], torch.tensor([0, 1])), "table of dynamic shape"),
        (
            lambda c: F.grid_sample(c, torch.zeros(2, 4, 4, 2), align_corners=False),
            (C,),
            "layout",
        ),
        (lambda c, w: F.conv2d(c, w), (C[0], torch.randn(6, 4, 3, 3)), "batch dim"),
    ],
)
def test_left_to_pytorch(function, inputs, reason):
    assert any(reason in found for found in reasons(function, *inputs))


@pytest.mark.parametrize(
    "function,inputs",
    [
        (lambda q: attend(q, q, q, scale=0.5), (Q,)),
        (lambda x: x.var(-1) + x.var(1, correction=0).sum(), (X,)),
        (lambda x: F.max_pool2d(x, 2), (C,)),
        (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), (C,)),
        (lambda x: x.bool(), (torch.arange(4),)),
    ],
)
def test_trusted(function, inputs):
    assert reasons(function, *inputs, dynamic=None) == []
