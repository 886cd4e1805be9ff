"""Models that are damaged at random are refused with a reason, or right."""

import os
import signal

import pytest

from tests.frontend.onnx.fuzz import FINE, checked, isolated, models, small_model
from tests.frontend.onnx.mutations import damaged


def test_the_undamaged_model_is_right(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "small.onnx"
    path.write_bytes(small_model().SerializeToString())
    assert isolated(lambda: checked(path, "small")) == "right"


def test_what_does_not_end_is_told():
    assert "ended by signal" in isolated(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert "MemoryError" in isolated(lambda: str(len(bytearray(2**36))))


@pytest.mark.slow
@pytest.mark.parametrize("name", models())
def test_damaged_models(name, tmp_path):
    model, path = models()[name], tmp_path / "damaged.onnx"
    for seed in range(15 if name == "small" else 5):
        what, data = damaged(model, seed)
        path.write_bytes(data)
        result = isolated(lambda: checked(path, name))
        assert result in FINE, f"seed {seed}, {what}: {result}"
