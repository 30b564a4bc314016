"""Dispatch: who is chosen on which platform, what refusals say, and what the package imports."""

import ast
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import attention, dispatch, gated_delta_rule
from pallas_kernels.dispatch import Choice, Implementation, decline, platform_switch, resolve

PACKAGE = pathlib.Path(dispatch.__file__).parent


def accept(spec):
    pass


def refuse(name):
    def check(spec):
        raise decline(name, "needs jax >= 0.11", "0.10.2")

    return check


IMPLEMENTATIONS = {
    "xla": Implementation(check=accept),
    "gpu": Implementation(check=accept, platforms=("cuda",)),
    "tpu": Implementation(check=accept, platforms=("tpu",)),
    "old": Implementation(check=refuse("old"), platforms=("cuda",)),
    "older": Implementation(check=refuse("older")),
}
TABLE = {"cuda": ("old", "gpu", "xla"), "tpu": ("tpu", "xla"), "default": ("xla",)}


@pytest.mark.parametrize(
    ("implementation", "choice"),
    [
        (None, Choice("xla", (("cuda", "gpu"), ("tpu", "tpu")))),
        ("gpu", Choice("gpu")),
        (("old", "gpu", "xla"), Choice("xla", (("cuda", "gpu"),))),
        (("xla", "gpu"), Choice("xla")),
        (("old", "xla"), Choice("xla")),
        (("gpu",), Choice("gpu")),
    ],
)
def test_choice(implementation, choice):
    assert resolve("op", implementation, IMPLEMENTATIONS, TABLE, None) == choice


def test_a_single_name_never_falls_back():
    with pytest.raises(NotImplementedError, match=r"^old: needs jax >= 0.11, got 0.10.2$"):
        resolve("op", "old", IMPLEMENTATIONS, TABLE, None)


def test_all_refusals_are_listed():
    with pytest.raises(ExceptionGroup, match="op: every implementation declined") as caught:
        resolve("op", ("old", "older"), IMPLEMENTATIONS, TABLE, None)
    assert [str(e) for e in caught.value.exceptions] == [
        "old: needs jax >= 0.11, got 0.10.2",
        "older: needs jax >= 0.11, got 0.10.2",
    ]


@pytest.mark.parametrize("implementation", ["cuda", ("xla", "mosaic"), ()])
def test_unknown_names(implementation):
    with pytest.raises(ValueError, match=r"op: implementation expected one or more of .*'xla'"):
        resolve("op", implementation, IMPLEMENTATIONS, TABLE, None)


def test_the_branch_is_the_platform_lowered_for():
    choice = Choice("xla", (("cuda", "gpu"), ("tpu", "tpu")))
    branches = {"xla": jnp.sin, "gpu": jnp.cos, "tpu": jnp.tan}

    def f(x):
        return platform_switch(choice, branches, x)

    assert f(1.0) == jnp.sin(1.0)
    assert jax.jit(f)(1.0) == jnp.sin(1.0)
    assert jax.jit(jax.grad(f))(1.0) == jnp.cos(1.0)
    for platform, op in (("cpu", "sine"), ("cuda", "cosine"), ("tpu", "tan")):
        text = jax.jit(f).trace(1.0).lower(lowering_platforms=(platform,)).as_text()
        assert re.findall(r"stablehlo\.(sine|cosine|tan)\b", text) == [op]


def test_a_new_implementation_is_one_row(monkeypatch):
    """Kernels with forward and backward branch inside the op's derivative; others outside of it."""
    from pallas_kernels.attention import api

    both = dict(api.IMPLEMENTATIONS)
    both["kernel"] = Implementation(
        check=accept,
        forward=both["xla"].forward,
        backward=both["xla"].backward,
        platforms=("cuda",),
    )
    both["own"] = Implementation(check=accept, apply=both["reference"].apply, platforms=("tpu",))
    monkeypatch.setattr(api, "IMPLEMENTATIONS", both)
    q = jnp.cos(jnp.arange(64.0)).reshape(1, 8, 2, 4)

    def grads(implementation):
        return jax.jit(jax.grad(lambda q: attention(q, q, q, implementation=implementation).sum()))

    want = grads("xla")(q)
    for implementation in (("kernel", "xla"), ("own", "xla"), ("own", "kernel", "xla")):
        assert jnp.allclose(grads(implementation)(q), want, atol=1e-6)
        for platform in ("cpu", "cuda", "tpu"):
            grads(implementation).trace(q).lower(lowering_platforms=(platform,))


def test_ops_name_their_implementations():
    q = jnp.ones((1, 8, 2, 16))
    g = jnp.zeros((1, 8, 2))
    with pytest.raises(ValueError, match=r"attention: .*'reference', 'splash', 'xla'\], got"):
        attention(q, q, q, implementation="flash")
    with pytest.raises(ValueError, match=r"gated_delta_rule: .*'triton_gpu', 'xla'\], got"):
        gated_delta_rule(q, q, q, g, g, implementation="triton")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_the_package_stands_alone(path):
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 400
    assert ast.get_docstring(tree)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    allowed = ("jax", "jaxtyping", "numpy", "pallas_kernels")
    if path.stem.startswith("triton_gpu"):
        allowed += ("triton", "jax_triton")
    # splash.py is the door to the one kernel that jax brings.
    closed = ("jax._src", *(("jax.experimental.pallas.ops",) if path.stem != "splash" else ()))
    for name in imported:
        assert name.split(".")[0] in {*allowed, *sys.stdlib_module_names}, name
        assert not name.startswith(closed), name
        assert "default_backend" not in path.read_text()
