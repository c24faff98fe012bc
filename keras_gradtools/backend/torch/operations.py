"""The kinds of torch's functions, by their names.

Only functions are listed whose second derivatives in forward mode were compared with nested derivatives, by
`tests/transforms/test_laplacian_of_operations.py`. torch's are wrong for some others, such as `det` and `solve`.
"""

from keras_gradtools.backend import steps


def _names(text):
    return frozenset(text.split())


# Linear in all active arguments together. Indices and conditions are integers or booleans, which are never active.
_LINEAR = _names(
    "__add__ __getitem__ __neg__ __radd__ __rsub__ __sub__ add broadcast_to cat chunk clone concat concatenate "
    "contiguous cumsum deg2rad diag diag_embed diagonal diff double dsplit dstack expand expand_as flatten flip "
    "fliplr flipud float gather hsplit hstack index_add index_select mean moveaxis movedim narrow neg negative "
    "permute positive rad2deg ravel repeat repeat_interleave reshape roll rot90 rsub scatter_add select split squeeze "
    "stack sub subtract sum swapaxes swapdims t take take_along_dim tensor_split tile to trace transpose tril triu "
    "type type_as unbind unflatten unsqueeze view view_as vsplit vstack where"
)
# Linear in the first argument, if the others are not active.
_LINEAR_IN_FIRST = _names(
    "__truediv__ conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d div divide linear true_divide"
)
_PRODUCTS = _names("__mul__ __rmul__ mul multiply")
_BILINEAR = _names("__matmul__ __rmatmul__ bmm dot einsum inner kron matmul mm mv outer tensordot vdot")
_ELEMENTWISE = _names(
    "__abs__ __pow__ __rpow__ __rtruediv__ abs absolute acos acosh arccos arccosh arcsin arcsinh arctan arctan2 "
    "arctanh asin asinh atan atan2 atanh celu clamp clip cos cosh digamma div divide elu erf erfc erfinv exp exp2 "
    "expm1 gelu hardshrink hardswish hardtanh leaky_relu lgamma log log10 log1p log2 logsigmoid maximum minimum mish "
    "pow reciprocal relu relu6 rsqrt selu sigmoid silu sin sinh softplus softshrink softsign sqrt square tan tanh "
    "tanhshrink true_divide"
)
_GENERAL = _names(
    "__get__ __rdiv__ _scaled_dot_product_attention_math _threshold adaptive_avg_pool1d adaptive_max_pool1d amax amin "
    "angle arctan2 avg_pool1d avg_pool2d binary_cross_entropy binary_cross_entropy_with_logits ceil complex corrcoef "
    "cross cross_entropy cumprod diagflat embedding fft_fft fft_fft2 fft_ifft2 fft_irfft fft_rfft floor fmax fmin "
    "fmod fold hypot i0 imag interpolate istft ldexp linalg_cholesky linalg_eigh linalg_inv linalg_norm linalg_qr "
    "linalg_svd linalg_svdvals log_sigmoid logaddexp logaddexp2 logsumexp max max_pool1d max_pool2d meshgrid min "
    "nan_to_num nanmean nanquantile nansum nll_loss pad prod quantile real remainder rms_norm round sign sinc sort "
    "std stft topk trapz trunc unfold unfold_copy var"
)
PIECEWISE_LINEAR = _names(
    "__abs__ abs absolute amax amin ceil clamp clip floor hardshrink hardtanh leaky_relu max maximum max_pool1d "
    "max_pool2d min minimum relu relu6 round sign softshrink sort topk trunc where"
)
CLOSED_FORMS = {name: name for name in ("cos", "cosh", "exp", "sigmoid", "sin", "sinh", "square", "tanh")}


def kind_of(name, primals, results, is_first, is_complex):
    """The kind of a call of the function `name` with the active tensors `primals`. None for one that is not known.

    `is_first` says whether only the first argument is active, and `is_complex` whether any active one is complex.
    """
    count = len(primals)
    if name in _LINEAR:
        return steps.LINEAR
    if name in _PRODUCTS or name in _BILINEAR:
        if count == 1:
            return steps.LINEAR
        return steps.GENERAL if count > 2 else steps.PRODUCT if name in _PRODUCTS else steps.BILINEAR
    if name in _LINEAR_IN_FIRST and is_first:
        return steps.LINEAR
    is_one = count == len(results) == 1 and not is_complex
    if name in _ELEMENTWISE and is_one and primals[0].shape == results[0].shape:
        return steps.ELEMENTWISE
    is_known = name in _GENERAL or name in _ELEMENTWISE or name in _LINEAR_IN_FIRST
    return steps.GENERAL if is_known else None
