"""A model under test, and the walk over its logits that never holds [B, T, V]."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hydrajax.config import ModelConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.model import Model, bind
from hydrajax.typing import Array, Float, Params


@dataclass(frozen=True)
class Subject:
    """A named model; the name stands in tables, keys and file names."""

    name: str
    graphdef: nnx.GraphDef
    params: Params

    @cached_property
    def cfg(self) -> ModelConfig:
        return self._model.cfg

    @cached_property
    def plan(self) -> HeadPlan:
        return self._model.plan

    def hidden(self, tokens, segment_ids, positions) -> Float[Array, "B T D"]:
        """Hidden states; one program of the whole model serves every measurement of a shape."""
        return _hidden(self.graphdef, self.params, tokens, segment_ids, positions)

    @property
    def _model(self) -> Model:
        return bind(self.graphdef, self.params)


@partial(jax.jit, static_argnames="graphdef")
def _hidden(graphdef, params, tokens, segment_ids, positions) -> Float[Array, "B T D"]:
    model = bind(graphdef, params)
    return model.hidden(tokens, segment_ids=segment_ids, positions=positions)[0]


def zero_la(subject: Subject) -> Subject:
    """The same model with its LA heads cut off from W_O: what it knows without them."""
    params = dict(subject.params)
    for l in range(subject.plan.num_layers):
        heads = list(subject.plan.layer(l).la)
        path = f"layers.{l}.attn.w_o"
        params[path] = jnp.asarray(params[path]).at[jnp.array(heads, jnp.int32)].set(0)
    return replace(subject, name=f"{subject.name} (LA zeroed)", params=params)


def over_chunks(fn: Callable[..., Any], arrays: tuple[Array, ...], chunk: int) -> Any:
    """fn of pieces of the token axis, joined again; `chunk` positions of all rows at a time."""
    batch, length = arrays[0].shape[:2]
    piece = max(1, min(length, chunk // batch))
    pieces = -(-length // piece)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * piece - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, pieces, piece, *x.shape[2:]), 1, 0)

    def join(y: Array) -> Array:
        return jnp.moveaxis(y, 0, 1).reshape(batch, pieces * piece, *y.shape[3:])[:, :length]

    out = jax.lax.map(lambda xs: fn(*xs), tuple(split(x) for x in arrays))
    return jax.tree.map(join, out)
