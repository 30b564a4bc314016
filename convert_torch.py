"""Import Hugging Face and GGUF models, export runs, verify both against transformers.

    python convert_torch.py import --source DIR|ORG/NAME|FILE.gguf --out teachers/NAME
    python convert_torch.py export --run runs/NAME --out DIR
    python convert_torch.py verify --run teachers/NAME --source DIR|FILE.gguf

Neither import nor export needs torch. A command that fails leaves no half-written folder.
"""

import argparse
import math
import sys
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.checkpoint import (
    CheckpointStore,
    Run,
    hash_params,
    load_run,
    make_lineage,
    write_config,
)
from hydrajax.config import HydraConfig, ModelConfig, to_plain
from hydrajax.head_plan import HeadPlan
from hydrajax.hf import parity
from hydrajax.hf.config import write_config as hf_config
from hydrajax.hf.files import read_json, some
from hydrajax.hf.rules import Rule, rules
from hydrajax.hf.source import (
    DTYPE_NAMES,
    STUDENT,
    Source,
    cast,
    digest,
    open_source,
    read_params,
    tokenizer_note,
)
from hydrajax.hf.target import Output, new_folder, write_json, write_weights
from hydrajax.model import abstract_model, bind, load_model, split_params
from hydrajax.tokenizer import FILES
from hydrajax.typing import UserError

# Import compares logits on its own up to this size; both models stand in memory in fp32.
COMPARE_UP_TO = 1_000_000_000
# `verify` fails beyond this share of the largest logit: storage in bfloat16 stays well below.
TOLERANCE = 0.02


def import_model(args: argparse.Namespace) -> int:
    """Source -> run folder with the parameters as step 0 and a parity report."""
    source = open_source(args.source, allow_pickle=args.allow_pickle, shapes=student_shapes)
    _keep_apart(source.path, args.out)
    with new_folder(args.out, overwrite=args.overwrite) as folder:
        for name, data in source.texts.items():
            (folder / name).write_bytes(data)
        source.notes.append(tokenizer_note(folder, source.cfg))
        params, checksums = read_params(source, args.dtype)
        with closing(CheckpointStore(folder)) as store:
            store.save(0, params=params)
        count = sum(math.prod(p.shape) for p in params.values())
        del params  # the check below reads the folder, not what it was written from
        lineage = make_lineage(_command(), None)
        lineage |= {"source": str(args.source), "source_sha256": source.checksums()}
        write_config(folder, model=source.cfg, hydra=source.hydra, plan=source.head_plan,
                     lineage=lineage)  # fmt: skip
        report = {"source": str(args.source), "parameters": count, "notes": source.notes}
        report |= _check_written(folder, source, checksums)
        report["logits"] = _compare_if_possible(folder, source, count)
        write_json(folder / "parity.json", report)
    for note in source.notes:
        print(f"note: {note}")
    print(f"{args.out}: {source.cfg.family}, {len(checksums)} tensors, {count:,} parameters")
    print(f"parity: stored tensors equal the source bit for bit ({report['sha256'][:16]})")
    print(f"parity: {_say(report['logits'])}")
    return 0


def student_shapes(
    cfg: ModelConfig, hydra: HydraConfig, plan: HeadPlan
) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model, without memory for it."""
    _, params = split_params(abstract_model(cfg, hydra, plan, dtype=jnp.float32))
    return {path: tuple(p.shape) for path, p in params.items()}


def _keep_apart(source: Path, out: Path) -> None:
    """--overwrite must not remove what is being read."""
    source, out = source.resolve(), out.resolve()
    if source == out or out in source.parents:
        raise UserError(f"--out {out} contains the source {source}; choose another folder.")


def _check_written(folder: Path, source: Source, checksums: dict[str, str]) -> dict:
    """Read the new checkpoint back and compare it, tensor by tensor, with what was read."""
    params = load_run(folder).params
    for rule in source.rules:
        if digest(rule.to_hf(np.asarray(params[rule.path]))) != checksums[rule.hf]:
            raise UserError(f"{folder}: {rule.path} does not read back as written; check the disk.")
    lines = "".join(f"{name} {value}\n" for name, value in sorted(checksums.items()))
    return {"tensors": len(checksums), "sha256": digest(np.frombuffer(lines.encode(), np.uint8))}


def _compare_if_possible(folder: Path, source: Source, count: int) -> dict | str:
    if parity.versions() is None:
        return "not compared: torch and transformers are not installed"
    if source.plan is not None:
        return "not compared: transformers does not know hybrids"
    if count > COMPARE_UP_TO:
        return "not compared: a large model; run `convert_torch.py verify` where memory allows"
    try:
        return compare_logits(folder, source)
    except UserError as e:
        return f"not compared: {e}"


def compare_logits(folder: Path, source: Source) -> dict:
    """Distance of a run's fp32 logits from those that transformers gives for the source."""
    run = load_run(folder)
    ids = parity.fixed_ids(run.info.model.vocab_size, run.info.model.max_context)
    graphdef, params = load_model(run, dtype=jnp.float32)
    forward = jax.jit(lambda params, tokens: bind(graphdef, params)(tokens))
    ours = np.asarray(forward(params, jnp.asarray(ids, jnp.int32)))
    del params, run
    if source.path.is_dir():
        theirs = parity.reference_logits(str(source.path), ids)
    else:
        # What a GGUF holds is by definition the values in the dtype that import stores it in.
        tensors = {k: cast(v.read(), source.dtype, k) for k, v in source.entries.items()}
        theirs = parity.reference_logits(source.values, ids, tensors)
    return {"against": parity.versions(), **parity.compare(ours, theirs)}


