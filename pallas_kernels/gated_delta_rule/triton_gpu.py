"""The gated delta rule on NVIDIA Ampere and Ada: what it takes, and its forward in Triton kernels.

`prepare` inverts I + A of all chunks at once, `recurrence` walks over the chunks of a head with the
state, `read` computes the outputs of all chunks from the states it leaves (letters and formulas:
README). Triton is imported where a kernel is called, through jax-triton. On Hopper, where Triton
has compiled such kernels wrongly without a word (fla-org/flash-linear-attention issues 640 and
984), it is taken only by name.

    B batch   T tokens   K key heads   R value heads   Z chunks   C rows of a chunk
    H key dim   E value dim
"""

from pallas_kernels.dispatch import decline
from pallas_kernels.gated_delta_rule import triton_gpu_launch
from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import gate_rows

NAME = triton_gpu_launch.NAME
CHUNK = 64
HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float32")


def check(params) -> None:
    """Decline without jax-triton and what the kernels are not written for."""
    check_operands(params)
    if params.config.chunk != CHUNK:
        raise decline(NAME, f"needs chunks of {CHUNK}", params.config.chunk)
    triton_gpu_launch.jax_triton()


def check_operands(params) -> None:
    """Decline other dtypes and dims."""
    if params.dtype.name not in DTYPES:
        raise decline(NAME, f"takes {', '.join(DTYPES)}", params.dtype)
    dims = params.shape_q[-1], params.shape_v[-1]
    if not set(dims) <= set(HEAD_DIMS):
        raise decline(NAME, f"needs key and value dims in {HEAD_DIMS}", dims)


def check_device(kind: str | None) -> None:
    """Decline what is neither Ampere nor Ada; None is a device that is not known while tracing."""
    if triton_gpu_launch.capability(kind) is None:
        raise decline(NAME, "runs by default on Ampere and Ada (sm_80, sm_86, sm_89)", kind)


def forward(params, q, k, v, g, beta, runs, initial_state):
    """Return (o, last state, inverses [Z,B,R,C,C], states at the chunk starts [Z,B,R,H,E])."""
    from pallas_kernels.gated_delta_rule.triton_gpu_prepare import prepare
    from pallas_kernels.gated_delta_rule.triton_gpu_recurrence import read, recurrence

    gates = gate_rows(params.config.chunk, g, beta, runs)
    t_inv = prepare(k, gates)
    v_new, states, state = recurrence(k, v, gates, t_inv, initial_state)
    o = read(params.scale, q, k, gates, states, v_new)
    return o, state, t_inv, states
