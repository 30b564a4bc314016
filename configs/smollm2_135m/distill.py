"""Distil the aligned SmolLM2 student: KL to the teacher over the whole vocabulary.

python train.py --config=configs/smollm2_135m/distill.py[:arm=random]
"""

from configs import common
from configs.smollm2_135m.model import FAMILY, stage


def get_config(argument: str | None = None):
    options = common.variants(argument, arm="causal", smoke="", preset="safe")
    config = stage("distill", options)
    config.parent = common.run_dir(FAMILY, options["arm"], "align")
    config.data.rows = 32
    config.train.steps = 1500
    config.train.save_every = 500
    config.optim.peak_lr = 6e-4
    config.optim.warmup_steps = 50
    config.optim.end_lr = 1e-5
    return common.smoke(config) if options["smoke"] else config
