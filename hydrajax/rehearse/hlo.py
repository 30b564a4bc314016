"""What a compiled program moves between devices and which implementations it holds, from its text.

Per device, for n devices in a group and a device's own operand of b bytes, a ring sends

    all-gather  b (n-1)    reduce-scatter, all-to-all  b (n-1)/n    all-reduce  2 b (n-1)/n
    collective-permute  b

A collective inside a loop counts as often as the loop turns; where the text does not tell how
often, once, and the loop is counted as unknown. Both branches of a conditional count. Asynchronous
pairs count where they start.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclass
class Traffic:
    """Bytes that one device sends in one run of a program, by kind of collective."""

    sent: Counter = field(default_factory=Counter)
    count: Counter = field(default_factory=Counter)  # executions
    unknown_loops: int = 0  # loops whose collectives were counted once

    @property
    def total(self) -> int:
        return sum(self.sent.values())


def collective_traffic(text: str, devices: int) -> Traffic:
    """Traffic of a compiled program that runs on `devices`."""
    computations, entry = parse(text)
    traffic = Traffic()
    for name, times in _executions(computations, entry, traffic).items():
        sizes = {i.name: size_of(i.shape) for i in computations[name]}
        for i in computations[name]:
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            held = sum(sizes.get(operand, 0) for operand in i.operands)
            sent = _ring(kind, held, group_size(i.attributes, devices))
            traffic.sent[kind] += round(times * sent)
            traffic.count[kind] += times
    return traffic


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions of every computation of a module, and the name of its entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(*found.groups()))
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(
        part.split()[-1] for part in inside.split(",") if part.strip()
    )
    return Instruction(name, shape, opcode, operands, rest[close:])


def _closing(text: str, start: int) -> int:
    """Position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at + 1
    return len(text)


def size_of(shape: str) -> int:
    """Bytes of an array or of all arrays of a tuple, without the padding of layouts."""
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        if dtype in ("token", "opaque"):
            continue
        bits = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        total += math.ceil(math.prod(int(d) for d in dims.split(",") if d) * bits / 8)
    return total


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one collective; all, where the text names no groups."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'?(\w+)'?=(\d+)", found[1])}
        # An axis by name, or a part of one: 'name':(what lies before it)its size.
        parts = re.findall(r"'?(\w+)'?(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    return devices


def _ring(kind: str, held: int, n: int) -> float:
    if kind == "collective-permute":
        return held
    if kind == "all-gather":
        return held * (n - 1)
    return held * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _executions(computations, entry: str, traffic: Traffic) -> Counter:
    """How often each computation runs, callers before callees."""
    times: Counter = Counter({entry: 1})
    for name in _callers_first(computations, entry):
        for i in computations[name]:
            for role, callee in _callees(i):
                turns = 1
                if i.opcode == "while" and role in ("body", "condition"):
                    known = trip_count(i, computations)
                    if known is None and role == "body":
                        traffic.unknown_loops += _communicates(computations, callee)
                    turns = known or 1
                times[callee] += times[name] * turns
    return Counter({name: n for name, n in times.items() if name in computations})


def _callees(i: Instruction) -> Iterator[tuple[str, str]]:
    if i.opcode.endswith(("-update", "-done")):
        return  # the start of the pair names the same computation
    yield from _CALLS.findall(i.attributes)
    if found := _BRANCHES.search(i.attributes):
        yield from (("branch", name.strip().lstrip("%")) for name in found[1].split(","))


def _callers_first(computations, entry: str) -> list[str]:
    order, seen = [], set()

    def visit(name: str) -> None:
        if name in seen or name not in computations:
            return
        seen.add(name)
        for i in computations[name]:
            for _, callee in _callees(i):
                visit(callee)
        order.append(name)

    visit(entry)
    return order[::-1]


def _communicates(computations, name: str) -> bool:
    return any(
        i.opcode.removesuffix("-start") in KINDS
        for inner in _callers_first(computations, name)
        for i in computations[inner]
    )


def trip_count(loop: Instruction, computations) -> int | None:
    """Turns of a while loop: what the compiler noted, or the bound that its counter meets."""
    if found := _TRIPS.search(loop.attributes):
        return int(found[1])
    roles = dict(_CALLS.findall(loop.attributes))
    inside = [
        i for name in _callers_first(computations, roles["condition"]) for i in computations[name]
    ]
    compares = [i for i in inside if i.opcode == "compare"]
    bounds = {
        int(i.operands[0]) for i in inside if i.opcode == "constant" and i.operands[0].isdigit()
    }
    counts_up = len(compares) == 1 and "direction=LT" in compares[0].attributes
    return bounds.pop() if counts_up and len(bounds) == 1 else None
