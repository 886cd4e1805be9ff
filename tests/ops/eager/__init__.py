"""Cases of every operator with what it must return, one file an operator family.

A file has ``cases(lanes)``: its calls with activations row-major, or in lanes. Adding a file is
enough.
"""

import importlib
import pkgutil

import torch

from tests.ops.eager.case import Case


def all_cases() -> list[tuple[Case, bool]]:
    """Each call of every family, and whether its activations are in lanes."""
    torch.manual_seed(0)
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    families = [importlib.import_module(f"{__name__}.{name}") for name in names if name != "case"]
    return [(case, lanes) for of in families for lanes in (False, True) for case in of.cases(lanes)]
