"""FLOPs of a training step from shapes, and the share of a device's peak that they make (MFU).

Counted are the multiplications of the mathematics: no recomputation by remat, causal attention
at half the square, embeddings as look-ups. One multiply-add is two FLOPs. Per token:

    matmul with P weights      forward 2 P, gradient of the input 2 P, of the weights 2 P
    FA head, T tokens          forward 2 T H (Q K^T and P V, 4 T H, halved), backward twice that
    LA head, chunk C, E = H    forward 8 C H + 6 H^2, backward 20 C H + 14 H^2
"""

from dataclasses import dataclass

from hydrajax.config import ModelConfig
from hydrajax.head_plan import HeadPlan

# bf16 dense FLOP/s of one JAX device, by a part of its kind; the first match counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip is two devices
}
CHUNK = 64  # counted, whatever runs: longer chunks do more work for the same mathematics


@dataclass(frozen=True)
class Counts:
    """Weights and head counts of a model, by the way they enter training."""

    inputs: int  # projections out of the block's input: q, k, v, gates
    outputs: int  # W_O
    mlps: int
    unembed: int
    fa_heads: int
    la_heads: int
    head_dim: int

    @property
    def weights(self) -> int:
        return self.inputs + self.outputs + self.mlps + self.unembed

    def mixing(self, seq_len: int, *, backward: bool) -> float:
        """FLOPs per token of attention and of the gated delta rule, forward or backward."""
        h = self.head_dim
        if backward:
            return self.fa_heads * 4 * seq_len * h + self.la_heads * (20 * CHUNK * h + 14 * h * h)
        return self.fa_heads * 2 * seq_len * h + self.la_heads * (8 * CHUNK * h + 6 * h * h)


def count(cfg: ModelConfig, plan: HeadPlan, *, gated: bool) -> Counts:
    """Counts of a student, or of a teacher (all heads full, not gated)."""
    d, h = cfg.width, cfg.head_dim
    inputs = fa_heads = 0
    for l in range(plan.num_layers):
        layer = plan.layer(l)
        fa, la = len(layer.fa), len(layer.la)
        fa_heads += fa
        inputs += d * h * (fa + 2 * len(layer.kv_fa) + gated * fa)  # q, k and v, gate
        inputs += d * la * (3 * h + gated * h + 2)  # q, k and v, gate, decay and beta
    layers = plan.num_layers
    return Counts(
        inputs=inputs,
        outputs=layers * cfg.num_heads * h * d,
        mlps=layers * 3 * d * cfg.mlp_width,
        unembed=d * cfg.vocab_size,
        fa_heads=fa_heads,
        la_heads=layers * cfg.num_heads - fa_heads,
        head_dim=h,
    )


def train_flops_per_token(
    cfg: ModelConfig, plan: HeadPlan, seq_len: int, stage: str, *, cached: bool = False
) -> float:
    """FLOPs per token of one training step of a stage, its teacher's forward included.

    Assumes the default shapes of HydraConfig, no teacher in extend (kl_weight = 0), and none in
    distill where its words are `cached`.
    """
    student = count(cfg, plan, gated=stage != "pretrain")
    full = HeadPlan.all_full(plan.num_layers, plan.num_heads, plan.num_kv_heads)
    teacher = count(cfg, full, gated=False)
    teacher_forward = 2 * teacher.weights + teacher.mixing(seq_len, backward=False)
    mixing = student.mixing(seq_len, backward=False) + student.mixing(seq_len, backward=True)
    if stage == "align":
        # Block inputs are the teacher's: no gradient flows into them, and none through an MLP.
        # The teacher stops before its logits.
        blocks = 4 * student.inputs + 6 * student.outputs + mixing
        return blocks + teacher_forward - 2 * teacher.unembed
    own = 6 * student.weights + mixing
    return own + teacher_forward if stage == "distill" and not cached else own


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device; None when unknown, so that no MFU is made up."""
    matches = (peak for name, peak in PEAK_FLOPS.items() if name.lower() in device_kind.lower())
    return next(matches, None)


def mfu(tokens_per_s: float, flops_per_token: float, device_kind: str) -> float | None:
    """Model FLOPs utilisation of one device at `tokens_per_s` per device."""
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_s * flops_per_token / peak
