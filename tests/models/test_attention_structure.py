"""Models whose masks have structure: exact without a recipe, blocks that are masked are skipped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sparsify
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.graph import arguments

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
"""Of the output's scale, against float64."""
SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "use_cache": False,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]


def gemma2(window: int) -> Any:
    """Eager attention alone: the scores have a soft cap, which ``sdpa`` cannot express."""
    config = transformers.Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=window, layer_types=LAYERS,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.Gemma2Model(config)


def gemma3(window: int, implementation: str) -> Any:
    config = transformers.Gemma3TextConfig(
        **SMALL, num_key_value_heads=1, head_dim=8, sliding_window=window, layer_types=LAYERS,
        attn_implementation=implementation,
    )  # fmt: skip
    return transformers.Gemma3TextModel(config)


def modernbert(window: int) -> Any:
    config = transformers.ModernBertConfig(
        **{k: v for k, v in SMALL.items() if k != "use_cache"}, local_attention=2 * window - 2,
        global_attn_every_n_layers=2, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.ModernBertModel(config)


def vit(hidden: int, image: int) -> Any:
    config = transformers.ViTConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=hidden // 64, image_size=image, patch_size=16,
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False)


def whisper(layers: int, frames: int) -> Any:
    """The encoder of the tiny model, of so many layers."""
    config = transformers.WhisperConfig(
        d_model=384, encoder_layers=layers, encoder_attention_heads=6, encoder_ffn_dim=1536,
        max_source_positions=frames,
    )  # fmt: skip
    return transformers.models.whisper.modeling_whisper.WhisperEncoder(config)


def seeded(model: Any) -> Any:
    """Weights that make attention matter: not all queries alike."""
    torch.manual_seed(0)
    model = model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and ("proj" in name or "query" in name or "key" in name):
                weight.copy_(torch.randn(weight.shape) * 1.5 * weight.shape[1] ** -0.5)
    return model


def bands(program: Any) -> list[tuple[bool, int, bool]]:
    """``causal, window`` of every attention, and whether a mask is left."""
    nodes = [n for n in program.graph.nodes if "fused_attention" in str(n.target)]
    found = [arguments(node) for node in nodes]
    return [(o["causal"], o["window"], o["mask"] is not None) for o in found]


def error(found: Any, model: Any, call: dict[str, Any]) -> float:
    exact = copy.deepcopy(model).double()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in call.items()}
    with torch.no_grad():
        expected = exact(**wide).last_hidden_state
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "model,expected",
    [
        (gemma2(5), [(True, 5, False), (True, 0, False)]),
        (gemma3(5, "eager"), [(True, 5, False), (True, 0, False)]),
        (gemma3(5, "sdpa"), [(True, 5, False), (True, 0, False)]),
        (modernbert(4), [(False, 0, False), (False, 4, False)]),
    ],
    ids=["gemma2-eager", "gemma3-eager", "gemma3-sdpa", "modernbert"],
)
def test_windows_are_read_from_the_masks(model: Any, expected: list[Any]) -> None:
    model = seeded(model)
    call = {"input_ids": torch.randint(1, 50, (2, 12))}
    program = run_pipeline(import_torch(model, call), PORTABLE).programs["forward"]
    assert bands(program) == expected
    for batch, length in ((1, 3), (2, 23)):
        call = {"input_ids": torch.randint(1, 50, (batch, length))}
        assert error(program.run(**call)[0], model, call) <= TOLERANCE


def test_padding_stays_a_mask_of_keys_beside_the_window() -> None:
    model = seeded(gemma3(5, "sdpa"))
    ids = torch.randint(1, 50, (2, 12))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = run_pipeline(import_torch(model, call), PORTABLE).programs["forward"]
    assert bands(program) == [(True, 5, True), (True, 0, True)]
    call["attention_mask"] = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
    found = program.run(**call)[0][call["attention_mask"].bool()]
    with torch.no_grad():
        expected = model(**call).last_hidden_state[call["attention_mask"].bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def compiled_error(model: Any, example: dict[str, Any], *calls: dict[str, Any]) -> float:
    model = seeded(model)
    compiled = sparsify.compile(model, example, num_threads=1)
    fallen = [d for d in compiled.report.fallbacks if "conv" not in d.operator]
    assert fallen == []
    return max(error(compiled(**call).last_hidden_state, model, call) for call in calls)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gemma_of_both_kinds_of_layers(implementation: str) -> None:
    calls = [{"input_ids": torch.randint(1, 50, shape)} for shape in ((2, 40), (1, 333), (1, 1))]
    model = gemma3(100, implementation)
    assert compiled_error(model, calls[0], *calls) <= TOLERANCE


@pytest.mark.slow
def test_gemma_with_soft_caps() -> None:
    calls = [{"input_ids": torch.randint(1, 50, shape)} for shape in ((2, 40), (1, 333))]
    assert compiled_error(gemma2(100), calls[0], *calls) <= TOLERANCE


@pytest.mark.slow
def test_a_vision_transformer_of_197_tokens() -> None:
    calls = [{"pixel_values": torch.randn(n, 3, 224, 224)} for n in (2, 1)]
    assert compiled_error(vit(192, 224), *calls, calls[1]) <= TOLERANCE


@pytest.mark.slow
def test_the_encoder_of_whisper_on_1500_frames() -> None:
    call = {"input_features": torch.randn(1, 80, 3000)}
    assert compiled_error(whisper(4, 1500), call, call) <= TOLERANCE


@pytest.mark.slow
def test_minilm_with_padding(minilm: Any) -> None:
    ids = torch.randint(1000, 20000, (3, 65))
    mask = (torch.arange(65) < torch.tensor([[65], [17], [1]])).long()
    call = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
    compiled = sparsify.compile(minilm, call, num_threads=1)
    assert error(compiled(**call).last_hidden_state, minilm, call) <= TOLERANCE
