"""Choose an implementation for each platform and branch between them while lowering.

An op owns a table, platform -> names in order of preference. `check(spec)` of an implementation
looks at static facts alone and declines with `NotImplementedError`, "<name>: <reason>, got
<value>". The choice is made for every platform at once and the branch is taken by
`jax.lax.platform_dependent`: code that is compiled ahead of time runs elsewhere than where it is
traced, so the host's own backend says nothing.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

__all__ = ["Choice", "Implementation", "decline", "device_kind", "platform_switch", "resolve"]

Table = Mapping[str, tuple[str, ...]]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Either `forward` and `backward`, which the op joins in its `custom_vjp` and whose residuals are
    laid out by the op, or `apply`, which JAX differentiates. `platforms` limits where the tables
    and tuples may place it (None: anywhere), and `check_device` declines kinds of devices there
    (None: none); an explicit name is taken at its word.
    """

    check: Callable[[Any], None]
    check_device: Callable[[str | None], None] | None = None
    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None
    apply: Callable[..., Any] | None = None
    platforms: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """The accepted name of each platform; `others` holds only those that differ from `default`."""

    default: str
    others: tuple[tuple[str, str], ...] = ()
    op: str = dataclasses.field(default="", compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.default, *(name for _, name in self.others))


def device_kind() -> str | None:
    """Kind of the devices of the mesh in use, such as "NVIDIA H100 80GB HBM3"; None without one.

    It is the only device known while tracing: what is lowered here may run elsewhere.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.device_kind


def decline(name: str, reason: str, value: object) -> NotImplementedError:
    """Build the refusal that `check` raises."""
    return NotImplementedError(f"{name}: {reason}, got {value}")


def resolve(
    op: str,
    implementation: str | tuple[str, ...] | None,
    implementations: Mapping[str, Implementation],
    table: Table,
    spec: Any,
) -> Choice:
    """Choose for every platform: None walks `table`, a tuple itself, a name never falls back."""
    if isinstance(implementation, str):
        _known(op, (implementation,), implementations)
        implementations[implementation].check(spec)
        return Choice(implementation, op=op)
    if implementation is not None:
        _known(op, implementation, implementations)
        table = _table_of(implementation, implementations)
    refusals: dict[str, NotImplementedError] = {}
    accepted = {}
    for platform, names in table.items():
        name = _first_accepted(names, implementations, spec, refusals)
        if name is not None:
            accepted[platform] = name
    if not accepted:
        raise ExceptionGroup(f"{op}: every implementation declined", list(refusals.values()))
    # A platform without a candidate shares the one of another: if it is ever lowered there, the
    # implementation itself names the platform it lacks.
    default = accepted.get("default", next(iter(accepted.values())))
    others = tuple((p, n) for p, n in accepted.items() if p != "default" and n != default)
    choice = Choice(default, others, op)
    _log_once(op, choice, tuple(map(str, refusals.values())))
    return choice


def platform_switch(choice: Choice, branches: Mapping[str, Callable], *operands):
    """Call the branch of the platform being lowered for; with one name there is no branching.

    Compiled instructions carry "<op>=<name>", which tells what a program really holds.
    """

    def scoped(name: str) -> Callable:
        return (
            jax.named_scope(f"{choice.op}={name}")(branches[name]) if choice.op else branches[name]
        )

    if not choice.others:
        return scoped(choice.default)(*operands)
    named = {platform: scoped(name) for platform, name in choice.others}
    return jax.lax.platform_dependent(*operands, default=scoped(choice.default), **named)


def _known(op: str, names: tuple[str, ...], implementations: Mapping[str, Implementation]) -> None:
    unknown = [name for name in names if name not in implementations]
    if unknown or not names:
        raise ValueError(
            f"{op}: implementation expected one or more of {sorted(implementations)}, got {names}"
        )


def _table_of(names: tuple[str, ...], implementations: Mapping[str, Implementation]) -> Table:
    """Spread a user's order over the platforms that its members are made for."""
    platforms = {p for name in names for p in implementations[name].platforms or ()}

    def fits(name: str, platform: str) -> bool:
        limits = implementations[name].platforms
        return limits is None or platform in limits

    return {
        platform: tuple(name for name in names if fits(name, platform))
        for platform in (*sorted(platforms), "default")
    }


def _first_accepted(names, implementations, spec, refusals) -> str | None:
    for name in names:
        implementation = implementations[name]
        try:
            # The device first: `check` may import what only one kind of device has a use for.
            if implementation.check_device is not None:
                implementation.check_device(device_kind())
            implementation.check(spec)
        except NotImplementedError as refusal:
            refusals[name] = refusal
        else:
            return name
    return None


@functools.lru_cache(maxsize=1024)
def _log_once(op: str, choice: Choice, refusals: tuple[str, ...]) -> None:
    declined = f"; declined: {'; '.join(refusals)}" if refusals else ""
    others = "".join(f", {platform}={name}" for platform, name in choice.others)
    _log.info("%s: %s%s%s", op, choice.default, others, declined)
