"""Distil the aligned tiny student end to end: KL to the teacher over all answers.

python train.py --config=configs/tiny/distill.py[:arm=random|layerwise]
"""

from configs import common
from configs.tiny.model import stage


def get_config(argument: str | None = None):
    options = common.variants(argument, arm="causal", preset="safe")
    config = stage("distill", options)
    config.parent = common.run_dir("tiny", options["arm"], "align")
    config.train.steps = 30
    config.optim.peak_lr = 1e-3
    config.optim.end_lr = 1e-5
    return config
