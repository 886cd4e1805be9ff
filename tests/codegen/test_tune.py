"""Measured choice: what is timed, what is remembered, and what happens when processes die."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.codegen import trial, tune
from sparsify.codegen.cost import CpuCostModel
from sparsify.codegen.measurements import Measurements
from sparsify.codegen.target import Target
from sparsify.codegen.timing import in_turns
from sparsify.codegen.trial import Trial, TrialLibrary
from sparsify.codegen.tune import Effort, TunedCostModel
from sparsify.contracts import CostModel, MeasuringCostModel
from sparsify.layouts import Bitmap, Layout, PackedDense, Sell, WeightStats

NATIVE = Target.parse("native")
QUICK = Effort(layouts=1, rounds=2, seconds=0.0005)
SHAPE = (24, 40)


LIBRARIES: dict[frozenset[str], TrialLibrary] = {}


@pytest.fixture(autouse=True)
def compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal kernels are built once for all tests; they are timed each time."""

    def library(target: Target, trials: Iterable[Trial]) -> TrialLibrary:
        trials = list(trials)
        names = frozenset(k.name for made in trials for k in made.kernels(target))
        if names not in LIBRARIES:
            LIBRARIES[names] = TrialLibrary(target, trials)
        return LIBRARIES[names]

    monkeypatch.setattr(trial, "TrialLibrary", library)


