"""Fresh random numbers for every test of generated code."""

import os
import secrets

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    """Drawn anew for every test, shown when it fails; SPARSIFY_TEST_SEED sets it."""
    number = int(os.environ.get("SPARSIFY_TEST_SEED", secrets.randbelow(2**31)))
    print(f"SPARSIFY_TEST_SEED={number}")
    torch.manual_seed(number)
    return number
