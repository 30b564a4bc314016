"""Rows of tokens for training and evaluation, from files and from recall tasks."""

from hydrajax.data.pipeline import Batch, Pipeline, eval_rows, make_pipeline
from hydrajax.data.synthetic import Example, counterfactual, encode_example, make_example

__all__ = [
    "Batch",
    "Example",
    "Pipeline",
    "counterfactual",
    "encode_example",
    "eval_rows",
    "make_example",
    "make_pipeline",
]
