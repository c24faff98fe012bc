"""What the rules of `findings` look for: functions of what a section measured, which return the evidence or None."""

import math

# The thresholds.
FEW_GRADIENT, MANY_GRADIENT = 1e-4, 1e4
NO_GAIN, LARGE_GAIN = 1e-3, 1e3
MOST_DEAD, SOME_DEAD = 0.5, 0.1
LOW_RANK, LEAST_RANK = 1.5, 4
NEGATIVE_SHARE = 0.1
SMALL_DISTANCE, MASKED = 0.05, 0.1
LARGE_NOISE, LEAST_EXAMPLES = 1000, 32


def not_finite_outputs(m):
    count = m.get("outputs_not_finite")
    return f"{count} of {m['examples']} examples have NaN or infinity in the outputs." if count else None


def not_finite_loss(m):
    loss = m.get("loss")
    return None if loss is None or math.isfinite(loss) or m.get("outputs_not_finite") else f"The loss is {loss}."


def not_finite_gradient(m):
    bad = [name for name, size in m.get("gradient_by_layer", {}).items() if not math.isfinite(size)]
    return f"The gradient is not finite in {_names(bad)}." if bad else None


def zero_gradient(m):
    sizes = m.get("gradient_by_layer", {})
    zero = [name for name, size in sizes.items() if size == 0]
    if not zero:
        return None
    return "All gradients are zero." if len(zero) == len(sizes) else f"The gradient is exactly zero in {_names(zero)}."


def vanishing_gradient(m):
    return _ends(m, lambda ratio: ratio < FEW_GRADIENT)


def exploding_gradient(m):
    return _ends(m, lambda ratio: ratio > MANY_GRADIENT)


def mostly_dead(m):
    return _dead(m, MOST_DEAD, math.inf)


def some_dead(m):
    return _dead(m, SOME_DEAD, MOST_DEAD)


def noisy_gradient(m):
    scale = m.get("noise_scale")
    if scale is None or math.isnan(scale) or not scale > LARGE_NOISE or m.get("examples", 0) < LEAST_EXAMPLES:
        return None
    size = "is infinite" if math.isinf(scale) else f"is {scale:.3g} examples"
    return f"The noise scale {size}."


def not_twice(m):
    return f"{_names(m['not_twice'])} cannot be differentiated twice." if m.get("not_twice") else None


def undecided_layers(m):
    return f"The test is undecided for {_names(m['unclear'])}." if m.get("unclear") else None


def mixed_in_inference(m):
    return _mixed(m, "inference")


def mixed_in_training(m):
    return None if _mixed(m, "inference") else _mixed(m, "training")


def no_influence(m):
    gain = m.get("relative_gain", math.nan)
    return f"A relative change of the inputs is reduced to {gain:.2g} times its size." if gain < NO_GAIN else None


def large_gain(m):
    gain = m.get("relative_gain", math.nan)
    return f"A relative change of the inputs is amplified {gain:.3g} times." if gain > LARGE_GAIN else None


def low_rank(m):
    rank, most = m.get("effective_rank"), m.get("rank", 0)
    if rank is None or most < LEAST_RANK or not 0 < rank < LOW_RANK:
        return None
    return f"The effective rank of the Jacobian is {rank:.2f} of {most}."


def unstable_rate(m):
    share = m.get("rate_over_limit")
    return (
        f"The learning rate is {share:.3g} times the largest stable one." if share is not None and share > 1 else None
    )


def negative_curvature(m):
    low, high = m.get("smallest", math.nan), m.get("largest", math.nan)
    if not low < -NEGATIVE_SHARE * abs(high):
        return None
    return f"The smallest eigenvalue is {low:.3g}, the largest {high:.3g}."


def flat_loss(m):
    low, high = m.get("smallest", math.nan), m.get("largest", math.nan)
    return "All eigenvalues that were found are zero." if low == high == 0 else None


def easily_fooled(m):
    distance = m.get("relative_distance", math.nan)
    if not distance < SMALL_DISTANCE:
        return None
    return f"Half of the examples are misclassified after a change of {distance:.2g} standard deviations of the inputs."


def masked_gradients(m):
    share = m.get("masked_share", 0)
    return f"The gradient is zero for {share:.0%} of the examples." if share > MASKED else None


def _names(names):
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _dead(m, above, most):
    dead = {name: share for name, share in m.get("dead_units", {}).items() if above < share <= most}
    return f"Dead on all examples: {', '.join(f'{share:.0%} of {n!r}' for n, share in dead.items())}." if dead else None


def _ends(m, is_extreme):
    sizes = [(name, size) for name, size in m.get("gradient_by_layer", {}).items() if size and math.isfinite(size)]
    if len(sizes) < 3:
        return None
    (first, a), (last, b) = sizes[0], sizes[-1]
    return (
        f"An element of the gradient has the size {a:.2g} in {first!r} and {b:.2g} in {last!r}."
        if is_extreme(a / b)
        else None
    )


def _mixed(m, mode):
    if m.get(f"independent_in_{mode}") is not False:
        return None
    layers = m.get(f"mixing_in_{mode}")
    return f"The cause is {_names(layers)}." if layers else "The examples are mixed outside of layers."
