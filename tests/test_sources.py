"""Code that others plug in is part of what cached work depends on."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import sparsify
from sparsify.config import CompileConfig
from sparsify.sources import plugin_digest
from sparsify.specs import Registry, plugins_digest

RECIPE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Mine:
    name = "mine"
    share: int = 2

    def run(self, programs, context):
        return {result}
"""


def imported(path: Path, result: str) -> ModuleType:
    """A module of a file of its own, which so has a source."""
    path.write_text(RECIPE.format(result=result))
    spec = importlib.util.spec_from_file_location("recipes_of_mine", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipes_of_mine"] = module
    spec.loader.exec_module(module)
    return module


def test_a_recipe_is_known_by_its_code(tmp_path: Path) -> None:
    modules = [imported(tmp_path / f"{n}.py", result) for n, result in enumerate(("1", "1", "2"))]
    digests = []
    for module in modules:
        sys.modules["recipes_of_mine"] = module
        digests.append(CompileConfig(recipe=module.Mine()).digest())
    assert digests[0] == digests[1] != digests[2]


def test_our_own_classes_are_known_by_the_package() -> None:
    assert plugin_digest(sparsify.Unstructured) == ""


def test_registered_classes_of_others_count() -> None:
    registry: Registry[type] = Registry("thing")
    before = plugins_digest()

    @registry.register
    @dataclass(frozen=True)
    class Thing:
        name: ClassVar[str] = "thing"

    assert plugins_digest() != before


def test_code_that_cannot_be_read_is_known_within_a_process() -> None:
    import tvm.script  # noqa: F401  replaces inspect.getfile

    made = type("Made", (), {"__module__": "a_module_that_is_not_there"})
    assert plugin_digest(made) == plugin_digest(made) != ""
