"""The command ``sparsify``: one file a command, `console` for how they speak."""

from sparsify.cli.main import app

__all__ = ["app"]
