"""Recall tasks: prompts whose answer stands at exactly one place in their context.

Selection probes, evaluations and training rows all come from here. Keys are everyday words and
values digits or words: small teachers can copy those, while hexadecimal defeats them. Spans are
always found by encoding the joint text, so any tokenizer works that keeps `encode(prompt)` a
prefix of `encode(prompt + answer)`; nothing here assumes one token per digit.
"""

import functools
import itertools
import lzma
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hydrajax.tokenizer import Tokenizer
from hydrajax.typing import UserError

SAMPLE = Path(__file__).with_name("sample.txt.xz")
TRIES = 64

# Common short words, each one token with a leading space in GPT-style vocabularies.
WORDS = """
    apple arm army art ball band bank bar base bed bell bird board boat body bone book bottle box
    boy bread bridge brother bus camp cap captain car card cat chain chair church circle city
    class clock cloud coal coat coffee color copper corn cotton cross crown cup dance desk doctor
    dog door dress drum dust earth engine face farm father feather field film fire fish flag
    floor flower foot forest frame friend fruit garden gate gift glass gold grass ground gun hair
    hall hand hat head heart hill horse hotel house ice iron island jacket judge king kitchen
    knife lake lamp leaf leg letter lion lock machine map market meat metal milk mirror money moon
    mouse mouth museum music nail neck night nose ocean office oil orange paint
    paper park pen phone picture plane plant plate pool queen radio rain ring river road rock
    roof room root rope salt sand school sea seat shadow sheep ship shirt shoe silver sister sky
    smoke snow soap soldier song station stone storm street sugar sun table tail tea tent ticket
    tiger tool tower town train tree truck valley village voice wall watch water wave wheel wind
    window wine wing winter wire wolf wood wool
""".split()  # noqa: SIM905
NOISE = (
    "The lamp is lit and the door is shut.",
    "Rain falls on the roof.",
    "The road goes on.",
    "Here we are and there we go.",
    "The kettle sings, then it is quiet again.",
)
KEYS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of task `recall`
VALUES = "0123456789!#$%&()*+,-./:;<=>?@[]^_{}~"
MAX_PAIRS = 32


@dataclass(frozen=True)
class Example:
    """One prompt, cut around the place where its answer stands."""

    task: str
    before: str
    answer: str
    after: str
    depth: float  # where in the context the answer was asked to stand, 0 to 1

    @property
    def prompt(self) -> str:
        return self.before + self.answer + self.after


@dataclass(frozen=True)
class Encoded:
    """An example as ids: the model reads `prompt`, must say `answer`, and finds it at `span`."""

    prompt: list[int]
    answer: list[int]
    span: tuple[int, int]


@dataclass(frozen=True)
class _Parts:
    """What a task puts into a haystack: facts as (head, value, tail), one of them asked for."""

    intro: str
    facts: list[tuple[str, str, str]]
    question: str
    haystack: tuple[str, ...] = ()  # empty: prose


# Tasks: (rng, depth, options) -> what to hide; the first fact is the one that is asked for.


def _number(rng: np.random.Generator, digits: int) -> str:
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def _words(rng: np.random.Generator, count: int) -> list[str]:
    return [str(w) for w in rng.choice(WORDS, count, replace=False)]


def _needle(
    rng: np.random.Generator,
    depth: float,
    keys: int = 1,
    kind: str = "number",
    haystack: tuple[str, ...] = (),
) -> _Parts:
    names = _words(rng, keys)
    values = [_number(rng, 7) if kind == "number" else " ".join(_words(rng, 2)) for _ in names]
    what = f"special magic {kind}"
    facts = [(f"The {what} for {n} is:", f" {v}", ".") for n, v in zip(names, values, strict=True)]
    return _Parts(
        f"Some {what}s are hidden in the following text. Remember them.\n",
        facts,
        f"\nWhat is the {what} for {names[0]}? The {what} for {names[0]} is:",
        haystack,
    )


