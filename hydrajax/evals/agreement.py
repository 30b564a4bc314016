"""How closely a student's next-token distribution follows its teacher's on held-out rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.evals.perplexity import HeldOut
from hydrajax.evals.subject import Subject, over_chunks
from hydrajax.losses import next_tokens
from hydrajax.model import bind
from hydrajax.typing import UserError


@partial(jax.jit, static_argnames=("graphdefs", "chunk"))
def token_agreement(graphdefs: tuple, params: tuple, hidden: tuple, batch, chunk: int):
    """[B, T] each: KL(teacher || student) in nats, 1 where both prefer one token, weight."""
    teacher, student = (bind(g, p) for g, p in zip(graphdefs, params, strict=True))

    def compare(xt_BtD, xs_BtD):
        log_p = jax.nn.log_softmax(teacher.logits(xt_BtD))
        log_q = jax.nn.log_softmax(student.logits(xs_BtD))
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return kl, jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)

    return *over_chunks(compare, hidden, chunk), next_tokens(batch)[1]


def agreement(teacher: Subject, student: Subject, rows: HeldOut, chunk: int) -> dict:
    """One row of the report, over the positions whose next token is scored."""
    if teacher.cfg.vocab_size != student.cfg.vocab_size:
        raise UserError(
            f"{student.name} has a vocabulary of {student.cfg.vocab_size}, {teacher.name} of "
            f"{teacher.cfg.vocab_size}; set eval.agreement_rows=0 to measure them anyway."
        )
    graphdefs = (teacher.graphdef, student.graphdef)
    params = (teacher.params, student.params)
    kl, same, count = 0.0, 0.0, 0.0
    for batch in rows.batches:
        inputs = [batch[k] for k in ("tokens", "segment_ids", "positions")]
        hidden = teacher.hidden(*inputs), student.hidden(*inputs)
        out = token_agreement(graphdefs, params, hidden, batch, chunk)
        kl_BT, same_BT, weights_BT = (np.asarray(x).astype(np.float64) for x in out)
        scored = weights_BT > 0
        kl += kl_BT[scored].sum()
        same += same_BT[scored].sum()
        count += scored.sum()
    return {
        "model": student.name,
        "metric": "agreement",
        "length": rows.length,
        "tokens": int(count),
        "kl": kl / count,
        "top1": same / count,
    }
