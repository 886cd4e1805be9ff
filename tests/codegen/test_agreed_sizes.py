"""Sizes that are one by what was traced, and two expressions to TVM."""

import pytest
import torch
import torch.nn.functional as F

import sparsify


class Pyramid(torch.nn.Module):
    """Half the size, and a quarter of it made twice as large again, as in feature pyramids."""

    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv2d(3, 4, 3, 2, 1)
        self.deeper = torch.nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x):
        fine = self.down(x)
        coarse = F.interpolate(self.deeper(fine), scale_factor=2)
        return torch.cat([fine + coarse, coarse], 1)


def test_a_size_that_is_a_number_in_the_graph_is_one_in_kernels():
    """24 - s and s, because together they must be what the weight takes."""

    class Joined(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(24, 16)

        def forward(self, x, h):
            return self.mix(torch.cat([x, h], -1))

    net = Joined().eval()
    compiled = sparsify.compile(net, (torch.randn(20, 8), torch.randn(20, 16)), num_threads=1)
    for features in (8, 5):
        given = torch.randn(20, features), torch.randn(20, 24 - features)
        torch.testing.assert_close(compiled(*given), net(*given), atol=1e-5, rtol=1e-5)


def test_they_are_compiled_and_checked_at_the_call():
    torch.manual_seed(0)
    net = Pyramid().eval()
    dims = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    compiled = sparsify.compile(
        net, (torch.randn(2, 3, 32, 48),), dynamic_shapes=(dims,), num_threads=1
    )
    for size in ((2, 3, 32, 48), (1, 3, 4, 64), (3, 3, 20, 8)):
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)
    with pytest.raises((ValueError, RuntimeError)):
        compiled(torch.randn(2, 3, 33, 48))


def test_a_size_that_must_be_that_of_an_input_is_checked_at_the_call():
    """Halved and doubled: 2 * ((s + 1) // 2) is s for even sizes only."""

    class Doubled(torch.nn.Module):
        def forward(self, x):
            halves = x[:, ::2]
            return x + torch.stack([halves, halves], -1).flatten(-2)

    compiled = sparsify.compile(Doubled().eval(), (torch.randn(3, 8),), num_threads=1)
    for size in ((3, 8), (1, 10), (5, 64)):
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), Doubled()(x))
    with pytest.raises(ValueError, match=r"\(3, 9\) do not go through the model: .* 9 .* wants 10"):
        compiled(torch.randn(3, 9))
