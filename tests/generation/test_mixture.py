"""A language model with experts, from weights to text."""

import pytest
import torch

import sparsify
from tests import tiny_lm


@pytest.mark.parametrize("way", ["eager", pytest.param("grouped_mm", marks=pytest.mark.slow)])
def test_a_mixture_writes_what_transformers_writes(way: str) -> None:
    model = tiny_lm.MODELS["mixtral"]()
    model.config._experts_implementation_internal = way
    compiled = sparsify.compile(model, strict=True, num_threads=1)
    assert model.config._experts_implementation_internal == way
    sites = {d.site for d in compiled.report.final() if d.operator == "experts"}
    assert sites == {f"model.layers.{layer}.mlp.experts" for layer in range(2)}
    rows = tiny_lm.prompts(61, (9, 3, 20))
    found = list(compiled.stream(rows, max_new_tokens=12))
    for number, row in enumerate(rows):
        expected = tiny_lm.own_tokens(model, row, 12)
        assert [int(tokens[number]) for tokens in found] == expected


@pytest.mark.slow
def test_a_mixture_as_a_plain_module() -> None:
    model = tiny_lm.MODELS["mixtral"]()
    model.config.use_cache = False
    ids = torch.randint(1, 61, (2, 9))
    compiled = sparsify.compile(model, (ids,))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(compiled(ids).logits, expected, atol=1e-4, rtol=1e-4)
