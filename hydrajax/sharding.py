"""One table from logical axes to mesh axes; everything that is placed is placed through it.

FA and LA heads are different logical axes: their numbers differ per layer, and so does what
divides them. An axis that does not divide its mesh axis is replicated, never padded silently;
`replicated()` lists those, `layout.head_split()` says what it costs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hydrajax.config import CONV_WIDTH, MeshConfig
from hydrajax.typing import Array, UserError

Axes = tuple[str | None, ...]

MESH_AXES = ("data", "fsdp", "context", "model")
HOST = "pinned_host"  # memory of the host that its devices read and write

# logical axis -> mesh axes. Activations are split over rows and over the tokens of a row, weights
# along the width over fsdp, and over context too: else devices that share rows would hold copies.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),
    "width": ("fsdp", "context"),
    "mlp": ("model",),
    "vocab": ("model",),
    "fa_heads": ("model",),
    "fa_kv_heads": ("model",),
    "la_heads": ("model",),
    "la_kv_heads": ("model",),
    "heads": ("model",),
}


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over all devices, or those given; the axis given as -1 takes what the others leave."""
    given = cfg.data, cfg.fsdp, cfg.context, cfg.model
    sizes = list(given)
    devices = jax.devices() if devices is None else devices
    count, processes = len(devices), len({device.process_index for device in devices})
    fixed = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes and count % fixed == 0:
        sizes[sizes.index(-1)] = count // fixed
    if int(np.prod(sizes)) != count or -1 in sizes:
        asked = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, given, strict=True))
        raise UserError(f"mesh {asked} does not fit {count} devices.")
    local, together = count // processes, sizes[2] * sizes[3]
    if processes > 1 and local % together:
        raise UserError(
            f"mesh.context={sizes[2]} x mesh.model={sizes[3]} spans processes of {local} devices, "
            "which would then read different rows; choose a product that divides that."
        )
    types = (AxisType.Auto,) * len(sizes)
    try:
        mesh = jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # sizes that are no products of the torus' own
        placed = create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
        mesh = Mesh(placed, MESH_AXES, axis_types=types)
    if _reads_rows_apart(mesh):
        return mesh
    return Mesh(_process_by_process(sizes, processes, devices), MESH_AXES, axis_types=types)


def _reads_rows_apart(mesh: Mesh) -> bool:
    """Whether the devices that share rows are of one process each.

    On a TPU torus axes follow the links, and hosts are squares of it: they may be cut.
    """
    of = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    of = of.reshape(*of.shape[:2], -1)
    return bool((of == of[:, :, :1]).all())


def _process_by_process(sizes: Sequence[int], processes: int, devices: Sequence) -> np.ndarray:
    """Devices of a mesh whose `context` and `model` stay inside of processes."""
    data, fsdp, *inner = sizes
    groups = len(devices) // processes // int(np.prod(inner))  # that share rows, in a process
    own_fsdp = math.gcd(groups, fsdp)  # then the rest divides data
    own = groups // own_fsdp, own_fsdp
    return create_hybrid_device_mesh(
        (*own, *inner),
        (data // own[0], fsdp // own[1], 1, 1),
        devices,
        process_is_granule=True,
        allow_split_physical_axes=True,
    )


def one_device() -> Mesh:
    """Mesh of the default device alone, for commands that use no other.

    Under it kernels know, while they are traced, which kind of device they are for.
    """
    sizes, types = (1,) * len(MESH_AXES), (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, types, devices=jax.devices()[:1])


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh_shape: dict[str, int]) -> P:
    """PartitionSpec of an array with these logical axes; drops axes that do not divide.

    Raises ValueError when two dimensions claim one mesh axis.
    """
    out, used = [], set()
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = RULES[name] if name else ()
        parts = int(np.prod([mesh_shape[a] for a in mesh_axes])) if mesh_axes else 1
        if parts == 1 or size % parts:
            out.append(None)
            continue
        if used & set(mesh_axes):
            raise ValueError(f"mesh axes {mesh_axes} are claimed twice by {axes}")
        used |= set(mesh_axes)
        out.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0])
    return P(*out)


