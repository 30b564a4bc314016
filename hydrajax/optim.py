"""AdamW over the flat dict of trainable parameters: schedule, decay mask, per-path rates."""

import re

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hydrajax.config import OptimConfig
from hydrajax.sharding import in_host_memory
from hydrajax.typing import Array, Params, UserError

# Time constants of the recurrence and anything that is not a matrix: decay would move what they
# mean (fla exempts A_log and dt_bias for the same reason).
NO_DECAY = re.compile(r"(norm|scale|gamma|a_log|bias|conv_[qkv]|\.b_|\.w_fa$|\.w_la$)")


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to `end_lr`, or constant."""
    warmup = min(cfg.warmup_steps, max(steps - 1, 0))
    if cfg.schedule == "constant":
        after = optax.constant_schedule(cfg.peak_lr)
    else:
        after = optax.cosine_decay_schedule(
            cfg.peak_lr, max(steps - warmup, 1), alpha=cfg.end_lr / cfg.peak_lr
        )
    return optax.join_schedules([optax.linear_schedule(0.0, cfg.peak_lr, warmup), after], [warmup])


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """clip → Adam → decay → per-path rate → schedule; works on any subset of the parameters.

    `update(..., finite=False)`, an array too, leaves the state as it was.
    """
    adam = _kept(optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps))
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        _in_turns(adam, cfg.offload),
        optax.add_decayed_weights(cfg.weight_decay, mask=_decays),
        _scale_groups(cfg.lr_groups),
        _kept(optax.scale_by_learning_rate(schedule(cfg, steps))),
    )


def _kept(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx`, its state as it was where the gradients are not `finite`."""

    def update(updates, state, params=None, *, finite=True, **_):
        updates, new = tx.update(updates, state, params)
        return updates, jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _in_turns(
    adam: optax.GradientTransformationExtraArgs, offload: bool
) -> optax.GradientTransformationExtraArgs:
    """`adam` of one parameter after the other; `offload`: its moments fetched from host memory.

    Left to itself a compiler may fetch all moments before it uses the first. `finite`, which every
    turn needs and which waits for all gradients, is handed from one to the next through barriers: a
    turn's moments are fetched when those of the turn before are back. Without offload the same is
    written in the same order, so that compilers find the same arithmetic.
    """
    fetch, put_back = (_fetch, _put_back) if offload else (lambda *leaves: leaves,) * 2

    def update(grads, state, params=None, *, finite=True, **_):
        turn, updates, moments = jnp.asarray(finite), {}, {}
        for path, grad in grads.items():
            turn, mu, nu = fetch(turn, state.mu[path], state.nu[path])
            held = state._replace(mu={path: mu}, nu={path: nu})
            new, after = adam.update({path: grad}, held, finite=turn)
            updates |= new
            turn, *moments[path] = put_back(turn, after.mu[path], after.nu[path])
        mu, nu = ({path: pair[i] for path, pair in moments.items()} for i in (0, 1))
        return updates, after._replace(mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _fetch(turn: Array, *moments: Array) -> tuple[Array, ...]:
    turn, *moments = jax.lax.optimization_barrier((turn, *moments))
    return turn, *jax.device_put(moments, jax.memory.Space.Device)


def _put_back(turn: Array, *moments: Array) -> tuple[Array, ...]:
    return jax.lax.optimization_barrier((turn, *jax.device_put(moments, jax.memory.Space.Host)))


def _decays(params: Params) -> dict[str, bool]:
    return {path: not NO_DECAY.search(path) for path in params}


def _scale_groups(groups: tuple[str, ...]) -> optax.GradientTransformation:
    """Multiply a path's update by the factor of the first group whose regex is found in it."""
    rules = []
    for group in groups:
        pattern, _, factor = group.rpartition("=")
        try:
            rules.append((re.compile(pattern), float(factor)))
        except (re.error, ValueError) as e:
            raise UserError(f"optim.lr_groups entry {group!r} is not regex=multiplier: {e}.") from e

    def factor_of(path: str) -> float:
        return next((f for pattern, f in rules if pattern.search(path)), 1.0)

    def update(updates: Params, params: Params | None = None) -> Params:
        return {path: u * factor_of(path) for path, u in updates.items()}

    return optax.stateless(update)


def state_shardings(
    tx: optax.GradientTransformation,
    params: Params,
    shardings: dict[str, NamedSharding],
    mesh: Mesh,
    *,
    offload: bool = False,
):
    """Moments live where their parameters live, or `offload` in the memory of that device's host;
    counters on every device."""
    abstract = jax.eval_shape(tx.init, params)
    return optax.tree_map_params(
        tx,
        lambda _, sharding: in_host_memory(sharding, "optim.offload=True") if offload else sharding,
        abstract,
        {path: shardings[path] for path in params},
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
