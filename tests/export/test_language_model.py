"""Language models as exported C: they decode over a cache that is their state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify.ops import PAGE
from tests.export.exported_net import SANITIZERS

CHUNK, TOKENS = 8, 140
"""Prompts are longer than a call of prefill, and fill several pages."""

DECODE = f"""
#include <stdio.h>
#include <stdlib.h>
#include "model.h"
#include "npy.h"

enum {{ WIDTH = {-(-TOKENS // PAGE)}, VOCABULARY = 61 }};
static _Alignas(64) int64_t ids[{CHUNK}], start, count;
static _Alignas(64) int32_t pages[WIDTH];
static _Alignas(64) float logits[VOCABULARY];
static _Alignas(64) unsigned char workspace[MODEL_WORKSPACE_BYTES], memory[MODEL_STATE_BYTES];
static model_state state;

static int64_t step(int entry, int64_t length) {{
  sparsify_tensor in[MODEL_PREFILL_INPUTS], out = {{logits, sizeof logits, {{0}}}};
  in[MODEL_PREFILL_IN_INPUT_IDS] = (sparsify_tensor){{ids, sizeof ids, {{1, length}}}};
  in[MODEL_PREFILL_IN_PAGES] = (sparsify_tensor){{pages, sizeof pages, {{1, WIDTH}}}};
  in[MODEL_PREFILL_IN_STARTS] = (sparsify_tensor){{&start, sizeof start, {{1}}}};
  in[MODEL_PREFILL_IN_COUNTS] = (sparsify_tensor){{&count, sizeof count, {{1}}}};
  count = length;
  if (model_run_entry(entry, in, &out, &state, workspace, sizeof workspace) != SPARSIFY_OK) {{
    printf("%s\\n", model_last_error());
    exit(0);
  }}
  start += length;
  int64_t best = 0;
  for (int i = 1; i < VOCABULARY; ++i)
    if (logits[i] > logits[best]) best = i;
  return best;
}}

/* The prompt's tokens, then how many more; "!" instead of a page that the cache has. */
int main(int argc, char **argv) {{
#ifdef MODEL_LINKED_WEIGHTS
  const void *weights = model_weights;
#else
  size_t bytes = 0;
  const void *weights = npy_read_file("model.weights", SPARSIFY_ALIGNMENT, &bytes);
#endif
  if (model_init(weights, MODEL_WEIGHTS_BYTES) != SPARSIFY_OK) return 1;
  for (int i = 0; i < WIDTH; ++i) pages[i] = WIDTH - 1 - i;
  if (argv[1][0] == '!') pages[0] = WIDTH;
  if (argv[1][0] != '?' &&
      model_state_init(&state, memory, sizeof memory) != SPARSIFY_OK) return 1;
  for (int again = 0; again < 2; ++again) {{
    int64_t token = 0, length = 0;
    start = 0;
    for (int i = 2; i < argc - 1; ++i) {{
      ids[length++] = atoi(argv[i]);
      if (length == {CHUNK} || i == argc - 2) {{
        token = step(0, length);
        length = 0;
      }}
    }}
    for (int i = 0; i < atoi(argv[argc - 1]); ++i) {{
      printf("%d ", (int)token);
      ids[0] = token;
      token = step(1, 1);
    }}
    printf("\\n");
    if (model_state_reset(&state) != SPARSIFY_OK) return 1;
  }}
  return 0;
}}
"""


@pytest.fixture(scope="module")
def language_model(tiny_lm: Any) -> tuple[Any, Any]:
    model = tiny_lm.MODELS["llama"]()
    return model, sparsify.compile(sparsify.prune(model, sparsify.Unstructured(0.5)))


def decoded(there: Any, program: Path, prompt: torch.Tensor, new: int) -> list[list[int]]:
    said = there.run(program, "-", *prompt.tolist(), new).stdout
    return [list(map(int, line.split())) for line in said.splitlines()]


@pytest.mark.isa("x86-avx2")
def test_a_language_model_decodes_under_sanitizers(
    language_model: tuple[Any, Any], host: Any, tmp_path: Path
) -> None:
    _, compiled = language_model
    compiled.export_c(tmp_path, target="x86-avx2", max_tokens=TOKENS, chunk=CHUNK)
    (tmp_path / "decode.c").write_text(DECODE)
    program = host.build(tmp_path, sources=("decode.c",), flags=SANITIZERS)
    for length, new in ((1, 3), (19, 12), (122, 14)):
        prompt = torch.randint(1, 61, (length,))
        wanted = compiled.generate(prompt[None], max_new_tokens=new)[0, length:].tolist()
        # The second time from a state that was reset.
        assert decoded(host, program, prompt, new) == [wanted, wanted]
    said = host.run(program, "!", 5, 1).stdout
    assert said.startswith("IndexError: kv_append: ") and "page" in said
    assert host.run(program, "?", 5, 1).stdout == "the state was not initialised\n"


@pytest.mark.isa("x86-avx2")
def test_a_language_model_selects_what_it_reads(tiny_lm: Any, host: Any, tmp_path: Path) -> None:
    """Bounds of keys are state beside the cache, which is wiped with it."""
    recipe = (
        sparsify.Quest(48, skip=(), bound_keys=8),
        sparsify.VerticalSlash(0.25, recent=0),
    )
    compiled = sparsify.compile(tiny_lm.MODELS["llama"](), recipe=recipe)
    compiled.export_c(tmp_path, target="x86-avx2", max_tokens=TOKENS, chunk=CHUNK)
    assert "float *bounds; " in (tmp_path / "model.h").read_text()
    (tmp_path / "decode.c").write_text(DECODE)
    program = host.build(tmp_path, sources=("decode.c",), flags=SANITIZERS)
    prompt = torch.randint(1, 61, (122,))
    cache, wanted = compiled.new_cache(1, TOKENS), []
    for piece in prompt.split(CHUNK):
        logits = compiled(piece[None], cache)
    for _ in range(14):
        wanted.append(int(logits.argmax(-1)))
        logits = compiled(torch.tensor([wanted[-1:]]), cache)
    assert decoded(host, program, prompt, 14) == [wanted, wanted]


@pytest.mark.parametrize("target", [
    pytest.param("raspberry-pi/4b", marks=pytest.mark.slow),
    pytest.param("wasm-simd", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_language_model_decodes_on_other_machines(
    target: str, language_model: tuple[Any, Any], toolchain: Any, tmp_path: Path
) -> None:
    there, (_, compiled) = toolchain(target), language_model
    compiled.export_c(tmp_path, target=target, max_tokens=TOKENS, chunk=CHUNK)
    (tmp_path / "decode.c").write_text(DECODE)
    program = there.build(tmp_path, sources=("decode.c",))
    prompt = torch.randint(1, 61, (19,))
    wanted = compiled.generate(prompt[None], max_new_tokens=12)[0, 19:].tolist()
    assert decoded(there, program, prompt, 12) == [wanted, wanted]
