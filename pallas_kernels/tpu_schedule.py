"""Compile TPU kernels on a machine without a TPU and read the compiler's final schedule.

    if (reason := unavailable()) is None:
        kernels = static_schedule(function, *shapes, chip="v5e")
        kernels["my_kernel"].cycles             # of one grid step: VLIW bundles, stalls included
        kernels["my_kernel"].utilisation["MXU"]

libtpu, a pip package, holds the whole compiler, and dumps what every bundle of a kernel occupies.
A chip issues one bundle a cycle, so that for straight-line code the bundles are its cycles. What
they do not show: a loop's body counts once (the grid is such a loop: the count is that of one step,
with what comes before and after the loop), as do both sides of a branch, and waiting for HBM is
absent. Nothing is executed.

libtpu reads its options when it is loaded: run this where no TPU backend is in use
(JAX_PLATFORMS=cpu), in a process of its own or at least before anything else loads libtpu.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

__all__ = [
    "CHIPS",
    "MULTIPLY_ADDS",
    "Case",
    "KernelSchedule",
    "libtpu_version",
    "static_schedule",
    "unavailable",
]

# The smallest slice of each chip that the compiler takes; kernels are compiled for one device.
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# Multiply-adds of a core's matrix units in a cycle, bf16: four of 128 x 128, or two of 256 x 256
# that take two rows a cycle.
MULTIPLY_ADDS = {"v5e": 1 << 16, "v5p": 1 << 16, "v6e": 1 << 18, "tpu7x": 1 << 18}

_ENVIRONMENT = {  # the TPU_* describe a host for its start-up checks; the last allows two processes
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_BUNDLES = re.compile(r"\d+-(?P<kernel>.+?)(\.\d+)?-\d+-pre-delay_hlo-static-per-bundle-utiliz.*")
_KERNEL = re.compile(r"%(\S+?)(?:\.\d+)? = [^\n]*custom_call_target=\"tpu_custom_call\"")
_ALLOCATION = re.compile(r"#allocation\w+ \[.*?space=vmem, size = (0x[0-9a-f]+)")


@dataclasses.dataclass(frozen=True)
class KernelSchedule:
    """What one kernel costs on one chip, as scheduled.

    `slots` are the slots used, by unit: MXU (pushes and pops of the matrix unit), XLU (transposes,
    reductions and rotations across lanes), VALU, EUP (exp and the like), VLOAD, VSTORE, ...; FILL
    and SPILL are the loads and stores among them that move spilled registers.
    """

    name: str
    chip: str
    cycles: int
    slots: dict[str, int]
    capacity: dict[str, int]  # slots of a bundle
    vmem_bytes: int  # windows with their second buffers, scratch, spilled registers
    bundles: tuple[tuple[int, ...], ...]  # slots used by each bundle, in the order of `slots`

    @property
    def utilisation(self) -> dict[str, float]:
        """Share of a unit's slots that are used, by unit."""
        return {unit: n / (self.capacity[unit] * self.cycles) for unit, n in self.slots.items()}

    @property
    def spills(self) -> int:
        """Stores of registers that did not fit."""
        return self.slots["VSTORE:SPILL"]

    def loops(self, count: int) -> list[dict]:
        """Cycles and utilisation of the `count` stretches in which products follow each other.

        They are cut where the matrix units pause longest, and reach from their first to their last
        product: a kernel that has a body for each of two cases has two.
        """
        unit = list(self.slots).index("MXU")
        busy = [i for i, bundle in enumerate(self.bundles) if bundle[unit]]
        pauses = sorted(range(1, len(busy)), key=lambda i: busy[i - 1] - busy[i])[: count - 1]
        edges = [0, *sorted(pauses), len(busy)]
        found = []
        for first, after in itertools.pairwise(edges):
            stretch = self.bundles[busy[first] : busy[after - 1] + 1]
            used = {
                name: sum(bundle[i] for bundle in stretch) / (self.capacity[name] * len(stretch))
                for i, name in enumerate(self.slots)
            }
            found.append({"cycles": len(stretch), "utilisation": _rounded(used)})
        return found


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel to be scheduled, and what one of its grid steps does.

    `cycles` of a row are those of one `unit` of work, of which a grid step does `work`; of a kernel
    with `loops` they are those of the first one, since the grid step has all bodies and runs one;
    `multiply_adds`, of one unit too, give the cycles that the matrix unit alone would take.
    """

    name: str
    kernel: str
    function: Callable
    arguments: tuple
    unit: str
    work: float
    multiply_adds: float
    facts: dict
    loops: int = 0  # bodies full of products to be reported apart

    def schedule(self, chip: str) -> "KernelSchedule":
        return static_schedule(self.function, *self.arguments, chip=chip)[self.kernel]

    def row(self, chip: str) -> dict:
        """Compile and report: cycles and floor of a unit of work, use of the chip's units, VMEM."""
        kernel = self.schedule(chip)
        loops = kernel.loops(self.loops) if self.loops else []
        cycles = loops[0]["cycles"] if loops else kernel.cycles
        return {
            "op": self.name,
            "chip": chip,
            "kernel": self.kernel,
            **self.facts,
            "unit": self.unit,
            "cycles": round(cycles / self.work, 3),
            "mxu_floor_cycles": round(self.multiply_adds / MULTIPLY_ADDS[chip], 3),
            "cycles_of_a_grid_step": kernel.cycles,
            "utilisation": _rounded(kernel.utilisation),
            "spill_stores": kernel.spills,
            "vmem_bytes": kernel.vmem_bytes,
            **({"loops": loops} if loops else {}),
        }


