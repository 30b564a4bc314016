"""Extend the Qwen3-8B student to 16K: the budget of configs/qwen3_1p7b/extend.py.

    python train.py --config=configs/qwen3_8b/extend.py[:arm=random]

Not yet run on the real weights.
"""

from configs.qwen3_1p7b import extend as smaller
from configs.qwen3_8b.model import enlarged


def get_config(argument: str | None = None):
    return enlarged(smaller.get_config(argument))
