"""Facts of the Qwen3-1.7B road: folders, data, what its stages share.

Preset `paper` with HALO's budgets and rates (2601.22156; HydraHead reports the same ones). The
teacher is imported by
    python convert_torch.py import --source Qwen/Qwen3-1.7B --out teachers/qwen3_1p7b
(a hub id or a local folder) and the text tokenised by
    python -m hydrajax.data --files ... --tokenizer teachers/qwen3_1p7b --out corpora/qwen3.tokens
"""

from configs import common
from configs.qwen3_1p7b import teacher
from hydrajax.config import to_plain
from hydrajax.model_config import ModelConfig, RopeConfig

FAMILY = "qwen3_1p7b"
TEACHER = "teachers/qwen3_1p7b"
TEXT = "corpora/qwen3.tokens"

# config.json of Qwen/Qwen3-1.7B.
MODEL = ModelConfig(
    family="qwen3", vocab_size=151_936, width=2048, mlp_width=6144, num_layers=28, num_heads=16,
    num_kv_heads=8, head_dim=128, qk_norm=True, rope=RopeConfig(theta=1e6), max_context=40_960,
)  # fmt: skip


def stage(name: str, options: dict[str, str]):
    """What the Qwen3 stages share. The mesh is for 8 devices; widen fsdp for a pod."""
    config = common.stage(FAMILY, TEACHER, name, options)
    config.model = to_plain(teacher.MODEL if options["smoke"] else MODEL)
    config.data.files = (TEXT,)
    config.data.workers = 4
    config.train.save_every = 500
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config
