"""The text to heal on, as windows, those to stop by apart from the others."""

from typing import Any

import torch

from slimrank.calibration import TokenWindows, draw_windows, hold_out, read_text
from slimrank.errors import RecipeError, TextError
from slimrank.recipe import CalibrationRecipe, HealRecipe
from slimrank.source import tokenize


def draw_text(recipe: HealRecipe, tokenizer: Any) -> TokenWindows:
    """Draw the windows that a recipe asks for; those to be held out are the last.

    Parameters
    ----------
    recipe : HealRecipe
    tokenizer : PreTrainedTokenizerBase

    Raises
    ------
    RecipeError
        If it names no text.
    TextError
        If the text is missing, empty or shorter than one sequence.
    """
    if not recipe.source:
        raise RecipeError("no text to heal on: give --text FILE, or windows=...")
    text = read_text(CalibrationRecipe(source=recipe.source, seed=recipe.seed))
    ids = tokenize(tokenizer, text)
    count = len(ids) // recipe.sequence_length
    if recipe.num_sequences is not None:
        count = recipe.num_sequences + recipe.held_out_sequences
    generator = torch.Generator().manual_seed(recipe.seed)
    return draw_windows(ids, count, recipe.sequence_length, generator)


def held_apart(windows: TokenWindows, recipe: HealRecipe) -> tuple[TokenWindows, TokenWindows]:
    """Windows to train on, and those that are held out.

    Raises
    ------
    TextError
        If there is only one window, or one of them has a single token.
    """
    if min(map(len, windows.windows)) < 2:
        raise TextError("a window needs at least 2 tokens: one to see, one to predict")
    text, held_out = hold_out(windows, recipe.held_out_sequences)
    if held_out is None:
        raise TextError(
            "the text has one sequence, and healing needs another to stop by; give more text or a "
            "shorter --sequence-length"
        )
    return text, held_out
