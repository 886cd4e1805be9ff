"""Activity of features, against counts by hand."""

import pytest
import torch
from torch.nn import functional as F

import sparsify
from sparsify.passes.gating.analyze import CHUNKS, ERRORS
from tests.passes.gating.conftest import Block
from tests.passes.gating.test_recipes import Rectified


@pytest.fixture
def data():
    return 2 * torch.randn(160, 24, generator=torch.Generator().manual_seed(3))


def test_zeros_of_relu_and_their_unions(data):
    model = Rectified().eval()
    found = {(s.site, s.values): s for s in sparsify.analyze_activations(model, calibrated(data))}
    assert found["first", "inputs"].zeros == 0
    with torch.no_grad():
        hidden = F.relu(model.first(data))
    second = found["second", "inputs"]
    assert second.tokens == 160 and second.shape == (24, 40)
    assert second.zeros == pytest.approx(float((hidden == 0).float().mean()))
    for count in CHUNKS:
        union = (hidden != 0).reshape(-1, count, 40).any(1).float().mean()
        assert second.union_nonzero[count] == pytest.approx(float(union))
    assert second.union_nonzero[16] > 0.99 > second.union_nonzero[1]


def calibrated(data):
    return sparsify.Calibration([data])


def test_negligible_features_keep_the_error(data):
    model = Block().eval()
    analysis = sparsify.analyze_activations(model, calibrated(data))
    down = next(s for s in analysis if (s.site, s.values) == ("down.0", "inputs"))
    gates = next(s for s in analysis if (s.site, s.values) == ("{gate,up}.0", "gates"))
    with torch.no_grad():
        opened, factor = F.silu(model.gate[0](data)), model.up[0](data)
        values = {"down": opened * factor, "gates": opened}
        for site, name in ((down, "down"), (gates, "gates")):
            ordered = values[name].abs().flatten().sort().values
            shares = [site.negligible[error] for error in ERRORS]
            assert shares == sorted(shares) and 0 < shares[-1] < 1
            for error, share in site.negligible.items():
                for extra, within in ((0.0, True), (0.01, False)):
                    limit = ordered[round((share + extra) * len(ordered)) - 1]
                    lost = torch.where(values[name].abs() > limit, 0, opened * factor)
                    whole = opened * factor @ model.down[0].weight.T
                    change = (lost @ model.down[0].weight.T).norm() / whole.norm()
                    if share or extra:
                        assert (float(change) <= error) == within
            assert site.spread[0] <= site.spread[1] <= site.spread[2]


def test_what_can_be_analysed(data, portable, tiny_lm):
    block = Block().eval()
    calibration = calibrated(data)
    programs = portable(block)
    by_programs = sparsify.analyze_activations(programs, calibration)
    assert by_programs == sparsify.analyze_activations(programs["forward"], calibration)
    assert by_programs == sparsify.analyze_activations(block, calibration)
    only = sparsify.analyze_activations(block, calibration, ["down.*"])
    assert {s.site for s in only} == {"down.0", "down.1"}
    with pytest.raises(ValueError, match="no linear among the sites"):
        sparsify.analyze_activations(block, calibration, ["nowhere"])
    texts = sparsify.Calibration([[3, 1, 4, 1, 5, 9, 2, 6]])
    analysis = sparsify.analyze_activations(tiny_lm.MODELS["llama"](), texts)
    assert analysis.program == "prefill" and len(analysis.sites) == 2 * 5 + 1
    record = analysis.to_dict()
    assert record["sites"][0]["negligible"].keys() == set(map(str, ERRORS))
    assert analysis.table().row_count == len(analysis.sites)
