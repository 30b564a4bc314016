"""Extend the Qwen3-1.7B student to 16K: 500 steps of 128 x 16,384 tokens (1.05 B), 1e-5.

    python train.py --config=configs/qwen3_1p7b/extend.py[:arm=random]

Not yet run on the real weights: these are the published budgets.
"""

from configs import common
from configs.qwen3_1p7b.model import FAMILY, stage


def get_config(argument: str | None = None):
    options = common.variants(argument, arm="causal", smoke="", preset="paper")
    config = stage("extend", options)
    config.parent = common.run_dir(FAMILY, options["arm"], "distill")
    config.data.seq_len, config.data.rows, config.train.accum = 16_384, 128, 16
    config.train.steps = 500
    config.optim.peak_lr, config.optim.schedule = 1e-5, "constant"
    if options["smoke"]:
        config.train.accum = 2
    return common.smoke(config) if options["smoke"] else config
