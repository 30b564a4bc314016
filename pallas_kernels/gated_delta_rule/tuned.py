"""Into how many segments Hopper's kernels cut a sequence: what was measured best on a device.

`python -m pallas_kernels.tune` writes pallas_kernels/tuned/<device>.json, one entry for every
number of recurrences, chunks and dims that it measured. Elsewhere the model of `count_segments`
decides.
"""

import functools
import json
import re
from pathlib import Path

import jax

from pallas_kernels.dispatch import device_kind

FOLDER = Path(__file__).parents[1] / "tuned"
PASSES = ("forward", "backward")


def segments(of: str, heads: int, chunks: int, dim: int) -> int | None:
    """Segments of `of`, a pass, that were best on the devices of the mesh in use; None if unknown.

    Without a mesh it is the first device of the process.
    """
    kind = device_kind() or jax.devices()[0].device_kind
    return _table(path_of(kind, FOLDER)).get(key(heads, chunks, dim), {}).get(of)


def key(heads: int, chunks: int, dim: int) -> str:
    """An entry's name: `heads` are rows times value heads."""
    return f"{heads} recurrences of {chunks} chunks of {dim} dims"


def path_of(kind: str, folder: Path) -> Path:
    """The file of a kind of device."""
    return folder / (re.sub(r"\W+", "_", kind).lower() + ".json")


def read(path: Path) -> dict[str, dict]:
    """What the file holds, {"segments": {key: {pass: number}}, "measured": {key: how}}."""
    if not path.is_file():
        return {"segments": {}, "measured": {}}
    try:
        found = json.loads(path.read_text())
        numbers = [entry[of] for entry in found["segments"].values() for of in PASSES]
        found["measured"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a file of pallas_kernels.tune, got {error!r}") from None
    if wrong := [n for n in numbers if type(n) is not int or n < 1]:
        raise ValueError(f"{path}: expected positive numbers of segments, got {wrong}")
    return found


_table = functools.cache(lambda path: read(path)["segments"])
