"""The figures of a rehearsal, as one row of a result file and as a screen."""

from hydrajax.flops import train_flops_per_token
from hydrajax.layout import Layout
from hydrajax.metrics import sparkline
from hydrajax.rehearse.chips import GIB, chip_of
from hydrajax.rehearse.hlo import Program
from hydrajax.rehearse.memory import refusal
from hydrajax.rehearse.roofline import ASSUMPTIONS, roofline
from hydrajax.rehearse.step import Compiled, Subject, implementations
from hydrajax.rehearse.traffic import KINDS, collectives, hbm_bytes

MEMORY = ("parameters", "optimiser", "teacher", "rows", "activations", "other")


def make_row(topology: str, layout: Layout, student: Subject, compiled: Compiled) -> dict:
    """What was compiled, what it keeps in memory and, if it fits, what its step should take."""
    cfg, memory = layout.programs.run, compiled.memory
    mesh, plan = dict(layout.mesh.shape), student.plan
    fits = compiled.text is not None
    row = {
        "topology": topology,
        "stage": cfg.stage,
        "fits": fits,
        "message": "" if fits else refusal(cfg, mesh, memory),
        "devices": layout.mesh.size,
        "device_kind": layout.device_kind,
        "mesh": mesh,
        "heads_kept_whole": len(layout.student.whole),
        "parameters": sum(a.size for a in layout.student.params.values()),
        "fa_heads": [len(heads) for heads in plan.fa],
        "heads": plan.num_heads,
        "plan": student.source,
        "rows": cfg.data.rows,
        "seq_len": cfg.data.seq_len,
        "accum": cfg.train.accum,
        "remat": cfg.train.remat,
        "memory_bytes": memory.facts(),
        "seconds": compiled.seconds,
    }
    return row | (_expected(layout, student, Program(compiled.text)) if fits else {})


def _expected(layout: Layout, student: Subject, program: Program) -> dict:
    """Traffic, roofline and utilisation of the executable."""
    cfg, devices = layout.programs.run, layout.mesh.size
    moved, through_hbm = collectives(program, devices), hbm_bytes(program)
    tokens = cfg.data.rows * cfg.data.seq_len
    per_token = train_flops_per_token(
        student.model, student.plan, cfg.data.seq_len, cfg.stage,
        cached=bool(cfg.train.teacher_cache),
    )  # fmt: skip
    flops = tokens * per_token / devices
    times = roofline(chip_of(layout.device_kind), flops, through_hbm, sum(moved.sent.values()))
    return {
        "implementations": implementations(program),
        "flops": flops,
        "hbm_traffic_bytes": through_hbm,
        "sent_bytes": {kind: moved.sent[kind] for kind in KINDS},
        "collectives": {kind: moved.count[kind] for kind in KINDS},
        "loops_counted_once": program.unknown_loops,
        "compute_s": times.compute_s,
        "hbm_s": times.hbm_s,
        "ici_s": times.ici_s,
        "bound": times.bound,
        "step_s": [times.floor_s, times.ceiling_s],
        "mfu": list(times.mfu),
        "tokens_per_s": [tokens / times.ceiling_s, tokens / times.floor_s],
    }


def bytes_on_host(row: dict) -> dict[str, int]:
    """Bytes for one device by what they are: moments, and inputs of a micro-batch's blocks."""
    memory = row["memory_bytes"]
    sizes = {
        "optimiser": memory.get("host", 0),
        "activations": memory.get("inputs", 0) if row["remat"] == "host" else 0,
    }
    return {name: size for name, size in sizes.items() if size}


def screen(row: dict) -> str:
    """What the command prints of a row."""
    memory = row["memory_bytes"]
    named = "  ".join(f"{k} {memory[k] / GIB:.2f}" for k in MEMORY if memory[k])
    chosen = f"{sparkline(row['fa_heads'], row['heads'])} {sum(row['fa_heads'])}"
    lines = [
        f"stage         {row['stage']}, {row['parameters']:,} parameters, {row['rows']} rows of "
        f"{row['seq_len']} tokens in {row['accum']} micro-batches, remat {row['remat']}",
        f"FA heads      {chosen} of {len(row['fa_heads']) * row['heads']}, {row['plan']}",
        f"HBM, GiB      {named}  total {memory['total'] / GIB:.2f} of {memory['hbm'] / GIB:.2f}",
        f"seconds       {_pairs(row['seconds'])}",
    ]
    if on_host := bytes_on_host(row):
        named = "  ".join(f"{name} {size / GIB:.2f}" for name, size in on_host.items())
        lines.insert(
            3, f"host, GiB     {named}: cross the link to the host and back, in no time below"
        )
    return "\n".join(lines + (_expectation_lines(row) if row["fits"] else []))


def _expectation_lines(row: dict) -> list[str]:
    chip, once = chip_of(row["device_kind"]), row["loops_counted_once"]
    sent = {f"{kind} (x{row['collectives'][kind]})": f"{sent / 1e9:.3f}"
            for kind, sent in row["sent_bytes"].items() if sent}  # fmt: skip
    compiled_in = {op: "+".join(names) for op, names in row["implementations"].items()}
    loops = f"; {once} loops of unknown length counted once" if once else "; loops included"
    (fast, slow), (low, high) = row["step_s"], row["mfu"]
    return [
        f"compiled in   {_pairs(compiled_in)}",
        f"FLOPs         {row['flops'] / 1e12:.3f} T a device and step",
        f"sent, GB      {_pairs(sent) or 'nothing'}{loops}",
        f"HBM moved     {row['hbm_traffic_bytes'] / 1e9:.1f} GB",
        f"chip          {chip.peak / 1e12:.0f} TFLOP/s bf16, {chip.hbm_bandwidth / 1e9:.0f} GB/s "
        f"HBM, {chip.ici_bandwidth / 1e9:.0f} GB/s sent over ICI, a device",
        f"roofline      compute {row['compute_s']:.4f} s  HBM {row['hbm_s']:.4f} s  "
        f"ICI {row['ici_s']:.4f} s: bound by {row['bound']}",
        f"step          {fast:.4f} s (all overlap) to {slow:.4f} s (nothing does), "
        f"MFU {high:.0%} to {low:.0%}",
        *(f"assumed       {text}" for text in ASSUMPTIONS),
    ]


def _pairs(values: dict) -> str:
    return "  ".join(f"{name} {value}" for name, value in values.items())
