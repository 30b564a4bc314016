"""Distil the Qwen3-8B student: the budget of configs/qwen3_1p7b/distill.py.

    python train.py --config=configs/qwen3_8b/distill.py[:arm=random]

Not yet run on the real weights.
"""

from configs.qwen3_1p7b import distill as smaller
from configs.qwen3_8b.model import enlarged


def get_config(argument: str | None = None):
    return enlarged(smaller.get_config(argument))
