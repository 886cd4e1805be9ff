"""Peers of one linear layer, ``y[tokens, rows] = x[tokens, columns] @ W.T`` with constant W.

All are dense; the weight may hold zeros, which none of them exploits.
"""

from __future__ import annotations

import torch

from sparsify.bench.peer import Peer
from sparsify.bench.runtimes import onnxruntime_peer, openvino_peer

_OPSET = 20
_IR_VERSION = 9


def torch_linear(weight: torch.Tensor, x: torch.Tensor, threads: int) -> Peer:
    """``torch.nn.functional.linear``."""

    def call() -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.linear(x, weight)

    return Peer("torch", torch.__version__, call, lambda: (call(),), {"num_threads": threads})


def onnxruntime_matmul(weight: torch.Tensor, x: torch.Tensor, threads: int) -> Peer:
    """ONNX MatMul with the weight as initializer ``[columns, rows]``, which it prepacks."""
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.shape
    tokens = x.shape[0]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, rows])],
        [numpy_helper.from_array(weight.detach().t().contiguous().numpy(), "w")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    return onnxruntime_peer(model.SerializeToString(), {"x": x}, threads)


def openvino_matmul(weight: torch.Tensor, x: torch.Tensor, threads: int) -> Peer:
    """OpenVINO MatMul with a constant weight ``[rows, columns]``, transposed."""
    import numpy as np
    import openvino as ov
    import openvino.opset13 as op

    parameter = op.parameter(list(x.shape), np.float32)
    product = op.matmul(parameter, op.constant(weight.detach().numpy()), False, True)
    return openvino_peer(ov.Model([product], [parameter], "linear"), {"0": x}, threads)


MATMUL_PEERS = {
    "torch": torch_linear,
    "onnxruntime": onnxruntime_matmul,
    "openvino": openvino_matmul,
}


def matmul_peers(
    weight: torch.Tensor,
    x: torch.Tensor,
    threads: int,
    names: tuple[str, ...] = ("torch", "onnxruntime", "openvino"),
) -> dict[str, Peer]:
    """Dense peers by name, for a weight ``[rows, columns]`` and ``x[tokens, columns]``."""
    unknown = [name for name in names if name not in MATMUL_PEERS]
    if unknown:
        raise ValueError(f"unknown peers {unknown}; known: {', '.join(MATMUL_PEERS)}")
    return {name: MATMUL_PEERS[name](weight, x, threads) for name in names}
