"""Train the distilled tiny student on next tokens at twice the context.

python train.py --config=configs/tiny/extend.py[:arm=random|layerwise]
"""

from configs import common
from configs.tiny.model import stage


def get_config(argument: str | None = None):
    options = common.variants(argument, arm="causal", preset="safe")
    config = stage("extend", options)
    config.parent = common.run_dir("tiny", options["arm"], "distill")
    config.data.seq_len = 128
    config.data.rows = 16
    config.train.steps = 10
    config.optim.peak_lr = 1e-4
    config.optim.schedule = "constant"
    return config
