"""Mixtures of experts in exported graphs, and the layouts of their weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeMoE
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from sparsify import ops
from sparsify.codegen.cost import CpuCostModel
from sparsify.codegen.target import Target
from sparsify.contracts import PassContext
from sparsify.frontend.experts import NAME
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.graph import arguments
from sparsify.passes.lower_moe import LowerMoe
from sparsify.passes.select_experts import SelectExperts
from sparsify.program import Program
from sparsify.report import Decision

WIDTH = 24
SIZES = {"hidden_size": WIDTH, "intermediate_size": 40, "moe_intermediate_size": 20}
EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 3}


class Alone(nn.Module):
    """A block of a model, which transformers would find in a decoder layer."""

    def __init__(self, block: type[nn.Module], config: type[PretrainedConfig], **more: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = config(**{**SIZES, **EXPERTS, **more})
        self.block = block(self.config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        for buffer in self.buffers():  # a bias that balances the load
            nn.init.normal_(buffer, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


BLOCKS: dict[str, tuple[Callable[[], Alone], str]] = {
    "mixtral": (
        lambda: Alone(MixtralSparseMoeBlock, MixtralConfig),
        "softmax_top_k{k=3,normalise=1}",
    ),
    "olmoe": (
        lambda: Alone(OlmoeSparseMoeBlock, OlmoeConfig),
        "softmax_top_k{k=3,normalise=0}",
    ),
    "qwen2": (
        lambda: Alone(Qwen2MoeSparseMoeBlock, Qwen2MoeConfig, shared_expert_intermediate_size=12),
        "softmax_top_k{k=3,normalise=0}",
    ),
    "qwen3": (
        lambda: Alone(Qwen3MoeSparseMoeBlock, Qwen3MoeConfig, norm_topk_prob=True),
        "softmax_top_k{k=3,normalise=1}",
    ),
    "granite": (
        lambda: Alone(GraniteMoeMoE, GraniteMoeConfig),
        "softmax_top_k{k=3,normalise=1}",
    ),
    "deepseek": (
        lambda: Alone(
            DeepseekV3MoE, DeepseekV3Config, n_routed_experts=8, n_group=4, topk_group=2,
            routed_scaling_factor=2.5,
        ),
        "sigmoid_top_k{k=3,normalise=1,groups=4,kept=2}",
    ),
    "glm4": (
        lambda: Alone(
            Glm4MoeMoE, Glm4MoeConfig, n_routed_experts=8, n_group=1, topk_group=1,
            routed_scaling_factor=1.5,
        ),
        "sigmoid_top_k{k=3,normalise=1,groups=1,kept=1}",
    ),
    # These scale what experts are given, not what they make of it.
    "llama4": (
        lambda: Alone(Llama4TextMoe, Llama4TextConfig, num_experts_per_tok=1),
        "sigmoid_top_k{k=1,normalise=0,groups=1,kept=1}",
    ),
    "llama4, two a token": (
        lambda: Alone(Llama4TextMoe, Llama4TextConfig, num_experts_per_tok=2),
        "sigmoid_top_k{k=2,normalise=0,groups=1,kept=1}",
    ),
}  # fmt: skip
FAMILIES = [
    "mixtral",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("olmoe", "qwen2", "qwen3", "granite")),
]
ROUTE, CALL = ops.route.overload, ops.experts.overload


def calls(program: Program, target: Any) -> list[Any]:
    return [node for node in program.graph.nodes if node.target == target]


def lowered(programs: Any) -> tuple[Program, tuple[Decision, ...]]:
    result = run_pipeline(programs, (LowerMoe(),), verify="numeric")
    return result.programs["forward"], result.decisions


SHAPES = ((1, 1), (2, 7), (3, 16))


def check(model: nn.Module, program: Program, shapes: Any = SHAPES) -> None:
    """Against the module's own loop over experts, on other tokens than the examples."""
    model.config._experts_implementation_internal = "eager"  # type: ignore[union-attr]
    width = model.config.hidden_size  # type: ignore[union-attr]
    for shape in shapes:
        x = torch.randn(*shape, width)
        with torch.no_grad():
            expected = model(x)
        found = program.run(x)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_models_of_transformers_as_they_are(name: str) -> None:
    make, spec = BLOCKS[name]
    model = make().eval()
    model.config._experts_implementation_internal = "eager"
    program, decisions = lowered(import_torch(model, (torch.randn(2, 5, WIDTH),)))
    assert model.config._experts_implementation_internal == "eager"
    assert NAME not in ALL_EXPERTS_FUNCTIONS
    (route,), (call,) = calls(program, ROUTE), calls(program, CALL)
    assert route.args[1] == spec and arguments(call)["gated"]
    assert [d.verdict for d in decisions if d.operator == "router"] == ["rewritten"]
    check(model, program)


