"""Every operator of the ONNX domain: its body passes the checker and equals the eager reference."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.block_mask import BlockMask
from sparsify.codegen.operators import CONVERTERS
from sparsify.layouts.stats import exact_in_bfloat16
from sparsify.ops import ACTIVATIONS, OPERATORS, PAGE
from sparsify.ops.onnx import DOMAIN, ONNX_OPERATORS, OPSET, VERSION, OnnxOperator
from sparsify.ops.onnx.attention import attention
from sparsify.ops.onnx.block_attention import block_attention
from sparsify.ops.onnx.gated import gated
from sparsify.ops.onnx.kv_cache import APPEND, paged_attention
from sparsify.ops.onnx.lanes import FROM_LANES, TO_LANES
from sparsify.ops.onnx.linear import WEIGHTS, linear
from sparsify.ops.onnx.list_blocks import LIST_BLOCKS
from sparsify.ops.onnx.norm import LAYER, RMS
from sparsify.ops.onnx.rotary import ROTARY

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

TOKENS = [(1, 1), (3, 5), (2, 17)]
OUT, IN = 7, 19
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 3


@dataclass(frozen=True)
class Case:
    """One call: inputs by port, attributes, and what each output must be."""

    operator: OnnxOperator
    inputs: dict[str, torch.Tensor]
    attributes: dict[str, Any]
    expected: tuple[torch.Tensor, ...]


def call(name: str, *args: Any) -> torch.Tensor:
    result: torch.Tensor = OPERATORS[name].overload(*args)
    return result


def packed(weight: torch.Tensor, storage: str) -> dict[str, torch.Tensor]:
    """The tensors of a weight, element by element from the domain's description."""
    nonzeros = [(r, c) for r, c in product(*map(range, weight.shape)) if weight[r, c]]
    values = torch.tensor([float(weight[place]) for place in nonzeros])
    if storage == "csr":
        ends = [sum(r < row for r, _ in nonzeros) for row in range(weight.shape[0] + 1)]
        columns = torch.tensor([c for _, c in nonzeros], dtype=torch.uint8)
        offsets = torch.tensor(ends, dtype=torch.int32)
        return {"values": values, "columns": columns, "row_offsets": offsets}
    if storage == "bitmap":
        bits = torch.zeros(weight.shape[0], -(-weight.shape[1] // 8), dtype=torch.uint8)
        for r, c in nonzeros:
            bits[r, c // 8] |= 1 << c % 8
        return {"bits": bits, "values": values}
    return {"weight": weight}


def linear_cases() -> Iterator[Case]:
    kinds = product(WEIGHTS, ACTIVATIONS, (False, True), (False, True))
    for number, (storage, activation, bias, residual) in enumerate(kinds):
        tokens = TOKENS[number % len(TOKENS)]
        weight = torch.randn(OUT, IN) * (torch.rand(OUT, IN) < (0.4 if number % 5 else 0.0))
        x, b, r = torch.randn(*tokens, IN), torch.randn(OUT), torch.randn(*tokens, OUT)
        y = call(
            "sparse_linear", x, [weight], "dense", OUT, IN,
            b if bias else None, activation, r if residual else None,
        )  # fmt: skip
        inputs = {"x": x, **packed(weight, storage), "bias": b, "residual": r}
        operator = linear(storage, activation, bias, residual)
        attributes = {"in_features": IN, "out_features": OUT}
        attributes |= {"storage": storage, "activation": activation}
        yield Case(operator, of(operator, inputs), attributes, (y,))


def of(operator: OnnxOperator, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {port.name: inputs[port.name] for port in operator.inputs}


def row_cases() -> Iterator[Case]:
    for tokens in TOKENS:
        x, weight, bias = torch.randn(*tokens, IN) * 4 + 1, torch.rand(IN), torch.rand(IN)
        for operator, kind in ((LAYER, "layer"), (RMS, "rms")):
            shift = bias if kind == "layer" else None
            y = call("fused_norm", x, weight, shift, 1e-3, kind)
            inputs = of(operator, {"x": x, "weight": weight, "bias": bias})
            yield Case(operator, inputs, {"epsilon": 1e-3}, (y,))
        turns = {"x": x, "cos": torch.randn(*tokens, 4), "sin": torch.randn(*tokens, 4)}
        y = call("rotary", *turns.values(), 2, 4)
        yield Case(ROTARY, turns, {"heads": 2, "head_dim": 4}, (y,))
        lanes = call("to_lanes", x)
        yield Case(TO_LANES, {"x": x}, {}, (lanes,))
        yield Case(FROM_LANES, {"x": lanes, "leading": torch.tensor(tokens)}, {}, (x,))
        for activation in ACTIVATIONS:
            x = torch.randn(*tokens, 2 * IN)
            inputs = {"x": x}
            y = call("gated", x, activation)
            yield Case(gated(activation), inputs, {"activation": activation}, (y,))


def attention_cases() -> Iterator[Case]:
    for (batch, length), causal in product(TOKENS, (False, True)):
        keys = length + 2
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, keys, 17)
        seen = torch.rand(batch, 1, length, keys) > 0.4
        seen[-1, :, 0] = False  # a query that sees nothing
        masks = {
            "none": [None],
            "mask": [seen, torch.rand(1, HEADS, 1, keys) > 0.3],
            "bias": [torch.randn(batch, HEADS, length, keys).masked_fill(~seen, -torch.inf)],
        }
        for mask_kind, mask in [(kind, mask) for kind, own in masks.items() for mask in own]:
            operator = attention(mask_kind, causal)
            attributes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
            attributes |= {"offsets": [1, 2, 8], "scale": 0.4}
            args = (query, memory, memory, mask, HEADS, KV_HEADS, HEAD_DIM, [1, 2, 8], 0.4, causal)
            inputs = {"query": query, "key": memory, "value": memory, "mask": mask}
            yield Case(
                operator, of(operator, inputs), attributes, (call("fused_attention", *args),)
            )


def banded_cases() -> Iterator[Case]:
    """Windows and soft caps, of every mask; some queries see nothing."""
    kinds = [k for k in product(("none", "mask", "bias"), *([(False, True)] * 3)) if any(k[2:])]
    for number, (mask_kind, causal, windowed, capped) in enumerate(kinds):
        batch, length = TOKENS[number % len(TOKENS)]
        keys = max(1, length - 3)
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, keys, 17)
        seen = torch.rand(batch, 1, length, keys) > 0.4
        masks = {"none": None, "mask": seen}
        masks["bias"] = torch.randn(batch, HEADS, length, keys).masked_fill(~seen, -torch.inf)
        window, sinks = (2, number % 2) if windowed else (0, 0)
        softcap = 1.5 if capped else 0.0
        mask = masks[mask_kind]
        args = (query, memory, memory, mask, HEADS, KV_HEADS, HEAD_DIM, [1, 2, 8], 0.4, causal)
        y = call("fused_attention", *args, [], window, sinks, softcap)
        attributes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
        attributes |= {"offsets": [1, 2, 8], "scale": 0.4}
        attributes |= {"window": window, "sinks": sinks} if windowed else {}
        attributes |= {"softcap": softcap} if capped else {}
        operator = attention(mask_kind, causal, windowed, capped)
        inputs = {"query": query, "key": memory, "value": memory, "mask": mask}
        yield Case(operator, of(operator, inputs), attributes, (y,))


def block_cases() -> Iterator[Case]:
    """Lists for all heads, for each key head and for each head; some queries see nothing."""
    for number, (mask_kind, capped) in enumerate(product(("none", "mask", "bias"), (False, True))):
        batch, length, keys, block = 2, 37, 50, (32, 16)
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, keys, 17)
        lists = [(1, 1), (batch, KV_HEADS), (1, HEADS)][number % 3]
        kinds = torch.randint(0, 3, (*lists, 2, 4), dtype=torch.int8)
        kinds[0, 0, 1] = 0
        blocks = BlockMask.of_kinds(kinds, (length, keys), block).tensors
        masks = {"none": None, "mask": torch.rand(batch, 1, 1, keys) > 0.4}
        mask = {**masks, "bias": torch.randn(1, HEADS, length, keys)}[mask_kind]
        attributes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
        attributes |= {"offsets": [1, 2, 8], "scale": 0.4, "block": list(block)}
        attributes |= {"causal": number % 2, "window": [0, 9][number // 3], "sinks": number}
        y = call(
            "block_attention", query, memory, memory, blocks, mask, HEADS, KV_HEADS, HEAD_DIM,
            [1, 2, 8], 0.4, block, number % 2 == 1, attributes["window"], number,
            1.5 if capped else 0.0,
        )  # fmt: skip
        attributes |= {"skip": 0.0, **({"softcap": 1.5} if capped else {})}
        names = ("counts", "indices", "full_counts", "full_indices")
        inputs = {"query": query, "key": memory, "value": memory, "mask": mask}
        inputs |= dict(zip(names, blocks, strict=True))
        operator = block_attention(mask_kind, capped)
        yield Case(operator, of(operator, inputs), attributes, (y,))


def list_cases() -> Iterator[Case]:
    for shape in ((1, 1, 1, 1), (2, 3, 5, 9)):
        marks = torch.rand(shape) < torch.rand(*shape[:3], 1)
        marks[..., -1, :] = True
        yield Case(LIST_BLOCKS, {"marks": marks}, {}, (call("list_blocks", marks),))


def cache_cases() -> Iterator[Case]:
    for number, (batch, length) in enumerate(TOKENS):
        width = -(-(length + 20) // PAGE)
        total, layer = batch * width + 1, 1
        cache = {
            "keys": torch.randn(2, total, KV_HEADS, HEAD_DIM, PAGE),
            "values": torch.randn(2, total, KV_HEADS, PAGE, HEAD_DIM),
            "pages": torch.randperm(total)[: batch * width].int().reshape(batch, width),
            "starts": torch.arange(batch) * 7 % 20,
            "counts": length - torch.arange(batch) % (length + 1),
        }
        fresh = {"key": torch.randn(batch, length, 7), "value": torch.randn(batch, length, 9)}
        inputs = of(APPEND, {**cache, **fresh})
        after = {name: tensor.clone() for name, tensor in inputs.items()}
        lengths = call("kv_append", *after.values(), layer, [1, 2])
        expected = (after["keys"].clone(), after["values"].clone(), lengths)
        yield Case(APPEND, inputs, {"layer": layer, "offsets": [1, 2]}, expected)
        # A page that no sequence has may hold anything.
        free = set(range(total)) - set(cache["pages"].flatten().tolist())
        after["keys"][:, list(free)] = torch.nan
        after["values"][:, list(free)] = torch.nan
        for softcap in (0.0, 1.5):
            operator, window = paged_attention(bool(softcap)), [0, 5, 1][number]
            query = torch.randn(batch, length, 14)
            operands = of(operator, {**after, "query": query, "lengths": lengths})
            attributes = {"layer": layer, "heads": HEADS, "offset": 1, "scale": 0.4}
            y = call("paged_attention", *operands.values(), *attributes.values(), window, softcap)
            attributes |= {"window": window} | ({"softcap": softcap} if softcap else {})
            yield Case(operator, operands, attributes, (y,))


def all_cases() -> list[Case]:
    torch.manual_seed(0)
    return [
        *linear_cases(),
        *row_cases(),
        *attention_cases(),
        *banded_cases(),
        *block_cases(),
        *list_cases(),
        *cache_cases(),
    ]


CASES = all_cases()
PARAMETERS = [pytest.param(case, id=f"{case.operator.name}-{n}") for n, case in enumerate(CASES)]


def model_of(case: Case) -> Any:
    """A model of the one node, constant ports as initializers."""
    helper = onnx.helper

    def info(name: str, tensor: torch.Tensor) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(tensor.numpy().dtype)
        return helper.make_tensor_value_info(name, kind, [None] * tensor.dim())

    ports = {port.name: port for port in case.operator.inputs}
    node = helper.make_node(
        case.operator.name,
        list(ports),
        [port.name for port in case.operator.outputs],
        domain=DOMAIN,
        **case.attributes,
    )
    constants = {n: t for n, t in case.inputs.items() if ports[n].constant}
    graph = helper.make_graph(
        [node],
        "one",
        [info(n, t) for n, t in case.inputs.items() if n not in constants],
        [info(p.name, t) for p, t in zip(case.operator.outputs, case.expected, strict=True)],
        [onnx.numpy_helper.from_array(t.numpy(), n) for n, t in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [case.operator.function()]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)


def feeds_of(case: Case, model: Any) -> dict[str, np.ndarray]:
    return {value.name: case.inputs[value.name].numpy() for value in model.graph.input}


def session_of(model: Any, path: str = "") -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = path
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def compare(found: list[np.ndarray], case: Case) -> None:
    for array, expected in zip(found, case.expected, strict=True):
        torch.testing.assert_close(
            torch.from_numpy(array), expected, atol=1e-5, rtol=1e-5, equal_nan=True
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
