"""What layers are called in reports and logs: the same in all of them, and each name once."""

from keras_gradtools.backend.state import layers_of


def layer_names(model):
    """The names of all layers in a model, by `id`: `dense`, or `block/dense` in another layer or model, `block`.

    The model's is its own name. Of several with the same, the others are `dense_1` and so on.
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
    """For each layer that has some of these variables its name, and their places in the list."""
    names = layer_names(model)
    owners = {id(v): names[id(layer)] for layer in layers_of(model) for v in layer._trainable_variables}
    places: dict[str, list[int]] = {}
    for place, variable in enumerate(variables):
        name = owners.get(id(variable)) or variable.path.rpartition("/")[0] or variable.name
        places.setdefault(name, []).append(place)
    return places
