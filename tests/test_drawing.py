"""What is held out is never calibrated on, and holding out moves nothing else."""

import pytest
import torch

from slimrank.calibration import hold_out
from slimrank.drawing import draw
from slimrank.errors import NumericalWarning, RecipeError
from slimrank.recipe import CalibrationRecipe


def positions(_text, **_options):
    """A tokenizer whose tokens are places in the text, each its own."""
    return {"input_ids": torch.arange(1000)[None]}


@pytest.fixture
def settings(text_file):
    return CalibrationRecipe(
        source=(str(text_file),), num_sequences=6, sequence_length=32, held_out_sequences=3
    )


@pytest.mark.parametrize("seed", range(4))
def test_with_those_to_be_held_out_the_first_are_the_same(settings, seed):
    settings = settings.model_copy(update={"seed": seed})
    without = draw(settings, positions, with_held_out=False)
    all_of_them = draw(settings, positions, with_held_out=True)
    assert len(all_of_them.windows) == 9
    kept, held_out = hold_out(all_of_them, 3)
    assert kept.fingerprint() == without.fingerprint()
    assert len(held_out.windows) == 3
    assert not set(torch.cat(kept.windows).tolist()) & set(torch.cat(held_out.windows).tolist())


def test_a_short_text_is_shared(settings):
    settings = settings.model_copy(update={"num_sequences": 30, "held_out_sequences": 8})
    with pytest.warns(NumericalWarning, match="holds 31 sequences of 32 tokens; 38 were asked"):
        windows = draw(settings, positions, with_held_out=True)
    kept, held_out = hold_out(windows, 8)
    assert [len(part.windows) for part in (kept, held_out)] == [23, 8]


def test_no_tokenizer(settings):
    with pytest.raises(RecipeError, match=r"needs tokenizer=\.\.\. or windows"):
        draw(settings, None, with_held_out=False)
