"""Language models from transformers, run over the paged cache in eager PyTorch."""

import copy

import pytest
import torch
from torch import nn

from sparsify.frontend.causal_lm import (
    ENTRIES,
    INPUTS,
    capture_causal_lm,
    import_causal_lm,
)
from sparsify.ops import CacheShape
from sparsify.rewriter import share_weights
from sparsify.verification import verify

OFTEN = ["llama", "gemma3", "gemma2", "mixtral"]
SLOW = ["mistral", "qwen2", "qwen3", "olmoe", "qwen3_moe"]
FAMILIES = [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
SHAPES = {name: CacheShape(3 if name == "gemma3" else 2, 2, 6) for name in (*OFTEN, *SLOW)}


@pytest.fixture(scope="module")
def imported(tiny_lm):
    """``imported(name)``: a tiny model and its programs, made once."""
    made = {}

    def load(name):
        if name not in made:
            model = tiny_lm.MODELS[name]()
            made[name] = model, import_causal_lm(model)
        return made[name]

    return load


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_decoding_gives_the_tokens_of_transformers(name, imported, tiny_lm):
    """Ragged prompts in one batch, in chunks, past the window and from page to page."""
    model, programs = imported(name)
    rows = tiny_lm.prompts(61, (19, 3, 8))
    expected = [tiny_lm.own_tokens(model, row, 24) for row in rows]
    for chunk in (19, 7):
        assert tiny_lm.paged_tokens(programs, SHAPES[name], rows, 24, chunk) == expected


def test_a_single_token_is_a_prompt(imported, tiny_lm):
    model, programs = imported("llama")
    (row,) = tiny_lm.prompts(61, (1,))
    found = tiny_lm.paged_tokens(programs, SHAPES["llama"], [row], 5, 1)
    assert found == [tiny_lm.own_tokens(model, row, 5)]


def test_the_programs_are_of_one_kind(imported):
    _, programs = imported("llama")
    assert [p.name for p in programs] == list(ENTRIES)
    for program in programs:
        verify(program)
        assert tuple(n.name for n in program.user_inputs()) == INPUTS
        kinds = [s.kind.name for s in program.exported.graph_signature.output_specs]
        assert kinds == ["USER_OUTPUT"]
        appends = [n for n in program.graph.nodes if "kv_append" in str(n.target)]
        assert len(appends) == 2
        assert all([a.name for a in n.args[:2]] == ["keys", "values"] for n in appends)
        assert not any("auto_functionalized" in str(n.target) for n in program.graph.nodes)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_weights_have_the_names_of_the_model_and_are_its_memory(name, imported):
    model, programs = imported(name)
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    prefill, decode = (p.weights for p in programs)
    assert set(prefill) == set(decode) <= set(own)
    assert all(prefill[n] is decode[n] for n in prefill)
    assert all(t.data_ptr() == own[n].data_ptr() for n, t in prefill.items())
    tied = [n for n in prefill if own[n] is model.lm_head.weight]
    assert len(tied) == 1
    used = {id(t): t.nbytes for n, t in own.items() if not n.endswith("original_inv_freq")}
    assert programs.weights.nbytes == sum(used.values())


def test_one_name_cannot_stand_for_two_weights(imported):
    _, programs = imported("llama")
    changed = copy.deepcopy(programs["decode"])
    with torch.no_grad():
        next(iter(changed.exported.state_dict.values())).add_(1)
    with pytest.raises(ValueError, match="already exists with other contents"):
        share_weights(type(programs)((programs["prefill"], changed)))


@pytest.mark.parametrize("training", [False, True])
def test_the_model_stays_as_it_was(training, tiny_lm):
    model = tiny_lm.MODELS["llama"]()
    model.train(training)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    implementation = model.config._attn_implementation
    capture_causal_lm(model)
    assert model.training == training and model.config._attn_implementation == implementation
    assert not model.lm_head._forward_pre_hooks
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_failing_export_leaves_the_model_as_it_was(tiny_lm, monkeypatch):
    model = tiny_lm.MODELS["llama"]()
    forward = type(model.model.norm).forward

    def branching(self, x):
        return forward(self, x) if x.sum() > 0 else forward(self, x) + 0

    monkeypatch.setattr(type(model.model.norm), "forward", branching)
    with pytest.raises(ValueError, match=r"prefill step of LlamaForCausalLM cannot be exported"):
        capture_causal_lm(model)
    assert model.config._attn_implementation == "sdpa" and not model.lm_head._forward_pre_hooks


class Branching(torch.nn.Module):
    def forward(self, x):
        return 2 * x if bool(x.sum() > 0) else x


def refused(name, tiny_lm):
    import transformers as hf

    small = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes = tiny_lm.SIZES
    if name == "module":
        return nn.Linear(3, 3)
    if name == "bfloat16":
        return tiny_lm.MODELS["llama"]().bfloat16()
    if name == "headless":
        return hf.LlamaModel(hf.LlamaConfig(**sizes))
    if name == "encoder-decoder":
        config = hf.T5Config(vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=1, num_heads=4)
        return hf.T5ForConditionalGeneration(config)
    if name == "mamba":
        return hf.MambaForCausalLM(hf.MambaConfig(**small, state_size=4))
    if name == "branches":
        model = tiny_lm.MODELS["llama"]()
        model.model.layers[0].mlp = Branching()
        return model
    if name == "window in the mask":
        config = hf.Qwen2MoeConfig(
            **{k: v for k, v in sizes.items() if k != "head_dim"},
            num_experts=4,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            use_sliding_window=True,
            sliding_window=50,
            layer_types=["sliding_attention"] * 2,
            experts_implementation="batched_mm",
        )
        return hf.Qwen2MoeForCausalLM(config)
    sinks = {**sizes, "layer_types": ["full_attention"] * 2, "num_local_experts": 4}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**sinks, experts_implementation="batched_mm"))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("module", TypeError, r"causal language model of transformers, not Linear; .*compile"),
        ("bfloat16", ValueError, r"torch.bfloat16; .*call model.float\(\) first"),
        ("headless", ValueError, r"LlamaModel has no language-model head.*AutoModelForCausalLM"),
        ("encoder-decoder", ValueError, r"T5ForConditionalGeneration is an encoder-decoder"),
        ("mamba", ValueError, r"MambaForCausalLM .*recurrent"),
        ("branches", ValueError, r"LlamaForCausalLM cannot be exported.*must not branch"),
        (
            "window in the mask",
            ValueError,
            r"Qwen2MoeForCausalLM: layer 0 has a window of 50 tokens",
        ),
        ("sinks", ValueError, r"prefill of GptOssForCausalLM.*logits differ.*sinks"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(name, error, message, tiny_lm):
    with pytest.raises(error, match=message):
        import_causal_lm(refused(name, tiny_lm).eval())


@pytest.mark.slow
def test_smollm2_decodes_like_transformers(smollm2, tiny_lm):
    programs = import_causal_lm(smollm2)
    rows = tiny_lm.prompts(smollm2.config.vocab_size, (21, 5))
    expected = [tiny_lm.own_tokens(smollm2, row, 20) for row in rows]
    found = tiny_lm.paged_tokens(programs, CacheShape(30, 3, 64), rows, 20, 16)
    assert found == expected
