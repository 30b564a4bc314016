"""Needle recall and perplexity of SmolLM2 and its students, on the same prompts and text.

python -m hydrajax.evals --config=configs/smollm2_135m/eval.py
"""

from configs import common
from configs.smollm2_135m.model import FAMILY, TEACHER, TEXT

ARMS = ("causal", "random")


def get_config(argument: str | None = None):
    options = common.variants(argument, smoke="")
    config = common.base("safe")
    config.teacher = TEACHER
    config.out = common.run_dir(FAMILY, "all", "eval")
    config.eval.runs = tuple(f"{arm}={common.run_dir(FAMILY, arm, 'extend')}" for arm in ARMS)
    config.eval.tasks = ("needle_single_2", "needle_multikey_1")
    config.eval.lengths = (512, 1024, 2048, 4096)
    config.eval.depths = 5
    config.eval.prompts = 40
    config.eval.rows = 20
    config.eval.ppl_lengths = (1024, 4096)
    config.eval.ppl_tokens = 262_144
    config.data.files = (TEXT,)
    return common.smoke(config) if options["smoke"] else config
