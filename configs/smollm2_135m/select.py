"""Choose SmolLM2's FA heads at 3:1 by counterfactual needle pairs.

    python -m hydrajax.selection --config=configs/smollm2_135m/select.py[:arm=random]

One H100 or H200: under a minute. Writes runs/smollm2_135m/<arm>/select/.
"""

from configs import common
from configs.smollm2_135m.model import FAMILY, TEACHER, TEXT


def get_config(argument: str | None = None):
    options = common.variants(argument, arm="causal", smoke="", preset="safe")
    config = common.base(options["preset"])
    config.teacher = TEACHER
    config.out = common.run_dir(FAMILY, options["arm"], "select")
    config.select.context = 1024
    config.select.text_rows = 64
    config.select.report = "scores"  # "full" adds knock-out, stability and agreement: minutes more
    config.data.files = (TEXT,)
    common.set_arm(config, options["arm"])
    return common.smoke(config) if options["smoke"] else config
