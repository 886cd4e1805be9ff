"""Every operator of the ONNX domain: its body passes the checker and equals the eager reference."""

from typing import Any

import numpy as np
import pytest
import torch

from sparsify.codegen.operators import CONVERTERS
from sparsify.layouts.stats import exact_in_bfloat16
from sparsify.ops import OPERATORS
from sparsify.ops.onnx import DOMAIN, ONNX_OPERATORS, VERSION
from sparsify.ops.onnx.linear import WEIGHTS, linear
from tests.ops.domain import all_cases
from tests.ops.domain.case import IN, OUT, Case, compare, feeds_of, model_of
from tests.ops.domain.linear import packed

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

CASES = all_cases()
PARAMETERS = [pytest.param(case, id=f"{case.operator.name}-{n}") for n, case in enumerate(CASES)]


def session_of(model: Any, path: str = "") -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = path
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def test_every_operator_of_the_domain_has_cases() -> None:
    assert {case.operator.name for case in CASES} == set(ONNX_OPERATORS)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_every_operator_has_its_five_parts(name: str) -> None:
    operator = OPERATORS[name]
    assert operator.schema.startswith(f"{name}(") and operator.reference and operator.fake
    assert f"{name}.default" in CONVERTERS
    assert name in {onnx_operator.family for onnx_operator in ONNX_OPERATORS.values()}


@pytest.mark.parametrize("case", PARAMETERS)
def test_onnxruntime_gets_what_eager_gets(case: Case) -> None:
    model = model_of(case)
    onnx.checker.check_model(model, full_check=True)
    compare(session_of(model).run(None, feeds_of(case, model)), case)


@pytest.mark.parametrize("case", PARAMETERS)
def test_the_reference_evaluator_gets_what_eager_gets(case: Case) -> None:
    from onnx.reference import ReferenceEvaluator

    model = model_of(case)
    compare(ReferenceEvaluator(model).run(None, feeds_of(case, model)), case)


@pytest.mark.parametrize("storage", WEIGHTS)
def test_the_weight_becomes_dense_when_the_model_is_loaded(storage: str, tmp_path: Any) -> None:
    """Else every call would unpack it."""
    case = next(
        c
        for c in CASES
        if c.attributes.get("storage") == storage and c.operator.name.endswith("BiasGelu")
    )
    session_of(model_of(case), str(tmp_path / "optimised.onnx"))
    optimised = onnx.load(tmp_path / "optimised.onnx")
    assert [node.op_type for node in optimised.graph.node] == ["MatMul", "BiasGelu"]


def test_names_tell_kinds_apart() -> None:
    """No operator has optional inputs, and attributes repeat what the name says."""
    for operator in ONNX_OPERATORS.values():
        schema = operator.op_schema()
        assert schema.domain == DOMAIN and schema.since_version == VERSION
        assert schema.min_input == schema.max_input == len(operator.inputs)
        assert all(attribute.required for attribute in schema.attributes.values())


def test_values_of_a_packed_weight_may_be_bfloat16() -> None:
    weight = torch.randn(OUT, IN).bfloat16().float() * (torch.rand(OUT, IN) < 0.4)
    assert exact_in_bfloat16(weight)
    x = torch.randn(3, IN)
    for storage in WEIGHTS:
        operator = linear(storage, "none", False, False)
        attributes = {"in_features": IN, "out_features": OUT}
        attributes |= {"storage": storage, "activation": "none"}
        case = Case(operator, {"x": x, **packed(weight, storage)}, attributes, (x @ weight.T,))
        model = model_of(case)
        for initializer in model.graph.initializer:
            if initializer.data_type == onnx.TensorProto.FLOAT:
                upper = onnx.numpy_helper.to_array(initializer).view(np.uint32) >> 16
                initializer.raw_data = upper.astype(np.uint16).tobytes()
                initializer.data_type = onnx.TensorProto.BFLOAT16
        onnx.checker.check_model(model, full_check=True)
        compare(session_of(model).run(None, {"x": x.numpy()}), case)