@pytest.mark.parametrize("form", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_programs_that_were_exported_before(name: str, form: str) -> None:
    make, spec = BLOCKS[name]
    model = make().eval()
    model.config._experts_implementation_internal = form
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(2, 5, WIDTH),), dynamic_shapes=shapes)
    program, decisions = lowered(import_torch(exported))
    assert [node.args[1] for node in calls(program, ROUTE)] == [spec]
    assert len(calls(program, CALL)) == 1
    assert not any("mm" in str(node.target) for node in program.graph.nodes)
    (decision,) = [d for d in decisions if d.operator == "experts"]
    assert (decision.verdict, decision.site) == ("rewritten", "block.experts")
    check(model, program)


class Scaled(nn.Module):
    """Experts with scaled inputs by broadcasting, without a gate, and scores of some kind."""

    def __init__(self, scores: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores, self.router = scores, nn.Linear(WIDTH, 6)
        self.up = nn.Parameter(0.3 * torch.randn(6, WIDTH, 20))
        self.down = nn.Parameter(0.3 * torch.randn(6, 20, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = self.scores(self.router(x)).t().unsqueeze(-1) * x.unsqueeze(0)
        return (scaled.bmm(self.up).relu() @ self.down).sum(0)


def best(logits: torch.Tensor) -> torch.Tensor:
    """The weights of the best two."""
    values, experts = logits.softmax(-1).topk(2)
    return torch.zeros_like(logits).scatter(1, experts, values)


@pytest.mark.parametrize("scores", [best, torch.sin])
def test_experts_see_scaled_tokens_of_their_own_where_a_router_gives_the_scores(
    scores: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model = Scaled(scores).eval()
    program, decisions = lowered(import_torch(model, (torch.randn(9, WIDTH),)))
    routers = [node.args[1] for node in calls(program, ROUTE)]
    assert routers == (["softmax_top_k{k=2,normalise=0}"] if scores is best else [])
    assert len(calls(program, CALL)) == len(routers)
    (decision,) = [d for d in decisions if d.operator == "experts"]
    assert decision.verdict == ("rewritten" if scores is best else "skipped")
    for tokens in (1, 2, 33):
        x = torch.randn(tokens, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(program.run(x), model(x), atol=1e-5, rtol=1e-5)


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()


class Activated(Alone):
    """Experts that compute more than the operator can."""

    def __init__(self) -> None:
        super().__init__(MixtralSparseMoeBlock, MixtralConfig)
        self.block.experts.act_fn = Sine()


def test_experts_with_another_activation_stay_as_they_are() -> None:
    model = Activated().eval()
    program, _ = lowered(import_torch(model, (torch.randn(2, 5, WIDTH),)))
    assert not calls(program, CALL)
    check(model, program)


def test_a_top_k_that_routes_nothing_stays() -> None:
    class Best(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(x.softmax(-1).topk(2))

    program, decisions = lowered(import_torch(Best(), (torch.randn(3, 5),)))
    assert not calls(program, ROUTE) and not decisions


def selected(model: nn.Module, layout: str = "") -> tuple[Program, Decision]:
    cost = CpuCostModel(Target.parse("x86-avx2"))
    x = torch.randn(2, 32, model.config.hidden_size)  # type: ignore[union-attr]
    portable = run_pipeline(import_torch(model, (x,)), PORTABLE)
    context = PassContext(cost=cost)
    result = run_pipeline(portable.programs, (SelectExperts(layout),), context, verify="numeric")
    (decision,) = [d for d in result.decisions if d.operator == "experts"]
    return result.programs["forward"], decision


def test_dense_experts_run_dense() -> None:
    program, decision = selected(BLOCKS["mixtral"][0]().eval())
    assert (decision.verdict, decision.layout) == ("dense", "packed_dense{rows=8}")
    assert decision.shape == (8, WIDTH, 40, WIDTH) and decision.site == "block.experts"
    assert "3 of 8 experts a token" in decision.reason and "S-MBU" in decision.reason
    assert {name.partition(":")[2] for name in program.weights if "experts" in name} == {
        "packed_dense{rows=8}.panels"
    }


def test_experts_of_many_zeros_run_sparse() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 96}
    model = Alone(MixtralSparseMoeBlock, MixtralConfig, **sizes).eval()
    with torch.no_grad():
        for parameter in model.block.experts.parameters():
            parameter *= torch.rand_like(parameter) < 0.05
    program, decision = selected(model)
    assert decision.verdict == "sparse" and decision.density == pytest.approx(0.05, abs=0.01)
    (call,) = calls(program, CALL)
    assert arguments(call)["up_layout"].startswith("sell{")
    check(model, program)


def test_a_kind_of_layout_can_be_asked_for() -> None:
    program, decision = selected(BLOCKS["olmoe"][0]().eval(), "sell")
    assert decision.verdict == "sparse" and "as the option layout=sell says" in decision.reason
    check(BLOCKS["olmoe"][0]().eval(), program)
