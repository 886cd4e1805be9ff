"""Rounding weights to bfloat16: what changes, by how much, and what stays."""

import pytest
import torch
from torch import nn

import sparsify
from sparsify.layouts import Bitmap, WeightStats
from sparsify.pruning import RoundWeights, Unstructured, prune


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))


def test_weights_become_exact_and_keep_their_type() -> None:
    before = model()
    after = prune(before, sparsify.RoundWeights())
    for old, new in ((before[0], after[0]), (before[2], after[2])):
        assert new.weight.dtype == torch.float32
        assert torch.equal(new.weight, old.weight.bfloat16().float())
        assert torch.equal(new.bias, old.bias)
        stats = WeightStats.of(new.weight)
        assert stats.bf16_exact and Bitmap(value_bits=16).fits(stats) is None
    assert not WeightStats.of(before[0].weight).bf16_exact


def test_the_report_states_the_relative_error() -> None:
    rounded = model()
    before = [rounded[i].weight.detach().clone() for i in (0, 2)]
    report = RoundWeights("bfloat16").apply(rounded)
    assert [layer.names for layer in report] == [("0",), ("2",)]
    for layer, old in zip(report, before, strict=True):
        expected = (old.bfloat16().double() - old.double()).norm() / old.double().norm()
        assert layer.error == pytest.approx(float(expected))
        assert 0 < layer.error < 2.0**-8
    assert report.error == max(layer.error for layer in report)
    assert report.to_dict()["layers"][0]["shape"] == [30, 20]
    assert RoundWeights().apply(rounded).error == 0  # already exact


def test_zeros_stay_and_tied_weights_are_rounded_once() -> None:
    tied = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    tied[1].weight = tied[0].weight
    Unstructured(0.5).apply(tied)
    zeros = tied[0].weight == 0
    (layer,) = RoundWeights().apply(tied)
    assert layer.names == ("0", "1") and tied[1].weight is tied[0].weight
    assert torch.equal(tied[0].weight == 0, zeros)


def test_half_precision_embeddings_and_skipped_layers_stay() -> None:
    mixed = nn.ModuleDict({"table": nn.Embedding(8, 4), "kept": nn.Linear(4, 4)})
    mixed["short"] = nn.Linear(4, 8, dtype=torch.bfloat16)
    before = {name: module.weight.detach().clone() for name, module in mixed.items()}
    (layer,) = RoundWeights(skip=("kept",)).apply(mixed)
    assert layer.names == ("short",) and layer.error == 0
    for name, module in mixed.items():
        assert torch.equal(module.weight, before[name])


def test_only_bfloat16_is_known() -> None:
    with pytest.raises(ValueError, match="dtype='float16' must be 'bfloat16'"):
        RoundWeights("float16")  # type: ignore[arg-type]