def param_shardings(
    mesh: Mesh, axes: dict[str, tuple[str | None, ...]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, NamedSharding]:
    """Sharding of every parameter path."""
    return {
        path: NamedSharding(mesh, spec(axes[path], shapes[path], dict(mesh.shape)))
        for path in shapes
    }


def in_host_memory(sharding: NamedSharding, knob: str) -> NamedSharding:
    """The same parts, each in the memory of its device's host.

    UserError where there is none, which names the `knob` that asks for it.
    """
    try:
        return sharding.with_memory_kind(HOST)
    except ValueError as e:
        kind = device_kind(sharding.mesh)
        raise UserError(
            f"{knob} needs memory of kind {HOST!r} beside the devices, {kind} has none ({e})."
        ) from e


def replicated(
    mesh: Mesh, axes: dict[str, tuple[str | None, ...]], shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    """Paths with a head axis that does not divide `model` and is therefore kept whole."""
    size = mesh.shape["model"]
    return [
        path
        for path, names in axes.items()
        if any(
            n and n.endswith("heads") and d % size for n, d in zip(names, shapes[path], strict=True)
        )
    ]


def constrain(x: Array, *names: str | None) -> Array:
    """Pin an activation to the mesh in use; without a mesh, or on one device, it is left alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, dict(mesh.shape)))


@dataclass(frozen=True)
class Split:
    """How the mesh in use splits an array's leading axes, for code that devices run on their own.

    `parts` is what `spec` says; without a mesh, or where nothing is split, there is one share.
    """

    parts: P
    sizes: tuple[int, ...]  # shares along each axis
    manual: frozenset[str] = frozenset()  # the mesh axes that `run` takes from the compiler

    def share(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a device has of it."""
        return tuple(n // size for n, size in zip(shape, self.sizes, strict=True))

    def sum(self, x: Array) -> Array:
        """Over the shares; inside of `run`."""
        return jax.lax.psum(x, _names(self.parts)) if self.manual else x

    def run(self, own: Callable, outputs) -> Callable:
        """`own(whole, shares)` on all of `whole` and each device's share of the arrays `shares`."""
        if not self.manual:
            return own
        run = jax.shard_map(
            own,
            in_specs=(P(), self.parts),
            out_specs=outputs,
            axis_names=self.manual,
            check_vma=False,
        )
        return jax.jit(run)  # axes that stay the compiler's need one


def _names(parts: P) -> tuple[str, ...]:
    """The mesh axes in a spec."""
    groups = (part if isinstance(part, tuple) else (part,) for part in parts if part)
    return tuple(name for group in groups for name in group)


def split_of(axes: Axes, shape: tuple[int, ...]) -> Split:
    """The split of an array whose axes, the leading ones of another, have these names."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return Split(P(), (1,) * len(shape))
    sizes = dict(mesh.shape)
    parts = spec(axes, shape, sizes)
    shares = [
        math.prod(sizes[name] for name in RULES[axis]) if part else 1
        for axis, part in zip(axes, parts, strict=True)
    ]
    if math.prod(shares) == 1:
        return Split(P(), (1,) * len(shape))
    alone = {name for name, size in sizes.items() if size == 1}
    return Split(parts, tuple(shares), frozenset(alone | set(_names(parts))))


def devices_of(axis: str) -> int:
    """Over how many devices the mesh in use would split a logical axis."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(name, 1) for name in RULES[axis])


def per_device(op: Callable, axes_in: dict[str, Axes], axes_out: tuple[Axes, ...]) -> Callable:
    """Run `op(**arrays)` on each device's own part of the arrays, gradients included.

    XLA cannot split the call of a kernel, so it is told: the named axes are split as `spec` says,
    in all arrays or in none, and outputs like the inputs. `op` must not mix what it is split over,
    tokens apart: where those are split it is given `axis_name`, the mesh axis that joins them.
    Without a mesh, or on one device, it is called as it is.
    """

    def run(**arrays: Array):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return op(**arrays)
        sizes = dict(mesh.shape)
        kept = {  # an axis that does not divide in every array
            axis
            for name, x in arrays.items()
            for axis, part in zip(axes_in[name], spec(axes_in[name], x.shape, sizes), strict=True)
            if part is None
        }
        axes = {name: tuple(a if a not in kept else None for a in axes_in[name]) for name in arrays}
        specs = {name: spec(axes[name], x.shape, sizes) for name, x in arrays.items()}
        split = {
            axis: part
            for name, parts in specs.items()
            for axis, part in zip(axes_in[name], parts, strict=True)
        }
        outputs = tuple(P(*(split[axis] if axis else None for axis in axes)) for axes in axes_out)
        joined = {"axis_name": split["tokens"]} if split.get("tokens") else {}
        # A kernel does not say over which mesh axes its outputs vary; the specs do.
        return jax.shard_map(
            lambda arrays: op(**arrays, **joined),
            in_specs=(specs,),
            out_specs=outputs,
            check_vma=False,
        )(arrays)

    return run


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Array]:
    """Local rows of every process become global arrays, split as `batch_sharding` says."""
    rows, tokens = batch["tokens"].shape
    rows *= jax.process_count()
    check_batch(mesh, rows, tokens)
    sharding = batch_sharding(mesh)
    return {
        k: jax.make_array_from_process_local_data(sharding, v, (rows, *v.shape[1:]))
        for k, v in batch.items()
    }


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`, the tokens of a row over `context`."""
    return NamedSharding(mesh, P(RULES["batch"], *RULES["tokens"]))


def check_batch(mesh: Mesh, rows: int, tokens: int, accum: int = 1) -> None:
    """Raise UserError unless rows of so many tokens, and those of each of `accum` micro-batches,
    can be split over the mesh."""
    context = mesh.shape["context"]
    if tokens % context:
        raise UserError(
            f"rows of {tokens} tokens cannot be split over mesh.context={context}; set "
            f"data.seq_len to a multiple of {context}, best of {context} x the chunk of the delta "
            "rule (64, on TPU 128), or choose another mesh.context."
        )
    if context > 1 and tokens // context < CONV_WIDTH - 1:
        raise UserError(
            f"rows of {tokens} tokens are too short for mesh.context={context}: a device needs "
            f"{CONV_WIDTH - 1} tokens, what a convolution looks back; raise data.seq_len."
        )
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (parts * accum):
        cut = f" in train.accum={accum} micro-batches" if accum > 1 else ""
        lower = "lower train.accum, " if accum > 1 else ""
        raise UserError(
            f"{rows} rows{cut} cannot be split over mesh data x fsdp = {parts}; {lower}set "
            f"data.rows to a multiple of {parts * accum}, or give devices to mesh.context or "
            "mesh.model."
        )


def device_kind(mesh: Mesh) -> str:
    """Kind of the mesh's devices, e.g. "NVIDIA H100 80GB HBM3", for tables and reports."""
    return mesh.devices.flat[0].device_kind
