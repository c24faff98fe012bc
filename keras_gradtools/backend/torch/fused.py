"""Prevents Keras from using fused kernels without a second derivative while a tape is recording.

Flash and memory-efficient attention, and cuDNN's recurrent layers, have no second derivative, and torch chooses the
kernel in the forward pass. Its own switches (`sdpa_kernel`, `cudnn.flags`) would affect all threads. A
`TorchFunctionMode` affects only one thread, but costs microseconds for each operation and attribute. So it is only used
around attention, and around wrapped torch modules, which may contain attention.
"""

import functools

import torch
from torch.overrides import TorchFunctionMode

from keras_gradtools.backend.torch import checkpoint
from keras_gradtools.keras_internals import backend_modules
from keras_gradtools.keras_internals.layers import TorchModuleWrapper
from keras_gradtools.keras_state import recording

_fused_attention = torch.nn.functional.scaled_dot_product_attention
_module_attention = torch.nn.functional.multi_head_attention_forward


class _MathAttention(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _fused_attention:
            return _math_attention(*args, **kwargs)
        if func is _module_attention and not kwargs.get("need_weights", True):
            # The mode is not active inside this function. If it must return the weights, it uses unfused operations.
            output, _ = func(*args, **{**kwargs, "need_weights": True})
            return output, None
        return func(*args, **kwargs)


def _math_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    output, _ = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return output


def install():
    backend_modules.hooks["nn"]["dot_product_attention"].replace(_with_math_attention)
    TorchModuleWrapper.call = _with_math_attention(_with_reads(TorchModuleWrapper.call))
    backend_modules.hooks["rnn"]["cudnn_ok"].replace(_unless_recording)


def _with_math_attention(fun):
    @functools.wraps(fun)
    def call(*args, **kwargs):
        if not _is_recorded():
            return fun(*args, **kwargs)
        with _MathAttention():
            return fun(*args, **kwargs)

    return call


def _with_reads(call):
    @functools.wraps(call)
    def read_and_call(self, *args, **kwargs):
        if recording.is_recording():
            # A torch module reads its parameters without calling Keras, so tapes and logs would not see these reads.
            for variable in self.variables:
                _ = variable.value
        return call(self, *args, **kwargs)

    return read_and_call


def _unless_recording(is_supported):
    @functools.wraps(is_supported)
    def check(*args, **kwargs):
        return not _is_recorded() and is_supported(*args, **kwargs)

    return check


def _is_recorded():
    # A checkpoint must recompute with the same kernels as in the forward pass.
    return bool(recording.active_tapes()) or checkpoint.is_recomputing()
