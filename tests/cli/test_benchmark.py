"""sparsify benchmark, and analyze --impose: real kernels, timed in turns."""

import json
from pathlib import Path

FACTORIES = Path(__file__).with_name("tiny.py")
QUICK = ("--rounds", "3", "--seconds", "0.01")


def test_all_candidates_are_timed_and_agree(cli, tiny: str) -> None:
    done = cli("benchmark", tiny, *QUICK, "--batch", 4, "--seq", 16, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["inputs"] == [[4, 16, 32]]
    assert record["threads"] == 1
    assert record["reference"] == "float64 eager PyTorch"
    assert set(record["candidates"]) == {"sparsify", "torch", "onnxruntime", "openvino"}
    for row in record["candidates"].values():
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["throughput_per_second"] > 0
        assert row["file_bytes"] > 1000
        assert row["resident_bytes"] >= 0
        assert 0 <= row["max_rel_error"] < 1e-5
        assert row["agrees"]
    for found in record["ratio"].values():
        assert 0 < found["low"] <= found["median"] <= found["high"]
    assert record["fastest_peer"] in record["ratio"]


def test_the_table_names_cpu_and_ratio(cli, tiny: str) -> None:
    done = cli("benchmark", tiny, *QUICK, "--against", "torch", "--no-memory")
    assert done.exit_code == 0, done.output
    for word in ("p99 ms", "1 thread of", "torch", "ratio", "float64"):
        assert word in done.stdout
    assert "openvino" not in done.stdout


def test_outputs_that_differ_end_in_exit_code_1(cli) -> None:
    done = cli("benchmark", f"{FACTORIES}:random", *QUICK, "--against", "torch", "--no-memory")
    assert done.exit_code == 1
    assert "DIFFERS" in done.stdout
    assert done.stderr == "error: outputs of sparsify, torch differ from float64 eager PyTorch\n"


def test_an_unknown_peer_is_refused(cli, tiny: str) -> None:
    done = cli("benchmark", tiny, "--against", "torch,tensorrt")
    assert done.exit_code == 2
    assert "unknown peers ['tensorrt']; known: torch, onnxruntime, openvino" in done.stderr


def test_a_sparsity_can_be_imposed_and_timed(cli) -> None:
    done = cli("analyze", f"{FACTORIES}:single", "--impose", 0.9, "--json")
    assert done.exit_code == 0, done.output
    (site,) = json.loads(done.stdout)["sites"]
    assert site["shape"] == [80, 48]
    assert site["verdict"] == "dense", "the model itself has no zeros"
    imposed = site["imposed"]
    assert imposed["sparsity"] == 0.9
    assert imposed["layout"].startswith("sell{")
    assert imposed["max_rel_error"] < 1e-5
    assert 0 < imposed["ratio"]["low"] <= imposed["ratio"]["median"] <= imposed["ratio"]["high"]
    assert imposed["sparse_seconds"] > 0
