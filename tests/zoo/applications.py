"""One model of each family of keras.applications, of random weights, at its smallest images.

Their statistics are those of random images, as after training. With the fresh ones, of mean 0 and variance 1, the
signal dies out in a hundred layers. The offsets are random, too: with those of a new model, which are 0, a channel
that is 0 everywhere puts the ReLU behind it exactly at its kink.
"""

import keras
import numpy as np

from tests.zoo.specimen import CLASSES, of_functional


def _application(name, size=32, **options):
    def make():
        model = getattr(keras.applications, name)(
            weights=None, classes=CLASSES, classifier_activation=None, input_shape=(size, size, 3), **options
        )
        _fill_statistics(model, size)
        return of_functional(model)

    return make


def _fill_statistics(model, size):
    random = np.random.default_rng(0)
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in layers:
        if layer.beta is not None:
            layer.beta.assign(0.1 * random.normal(size=layer.beta.shape))
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    model(keras.ops.convert_to_tensor(random.normal(size=(8, size, size, 3))), training=True)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        # Dead channels would be made as large as the others, at each layer anew.
        variance = np.array(layer.moving_variance)
        layer.moving_variance.assign(np.maximum(variance, variance.mean()))


APPLICATIONS = {
    "MobileNet": _application("MobileNet", alpha=0.25),
    "MobileNetV2": _application("MobileNetV2", alpha=0.35),
    "MobileNetV3Small": _application("MobileNetV3Small", alpha=0.75, include_preprocessing=False),
    "EfficientNetB0": _application("EfficientNetB0"),
    "EfficientNetV2B0": _application("EfficientNetV2B0", include_preprocessing=False),
    "DenseNet121": _application("DenseNet121"),
    "NASNetMobile": _application("NASNetMobile"),
    "Xception": _application("Xception", 71),
    "InceptionV3": _application("InceptionV3", 75),
    "ResNet50": _application("ResNet50"),
    "ResNet50V2": _application("ResNet50V2"),
    "ConvNeXtTiny": _application("ConvNeXtTiny", include_preprocessing=False),
    "VGG16": _application("VGG16"),
}