def _kv_list(rng: np.random.Generator, depth: float, pairs: int) -> _Parts:
    names = _words(rng, pairs)
    values = [_number(rng, 4) for _ in names]
    at = round(depth * (pairs - 1))
    lines = [f"{n}: {v}\n" for n, v in zip(names, values, strict=True)]
    head = "\n\nThe list of numbers:\n" + "".join(lines[:at]) + f"{names[at]}:"
    fact = (head, f" {values[at]}", "\n" + "".join(lines[at + 1 :]) + "\n")
    return _Parts(
        "A list of numbers stands in the following text. Remember it.\n",
        [fact],
        f"\nThe number of {names[at]} in the list of numbers is:\n{names[at]}:",
    )


def _variables(rng: np.random.Generator, depth: float, hops: int = 2) -> _Parts:
    names = [w.upper() for w in _words(rng, hops + 3)]
    chain, other = names[: hops + 1], names[hops + 1 :]
    facts = [(f"VAR {chain[0]} =", f" {_number(rng, 5)}", ".")]
    facts += [(f"VAR {b} = VAR {a}.", "", "") for a, b in itertools.pairwise(chain)]
    facts += [
        (f"VAR {other[0]} = {_number(rng, 5)}.", "", ""),
        (f"VAR {other[1]} = VAR {other[0]}.", "", ""),
    ]
    return _Parts(
        "Follow the variables in the text.\n",
        facts,
        f"\nWhat is the value of VAR {chain[-1]}? VAR {chain[-1]} =",
    )


TASKS: dict[str, Callable[[np.random.Generator, float], _Parts] | None] = {
    "needle_single_1": functools.partial(_needle, haystack=NOISE),
    "needle_single_2": _needle,
    "needle_single_3": functools.partial(_needle, kind="word"),
    "needle_multikey_1": functools.partial(_needle, keys=4),
    "kv_list": functools.partial(_kv_list, pairs=12),
    "kv_list_24": functools.partial(_kv_list, pairs=24),
    "vt": _variables,
    "recall": None,  # no words at all: see `_recall`
}


def make_example(
    task: str,
    rng: np.random.Generator,
    *,
    tokens: int,
    depth: float | None = None,
    tokenizer: Tokenizer,
    haystack: str | None = None,
) -> Example:
    """Make a prompt that with its answer fills `tokens` as far as whole sentences allow.

    depth: where the answer stands, 0 at the start, 1 at the end; None draws it. In `recall`
        it is the place among the pairs, all of which stand before the queries.
    haystack: text to hide it in; by default the prose that is shipped with the package.
    """
    check_task(task)
    depth = float(rng.uniform()) if depth is None else depth
    if not 0 <= depth <= 1:
        raise UserError(f"depth={depth} of {task} must lie in [0, 1].")
    for _ in range(TRIES):
        if task == "recall":
            _check_characters(tokenizer)
            example = _recall(rng, tokens, depth)
        else:
            parts = TASKS[task](rng, depth)
            example = _hide(task, parts, rng, (tokens, depth, tokenizer, haystack))
        if encode_example(example, tokenizer):
            return example
    raise UserError(
        f"{task}: no example in {TRIES} tries whose answer this tokenizer keeps apart "
        f"from its prompt; choose another task."
    )


