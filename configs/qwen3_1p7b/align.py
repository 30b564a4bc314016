"""Align the Qwen3-1.7B student: 20k steps of 32 x 512 tokens (0.33 B), 1e-3 to 1e-5.

    python train.py --config=configs/qwen3_1p7b/align.py[:arm=random]

Not yet run on the real weights: these are the published budgets.
"""

from configs import common
from configs.qwen3_1p7b.model import FAMILY, stage


def get_config(argument: str | None = None):
    options = common.variants(argument, arm="causal", smoke="", preset="paper")
    config = stage("align", options)
    config.heads = common.run_dir(FAMILY, options["arm"], "select/heads.json")
    config.data.seq_len, config.data.rows = 512, 32
    config.train.steps = 20_000
    config.optim.peak_lr, config.optim.end_lr = 1e-3, 1e-5
    return common.smoke(config) if options["smoke"] else config
