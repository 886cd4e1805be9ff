"""Unstructured pruning: exact counts, ties, scopes, and what is left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from sparsify.pruning import Unstructured, prune


def zeros(tensor: torch.Tensor) -> int:
    return int((tensor == 0).sum())


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.77, 0.9, 1, 1.0])
def test_each_layer_has_exactly_the_rounded_count(sparsity: float) -> None:
    model = prune(two_layers(), Unstructured(sparsity))
    for layer in (model[0], model[2]):
        assert zeros(layer.weight) == round(sparsity * layer.weight.numel())
        assert zeros(layer.bias) == 0


def test_the_smallest_magnitudes_go_and_the_rest_is_untouched() -> None:
    before = two_layers()
    after = prune(before, Unstructured(0.6))
    for old, new in ((before[0], after[0]), (before[2], after[2])):
        gone = new.weight == 0
        assert old.weight[gone].abs().max() <= old.weight[~gone].abs().min()
        assert torch.equal(old.weight[~gone], new.weight[~gone])


def test_ties_are_cut_to_the_exact_count_in_order() -> None:
    layer = nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    pruned = prune(layer, Unstructured(0.37))
    assert torch.equal((pruned.weight == 0).flatten(), torch.arange(100) < 37)


def test_zeros_that_are_there_count() -> None:
    layer = nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        layer.weight[:6] = 0
    assert zeros(prune(layer, Unstructured(0.8)).weight) == 80
    unchanged = prune(layer, Unstructured(0.3))
    assert torch.equal(unchanged.weight, layer.weight)


def test_global_scope_reaches_the_total_and_takes_more_from_small_weights() -> None:
    model = two_layers()
    with torch.no_grad():
        model[2].weight.mul_(10)
    report = Unstructured(0.5, scope="global").apply(model)
    total = model[0].weight.numel() + model[2].weight.numel()
    assert zeros(model[0].weight) + zeros(model[2].weight) == round(0.5 * total)
    first, second = report.layers
    assert first.sparsity > 0.6
    assert second.sparsity < 0.2


def test_a_copy_is_pruned_unless_asked_otherwise() -> None:
    model = two_layers()
    untouched = copy.deepcopy(model.state_dict())
    assert prune(model, Unstructured(0.5)) is not model
    assert all(torch.equal(model.state_dict()[n], t) for n, t in untouched.items())
    assert prune(model, Unstructured(0.5), inplace=True) is model
    assert zeros(model[0].weight) == 96


def test_convolutions_and_attention_projections_are_pruned() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 8, 3),
            "attention": nn.MultiheadAttention(8, 2),
            "norm": nn.LayerNorm(8),
        }
    )
    report = Unstructured(0.5).apply(model)
    assert report.names == ("conv", "attention.in_proj_weight", "attention.out_proj")
    assert [layer.sparsity for layer in report] == [0.5, 0.5, 0.5]
    assert zeros(model["norm"].weight) == 0


class Tied(nn.Module):
    def __init__(self, head_tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.up.weight
        self.head = nn.Linear(8, 20, bias=False)
        if head_tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.up(self.embedding(tokens))))


def test_tied_weights_are_pruned_once_and_stay_tied() -> None:
    model = prune(Tied(head_tied=False), Unstructured(0.5))
    assert model.up.weight is model.again.weight
    assert zeros(model.up.weight) == 32
    report = Unstructured(0.5).apply(model)
    assert [layer.names for layer in report] == [("up", "again"), ("head",)]
    assert report.sparsity == 0.5


def test_an_embedding_is_never_pruned_even_where_a_head_shares_it() -> None:
    model = Tied(head_tied=True)
    assert Unstructured(0.5).apply(model).names == ("up", "again")
    assert zeros(model.embedding.weight) == 0


@pytest.mark.parametrize("pattern", ["head", "he*", "again", "*ga*"])
def test_skipped_layers_stay_dense(pattern: str) -> None:
    model = Tied(head_tied=False)
    names = Unstructured(0.5, skip=(pattern,)).apply(model).names
    assert names == (("up", "again") if "he" in pattern else ("head",))


def test_skipping_a_module_skips_what_is_inside() -> None:
    model = nn.ModuleDict({"encoder": two_layers(), "pooler": two_layers()})
    assert Unstructured(0.5, skip="pooler").apply(model).names == ("encoder.0", "encoder.2")


def test_half_precision_weights_are_pruned_exactly() -> None:
    model = prune(two_layers().bfloat16(), Unstructured(0.5, scope="global"))
    assert zeros(model[0].weight) + zeros(model[2].weight) == round(0.5 * 252)
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("head_tied", [False, True])
def test_an_exported_program_is_pruned_like_its_module(head_tied: bool) -> None:
    module = Tied(head_tied)
    tokens = torch.randint(0, 20, (3, 4))
    exported = torch.export.export(module, (tokens,))
    pruned = prune(exported, Unstructured(0.5))
    expected = prune(module, Unstructured(0.5))(tokens)
    torch.testing.assert_close(pruned.module()(tokens), expected)
    torch.testing.assert_close(exported.module()(tokens), module(tokens))


def test_refusals_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"sparsity=80 must lie in 0..1; for 80% write 0.8"):
        Unstructured(80)
    for wrong in (-0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in 0..1"):
            Unstructured(wrong)
    with pytest.raises(TypeError, match="must be a number"):
        Unstructured("0.8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scope='block' must be 'layer' or 'global'"):
        Unstructured(0.5, scope="block")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'decoder\*' matches no prunable layer; there are 2"):
        prune(two_layers(), Unstructured(0.5, skip=("decoder*",)))
    with pytest.raises(ValueError, match="no prunable layer left: of 2"):
        prune(two_layers(), Unstructured(0.5, skip=("*",)))
    with pytest.raises(ValueError, match="no prunable layer left: of 0"):
        prune(nn.ReLU(), Unstructured(0.5))
    with pytest.raises(TypeError, match=r"torch.nn.Module or .*, not dict"):
        prune({}, Unstructured(0.5))  # type: ignore[type-var]
    with pytest.raises(TypeError, match="no pruning method"):
        prune(two_layers(), Unstructured)  # type: ignore[arg-type]


def test_bad_weights_are_named() -> None:
    model = two_layers()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weight of 2, shape \(5, 12\), holds 1 NaN"):
        prune(model, Unstructured(0.5))
    prune(model, Unstructured(0.5, skip="2"))
    with pytest.raises(ValueError, match=r"weight of 0.* is on the meta device"):
        prune(nn.Sequential(nn.Linear(4, 4, device="meta")), Unstructured(0.5))


def test_a_computed_weight_is_refused() -> None:
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"0.weight is computed from other parameters"):
        prune(normed, Unstructured(0.5))
    masked = nn.Sequential(nn.Linear(4, 4))
    l1_unstructured(masked[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"0.weight is computed from other parameters"):
        Unstructured(0.5).apply(masked)


def test_the_report_counts_before_and_after() -> None:
    model = prune(two_layers(), Unstructured(0.25))
    record = Unstructured(0.75).apply(model).to_dict()
    assert record["sparsity"] == 0.75
    assert record["layers"][0] == {
        "names": ["0"],
        "shape": [12, 16],
        "zeros_before": 48,
        "zeros_after": 144,
        "sparsity": 0.75,
    }


def test_experts_are_pruned_as_one_weight() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 5))
            self.down_proj = nn.Parameter(torch.randn(4, 5, 3))
            self.scale = nn.Parameter(torch.randn(4, 5, 3))

    model = nn.ModuleDict({"experts": Experts()})
    Unstructured(0.5).apply(model)
    zeros = {name: int((p == 0).sum()) for name, p in model.named_parameters()}
    assert zeros == {"experts.gate_up_proj": 60, "experts.down_proj": 30, "experts.scale": 0}
