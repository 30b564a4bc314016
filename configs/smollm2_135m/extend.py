"""Train the distilled SmolLM2 student on next tokens at 2K context, retrieval mixed in.

python train.py --config=configs/smollm2_135m/extend.py[:arm=random]
"""

from configs import common
from configs.smollm2_135m.model import FAMILY, stage


def get_config(argument: str | None = None):
    options = common.variants(argument, arm="causal", smoke="", preset="safe")
    config = stage("extend", options)
    config.parent = common.run_dir(FAMILY, options["arm"], "distill")
    config.data.seq_len = 2048
    config.data.rows = 16
    config.train.steps = 100
    config.train.remat = "block"  # 32K tokens a step beside another run
    config.optim.peak_lr = 3e-5
    config.optim.schedule = "constant"
    return common.smoke(config) if options["smoke"] else config
