"""Loss on held-out rows: nats and perplexity a token, bits a byte, and loss by context length.

Bits per byte survive a change of tokenizer. The loss by context tells whether a model uses what
stands far back; perplexity alone hides that, and it cannot stand in for recall.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.config import DataConfig
from hydrajax.data import Batch, eval_rows
from hydrajax.evals.subject import Subject, over_chunks
from hydrajax.losses import next_tokens
from hydrajax.model import bind
from hydrajax.tokenizer import Tokenizer
from hydrajax.typing import UserError


@dataclass(frozen=True)
class HeldOut:
    """The same rows for every model."""

    length: int
    batches: list[Batch]
    num_bytes: int  # of the text that is scored


def held_out(
    cfg: DataConfig, tokenizer: Tokenizer, *, length: int, rows: int, batch: int
) -> HeldOut:
    """Take `rows` held-out rows of `length` tokens; text only, where there is text."""
    share = 0.0 if cfg.files else cfg.synthetic_share
    cfg = replace(cfg, seq_len=length, rows=batch, synthetic_share=share)
    batches = eval_rows(cfg, tokenizer, rows)
    num_bytes = sum(scored_bytes(b, tokenizer) for b in batches)
    if not num_bytes:
        raise UserError(
            f"data: no held-out text of {length} tokens in {cfg.files or cfg.synthetic!r}; add "
            "files or raise data.holdout."
        )
    return HeldOut(length, batches, num_bytes)


def scored_bytes(batch: Batch, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the tokens that are targets; special tokens have none."""
    _, weights = next_tokens({k: jnp.asarray(v) for k, v in batch.items()})
    total = 0
    for tokens, scored in zip(batch["tokens"], np.asarray(weights) > 0, strict=True):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], scored, [0]])))
        for first, end in edges.reshape(-1, 2):  # position t predicts token t + 1
            whole = tokenizer.decode(tokens[first : end + 1])
            given = tokenizer.decode(tokens[first : first + 1])
            total += len(whole.encode()) - len(given.encode())
    return total


@partial(jax.jit, static_argnames=("graphdef", "chunk"))
def token_nats(graphdef, params, x, batch, chunk: int):
    """Cross entropy [B, T] of every next token, and its weight, from hidden states."""
    model = bind(graphdef, params)
    targets, weights = next_tokens(batch)

    def nats(x_BtD, targets_Bt):
        logits = model.logits(x_BtD)
        picked = jnp.take_along_axis(logits, targets_Bt[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    return over_chunks(nats, (x, targets), chunk), weights


def perplexity(subject: Subject, rows: HeldOut, chunk: int) -> dict:
    """One row of the report. Contexts are binned by powers of two: 1, 2-3, 4-7, ..."""
    bins = rows.length.bit_length()
    nats, count = np.zeros(bins), np.zeros(bins)  # float64, on the host
    for batch in rows.batches:
        x = subject.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
        found = token_nats(subject.graphdef, subject.params, x, batch, chunk)
        loss, weights = map(np.asarray, found)
        weights = weights.astype(np.float64)
        at = np.log2(batch["positions"] + 1).astype(int).ravel()
        nats += np.bincount(at, (loss * weights).ravel(), bins)
        count += np.bincount(at, weights.ravel(), bins)
    mean = nats.sum() / count.sum()
    return {
        "model": subject.name,
        "metric": "perplexity",
        "length": rows.length,
        "tokens": int(count.sum()),
        "bytes": rows.num_bytes,
        "nats": mean,
        "ppl": math.exp(min(mean, 700.0)),
        "bits_per_byte": nats.sum() / math.log(2) / rows.num_bytes,
        "by_context": [
            {"from": 2**i, "to": min(2 ** (i + 1) - 1, rows.length), "tokens": int(count[i]),
             "nats": nats[i] / count[i]}
            for i in range(bins) if count[i]
        ],
        "beyond_context": rows.length > subject.cfg.max_context,
    }  # fmt: skip
