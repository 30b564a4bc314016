"""Every knob once: frozen, validated dataclasses for model, method, data and runs.

A config file (configs/) edits a `ConfigDict` made by `to_config_dict(RunConfig())`, so each
field, its default and its comment live here and nowhere else. `RunConfig.from_dict` is the only
door back. Flag names and defaults follow the method notes in README.md ("The method").
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from hydrajax.model_config import ModelConfig, check_choices, one_of
from hydrajax.typing import UserError

CONV_WIDTH = 4  # taps of the short convolution of GDN heads
STAGES = ("pretrain", "align", "distill", "extend")


@dataclass(frozen=True)
class HydraConfig:
    """How the heads of a student compute: both branches, their fusion and their initialisation."""

    fa_pos: str = "nope"  # nope | rope | partial (a quarter of the dims)
    fa_logit_scale: str = "eval"  # eval | always | off: q *= ln(t + a) / ln(a)
    fa_logit_base: float = 500.0  # a
    fa_gate: str = "sigmoid"  # sigmoid (elementwise) | headwise | none
    fa_kv: str = "shared"  # shared (each used KV head once) | expanded (one per FA head)
    qkv_split: bool = True  # false ties the branches' K and V; needs la_kv=gqa, fa_kv=shared
    la_pos: str = "rope"  # rope | nope
    la_kv: str = "mha"  # mha (one KV head per LA head) | gqa (shared as in the teacher)
    la_short_conv: str = "off"  # off | identity | random
    la_qkv_act: str = "none"  # none | silu
    la_gate: str = "silu"  # silu | sigmoid | none
    neg_eigval: bool = False  # beta in (0, 2) instead of (0, 1)
    chunk: int = 0  # of the gated delta rule; 0: what suits the device, 128 on TPU and 64 elsewhere
    fusion: str = "scale_norm"  # see hydra.Fusion
    norm_weight: str = "per_branch"  # per_branch | per_head | none
    gate_pos: str = "post_norm"  # post_norm | pre_norm
    gdn_init: str = "taylor"  # taylor | fla
    gate_init: str = "near_one"  # near_one | random | blend
    gamma_init: str = "calibrated"  # calibrated | ols | one | zero_la
    nope_from: str = "align"  # align | distill: the stage at which FA heads lose rope

    def __post_init__(self):
        check_choices("hydra", self, {
            "fa_pos": ("nope", "rope", "partial"),
            "fa_logit_scale": ("eval", "always", "off"),
            "fa_gate": ("sigmoid", "headwise", "none"),
            "fa_kv": ("shared", "expanded"),
            "la_pos": ("rope", "nope"),
            "la_kv": ("mha", "gqa"),
            "la_short_conv": ("off", "identity", "random"),
            "la_qkv_act": ("none", "silu"),
            "la_gate": ("silu", "sigmoid", "none"),
            "fusion": ("scale_norm", "la_only_norm", "none", "scale_only", "gated_competition",
                       "joint_norm", "layer_norm_adapter"),
            "norm_weight": ("per_branch", "per_head", "none"),
            "gate_pos": ("post_norm", "pre_norm"),
            "gdn_init": ("taylor", "fla"),
            "gate_init": ("near_one", "random", "blend"),
            "gamma_init": ("calibrated", "ols", "one", "zero_la"),
            "nope_from": ("align", "distill"),
        })  # fmt: skip
        if not self.qkv_split and (self.la_kv, self.fa_kv) != ("gqa", "shared"):
            raise UserError(
                "hydra.qkv_split=False ties K and V of both branches and needs la_kv='gqa', "
                f"fa_kv='shared', got la_kv={self.la_kv!r}, fa_kv={self.fa_kv!r}."
            )
        if self.chunk and (self.chunk < 16 or self.chunk & (self.chunk - 1)):
            raise UserError(f"hydra.chunk must be 0 or a power of two >= 16, got {self.chunk}.")
        if self.fa_logit_base <= 1:
            raise UserError(f"hydra.fa_logit_base must exceed 1, got {self.fa_logit_base}.")

    @classmethod
    def teacher(cls) -> "HydraConfig":
        """The switches under which an all-full plan computes exactly the teacher."""
        return cls(fa_pos="rope", fa_logit_scale="off", fa_gate="none", fusion="none")

    def for_stage(self, stage: str) -> "HydraConfig":
        """What a stage really runs: `nope_from=distill` keeps rope in the FA heads until then."""
        if stage == "align" and self.nope_from == "distill":
            return dataclasses.replace(self, fa_pos="rope")
        return self


@dataclass(frozen=True)
class SelectConfig:
    """Which heads stay full attention, and how that is measured."""

    scorer: str = "patch"  # patch | patch_recv | atp | ablate | retrieval | duo | ppl; random |
    #                        fixed | layerwise are controls
    general: str = "ppl"  # fused with the scorer's retrieval: ppl | none
    fuse_norm: str = "minmax"  # minmax | rank: how capabilities become comparable
    alloc: str = "global_c"  # global | global_c (>= 1 a layer) | per_layer | layerwise
    unit: str = "q_head"  # q_head | kv_group
    ratio: float = 0.25  # share of units that stay full attention
    layers: tuple[int, ...] = ()  # layerwise: the full layers; empty = evenly spaced
    seed: int = 0
    probes: tuple[str, ...] = ("needle_single_1", "needle_single_2", "needle_single_3",
                               "needle_multikey_1", "kv_list")  # fmt: skip
    pairs: int = 8  # counterfactual pairs a probe
    min_pairs: int = 6  # fewer accepted pairs in a probe is an error
    context: int = 1024  # tokens of a probe
    rows: int = 8  # pairs in one forward
    span_decay: float = 0.9  # lambda of the decayed span logit difference
    ie_floor: float = 0.01  # an effect counts for consistency above this
    min_gap: float = 0.5  # a pair with a smaller clean-corrupt gap is rejected
    answer_prefix: str = "clean"  # clean | own: what both runs are teacher-forced on
    ablation: str = "mean"  # mean | zero: what a head gives under scorer `ablate`
    duo_steps: int = 2000  # training steps of the gates of scorer `duo`
    sender_rounds: int = 2  # rounds of path patching; 0: receivers alone
    sender_freeze: bool = True  # attention behind the receivers as in the clean run
    text_rows: int = 32  # rows of plain text (data.files, training part) for `ppl`
    text_tokens: int = 512  # tokens of such a row
    report: str = "full"  # full (knock-out, stability, agreement: minutes more) | scores

    def __post_init__(self):
        check_choices("select", self, {
            "scorer": ("patch", "patch_recv", "atp", "ablate", "retrieval", "duo", "ppl",
                       "random", "fixed", "layerwise"),
            "ablation": ("mean", "zero"),
            "report": ("full", "scores"),
            "general": ("ppl", "none"),
            "fuse_norm": ("minmax", "rank"),
            "alloc": ("global", "global_c", "per_layer", "layerwise"),
            "unit": ("q_head", "kv_group"),
            "answer_prefix": ("clean", "own"),
        })  # fmt: skip
        if self.rows < 1 or not self.pairs >= self.min_pairs >= 1 or self.context < 8:
            raise UserError(
                "select needs rows >= 1, pairs >= min_pairs >= 1 and context >= 8, got "
                f"{self.rows}, {self.pairs}, {self.min_pairs}, {self.context}."
            )
        least = {"sender_rounds": 0, "duo_steps": 1, "text_rows": 1, "text_tokens": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"select.{name} must be >= {low}, got {getattr(self, name)}.")
        if not 0 <= self.ratio <= 1:
            raise UserError(f"select.ratio must lie in [0, 1], got {self.ratio}.")
        if (self.alloc == "layerwise") != (self.scorer == "layerwise"):
            raise UserError("select.scorer=layerwise and select.alloc=layerwise go together.")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and a schedule; moments and master weights are fp32."""

    peak_lr: float = 1e-3
    end_lr: float = 1e-5
    schedule: str = "cosine"  # cosine | constant
    warmup_steps: int = 50
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # not on norms, biases, gates' time constants
    clip_norm: float = 1.0
    lr_groups: tuple[str, ...] = ()  # "regex=multiplier": a path's rate relative to peak_lr
    offload: bool = False  # moments live in host memory between steps

    def __post_init__(self):
        one_of("optim", "schedule", self.schedule, ("cosine", "constant"))
        if self.peak_lr <= 0 or self.clip_norm <= 0 or self.warmup_steps < 0:
            raise UserError("optim needs peak_lr > 0, clip_norm > 0 and warmup_steps >= 0.")
        for group in self.lr_groups:
            if "=" not in group:
                raise UserError(f"optim.lr_groups: {group!r} is not of the form regex=multiplier.")


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how rows are made of them."""

    files: tuple[str, ...] = ()  # text (0x1e splits documents), .jsonl, .parquet, .array_record
    #                              globs and .xz allowed; "sample" is the text shipped here
    text_key: str = "text"  # field of jsonl and parquet rows
    synthetic: str = ""  # a recall task of data/synthetic.py, mixed in or alone
    synthetic_share: float = 0.0  # share of rows that are synthetic (1 when there are no files)
    seq_len: int = 512
    rows: int = 32  # global rows a step (all accumulation steps together)
    packing: str = "split"  # split (documents run on over rows) | best_fit (whole documents)
    answer_only: bool = False  # synthetic rows: loss on answer tokens only
    holdout: float = 0.01  # share of documents kept for evaluation, chosen by hash
    seed: int = 0
    workers: int = 0  # grain worker processes

    def __post_init__(self):
        one_of("data", "packing", self.packing, ("split", "best_fit"))
        if self.seq_len < 2 or self.rows < 1 or self.workers < 0:
            raise UserError("data needs seq_len >= 2, rows >= 1 and workers >= 0.")
        if not 0 <= self.synthetic_share <= 1 or not 0 <= self.holdout < 1:
            raise UserError("data.synthetic_share must lie in [0, 1] and data.holdout in [0, 1).")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on one axis takes what is left."""

    data: int = -1  # rows of a step
    fsdp: int = 1  # rows as well; parameters and moments are split over it
    context: int = 1  # tokens of a row, in equal parts (divides data.seq_len); parameters as fsdp
    model: int = 1  # heads, MLP width, vocabulary

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.context, self.model)
        if sum(s == -1 for s in sizes) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise UserError(f"mesh axes must be >= 1, at most one -1, got {sizes}.")


