"""Facts of the Qwen3-8B road; its stages, budgets and data are those of Qwen3-1.7B.

The teacher is imported by
    python convert_torch.py import --source Qwen/Qwen3-8B --out teachers/qwen3_8b
"""

from dataclasses import replace

from configs.qwen3_1p7b import model as smaller
from hydrajax.config import to_plain

FAMILY = "qwen3_8b"

# config.json of Qwen/Qwen3-8B.
MODEL = replace(
    smaller.MODEL, width=4096, mlp_width=12_288, num_layers=36, num_heads=32, tied_embeddings=False
)


def enlarged(config):
    """A run of Qwen3-1.7B for this teacher: shapes and folders change, nothing else."""
    for name in ("out", "parent", "teacher", "heads"):
        config[name] = config[name].replace(smaller.FAMILY, FAMILY)
    config.eval.runs = tuple(run.replace(smaller.FAMILY, FAMILY) for run in config.eval.runs)
    if config.model and config.model.width == smaller.MODEL.width:  # no smoke run
        config.model = to_plain(MODEL)
    return config
