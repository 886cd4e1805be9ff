"""The digest of sources on which cached work depends."""

from __future__ import annotations

import hashlib
import inspect
import secrets
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

_OURS = __name__.partition(".")[0]


@cache
def sources_digest(*packages: ModuleType) -> str:
    """SHA-256 over the Python and C sources of packages."""
    total = hashlib.sha256()
    for package in packages:
        folder = Path(package.__path__[0])
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".c", ".h")):
            total.update(str(path.relative_to(folder)).encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def plugin_digest(kind: type) -> str:
    """SHA-256 over the code of a class from outside this package; empty for one of ours.

    That is its module, or the class alone where the module is the running script. Code that cannot
    be read counts as new in every process.
    """
    if kind.__module__.partition(".")[0] == _OURS:
        return ""
    return hashlib.sha256(_source(kind).encode()).hexdigest()


@cache
def _source(kind: type) -> str:
    module = sys.modules.get(kind.__module__)
    try:
        if module is not None and kind.__module__ != "__main__":
            return inspect.getsource(module)
        return inspect.getsource(kind)
    except (OSError, TypeError, KeyError):  # TVM's inspect.getfile looks the module up
        return secrets.token_hex()
