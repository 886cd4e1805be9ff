"""Which blocks of keys a block of queries reads: one file a pattern, each a plain rule."""

from sparsify.patterns.base import Pattern, at_least
from sparsify.patterns.dilated import Dilated
from sparsify.patterns.lines import Lines
from sparsify.patterns.per_head import PerHead
from sparsify.patterns.powers_of_two import PowersOfTwo
from sparsify.patterns.sharded import Sharded
from sparsify.patterns.strided import Strided
from sparsify.patterns.window_sinks import WindowSinks

__all__ = [
    "Dilated",
    "Lines",
    "Pattern",
    "PerHead",
    "PowersOfTwo",
    "Sharded",
    "Strided",
    "WindowSinks",
    "at_least",
]
