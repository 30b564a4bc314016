"""Needle recall and perplexity of Qwen3-8B and its students, as configs/qwen3_1p7b/eval.py.

python -m hydrajax.evals --config=configs/qwen3_8b/eval.py
"""

from configs.qwen3_1p7b import eval as smaller
from configs.qwen3_8b.model import enlarged


def get_config(argument: str | None = None):
    return enlarged(smaller.get_config(argument))
