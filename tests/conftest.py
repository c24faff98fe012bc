"""What every test stands on: one backend, one seed, and no tape left recording."""

import gc
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import pytest  # noqa: E402

from keras_gradtools.keras_state.recording import active_tapes  # noqa: E402


def pytest_report_header():
    return f"keras {keras.__version__}, backend {keras.config.backend()}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        marker = item.get_closest_marker("fast_on")
        if marker and keras.config.backend() not in marker.args:
            item.add_marker(pytest.mark.slow)
    if keras.config.backend() != "jax":
        return
    import jax

    # JAX would silently compute these in single precision.
    if not jax.config.jax_enable_x64:
        for item in items:
            if item.get_closest_marker("float64"):
                item.add_marker(pytest.mark.skip(reason="double precision on JAX needs JAX_ENABLE_X64=1"))


def collect_and_freeze():
    """Lets the garbage collector pass over what is there now, through which it would go again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    collect_and_freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="session")
def backend():
    """The name of the backend that this process runs on."""
    return keras.config.backend()


@pytest.fixture(scope="session")
def needs_steps_per_execution(backend):
    """Skips what needs several steps in one execution of Keras' own training loop, where it has none."""
    if backend == "torch" and tuple(map(int, keras.__version__.split(".")[:2])) < (3, 16):
        pytest.skip("on torch, Keras has steps_per_execution from 3.16 on")


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def no_tape_left_recording():
    yield
    left = active_tapes()
    # Ended here, or every later test would be recorded and fail as well.
    for tape in reversed(left):
        tape.__exit__()
    assert not left, f"the test left {len(left)} tape(s) recording: {left}"


# Linux gives a process some 65,000 maps of memory, of which each compiled program of JAX holds a few.
MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def not_too_much_kept():
    """On JAX, drops what was compiled where it comes to many; before that, other modules can use it again."""
    yield
    if keras.config.backend() == "jax" and (not MAPS.exists() or MAPS.read_bytes().count(b"\n") > MANY_MAPS):
        import jax

        jax.clear_caches()
        gc.unfreeze()
    collect_and_freeze()
