"""The text of a compiled program as data: computations, instructions, and how often each runs.

What stands inside a loop runs as often as the loop turns; where the text does not tell how often,
once, and `unknown_loops` counts it. Both branches of a conditional run. The text is of one device:
shapes are those of its parts.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "token": 0, "opaque": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')
_PARENTHESIS = re.compile(r"[()]")


@dataclass(frozen=True)
class Instruction:
    """One line: %name = shape opcode(operands), attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @cached_property
    def callees(self) -> tuple[tuple[str, str], ...]:
        """(role, computation) of what it calls."""
        return tuple(self._callees())

    def _callees(self) -> Iterator[tuple[str, str]]:
        if self.opcode.endswith(("-update", "-done")):
            return  # the start of the pair names the same computation
        yield from _CALLS.findall(self.attributes)
        if found := _BRANCHES.search(self.attributes):
            yield from (("branch", name.strip().lstrip("%")) for name in found[1].split(","))

    @property
    def called(self) -> str:
        """The computation of a fusion."""
        return dict(self.callees).get("calls", "")


class Program:
    """A compiled module, read from `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if current is None:
                if head := _COMPUTATION.match(line):
                    current = self.computations.setdefault(head[2], [])
                    self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif found := _INSTRUCTION.match(line):
                current.append(_instruction(*found.groups()))

    @cached_property
    def _counted(self) -> tuple[Counter, int]:
        times, unknown = Counter({self.entry: 1}), 0
        for name in self.callers_first(self.entry):
            for i in self.computations[name]:
                turns = self.trip_count(i) if i.opcode == "while" else 1
                unknown += turns is None
                for _, callee in i.callees:
                    times[callee] += times[name] * (turns or 1)
        return times, unknown

    @property
    def unknown_loops(self) -> int:
        """Loops that count as one turn, since the text does not tell how often they turn."""
        return self._counted[1]

    def executions(self) -> Iterator[tuple[int, str, list[Instruction]]]:
        """(how often it runs, name, instructions) of every computation that runs."""
        for name, times in self._counted[0].items():
            if name in self.computations:
                yield times, name, self.computations[name]

    def callers_first(self, root: str) -> list[str]:
        """`root` and what it calls, directly or not."""
        order, seen = [], set()

        def visit(name: str) -> None:
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for i in self.computations[name]:
                for _, callee in i.callees:
                    visit(callee)
            order.append(name)

        visit(root)
        return order[::-1]

    def trip_count(self, loop: Instruction) -> int | None:
        """Turns of a while loop: what the compiler noted, or the bound that its counter meets."""
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        condition = dict(loop.callees)["condition"]
        inside = [i for name in self.callers_first(condition) for i in self.computations[name]]
        compares = [i for i in inside if i.opcode == "compare"]
        constants = [i.operands[0] for i in inside if i.opcode == "constant" and i.operands]
        bounds = {int(value) for value in constants if value.isdigit()}
        counts_up = len(compares) == 1 and "direction=LT" in compares[0].attributes
        return bounds.pop() if counts_up and len(bounds) == 1 else None


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    open_at = rest.index("(")
    close = _closing(rest, open_at)
    inside, attributes = rest[open_at + 1 : close - 1], rest[close:]
    operands = re.findall(r"%([\w.\-]+)", inside) or [
        part.split()[-1] for part in inside.split(",") if part.strip()
    ]
    return Instruction(name, shape, rest[:open_at], tuple(operands), attributes)


def _closing(text: str, start: int) -> int:
    """Position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def size_of(shape: str, hbm_only: bool = False) -> int:
    """Bytes of an array or of all arrays of a tuple, without the padding of layouts.

    `hbm_only` leaves out scalars and what the compiler placed elsewhere, "S(n)" in its layout.
    """
    total = 0
    for dtype, dims, layout in _SHAPE.findall(shape):
        if hbm_only and ("S(" in layout or not dims):
            continue
        bits = BITS[dtype] if dtype in BITS else int(re.search(r"\d+", dtype)[0])
        total += math.ceil(math.prod(int(d) for d in dims.split(",") if d) * bits / 8)
    return total
