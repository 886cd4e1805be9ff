"""The choice of `sparsify.selectors.QueryAware` in ONNX, behind the weights of both its members."""

from sparsify.selectors.query_aware import MOST_DIVERGENCE


def _information(name: str) -> tuple[str, ...]:
    return (
        f"{name}_safe = Max({name}, least_share)",
        f"{name}_log = Log({name}_safe)",
        f"{name}_each = Mul({name}, {name}_log)",
        f"{name}_information = ReduceSum <keepdims: int = 1> ({name}_each, last)",
    )


DIVERGENCE = (
    "latest_only = Where(each_real, latest, nothing)",
    "latest_sums = ReduceSum <keepdims: int = 1> (latest_only, three)",
    "latest_most = Min(row_counts, sixteen)",
    "latest_some = Max(latest_most, one)",
    "latest_number = Cast <to: int = 1> (latest_some)",
    "latest_count = Unsqueeze(latest_number, place_axes)",
    "latest_mean = Div(latest_sums, latest_count)",
    "latest_blocks = MatMul(latest_mean, group_columns)",
    "latest_estimates = Mul(latest_blocks, factor)",
    "is_held = Greater(behind_column, none)",
    "plane_axes = Constant <value_ints: ints = [1, 2, 3]> ()",
    "each_held = Unsqueeze(is_held, plane_axes)",
    "held_estimates = Where(each_held, latest_estimates, lowest)",
    "estimate = Softmax <axis: int = -1> (held_estimates)",
    "truth = Div(each_row_found, latest_count)",
    "estimate_and_truth = Add(estimate, truth)",
    "half = Constant <value_float: float = 0.5> ()",
    "middle = Mul(estimate_and_truth, half)",
    "least_share = Constant <value_float: float = 1e-30> ()",
    *_information("estimate"),
    *_information("truth"),
    *_information("middle"),
    "both_information = Add(estimate_information, truth_information)",
    "mean_information = Mul(both_information, half)",
    "divergence = Sub(mean_information, middle_information)",
    f"most_divergence = Constant <value_float: float = {MOST_DIVERGENCE**2}> ()",
    "means_trusted = Less(divergence, most_divergence)",
    "weights = Where(means_trusted, mean_weights, line_weights)",
)
"""From ``mean_weights`` and ``line_weights`` to ``weights``."""
