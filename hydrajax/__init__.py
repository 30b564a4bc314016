"""HydraHead in JAX: head-level hybrids of full attention and Gated DeltaNet."""

from hydrajax.checkpoint import load_run
from hydrajax.config import HydraConfig, ModelConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.model import Model

__all__ = ["HeadPlan", "HydraConfig", "Model", "ModelConfig", "load_run"]
