"""Softmax attention over sequences and for one token."""

from pallas_kernels.attention.api import attention, attention_step

__all__ = ["attention", "attention_step"]
