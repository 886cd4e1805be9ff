"""What the PyTorch frontend refuses, and the errors that name the cause."""

import pytest
import torch
from torch import nn

from sparsify.frontend.torch import import_torch


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu()) + x


class TestErrors:
    x = torch.randn(2, 6)

    def refuses(self, model, inputs, message, kind=ValueError):
        with pytest.raises(kind, match=message):
            import_torch(model, inputs)

    def test_not_a_model(self):
        self.refuses(lambda x: x, (self.x,), "not function", TypeError)
        self.refuses(Mlp, (self.x,), "pass an instance", TypeError)
        scripted = torch.jit.trace(Mlp().eval(), self.x)
        self.refuses(scripted, (self.x,), "TorchScript", TypeError)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_weight_dtype(self, dtype):
        model = Mlp().to(dtype)
        self.refuses(model, (self.x,), rf"weight 'up.weight' .* is {dtype}.*model.float\(\)")

    def test_device(self):
        self.refuses(Mlp().to("meta"), (self.x,), "on device meta.*model.cpu")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_broken_weights(self, value):
        model = Mlp()
        model.down.weight.data[:2, 1] = value
        self.refuses(model, (self.x,), r"'down.weight' of shape \(6, 8\) holds 2 NaN or inf.* 48")

    def test_infinite_mask_buffer_is_fine(self):
        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

            def forward(self, x):
                return torch.softmax(x + self.mask, -1)

        import_torch(Masked(), (torch.randn(3, 3),))

    def test_sparse_weight(self):
        model = Mlp()
        model.up.weight = nn.Parameter(model.up.weight.detach().to_sparse_csr())
        self.refuses(model, (self.x,), "give it dense")

    def test_empty_graphs(self):
        self.refuses(nn.Identity(), (self.x,), "computes nothing")
        self.refuses(Mlp(), (), "hold no tensor")

        class Constant(nn.Module):
            def forward(self):
                return torch.ones(2)

        exported = torch.export.export(Constant(), ())
        self.refuses(exported, None, "no tensor input")

    def test_examples(self):
        self.refuses(Mlp(), None, "example_inputs is needed", TypeError)
        self.refuses(Mlp(), self.x, r"write \(x,\)", TypeError)
        self.refuses(Mlp(), (self.x, self.x), r"do not fit Mlp.forward\(x")
        self.refuses(Mlp(), {"y": self.x}, "do not fit Mlp.forward")
        self.refuses(Mlp(), (torch.randn(2, 5),), "fails on its example inputs.*2, 5.*2x5")
        self.refuses(Mlp(), (self.x.double(),), r"float64.*call .float\(\)")
        self.refuses(Mlp(), (self.x.to("meta"),), "on device meta")
        self.refuses(Mlp(), (torch.randn(0, 6),), "is empty")
        self.refuses(Mlp(), (self.x.to_sparse(),), "to_dense")

    def test_cannot_be_exported(self):
        class Data(nn.Module):
            def forward(self, x):
                if x.sum() > 0:
                    return x + 1
                return x

        self.refuses(Data(), (self.x,), r"cannot export Data .*data-dependent.*if x.sum\(\) > 0")

    def test_mutated_state(self):
        class Counter(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("count", torch.zeros(2, 6))

            def forward(self, x):
                self.count.add_(1)
                return x + self.count

        model = Counter()
        self.refuses(model, (self.x,), "changes its buffer 'count'")
        assert not model.count.any()

        class InPlace(nn.Module):
            def forward(self, x):
                x.add_(1)
                return x * 2

        self.refuses(InPlace(), (self.x.clone(),), "changes its input 'x'")

    def test_control_flow(self):
        class Conditional(nn.Module):
            def forward(self, x):
                return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

        self.refuses(Conditional(), (self.x,), "runs a sub-graph")

    def test_reshaping_an_exported_program(self):
        exported = torch.export.export(Mlp().eval(), (self.x,))
        with pytest.raises(ValueError, match="already exported"):
            import_torch(exported, dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
