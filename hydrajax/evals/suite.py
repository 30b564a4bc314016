"""All measurements of all models on the same rows and prompts."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from hydrajax.config import RunConfig
from hydrajax.data.synthetic import check_task
from hydrajax.evals.agreement import agreement
from hydrajax.evals.needle import Prompts, make_prompts, predictor, recall
from hydrajax.evals.perplexity import HeldOut, held_out, perplexity
from hydrajax.evals.subject import Subject, zero_la
from hydrajax.tokenizer import Tokenizer
from hydrajax.typing import UserError


class Material:
    """The rows and prompts of a config: made once, for every model the same."""

    def __init__(self, cfg: RunConfig, tokenizer: Tokenizer):
        check_eval(cfg)
        rows = partial(held_out, cfg.data, tokenizer, batch=cfg.eval.rows)
        self.chunk = cfg.train.loss_chunk
        self.text: list[HeldOut] = [
            rows(length=length, rows=-(-cfg.eval.ppl_tokens // length))
            for length in cfg.eval.ppl_lengths
        ]
        self.prompts: list[Prompts] = [
            make_prompts(cfg.eval, tokenizer, task, length)
            for task in cfg.eval.tasks
            for length in cfg.eval.lengths
        ]
        self.shared: HeldOut | None = None
        if cfg.eval.agreement_rows:
            self.shared = rows(length=cfg.data.seq_len, rows=cfg.eval.agreement_rows)


def evaluate(
    models: Iterable[Subject],
    cfg: RunConfig,
    tokenizer: Tokenizer,
    *,
    has_teacher: bool = True,
    say: Callable[[str], None] = print,
) -> Iterator[dict]:
    """After each model, {"rows": [...], "summary": {"model/metric": number}} of all so far.

    models: the first is the teacher that others are compared with, unless `has_teacher` is
        false. Give a generator to have one student at a time in memory.
    """
    material, teacher, rows = Material(cfg, tokenizer), None, []
    for i, subject in enumerate(models):
        begin = time.perf_counter()
        rows += measure(subject, material)
        if has_teacher and i == 0:
            teacher = subject
        elif teacher is not None and material.shared is not None:
            rows.append(agreement(teacher, subject, material.shared, material.chunk))
        plan = subject.plan
        if cfg.eval.zero_la and plan.num_fa < plan.num_layers * plan.num_heads:
            rows += measure(zero_la(subject), material)
        say(f"{subject.name}: measured in {time.perf_counter() - begin:.1f} s")
        yield {"rows": list(rows), "summary": summary(rows)}


def measure(subject: Subject, material: Material) -> list[dict]:
    """What needs no teacher: perplexity and recall."""

    def found() -> Iterator[dict]:
        for text in material.text:
            yield perplexity(subject, text, material.chunk)
        for prompts in material.prompts:
            # Past the trained context students may still recall: allowed, and marked.
            beyond = prompts.length > subject.cfg.max_context
            for row in recall(predictor(subject), prompts):
                yield {"model": subject.name, **row, "beyond_context": beyond}

    return list(found())


def summary(rows: list[dict]) -> dict[str, float]:
    """The figures worth a table, by "model/metric"."""
    out = {}
    for row in rows:
        name, length = row["model"], row["length"]
        if row["metric"] == "perplexity":
            out |= {f"{name}/{k}@{length}": row[k] for k in ("nats", "ppl", "bits_per_byte")}
        elif row["metric"] == "agreement":
            out |= {f"{name}/{k}": row[k] for k in ("kl", "top1")}
        elif row["depth"] is None:
            out[f"{name}/{row['task']}@{length}"] = row["exact"]
            out[f"{name}/{row['task']}@{length} tokens"] = row["token_accuracy"]
    return out


def check_eval(cfg: RunConfig) -> None:
    """Refuse what cannot be measured, before any model is loaded."""
    e = cfg.eval
    for task in e.tasks:
        check_task(task)
    if min(e.depths, e.prompts, e.rows, *e.lengths, *e.ppl_lengths) < 1:
        raise UserError("eval: depths, prompts, rows and all lengths must be at least 1.")
    if e.ppl_lengths and e.ppl_tokens < 1:
        raise UserError(f"eval.ppl_tokens must be at least 1, got {e.ppl_tokens}.")
