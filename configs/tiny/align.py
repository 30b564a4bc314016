"""Align the tiny student's hybrid blocks with the teacher's, layer by layer.

python train.py --config=configs/tiny/align.py[:arm=random|layerwise]
"""

from configs import common
from configs.tiny.model import stage


def get_config(argument: str | None = None):
    options = common.variants(argument, arm="causal", preset="safe")
    config = stage("align", options)
    config.heads = common.run_dir("tiny", options["arm"], "select/heads.json")
    config.train.steps = 50
    config.optim.peak_lr = 3e-3
    config.optim.end_lr = 1e-4
    return config
