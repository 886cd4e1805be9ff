"""Handlers of operators: registered for versions that exist, found by version."""

from __future__ import annotations

import inspect

import onnx
import pytest

from sparsify.frontend.onnx.registry import find, handlers, operator


@pytest.mark.parametrize("handler", handlers(), ids=lambda h: f"{h.domain}::{h.operator}-{h.since}")
def test_a_handler_names_an_operator_and_its_own_parameters(handler) -> None:
    # ONNX Runtime has one operator of its own in the domain of ONNX.
    if handler.domain == "" and handler.operator != "SimplifiedLayerNormalization":
        history = [s for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""]
        versions = {s.since_version for s in history if s.name == handler.operator}
        assert versions, "ONNX has no such operator"
        assert handler.since <= max(versions)
    parameters = set(list(inspect.signature(handler.run).parameters)[1:])
    assert handler.host | handler.constants <= parameters


def test_the_newest_handler_that_is_old_enough_is_found() -> None:
    first, second = find("", "GroupNormalization", 18), find("", "GroupNormalization", 22)
    assert first is not None and second is not None
    assert (first.since, second.since) == (18, 21)
    assert find("", "GroupNormalization", 17) is None
    assert find("nowhere", "Relu", 17) is None


def test_a_version_has_one_handler() -> None:
    with pytest.raises(ValueError, match=r"ai\.onnx::Relu of version 1 has"):
        operator("Relu")(lambda node, x: x)
