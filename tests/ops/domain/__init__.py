"""Cases of every operator of the ONNX domain, with what eager PyTorch makes of them.

One file an operator family, with ``cases()``. Adding a file is enough.
"""

import importlib
import pkgutil

import torch

from tests.ops.domain.case import Case


def all_cases() -> list[Case]:
    torch.manual_seed(0)
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    families = [importlib.import_module(f"{__name__}.{name}") for name in names if name != "case"]
    return [case for of in families for case in of.cases()]
