"""The worked example of docs/add-a-selector.md, run as it stands there."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import sparsify
from sparsify import ops
from sparsify.ops import PAGE, CacheShape
from sparsify.selectors import PAGE_SELECTORS, Exact, page_selector

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "add-a-selector.md"
SPEC = "ranked{rank=4}"
LENGTHS = (150, 10)


@pytest.fixture(scope="module")
def example(tiny_lm: ModuleType) -> Iterator[dict[str, Any]]:
    """What the document's two blocks of code define; forgets afterwards what they registered."""
    names: dict[str, Any] = {
        "__name__": "ranked",
        "sparsify": sparsify,
        "model": tiny_lm.MODELS["llama"](),
        "texts": [torch.arange(200) * 7 % 61],
        "prompts": tiny_lm.prompts(61, LENGTHS),
    }
    with PAGE_SELECTORS.scope():
        for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
            exec(compile(block, str(DOCUMENT), "exec"), names)
        yield names
    assert "ranked" not in PAGE_SELECTORS.names()


def test_a_model_generates_with_it(example: dict[str, Any], tiny_lm: ModuleType) -> None:
    """As the references do, between regions that are compiled."""
    programs, rows = example["lm"].compiled.portable_programs, example["prompts"]
    expected = tiny_lm.paged_tokens(programs, CacheShape(2, 2, 6), rows, 8, 150)
    assert example["tokens"][:, 150:].tolist() == expected
    everything_read = [tiny_lm.own_tokens(example["model"], row, 8) for row in rows]
    assert expected[0] != everything_read[0] and expected[1] == everything_read[1]


def test_the_report_says_where_it_runs(example: dict[str, Any]) -> None:
    lm = example["lm"]
    kinds = {
        entry: {region.kind for region in lm.compiled.entry(entry).plan.regions}
        for entry in ("prefill", "decode")
    }
    assert kinds["prefill"] == {"compiled"} and len(kinds["decode"]) == 2
    reasons = " ".join(f.reason for f in lm.report.fallbacks)
    assert f"selector {SPEC} has no kernel, only its reference" in reasons
    for layer in (0, 1):
        said, costs = (d for d in lm.report if d.site == f"decode.layers.{layer}.attention")
        assert said.verdict == "rewritten" and f"pages that {SPEC} selects" in said.reason
        assert costs.density is not None and 0 < costs.density < 1


def test_calibration_tells_what_it_costs(example: dict[str, Any]) -> None:
    heads = [d for d in example["lm"].report.decisions if d.operator == "attention head"]
    assert len(heads) == 8 and {d.made_by for d in heads} == {"ranked_pages"}
    assert all(0 < d.mass < 1 and d.error > 0 for d in heads)


def test_exported_to_onnx_it_is_an_error(example: dict[str, Any], tmp_path: Path) -> None:
    compiled = example["lm"].compiled
    with pytest.raises(ValueError, match="ranked: has no ONNX function body"):
        compiled.export_onnx(tmp_path / "decode.onnx", entry="decode")


def test_the_pages_are_those_whose_fourth_product_is_largest(example: dict[str, Any]) -> None:
    width, head_dim, budget = 12, 6, 5
    keys, query = torch.randn(1, width, 1, head_dim, PAGE), torch.randn(1, 1, 2 * head_dim)
    pages, total = torch.randperm(width)[None].int(), torch.tensor([width * PAGE - 3])
    args = (pages, total, torch.tensor([1]), 0, 2, 0)
    found = ops.select_pages.reference(query, keys, [], *args, SPEC, budget)[0, 0, 0]

    def score(page: int) -> float:
        of_page = keys[0, int(pages[0, page]), 0]
        return max(float(sorted(q @ of_page)[-4]) for q in query.view(2, head_dim))

    best = sorted(range(1, width - 1), key=score)[2 - budget :]
    assert found.tolist() == [0, *sorted(best), width - 1]


def test_of_rank_1_it_is_the_exact_selector(example: dict[str, Any]) -> None:
    query, keys = torch.randn(3, 7), torch.randn(5, 7, PAGE)
    found = page_selector("ranked{rank=1}").scores(query, keys)
    torch.testing.assert_close(found, Exact().scores(query, keys))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("ranked", "give its option 'rank'"),
        ("ranked{place=1}", "no option 'place'"),
        ("rank", "unknown page selector 'rank'; known page selectors: .*latest.*ranked"),
        ("pooled", "unknown page selector"),
    ],
)
def test_other_specs_are_refused(example: dict[str, Any], spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        page_selector(spec)


def test_tensors_that_it_does_not_read_are_refused(example: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ranked.*takes no tensors .* 1 were given"):
        page_selector(SPEC).named([torch.zeros(1)])
