"""Updates of the Broyden family, which differ in two numbers: the scaling and the share of the BFGS update."""

import math

UPDATES = ("bfgs", "ssbfgs", "ssbroyden")


def scaling_and_share(update, size, former, relative, is_first):
    r"""Returns $\tau$, by which the former inverse Hessian is divided, and $\phi$, 1 for BFGS and 0 for DFP.

    Args:
        update: One of `UPDATES`.
        size: $n$, the number of weights.
        former: $b = s^\top B s / y^\top s$, the former curvature along the step over the new one.
        relative: $h = y^\top H y / y^\top s$, at least $1 / b$.
        is_first: Whether H is the identity, whose size the first pair then determines.

    Source: Al-Baali, "Numerical experience with a class of self-scaling quasi-Newton algorithms" (1998); Urbán,
    Stefanou & Pons, "Unveiling the optimization process of physics informed neural networks" (2025), section 3.
    """
    b, h = former, relative
    # Rounding may make it negative.
    a = max(b * h - 1.0, 0.0)
    if update != "ssbroyden":
        scaling = h if is_first else 1.0 if update == "bfgs" else min(1.0, 1.0 / b)
        return scaling, 1.0
    # c = sqrt(a / (1 + a)), and rho = min(1, h (1 - c)) without the cancellation in 1 - c.
    rho = min(1.0, h / ((1.0 + a) * (1.0 + math.sqrt(a / (1.0 + a)))))
    theta = min(1.0 / rho, (1.0 - b) / b)
    if a > 0.0:
        theta = max((rho - 1.0) / a, theta)
    sigma = 1.0 + a * theta
    if is_first:
        scaling = h / sigma
    else:
        root = sigma ** (1.0 / (1.0 - size)) if size > 1 else 1.0
        limit = min(1.0, 1.0 / b)
        scaling = limit * min(root, 1.0 / theta) if theta > 0.0 else min(limit * root, sigma)
    return scaling, (1.0 - theta) / sigma


def update_terms(tau, phi, curvature, relative):
    r"""The symmetric 2 x 2 matrix $M$ of the update $H / \tau + U M U^\top$, where $U = (s, H y)$.

    It is the matrix of $\frac1\tau (H - \frac{H y y^\top H}{y^\top H y} + \phi \, y^\top H y \, v v^\top) +
    \frac{s s^\top}{y^\top s}$, with $v = s / y^\top s - H y / y^\top H y$, so that H y = s holds for the new H.

    Args:
        tau: $\tau$, see `scaling_and_share`.
        phi: $\phi$, likewise.
        curvature: $y^\top s$.
        relative: $h = y^\top H y / y^\top s$.
    """
    mixed = -phi / (tau * curvature)
    return [
        [phi * relative / (tau * curvature) + 1.0 / curvature, mixed],
        [mixed, (phi - 1.0) / (tau * relative * curvature)],
    ]
