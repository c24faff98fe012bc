"""All cases of the atlas, in the order of its table."""

from tests.atlas.cases import with_awkward_points
from tests.atlas.operations import OPERATIONS


def cases(part=None):
    """Those of the operations, of the layers, or of both."""
    if part in (None, "operations"):
        for name, entries in OPERATIONS.items():
            yield from with_awkward_points(f"ops.{name}", entries)
    if part in (None, "layers"):
        from tests.atlas.layer_cases import layer_cases

        yield from layer_cases()
