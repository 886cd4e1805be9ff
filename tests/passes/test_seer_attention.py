"""Gates of blocks that are distilled from attention."""

from typing import Any

import pytest
import torch

import sparsify
from sparsify.calibration import Calibration
from sparsify.passes import run_pipeline
from sparsify.passes.gate_training import Lesson, train_gates
from sparsify.passes.graph import arguments
from sparsify.passes.selection_trust import each_attention
from sparsify.program import ProgramSet
from tests.passes.test_select_pages import calls
from tests.tiny_lm import portable_programs

QUERIES, KEYS = 16, 16
SMALL: dict[str, Any] = {"density": 0.2, "keys": KEYS, "sinks": 0, "recent": 0}


def texts(seed: int) -> Calibration:
    """Runs of repeated words, so that some blocks of a text matter more than others."""
    chance = torch.Generator().manual_seed(seed)
    words = torch.randint(61, (4, 24), generator=chance)
    return Calibration([w.repeat_interleave(16)[torch.arange(384) % 350] for w in words])


@pytest.fixture(scope="module")
def llama() -> ProgramSet:
    return portable_programs("llama")


@pytest.fixture(scope="module")
def gates(llama: ProgramSet) -> dict[int, torch.Tensor]:
    return train_gates(llama["prefill"], texts(0), QUERIES, KEYS)


def test_gates_come_closer_to_maxima_than_means_do(
    llama: ProgramSet, gates: dict[int, torch.Tensor]
) -> None:
    losses: dict[int, list[torch.Tensor]] = {}

    def visit(attended: Any) -> None:
        layer, lesson = attended.options["layer"], Lesson.of(attended, QUERIES, KEYS)
        identity = torch.eye(gates[layer].shape[-1]).expand_as(gates[layer])
        both = [lesson.losses(g).mean(1) for g in (identity, gates[layer])]
        losses.setdefault(layer, []).append(torch.stack(both))

    each_attention(llama["prefill"], texts(1), visit)
    assert sorted(losses) == sorted(gates) == [0, 1]
    for found in losses.values():
        pooling, learned = torch.stack(found).mean(0)
        assert float(learned.mean()) < 0.9 * float(pooling.mean())


def test_the_target_is_the_maxima_of_attention(llama: ProgramSet) -> None:
    seen: list[Lesson] = []
    probe = Calibration([torch.arange(50) * 7 % 61])

    def visit(attended: Any) -> None:
        lesson = Lesson.of(attended, QUERIES, KEYS)
        group = len(attended.query) // len(attended.key)
        for head in range(len(attended.query)):
            key = attended.key[head // group].double()
            for row, first in enumerate((16, 32, 48)):
                most = [0.0] * 4
                for place in range(first, min(first + 16, 50)):
                    scores = key[: place + 1] @ attended.query[head, place].double()
                    shares = (scores * attended.options["scale"]).softmax(0)
                    for at, share in enumerate(shares.tolist()):
                        most[at // 16] = max(most[at // 16], share)
                expected = torch.tensor(most).float() / sum(most)
                assert torch.allclose(lesson.target[head, row], expected, atol=1e-6)
        seen.append(lesson)

    each_attention(llama["prefill"], probe, visit)
    assert len(seen) == 2


def test_the_recipe_trains_what_it_is_not_given(
    llama: ProgramSet, gates: dict[int, torch.Tensor]
) -> None:
    given = run_pipeline(llama, [sparsify.SeerAttention(**SMALL, gates=gates)])
    trained = run_pipeline(llama, [sparsify.SeerAttention(**SMALL, calibration=texts(0))])
    for result in (given, trained):
        selections = calls(result.programs["prefill"], "select_blocks")
        assert [arguments(n)["selector"] for n in selections] == ["block_gate"] * 2
        names = sorted(n for n in result.programs.weights if n.endswith(".gates"))
        assert names == ["layers.0.attention.gates", "layers.1.attention.gates"]
    assert any(d.mass is not None for d in trained.decisions)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give gates, or calibration"),
        ({"calibration": Calibration([torch.arange(60)])}, "at least 5 blocks of 64 tokens"),
        ({"gates": {0: torch.eye(6).expand(4, 6, 6)}}, "none for layer 1"),
    ],
)
def test_what_is_missing_is_named(llama: ProgramSet, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_pipeline(llama, [sparsify.SeerAttention(**options)])
