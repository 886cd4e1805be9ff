"""``sparsify generate``: continues a prompt with a compiled language model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.cli import options
from sparsify.cli.compile import compile_loaded
from sparsify.cli.console import command, show_json, step
from sparsify.cli.huggingface import has_tokenizer
from sparsify.cli.models import LoadedModel, load_model, quiet


@command
def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A causal language model: its Hugging Face folder, module:factory (a callable "
            "that returns one), or a .sparsify file.",
            show_default=False,
        ),
    ],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The text to continue.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="The folder of the tokenizer; needed unless MODEL is its folder."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 64,
    sample: Annotated[bool, typer.Option(help="Draw tokens instead of the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="Of the draws.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw among this many tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among tokens of this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What to compile for; see 'sparsify targets'.",
            show_default="native, or what the file was compiled for",
        ),
    ] = None,
    threads: options.Threads = None,
    tune: options.Tune = "off",
    cache: options.Cache = True,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt, word by word as it comes."""
    loaded = _language_model(model)
    texts = _tokenizer(tokenizer or Path(model))
    if loaded is not None:
        config = {"target": target or "native", "num_threads": threads}
        compiled = compile_loaded(loaded, tune=tune, cache=cache, **config)
    elif tune != "off" or not cache:
        raise ValueError(f"{model}: is compiled already; --tune and --no-cache do not apply")
    else:
        compiled = _load(model, target, threads)
    ids = texts(prompt, return_tensors="pt").input_ids
    streamer = None if as_json else _streamer(texts)
    with quiet():
        found = compiled.generate(
            ids,
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            streamer=streamer,
        )
    if as_json:
        new = found[0, ids.shape[1] :]
        text = texts.decode(new, skip_special_tokens=True)
        show_json({"prompt": prompt, "text": text, "tokens": new.tolist()})


def _language_model(model: str) -> LoadedModel | None:
    """None for a file that is compiled already."""
    if model.endswith(".sparsify"):
        if not Path(model).is_file():
            raise FileNotFoundError(f"{model}: no such file")
        return None
    with step(f"loading {model}"):
        loaded = load_model(model)
    if not loaded.generates:
        raise ValueError(f"{model}: no causal language model of transformers")
    return loaded


def _load(model: str, target: str | None, threads: int | None) -> Any:
    import sparsify
    from sparsify.generation import CompiledCausalLM

    with step(f"loading {model}"), quiet():
        compiled = sparsify.load(model, target=target, num_threads=threads)
    if not isinstance(compiled, CompiledCausalLM):
        raise ValueError(f"{model}: was compiled from a model that does not generate text")
    return compiled


def _tokenizer(folder: Path) -> Any:
    if not folder.is_dir() or not has_tokenizer(folder):
        raise ValueError(f"{folder}: no folder of a tokenizer; name one with --tokenizer")
    from transformers import AutoTokenizer

    with quiet():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Stdout(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sys.stdout.write(text + "\n" * stream_end)
            sys.stdout.flush()

    return Stdout(tokenizer, skip_special_tokens=True)
