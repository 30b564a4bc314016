"""Gated delta rule, attention and causal convolution with a choice of implementations.

o, state = gated_delta_rule(q, k, v, g, beta)        o, state = gated_delta_step(..., state)
o        = attention(q, k, v)                        o        = attention_step(q, k_cache, ...)
y, state = causal_conv(x, w)                         y, state = causal_conv_step(x, w, state)
"""

from pallas_kernels.attention import attention, attention_step
from pallas_kernels.causal_conv import causal_conv, causal_conv_step
from pallas_kernels.gated_delta_rule import (
    GatedDeltaConfig,
    gated_delta_rule,
    gated_delta_step,
)

__all__ = [
    "GatedDeltaConfig",
    "attention",
    "attention_step",
    "causal_conv",
    "causal_conv_step",
    "gated_delta_rule",
    "gated_delta_step",
]
