"""Depthwise causal convolution over sequences and for one token."""

from pallas_kernels.causal_conv.api import causal_conv, causal_conv_step

__all__ = ["causal_conv", "causal_conv_step"]
