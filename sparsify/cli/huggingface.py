"""Models from Hugging Face folders, and inputs that their tokenizer or configuration allow."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

_SENTENCE = "Sparse networks hold many zeros, and a good compiler lets none of them cost time. "
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")
_SEQ = 128


def load_folder(
    folder: Path, batch: int, seq: int | None
) -> tuple[torch.nn.Module, tuple[tuple[Any, ...], dict[str, torch.Tensor]]]:
    """(model in float32, (no args, keyword arguments)) from ``config.json`` and safetensors.

    Nothing is downloaded and no code from the folder is run.

    Raises:
        ValueError: not such a folder, transformers is missing, or no inputs can be made for it.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: a Hugging Face folder holds config.json, and there is none")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: holds no .safetensors file")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{folder}: needs transformers; pip install transformers") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    generates = any(name in _causal_lm_names() for name in config.architectures or ())
    kind = transformers.AutoModelForCausalLM if generates else transformers.AutoModel
    model = kind.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, use_safetensors=True
    ).eval()
    if not generates and getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    return model, ((), example_inputs(model, folder, batch, seq))


def _causal_lm_names() -> frozenset[str]:
    """The classes of transformers that are causal language models, ``GPT2LMHeadModel`` as well."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return frozenset(NAMES.values())


def example_inputs(
    model: Any, folder: Path, batch: int, seq: int | None
) -> dict[str, torch.Tensor]:
    """Text tokenised to exactly ``[batch, seq]`` (default seq 128), or an image batch.

    Without a tokenizer the tokens are drawn from the vocabulary, seeded.

    Raises:
        ValueError: the model reads neither text nor images, or ``seq`` exceeds its positions.
    """
    config = model.config
    if model.main_input_name == "pixel_values":
        return {"pixel_values": _image(model, batch, seq)}
    vocabulary = getattr(config, "vocab_size", None)
    if model.main_input_name != "input_ids" or vocabulary is None:
        raise ValueError(
            f"{folder}: takes {model.main_input_name!r}, for which no inputs can be made; pass "
            "module:factory that returns (model, inputs)"
        )
    positions = getattr(config, "max_position_embeddings", None)
    seq = seq or min(_SEQ, positions or _SEQ)
    if positions is not None and seq > positions:
        raise ValueError(f"{folder}: --seq {seq} is more than its {positions} positions")
    if has_tokenizer(folder):
        made = _tokenised(folder, batch, seq)
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (batch, seq), generator=generator)
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    accepted = inspect.signature(model.forward).parameters
    return {name: tensor for name, tensor in made.items() if name in accepted}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of transformers."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _tokenised(folder: Path, batch: int, seq: int) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = _SENTENCE * seq  # at least a token for each repetition, so truncation fills all of seq
    made = tokenizer([text] * batch, truncation=True, max_length=seq, return_tensors="pt")
    return dict(made)


def _image(model: Any, batch: int, seq: int | None) -> torch.Tensor:
    config = model.config
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if size is None or seq is not None:
        why = "--seq does not apply to images" if size else "its image size is not in config.json"
        raise ValueError(f"{type(model).__name__}: {why}")
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, channels, height, width, generator=generator)
