"""The Hopper kernels where there is a GPU: against float64, and the same bits twice.

The interpreter takes the four warps of a warpgroup for one thread. Here they race if they can.
"""

import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.attention.arg_specs import AttentionArgs
from pallas_kernels.gated_delta_rule.arg_specs import GatedDeltaArgs
from tests.kernels import op_suite, test_attention, test_gated_delta_rule

DOCUMENTS = ((1, 140), (2, 5), (1, 711), (3, 1), (2, 143))
RULE = dataclasses.replace(
    test_gated_delta_rule.OP,
    specs={
        "documents": GatedDeltaArgs(
            shape=(2, 1000, 2, 4, 64, 64), documents=DOCUMENTS, initial_state=True
        ),
        "wide": GatedDeltaArgs(shape=(2, 1000, 2, 4, 128, 128), initial_state=True),
        "segments": GatedDeltaArgs(shape=(1, 8192, 1, 1, 128, 128)),
        "many": GatedDeltaArgs(shape=(8, 512, 8, 16, 128, 128)),
    },
)
ATTENTION = dataclasses.replace(
    test_attention.OP,
    specs={
        "documents": AttentionArgs(shape=(2, 1000, 1000, 4, 2, 128), documents=DOCUMENTS),
        "narrow": AttentionArgs(shape=(2, 1000, 1000, 4, 2, 64)),
        "offset": AttentionArgs(shape=(2, 300, 1000, 4, 4, 128), q_offset=(650, 3), window=200),
        "many": AttentionArgs(shape=(1, 4096, 4096, 16, 8, 128)),
    },
)
UNORDERED = {"d_q"}  # of attention: sums in no fixed order
CALLS = [(op, spec) for op in (RULE, ATTENTION) for spec in op.specs]


@pytest.mark.gpu
@pytest.mark.parametrize("op, spec", CALLS)
def test_right_and_the_same_twice(op, spec):
    try:
        hopper.check_device(jax.devices()[0].device_kind)
    except NotImplementedError as error:
        pytest.skip(str(error))
    op_suite.check(op, spec, "mosaic_gpu", "bfloat16")
    arrays = op_suite.draw(op, spec)
    one, two = (op_suite.evaluate(op, spec, "mosaic_gpu", arrays, "bfloat16") for _ in "ab")
    for name in one.keys() - (UNORDERED if op is ATTENTION else set()):
        np.testing.assert_array_equal(one[name], two[name], name)
