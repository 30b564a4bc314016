"""What a student kept of its teacher: perplexity, recall by length and depth, agreement."""

from hydrajax.evals.subject import Subject, zero_la
from hydrajax.evals.suite import evaluate

__all__ = ["Subject", "evaluate", "zero_la"]
