"""The columns of the table: a backend with one of its compilers."""

import dataclasses

# Set before a framework is imported. The threads are left as they are on a GPU, where they compile.
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
# Several processes share the GPU, so that none may take all memory. TensorFloat-32 has ten bits, and the backends use
# it in different operations, so that their values would differ.
ON_GPU = {
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "NVIDIA_TF32_OVERRIDE": "0",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}


@dataclasses.dataclass(frozen=True)
class Way:
    """A column. `compiler` is that of `kg.jit`, and `jit_compile` that of training steps."""

    name: str
    title: str
    backend: str
    compiler: str | None
    jit_compile: bool | str
    # Whether it is left out when the time is up, because it compiles for the longest.
    may_be_left_out: bool = False


WAYS = (
    Way("tensorflow", "TensorFlow", "tensorflow", None, False),
    Way("tensorflow_xla", "TensorFlow XLA", "tensorflow", "xla", True),
    Way("jax", "JAX", "jax", None, True),
    Way("torch", "PyTorch replayed", "torch", None, True),
    Way("torch_inductor", "PyTorch inductor", "torch", "inductor", "inductor", may_be_left_out=True),
)
BY_NAME = {way.name: way for way in WAYS}
