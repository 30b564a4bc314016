"""Recall: tasks of data/synthetic.py by length of the context and depth of the answer.

One forward over prompt + answer says whether greedy decoding would say the answer: it does so
exactly when every answer token is the argmax after the ones before it. Nothing is decoded.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.config import EvalConfig
from hydrajax.data import encode_example, make_example
from hydrajax.evals.subject import Subject
from hydrajax.generation import power_of_two
from hydrajax.model import bind
from hydrajax.tokenizer import Tokenizer
from hydrajax.typing import Array, Int

NO_TOKEN = -1
Z95 = 1.959963984540054


@dataclass(frozen=True)
class PromptBatch:
    """Prompts with their answers, right-padded; rows with depth -1 only fill the batch."""

    tokens: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]
    at: Int[np.ndarray, "B P"]  # positions that predict the answer tokens
    answer: Int[np.ndarray, "B P"]  # NO_TOKEN behind its end
    depth: Int[np.ndarray, "B"]  # index into Prompts.depths


@dataclass(frozen=True)
class Prompts:
    """All prompts of one task and length, the same for every model."""

    task: str
    length: int
    depths: tuple[float, ...]
    batches: list[PromptBatch]


Predict = Callable[[PromptBatch], Int[Array, "B P"]]  # the argmax at each position in `at`


def make_prompts(cfg: EvalConfig, tokenizer: Tokenizer, task: str, length: int) -> Prompts:
    """Draw `cfg.prompts` prompts for each depth; a prompt depends on its seed and place alone."""
    depths = tuple(np.linspace(0, 1, cfg.depths)) if cfg.depths > 1 else (0.5,)
    encoded = []
    for d, depth in enumerate(depths):
        for i in range(cfg.prompts):
            rng = np.random.default_rng([cfg.seed, zlib.crc32(task.encode()), length, d, i])
            example = make_example(task, rng, tokens=length, depth=depth, tokenizer=tokenizer)
            encoded.append((d, encode_example(example, tokenizer)))
    # Rounded up, so that tasks share a compilation.
    longest = power_of_two(max(len(e.answer) for _, e in encoded))
    batches = [
        _batch(encoded[i : i + cfg.rows], (cfg.rows, length, longest))
        for i in range(0, len(encoded), cfg.rows)
    ]
    return Prompts(task, length, depths, batches)


def _batch(encoded: list, shape: tuple[int, int, int]) -> PromptBatch:
    rows, length, longest = shape
    tokens, segment_ids = np.zeros((2, rows, length), np.int32)
    at = np.zeros((rows, longest), np.int32)
    answer = np.full((rows, longest), NO_TOKEN, np.int32)
    depth = np.full(rows, -1, np.int32)
    for row, (d, e) in enumerate(encoded):
        ids = e.prompt + e.answer
        tokens[row, : len(ids)] = ids
        segment_ids[row, : len(ids)] = 1
        at[row, : len(e.answer)] = len(e.prompt) - 1 + np.arange(len(e.answer))
        answer[row, : len(e.answer)] = e.answer
        depth[row] = d
    return PromptBatch(tokens, segment_ids, at, answer, depth)


@partial(jax.jit, static_argnames=("graphdef",))
def _argmax_at(graphdef, params, x_BTD, at_BP) -> Int[Array, "B P"]:
    x_BPD = jnp.take_along_axis(x_BTD, at_BP[:, :, None], axis=1)
    return jnp.argmax(bind(graphdef, params).logits(x_BPD), axis=-1)


def predictor(subject: Subject) -> Predict:
    """The model's own predictions."""

    def predict(batch: PromptBatch) -> Int[Array, "B P"]:
        positions = np.broadcast_to(
            np.arange(batch.tokens.shape[1], dtype=np.int32), batch.tokens.shape
        )
        x_BTD = subject.hidden(batch.tokens, batch.segment_ids, positions)
        return _argmax_at(subject.graphdef, subject.params, x_BTD, batch.at)

    return predict


def score(said_BP: np.ndarray, answer_BP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row: whether the whole answer is right, and the share of its tokens that are."""
    asked = answer_BP != NO_TOKEN
    right = (np.asarray(said_BP) == answer_BP) & asked
    share = right.sum(axis=1) / np.maximum(asked.sum(axis=1), 1)
    return (right | ~asked).all(axis=1), share


def recall(predict: Predict, prompts: Prompts) -> Iterator[dict]:
    """Rows of the report: one per depth, then one over all depths (depth None)."""
    exact, share, depth = [], [], []
    for batch in prompts.batches:
        e, s = score(predict(batch), batch.answer)
        exact.append(e)
        share.append(s)
        depth.append(batch.depth)
    exact, share, depth = map(np.concatenate, (exact, share, depth))
    for d, value in [*enumerate(prompts.depths), (None, None)]:
        rows = depth >= 0 if d is None else depth == d
        hits, n = int(exact[rows].sum()), int(rows.sum())
        low, high = wilson(hits, n)
        yield {
            "metric": "recall",
            "task": prompts.task,
            "length": prompts.length,
            "depth": value,
            "n": n,
            "exact": hits / n,
            "low": low,
            "high": high,
            "token_accuracy": float(share[rows].mean()),
        }


def wilson(hits: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): unlike ± 2 sigma right at 0 and at n hits."""
    p = hits / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
