"""A random teacher for `:smoke` runs of the Qwen3-8B road; the real one is imported.

python train.py --config=configs/qwen3_8b/teacher.py
"""

from configs.qwen3_1p7b import teacher as smaller
from configs.qwen3_8b.model import enlarged


def get_config(argument: str | None = None):
    return enlarged(smaller.get_config(argument))