def _rounded(shares: dict[str, float]) -> dict[str, float]:
    return {unit: round(x, 3) for unit, x in shares.items()}


def unavailable() -> str | None:
    """Say why nothing can be compiled here; None if it can."""
    if libtpu_version() is None:
        return "libtpu is not installed (pip install 'jax[tpu]')"
    return None


def libtpu_version() -> str | None:
    """Version of the compiler; schedules differ from one to the next."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def static_schedule(function: Callable, *shapes, chip: str) -> dict[str, KernelSchedule]:
    """Compile `function` for one chip and return its Pallas kernels by the `name` they were given.

    Args:
        function: called with the arguments; jitted here.
        shapes: `jax.ShapeDtypeStruct`s, or pytrees of them, one an argument. Small arguments are
            placed in VMEM for the whole program (128 MiB on some chips), and then no windows.
        chip: a key of `CHIPS`.

    Raises what the compiler raises, as when VMEM does not suffice; ValueError if different kernels
    have one name.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip: expected one of {sorted(CHIPS)}, got {chip!r}")
    folder = _dump_folder()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    sharding = SingleDeviceSharding(topology.devices[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    _empty(folder)
    # A jit of its own: a cached executable would dump nothing.
    program = jax.jit(lambda *x: function(*x)).lower(*placed).compile().as_text()
    names = set(_KERNEL.findall(program))  # what else is dumped are fusions of XLA's
    kernels: dict[str, KernelSchedule] = {}
    for path in sorted(folder.iterdir()):
        match = _BUNDLES.fullmatch(path.name)
        if match is None or match["kernel"] not in names:
            continue
        kernel = _read(match["kernel"], chip, path)
        if kernels.setdefault(kernel.name, kernel) != kernel:
            raise ValueError(
                f"{kernel.name}: expected one kernel of this name, got two that differ"
            )
    _empty(folder)
    if not kernels:
        raise RuntimeError(
            f"no schedule of a kernel from libtpu {libtpu_version()} for {chip}: expected a Pallas "
            "kernel in the function, and libtpu to be loaded here first (JAX_PLATFORMS=cpu)"
        )
    return kernels


@functools.cache
def _dump_folder() -> pathlib.Path:
    """Make the folder that libtpu writes to; it must be named before libtpu is loaded."""
    folder = tempfile.TemporaryDirectory(prefix="tpu_schedule_")
    _dump_folder.keep = folder  # removed when the process ends
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Of some 70 passes only those around the delays: writing all takes longer than compiling.
    options = f"--xla_jf_dump_to={folder.name} --xla_jf_dump_llo_text=true"
    options += " --xla_jf_dump_llo_pass_label_regex=.*delay.*"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {options}".strip()
    return pathlib.Path(folder.name)


def _empty(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _read(name: str, chip: str, path: pathlib.Path) -> KernelSchedule:
    """Read one utilisation file: names of units, slots a bundle has, then a row a bundle."""
    lines = path.read_text().splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("MXU"))
    units = [unit.strip() for unit in lines[header].split(",")]
    capacity = [int(n) for n in lines[header + 1].split()]
    rows = [line.split() for line in lines[header + 2 :] if line[:1].isdigit()]
    used = [sum(int(row[i]) for row in rows) for i in range(len(units))]
    stamp = path.name.split("-")[0]
    listing = next(path.parent.glob(f"{stamp}-{name}*-post-delay-converter.txt"))
    sizes = (int(size, 16) for size in _ALLOCATION.findall(listing.read_text()))
    return KernelSchedule(
        name=name,
        chip=chip,
        cycles=len(rows),
        slots=dict(zip(units, used, strict=True)),
        capacity=dict(zip(units, capacity, strict=True)),
        vmem_bytes=sum(sizes),
        bundles=tuple(tuple(map(int, row[: len(units)])) for row in rows),
    )
