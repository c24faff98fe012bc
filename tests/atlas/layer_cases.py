"""Every layer of `keras.layers` that has a derivative, as a function of its inputs and trainable weights."""

import typing

import keras
import numpy as np
from keras import layers, ops

from tests.atlas.cases import with_awkward_points, words

_random = np.random.default_rng(8)


def normal(*shape):
    return _random.normal(size=shape)


class Entry(typing.NamedTuple):
    """How a layer is made and called."""

    make: typing.Callable
    inputs: tuple
    call: typing.Callable | None = None
    training: bool | None = None


_LINE, _IMAGE, _VOLUME = (2, 4, 2), (1, 4, 4, 2), (1, 3, 3, 3, 1)
_SHAPES = {"1D": _LINE, "2D": _IMAGE, "3D": _VOLUME}
_PICTURE = 0.2 + 0.6 * _random.random((2, 4, 4, 3))
_IDS = np.array([[0, 2], [1, 1]], "int32")
_MASK = np.array([[True, True, False], [True, False, True]])


def _of_each_rank(pattern, make, ranks=("1D", "2D", "3D")):
    return {pattern.format(rank): [Entry(make(pattern.format(rank)), (normal(*_SHAPES[rank]),))] for rank in ranks}


def _layer(name, *args, **options):
    return lambda: getattr(layers, name)(*args, **options)


def _sequence():
    return (normal(2, 3, 2),)


