"""What a model is worth, measured."""

from slimrank.evaluation.perplexity import perplexity, windows_perplexity
from slimrank.evaluation.result import EvalResult

__all__ = ["EvalResult", "perplexity", "windows_perplexity"]
