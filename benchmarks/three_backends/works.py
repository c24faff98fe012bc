"""The rows of the table: works, each on a model and a batch size. `functions.py` has their code."""

import dataclasses

MLP, CONV_NET, ATTENTION = ("MLP 32-128-128-10", 64), ("conv net 16x16x3", 16), ("attention 16x32", 16)
WIDE_MLP, SMALL_MLP, LAPLACIAN_NET = ("MLP 64-512-512-10", 128), ("MLP 64-32-32-10", 32), ("network 10-64-64-64-1", 256)


@dataclasses.dataclass(frozen=True)
class Work:
    """A row. `function` is the name of its function in `functions.py`."""

    name: str
    function: str
    model: str
    batch: int

    def __str__(self):
        return f"{self.name}, {self.model}"


def _works():
    for name, function, *sizes in (
        ("gradient by weights", "gradient", MLP, CONV_NET),
        ("double backward", "double_backward", MLP, CONV_NET),
        ("Hessian-vector product", "hvp", MLP, CONV_NET, ATTENTION),
        ("Gauss-Newton product", "ggnvp", MLP, CONV_NET),
        ("batch Jacobian", "batch_jacobian", MLP, WIDE_MLP, CONV_NET, ATTENTION),
        ("per-example gradients", "per_example_gradients", MLP, CONV_NET),
        ("Hessian of one kernel", "hessian", SMALL_MLP),
        ("`kernel_hessian`", "kernel_hessian", SMALL_MLP),
        ("Laplacian", "laplacian", LAPLACIAN_NET),
        ("training step", "plain_step", MLP, CONV_NET),
        ("training step with the exact penalty", "penalized_step", MLP, CONV_NET),
    ):
        for model, batch in sizes:
            yield Work(name, function, model, batch)


WORKS = tuple(_works())