@dataclass(frozen=True)
class KernelConfig:
    """Implementations of the ops; '' lets the platform's table decide."""

    attention: str = ""
    gated_delta_rule: str = ""
    causal_conv: str = ""


@dataclass(frozen=True)
class StageConfig:
    """Length, loss weights and bookkeeping of one training stage."""

    steps: int = 1000
    accum: int = 1  # gradient accumulation steps inside one optimiser step
    align_loss: str = "mse"  # mse | rel_mse (divided by the teacher's variance)
    align_scope: str = "all"  # all | la_only: parameters of the hybrid blocks that align trains
    ce_weight: float = 0.0  # distill: cross entropy beside the KL
    kl_weight: float = 0.0  # extend: KL beside the cross entropy
    kl_temperature: float = 1.0
    teacher_cache: str = ""  # distill, extend: read the teacher's best words from this folder
    calibration_tokens: int = 65_536  # align: tokens that set gamma at the transplant
    loss_chunk: int = 4096  # tokens of a device whose logits exist at a time
    # What is kept to redo the rest in the backward pass: inputs of blocks (block), the same in host
    # memory (host), outputs of matmuls too (dots); none: all is kept
    remat: str = "block"  # none | dots | block | host
    compute_dtype: str = "bfloat16"  # bfloat16 | float32
    log_every: int = 10
    eval_every: int = 0  # 0: only at the end
    save_every: int = 0  # 0: only at the end
    keep: int = 2  # checkpoints kept
    on_nonfinite: str = "abort"  # abort | skip (counted; three in a row abort)
    profile: str = ""  # "10:13" traces these steps
    tensorboard: bool = False

    def __post_init__(self):
        check_choices("stage", self, {
            "align_loss": ("mse", "rel_mse"),
            "align_scope": ("all", "la_only"),
            "remat": ("none", "block", "host", "dots"),
            "compute_dtype": ("bfloat16", "float32"),
            "on_nonfinite": ("abort", "skip"),
        })  # fmt: skip
        if self.steps < 1 or self.accum < 1 or self.loss_chunk < 1 or self.keep < 1:
            raise UserError("stage needs steps, accum, loss_chunk and keep >= 1.")


