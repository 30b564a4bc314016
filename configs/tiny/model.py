"""Facts of the tiny teacher: 4 layers x 8 heads over bytes, 0.18 M parameters."""

from configs import common
from hydrajax.config import ModelConfig

FAMILY = "tiny"
TEACHER = "teachers/tiny"

MODEL = ModelConfig(
    family="llama",
    vocab_size=259,  # bytes, then bos, eos, pad
    width=64,
    mlp_width=128,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    tied_embeddings=True,
    max_context=256,
    bos_id=256,
    eos_ids=(257,),
    pad_id=258,
)


def stage(name: str, options: dict[str, str]):
    """What the tiny stages share: fp32 on CPU, rows of recall, loss on the answers."""
    config = common.stage(FAMILY, TEACHER, name, options)
    config.data.synthetic = "recall"
    config.data.synthetic_share = 1.0
    config.data.answer_only = True
    config.data.seq_len = 64
    config.data.rows = 32
    config.hydra.chunk = 16  # rows are short; smaller chunks compile and run faster on CPU
    config.train.compute_dtype = "float32"
    config.train.remat = "none"
    config.optim.warmup_steps = 10
    return config
