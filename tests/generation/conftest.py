"""Small language models, compiled once."""

from collections.abc import Callable
from typing import Any

import pytest

import sparsify
from sparsify.generation import CompiledCausalLM


@pytest.fixture(scope="session")
def pair(tiny_lm: Any) -> Callable[[str], tuple[Any, CompiledCausalLM]]:
    """A model of transformers by name, and the same compiled."""
    made: dict[str, tuple[Any, CompiledCausalLM]] = {}

    def get(name: str) -> tuple[Any, CompiledCausalLM]:
        if name not in made:
            model = tiny_lm.MODELS[name]()
            made[name] = model, sparsify.compile(model, num_threads=2)
        return made[name]

    return get
