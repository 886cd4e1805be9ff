"""Calibration: what counts as a batch, what is seen, and recipes that are passes."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsify
from sparsify.calibration import Calibration, as_calibration
from sparsify.contracts import GraphPass, PassContext
from sparsify.frontend.causal_lm import import_causal_lm
from sparsify.frontend.torch import import_torch
from sparsify.passes.graph import aten
from sparsify.report import Decision
from sparsify.rewriter import Rewriter
from tests.tiny_lm import MODELS, portable_programs


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(x)) * scale)


EXAMPLES = ((torch.randn(5, 4),), {"scale": torch.randn(8)})


def test_results_on_the_way_are_those_of_the_module() -> None:
    model = TwoInputs().eval()
    batches = [{"x": torch.randn(n, 4), "scale": torch.randn(8)} for n in (2, 5)]
    program = import_torch(model, ((), batches[0]))["forward"]
    linears = [n for n in program.graph.nodes if n.target == aten.linear.default]
    seen: list[torch.Tensor] = []
    outputs = Calibration(batches).run(program, lambda _, y: seen.append(y), linears[:1])
    with torch.no_grad():
        for batch, hidden, output in zip(batches, seen, outputs, strict=True):
            torch.testing.assert_close(hidden, model.first(batch["x"]))
            torch.testing.assert_close(output[0], model(**batch))


def test_texts_run_through_prefill_of_a_language_model() -> None:
    model = MODELS["llama"]()
    program = import_causal_lm(model)["prefill"]
    texts = [[3, 1, 4, 1, 5], torch.arange(40) % 61]
    outputs = Calibration(texts).run(program, lambda *_: None, ())
    for text, found in zip(texts, outputs, strict=True):
        expected = model(torch.as_tensor(text)[None]).logits[:, -1]
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batches", [[], ["text"], [3]])
def test_what_is_no_batch_is_refused(batches: Iterable[object]) -> None:
    with pytest.raises((TypeError, ValueError), match="calibration"):
        Calibration(batches)


def test_a_recipe_takes_a_calibration_or_none() -> None:
    given = Calibration([[1, 2, 3]])
    assert as_calibration("Quest", given) is given and as_calibration("Quest", None) is None
    with pytest.raises(TypeError, match=r"Quest: calibration must be .*Calibration, not list"):
        as_calibration("Quest", [[1, 2, 3]])


def test_batches_of_another_structure_are_refused() -> None:
    program = import_torch(TwoInputs().eval(), EXAMPLES)["forward"]
    with pytest.raises(TypeError, match="keywords"):
        Calibration([torch.randn(5, 4)]).run(program, lambda *_: None, ())
    text = portable_programs("llama")["prefill"]
    with pytest.raises(TypeError, match="token ids"):
        Calibration([torch.randn(5, 4)]).run(text, lambda *_: None, ())


def test_equal_batches_have_one_digest() -> None:
    x = torch.randn(3, 4)
    assert Calibration([x]).digest() == Calibration([(x.clone(),)]).digest()
    assert Calibration([x]) != Calibration([x + 1])
    assert Calibration([x]) != Calibration([x.reshape(4, 3)])


def test_arrays_count_with_every_element() -> None:
    one, other = np.zeros((5000, 4), np.float32), np.zeros((5000, 4), np.float32)
    other[2500, 2] = 1
    assert Calibration([one]) != Calibration([other])
    assert Calibration([one]) == Calibration([torch.from_numpy(one)])


@dataclass(frozen=True)
class Halve(GraphPass):
    """Halves what every ReLU gives, to see that a recipe may be a pass."""

    calibration: Calibration
    name = "halve"

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            if node.target == aten.mul.Tensor:
                with rewriter.graph.inserting_after(node):
                    half = rewriter.call(aten.mul.Scalar, (node, 0.5))
                node.replace_all_uses_with(half, delete_user_cb=lambda user, h=half: user is not h)
                yield Decision(node.name, "mul", "rewritten", "halved", self.name)


def test_a_recipe_may_be_a_pass() -> None:
    model = TwoInputs().eval()
    recipes = (sparsify.Unstructured(0.5), Halve(Calibration([EXAMPLES[0]])))
    compiled = sparsify.compile(model, EXAMPLES, recipe=recipes, cache=False)
    pruned = sparsify.prune(model, recipes[0])
    hidden = F.relu(pruned.first(EXAMPLES[0][0])) * EXAMPLES[1]["scale"] * 0.5
    found = compiled(*EXAMPLES[0], **EXAMPLES[1])
    torch.testing.assert_close(found, pruned.second(hidden), atol=1e-5, rtol=1e-5)
    assert any(d.made_by == "halve" for d in compiled.report.decisions)
