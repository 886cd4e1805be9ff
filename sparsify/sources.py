"""The digest of sources on which cached work depends."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from types import ModuleType


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
