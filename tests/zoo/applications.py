"""One model of each family of keras.applications, of random weights, at its smallest images."""

import keras

from tests.zoo.specimen import CLASSES, of_functional


def _application(name, size=32, **options):
    def make():
        model = getattr(keras.applications, name)(
            weights=None, classes=CLASSES, classifier_activation=None, input_shape=(size, size, 3), **options
        )
        return of_functional(model)

    return make


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