@dataclass(frozen=True)
class EvalConfig:
    """What `python -m hydrajax.evals` measures."""

    runs: tuple[str, ...] = ()  # student runs, beside `teacher`
    tasks: tuple[str, ...] = ("needle_single_2", "needle_multikey_1")
    lengths: tuple[int, ...] = (512, 1024, 2048)
    depths: int = 5
    prompts: int = 10  # a cell of the length x depth grid
    ppl_lengths: tuple[int, ...] = (1024,)
    ppl_tokens: int = 65_536
    agreement_rows: int = 16  # rows of data.seq_len for teacher-student agreement
    zero_la: bool = True  # also measure with the LA heads' outputs zeroed
    rows: int = 8  # prompts in one forward
    seed: int = 1


@dataclass(frozen=True)
class RunConfig:
    """One run: what it starts from, what it does, where it writes."""

    stage: str = "align"  # pretrain | align | distill | extend
    out: str = ""  # the run's folder
    parent: str = ""  # run to start from; empty: teacher + heads -> transplant
    teacher: str = ""  # imported or pretrained teacher folder
    heads: str = ""  # heads.json of a selection
    tokenizer: str = ""  # tokenizer.json or "bytes"; empty: the teacher's
    seed: int = 0
    model: ModelConfig | None = None  # pretrain: the model to make; else the teacher expected
    hydra: HydraConfig = HydraConfig()
    select: SelectConfig = SelectConfig()
    train: StageConfig = StageConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    kernels: KernelConfig = KernelConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        one_of("config", "stage", self.stage, STAGES)
        if self.data.rows % self.train.accum:
            raise UserError(
                f"train.accum={self.train.accum} does not divide data.rows={self.data.rows}."
            )
        kl = {"distill": 1.0, "extend": self.train.kl_weight}.get(self.stage, 0.0)
        if self.train.teacher_cache and kl <= 0:
            raise UserError(
                f"train.teacher_cache serves a KL to the teacher; stage={self.stage} with "
                f"train.kl_weight={self.train.kl_weight} has none, so leave it empty."
            )
        if self.stage == "pretrain" and self.model is None:
            raise UserError("stage=pretrain needs config.model, the shapes of what it makes.")
        if self.data.synthetic_share > 0 and not self.data.synthetic:
            raise UserError("data.synthetic_share > 0 needs data.synthetic, a recall task's name.")

    @classmethod
    def from_dict(cls, values: dict | ConfigDict) -> "RunConfig":
        """Frozen config of a resolved ConfigDict; unknown keys and wrong types are errors."""
        values = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
        return from_plain(cls, values, "config")


def to_plain(cfg: Any) -> dict:
    """JSON-ready dict of a config; tuples become lists."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(cfg)


def from_plain(cls: type, values: dict, where: str) -> Any:
    """Rebuild a config dataclass from plain values; names the key, the expected and the got."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(f"{where} has unknown keys {unknown}; it knows {sorted(fields)}.")
    out = {}
    for name, value in values.items():
        default = fields[name].default
        want = ModelConfig if default is None else type(default)
        if dataclasses.is_dataclass(want) and value is not None:
            out[name] = from_plain(want, value, f"{where}.{name}")
            continue
        if isinstance(value, list | tuple) and want is tuple:
            value = tuple(value)
        if want is float and type(value) is int:
            value = float(value)
        if default is not None and type(value) is not want:
            raise UserError(f"{where}.{name}: expected {want.__name__}, got {value!r}.")
        out[name] = value
    return cls(**out)


def to_config_dict(cfg: RunConfig) -> ConfigDict:
    """The ConfigDict that config files edit; tuples stay tuples, `model` stays a placeholder."""

    def mutable(value):
        if dataclasses.is_dataclass(value):
            return {f.name: mutable(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return value

    return ConfigDict(mutable(cfg), convert_dict=True)
