"""Choose Qwen3-1.7B's FA heads at 3:1 by counterfactual needle pairs.

    python -m hydrajax.selection --config=configs/qwen3_1p7b/select.py[:arm=random]

Not yet run on the real weights. Writes runs/qwen3_1p7b/<arm>/select/.
"""

from configs import common
from configs.qwen3_1p7b.model import FAMILY, TEACHER, TEXT


def get_config(argument: str | None = None):
    options = common.variants(argument, arm="causal", smoke="", preset="paper")
    config = common.base(options["preset"])
    config.teacher = TEACHER
    config.out = common.run_dir(FAMILY, options["arm"], "select")
    config.select.context = 4096
    config.select.rows = 2
    if options["preset"] == "halo":
        config.select.layers = (2, 3, 6, 8, 9, 21, 25)  # HALO's own choice for this teacher
    config.data.files = (TEXT,)
    common.set_arm(config, options["arm"])
    return common.smoke(config) if options["smoke"] else config
