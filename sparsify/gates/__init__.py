"""Rules that say which features of a token are kept; importing the package registers them."""

from sparsify.gates.base import GATES, Calibrated, Gate, gate_names, parse, register
from sparsify.gates.channel_threshold import ChannelThreshold
from sparsify.gates.statistical_top_k import StatisticalTopK
from sparsify.gates.threshold import Threshold
from sparsify.gates.top_k import TopK, WeightedTopK

__all__ = [
    "GATES",
    "Calibrated",
    "ChannelThreshold",
    "Gate",
    "StatisticalTopK",
    "Threshold",
    "TopK",
    "WeightedTopK",
    "gate_names",
    "parse",
    "register",
]
