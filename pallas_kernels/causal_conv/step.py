"""One token of the depthwise causal convolution for decoding.

y = act(sum_j w_{W-1-j} x_{-j})          x_0 the new token, x_{-1} ... the state

B batch   W taps, the last one for the current token   C channels
"""

from pallas_kernels.causal_conv.reference import apply_step as apply
from pallas_kernels.causal_conv.reference import check

# W products a channel and one shift of the state: XLA fuses the definition into one kernel, so it
# is the implementation too.
__all__ = ["apply", "check"]
