"""Generate text from a teacher or a student run.

    python -m hydrajax.generation --run runs/tiny/causal/distill --prompt "Once upon a time"

Prefill reads the prompts into the KV caches of the FA heads and the states of the LA heads; from
there a jitted while loop draws token by token. All lengths are padded to powers of two, so a
handful of compilations serves every prompt.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.tree_util import register_dataclass

from hydrajax.cache import DecodeState
from hydrajax.checkpoint import RunInfo, load_run
from hydrajax.command import run_command
from hydrajax.config import KernelConfig, ModelConfig
from hydrajax.model import bind, load_model
from hydrajax.sharding import one_device
from hydrajax.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from hydrajax.typing import Array, Bool, Float, Int, Params, UserError

PIECE = 8192  # tokens that one prefill call reads at most
STREAM = 4  # tokens between two looks at a stream
MATMULS = ("w_q", "w_k", "w_v", "w_z", "w_o", "w_gate", "w_up", "w_down")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when to stop."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 0
    eos_ids: tuple[int, ...] | None = None  # None: the model's
    max_context: int = 0  # prompt and answer together; 0: what the model was trained for

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0:
            raise UserError(
                "sampling needs max_new_tokens >= 1, temperature >= 0 and top_k >= 0, got "
                f"{self.max_new_tokens}, {self.temperature} and {self.top_k}."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p must lie in (0, 1], got {self.top_p}.")


@dataclass(frozen=True)
class Cursor:
    """Where a batch stands between two calls of `decode`."""

    logits: Float[Array, "B V"]  # of the next token
    state: DecodeState
    left: Int[Array, "B"]  # tokens a row may still say; 0 once it ended
    drawn: Int[Array, ""]  # tokens drawn so far, the counter of the random numbers


register_dataclass(Cursor, ["logits", "state", "left", "drawn"], [])


@dataclass(frozen=True)
class Loaded:
    """A run folder, ready for inference."""

    info: RunInfo
    step: int
    graphdef: nnx.GraphDef
    params: Params
    tokenizer: Tokenizer


def open_run(
    folder: str | Path,
    *,
    dtype,
    step: int | None = None,
    tokenizer: str = "",
    kernels: KernelConfig | None = None,
) -> Loaded:
    """Load a run and its tokenizer (or another one); matmul weights are held in `dtype`."""
    run = load_run(folder, step)
    graphdef, params = load_model(run, dtype=dtype, kernels=kernels or KernelConfig())
    words = load_tokenizer(tokenizer or folder)
    check_vocabulary(words, run.info.model.vocab_size, tokenizer or str(folder))
    return Loaded(run.info, run.step, graphdef, inference_params(params, dtype), words)


def inference_params(params: Params, dtype) -> Params:
    """Cast, once and not in every step, the weights that layers cast to the compute dtype."""

    def placed(path: str, value) -> Array:
        owner, _, name = path.rpartition(".")
        matmul = name in MATMULS or (name == "w" and owner in ("embed", "unembed"))
        return jnp.asarray(value, dtype if matmul else None)

    return {path: placed(path, value) for path, value in params.items()}


def generate(
    graphdef: nnx.GraphDef, params: Params, prompts: list[list[int]], *, sampling: Sampling
) -> list[list[int]]:
    """New tokens of each prompt, up to and without the end token.

    Rows do not see each other: a ragged batch gives what its prompts give one by one, and row b
    of a sampled batch depends on the seed and on b alone.
    """
    if not prompts:
        return []
    cursor, sampling = start(graphdef, params, prompts, sampling=sampling)
    size = power_of_two(int(cursor.left.max()))
    tokens, counts, _ = decode(graphdef, params, cursor, _key(sampling), size, _static(sampling))
    rows = zip(np.asarray(tokens), np.asarray(counts), strict=True)
    return [[int(t) for t in row[:count]] for row, count in rows]


def stream(
    graphdef: nnx.GraphDef, params: Params, prompt: list[int], *, sampling: Sampling
) -> Iterator[int]:
    """The tokens of `generate([prompt])`, as they come."""
    cursor, sampling = start(graphdef, params, [prompt], sampling=sampling)
    key, static = _key(sampling), _static(sampling)
    while int(cursor.left[0]):
        tokens, counts, cursor = decode(graphdef, params, cursor, key, STREAM, static)
        yield from map(int, np.asarray(tokens[0, : int(counts[0])]))


def start(
    graphdef: nnx.GraphDef, params: Params, prompts: list[list[int]], *, sampling: Sampling
) -> tuple[Cursor, Sampling]:
    """Check and read the prompts; the sampling comes back without open defaults."""
    cfg = bind(graphdef, params).cfg
    sampling = replace(
        sampling,
        eos_ids=cfg.eos_ids if sampling.eos_ids is None else sampling.eos_ids,
        max_context=sampling.max_context or cfg.max_context,
    )
    prompts = [_checked(prompt, cfg, sampling.max_context) for prompt in prompts]
    left = [min(sampling.max_new_tokens, sampling.max_context - len(p)) for p in prompts]
    space = power_of_two(max(len(p) + n for p, n in zip(prompts, left, strict=True)))
    logits, state = read(graphdef, params, prompts, space)
    return Cursor(logits, state, jnp.array(left, jnp.int32), jnp.int32(0)), sampling


def read(
    graphdef: nnx.GraphDef, params: Params, prompts: list[list[int]], space: int, piece: int = PIECE
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Prefill right-padded prompts, `piece` tokens at a time; the state has room for `space`."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    longest = int(lengths.max())
    tokens = np.zeros((len(prompts), power_of_two(longest, piece)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    seen = None
    for first in range(0, longest, piece):
        width = min(piece, power_of_two(longest - first))
        here = np.clip(lengths - first, 0, width)
        seen = _prefill(graphdef, params, tokens[:, first : first + width], here, seen, space)
    return seen


@partial(jax.jit, static_argnames=("graphdef", "space"), donate_argnames=("seen",))
def _prefill(graphdef, params, tokens_BT, lengths_B, seen, space):
    """One piece; a row that ended in an earlier piece keeps the logits it had there."""
    model = bind(graphdef, params)
    if seen is None:
        state = model.init_state(tokens_BT.shape[0], space)
        return model.prefill(tokens_BT, state, lengths=lengths_B)
    logits, state = model.prefill(tokens_BT, seen[1], lengths=lengths_B)
    return jnp.where(lengths_B[:, None] > 0, logits, seen[0]), state


@partial(jax.jit, static_argnames=("graphdef", "size", "sampling"), donate_argnames=("cursor",))
def decode(
    graphdef: nnx.GraphDef,
    params: Params,
    cursor: Cursor,
    key: Array,
    size: int,
    sampling: Sampling,
) -> tuple[Int[Array, "B size"], Int[Array, "B"], Cursor]:
    """Draw up to `size` tokens a row; returns them, how many of each row count, and the cursor."""
    model = bind(graphdef, params)
    rows = cursor.left.shape[0]
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))
    eos = jnp.array(sampling.eos_ids, jnp.int32)

    def going(carry):
        i, _, _, at = carry
        return (i < size) & jnp.any(at.left > 0)

    def one_token(carry):
        i, tokens, counts, at = carry
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, at.drawn)
        token = draw(at.logits, now, sampling)
        live = (at.left > 0) & ~jnp.isin(token, eos)
        logits, state = model.step(token, at.state)
        at = Cursor(logits, state, jnp.where(live, at.left - 1, 0), at.drawn + 1)
        return i + 1, tokens.at[:, i].set(token), counts + live, at

    empty = jnp.zeros((rows, size), jnp.int32), jnp.zeros(rows, jnp.int32)
    _, tokens, counts, cursor = jax.lax.while_loop(going, one_token, (0, *empty, cursor))
    return tokens, counts, cursor


def draw(logits: Float[Array, "B V"], keys: Array, sampling: Sampling) -> Int[Array, "B"]:
    """One token a row: temperature first, then the top-k and top-p masks."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    keep = top_k_mask(logits, sampling.top_k) if sampling.top_k else jnp.ones_like(logits, bool)
    logits = jnp.where(keep, logits, -jnp.inf)
    if sampling.top_p < 1:
        logits = jnp.where(top_p_mask(logits, sampling.top_p), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def top_k_mask(logits: Float[Array, "B V"], k: int) -> Bool[Array, "B V"]:
    """True for the k largest logits, and for ties with the last of them."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return logits >= least


def top_p_mask(logits: Float[Array, "B V"], p: float) -> Bool[Array, "B V"]:
    """True for the smallest set of likeliest tokens with probability >= p, ties included."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    chance = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(chance, axis=-1) - chance
    least = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
    return logits >= least


def power_of_two(n: int, least: int = 16) -> int:
    """The next power of two, at least `least`: what lengths are padded to."""
    return max(least, 1 << (n - 1).bit_length())


def _checked(prompt: list[int], cfg: ModelConfig, max_context: int) -> list[int]:
    if not prompt:
        if cfg.bos_id < 0:
            raise UserError("The prompt is empty and the model has no bos token; give some text.")
        return [cfg.bos_id]
    if len(prompt) >= max_context:
        raise UserError(
            f"The prompt has {len(prompt)} tokens, which leaves no room in a context of "
            f"{max_context}; shorten it, or set max_context to go beyond the trained context."
        )
    if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
        raise UserError(
            f"The prompt holds token ids {min(prompt)}..{max(prompt)}, the model knows "
            f"0..{cfg.vocab_size - 1}; encode it with the tokenizer of this model."
        )
    return list(prompt)


def _key(sampling: Sampling) -> Array:
    return jax.random.key(sampling.seed)


def _static(sampling: Sampling) -> Sampling:
    """What decides the compiled loop; seeds and limits are values."""
    return replace(sampling, seed=0, max_new_tokens=1, max_context=0)


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "Run or teacher folder.", required=True)
    flags.DEFINE_string("prompt", "", "Text to go on from; '-' reads it from standard input.")
    flags.DEFINE_integer("max_new_tokens", 256, "Tokens to write at most.")
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.")
    flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0: off.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens with this probability.")
    flags.DEFINE_integer("seed", 0, "Seed of the draws.")
    flags.DEFINE_bool("chat", False, "Put the prompt into the tokenizer's chat template.")
    flags.DEFINE_integer("step", None, "Checkpoint step; default: the newest valid one.")
    flags.DEFINE_integer("max_context", 0, "Prompt and answer; 0: what the model was trained for.")
    flags.DEFINE_enum("dtype", "", ["", "bfloat16", "float32"], "Default: float32 on CPU only.")


def _run(args: flags.FlagValues) -> None:
    on_cpu = jax.devices()[0].platform == "cpu"
    dtype = jnp.dtype(args.dtype or ("float32" if on_cpu else "bfloat16"))
    sampling = Sampling(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed,
        max_context=args.max_context,
    )  # fmt: skip
    run = open_run(args.run, dtype=dtype, step=args.step)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    words = run.tokenizer
    chat = [{"role": "user", "content": text}]
    ids = words.encode_chat(chat) if args.chat else words.encode(text)
    eos = tuple(sorted({*words.eos_ids, *run.info.model.eos_ids}))
    begin, count, writer = time.perf_counter(), 0, words.stream()
    for token in stream(run.graphdef, run.params, ids, sampling=replace(sampling, eos_ids=eos)):
        count += 1
        print(writer.push(token), end="", flush=True)
    print(writer.finish())
    rate = count / (time.perf_counter() - begin)
    print(f"{count} tokens, {rate:.1f} tokens/s with compilation", file=sys.stderr)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"Arguments {argv[1:]} are not flags; quote the text of --prompt.")
    with jax.set_mesh(one_device()):
        _run(flags.FLAGS)


if __name__ == "__main__":
    _define_flags()
    run_command(main)