LAYERS = {
    "Activation": [Entry(_layer("Activation", "tanh"), (normal(2, 3),))],
    "ActivityRegularization": [Entry(_layer("ActivityRegularization", 0.1, 0.1), (normal(2, 3),))],
    **{name: [Entry(_layer(name), (normal(2, 3),))] for name in words("ELU Identity LeakyReLU PReLU ReLU Softmax")},
    **{
        name: [Entry(_layer(name), (normal(2, 3), normal(2, 3)), lambda f, a, b: f([a, b]))]
        for name in words("Add Average Concatenate Maximum Minimum Multiply Subtract")
    },
    "Dot": [Entry(_layer("Dot", axes=-1), (normal(2, 3), normal(2, 3)), lambda f, a, b: f([a, b]))],
    "AdditiveAttention": [Entry(_layer("AdditiveAttention"), (*_sequence(), *_sequence()), lambda f, a, b: f([a, b]))],
    "Attention": [
        Entry(_layer("Attention", use_scale=True), (*_sequence(), *_sequence()), lambda f, a, b: f([a, b])),
        Entry(_layer("Attention", score_mode="concat"), (*_sequence(), *_sequence()), lambda f, a, b: f([a, b])),
    ],
    "MultiHeadAttention": [
        Entry(_layer("MultiHeadAttention", 2, 2), _sequence(), lambda f, a: f(a, a)),
        Entry(_layer("MultiHeadAttention", 1, 2), _sequence(), lambda f, a: f(a, a, use_causal_mask=True)),
    ],
    "GroupedQueryAttention": [Entry(_layer("GroupQueryAttention", 2, 2, 1), _sequence(), lambda f, a: f(a, a))],
    **_of_each_rank("AdaptiveAveragePooling{}", lambda name: _layer(name, 2)),
    **_of_each_rank("AdaptiveMaxPooling{}", lambda name: _layer(name, 2)),
    **_of_each_rank("AveragePooling{}", lambda name: _layer(name, 2)),
    **_of_each_rank("MaxPooling{}", lambda name: _layer(name, 2)),
    **_of_each_rank("GlobalAveragePooling{}", lambda name: _layer(name)),
    **_of_each_rank("GlobalMaxPooling{}", lambda name: _layer(name)),
    **_of_each_rank("Conv{}", lambda name: _layer(name, 2, 2)),
    **_of_each_rank("Conv{}Transpose", lambda name: _layer(name, 2, 2)),
    **_of_each_rank("SeparableConv{}", lambda name: _layer(name, 2, 2), ("1D", "2D")),
    **_of_each_rank("DepthwiseConv{}", lambda name: _layer(name, 2), ("1D", "2D")),
    **_of_each_rank("Cropping{}", lambda name: _layer(name, 1)),
    **_of_each_rank("UpSampling{}", lambda name: _layer(name, 2)),
    **_of_each_rank("ZeroPadding{}", lambda name: _layer(name, 1)),
    **{
        f"SpatialDropout{rank}": [Entry(_layer(f"SpatialDropout{rank}", 0.3, seed=1), (normal(*shape),), None, True)]
        for rank, shape in _SHAPES.items()
    },
    **{
        f"ConvLSTM{rank}": [Entry(_layer(f"ConvLSTM{rank}", 1, 2), (normal(1, 2, *shape),))]
        for rank, shape in (("1D", (3, 1)), ("2D", (2, 3, 1)), ("3D", (2, 2, 2, 1)))
    },
    "BatchNormalization": [
        Entry(_layer("BatchNormalization"), (normal(3, 2),), None, True),
        Entry(_layer("BatchNormalization"), (normal(3, 2),), None, False),
        Entry(_layer("BatchNormalization", axis=1), (normal(2, 2, 3),), None, True),
    ],
    "GroupNormalization": [Entry(_layer("GroupNormalization", 2), (normal(2, 2, 4),))],
    "LayerNormalization": [
        Entry(_layer("LayerNormalization"), (normal(2, 3),)),
        Entry(_layer("LayerNormalization", axis=1), (normal(2, 3, 2),)),
    ],
    "RMSNormalization": [Entry(_layer("RMSNormalization"), (normal(2, 3),))],
    "UnitNormalization": [Entry(_layer("UnitNormalization"), (normal(2, 3),))],
    "Normalization": [Entry(_layer("Normalization", mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0]), (normal(2, 3),))],
    "SpectralNormalization": [
        # In training mode it stops gradients at its estimate of the norm, so that values do not tell.
        Entry(lambda: layers.SpectralNormalization(layers.Dense(2)), (normal(2, 3),), None, False),
    ],
    **{
        name: [Entry(_layer(name, 0.3, seed=1), (normal(2, 3),), None, True)]
        for name in words("AlphaDropout Dropout GaussianDropout GaussianNoise")
    },
    "Dense": [Entry(_layer("Dense", 2, "tanh"), (normal(2, 3),))],
    "EinsumDense": [Entry(_layer("EinsumDense", "ab,bc->ac", 2, bias_axes="c"), (normal(2, 3),))],
    "Embedding": [Entry(_layer("Embedding", 3, 2), (), lambda f: f(_IDS))],
    "ReversibleEmbedding": [
        Entry(_layer("ReversibleEmbedding", 3, 2), (), lambda f: f(_IDS)),
        Entry(_layer("ReversibleEmbedding", 3, 2), (normal(2, 2),), lambda f, x: f(x, reverse=True)),
    ],
    "Flatten": [Entry(_layer("Flatten"), (normal(2, 2, 2),))],
    "Lambda": [Entry(lambda: layers.Lambda(ops.sin), (normal(2, 3),))],
    "Masking": [Entry(_layer("Masking", 5.0), (normal(2, 3, 2),))],
    "Permute": [Entry(_layer("Permute", (2, 1)), (normal(2, 2, 3),))],
    "RepeatVector": [Entry(_layer("RepeatVector", 2), (normal(2, 3),))],
    "Reshape": [Entry(_layer("Reshape", (3, 1)), (normal(2, 3),))],
    "Rescaling": [Entry(_layer("Rescaling", 2.0, 1.0), (normal(2, 3),))],
    "Resizing": [Entry(_layer("Resizing", 3, 5), (normal(1, 4, 4, 1),))],
    "CenterCrop": [Entry(_layer("CenterCrop", 2, 2), (normal(1, 4, 4, 1),))],
    **{
        name: [
            Entry(_layer(name, 2), _sequence()),
            Entry(
                _layer(name, 2, return_sequences=True),
                _sequence(),
                lambda f, x: f(x, mask=ops.convert_to_tensor(_MASK)),
            ),
        ]
        for name in words("GRU LSTM SimpleRNN")
    },
    "Bidirectional": [Entry(lambda: layers.Bidirectional(layers.GRU(2)), _sequence())],
    "RNN": [Entry(lambda: layers.RNN(layers.LSTMCell(2)), _sequence())],
    "StackedRNNCells": [
        Entry(lambda: layers.RNN(layers.StackedRNNCells([layers.GRUCell(2), layers.SimpleRNNCell(2)])), _sequence())
    ],
    "GRUCell": [Entry(_layer("GRUCell", 2), (normal(2, 3), normal(2, 2)), lambda f, x, h: f(x, [h]))],
    "LSTMCell": [
        Entry(_layer("LSTMCell", 2), (normal(2, 3), normal(2, 2), normal(2, 2)), lambda f, x, h, c: f(x, [h, c]))
    ],
    "SimpleRNNCell": [Entry(_layer("SimpleRNNCell", 2), (normal(2, 3), normal(2, 2)), lambda f, x, h: f(x, [h]))],
    "TimeDistributed": [Entry(lambda: layers.TimeDistributed(layers.Dense(2, "tanh")), _sequence())],
    "MelSpectrogram": [
        Entry(
            _layer("MelSpectrogram", 8, 4, sampling_rate=16, num_mel_bins=2, min_freq=1.0, max_freq=8.0),
            (normal(1, 12),),
        )
    ],
    "STFTSpectrogram": [Entry(_layer("STFTSpectrogram", "log", 8, 4), (normal(1, 12, 1),))],
    "Pipeline": [Entry(lambda: layers.Pipeline([layers.Rescaling(2.0), layers.Activation("tanh")]), (normal(2, 3),))],
    # Augmentation, of which some pass integers, and have no derivative.
    **{
        name: [Entry(_layer(name, *args, **{"value_range": (0, 1), **options}), (_PICTURE,), None, True)]
        for name, args, options in (
            ("RandomBrightness", (0.2,), {"seed": 1}),
            ("RandomColorDegeneration", (0.5,), {"seed": 1}),
            ("RandomColorJitter", (), {"seed": 1, "brightness_factor": 0.2, "contrast_factor": 0.2}),
            ("RandomContrast", (0.3,), {"seed": 1}),
            ("RandomErasing", (), {"seed": 1}),
            ("RandomHue", (0.2,), {"seed": 1}),
            ("RandomInvert", (0.5,), {"seed": 1}),
            ("RandomSaturation", (0.4,), {"seed": 1}),
            ("RandomSharpness", (0.4,), {"seed": 1}),
            ("AutoContrast", (), {}),
            ("Solarization", (), {"seed": 1}),
        )
    },
    **{
        name: [Entry(_layer(name, *args, seed=1, **options), (_PICTURE,), None, True)]
        for name, args, options in (
            ("CutMix", (), {}),
            ("MixUp", (), {}),
            ("RandomCrop", (3, 3), {}),
            ("RandomElasticTransform", (1.0,), {}),
            ("RandomFlip", (), {}),
            ("RandomGaussianBlur", (), {}),
            ("RandomGrayscale", (0.5,), {}),
            ("RandomPerspective", (), {}),
            ("RandomRotation", (0.1,), {}),
            ("RandomShear", (0.1, 0.1), {}),
            ("RandomTranslation", (0.1, 0.1), {}),
            ("RandomZoom", (0.1,), {}),
        )
    },
}

