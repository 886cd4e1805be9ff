"""Every operator of the domain has a kernel in the library, or a reason why its body runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparsify.codegen.emit.ort_ops.operators import FUNCTION_BODIES, served
from sparsify.ops.onnx import ONNX_OPERATORS
from tests.ops.domain.case import Case, compare, feeds_of, model_of


def test_every_operator_is_served_or_left_to_its_body_with_a_reason() -> None:
    left = {op.family for op in ONNX_OPERATORS.values()} - {op.family for op in served()}
    assert left == set(FUNCTION_BODIES)
    assert all(FUNCTION_BODIES.values())


def test_results_are_those_of_eager_pytorch(domain: list[Case], library: Path) -> None:
    """The cases of all kinds: several shapes, masks that hide all, weights without a nonzero."""
    import onnxruntime

    for case in domain:
        model = model_of(case)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        try:
            compare(session.run(None, feeds_of(case, model)), case)
        except Exception as error:
            raise AssertionError(f"{case.operator.name} {case.attributes}") from error


def test_kernels_run_and_not_bodies(domain: list[Case], library: Path, tmp_path: Path) -> None:
    """A body would show as nodes of standard operators in the profile."""
    import onnxruntime

    names = {operator.name for operator in served()}
    cases = {case.operator.name: case for case in domain if case.operator.name in names}
    assert cases.keys() == names
    for name, case in cases.items():
        model = model_of(case)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "p")
        options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        session.run(None, feeds_of(case, model))
        assert _operators_run(Path(session.end_profiling())) == {name}


def _operators_run(profile: Path) -> set[str]:
    events: list[dict[str, Any]] = json.loads(profile.read_text())
    nodes = [event for event in events if event.get("cat") == "Node"]
    assert nodes
    return {event["args"]["op_name"] for event in nodes if "op_name" in event["args"]}


@pytest.mark.parametrize("attribute", ["in_features", "out_features"])
def test_a_damaged_weight_is_refused_when_the_session_is_made(
    attribute: str, domain: list[Case], library: Path
) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    kinds = [f"Linear{storage}Bias" for storage in ("Csr", "Bitmap", "Dense")]
    for case in (c for c in domain if c.operator.name in kinds):
        smaller = {**case.attributes, attribute: case.attributes[attribute] - 9}
        smaller[attribute] = max(1, smaller[attribute])
        model = model_of(
            Case(case.operator, case.inputs, smaller, case.expected)
        ).SerializeToString()
        with pytest.raises(Exception, match="linear"):
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
