"""The Hopper decode step without a GPU: interpreted against the token loop, compiled, declined."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import gated_delta_step
from pallas_kernels.gated_delta_rule import mosaic_gpu_step
from tests.helpers import assert_close
from tests.kernels import h100
from tests.kernels.mosaic_interpreter import interpreted

NEWEST = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason=f"needs jax >= 0.11, found {jax.__version__}"
)


def draw(B=2, K=1, R=2, H=64, E=64, dtype=jnp.bfloat16):
    """q, k, v, g, beta and the state of one token."""
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(B, K, H)) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    wide = (jnp.asarray(x, dtype) for x in (q, k, rng.normal(size=(B, R, E))))
    g = -rng.choice([0.0, 0.3, 40.0], (B, R))
    rest = g, rng.choice([0.0, 0.7, 1.0], (B, R)), rng.normal(size=(B, R, H, E))
    return *wide, *(jnp.asarray(x, jnp.float32) for x in rest)


@NEWEST
@pytest.mark.parametrize(
    "case, rel",
    [({}, 2e-3), ({"B": 1, "R": 1, "H": 128, "E": 192, "dtype": jnp.float32}, 1e-6)],
    ids=["grouped_bfloat16", "wide_float32"],
)
def test_interpreted(case, rel, capsys):
    """Two tokens equal those of the loop in float64; nothing races, in place though it is."""
    token = draw(**case)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.float64(x)) for x in token]
        step = functools.partial(gated_delta_step, implementation="reference")
        _, state = step(*exact)
        want = step(*exact[:-1], state)
    with interpreted():
        step = functools.partial(gated_delta_step, implementation="mosaic_gpu")
        _, state = step(*token)
        got = step(*token[:-1], state)
    assert "RACE DETECTED" not in capsys.readouterr().out
    assert_close("o", want[0], got[0], rel)
    assert_close("state", want[1], got[1], 1e-6)


@NEWEST
@pytest.mark.aot_gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_compiled_for_an_h100(dim, monkeypatch, capfd):
    """It does not spill, three blocks share a processor, and a donated state is not copied."""
    token = draw(B=4, R=3, H=dim, E=dim)
    step = functools.partial(gated_delta_step, implementation="mosaic_gpu")
    found = h100.resources(step, token, monkeypatch, capfd)
    ((spilled, shared),) = found.values()
    assert found.keys() == {"gdn_step"} and spilled == 0 and 3 * shared <= h100.SHARED_MEMORY
    compiled = h100.compiled(step, token, donate_argnums=5)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == token[-1].nbytes
    assert memory.temp_size_in_bytes < token[-1].nbytes
    assert "copy(" not in compiled.as_text()


@NEWEST
@pytest.mark.parametrize("kind, taken", [("NVIDIA H200", True), ("NVIDIA B200", False)])
def test_the_device_of_the_mesh_decides(kind, taken):
    mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice(kind, 132, "gpu"))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw()]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(gated_delta_step).trace(*shapes)
    assert ("gdn_step" in str(traced.jaxpr)) == taken
    assert "gdn_step" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@NEWEST
@pytest.mark.parametrize("dims, words", [((32, 64), r"got \(32, 64\)"), ((64, 96), r"\(64, 96\)")])
def test_declines(dims, words):
    with pytest.raises(NotImplementedError, match=f"^mosaic_gpu: needs a key dim in .*{words}$"):
        gated_delta_step(*draw(H=dims[0], E=dims[1]), implementation="mosaic_gpu")


def test_declines_an_old_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(NotImplementedError, match=r"^mosaic_gpu: needs jax >= 0.11 "):
        mosaic_gpu_step.check(None)


@NEWEST
def test_a_step_has_a_derivative():
    """That of `xla`: where the kernel is chosen, gradients must not be lost."""
    q, v, g = jnp.ones((2, 1, 64)), jnp.ones((2, 2, 64)), jnp.zeros((2, 2))
    state = jnp.ones((2, 2, 64, 64))

    def loss(q):
        o, new = gated_delta_step(q, q, v, g, g + 1, state, implementation="mosaic_gpu")
        return jnp.sum(o) + jnp.sum(new)

    assert jax.eval_shape(jax.grad(loss), q).shape == q.shape
