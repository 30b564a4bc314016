"""A random teacher of SmolLM2's shape for `:smoke` runs; the real one is imported.

python train.py --config=configs/smollm2_135m/teacher.py
"""

from configs import common
from hydrajax.config import ModelConfig

MODEL = ModelConfig(
    family="llama", vocab_size=259, width=48, mlp_width=64, num_layers=3, num_heads=6,
    num_kv_heads=2, head_dim=16, max_context=512, bos_id=256, eos_ids=(257,), pad_id=258,
)  # fmt: skip


def get_config(argument: str | None = None):
    common.variants(argument, smoke="")
    return common.smoke_teacher("smollm2_135m", MODEL)
