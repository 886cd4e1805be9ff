"""Mixtures of experts: a Mixtral-shaped block, and MiniLM with its networks split into experts.

    python -m benchmarks.moe
    python -m benchmarks.moe --tokens 128 512 --threads 1
    python -m benchmarks.moe --minilm

The block has 8 experts of 1024 -> 3584, 2 a token, random weights, and tokens that its router
spreads as it does. It takes turns with the module of transformers, by its own loop and by its
grouped products, and with the ideal: the same multiplications alone, each expert's as two dense
products, by ONNX Runtime and by PyTorch. Ratios are our time over theirs, below 1 when we are
faster, with their 95% interval over the rounds. S-MBU and S-MFU are those of MoE-CAP: the weights
of active experts and the operations of chosen ones, over a plain read and over the multiply-adds
that the clock's nominal rate allows.

MiniLM runs 4 of 8 experts a token in place of each dense network; what that does to its sentences
is told by the cosine to the dense model's and by a probe of sentiment that is fitted on the dense.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.cells import print_lines, times_and_ratios
from sparsify.bench import Machine, Peer, float64_reference, interleave, ratio, threads
from sparsify.bench.harness import relative_error
from sparsify.bench.runtimes import onnxruntime_peer

EXPERTS, TOP_K, WIDTH, HIDDEN = 8, 2, 1024, 3584
TOKENS, THREADS = (1, 16, 128, 512), (1, 2)
TITLE = "mixtures of experts, fp32"
MODULES = ("eager", "grouped_mm")
TOLERANCE = 1e-5
"""Largest relative error that we promise."""


class Block(nn.Module):
    """A block of Mixtral by itself."""

    def __init__(self) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        super().__init__()
        self.config = MixtralConfig(
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            experts_implementation="eager",
        )
        self.block = MixtralSparseMoeBlock(self.config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.block(x)
        return found

    def by(self, way: str, x: torch.Tensor) -> torch.Tensor:
        """Computed as transformers does in one of its ways, and else by its own loop again."""
        self.config._experts_implementation_internal = way
        try:
            with torch.no_grad():
                return self(x)
        finally:
            self.config._experts_implementation_internal = "eager"

    def spread(self, x: torch.Tensor) -> list[int]:
        """Tokens of each expert that has one."""
        with torch.no_grad():
            _, _, chosen = self.block.gate(x)
        return [n for n in chosen.flatten().bincount(minlength=EXPERTS).tolist() if n]


def ideal_torch(block: Block, counts: list[int]) -> Peer:
    """The products alone, by PyTorch."""
    experts = block.block.experts
    inputs = [(torch.randn(n, WIDTH), torch.randn(n, HIDDEN)) for n in counts]

    def call() -> None:
        with torch.no_grad():
            for number, (x, hidden) in enumerate(inputs):
                nn.functional.linear(x, experts.gate_up_proj[number])
                nn.functional.linear(hidden, experts.down_proj[number])

    return Peer("torch products", torch.__version__, call, tuple, {})


def ideal_onnxruntime(block: Block, counts: list[int], count: int) -> Peer:
    """The products alone, by ONNX Runtime, which packs the weights beforehand."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, inputs, outputs, weights, given = [], [], [], [], {}
    experts = block.block.experts
    for number, tokens in enumerate(counts):
        for name, matrix in (("up", experts.gate_up_proj), ("down", experts.down_proj)):
            rows, columns = matrix.shape[1:]
            x, w, y = (f"{part}_{name}_{number}" for part in ("x", "w", "y"))
            given[x] = torch.randn(tokens, columns)
            inputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, [tokens, columns]))
            outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, [tokens, rows]))
            array = matrix[number].detach().t().contiguous().numpy()
            weights.append(numpy_helper.from_array(array, w))
            nodes.append(helper.make_node("MatMul", [x, w], [y]))
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnxruntime_peer(model.SerializeToString(), given, count)


def block_cells(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One cell is a token and a thread count."""
    import sparsify
    from sparsify.codegen.cost import CpuCostModel
    from sparsify.codegen.target import Target
    from sparsify.ops import ExpertsShape
    from sparsify.passes.utilisation import Utilisation

    block = Block().eval()
    for count in sorted(given.threads, reverse=True):
        compiled = sparsify.compile(block, (torch.randn(1, 128, WIDTH),), num_threads=count)
        peak = CpuCostModel(Target.parse("native"), count).flops_per_second
        for tokens in given.tokens:
            x = torch.randn(1, tokens, WIDTH)
            counts = block.spread(x[0])
            reference = float64_reference(block, (x,))
            with threads(count):
                calls: dict[str, Any] = {"sparsify": partial(compiled, x)}
                for way in MODULES:
                    calls[way] = partial(block.by, way, x)
                calls["torch products"] = ideal_torch(block, counts).call
                calls["onnxruntime products"] = ideal_onnxruntime(block, counts, count).call
                calls["read"] = _read(count)
                samples = interleave(calls, given.rounds, given.seconds)
            ours = samples["sparsify"]
            utilisation = Utilisation(
                ExpertsShape(EXPERTS, WIDTH, HIDDEN, WIDTH, True),
                TOP_K,
                tokens,
                len(counts),
                ours.median,
                _READ_BYTES / samples["read"].median,
                peak,
            )
            del samples["read"]
            yield {
                "tokens": tokens,
                "threads": count,
                "active": len(counts),
                "ms": {name: s.median * 1e3 for name, s in samples.items()},
                "ratio": {
                    name: ratio(ours, s).to_dict() for name, s in samples.items() if s is not ours
                },
                "s_mbu": utilisation.bandwidth,
                "s_mfu": utilisation.arithmetic,
                "max_rel_error": relative_error((compiled(x),), reference)[1],
            }


_READ_BYTES = 256 << 20


def _read(count: int) -> Any:
    """A plain read of memory, by as many threads."""
    from tvm.runtime import from_dlpack

    from benchmarks.linears import built
    from benchmarks.stream import Stream
    from sparsify.codegen.runtime import pool
    from sparsify.codegen.runtime.executor import aligned
    from sparsify.codegen.target import Target

    target = Target.parse("native")
    stream = Stream(target.isa)
    function = built([stream], target)[stream.name]
    x, y = (torch.zeros(shape) for shape in Stream.shapes(Stream.parts(_READ_BYTES)))
    given = from_dlpack(aligned(x)), from_dlpack(aligned(y))

    def call() -> None:
        with pool.use_threads(count):
            function(*given)

    return call


def line(cell: dict[str, Any]) -> str:
    return (
        f"{cell['tokens']:4d} tokens  threads {cell['threads']}  active {cell['active']}   "
        f"{times_and_ratios(cell)}   S-MBU {cell['s_mbu']:.2f}  S-MFU {cell['s_mfu']:.2f}   "
        f"error {cell['max_rel_error']:.1e}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one turn")
    parser.add_argument("--minilm", action="store_true", help="MiniLM instead of the block")
    parser.add_argument("--json", action="store_true", help="one record a line")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when an error exceeds what we promise."""
    given = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if given.minilm:
        from benchmarks.moe_minilm import report

        print(f"{TITLE}, {Machine.here().line(max(given.threads))}", flush=True)
        report(given)
        return 0
    return print_lines(TITLE, given, block_cells(given), line, TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
