"""What a model is worth, measured."""

from slimrank.evaluation.perplexity import perplexity
from slimrank.evaluation.result import EvalResult

__all__ = ["EvalResult", "perplexity"]
