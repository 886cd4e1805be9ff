"""Chains of views that end in the order in which they began."""

import pytest
import torch
from torch import nn

from sparsify.passes.simplify_views import SimplifyViews

INPUTS = [(torch.randn(b, s, 12),) for b, s in ((1, 1), (3, 7))]


class Body(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.sin())


def heads(x):
    return x.unflatten(-1, (3, 4)).transpose(1, 2)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (lambda x: heads(x).transpose(1, 2).flatten(2), {"sin"}),
        (lambda x: heads(x).transpose(1, 2).contiguous().reshape(x.shape), {"sin"}),
        (lambda x: heads(x).permute(0, 2, 1, 3), {"sin", "reshape", "sym_size"}),
        (lambda x: x.unflatten(-1, (3, 4)).flatten(2), {"sin"}),
    ],
)
def test_what_undoes_itself_goes(body, left, import_model, apply, targets, same_results):
    model = Body(body)
    result = apply(import_model(model, torch.randn(2, 5, 12)), SimplifyViews())
    assert set(targets(result.programs["forward"])) <= left
    same_results(model, result.programs["forward"], INPUTS)
    assert all(d.verdict == "rewritten" for d in result.decisions) and result.decisions


@pytest.mark.parametrize(
    "body",
    [
        heads,
        lambda x: heads(x).flatten(1, 2),
        lambda x: x.unflatten(-1, (3, 4)),
        lambda x: heads(x)[:, :2].transpose(1, 2).flatten(2),
    ],
)
def test_what_reorders_stays(body, import_model, apply, same_results):
    model = Body(body)
    result = apply(import_model(model, torch.randn(2, 5, 12)), SimplifyViews())
    assert result.decisions == ()
    same_results(model, result.programs["forward"], INPUTS)


def test_a_copy_of_what_is_written_stays(import_model, apply, targets):
    class Before(nn.Module):
        """Returns the keys as they were before the append."""

        def forward(self, keys, values, x, pages, count):
            old = keys.clone()
            torch.ops.sparsify.kv_append(keys, values, x, x, pages, count, count, 0, [0, 0])
            return old

    keys = torch.randn(1, 2, 1, 4, 16)
    inputs = (keys, keys.mT.clone(), torch.randn(2, 3, 4), torch.tensor([[1], [0]]).int())
    programs = import_model(Before(), *inputs, torch.tensor([2, 3]))
    result = apply(programs, SimplifyViews())
    assert targets(result.programs["forward"])["clone"] == 1
