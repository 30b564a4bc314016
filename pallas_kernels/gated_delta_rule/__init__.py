"""The gated delta rule over sequences and for one token."""

from pallas_kernels.gated_delta_rule.api import (
    GatedDeltaConfig,
    gated_delta_rule,
    gated_delta_step,
)

__all__ = ["GatedDeltaConfig", "gated_delta_rule", "gated_delta_step"]
