"""Array annotations, the shape legend and the one error type that users see.

Shape letters, used in annotations and as suffixes of names (`q_BTAH`):

    B batch rows        T query tokens      S key tokens, cache   D model width
    F MLP width         V vocabulary        L layers              N query heads = A + R
    K KV heads          G queries per KV    A FA heads of a layer R LA heads of a layer
    H head dim of q, k  E value dim         C chunk length        Z chunks, T = Z C
    W conv width        P packed segments
"""

from jax import Array
from jaxtyping import Bool, Float, Int

__all__ = ["Array", "Bool", "Float", "Int", "Params", "UserError"]

# Parameters outside of a module are one flat dict, "layers.0.attn.fa.w_q" -> array: masks,
# optimiser states, checkpoints, converters and error messages all speak of the same strings.
Params = dict[str, Array]


class UserError(Exception):
    """A mistake in input, files or flags: printed as one line without a traceback, exit code 2."""
