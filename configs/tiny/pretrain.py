"""Train the tiny retrieval teacher from scratch on synthetic recall.

python train.py --config=configs/tiny/pretrain.py:short      (8 pairs a row)
python train.py --config=configs/tiny/pretrain.py            (up to 32, starts from the former)
"""

from configs import common
from configs.tiny.model import FAMILY, MODEL
from hydrajax.config import to_plain


def get_config(argument: str | None = None):
    options = common.variants(argument, smoke="", short="")
    config = common.base()
    config.stage = "pretrain"
    config.model = to_plain(MODEL)
    config.tokenizer = "bytes"
    config.out = common.run_dir(FAMILY, "pretrain_short" if options["short"] else "pretrain")
    config.parent = "" if options["short"] else common.run_dir(FAMILY, "pretrain_short")
    config.data.synthetic = "recall"
    config.data.synthetic_share = 1.0
    config.data.answer_only = True
    config.data.seq_len = 48 if options["short"] else 128
    config.data.rows = 256 if options["short"] else 128
    config.optim.peak_lr = 2e-3
    config.optim.end_lr = 1e-4
    config.train.steps = 3000 if options["short"] else 2000
    config.train.compute_dtype = "float32"
    config.train.remat = "none"
    config.train.loss_chunk = 16384
    config.train.log_every = 100
    if options["smoke"]:
        config.train.steps, config.train.log_every, config.data.rows = 4, 1, 8
        config.out, config.parent = common.run_dir(FAMILY, "smoke", "pretrain"), ""
    return config
