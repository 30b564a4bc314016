"""Named sets of flags, by what they change against the defaults of `hydrajax.config`.

The flags that stages and selection own are apart; `paper`, `halo` and `safe` are explained in
README.md ("The method").
"""

from typing import Any

from hydrajax.model_config import one_of

HYDRA_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": dict(fa_logit_scale="always", la_short_conv="identity", gdn_init="fla"),
    "halo": dict(
        la_gate="sigmoid",
        neg_eigval=True,
        fusion="joint_norm",
        gdn_init="fla",
        gate_init="random",
        gamma_init="one",
        nope_from="distill",
    ),
    "safe": dict(fa_pos="rope", fa_logit_scale="off", fa_gate="none", fusion="la_only_norm"),
}
STAGE_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": dict(ce_weight=0.1),
    "halo": dict(align_scope="la_only"),
    "safe": dict(align_loss="rel_mse"),
}
SELECT_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": dict(alloc="global"),
    "halo": dict(scorer="layerwise", alloc="layerwise"),
    "safe": dict(scorer="patch_recv"),
}


def preset_values(name: str) -> dict[str, dict[str, Any]]:
    """Differences of a preset from the defaults, by section of RunConfig."""
    one_of("config", "preset", name, tuple(HYDRA_PRESETS))
    return {
        "hydra": HYDRA_PRESETS[name],
        "select": SELECT_PRESETS[name],
        "train": STAGE_PRESETS[name],
    }
