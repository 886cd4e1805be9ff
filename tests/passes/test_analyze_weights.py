"""Weights are measured before and after they are packed, under the same names."""

import torch
from torch import nn

from sparsify.passes.analyze_weights import AnalyzeWeights
from sparsify.passes.sparse_linear import SparseLinear


def test_measures_every_linear_and_changes_nothing(import_model, apply):
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[:, 2:] = 0
    programs = import_model(model, torch.randn(3, 8))
    plain = apply(programs, AnalyzeWeights())
    assert plain.programs is programs and plain.decisions == ()
    stats = plain.analysis["0"]
    assert (stats.shape, stats.nnz, stats.dead_rows, stats.dead_columns) == ((4, 8), 6, 1, 6)
    assert plain.analysis["2"].density == 1.0
    packed = apply(programs, SparseLinear(), AnalyzeWeights())
    assert packed.analysis == plain.analysis


def test_a_tied_weight_is_measured_once(import_model, apply):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    result = apply(import_model(model, torch.randn(3, 4)), AnalyzeWeights())
    assert len(result.analysis) == 1
