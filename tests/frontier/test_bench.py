"""What a benchmark may say; what is refused, in one line."""

from pathlib import Path

import pytest

from slimrank.errors import BudgetError, RecipeError
from slimrank.frontier import BenchRecipe, cells

SMALL = "model: m\ntexts: {wiki: {path: w.txt}}\n"


def read(more, where="bench.yaml"):
    return BenchRecipe.from_yaml(SMALL + more, where)


def names(more):
    return [cell.name for cell in cells(read(more))]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("kep: [0.8]", "bench.yaml: kep: unknown key; there are model, texts"),
        ("windows: {size: 3}", "bench.yaml: windows.size: unknown key"),
        ("windows: {length: 1}", "bench.yaml: windows.length: Input should be greater"),
        ("keep: [1.2]", "bench.yaml: keep: shares are in (0, 1], each named once"),
        ("keep: [0.5, 0.5]", "each named once"),
        ("keep: [.nan]", "keep: shares are in"),
        ("base: {budget: {param_ratio: 0.5}}", "name the shares under `keep`"),
        ("grid: {method: []}", "grid.method: name at least one value"),
        ("runs: [{name: a}, {name: a}]", "runs: two have the same name"),
        ("zero_shot: {folder: f, tasks: []}", "zero_shot.tasks: "),
        ("zero_shot: {folder: f, tasks: [../a]}", "'../a' is no name of a file"),
        ("zero_shot: {folder: f, tasks: [a, a]}", "named twice"),
        ("zero_shot: {folder: f, tasks: [a], limit: 1}", "zero_shot.limit"),
        ("seed: -1", "bench.yaml: seed: "),
        ("keep: [0.8", "bench.yaml: not YAML: "),
    ],
)
def test_what_is_refused(more, message):
    with pytest.raises(RecipeError) as caught:
        read(more)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_mapping_and_no_file(tmp_path):
    with pytest.raises(RecipeError, match="a benchmark is a mapping"):
        BenchRecipe.from_yaml("- 1")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        BenchRecipe.from_file(tmp_path / "none.yaml")


def test_off_is_a_word_and_true_is_not():
    bench = read("grid: {refine: [off, fast]}\nint8: true\ndense: false")
    assert bench.grid == {"refine": ("off", "fast")}
    assert (bench.int8, bench.dense) == (True, False)


def test_the_grid_is_a_product_and_names_say_what_varies():
    more = (
        "keep: [0.8, 0.6]\ngrid: {method: [svd, swift-svd], calibration.seed: [0, 1], ridge: [0]}"
    )
    found = cells(read(more))
    assert [cell.name for cell in found[:4]] == [
        "dense",
        "svd seed=0 @ 0.8",
        "svd seed=0 @ 0.6",
        "svd seed=1 @ 0.8",
    ]
    assert len(found) == 1 + 2 * 2 * 2
    last = found[-1].recipe
    assert (last.method, last.calibration.seed, last.budget.param_ratio) == ("swift-svd", 1, 0.6)
    assert last.ridge == 0


def test_int8_factors_are_rows_after_those_they_are_of():
    more = "int8_factors: true\nkeep: [0.8]\ngrid: {method: [svd, aa-svd], anchor: [0.5]}\n"
    found = cells(read(more + "runs: [{name: own}]"))
    assert [(cell.name, cell.error is None, cell.int8_factors) for cell in found[1:]] == [
        ("svd @ 0.8", False, False),  # nothing to round
        ("aa-svd @ 0.8", True, False),
        ("aa-svd @ 0.8, int8", True, True),
        ("own @ 0.8", True, False),
        ("own @ 0.8, int8", True, True),
    ]
    exact, rounded, own = found[2:5]
    assert rounded.is_int8_of(exact)
    assert not rounded.is_int8_of(own)
    assert not own.is_int8_of(exact)


def test_the_base_alone_and_runs_alone():
    assert names("keep: [0.8]\nint8: true") == ["dense", "int8", "base @ 0.8"]
    runs = "runs: [{name: a, recipe: {method: svd}}]\nkeep: [0.8]\ndense: false"
    assert names(runs) == ["a @ 0.8"]
    assert names(f"{runs}\ngrid: {{}}") == ["base @ 0.8", "a @ 0.8"]


def test_runs_are_laid_over_the_base_and_may_name_their_size():
    more = """
base: {method: aa-svd, calibration: {num_sequences: 4, seed: 7}, budget: {multiple_of: 8}}
dense: false
runs:
  - name: whole
    recipe: {anchor: 0.5, calibration: {num_sequences: 5}, budget: {param_ratio: 0.7}}
"""
    (cell,) = cells(read(more))
    recipe = cell.recipe
    assert (cell.name, recipe.method, recipe.anchor) == ("whole", "aa-svd", 0.5)
    assert (recipe.calibration.num_sequences, recipe.calibration.seed) == (5, 7)
    assert (recipe.budget.param_ratio, recipe.budget.multiple_of) == (0.7, 8)


def test_the_seed_is_of_all_recipes_that_name_none():
    (cell,) = cells(read("seed: 3\nkeep: [0.8]\ndense: false"))
    assert cell.recipe.calibration.seed == 3


def test_a_combination_that_does_not_fit_is_a_row_with_an_error():
    found = cells(read("keep: [0.8]\ngrid: {method: [svd, aa-svd], anchor: [1.0, 0.5]}"))
    assert [cell.error is None for cell in found] == [True, True, False, True, True]
    assert "an anchor is given" in str(found[2].error)
    assert found[2].values["anchor"] == 0.5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("keep: [0.8]\ngrid: {metod: [svd, aa-svd]}", "metod: unknown key"),
        (
            "keep: [0.8]\ngrid: {method: [swift-svd, aa-svd], calibration.sead: [1]}",
            "sead: unknown key",
        ),
        ("keep: [0.8]\ngrid: {method: [svdd]}", "svdd"),
        ("runs: [{name: a, recipe: {method: svd}}]", "neither it nor `keep` says"),
        ("runs: [{name: a, recipe: {anchor: 2}}]\nkeep: [0.8]", "anchor"),
        ("dense: false", "nothing is to be measured"),
        ("keep: [0.8]\ngrid: {}\nruns: [{name: base}]", "two rows would be named 'base @ 0.8'"),
        (
            "int8_factors: true\nruns: [{name: a, recipe: {budget: {param_ratio: 0.5}}}, "
            "{name: 'a, int8', recipe: {budget: {param_ratio: 0.6}}}]",
            "two rows would be named 'a, int8'",
        ),
    ],
)
def test_what_is_wrong_with_the_recipes_is_said_before_any_work(more, message):
    with pytest.raises((RecipeError, BudgetError)) as caught:
        cells(read(more))
    assert message in str(caught.value)


def test_the_example_is_valid():
    bench = BenchRecipe.from_file(Path(__file__).parents[2] / "examples" / "bench.yaml")
    found = cells(bench)
    assert len(found) == 1 + 3 * 2 * 2 + 2 * 2
    assert [cell.name for cell in found if cell.error is not None] == []


def test_a_budget_that_is_no_mapping():
    with pytest.raises(RecipeError, match=r"base\.budget: it is a mapping"):
        BenchRecipe.from_yaml("{model: m, texts: {t: {path: x}}, base: {budget: 3}, keep: [0.5]}")


def test_aliases_of_a_benchmark_are_not_written_out():
    lines = [f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}, *a{n}]" for n in range(30)]
    with pytest.raises(RecipeError, match="over 100000 values; it is not a benchmark"):
        BenchRecipe.from_yaml("\n".join(["a0: &a0 [x]", *lines]))
