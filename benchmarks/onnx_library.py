"""The operators that ONNX Runtime has a counterpart of: our kernels against their function bodies.

    python -m benchmarks.onnx_library

Each operator runs twice in ONNX Runtime, in turns: as a node of the library, and as the standard
operators of its body. Ratios are ours over theirs, below 1 when we are faster. An operator whose
body is as fast is left to it (`sparsify.codegen.emit.ort_ops.operators`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from sparsify import onnxruntime as ours
from sparsify.bench import interleave, ratio
from sparsify.bench.runtimes import onnxruntime_peer
from sparsify.ops.onnx import DOMAIN, ONNX_OPERATORS, OPSET, VERSION

FEATURES, HEADS, HEAD_DIM = 384, 12, 32


def cases(tokens: int) -> Iterator[tuple[str, dict[str, torch.Tensor], dict[str, Any]]]:
    """(operator, inputs in order, attributes) on one sequence."""
    x, scale = torch.randn(1, tokens, FEATURES), torch.rand(FEATURES)
    yield "LayerNorm", {"x": x, "weight": scale, "bias": scale}, {"epsilon": 1e-5}
    yield "RmsNorm", {"x": x, "weight": scale}, {"epsilon": 1e-5}
    qkv = torch.randn(1, tokens, 3 * FEATURES)
    attributes = {"heads": HEADS, "kv_heads": HEADS, "head_dim": HEAD_DIM, "scale": HEAD_DIM**-0.5}
    attributes["offsets"] = [0, FEATURES, 2 * FEATURES]
    operands = {"query": qkv, "key": qkv, "value": qkv}
    yield "Attention", operands, attributes
    yield "AttentionCausal", operands, attributes
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    yield "AttentionMask", {**operands, "mask": mask}, attributes
    turns = {"cos": torch.rand(1, tokens, HEAD_DIM), "sin": torch.rand(1, tokens, HEAD_DIM)}
    yield "Rotary", {"x": x, **turns}, {"heads": HEADS, "head_dim": HEAD_DIM}
    gates = torch.randn(1, tokens, 8 * FEATURES)
    for activation in ("silu", "gelu", "gelu_tanh"):
        name = "Gated" + "".join(part.capitalize() for part in activation.split("_"))
        yield name, {"x": gates}, {"activation": activation}


def model_of(name: str, inputs: dict[str, torch.Tensor], attributes: dict[str, Any]) -> bytes:
    """A file of one node and its function body."""
    from onnx import TensorProto, helper

    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(t.numpy().dtype), t.shape)
        for n, t in inputs.items()
    ]
    node = helper.make_node(name, list(inputs), ["y"], domain=DOMAIN, **attributes)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 3)
    made = helper.make_model(
        helper.make_graph([node], "one", infos, [result]),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[ONNX_OPERATORS[name].function()],
        ir_version=8,
    )
    return bytes(made.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    library = ours.library()
    for tokens in given.tokens:
        for name, inputs, attributes in cases(tokens):
            model = model_of(name, inputs, attributes)
            calls = {
                "kernel": onnxruntime_peer(model, inputs, given.threads, library),
                "body": onnxruntime_peer(model, inputs, given.threads),
            }
            samples = interleave(calls, rounds=5, seconds=0.02, settle=0.02)
            times = "  ".join(f"{n} {s.median * 1e6:8.1f} us" for n, s in samples.items())
            print(f"{tokens:4d} tokens  {name:16s} {times}  "
                  f"{ratio(samples['kernel'], samples['body'])}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
