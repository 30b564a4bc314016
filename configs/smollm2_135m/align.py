"""Align the hybrid blocks of the SmolLM2 student with the teacher's, all layers at once.

python train.py --config=configs/smollm2_135m/align.py[:arm=random]
"""

from configs import common
from configs.smollm2_135m.model import FAMILY, stage


def get_config(argument: str | None = None):
    options = common.variants(argument, arm="causal", smoke="", preset="safe")
    config = stage("align", options)
    config.heads = common.run_dir(FAMILY, options["arm"], "select/heads.json")
    config.train.steps = 150
    config.optim.peak_lr = 1e-3
    config.optim.end_lr = 1e-5
    return common.smoke(config) if options["smoke"] else config
