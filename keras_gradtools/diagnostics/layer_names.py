"""Unique names of layers, for all reports and logs."""

from keras_gradtools.keras_state.layer_state import layers_of


def layer_names(model):
    """A dict from the `id` of each layer in a model to its name: `dense`, or `block/dense` inside the layer `block`.

    The model itself has its own name. Further layers with the same name get a suffix, as in `dense_1`.
    """
    names = {id(model): model.name}
    taken = {model.name}

    def name_parts(layer, prefix):
        for part in layer._flatten_layers(include_self=False, recursive=False):
            if id(part) in names:
                continue
            name, number = f"{prefix}{part.name}", 0
            while name in taken:
                number += 1
                name = f"{prefix}{part.name}_{number}"
            taken.add(name)
            names[id(part)] = name
            name_parts(part, f"{name}/")

    name_parts(model, "")
    return names


def places_by_layer(model, variables):
    """A dict from the name of each layer that owns some of the variables to their positions in the list."""
    names = layer_names(model)
    owners = {id(v): names[id(layer)] for layer in layers_of(model) for v in layer._trainable_variables}
    places: dict[str, list[int]] = {}
    for place, variable in enumerate(variables):
        name = owners.get(id(variable)) or variable.path.rpartition("/")[0] or variable.name
        places.setdefault(name, []).append(place)
    return places
