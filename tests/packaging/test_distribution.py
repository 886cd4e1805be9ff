"""The wheel: one import name, everything inside, and no top-level `passes` or `codegen`."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = {"sparsify": "sparsify", "passes": "sparsify/passes", "codegen": "sparsify/codegen"}
PROJECT_FILES = ["pyproject.toml", "setup.py", "README.md", "LICENSE"]


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing built here before can get into it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        unwanted = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, source / folder, ignore=unwanted)
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(built), str(source))
    (path,) = built.glob("sparsify_compiler-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def files(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_has_one_name_at_its_top(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in files(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sparsify"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_wheel_holds_every_module(wheel: Path, folder: str) -> None:
    modules = {
        f"{FOLDERS[folder]}/{path.relative_to(ROOT / folder)}"
        for path in (ROOT / folder).rglob("*.py")
    }
    assert modules and modules - files(wheel) == set()


def test_wheel_holds_the_pool_and_its_source(wheel: Path) -> None:
    runtime = {Path(name).name for name in files(wheel) if "/codegen/runtime/" in name}
    assert {"pool.c", "wait.h"} <= runtime
    assert any(name.startswith("_pool.") for name in runtime)
    exported = {Path(name).name for name in files(wheel) if "/codegen/emit/c/" in name}
    assert {"sparsify.c", "sparsify.h", "model.c.j2", "CMakeLists.txt.j2"} <= exported
    assert "sparsify/py.typed" in files(wheel)
    assert any(name.endswith("licenses/LICENSE") for name in files(wheel))


def test_installed_package_works_away_from_the_sources(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__edit")]
import sparsify, sparsify.passes, sparsify.codegen
from sparsify.codegen.runtime import pool
pool.set_threads(2)
print(json.dumps({
    "files": [m.__file__ for m in (sparsify, sparsify.passes, sparsify.codegen, pool)],
    "library": str(pool._library_path()),
    "threads": pool.threads(),
    "bare": [n for n in ("passes", "codegen") if importlib.util.find_spec(n)],
}))
"""
    command = [sys.executable, "-c", code, str(installed)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for path in [*found["files"], found["library"]]:
        assert Path(path).is_relative_to(installed)
    assert found["threads"] == 2
    assert found["bare"] == []


def test_environment_has_no_bare_passes_or_codegen(tmp_path: Path) -> None:
    """The one the tests run in, whether the install is editable or not."""
    code = "import importlib.util as u; print(u.find_spec('passes'), u.find_spec('codegen'))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.split() == ["None", "None"], result.stderr
