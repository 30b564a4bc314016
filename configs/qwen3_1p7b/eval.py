"""Needle recall and perplexity of Qwen3-1.7B and its students, on the same prompts and text.

python -m hydrajax.evals --config=configs/qwen3_1p7b/eval.py
"""

from configs import common
from configs.qwen3_1p7b.model import FAMILY, TEACHER, TEXT

ARMS = ("causal", "random")


def get_config(argument: str | None = None):
    options = common.variants(argument, smoke="")
    config = common.base("paper")
    config.teacher = TEACHER
    config.out = common.run_dir(FAMILY, "all", "eval")
    config.eval.runs = tuple(f"{arm}={common.run_dir(FAMILY, arm, 'extend')}" for arm in ARMS)
    config.eval.tasks = ("needle_single_2", "needle_multikey_1", "kv_list")
    config.eval.lengths = (4096, 16_384, 65_536)
    config.eval.depths = 5
    config.eval.prompts = 40
    config.eval.rows = 1
    config.eval.ppl_lengths = (4096,)
    config.eval.ppl_tokens = 262_144
    config.data.files = (TEXT,)
    return common.smoke(config) if options["smoke"] else config
