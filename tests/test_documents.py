"""What the README and the documents point at is there."""

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    missing = [
        target
        for target in targets
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_modules(document: Path) -> None:
    named = re.findall(r"python\s-m\s((?:benchmarks|tests)[\w.]*\w)", document.read_text())
    paths = [ROOT.joinpath(*module.split(".")) for module in named]
    missing = [path for path in paths if not (path.is_dir() or path.with_suffix(".py").is_file())]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_uses_public_names(document: Path) -> None:
    import sparsify

    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                known = node.value.id != "sparsify" or hasattr(sparsify, node.attr)
                assert known, f"sparsify.{node.attr}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsify"):
                module = importlib.import_module(node.module or "")
                missing = [n.name for n in node.names if not _has(module, n.name)]
                assert not missing


def _has(module: ModuleType, name: str) -> bool:
    """Whether a module has an attribute, or a package a module, of this name."""
    if hasattr(module, name):
        return True
    return hasattr(module, "__path__") and bool(find_spec(f"{module.__name__}.{name}"))
