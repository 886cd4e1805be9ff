"""Every recipe against the same written by hand, in plain PyTorch."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsify
from sparsify import ops
from sparsify.contracts import PassContext
from sparsify.passes.gating import Gating


@dataclass
class Hand:
    """A forward of the block that masks by ``score(values, factor, weight) > limit``.

    ``weight`` reads the values and ``factor`` is what they are multiplied with before that. Limits
    are quantiles of the scores of the calibration data, run without masks; with ``k``, each token
    keeps the k largest instead.
    """

    block: nn.Module
    score: object
    at: str
    sparsity: float
    per_token: bool = False
    rank: int = 0

    def calibrate(self, x):
        self.limits, self.factors = {}, {}
        self.masks = self._note
        self.forward(x)
        self.masks = self._mask
        return self

    def _note(self, name, values, factor, weight):
        self.factors[name] = factor.abs().mean(0) if factor is not None else torch.ones(())
        scores = self.score(values, self.factors[name], weight)
        count = round(self.sparsity * scores.numel())
        self.limits[name] = scores.flatten().sort().values[count - 1]
        return values

    def _mask(self, name, values, factor, weight):
        scores = self.score(values, self.factors[name], weight)
        limit = self.limits[name]
        if self.per_token:
            k = round((1 - self.sparsity) * values.shape[-1])
            limit = scores.sort(-1, descending=True).values[:, k - 1 : k] * (1 - 1e-7)
        return torch.where(scores > limit, values, 0)

    def linear(self, name, layer, x, masked):
        if not masked:
            return layer(x)
        kept = self.masks(name, x, None, layer.weight)
        y = F.linear(kept, layer.weight, layer.bias)
        if self.rank:
            left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
            r = self.rank
            y = y + (x - kept) @ ((left[:, :r] * values[:r]) @ right[:r]).T
        return y

    @torch.no_grad()
    def forward(self, x):
        parts = zip(self.block.gate, self.block.up, self.block.down, strict=True)
        for i, (gate, up, down) in enumerate(parts):
            if self.at == "inputs":
                both = nn.Linear(*reversed((2 * gate.out_features, gate.in_features)))
                both.weight.data = torch.cat((gate.weight, up.weight))
                both.bias = (
                    None if gate.bias is None else nn.Parameter(torch.cat((gate.bias, up.bias)))
                )
                g, u = self.linear(f"both.{i}", both, x, True).chunk(2, -1)
                h = F.silu(g) * u
            else:
                g, u = F.silu(gate(x)), up(x)
                h = self.masks(f"gate.{i}", g, u, down.weight) * u
            x = x + self.linear(f"down.{i}", down, h, self.at == "inputs")
        return x


def magnitude(values, factor, weight):
    return values.abs()


def weighted(values, factor, weight):
    return values.abs() * factor * weight.norm(dim=0)


def by_factor(values, factor, weight):
    return values.abs() * factor


RECIPES = {
    "teal": (sparsify.Teal, {}, magnitude, {"at": "inputs"}),
    "wina": (sparsify.Wina, {}, weighted, {"at": "inputs"}),
    "wina-k": (sparsify.Wina, {"per_token": True}, weighted, {"at": "inputs", "per_token": True}),
    "wina-gates": (sparsify.Wina, {"at": "gates"}, weighted, {"at": "gates"}),
    "top-k": (sparsify.TopK, {}, magnitude, {"at": "inputs", "per_token": True}),
    "top-k-gates": (sparsify.TopK, {"at": "gates"}, magnitude, {"at": "gates", "per_token": True}),
    "chess": (sparsify.Chess, {}, by_factor, {"at": "gates"}),
    "r-sparse": (sparsify.RSparse, {"rank": 0.25}, magnitude, {"at": "inputs", "rank": 6}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_results(name, block, portable, calibration, apply):
    recipe, options, score, how = RECIPES[name]
    result = apply(portable(block), recipe(0.5, calibration, **options))
    data = torch.cat([batch[0] for batch in calibration.batches])
    hand = Hand(block, score, sparsity=0.5, **how).calibrate(data)
    for x in (data, torch.randn(9, 24)):
        found, expected = result.programs["forward"].run(x), hand.forward(x)
        # A score within rounding of its limit may go either way, and changes its token alone.
        same = torch.isclose(found, expected, atol=2e-5, rtol=2e-5).all(-1)
        assert same.float().mean() >= 0.98
    for decision in result.decisions:
        assert decision.verdict == "rewritten" and 0 < decision.error < 1
        assert decision.density == pytest.approx(0.5, abs=0.02)
    assert len(result.decisions) == (4 if how["at"] == "inputs" else 2)


def test_spark_keeps_about_what_was_asked_for(block, portable, calibration, apply):
    result = apply(portable(block), sparsify.SparkTopK(0.7, calibration))
    program = result.programs["forward"]
    gates = [n for n in program.graph.nodes if n.target == ops.gate.overload]
    assert len(gates) == 2
    for decision in result.decisions:
        assert decision.density == pytest.approx(0.3, abs=0.04)

    @torch.no_grad()
    def forward(x):
        parts = zip(gates, block.gate, block.up, block.down, strict=True)
        for node, gate, up, down in parts:
            g = gate(x)
            k = int(node.args[1].removesuffix("}").partition("k=")[2])
            quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - k / 40))
            limit = g.mean(-1, keepdim=True) + g.std(-1, keepdim=True) * quantile
            x = x + down(F.silu(torch.where(g > limit, g, 0)) * up(x))
        return x

    x = torch.randn(30, 24)
    same = torch.isclose(program.run(x), forward(x), atol=2e-5, rtol=2e-5).all(-1)
    assert same.float().mean() >= 0.98


def test_a_stand_in_of_low_rank_lowers_the_error(block, portable, calibration, apply):
    plain = apply(portable(block), sparsify.Teal(0.7, calibration)).decisions
    helped = apply(portable(block), sparsify.RSparse(0.7, calibration, rank=0.5)).decisions
    assert all(h.error < p.error for h, p in zip(helped, plain, strict=True))


class Rectified(nn.Module):
    """ReLU, its square behind a residual, and a network gated by ReLU."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 24)
        self.third, self.fourth = nn.Linear(24, 40), nn.Linear(40, 24)
        self.gate, self.up = nn.Linear(24, 40), nn.Linear(24, 40)
        self.down = nn.Linear(40, 24)

    def forward(self, x):
        x = x + self.second(F.relu(self.first(x)))
        x = x + self.fourth(F.relu(self.third(x)) ** 2)
        return x + self.down(F.relu(self.gate(x)) * self.up(x))


