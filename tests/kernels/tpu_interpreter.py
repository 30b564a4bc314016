"""Run TPU kernels on the CPU as jax simulates them, memory, copies and semaphores included."""

import contextlib

from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def interpreted(capsys):
    """Interpret what is traced inside: fresh memory is NaN, wrong addresses raise, races fail."""
    capsys.readouterr()
    mode = pltpu.InterpretParams(
        uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True
    )
    with pltpu.force_tpu_interpret_mode(mode):
        yield
    said = capsys.readouterr().out
    assert "RACE DETECTED" not in said, said
