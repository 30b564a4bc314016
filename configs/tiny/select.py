"""Choose the tiny teacher's FA heads by counterfactual recall pairs.

    python -m hydrajax.selection --config=configs/tiny/select.py[:arm=random|layerwise]

CPU, seconds. Writes runs/tiny/<arm>/select/heads.json and heads.png.
"""

from configs import common
from configs.tiny.model import FAMILY, TEACHER


def get_config(argument: str | None = None):
    options = common.variants(argument, arm="causal", preset="safe")
    config = common.base(options["preset"])
    config.teacher = TEACHER
    config.out = common.run_dir(FAMILY, options["arm"], "select")
    config.select.probes = ("recall",)
    config.select.context = 64
    config.select.pairs = 32
    config.select.rows = 32
    # Recall is all this teacher can do, so it is its general ability too.
    config.select.text_rows = 32
    config.select.text_tokens = 64
    config.data.synthetic = "recall"
    config.data.synthetic_share = 1.0
    config.data.answer_only = True
    common.set_arm(config, options["arm"])
    return config
