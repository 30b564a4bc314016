"""Choose Qwen3-8B's FA heads as configs/qwen3_1p7b/select.py does.

    python -m hydrajax.selection --config=configs/qwen3_8b/select.py[:arm=random]

Not yet run on the real weights.
"""

from configs.qwen3_1p7b import select as smaller
from configs.qwen3_8b.model import enlarged


def get_config(argument: str | None = None):
    return enlarged(smaller.get_config(argument))
