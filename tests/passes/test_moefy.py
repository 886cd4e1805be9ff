"""Dense feed-forward networks split into experts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsify
from sparsify import ops
from sparsify.calibration import Calibration
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.expert_split import FeedForward, clusters, regression, split
from sparsify.passes.moefy import Moefy


class Layer(nn.Module):
    """A residual layer whose neurons work in four groups, each for tokens of its own kind."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gated = gated
        self.gate, self.up = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        with torch.no_grad():
            kinds = F.one_hot(torch.arange(32) % 4, 4).float()
            self.gate.weight.copy_(torch.cat((6 * kinds, torch.randn(32, 12)), 1))
            self.gate.bias.fill_(-8.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.gate(x))
        return x + self.down(y * self.up(x) if self.gated else y)


def tokens(count: int) -> torch.Tensor:
    """The first four features say which kind a token is of."""
    kind = F.one_hot(torch.randint(4, (count,)), 4).float()
    return torch.cat((2 * kind, 0.5 * torch.randn(count, 12)), 1)


@pytest.fixture(params=[False, True], ids=["plain", "gated"])
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(request.param).eval()


def run(layer: Layer, recipe: Moefy) -> tuple[torch.nn.Module, sparsify.Decision]:
    programs = import_torch(layer, (tokens(9)[None],))
    result = run_pipeline(programs, (*PORTABLE, recipe))
    (decision,) = [d for d in result.decisions if d.made_by == "moefy"]
    return result.programs["forward"], decision


def test_a_token_that_runs_every_expert_gets_the_dense_result(layer: Layer) -> None:
    program, decision = run(layer, Moefy(4, 4, Calibration([tokens(200)[None]])))
    x = tokens(33)[None]
    torch.testing.assert_close(program.run(x), layer(x), atol=1e-5, rtol=1e-5)
    assert decision.error is not None and decision.error < 1e-6


def test_numeric_verification_lets_its_change_through(layer: Layer) -> None:
    programs = import_torch(layer, (tokens(9)[None],))
    recipe = Moefy(4, 2, Calibration([tokens(200)[None]]))
    run_pipeline(programs, (*PORTABLE, recipe), verify="numeric")


def test_groups_that_work_apart_are_found(layer: Layer) -> None:
    program, decision = run(layer, Moefy(4, 1, Calibration([tokens(400)[None]])))
    x = tokens(100)[None]
    change, scale = (program.run(x) - layer(x)).norm(), (layer(x) - x).norm()
    assert change <= 0.1 * scale and "25% of the multiplications" in decision.reason
    operators = [node.target for node in program.graph.nodes]
    assert ops.route.overload in operators and ops.experts.overload in operators


def test_clusters_are_of_one_size_and_of_a_kind() -> None:
    torch.manual_seed(0)
    kind = torch.arange(24) % 3
    busy = F.one_hot(torch.randint(3, (60,)), 3).float()
    groups = clusters(busy[:, kind] * torch.randn(60, 24), 3)
    assert groups.bincount().tolist() == [8, 8, 8]
    for group in range(3):
        assert len(kind[groups == group].unique()) == 1


def test_regression_finds_what_is_linear() -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(500, 6), torch.randn(3, 6)
    found, bias = regression(x, x @ matrix.t() + 2)
    torch.testing.assert_close(found, matrix, atol=0.05, rtol=0.05)
    torch.testing.assert_close(bias, torch.full((3,), 2.0), atol=0.05, rtol=0.05)


def test_what_it_reports_is_what_it_does() -> None:
    torch.manual_seed(0)
    network = FeedForward(
        torch.randn(32, 8), torch.randn(8, 32), torch.randn(32), torch.randn(8), "gelu", False
    )
    x = torch.randn(300, 8)
    made = split(network, 4, 2, x)
    chosen = (x @ made.router.t() + made.router_bias).topk(2).indices
    y = made.bias.expand(len(x), 8).clone()
    for token, own in enumerate(chosen.tolist()):
        for e in own:
            inner = F.gelu(made.up[e] @ x[token] + made.up_bias[e])
            y[token] += made.down[e] @ inner + made.down_bias[e]
    dense = F.linear(network.inner(x), network.down, network.down_bias)
    assert float((y - dense).norm() / dense.norm()) == pytest.approx(made.error, rel=1e-3)
    cosine = F.cosine_similarity(y, dense, dim=-1).mean()
    assert float(cosine) == pytest.approx(made.cosine, rel=1e-3)


def test_a_model_becomes_a_program(layer: Layer) -> None:
    exported = sparsify.moefy(layer, 4, 2, [tokens(100)[None]])
    assert not exported.graph_signature.buffers
    x = tokens(7)[None]
    assert (exported.module()(x) - layer(x)).norm() <= 0.2 * (layer(x) - x).norm()


def test_what_cannot_be_split_is_said(layer: Layer) -> None:
    _, decision = run(layer, Moefy(5, 2, Calibration([tokens(50)[None]])))
    assert decision.verdict == "skipped" and "32 neurons cannot be parted into 5" in decision.reason
    with pytest.raises(ValueError, match="top_k=5 of 4 experts"):
        Moefy(4, 5, Calibration([tokens(5)]))
    with pytest.raises(TypeError, match="moefy: calibration must be"):
        Moefy(4, 2, [tokens(5)])  # type: ignore[arg-type]
    programs = run_pipeline(import_torch(nn.Linear(4, 4), (torch.randn(2, 4),)), PORTABLE).programs
    with pytest.raises(ValueError, match="no feed-forward network"):
        run_pipeline(programs, (Moefy(4, 2, Calibration([torch.randn(2, 4)])),))
