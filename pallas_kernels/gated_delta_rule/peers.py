"""Other people's gated delta rule on CUDA, to measure ours against: fla and FlashQLA through torch.

Both are imported when asked for, and say why where they cannot be. Which kernels run is theirs to
choose, so a peer also says what it ran:

fla       its own Triton kernels alone. It passes calls on to FlashQLA and TileLang where those are
          installed, which FLA_DISABLE_BACKEND_DISPATCH=1 turns off. On Hopper it refuses its gated
          backward with Triton 3.4 to 3.7.0, whose code is wrong there: the refusal is switched off
          for timing, which the note says, and the measured error tells how wrong it is.
flashqla  FlashQLA's TileLang kernels. They skip what decays below a threshold, so that strong gates
          are faster than slow ones where heads are few.
"""

import dataclasses
import importlib
import importlib.metadata
import os
from collections.abc import Callable

from pallas_kernels.gated_delta_rule.workload import ARGUMENTS
from pallas_kernels.timing import Program

__all__ = ["PEERS", "Peer", "kernels", "load"]

MOST_KERNELS = 16  # of a call that are named


@dataclasses.dataclass(frozen=True)
class Peer:
    """`rule(q, k, v, g, beta)` of torch tensors returns (o, last state)."""

    name: str
    version: str
    rule: Callable
    note: str = ""

    def programs(self, arrays: dict) -> dict[str, Program]:
        """Forward without and with what the backward needs, and both directions."""
        torch = importlib.import_module("torch")
        # The same memory: torch reads jax arrays on a GPU where they are.
        tensors = {name: torch.from_dlpack(arrays[name]) for name in (*ARGUMENTS, "do")}
        do = tensors.pop("do")
        leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}

        def plain():
            with torch.no_grad():
                return self.rule(**tensors)

        def both():
            o, _ = self.rule(**leaves)
            return o, torch.autograd.grad(o, list(leaves.values()), do)

        def wait(_):
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return {
            "fwd": Program(plain, wait),
            "fwd_residuals": Program(lambda: self.rule(**leaves), wait),
            "fwdbwd": Program(both, wait),
        }

    def results(self, arrays: dict):
        """o and the gradients of q, k, v, g and beta as numpy arrays."""
        o, gradients = self.programs(arrays)["fwdbwd"].call()
        o, *gradients = (x.detach().double().cpu().numpy() for x in (o, *gradients))
        return o, gradients


def kernels(program: Program) -> dict[str, float]:
    """Milliseconds of the kernels that a call runs, the longest first, by torch's profiler.

    It sees whatever this process runs on the device, ours too.
    """
    torch = importlib.import_module("torch")
    program.wait(program.call())
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        program.wait(program.call())
    averages = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)
    return {e.key[:80]: round(e.device_time_total / 1e3, 4) for e in averages[:MOST_KERNELS]}


def load(name: str) -> Peer:
    """Import a peer, or raise ImportError with the reason it cannot run here."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise ImportError(f"{name}: torch {torch.__version__} finds no CUDA device")
    return PEERS[name]()


def _fla() -> Peer:
    os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"  # read when fla is imported
    rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    note = "its own Triton kernels, no dispatch"
    outputs = importlib.import_module("fla.ops.common.chunk_o")
    guarded = (
        getattr(outputs, "IS_NVIDIA_HOPPER", False)
        and getattr(outputs, "TRITON_ABOVE_3_4_0", False)
        and not getattr(outputs, "TRITON_ABOVE_3_7_1", False)
    )
    if guarded:
        outputs.IS_NVIDIA_HOPPER = False
        note += (
            "; its refusal of the gated backward with Triton"
            f" {importlib.metadata.version('triton')} on Hopper switched off: a time to compare"
            " with, gradients may be wrong"
        )
    version = importlib.metadata.version("fla-core")
    return Peer("fla", version, _with_state(rule), note)


def _flashqla() -> Peer:
    rule = importlib.import_module("flash_qla").chunk_gated_delta_rule
    version = importlib.metadata.version("flash_qla")
    return Peer("flashqla", version, _with_state(rule), "its TileLang kernels")


def _with_state(rule: Callable) -> Callable:
    def run(q, k, v, g, beta):
        return rule(q, k, v, g, beta, output_final_state=True)

    return run


PEERS = {"fla": _fla, "flashqla": _flashqla}
