"""Compression on text, and on what the model goes on with."""

import pytest
import torch

from slimrank import CompressionOptions, CompressionRecipe, compress
from slimrank.calibration import TokenWindows, generate_windows, hold_out
from slimrank.errors import NumericalWarning, RecipeError
from slimrank.frontier.making import served_by_profile

pytestmark = pytest.mark.filterwarnings(f"ignore::{NumericalWarning.__module__}.NumericalWarning")
WAYS = [
    {"method": "swift-svd"},
    {"method": "kfac-svd", "allocation": "global", "layout": "auto"},
    {"method": "kfac-svd", "allocation": "global", "passes": 2},
    {"method": "aa-svd", "refine": {"preset": "fast", "epochs": 1}},
    {"method": "svd", "tune": {"epochs": 1}},
]


@pytest.fixture(scope="module")
def text(make_windows):
    return make_windows(12, 24)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_it_is_as_if_the_sequences_had_been_given(way, make_model, make_recipe, text):
    settings = {"calibration": {"held_out_sequences": 3}, **way}
    own, held_out = hold_out(text, 3)
    dense, model, other = (make_model("llama") for _ in range(3))
    report = compress(model, make_recipe(generated_sequences=6, **settings), windows=text)
    written = generate_windows(dense, own, 6, seed=0)
    given = TokenWindows((*own.windows, *written.windows, *held_out.windows))
    if way["method"] == "swift-svd":  # ranks are uniform: nothing is held out of what is given
        given = hold_out(given, 3)[0]
    same = compress(other, make_recipe(**settings), windows=given)
    for (name, tensor), found in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, found), name
    assert (report.tokens, report.calibration_fingerprint) == (
        same.tokens,
        same.calibration_fingerprint,
    )
    if way["method"] != "svd":
        assert report.tokens == (9 + 6) * 24


def test_what_is_held_out_stays_so_when_text_is_short(make_model, make_recipe, make_windows):
    """Of four windows two are held out, however many are written."""
    short = make_windows(4, 24)
    recipe = make_recipe(
        method="kfac-svd",
        allocation="global",
        generated_sequences=9,
        calibration={"held_out_sequences": 8},
    )
    report = compress(make_model("llama"), recipe, windows=short)
    assert report.tokens == (2 + 9) * 24


def test_text_of_the_recipe_and_what_is_said_of_it(
    make_model, make_recipe, tiny_tokenizer, tmp_path
):
    recipe, tracked = make_recipe(method="swift-svd", generated_sequences=4), []

    def track(steps, what):
        tracked.append(what)
        return steps

    report = compress(
        make_model("llama"),
        recipe,
        tokenizer=tiny_tokenizer,
        out=tmp_path / "out",
        options=CompressionOptions(track=track),
    )
    assert report.tokens == (8 + 4) * 32
    assert "generate" in report.seconds
    assert "writing" in tracked
    card = (tmp_path / "out" / "README.md").read_text()
    assert "sample.txt; 4 sequences by the original model)" in card


def test_a_method_that_looks_at_nothing_is_refused():
    with pytest.raises(RecipeError, match="svd with uniform ranks looks at none"):
        CompressionRecipe.from_dict(
            {"budget": {"param_ratio": 0.5}, "method": "svd", "generated_sequences": 4}
        )


def test_a_profile_is_of_text_alone(make_model, make_recipe, make_profile, text):
    recipe = make_recipe(method="swift-svd", generated_sequences=4)
    profile = make_profile(make_model("llama")).folder
    with pytest.raises(RecipeError, match="a profile is of its text alone"):
        compress(make_model("llama"), recipe, windows=text, profile=profile)
    assert served_by_profile(recipe) is None
