"""Runs commands as a user would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sparsify.cli import app

FACTORIES = Path(__file__).with_name("tiny.py")

Cli = Callable[..., Result]


@pytest.fixture(scope="session")
def cli() -> Cli:
    def run(*arguments: object) -> Result:
        # Without a width of the test runner's, tables are as wide as in a pipe.
        return CliRunner(env={"COLUMNS": None}).invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture(scope="session")
def tiny() -> str:
    return f"{FACTORIES}:make"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a one-layer BERT without a tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "bert"
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(path)
    return path
