"""All models of the zoo by name."""

import importlib.util

from tests.zoo.applications import APPLICATIONS
from tests.zoo.examples import EXAMPLES

GROUPS = {"examples": EXAMPLES}
if importlib.util.find_spec("keras_hub") is not None:
    from tests.zoo.backbones import BACKBONES

    GROUPS["keras_hub"] = BACKBONES
GROUPS["keras.applications"] = APPLICATIONS
MODELS = {name: make for group in GROUPS.values() for name, make in group.items()}
