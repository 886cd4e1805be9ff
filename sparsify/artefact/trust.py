"""Which shared libraries may run: those that this user built, recognised by a keyed digest.

A shared library is code. Files that are saved here carry an HMAC-SHA-256 of their manifest, which
holds the digests of all parts, under a secret key in the user's cache directory; whoever has no
access to the key cannot make a file that passes. Machines that share the key file trust each other.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any

_KEY_BYTES = 32


def cache_directory() -> Path:
    """``$SPARSIFY_CACHE_DIR``, else ``sparsify`` in the user's cache directory."""
    named = os.environ.get("SPARSIFY_CACHE_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsify"


def sign(record: Any) -> str:
    """The keyed digest of a JSON value; empty when there can be no key."""
    key = _key(create=True)
    return "" if key is None else _mac(key, record)


def is_ours(record: Any, signature: str) -> bool:
    """Whether this user's key signed this JSON value."""
    key = _key(create=False)
    return key is not None and hmac.compare_digest(_mac(key, record), signature)


def _mac(key: bytes, record: Any) -> str:
    text = json.dumps(record, sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key(create: bool) -> bytes | None:
    path = cache_directory() / "key"
    try:
        if create and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"key.{os.getpid()}.{secrets.token_hex(4)}")
            descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
            try:
                os.link(partial, path)  # another process may have been faster: its key stays
            except FileExistsError:
                pass
            finally:
                partial.unlink()
        key = path.read_bytes()
    except OSError:
        return None
    return key if len(key) == _KEY_BYTES else None
