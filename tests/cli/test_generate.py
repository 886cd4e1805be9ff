"""Language models on the command line: generate, compile, analyze, benchmark, prune."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sparsify
from sparsify.cli.models import load_model
from sparsify.generation import CompiledCausalLM

PROMPT = "w5 w17 w3"
IDS = [5, 17, 3]


@pytest.fixture(scope="module")
def lm(tiny_lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small Llama that speaks of words ``w0`` to ``w59``, and ends with ``w59``."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    model = tiny_lm.MODELS["llama"]()
    model.generation_config.eos_token_id = 59
    model.save_pretrained(folder)
    vocabulary = {f"w{n}": n for n in range(60)} | {"[UNK]": 60}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="w59"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(cli: Any, lm: Path) -> Path:
    """The model as ``sparsify compile`` saves it."""
    path = lm.parent / "llama.sparsify"
    done = cli("compile", lm, "-o", path, "--threads", 1)
    assert done.exit_code == 0, done.output
    return path


def own_tokens(lm: Path, new: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(lm)
    found = model.generate(torch.tensor([IDS]), max_new_tokens=new, do_sample=False)
    tokens: list[int] = found[0, len(IDS) :].tolist()
    return tokens


def test_text_is_that_of_transformers(cli: Any, lm: Path) -> None:
    done = cli("generate", lm, "-p", PROMPT, "--max-new-tokens", 12, "--threads", 1, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["tokens"] == own_tokens(lm, 12)
    assert record["prompt"] == PROMPT
    assert record["text"].split() == [f"w{n}" for n in record["tokens"] if n != 59]


def test_the_prompt_and_its_continuation_are_shown(cli: Any, lm: Path) -> None:
    done = cli("generate", lm, "-p", PROMPT, "--max-new-tokens", 5, "--threads", 1)
    assert done.exit_code == 0, done.output
    words = [f"w{n}" for n in IDS + own_tokens(lm, 5) if n != 59]
    assert done.stdout.split() == words
    assert done.stdout.endswith("\n")


def test_a_compiled_file_speaks_through_a_tokenizer(cli: Any, lm: Path, compiled: Path) -> None:
    rest = ("--tokenizer", lm, "-p", PROMPT, "--max-new-tokens", 12, "--json")
    done = cli("generate", compiled, *rest)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tokens"] == own_tokens(lm, 12)


def test_a_factory_may_give_the_model(cli: Any, lm: Path, compiled: Path, tmp_path: Path) -> None:
    factory = tmp_path / "factories.py"
    factory.write_text(
        "import torch, transformers\ndef llama():\n    return "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(lm)!r}, dtype=torch.float32)\n"
    )
    rest = ("--tokenizer", lm, "-p", PROMPT, "--max-new-tokens", 12, "--threads", 1, "--json")
    done = cli("generate", f"{factory}:llama", *rest)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tokens"] == own_tokens(lm, 12)


def test_options_of_the_compilation_are_heard(cli: Any, lm: Path, compiled: Path) -> None:
    refused(cli("generate", lm, "-p", PROMPT, "--tune", "most"), "tune='most' must be")
    refused(cli("generate", lm, "-p", PROMPT, "--target", "m68k"), "unknown target 'm68k'")
    for options in (("--tune", "quick"), ("--no-cache",)):
        done = cli("generate", compiled, "-p", PROMPT, "--tokenizer", lm, *options)
        refused(done, "is compiled already; --tune and --no-cache do not apply")


def test_draws_follow_their_seed(cli: Any, lm: Path, compiled: Path) -> None:
    def tokens(*options: object) -> list[int]:
        rest = ("--tokenizer", lm, "-p", PROMPT, "--max-new-tokens", 16, "--sample", "--json")
        done = cli("generate", compiled, *rest, *options)
        assert done.exit_code == 0, done.output
        found: list[int] = json.loads(done.stdout)["tokens"]
        return found

    assert tokens("--seed", 1) == tokens("--seed", 1) != tokens("--seed", 2)
    assert tokens("--top-k", 1) == own_tokens(lm, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "llama.sparsify: no folder of a tokenizer; name one with --tokenizer"),
        (("--tokenizer", "{bert}"), "bert: no folder of a tokenizer"),
        (("--tokenizer", "{lm}", "-p", ""), "it must be a row of at least one token id"),
        (("--tokenizer", "{lm}", "--max-new-tokens", "5000"), "positions of the model"),
        (("--tokenizer", "{lm}", "--sample", "--temperature", "0"), "must be above 0"),
        (("--tokenizer", "{lm}", "--sample", "--top-p", "2"), "top_p=2.0"),
    ],
)
def test_refusals_take_one_line(
    cli: Any, lm: Path, folder: Path, compiled: Path, options: tuple[str, ...], message: str
) -> None:
    given = [option.format(lm=lm, bert=folder) for option in options]
    prompt = () if "-p" in given else ("-p", PROMPT)
    refused(cli("generate", compiled, *prompt, *given), message)


def test_models_without_text_are_refused(
    cli: Any, lm: Path, tiny: str, folder: Path, tmp_path: Path
) -> None:
    refused(cli("generate", folder, "-p", "x"), "no causal language model of transformers")
    refused(cli("generate", tiny, "-p", "x"), "no causal language model of transformers")
    refused(cli("generate", tmp_path / "no", "-p", "x"), "no such file or folder")
    refused(cli("generate", tmp_path / "no.sparsify", "-p", "x"), "no such file")
    assert cli("compile", tiny, "-o", tmp_path / "tiny.sparsify").exit_code == 0
    refused(
        cli("generate", tmp_path / "tiny.sparsify", "-p", "x", "--tokenizer", lm),
        "was compiled from a model that does not generate text",
    )


def refused(done: Any, message: str) -> None:
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_compile_saves_both_programs(compiled: Path) -> None:
    loaded = sparsify.load(compiled)
    assert isinstance(loaded, CompiledCausalLM)
    assert loaded.compiled.entries == ("prefill", "decode")


def test_a_saved_model_keeps_its_cache_in_the_generate_of_transformers(
    lm: Path, compiled: Path
) -> None:
    adapted = sparsify.load(compiled).as_transformers()
    lengths: list[int] = []
    adapted.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = adapted.generate(torch.tensor([IDS]), max_new_tokens=4, do_sample=False)
    assert found[0, 3:].tolist() == own_tokens(lm, 4)
    assert lengths == [3, 1, 1, 1]


@pytest.mark.parametrize("command", ["compile", "analyze"])
@pytest.mark.parametrize("size", ["--batch", "--seq"])
def test_sizes_do_not_apply(cli: Any, lm: Path, command: str, size: str) -> None:
    refused(cli(command, lm, size, 4), "--batch and --seq do not apply to a language model")


def test_analyze_tells_of_both_programs(cli: Any, lm: Path) -> None:
    done = cli("analyze", lm, "--json")
    assert done.exit_code == 0, done.output
    sites = json.loads(done.stdout)["sites"]
    assert len({s["site"] for s in sites}) == 2 * 4 + 1
    tokens = {(s["program"], s["tokens"]) for s in sites if s["site"] != "lm_head"}
    assert tokens == {("prefill", 128), ("decode", 2)}
    assert [s["tokens"] for s in sites if s["site"] == "lm_head"] == [2, 2]
    table = cli("analyze", lm)
    assert table.exit_code == 0, table.output
    assert "prefill" in table.stdout and "decode" in table.stdout


def test_benchmark_times_a_prompt(cli: Any, lm: Path) -> None:
    quick = ("--rounds", 2, "--seconds", 0.01, "--against", "onnxruntime")
    done = cli("benchmark", lm, *quick, "--batch", 2, "--seq", 20, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["measured"] == "prefill"
    assert record["inputs"] == [[2, 20]]
    assert set(record["candidates"]) == {"sparsify", "onnxruntime"}
    for row in record["candidates"].values():
        assert 0 <= row["max_rel_error"] < 1e-5
        assert row["resident_bytes"] >= 0


def test_a_pruned_folder_is_a_language_model_again(cli: Any, lm: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    done = cli("prune", lm, "-o", pruned, "--sparsity", 0.5, "--json")
    assert done.exit_code == 0, done.output
    config = json.loads((pruned / "config.json").read_text())
    assert config["use_cache"] is True
    loaded = load_model(str(pruned))
    assert loaded.generates
    assert float((loaded.module.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5


def test_a_language_model_is_pruned_into_an_exported_program(
    cli: Any, lm: Path, tmp_path: Path
) -> None:
    output = tmp_path / "llama.pt2"
    done = cli("prune", lm, "-o", output, "--sparsity", 0.5, "--seq", 8)
    assert done.exit_code == 0, done.output
    assert cli("compile", output).exit_code == 0
