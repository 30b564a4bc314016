"""Flat dicts of arrays: made from any pytree, described, compared and hashed."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.typing import UserError

# Shapes and dtype names of a tree: path -> (shape, dtype).
Arrays = dict[str, tuple[tuple[int, ...], str]]

HASH_THREADS = 8  # hashing releases the GIL; beyond this memory or disk is the limit


def flatten(tree: Any) -> dict[str, Any]:
    """One flat dict of any pytree: "0.mu.layers.0.attn.fa.w_q" -> leaf, in leaf order."""
    leaves = jax.tree.leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree share one path")
    return flat


def describe(tree: Mapping[str, Any]) -> Arrays:
    return {key: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for key, leaf in tree.items()}


def size(leaf: Any) -> int:
    return int(np.prod(leaf.shape))


def without_empty(trees: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Leave out arrays without elements and trees without arrays: Orbax refuses both."""
    full = {name: {k: v for k, v in tree.items() if size(v)} for name, tree in trees.items()}
    return {name: tree for name, tree in full.items() if tree}


def abstract_leaf(shape: tuple[int, ...], dtype: str, target: Any) -> Any:
    """What Orbax is to make of a stored array: jax where the target has a sharding, else numpy."""
    sharding = getattr(target, "sharding", None)
    if sharding is None:
        return np.broadcast_to(np.zeros((), jnp.dtype(dtype)), shape)  # takes no memory
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def empty_leaf(leaf: Any) -> Any:
    zeros = np.zeros(leaf.shape, leaf.dtype)
    return zeros if isinstance(leaf, np.ndarray) else jax.device_put(zeros, leaf.sharding)


def compare(what: str, want: Arrays, found: Arrays, most: int = 20) -> None:
    """Refuse to restore into another shape, dtype or set of arrays; prints the difference."""

    def show(entry: tuple[tuple[int, ...], str] | None) -> str:
        return f"{entry[1]}[{','.join(map(str, entry[0]))}]" if entry else "nothing"

    paths = [key for key in {**want, **found} if want.get(key) != found.get(key)]
    if paths:
        lines = [f"  {p}: expected {show(want.get(p))}, found {show(found.get(p))}" for p in paths]
        more = [f"  ... and {len(lines) - most} more"] if len(lines) > most else []
        raise UserError(
            f"{what} does not fit in {len(paths)} arrays; use the config and head plan that wrote "
            "them.\n" + "\n".join(lines[:most] + more)
        )


def hash_params(params: Mapping[str, Any]) -> str:
    """sha256 of paths, dtypes, shapes and bytes: equal for equal weights, wherever they lie."""

    def line(path: str) -> str:
        value = np.ascontiguousarray(params[path])
        digest = hashlib.sha256(value.reshape(-1).view(np.uint8).data).hexdigest()
        return f"{path} {value.dtype} {value.shape} {digest}\n"

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return hashlib.sha256("".join(pool.map(line, sorted(params))).encode()).hexdigest()
