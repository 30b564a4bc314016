"""Everything that may use torch: reference logits of transformers, and .bin files.

Nothing here runs unless it is asked for; import and export work with torch absent.
"""

from pathlib import Path

import ml_dtypes
import numpy as np

from hydrajax.typing import UserError

ROWS, TOKENS = 2, 64


def fixed_ids(vocab_size: int, max_context: int) -> np.ndarray:
    """The token ids [B, T] on which two models are compared, the same every time."""
    return np.random.default_rng(0).integers(0, vocab_size, (ROWS, min(TOKENS, max_context)))


def versions() -> str | None:
    """Name of the reference implementation, None where it is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def reference_logits(
    source: str | dict, ids: np.ndarray, tensors: dict[str, np.ndarray] | None = None
) -> np.ndarray:
    """fp32 logits of transformers, from a folder, or from a config.json's dict and its tensors."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise UserError(
            f"comparing with transformers needs torch and transformers ({e}); "
            "install hydrajax[dev]."
        ) from e
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    auto = transformers.AutoModelForCausalLM
    options = dict(dtype=torch.float32, attn_implementation="eager", trust_remote_code=False)
    try:
        if tensors is None:
            model = auto.from_pretrained(source, local_files_only=True, **options)
        else:
            config = transformers.AutoConfig.for_model(**source)
            model = auto.from_config(config, **options)
            state = {k: torch.from_numpy(np.array(v, np.float32)) for k, v in tensors.items()}
            left = model.load_state_dict(state, strict=False)
            tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
            if odd := (set(left.missing_keys) - tied) | set(left.unexpected_keys):
                raise ValueError(f"tensors do not fit: {sorted(odd)}")
        with torch.no_grad():
            return model.eval()(torch.from_numpy(ids)).logits.numpy()
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        reason = str(e).strip().split("\n")[0]
        raise UserError(f"transformers cannot run {_name(source)}: {reason}") from e


def _name(source: str | dict) -> str:
    return f"a {source['model_type']} model" if isinstance(source, dict) else str(source)


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How far two sets of logits [B, T, V] are apart."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    if ours.shape != theirs.shape:
        raise UserError(f"logits have shape {ours.shape} here and {theirs.shape} in the reference.")
    log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
    return {
        "tokens": int(np.prod(ours.shape[:-1])),
        "max_abs_delta_logit": float(np.abs(ours - theirs).max()),
        "max_abs_logit": float(np.abs(theirs).max()),
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def read_pickle(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a torch .bin file, by the loader that runs no code."""
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"{path}: reading .bin needs torch ({e}); convert the file to safetensors."
        ) from e
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # pickle, zip and torch each have their own
        reason = type(e).__name__
        raise UserError(f"{path}: torch's weights_only loader refuses it ({reason}).") from e
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: expected a plain dict of tensors.")

    def array(tensor) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:  # numpy knows it through ml_dtypes only
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.contiguous().numpy()

    return {name: array(tensor.detach()) for name, tensor in state.items()}
