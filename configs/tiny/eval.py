"""Recall of the tiny teacher and of the students of all arms, on the same prompts.

    python -m hydrajax.evals --config=configs/tiny/eval.py

CPU, under a minute. Ends with the table teacher / causal / random / layerwise.
"""

from configs import common
from configs.tiny.model import FAMILY, TEACHER

ARMS = ("causal", "random", "layerwise")


def get_config(argument: str | None = None):
    common.variants(argument)
    config = common.base("safe")
    config.teacher = TEACHER
    config.out = common.run_dir(FAMILY, "all", "eval")
    config.eval.runs = tuple(f"{arm}={common.run_dir(FAMILY, arm, 'extend')}" for arm in ARMS)
    config.eval.tasks = ("recall",)
    config.eval.lengths = (32, 64)
    config.eval.depths = 5
    config.eval.agreement_rows = 0
    config.eval.prompts = 20
    config.eval.rows = 50
    config.eval.ppl_lengths = (64,)
    config.eval.ppl_tokens = 8192
    config.data.synthetic = "recall"
    config.data.synthetic_share = 1.0
    config.data.answer_only = True
    config.data.seq_len = 64
    config.train.compute_dtype = "float32"
    return config
