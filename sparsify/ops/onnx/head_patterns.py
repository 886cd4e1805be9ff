"""The choice of `sparsify.selectors.HeadPatterns` in ONNX, behind the weights of its members."""

from collections.abc import Iterator

from sparsify.selectors import PATTERNS

_WEIGHTS = {"nearness": "near_weights", "lines": "line_weights", "pooled": "mean_weights"}


def _choices() -> Iterator[str]:
    *others, last = (_WEIGHTS[str(pattern.scoring)] for pattern in PATTERNS.values())
    yield f"weights_{len(others)} = Identity({last})"
    for number, weights in reversed(list(enumerate(others))):
        yield f"number_{number} = Constant <value_int: int = {number}> ()"
        yield f"is_{number} = Equal(head_pattern, number_{number})"
        yield f"weights_{number} = Where(is_{number}, {weights}, weights_{number + 1})"


HEAD_PATTERNS = (
    "wide_patterns = Cast <to: int = 7> (patterns)",
    "pattern_shape = Concat <axis: int = 0> (kv_heads, group_size, one, one)",
    "head_pattern = Reshape(wide_patterns, pattern_shape)",
    *_choices(),
    "weights = Identity(weights_0)",
)
"""From the weights of all members to ``weights``, by ``patterns``."""
