"""Language models through the whole pipeline: what remains of a layer, and the same tokens."""

import itertools

import pytest
import torch

from sparsify.contracts import PassContext
from sparsify.frontend.causal_lm import import_causal_lm
from sparsify.layouts import FEW_TOKENS
from sparsify.ops import CacheShape, expected_tokens
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.graph import arguments
from sparsify.passes.propagate_lanes import PropagateLanes
from sparsify.passes.select_layout import SelectLayout

LAYER = ["kv_append", "paged_attention", "sparse_linear", "fused_norm", "sparse_linear", "gated"]
LAYER += ["sparse_linear", "fused_norm", "sparse_linear", "rotary"]
"""From the append of one layer to that of the next: the residual sums are in the linears."""


@pytest.fixture(scope="module")
def compiled(tiny_lm, cost):
    """``compiled(name)``: a model and its programs, imported, portable, and in lanes; made once."""
    made = {}

    def load(name):
        if name not in made:
            model = tiny_lm.MODELS[name]()
            imported = import_causal_lm(model)
            portable = run_pipeline(imported, PORTABLE, verify="numeric")
            context = PassContext(cost=cost)
            passes = (SelectLayout(), PropagateLanes())
            bound = run_pipeline(portable.programs, passes, context, verify="numeric")
            made[name] = model, imported, portable, bound
        return made[name]

    return load


def operators(program):
    """The names of the operators in order, extents left out."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    return [
        n.target._opname
        for n in nodes
        if isinstance(n.meta["val"], torch.Tensor) and hasattr(n.target, "_opname")
    ]


def calls(program, name):
    return [n for n in program.graph.nodes if name == getattr(n.target, "_opname", "")]


@pytest.mark.parametrize("entry", ["prefill", "decode"])
@pytest.mark.parametrize("stage", ["portable", "bound"])
def test_a_layer_is_ten_operators(entry, stage, compiled):
    _, _, portable, bound = compiled("llama")
    program = (portable if stage == "portable" else bound).programs[entry]
    names = operators(program)
    appends = [i for i, name in enumerate(names) if name == "kv_append"]
    for begin, end in itertools.pairwise(appends):
        assert names[begin:end] == LAYER
    assert names[appends[-1] :][: len(LAYER) - 2] == LAYER[:-2]


def test_the_cache_and_attention_read_one_rotated_projection(compiled):
    _, _, portable, _ = compiled("llama")
    for program in portable.programs:
        for append, attend in zip(
            calls(program, "kv_append"), calls(program, "paged_attention"), strict=True
        ):
            written, read = arguments(append), arguments(attend)
            assert written["key"] is written["value"] is read["query"]
            assert written["offsets"] == [24, 36] and read["offset"] == 0
            turned = arguments(read["query"])
            assert (turned["heads"], turned["head_dim"]) == (6, 6)
            assert turned["x"].target._opname == "sparse_linear"


def test_prefill_enters_lanes_once_and_decode_never(compiled):
    """The hidden states, cosines and sines go in; the head reads few tokens, in rows."""
    _, _, _, bound = compiled("llama")
    prefill, decode = bound.programs
    names = operators(prefill)
    assert (names.count("to_lanes"), names.count("from_lanes")) == (3, 1)
    for node in prefill.graph.nodes:
        name = getattr(node.target, "_opname", "")
        if name in ("fused_norm", "rotary", "gated"):
            assert arguments(node)["lanes"]
        if name in ("kv_append", "paged_attention"):
            assert len(arguments(node)["extents"]) == 2
    *layers, head = calls(prefill, "sparse_linear")
    assert all(arguments(n)["lanes"] for n in layers) and not arguments(head)["lanes"]
    assert expected_tokens(arguments(head)["x"].meta["val"]) <= FEW_TOKENS
    assert not {"to_lanes", "from_lanes", "permute", "clone"} & set(operators(decode))
    assert not any(
        arguments(n).get("lanes") or arguments(n).get("extents")
        for n in decode.graph.nodes
        if getattr(n.target, "namespace", "") == "sparsify"
    )


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "qwen3"))]
)
def test_every_stage_decodes_the_tokens_of_transformers(name, compiled, tiny_lm):
    model, _, portable, bound = compiled(name)
    rows = tiny_lm.prompts(61, (19, 3, 8))
    expected = [tiny_lm.own_tokens(model, row, 12) for row in rows]
    shape = CacheShape(model.config.num_hidden_layers, 2, 6)
    for result in (portable, bound):
        assert tiny_lm.paged_tokens(result.programs, shape, rows, 12, 7) == expected


def test_both_programs_hold_one_copy_of_every_weight(compiled):
    model, imported, portable, bound = compiled("llama")
    for programs in (imported, portable.programs, bound.programs):
        prefill, decode = (p.weights for p in programs)
        assert set(prefill) == set(decode)
        assert all(prefill[n].data_ptr() == decode[n].data_ptr() for n in prefill)
    merged = portable.programs.weights["model.layers.0.self_attn.{q_proj,k_proj,v_proj}.weight"]
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(merged, torch.cat(parts))
    assert portable.programs.weights.nbytes == imported.weights.nbytes


@pytest.mark.slow
def test_gemma_keeps_nothing_that_moves_data(compiled):
    """Norms of queries and keys stand between projection and rotation, in rows as well."""
    _, _, portable, _ = compiled("gemma3")
    for program in portable.programs:
        assert not {"permute", "clone", "cat_1", "neg"} & set(operators(program))
        assert len(calls(program, "rotary")) == 2 * 3
        assert len(calls(program, "fused_norm")) == 6 * 3 + 1
        windows = [arguments(n)["window"] for n in calls(program, "paged_attention")]
        assert windows == [5, 0, 5]
