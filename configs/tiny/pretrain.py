"""Train the tiny retrieval teacher from scratch on synthetic recall.

    python train.py --config=configs/tiny/pretrain.py

The teacher in configs/tiny/teacher was made by this command and exported from runs/tiny/pretrain.
"""

from configs import common
from configs.tiny.model import FAMILY, MODEL
from hydrajax.config import to_plain


def get_config(argument: str | None = None):
    options = common.variants(argument, smoke="")
    config = common.base()
    config.stage = "pretrain"
    config.model = to_plain(MODEL)
    config.tokenizer = "bytes"
    config.out = common.run_dir(FAMILY, "pretrain")
    config.data.synthetic = "recall"
    config.data.synthetic_share = 1.0
    config.data.answer_only = True
    config.data.seq_len = 64
    config.data.rows = 32
    # A high, constant rate and small batches: recall appears suddenly, and a decaying rate or
    # large batches wait for it much longer.
    config.optim.peak_lr = 3e-3
    config.optim.schedule = "constant"
    config.train.steps = 1500
    config.train.compute_dtype = "float32"
    config.train.remat = "none"
    config.train.log_every = 100
    if options["smoke"]:
        config.train.steps, config.train.log_every, config.data.rows = 4, 1, 8
        config.out = common.run_dir("smoke", FAMILY, "pretrain")
    return config
