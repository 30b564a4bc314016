"""What one device moves in one run of a compiled program: over its links, and through its HBM.

Links: for n devices in a group and an operand of b bytes on each of them, a ring sends

    all-gather  b (n-1)     reduce-scatter, all-to-all  b (n-1)/n     all-reduce  2 b (n-1)/n
    collective-permute  b

Asynchronous pairs count where they start. HBM: every instruction outside of fusions reads its
operands and writes its results; of what is only sliced, or updated in place, the slice counts.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

from hydrajax.rehearse.hlo import Instruction, Program, size_of

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

# Instructions that move nothing by themselves.
NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
           "call", "after-all", "partition-id", "replica-id", "async-start")  # fmt: skip


@dataclass
class Collectives:
    """By kind: bytes that one device sends, and how many collectives it takes part in."""

    sent: Counter = field(default_factory=Counter)
    count: Counter = field(default_factory=Counter)


def collectives(program: Program, devices: int) -> Collectives:
    """Collectives of a program that runs on `devices`."""
    out = Collectives()
    for times, name, instructions in program.executions():
        sizes = {i.name: i.shape for i in instructions}
        for i in instructions:
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            # The TPU compiler writes a reduce-scatter as a fused all-reduce of which a slice stays.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
            held = sum(size_of(sizes.get(operand, "")) for operand in i.operands)
            out.sent[kind] += round(times * _ring(kind, held, group_size(i.attributes, devices)))
            out.count[kind] += times
    return out


def _ring(kind: str, held: int, n: int) -> float:
    if kind == "collective-permute":
        return held
    if kind == "all-gather":
        return held * (n - 1)
    return held * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one collective; all, where the text names no groups."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'?(\w+)'?=(\d+)", found[1])}
        # An axis by name, or a part of one: 'name':(size of what lies before it)its size.
        parts = re.findall(r"'?([A-Za-z_]\w*)'?(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    return devices


def hbm_bytes(program: Program) -> int:
    """Bytes that one device reads from and writes to its HBM in one run."""
    fused = {
        callee
        for instructions in program.computations.values()
        for i in instructions
        for role, callee in i.callees
        if i.opcode == "fusion" or role == "to_apply"
    }
    total = 0
    for times, name, instructions in program.executions():
        if name in fused:
            continue
        sizes = {i.name: size_of(i.shape, hbm_only=True) for i in instructions}
        total += times * sum(_moved(i, sizes, program) for i in instructions)
    return total


def _moved(i: Instruction, sizes: dict[str, int], program: Program) -> float:
    if i.opcode in NOTHING or i.opcode.endswith(("-done", "-update")):
        return 0
    if '"AllocateBuffer"' in i.attributes:
        return 0
    written, read = sizes[i.name], [sizes.get(name, 0) for name in i.operands]
    if i.opcode.endswith("-start") and i.opcode != "all-reduce-start":
        return written  # the result holds the operand as well
    if i.opcode in ("dynamic-slice", "gather"):
        return written + min(size_of(i.shape), read[0])
    if i.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if i.opcode == "fusion":
        inside = program.computations.get(i.called, [])
        written = min(written, _written(inside))
        read = [min(size, _read(inside, k, program)) if size else 0 for k, size in enumerate(read)]
    return written + sum(read)


def _read(inside: list[Instruction], index: int, program: Program) -> float:
    """Most bytes that a fusion reads of its operand: those of its slices, where it only slices."""
    names = {i.name for i in inside if i.opcode == "parameter" and i.operands == (str(index),)}
    total = 0.0
    for i in inside:
        used = [k for k, name in enumerate(i.operands) if name in names]
        if not used or i.opcode == "parameter":
            continue
        if i.opcode == "bitcast":
            names.add(i.name)
        elif i.opcode == "dynamic-slice" and used == [0]:
            total += size_of(i.shape)
        elif i.opcode == "fusion":
            nested = program.computations.get(i.called, [])
            total += sum(_read(nested, k, program) for k in used)
        elif i.opcode != "dynamic-update-slice" or used != [0]:
            return math.inf
    return total


def _written(inside: list[Instruction]) -> float:
    """Most bytes that a fusion writes: the update, where its result is an update in place."""
    by_name = {i.name: i for i in inside}
    root = inside[-1] if inside else None
    while root is not None and root.opcode == "bitcast":
        root = by_name.get(root.operands[0])
    if root is None or root.opcode != "dynamic-update-slice":
        return math.inf
    return size_of(by_name[root.operands[1]].shape)
