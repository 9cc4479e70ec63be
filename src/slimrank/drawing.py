"""Windows of a recipe's text, in a model's tokens."""

from typing import Any

import torch

from slimrank.calibration import TokenWindows, draw_windows, read_text
from slimrank.errors import RecipeError
from slimrank.recipe import CalibrationRecipe
from slimrank.source import tokenize


def draw(calibration: CalibrationRecipe, tokenizer: Any, with_held_out: bool) -> TokenWindows:
    """Draw the windows that a recipe asks for.

    The first ones are the same with and without those to be held out, if the text has enough.

    Parameters
    ----------
    calibration : CalibrationRecipe
    tokenizer : PreTrainedTokenizerBase or None
    with_held_out : bool
        Draw the sequences to choose by as well; they are the last.

    Raises
    ------
    RecipeError
        If there is no tokenizer.
    TextError
        If the text is missing, empty or shorter than one sequence.
    """
    if tokenizer is None:
        raise RecipeError("a model in memory needs tokenizer=... or windows=... to calibrate on")
    generator = torch.Generator().manual_seed(calibration.seed)
    ids = tokenize(tokenizer, read_text(calibration))
    count = calibration.num_sequences
    count += calibration.held_out_sequences if with_held_out else 0
    return draw_windows(ids, count, calibration.sequence_length, generator)
