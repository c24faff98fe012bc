"""Reports of PyTorch."""

import torch
import torch.nn.functional as F

from tests.atlas.upstream import Report, cube_of_normalized, differences, line

VERSION = torch.__version__


def slope(fun, x, order=1):
    x = torch.tensor(x, requires_grad=True)
    y = fun(x)
    for _ in range(order):
        (y,) = torch.autograd.grad(y, x, create_graph=True)
    return y.detach()


def row(t):
    return torch.tensor(line(0.0)) + t * torch.tensor(line(1.0) - line(0.0))


def by_batch(t):
    return torch.sum(F.batch_norm(row(t)[:, None], None, None, training=True, eps=1e-3) ** 3)


def inverse(t):
    return torch.cholesky_inverse(torch.eye(2) + t * torch.tensor([[0.0, 1.0], [0.0, 0.0]])).sum()


def hessian_of_compiled():
    with torch._functorch.config.patch(donated_buffer=False):
        exponential = torch.compile(torch.exp, backend="aot_eager")
        return torch.autograd.functional.hessian(exponential, torch.tensor(0.0))


THIRD = differences(lambda t: cube_of_normalized(t, 1e-3), 3)
ROW = "of (1 + t, 2 - t, 4 + t / 2) at t = 0, third derivative"

REPORTS = (
    Report("`torch.ldexp(x, -1)` at x = 1", lambda: slope(lambda x: torch.ldexp(x, torch.tensor(-1)), 1.0), 0.5),
    Report(
        "`torch.nextafter(x, 0)` at x = 0", lambda: slope(lambda x: torch.nextafter(x, torch.tensor(0.0)), 0.0), 1.0
    ),
    Report("`torch.sinc(x)` at x = 0, second derivative", lambda: slope(torch.sinc, 0.0, 2), -3.28986813),
    Report("`torch.i0(x)` at x = 0, fourth derivative", lambda: slope(torch.i0, 0.0, 4), 0.375),
    Report(
        f"the sum of cubes of `F.layer_norm` {ROW}",
        lambda: slope(lambda t: torch.sum(F.layer_norm(row(t)[None], (3,), eps=1e-3) ** 3), 0.0, 3),
        THIRD,
    ),
    Report(f"the sum of cubes of `F.batch_norm` {ROW}", lambda: slope(by_batch, 0.0, 3), THIRD),
    Report(
        "`torch.linalg.det(diag(1 + t, t, t))` at t = 0, second derivative",
        lambda: slope(lambda t: torch.linalg.det(torch.diag(torch.stack([1 + t, t, t]))), 0.0, 2),
        2.0,
    ),
    Report("the sum of `torch.cholesky_inverse([[1, t], [0, 1]])` at t = 0", lambda: slope(inverse, 0.0), 0.0),
    Report("`torch.autograd.functional.hessian(torch.compile(torch.exp), x)` at x = 0", hessian_of_compiled, 1.0),
)
