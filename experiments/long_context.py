"""Memory and tokens/s of extend-stage training at long rows on one GPU, student and teacher shape.

    python -m experiments.long_context --results=results/scale/train_h100.json \\
        [--limit=1200] [--add] [--also=train.remat=host@524288] [kernels.attention=xla ...]

The real step of `configs/qwen3_1p7b/extend.py` with random weights, one row of one document: each
case (`experiments.long_case`) is a process of its own, so that running out of memory ends that case
alone and its peak is its own. After the listed lengths, and other rows of the student that `--also`
names, the longest row that fits is searched. The file is written after every case; with `--add` its
cases are not repeated.

No case is begun when `--limit` seconds are over, and one under way is cut then. `--ahead=8`
compiles the listed cases first, so many at a time, and measures what they saved: only where XLA
does not tune on the GPU (XLA_FLAGS=--xla_gpu_autotune_level=0), where they would disturb another.
"""

import argparse
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from experiments.long_case import CONFIG, SHAPES
from hydrajax.checkpoint import make_lineage
from hydrajax.manifest import write_atomic
from pallas_kernels.bench import PACKAGES, versions
from pallas_kernels.timing import Clock

LENGTHS = (16_384, 65_536, 131_072, 262_144)
MULTIPLE = 32_768  # the longest row is searched among these
# Of the GPU's memory, unless the environment says otherwise: XLA takes less by default. The rest
# is for the contexts of this process and of those that compile ahead. Taken whole: a pool that
# grows keeps what came first in pieces, and has no room in one for the step.
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
Row = dict[str, Any]


class Key(NamedTuple):
    """What tells the cases of a file apart."""

    shape: str
    tokens: int
    changes: tuple[str, ...] = ()  # of the config, beside those of all cases

    @property
    def name(self) -> str:
        """Of its files."""
        changes = f"{zlib.crc32(' '.join(self.changes).encode()):08x}" if self.changes else ""
        return "_".join(filter(None, (self.shape, str(self.tokens), changes)))


def key_of(row: Row) -> Key:
    return Key(row["shape"], row["tokens"], tuple(row.get("changes", ())))


def order(lengths: tuple[int, ...], shapes: tuple[str, ...] = SHAPES) -> list[Key]:
    """All shapes of the shortest rows first."""
    return [Key(shape, tokens) for tokens in sorted(lengths) for shape in shapes]


def next_probe(known: dict[int, bool], guess: int | None, multiple: int = MULTIPLE) -> int | None:
    """The next length to try, from those that are known to fit or not; None when it is settled.

    First the guess and its neighbours, then doubling, then bisection between multiples.
    """
    if not known:
        return None
    low = max((tokens for tokens, fits in known.items() if fits), default=0)
    high = min((t for t, fits in known.items() if not fits and t > low), default=None)
    if guess is not None and low < guess and (high is None or guess < high):
        return guess
    if high is None:
        return low + multiple if low == guess else 2 * low
    if high == guess and high - multiple > low:
        return high - multiple
    middle = (low + high) // 2 // multiple * multiple
    return middle if low < middle < high else None


