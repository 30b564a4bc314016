"""A random teacher of Qwen3-1.7B's shape for `:smoke` runs; the real one is imported.

python train.py --config=configs/qwen3_1p7b/teacher.py
"""

from configs import common
from hydrajax.config import ModelConfig

MODEL = ModelConfig(
    family="qwen3", vocab_size=259, width=48, mlp_width=64, num_layers=3, num_heads=8,
    num_kv_heads=4, head_dim=16, qk_norm=True, max_context=512,
    bos_id=256, eos_ids=(257,), pad_id=258,
)  # fmt: skip


def get_config(argument: str | None = None):
    common.variants(argument, smoke="")
    return common.smoke_teacher("qwen3_1p7b", MODEL)
