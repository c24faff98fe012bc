"""What was found in the zoo, and a few cells of it anew."""

import pytest

from tests.zoo.run import BACKENDS, Worker, known
from tests.zoo.table import PAGE, page

# Both are in docs/limits.md: of a layer in single precision, `layer_derivatives` says what does not hold in double
# precision, and TensorFlow's oneDNN kernels end the process.
KNOWN = {("RWKV7", "layer_derivatives"), ("DeBERTaV3", "gradient_monitor")}


@pytest.mark.parametrize("of", BACKENDS)
def test_nothing_was_wrong(of):
    found = known(of)
    assert found
    assert {cell for cell, answer in found.items() if answer["status"] in ("wrong", "crash")} <= KNOWN


def test_the_page_is_that_of_the_results():
    assert PAGE.read_text() == page()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["graph attention", "DDPM", "neural ODE"])
@pytest.mark.parametrize("check", ["hvp", "ggn", "jacobian", "independence"])
def test_cells(backend, model, check):
    worker = Worker(backend)
    try:
        assert worker.ask((model, check), 300)["status"] == "right"
    finally:
        worker.stop()