def counterfactual(example: Example, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
    """Swap the answer in the context for another of its kind; all other tokens stay the same."""
    clean = encode_example(example, tokenizer)
    for _ in range(TRIES if clean else 0):
        other = replace(example, answer=_other_answer(example, rng, tokenizer))
        swapped = encode_example(other, tokenizer)
        if swapped and swapped.span == clean.span and other.answer not in example.prompt:
            (a, b), x, y = clean.span, clean.prompt, swapped.prompt
            if x[:a] == y[:a] and x[b:] == y[b:]:
                return other
    raise UserError(
        f"{example.task}: no answer of as many tokens as {example.answer!r} in {TRIES} "
        "tries; choose another task for this tokenizer."
    )


def encode_example(example: Example, tokenizer: Tokenizer) -> Encoded | None:
    """Encode, or return None if the answer's tokens are not the same ones at both places."""
    prompt = tokenizer.encode(example.prompt)
    joint = tokenizer.encode(example.prompt + example.answer)
    answer = joint[len(prompt) :]
    start = len(tokenizer.encode(example.before))
    span = (start, start + len(answer))
    whole = joint[: len(prompt)] == prompt and prompt[start : span[1]] == answer
    once = example.prompt.count(example.answer) == 1
    return Encoded(prompt, answer, span) if answer and whole and once else None


def training_row(
    task: str, rng: np.random.Generator, seq_len: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `seq_len` tokens and, per token, 1 where the row itself determines it."""
    if task == "recall":
        _check_characters(tokenizer)
        text, answers = _recall_row(rng, seq_len)
        return np.array(tokenizer.encode(text), np.int32), answers
    example = make_example(task, rng, tokens=seq_len - 1, tokenizer=tokenizer)
    encoded = encode_example(example, tokenizer)
    ids = encoded.prompt + encoded.answer + list(tokenizer.eos_ids[:1])
    mask = np.zeros(len(ids), np.float32)
    mask[len(encoded.prompt) : len(encoded.prompt) + len(encoded.answer)] = 1
    return np.array(ids, np.int32), mask


def check_task(task: str) -> None:
    """Refuse a task that does not exist."""
    if task not in TASKS:
        raise UserError(f"Task {task!r} is unknown; choose one of {', '.join(TASKS)}.")


def _other_answer(example: Example, rng: np.random.Generator, tokenizer: Tokenizer) -> str:
    """Draw an answer of the same kind that differs at every digit or word."""
    answer = example.answer
    if example.task == "recall":
        return str(rng.choice([v for v in VALUES if v not in example.prompt]))
    if answer.strip().isdigit():
        first, *rest = answer.strip()
        head = str(rng.choice([d for d in "123456789" if d != first]))
        return " " + head + "".join(str((int(d) + rng.integers(1, 10)) % 10) for d in rest)
    sizes = [len(ids) for ids in tokenizer.encode_batch([" " + w for w in WORDS])]
    of_size = {n: [w for w, s in zip(WORDS, sizes, strict=True) if s == n] for n in set(sizes)}
    words = []
    for old in answer.split():
        alike = [w for w in of_size[sizes[WORDS.index(old)]] if w != old]
        words.append(str(rng.choice(alike or WORDS)))
    return " " + " ".join(words)


# Prose around facts.


@functools.lru_cache(maxsize=8)
def _sentences(
    text: str | tuple[str, ...] | None, tokenizer: Tokenizer
) -> tuple[tuple[str, ...], np.ndarray]:
    """Split prose (None: the shipped sample) into usable sentences, and count their tokens."""
    if text is None:
        text = lzma.decompress(SAMPLE.read_bytes()).decode("utf-8")
    if isinstance(text, str):
        text = re.sub(r"\s+", " ", text.replace("\x1e", " ")).strip()
        text = tuple(s for s in re.split(r"(?<=[.!?]) ", text) if 20 <= len(s) <= 240)
    if not text:
        raise UserError("haystack: no sentence of 20 to 240 characters; give plain prose.")
    return text, np.array([len(i) for i in tokenizer.encode_batch([" " + s for s in text])])


def _hide(task: str, parts: _Parts, rng: np.random.Generator, place: tuple) -> Example:
    """Hide the facts in as many sentences as fit; `place` is tokens, depth, tokenizer, haystack."""
    tokens, depth, tokenizer, haystack = place
    bare = _assemble(task, parts, [], [0] * len(parts.facts), depth)
    room = tokens - len(tokenizer.encode(bare.prompt + bare.answer))
    if room < 0:
        raise UserError(
            f"{task}: {tokens} tokens are too few, this tokenizer needs at least "
            f"{tokens - room}; raise the length."
        )
    sentences, sizes = _sentences(haystack or parts.haystack or None, tokenizer)
    first = int(rng.integers(len(sentences)))
    wanted = np.arange(first, first + room // int(sizes.min()) + 1) % len(sentences)
    used = np.cumsum(sizes[wanted])
    kept = list(wanted[used <= room])  # a passage as it stands, then shorter sentences that fit
    left = room - int(sizes[kept].sum())
    for i in wanted[used > room]:
        if sizes[i] <= left:
            kept.append(i)
            left -= int(sizes[i])
    depths = [depth, *rng.uniform(size=len(parts.facts) - 1)]
    for count in range(len(kept), -1, -1):
        # Cut where the share of haystack tokens is nearest to the depth.
        ends = np.concatenate([[0], np.cumsum(sizes[kept[:count]])])
        cuts = [int(np.argmin(np.abs(ends - d * ends[-1]))) for d in depths]
        example = _assemble(task, parts, [sentences[i] for i in kept[:count]], cuts, depth)
        if len(tokenizer.encode(example.prompt + example.answer)) <= tokens:
            return example
    return bare


def _assemble(
    task: str, parts: _Parts, sentences: list[str], cuts: list[int], depth: float
) -> Example:
    """Put fact i before sentence `cuts[i]`, and the question at the end."""
    order = sorted(range(len(cuts)), key=lambda i: cuts[i])
    pieces: list[str] = []
    target, done = 0, 0
    for i in order:
        pieces += sentences[done : cuts[i]]
        done = cuts[i]
        if i == 0:
            target = len(pieces)
        pieces.append("".join(parts.facts[i]))
    pieces += sentences[done:]
    head, answer, tail = parts.facts[0]
    before = " ".join([parts.intro, *pieces[:target], head])
    after = " ".join([tail, *pieces[target + 1 :]]) + parts.question
    before, after = (
        re.sub("\n{3,}", "\n\n", re.sub(" *\n *", "\n", text)) for text in (before, after)
    )
    return Example(task, before, answer, after, depth)


# Single characters: "a7ak3km9m|k3ka7a…", pairs and then queries in the same form. The repeated
# key makes the task learnable in a few hundred steps: writing it needs a head that looks one token
# back, and only such a head lets another find a value by its key. As "a7k3m9|k3a7…" the same task
# stays at chance for thousands of steps. Few pairs are easy, so their number is log-uniform.


def _recall_row(rng: np.random.Generator, length: int) -> tuple[str, np.ndarray]:
    """Return pairs and queries as text, and 1 at queried values and repeated keys."""
    most = _most_pairs(length)
    pairs = min(most, int(np.exp(rng.uniform(np.log(min(2, most)), np.log(most + 1)))))
    triples = _triples(rng, pairs)
    asked = rng.integers(pairs, size=length // 3 + 1)
    text = "".join(triples) + "|" + "".join(triples[i] for i in asked)
    answers = np.zeros(len(text), np.float32)
    answers[2 : 3 * pairs : 3] = 1
    answers[3 * pairs + 2 :: 3] = 1
    answers[3 * pairs + 3 :: 3] = 1
    return text[:length], answers[:length]


def _recall(rng: np.random.Generator, tokens: int, depth: float) -> Example:
    """Make a row whose last query is about the pair at `depth`, and no other query is."""
    pairs = _most_pairs(tokens)
    target = round(depth * (pairs - 1))
    triples = _triples(rng, pairs)
    others = [t for i, t in enumerate(triples) if i != target]
    asked = rng.integers(len(others), size=(tokens - 3 * pairs - 3) // 3) if others else ()
    text, (key, value, _) = "".join(triples), triples[target]
    queries = "|" + "".join(others[i] for i in asked) + key
    at = 3 * target + 1
    return Example("recall", text[:at], value, text[at + 1 :] + queries, depth)


def _triples(rng: np.random.Generator, pairs: int) -> list[str]:
    """Draw key, value, key with keys and values that differ from pair to pair."""
    keys, values = (rng.permutation(list(symbols))[:pairs] for symbols in (KEYS, VALUES))
    return [k + v + k for k, v in zip(keys, values, strict=True)]


def _most_pairs(length: int) -> int:
    """Leave at least half of a row to queries: each one is a lesson."""
    if length < 8:
        raise UserError(f"recall: {length} tokens are too few; it needs at least 8.")
    return min(MAX_PAIRS, (length - 2) // 6)


def _check_characters(tokenizer: Tokenizer) -> None:
    if len(tokenizer.encode(KEYS + VALUES)) != len(KEYS + VALUES):
        raise UserError("recall needs one token per character: use the bytes tokenizer.")
