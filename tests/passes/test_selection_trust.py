"""Texts of a calibration come to recipes in chunks, as long prompts come to compiled programs."""

from itertools import pairwise

import torch

import sparsify
from sparsify import ops
from sparsify.calibration import Calibration
from sparsify.passes import run_pipeline
from sparsify.passes.selection_trust import Attended, block_trust, each_attention, observe_selection
from tests.tiny_lm import portable_programs

TEXTS = [torch.arange(size) * 7 % 61 for size in (600, 40)]


def attended(name: str, in_chunks: bool) -> list[Attended]:
    found: list[Attended] = []
    each_attention(portable_programs(name)["prefill"], Calibration(TEXTS), found.append, in_chunks)
    return found


def test_a_chunk_attends_to_the_tokens_before_it() -> None:
    """So chunks give what the whole text gives, cut where prompts are cut."""
    whole, parts = attended("llama", False), attended("llama", True)
    bounds = ops.chunk_bounds(600)
    assert bounds == [0, 320, 600]
    layers = 2
    assert len(whole) == 2 * layers and len(parts) == 3 * layers
    for layer in range(layers):
        for number, (first, end) in enumerate(pairwise(bounds)):
            part, expected = parts[number * layers + layer], whole[layer].part(first, end)
            for name in ("query", "key", "value"):
                found, same = getattr(part, name), getattr(expected, name)
                torch.testing.assert_close(found, same, atol=1e-5, rtol=1e-5)
        # The second text begins anew.
        torch.testing.assert_close(parts[2 * layers + layer].key, whole[layers + layer].key)


def test_trust_is_of_the_blocks_that_chunks_select() -> None:
    """The lists of a chunk are those of its own latest queries."""
    recipe = sparsify.VerticalSlash(0.25)
    programs = run_pipeline(portable_programs("llama"), [recipe]).programs
    trust = block_trust(programs["prefill"], Calibration(TEXTS), str)
    expected: dict[str, list[float]] = {}
    by_hand = type(trust)()

    def visit(seen: Attended) -> None:
        query, keys, pages, lengths, counts = seen.cached()
        selected = ops.select_blocks.reference(
            *(query, keys, [], pages, lengths, counts, 0, 4, 0, seen.options["scale"]),
            *("vertical_slash", [64, 1], 0.25, 0.0, 1, 2),
        )
        observe_selection(by_hand, seen, str, selected[0], (64, 1))

    each_attention(programs["prefill"], Calibration(TEXTS), visit, in_chunks=True)
    for found in (trust, by_hand):
        for head in found.heads():
            expected.setdefault(f"{head.site} {head.head}", []).append(head.error)
    assert len(expected) == 8
    for ours, theirs in expected.values():
        assert abs(ours - theirs) < 1e-9 and ours > 0
