"""What a model is worth, measured."""

from slimrank.evaluation.choice import ChoiceTask, find_choice_tasks, read_choice_tasks
from slimrank.evaluation.harness import ChoiceResult, mean_accuracy, require_harness, zero_shot
from slimrank.evaluation.perplexity import cut_windows, perplexity, windows_perplexity
from slimrank.evaluation.quiet import quiet
from slimrank.evaluation.result import EvalResult

__all__ = [
    "ChoiceResult",
    "ChoiceTask",
    "EvalResult",
    "cut_windows",
    "find_choice_tasks",
    "mean_accuracy",
    "perplexity",
    "quiet",
    "read_choice_tasks",
    "require_harness",
    "windows_perplexity",
    "zero_shot",
]