def sparse(density: float = 0.2, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    """Exactly this share of nonzeros, so that equal densities are one entry."""
    weight = torch.randn(shape)
    zeros = torch.randperm(weight.numel())[round(density * weight.numel()) :]
    weight.view(-1)[zeros] = 0
    return weight


def tuned(folder: Path | None, threads: int = 1, effort: Effort = QUICK) -> TunedCostModel:
    return TunedCostModel(CpuCostModel(NATIVE, threads), effort, Measurements(folder))


def answers(cost: TunedCostModel, weight: torch.Tensor, tokens: int = 32) -> dict[Layout, Any]:
    """What it measured of a weight."""
    shape, nnz = (weight.shape[0], weight.shape[1]), WeightStats.of(weight).nnz
    layouts = cost.candidates(shape, nnz, tokens)
    return {layout: cost.measured_seconds(layout, shape, nnz, tokens) for layout in layouts}


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def test_it_is_a_cost_model_that_measures() -> None:
    assert isinstance(tuned(None), MeasuringCostModel)
    prediction: CostModel = CpuCostModel(NATIVE)
    assert not isinstance(prediction, MeasuringCostModel)


def test_measured_times_replace_predictions(tmp_path: Path) -> None:
    weight, cost = sparse(), tuned(tmp_path)
    nnz = WeightStats.of(weight).nnz
    assert set(answers(cost, weight).values()) == {None}
    assert cost.linear_seconds(Sell(), SHAPE, nnz, 32) == cost.predicted.linear_seconds(
        Sell(), SHAPE, nnz, 32
    )
    cost.measure([(weight, [32])])
    found = answers(cost, weight)
    assert {type(layout) for layout in found} == {Sell, PackedDense}  # the best, and dense
    for layout, seconds in found.items():
        assert 1e-8 < seconds < 1e-2
        assert cost.linear_seconds(layout, SHAPE, nnz, 32) == seconds
    # Other token counts and other weights are still predicted.
    assert set(answers(cost, weight, 64).values()) == {None}
    assert set(answers(cost, sparse(0.4)).values()) == {None}


def test_more_work_is_measured_to_take_longer() -> None:
    shape, cost = (256, 512), tuned(None, effort=Effort(1, 5, 0.002))
    few, many = sparse(0.05, shape), sparse(0.5, shape)
    cost.measure([(few, [64]), (many, [64])])
    fast, slow = (min(t for t in answers(cost, w, 64).values()) for w in (few, many))
    assert 2 * fast < slow


def test_equal_weights_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def count(calls: dict[Layout, Any], rounds: int, seconds: float) -> dict[Layout, float]:
        timed.append(len(calls))
        return in_turns(calls, rounds, seconds)

    monkeypatch.setattr(tune, "in_turns", count)
    cost = tuned(tmp_path)
    cost.measure([(sparse(), [32, 4]), (sparse(), [4, 32, 32]), (sparse(0.5), [32])])
    assert len(timed) == 3  # two token counts of one, and one of the other
    assert len(entries(tmp_path)) == 2


def test_a_trial_computes_the_product() -> None:
    shape, counts = (33, 17), (1, 3, 8, 9, 16, 33)
    weight = sparse(0.3, shape)
    layouts = (Sell(8, 17, 40), PackedDense(6), Bitmap())  # for either form, or few tokens alone
    trials = [Trial(layout, shape, n) for layout in layouts for n in counts]
    library = TrialLibrary(NATIVE, trials)
    for made in trials:
        x = torch.randn(made.tokens, 17)
        call, y = library.bind(made, made.layout.pack(weight), x)
        for _ in range(3):  # few tokens read another copy of the weight each time
            y.fill_(float("nan"))
            call()
            rows = y if y.dim() == 2 else y.transpose(1, 2).reshape(-1, 33)[: made.tokens]
            expected = (x.double() @ weight.double().T).float()
            torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


PROCESS = """
import json, sys, time, torch
from pathlib import Path
from sparsify.codegen import tune
from sparsify.codegen.cost import CpuCostModel
from sparsify.codegen.measurements import Measurements
from sparsify.codegen.target import Target

folder, mode, weights = Path(sys.argv[1]), sys.argv[2], torch.load(sys.argv[3])
measure = tune.in_turns

def hang(*given):
    if list(folder.glob("*.json")):
        print("begun", flush=True)
        time.sleep(600)
    return measure(*given)

tune.in_turns = {"measure": measure, "hang": hang, "refuse": None}[mode]
predicted, effort = CpuCostModel(Target.parse("native")), tune.Effort(1, 2, 0.0005)
cost = tune.TunedCostModel(predicted, effort, Measurements(folder))
cost.measure([(weight, [32, 4]) for weight in weights])
given = [((24, 40), int(w.count_nonzero()), n) for w in weights for n in (4, 32)]
print(json.dumps([[l.spec, cost.measured_seconds(l, *g)] 
    for g in given for l in cost.candidates(*g)]))
"""


def process(folder: Path, mode: str, *weights: torch.Tensor) -> subprocess.Popen[str]:
    """Another process that measures weights at 4 and 32 tokens and prints the times."""
    given = folder.with_suffix(".weights")
    torch.save(list(weights), given)
    command = [sys.executable, "-c", PROCESS, str(folder), mode, str(given)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def printed(running: subprocess.Popen[str]) -> Any:
    out, _ = running.communicate(timeout=120)
    assert running.returncode == 0
    return json.loads(out)


def test_a_second_process_measures_nothing(tmp_path: Path) -> None:
    folder, weight = tmp_path / "tuned", sparse()
    first = printed(process(folder, "measure", weight))
    assert first == printed(process(folder, "refuse", weight))
    assert len(first) >= 4 and all(seconds for _, seconds in first)


def test_two_processes_at_once_agree(tmp_path: Path) -> None:
    """The second waits, and takes what the first measured."""
    folder, weight = tmp_path / "tuned", sparse()
    first, second = (process(folder, "measure", weight) for _ in range(2))
    assert printed(first) == printed(second)
    assert len(entries(folder)) == 1


def test_what_was_measured_before_a_kill_is_kept(tmp_path: Path) -> None:
    folder, weights = tmp_path / "tuned", [sparse(), sparse(0.5)]
    killed = process(folder, "hang", *weights)
    assert killed.stdout is not None and killed.stdout.readline() == "begun\n"
    killed.kill()
    killed.communicate()
    (kept,) = entries(folder)
    before = kept.read_bytes()
    found = printed(process(folder, "measure", *weights))  # the lock went with the process
    assert kept.read_bytes() == before and len(entries(folder)) == 2
    assert printed(process(folder, "refuse", *weights)) == found


@pytest.mark.parametrize("change", ["threads", "effort", "sources", "density", "tokens"])
def test_what_times_depend_on_is_measured_again(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, counts, options = sparse(), [32], {}
    tuned(tmp_path).measure([(weight, counts)])
    if change == "threads":
        options = {"threads": 2}
    elif change == "effort":
        options = {"effort": Effort(1, 3, 0.0005)}
    elif change == "sources":
        monkeypatch.setattr(tune, "kernel_sources", lambda: "edited")
    elif change == "density":
        weight = sparse(0.22)
    else:
        counts = [48]
    tuned(tmp_path, **options).measure([(weight, counts)])
    assert len(entries(tmp_path)) == 2


def _negative(record: dict[str, Any]) -> str:
    record["times"] = {spec: [-1.0] for spec in record["times"]}
    return json.dumps(record)


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: "{" + text,
    "another type": lambda text: "[1, 2]",
    "a changed number": lambda text: text.replace("e-", "e-1").replace("0.0", "0.1"),
    "negative": lambda text: _negative(json.loads(text)),
    "no times": lambda text: json.dumps({"digest": json.loads(text)["digest"]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_measured_again(tmp_path: Path, damage: str) -> None:
    weight = sparse()
    tuned(tmp_path).measure([(weight, [32])])
    (entry,) = entries(tmp_path)
    whole = entry.read_text()
    entry.write_text(DAMAGES[damage](whole))
    assert entry.read_text() != whole
    cost = tuned(tmp_path)
    cost.measure([(weight, [32])])
    assert all(seconds and seconds < 1e-2 for seconds in answers(cost, weight).values())
    assert json.loads(entry.read_text()).keys() == json.loads(whole).keys()


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    weight, cost = sparse(), tuned(tmp_path / "file" / "tuned")
    with pytest.warns(UserWarning, match="measured times are not kept"):
        cost.measure([(weight, [32])])
    assert all(answers(cost, weight).values())


def test_no_bar_where_there_is_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tuned(tmp_path).measure([(sparse(), [32])])
    assert capfd.readouterr() == ("", "")


def test_calls_are_timed_in_turns() -> None:
    def wait(seconds: float) -> Callable[[], None]:
        return lambda: time.sleep(seconds)

    found = in_turns({"short": wait(0.001), "long": wait(0.02)}, rounds=3, seconds=0.01)
    assert 0.001 <= found["short"] < found["long"]
