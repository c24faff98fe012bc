"""Keeps Keras, while a tape is recording, from the fused kernels of torch that have no second derivative.

Which kernel runs is decided in the forward pass: flash and memory-efficient attention, and cuDNN's recurrent
layers. torch's own switches (`sdpa_kernel`, `cudnn.flags`) are those of the whole process, and other threads
would see them. A `TorchFunctionMode` belongs to a thread, but costs microseconds for each operation and
attribute under it; so it is laid around attention alone, and around wrapped torch modules, which may hold some.
"""

import functools

import torch
from torch.overrides import TorchFunctionMode

from keras_gradtools.backend import recording, torch_checkpoint
from keras_gradtools.keras_internals import backend_modules
from keras_gradtools.keras_internals.layers import TorchModuleWrapper

_fused_attention = torch.nn.functional.scaled_dot_product_attention
_module_attention = torch.nn.functional.multi_head_attention_forward


class _MathAttention(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _fused_attention:
            return _math_attention(*args, **kwargs)
        if func is _module_attention and not kwargs.get("need_weights", True):
            # The mode is off in here, but whoever asks for the weights gets them from unfused operations.
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
        if recording.active_tapes():
            # The module reads its parameters past Keras, and the tapes would not see it.
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
    # What a checkpoint computes again in a backward pass has to take the kernels of the forward pass.
    return bool(recording.active_tapes()) or torch_checkpoint.is_recomputing()
