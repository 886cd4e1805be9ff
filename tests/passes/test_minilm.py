"""All passes on the real encoder: the specialised program still runs in PyTorch, and matches."""

import copy

import pytest
import torch

from sparsify.contracts import PassContext
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, SPECIALISE, run_pipeline

LAYERS = 6


@pytest.fixture(scope="module")
def pruned(minilm):
    model = copy.deepcopy(minilm)
    with torch.no_grad():
        for layer in model.encoder.modules():
            if isinstance(layer, torch.nn.Linear):
                scores = layer.weight.abs()
                layer.weight.mul_(scores > scores.flatten().kthvalue(scores.numel() * 4 // 5)[0])
    return model


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids with the last row half padded."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length // 2 + 1 :] = 0
    return {
        "input_ids": torch.randint(1000, 20000, (batch, length), generator=generator),
        "attention_mask": mask,
    }


@pytest.fixture(scope="module")
def specialised(pruned, cost):
    programs = import_torch(pruned, tokens(2, 9))
    return programs, run_pipeline(programs, (*PORTABLE, *SPECIALISE), PassContext(cost=cost))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 7, 33])
def test_results_match_the_model(batch, length, pruned, specialised):
    inputs = tokens(batch, length)
    with torch.no_grad():
        expected = pruned(**inputs)
    found = specialised[1].programs["forward"].run(**inputs)
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


def test_one_way_in_and_one_way_out(specialised, targets):
    """And one for the pooler, which reads one token of each of any number of sequences."""
    program = specialised[1].programs["forward"]
    count = targets(program)
    assert count["fused_attention"] == LAYERS
    assert count["sparse_linear"] == 4 * LAYERS + 1
    assert count["fused_norm"] == 2 * LAYERS + 1
    assert (count["to_lanes"], count["from_lanes"]) == (2, 2)
    assert not {"linear", "layer_norm", "gelu", "permute", "scaled_dot_product_attention"} & set(
        count
    )
    entry = next(n for n in program.graph.nodes if "to_lanes" in str(n.target))
    assert entry.args[0].target == torch.ops.aten.add.Tensor


def test_every_site_has_one_storage_decision(specialised):
    chosen = [d for d in specialised[1].decisions if d.made_by == "select_layout"]
    assert len(chosen) == len({d.site for d in chosen}) == 4 * LAYERS + 1
    dense = [d.site for d in chosen if d.verdict == "dense"]
    assert dense == ["pooler.dense"]
    assert "encoder.layer.3.attention.self.{query,key,value}" in {d.site for d in chosen}


def test_dynamic_shapes_survive(specialised):
    before, result = specialised
    after = result.programs["forward"].exported
    assert after.range_constraints == before["forward"].exported.range_constraints
    output = next(n for n in after.graph.nodes if n.op == "output").args[0][0]
    assert sum(isinstance(e, torch.SymInt) for e in output.meta["val"].shape) == 2


def test_encoder_weights_shrink(specialised, pruned):
    chosen = [d for d in specialised[1].decisions if d.made_by == "select_layout"]
    encoder = [d for d in chosen if d.site.startswith("encoder")]
    stored = sum(d.bytes_stored for d in encoder)
    assert stored < 0.45 * sum(d.bytes_dense for d in encoder)
    names = specialised[1].programs.weights
    assert not [n for n in names if n.endswith(("query.weight", "output.dense.weight"))]