# Those that Keras has from 3.16 on.
NEW_LAYERS = {
    "Mosaic": [Entry(_layer("Mosaic", seed=1), (_PICTURE,), None, True)],
    # Its kernel is rounded and has a straight-through gradient, so that values do not tell.
    "TernaryDense": [Entry(_layer("TernaryDense", 2, activation="tanh", trainable=False), (normal(2, 3),))],
}
LAYERS |= {name: entries for name, entries in NEW_LAYERS.items() if hasattr(layers, name)}

# What takes or returns integers and strings, rounds to the 256 levels of an image, is abstract, or holds a model of
# another framework.
WITHOUT_DERIVATIVE = set(
    words(
        "AugMix CategoryEncoding ContrastLimitedAdaptiveHistogramEqualization Discretization Equalization FlaxLayer "
        "HashedCrossing Hashing InputLayer InputSpec IntegerLookup JaxLayer Layer MaxNumBoundingBoxes RandAugment "
        "RandomPosterization StringLookup TFSMLayer TextVectorization TorchModuleWrapper Wrapper"
    )
)


def names():
    """The public layers, each under one of its names."""
    found = {}
    for name in dir(layers):
        cls = getattr(layers, name)
        if isinstance(cls, type) and cls not in found.values():
            found[name] = cls
    return {cls.__name__ for cls in found.values()}


def _as_function(entry):
    """The layer, called once, as a function of its inputs and trainable weights; and the values of these."""
    keras.utils.set_random_seed(3)
    layer = entry.make()
    call = entry.call or (lambda f, *xs: f(*xs))
    options = {} if entry.training is None else {"training": entry.training}
    call(lambda *xs, **more: layer(*xs, **more, **options), *[ops.convert_to_tensor(x) for x in entry.inputs])
    random = np.random.default_rng(5)
    weights = [ops.convert_to_numpy(v) + 0.1 * random.normal(size=v.shape) for v in layer.trainable_variables]
    state = [ops.convert_to_tensor(v) for v in layer.non_trainable_variables]
    count = len(entry.inputs)

    def fun(*arguments):
        if entry.training:
            keras.utils.set_random_seed(1)  # on torch, Keras does not draw by the seeds of all layers

        def called(*xs, **more):
            return layer.stateless_call(list(arguments[count:]), state, *xs, **more, **options)[0]

        return call(called, *arguments[:count])

    return fun, (*entry.inputs, *weights)


def layer_cases():
    """The cases of all layers; a layer that cannot be made here is a case without a value."""
    for name, entries in LAYERS.items():
        made = []
        for entry in entries:
            try:
                made.append(_as_function(entry))
            except Exception as error:
                made.append((_raising(error), entry.inputs))
        for case in with_awkward_points(f"layers.{name}", made):
            if case.kind not in ("one element", "empty"):
                yield case


def _raising(error):
    def fun(*_):
        raise error

    return fun