def test_exact_zeros_lose_nothing(portable, calibration, apply, targets):
    model = Rectified().eval()
    result = apply(portable(model), sparsify.ExactZeros(0.2, calibration))
    program = result.programs["forward"]
    x = torch.randn(9, 24)
    torch.testing.assert_close(program.run(x), model(x), atol=2e-5, rtol=2e-5)
    count = targets(program)
    assert (count["active_linear"], count["gated_linear"], count["gate"]) == (3, 1, 0)
    done = {d.site: d for d in result.decisions if d.verdict == "rewritten"}
    assert set(done) == {"second", "fourth", "{gate,up}"}
    assert all(d.error == 0 for d in done.values())
    data = torch.cat([b[0] for b in calibration.batches])
    zeros = (F.relu(model.first(data)) == 0).float().mean()
    assert done["second"].density == pytest.approx(1 - float(zeros), abs=0.01)
    left = [d for d in result.decisions if d.verdict == "skipped"]
    assert left and all("0% of what it reads is zero" in d.reason for d in left)


def test_language_models_are_gated_in_decode(tiny_lm):
    programs = tiny_lm.portable_programs("llama")
    calibration = sparsify.Calibration([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8]])
    result = sparsify.Teal(0.5, calibration).run(programs, PassContext())
    gates = {
        p.name: sum(n.target == ops.gate.overload for n in p.graph.nodes) for p in result.programs
    }
    assert gates == {"prefill": 0, "decode": 8}
    assert "lm_head" not in {d.site for d in result.decisions}
    both = sparsify.Teal(0.5, calibration, entries=("prefill", "decode"))
    weights = both.run(programs, PassContext()).programs
    for program in weights:
        limits = {n: float(t) for n, t in program.weights.items() if n.endswith(".threshold")}
        assert len(limits) == 8
    assert weights["prefill"].weights.digest() and len(weights.weights) >= 8


def test_recipes_are_plain_data(calibration):
    for recipe, options, *_ in RECIPES.values():
        made = recipe(0.5, calibration, **options)
        assert isinstance(made, Gating) and made == recipe(0.5, calibration, **options)
        assert made != recipe(0.4, calibration, **options)
    with pytest.raises(ValueError, match="at='outputs'"):
        sparsify.Wina(0.5, calibration, at="outputs")
    with pytest.raises(ValueError, match="rank=1"):
        sparsify.RSparse(0.5, calibration, rank=1)