def guess_of(rows: list[Row], multiple: int = MULTIPLE) -> int | None:
    """The longest multiple whose program should fit, by a line through the two longest students."""
    sized = {r["tokens"]: r for r in students(rows) if "compiled_bytes" in r}
    if len(sized) < 2 or any("bytes_limit" not in row for row in sized.values()):
        return None
    shorter, longer = (sized[tokens] for tokens in sorted(sized)[-2:])
    slope = (longer["compiled_bytes"] - shorter["compiled_bytes"]) / (
        longer["tokens"] - shorter["tokens"]
    )
    if slope <= 0:
        return None
    room = longer["bytes_limit"] - longer["compiled_bytes"]
    return int((longer["tokens"] + room / slope) // multiple * multiple) or None


def students(rows: list[Row], changes: tuple[str, ...] = ()) -> list[Row]:
    return [r for r in rows if r["shape"] == "student" and key_of(r).changes == changes]


def fits_of(rows: list[Row], changes: tuple[str, ...] = ()) -> dict[int, bool]:
    """Which lengths of the student fit, of those that were tried to the end."""
    tried = students(rows, changes)
    return {r["tokens"]: r["fits"] for r in tried if r.get("fits") is not None}


def summary(rows: list[Row]) -> dict[str, float]:
    """Rates of both shapes by length, the student's MFU, and the longest row of it that ran.

    Names end with the changes of a case that has some.
    """
    out = {}
    for row in rows:
        if row.get("fits") and not row.get("searched"):
            name = " ".join((f"{row['tokens'] // 1024}k", *key_of(row).changes))
            out[f"{row['shape']}_tokens_per_s_{name}"] = row["tokens_per_s"]
            if row["shape"] == "student" and row.get("mfu") is not None:
                out[f"mfu_{name}"] = row["mfu"]
    for changes in dict.fromkeys(key_of(row).changes for row in rows):
        ran = [tokens for tokens, fits in fits_of(rows, changes).items() if fits]
        if ran:
            out[" ".join(("max_context", *changes))] = max(ran)
    return out


def story(rows: list[Row], guess: int | None, why: str, multiple: int = MULTIPLE) -> dict[str, Any]:
    """How far `max_context` is settled: what ran, what did not fit, what was not tried."""
    known = fits_of(rows)
    low = max((tokens for tokens, fits in known.items() if fits), default=0)
    high = min(
        (tokens for tokens, fits in known.items() if not fits and tokens > low), default=None
    )
    told = {"fits": low, "does_not_fit": high, "multiple": multiple}
    if next_probe(known, guess, multiple) is None:
        return told | {"not_tried": "nothing between"}
    between = f"{low} and {high}" if high else f"{low} and more"
    return told | {"not_tried": f"rows between {between}: {why}"}


class Runner:
    """Runs cases in processes until the clock stops; `folder` takes compiled programs."""

    def __init__(self, args: argparse.Namespace, clock: Clock, folder: Path):
        self.args, self.clock, self.folder = args, clock, folder
        self.logs = args.root / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.programs: dict[Key, Path] = {}  # compiled ahead and not measured yet

    def compile_ahead(self, keys: list[Key]) -> None:
        """One that cannot be compiled is left to `measure`, which tells why."""

        def compile_one(key: Key) -> None:
            path = self.folder / key.name
            if self._call(key, "compile", f"--save={path}")[0] == 0:
                self.programs[key] = path

        if self.args.ahead:
            with ThreadPoolExecutor(self.args.ahead) as pool:
                list(pool.map(compile_one, keys))

    def measure(self, key: Key, steps: int) -> Row | None:
        """The row of a case, with `error` where it failed; None where the time was over."""
        out = self.args.root / f"{key.name}.json"
        out.unlink(missing_ok=True)
        options = [f"--out={out}", f"--steps={steps}", f"--seconds={self.args.seconds}"]
        program = self.programs.pop(key, None)
        code, log = self._call(key, "run", *options, *([f"--program={program}"] if program else []))
        if program is not None:
            program.unlink()  # hundreds of MB
        if code is None:
            return None
        if code or not out.is_file():
            lines = log.read_text(errors="replace").strip().splitlines()
            last = " ".join(lines[-1:])[-500:]
            return _facts(key) | {"error": f"exit code {code}: {last}"}
        return json.loads(out.read_text()) | _facts(key)

    def _call(self, key: Key, what: str, *options: str) -> tuple[int | None, Path]:
        """Exit code, None where it was cut, and the log."""
        args, log = self.args, self.logs / f"{key.name}_{what}.log"
        left = self.clock.left()
        if left <= 0:
            return None, log
        command = [
            sys.executable, "-m", "experiments.long_case", f"--shape={key.shape}",
            f"--tokens={key.tokens}", f"--config={args.config}", f"--documents={args.documents}",
            f"--cache={args.cache}", *options, *args.changes, *key.changes,
        ]  # fmt: skip
        environment = MEMORY | os.environ
        if what == "compile":
            environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False,
                    timeout=left,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return None, log
        return done.returncode, log


def _facts(key: Key) -> Row:
    return {"shape": key.shape, "tokens": key.tokens} | (
        {"changes": list(key.changes)} if key.changes else {}
    )


def measure_all(runner: Runner, rows: list[Row], args: argparse.Namespace) -> Iterator[Row]:
    """Rows of the listed cases that `rows` lacks, then those of the search, as they are there."""
    done = {key_of(row) for row in rows if "error" not in row}
    rows = list(rows)
    wanted = dict.fromkeys([*order(args.lengths, args.shapes), *args.also])
    left = [key for key in wanted if key not in done]
    runner.compile_ahead(left)
    for key in left:
        row = runner.measure(key, args.steps)
        if row is None:
            return
        rows.append(row)
        yield row
    while args.search and (tokens := next_probe(fits_of(rows), guess_of(rows))) is not None:
        row = runner.measure(Key("student", tokens), 0)
        if row is None:
            return
        rows.append(row | {"searched": True})
        yield rows[-1]
        if "error" in row:
            return  # it would be tried again for ever


def earlier(path: Path, subject: dict[str, Any]) -> tuple[list[Row], list[dict]]:
    """Rows and metas of the runs that a file holds, of the same `subject` or not at all.

    What failed or did not fit is left out: it is tried again, there may be more room now.
    """
    if not path.is_file():
        return [], []
    old = json.loads(path.read_text())
    if old["meta"]["subject"] != subject:
        sys.exit(f"{path}: expected cases of {subject}, got {old['meta']['subject']}")
    before = old["meta"].pop("earlier_runs", [])
    return [row for row in old["rows"] if row.get("fits")], [*before, old["meta"]]


def subject_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all cases of a file share; documents are those of a row, of one length."""
    return {"config": args.config, "documents": args.documents, "changes": args.changes}


def make_meta(args: argparse.Namespace) -> dict[str, Any]:
    meta = make_lineage(["python", "-m", "experiments.long_context", *sys.argv[1:]], None)
    del meta["parent"], meta["parent_hash"]
    meta["versions"] |= versions(PACKAGES)
    names = ("XLA_FLAGS", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", *MEMORY)
    return meta | ({"commit": args.commit} if args.commit else {}) | {
        "device": "",  # the first case tells
        "seeds": {"weights": 0, "heads": 0, "tokens": 0},
        "environment": {name: (MEMORY | os.environ).get(name, "") for name in names},
        "subject": subject_of(args),
        "tokens_per_s": "tokens of the row by the median of steps_s",
        "searched": "of these rows one step ran, the first",
        "peak_bytes": "of the allocator over the whole case",
        "max_context": "the longest row of the student of which a step ran",
    }  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("changes", nargs="*", help="key=value of the config, of all cases")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--lengths", type=_lengths, default=LENGTHS, help="tokens, comma between")
    parser.add_argument("--shapes", type=_shapes, default=SHAPES, help=f"of {','.join(SHAPES)}")
    parser.add_argument(
        "--also", type=_also, action="extend", default=[], metavar="[KEY=VALUE,...@]TOKENS,...",
        help="rows of the student, with changes of the config of their own; may be repeated",
    )  # fmt: skip
    parser.add_argument("--documents", type=int, default=1, help="in a row, of one length")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--seconds", type=float, default=100.0, help="for the steps of one case")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for everything")
    parser.add_argument("--no-search", dest="search", action="store_false")
    parser.add_argument("--ahead", type=int, default=0, help="cases compiled at once, before all")
    parser.add_argument("--add", action="store_true", help="keep and do not repeat earlier cases")
    parser.add_argument("--root", type=Path, default=Path("runs/long_context"))
    parser.add_argument("--cache", default="runs/long_context/cache", help="compiled programs")
    parser.add_argument("--commit", default="", help="of this tree, where git is not at hand")
    return parser.parse_args(arguments)


def _lengths(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 1 for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers of tokens, got {text}")
    return tuple(map(int, parts))


def _also(text: str) -> list[Key]:
    changes, _, lengths = text.rpartition("@")
    given = tuple(change for change in changes.split(",") if change)
    if not all("=" in change for change in given):
        raise argparse.ArgumentTypeError(f"expected key=value before the @, got {changes}")
    return [Key("student", tokens, given) for tokens in _lengths(lengths)]


def _shapes(text: str) -> tuple[str, ...]:
    if unknown := sorted({*text.split(",")} - {*SHAPES}):
        raise argparse.ArgumentTypeError(f"expected some of {SHAPES}, got {unknown}")
    return tuple(text.split(","))


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    clock, meta = Clock(args.limit), make_meta(args)
    rows, before = earlier(args.results, subject_of(args)) if args.add else ([], [])
    meta |= {"earlier_runs": before} if before else {}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.root.mkdir(parents=True, exist_ok=True)
    failed, report = [], {}
    with TemporaryDirectory(dir=args.root) as programs:
        runner = Runner(args, clock, Path(programs))
        for row in measure_all(runner, rows, args):
            rows = [*rows, row | {"date": meta["date"]}]
            failed += [row["error"]] if "error" in row else []
            _check_device(meta, rows, args.results)
            report = {"meta": meta, "rows": rows, "summary": summary(rows)}
            why = "a case failed" if failed else "the time was over"
            why = why if args.search else "nothing was searched"
            report["search"] = story(rows, guess_of(rows), why)
            write_atomic(args.results, (json.dumps(report, indent=1) + "\n").encode())
            print(f"{args.limit - clock.left():7.1f} s  {line(row)}", flush=True)
    print(json.dumps({key: report.get(key) for key in ("summary", "search")}, indent=1))
    if failed:
        sys.exit(f"{len(failed)} cases failed, see {runner.logs}: {'; '.join(failed)}")


def _check_device(meta: dict, rows: list[Row], path: Path) -> None:
    kinds = sorted({row["device_kind"] for row in rows if "device_kind" in row})
    if len(kinds) > 1:
        sys.exit(f"{path}: expected cases of one kind of device, got {kinds}")
    meta["device"] = f"1 x {kinds[0]}" if kinds else "unknown"


def line(row: Row) -> str:
    """A case on the screen."""
    head = " ".join((f"{row['shape']:<13} {row['tokens']:>8}", *key_of(row).changes, " "))
    if "error" in row:
        return head + row["error"]
    if not row["fits"]:
        return head + f"does not fit: {row['message'][:120]}"
    share = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
    peak = f"  {row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else ""
    return head + f"{row['step_s']:8.2f} s  {row['tokens_per_s']:9.0f} tokens/s{share}{peak}"


if __name__ == "__main__":
    main()