def _say(logits: dict | str) -> str:
    if isinstance(logits, str):
        return logits
    return (
        f"max |Δlogit| {logits['max_abs_delta_logit']:.2e} (largest logit "
        f"{logits['max_abs_logit']:.1f}), KL {logits['kl']:.2e}, top-1 agreement "
        f"{logits['top1_agreement']:.4f} on {logits['tokens']} tokens; {logits['against']}"
    )


def export_run(args: argparse.Namespace) -> int:
    """Run -> Hugging Face folder; a hybrid gets a format of its own."""
    run = load_run(args.run)
    _keep_apart(args.run, args.out)
    teacher = _is_teacher(run)
    cfg, info = run.info.model, run.info
    table = rules(cfg) if teacher else [Rule.same(k, v.shape) for k, v in run.params.items()]
    _fits(run, table)
    outputs = [_output(run, rule, args.dtype) for rule in table]
    dtype = max(outputs, key=lambda o: o.nbytes).dtype.name
    # make_lineage would load the parent a second time to hash it.
    lineage = make_lineage(_command(), None)
    lineage |= {"parent": str(args.run), "parent_hash": hash_params(run.params)}
    if teacher:
        config = hf_config(cfg, dtype)
    else:
        config = {"model_type": STUDENT, "format_version": 1, "dtype": dtype,
                  "model": to_plain(cfg), "hydra": to_plain(info.hydra),
                  "plan": info.plan.to_json()}  # fmt: skip
    with new_folder(args.out, overwrite=args.overwrite) as folder:
        files = write_weights(folder, outputs)
        write_json(folder / "config.json", config)
        write_json(folder / "hydrajax_lineage.json", lineage)
        for name in FILES:
            if (args.run / name).is_file():
                (folder / name).write_bytes((args.run / name).read_bytes())
    print(f"{args.out}: {len(outputs)} tensors of step {run.step} in {len(files)} file(s), {dtype}")
    if teacher:
        print(f"loads in transformers as {config['architectures'][0]}")
    else:
        print("a hybrid: only hydrajax loads it (`convert_torch.py import`); transformers and "
              "other engines do not")  # fmt: skip
    return 0


def _is_teacher(run: Run) -> bool:
    """Whether the run computes exactly what a Hugging Face model of its family does."""
    hydra, teacher = run.info.hydra, HydraConfig.teacher()
    same = ("fa_pos", "fa_logit_scale", "fa_gate", "fa_kv", "fusion")
    full = HeadPlan.all_full(run.info.plan.num_layers, run.info.plan.num_heads,
                             run.info.plan.num_kv_heads)  # fmt: skip
    return run.info.plan == full and all(getattr(hydra, k) == getattr(teacher, k) for k in same)


def _fits(run: Run, table: list[Rule]) -> None:
    odd = {rule.path for rule in table} ^ run.params.keys()
    if odd:
        raise UserError(f"{run.info.path}: {some(sorted(odd))}: config.json and parameters differ.")


def _output(run: Run, rule: Rule, dtype: str | None) -> Output:
    param = run.params[rule.path]

    def make() -> np.ndarray:
        return rule.to_hf(cast(np.asarray(param), dtype, f"{run.info.path}: {rule.path}"))

    return Output(rule.hf, rule.hf_shape, DTYPE_NAMES[dtype or np.dtype(param.dtype).name], make)


def verify_run(args: argparse.Namespace) -> int:
    """Logits of a run against transformers on its source; exit code 1 if they differ."""
    if parity.versions() is None:
        raise UserError("verify compares with transformers: install hydrajax[dev] (torch and it).")
    source = open_source(args.source, allow_pickle=args.allow_pickle, shapes=student_shapes)
    if source.plan is not None:
        raise UserError(f"{args.source} is a hybrid; transformers has nothing to compare it with.")
    logits = compare_logits(args.run, source)
    report = args.run / "parity.json"
    known = read_json(report) if report.is_file() else {}
    write_json(report, known | {"source": str(args.source), "logits": logits})
    print(f"parity: {_say(logits)}")
    same = logits["max_abs_delta_logit"] <= TOLERANCE * logits["max_abs_logit"]
    print("the run computes the source" if same else "the run does NOT compute the source")
    return 0 if same else 1


def _command() -> list[str]:
    return ["python", *sys.argv]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    source = {"required": True, "help": "folder, org/name on the hub, or a .gguf file"}
    run = {"required": True, "type": Path, "help": "run folder"}
    out = {"required": True, "type": Path, "help": "folder to make"}
    dtype = {"choices": sorted(DTYPE_NAMES), "help": "stored dtype; default: as it is"}
    pickle = {"action": "store_true", "help": "read pytorch_model.bin (needs torch)"}
    overwrite = {"action": "store_true", "help": "replace --out if it exists"}
    for name, function, options in (
        ("import", import_model, {"source": source, "out": out, "dtype": dtype,
                                  "allow-pickle": pickle, "overwrite": overwrite}),
        ("export", export_run, {"run": run, "out": out, "dtype": dtype, "overwrite": overwrite}),
        ("verify", verify_run, {"run": run, "source": source, "allow-pickle": pickle}),
    ):  # fmt: skip
        command = commands.add_parser(name, help=(function.__doc__ or "").split("\n")[0])
        command.set_defaults(function=function)
        for option, settings in options.items():
            command.add_argument(f"--{option}", **settings)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.function(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
