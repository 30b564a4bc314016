"""A hand-built teacher for task `recall`: which head does what is known by construction."""

import jax.numpy as jnp
import numpy as np

from hydrajax.config import HydraConfig
from hydrajax.data.synthetic import VALUES
from hydrajax.head_plan import HeadPlan
from hydrajax.model import abstract_model, split_params
from hydrajax.model_config import ModelConfig, RopeConfig

CODE = 128  # one direction per ASCII character
STEP_BACK, RELAY, WRITER = (0, 0), (0, 1), (1, 2)  # (layer, head)


def circuit(relay: bool = False):
    """(model, plan, graphdef, params) of a teacher whose head 2 of layer 1 knows the answer.

    The residual has parts: this character, the one before it, the answer, a copy of this
    character. In layer 0 head 0 attends one step back by rope alone (constant q and k, k turned by
    one step) and copies the character over; in layer 1, without rope, head 2 looks for the place
    whose predecessor is the present character and writes what stands there as the answer. With
    `relay` it reads there what head 1 of layer 0 has copied from the same place, so that the
    answer goes through two heads. All other heads are zero.
    """
    model = ModelConfig(
        family="qwen2", vocab_size=259, width=4 * CODE, mlp_width=2, num_layers=2, num_heads=3,
        num_kv_heads=3, head_dim=CODE, qkv_bias=True, tied_embeddings=False, no_rope_layers=(1,),
        rope=RopeConfig(theta=100.0), max_context=64,
    )  # fmt: skip
    plan = HeadPlan.all_full(2, 3, 3)
    graphdef, shapes = split_params(
        abstract_model(model, HydraConfig.teacher(), plan, dtype=jnp.float32)
    )
    params = {path: np.zeros(s.shape, np.float32) for path, s in shapes.items()}
    here, before, answer, copy = (slice(i * CODE, (i + 1) * CODE) for i in range(4))
    eye = np.eye(CODE, dtype=np.float32)
    for path in params:
        if path.endswith("scale"):
            params[path][:] = 1
    params["embed.w"][:CODE, here] = eye
    # Values alone can be said: a row also repeats its keys, which this circuit would find too.
    values = [ord(v) for v in VALUES]
    params["unembed.w"][answer, values] = eye[:, values]
    turn = 100.0 ** -(np.arange(0, CODE, 2) / CODE)
    size = np.sqrt(model.width)  # of what the norm makes of one character: parts stay equal
    first, second = "layers.0.attn", "layers.1.attn"
    straight = np.r_[np.ones(CODE // 2), np.zeros(CODE // 2)]
    params[f"{first}.fa.b_q"][:2] = 8 * straight
    params[f"{first}.fa.b_k"][0] = 8 * np.r_[np.cos(turn), np.sin(turn)]
    params[f"{first}.fa.w_v"][here, 0] = eye
    params[f"{first}.w_o"][0, :, before] = eye / size
    if relay:
        params[f"{first}.fa.b_k"][1] = 8 * straight
        params[f"{first}.fa.w_v"][here, 1] = eye
        params[f"{first}.w_o"][1, :, copy] = eye / size
    params[f"{second}.fa.w_q"][here, 2] = 4 * eye
    params[f"{second}.fa.w_k"][before, 2] = 4 * eye
    params[f"{second}.fa.w_v"][copy if relay else here, 2] = eye
    params[f"{second}.w_o"][2, :, answer] = eye
    return model, plan, graphdef, params
