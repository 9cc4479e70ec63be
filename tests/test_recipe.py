"""Recipes: read, checked, written back, told apart."""

import pytest
import yaml
from pydantic import ValidationError

from slimrank import CompressionRecipe
from slimrank.errors import BudgetError, RecipeError, SlimrankError
from slimrank.recipe import YAML_CHARACTERS

FULL = {
    "version": 1,
    "effort": "fast",
    "method": "svd-llm",
    "budget": {"param_ratio": 0.7, "scope": "model", "multiple_of": 8, "min_rank": 16},
    "allocation": "swift",
    "swift": {"importance_weight": 0.3, "retained_share": 0.25, "importance_after_norm": True},
    "layout": "pivoted",
    "global_ranks": {"unit": "kfac", "may_stay_dense": True},
    "gradients": {"labels": "model"},
    "passes": 2,
    "generated_sequences": 6,
    "within_block": "greedy",
    "order": "sequential",
    "ridge": 0.1,
    "anchor": 1.0,
    "damping": 1e-2,
    "alpha": 0.5,
    "refine": {
        "preset": "fast",
        "epochs": 3,
        "learning_rate": 0.002,
        "warmup": 0.2,
        "final_learning_rate": 0.3,
        "weight_decay": 0.0,
        "clip_norm": 2.0,
        "batch_sequences": 5,
        "shuffle": False,
        "loss": "gradient",
        "damping": 0.1,
        "scale_loss": False,
        "patience": 4,
        "trains": ["factors", "norms"],
        "seed": 9,
    },
    "tune": {
        "epochs": 5,
        "learning_rate": 0.001,
        "warmup": 0.2,
        "final_learning_rate": 0.3,
        "weight_decay": 0.0,
        "clip_norm": None,
        "batch_sequences": 6,
        "shuffle": False,
        "patience": None,
        "trains": ["norms"],
        "seed": 3,
    },
    "kv_cache": {"keep": 0.5},
    "calibration": {
        "source": ["a.txt", "b"],
        "subset": "raw",
        "split": "test",
        "text_column": "body",
        "num_sequences": 3,
        "sequence_length": 77,
        "held_out_sequences": 2,
        "seed": 5,
    },
    "targets": ["q_proj", r"re:.*\.mlp\."],
    "ignore": ["lm_head"],
    "blocks": "model.layers",
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("values", [FULL, {"budget": {"param_ratio": 0.8}}])
def test_yaml_round_trip(values, tmp_path):
    recipe = CompressionRecipe.from_dict(values)
    again = CompressionRecipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert CompressionRecipe.from_file(path) == recipe
    written = yaml.safe_load(recipe.to_yaml())
    assert written.keys() == FULL.keys()
    for key, value in values.items():
        if isinstance(value, dict):
            assert written[key].items() >= value.items()
        else:
            assert written[key] == value


def test_defaults_are_the_documented_ones():
    recipe = CompressionRecipe.from_dict({"budget": {"param_ratio": 0.8}})
    assert (recipe.method, recipe.allocation, recipe.dtype) == ("kfac-svd", "global", "auto")
    assert (recipe.layout, recipe.effort) == ("auto", "balanced")
    assert recipe.global_ranks.model_dump() == {"unit": "kfac", "may_stay_dense": True}
    assert recipe.calibration.source == ()
    assert recipe.targets is None
    assert recipe.budget.scope == "targets"
    assert recipe.calibration.held_out_sequences == 8
    assert recipe.kv_cache is None
    assert (recipe.order, recipe.within_block) == (None, "fixed")
    assert (recipe.ridge, recipe.anchor) == (None, 1.0)
    assert (recipe.passes, recipe.generated_sequences, recipe.tune) == (1, 0, None)
    assert recipe.refine.preset == "off"
    assert not recipe.refines
    assert not recipe.is_sequential
    assert recipe.swift.model_dump() == {
        "importance_weight": None,
        "retained_share": 0.5,
        "importance_after_norm": False,
    }


@pytest.mark.parametrize(
    ("given", "method", "allocation", "loss"),
    [
        ({"effort": "fast"}, "swift-svd", "uniform", None),
        ({"effort": "best"}, "kfac-svd", "global", "mse"),
        ({"effort": "best", "refine": "off"}, "kfac-svd", "global", None),
        ({"effort": "best", "method": "svd-llm"}, "svd-llm", "uniform", None),
        ({"allocation": "global"}, "swift-svd", "global", None),
    ],
)
def test_an_effort_settles_what_is_not_given(given, method, allocation, loss):
    recipe = CompressionRecipe.from_dict({"budget": {"param_ratio": 0.8}, **given})
    assert (recipe.method, recipe.allocation) == (method, allocation)
    assert (recipe.refine.loss if recipe.refines else None) == loss
    assert CompressionRecipe.from_yaml(recipe.to_yaml()) == recipe


def test_best_passes_twice_and_tunes():
    recipe = CompressionRecipe.from_dict({"budget": {"param_ratio": 0.8}, "effort": "best"})
    assert (recipe.passes, recipe.generated_sequences, recipe.tune.epochs) == (2, 128, 8)
    first = recipe.first_pass()
    assert first.generated_sequences == 0
    assert (first.method, first.allocation, first.passes) == ("kfac-svd", "global", 1)
    assert not first.refines
    assert first.tune is None
    assert not first.is_sequential


@pytest.mark.parametrize(
    ("given", "is_of_text_alone"),
    [
        ({}, True),
        ({"tune": {"epochs": 1}, "refine": "fast"}, True),
        ({"passes": 2}, False),
        ({"generated_sequences": 1}, False),
        ({"effort": "best"}, False),
    ],
)
def test_what_is_of_text_alone(given, is_of_text_alone):
    recipe = CompressionRecipe.from_dict({"budget": {"param_ratio": 0.8}, **given})
    assert recipe.is_of_text_alone == is_of_text_alone
    assert recipe.first_pass().is_of_text_alone


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({"method": "kfac-aa-svd", "ridge": 0.3}, "kfac-svd"),
        ({"method": "aa-svd", "allocation": "swift", "anchor": 0.5}, "swift-svd"),
    ],
)
def test_a_first_pass_looks_at_nothing_that_shifts(given, method):
    recipe = CompressionRecipe.from_dict({"budget": {"param_ratio": 0.8}, "passes": 2, **given})
    first = recipe.first_pass()
    assert (first.method, first.ridge, first.anchor) == (method, None, 1.0)
    assert not first.is_sequential


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"method": "svd"}, "svd with uniform ranks takes nothing of the second"),
        ({"method": "shift-aware"}, "shift-aware with uniform ranks takes nothing of the second"),
        ({"method": "swift-svd", "allocation": "threshold"}, "'threshold' predicts changes of the"),
    ],
)
def test_a_second_pass_that_nothing_looks_at_is_refused(given, fault):
    with pytest.raises(RecipeError, match=fault):
        CompressionRecipe.from_dict({"budget": {"param_ratio": 0.8}, "passes": 2, **given})


def test_tuning_is_a_training_by_predictions():
    recipe = CompressionRecipe.from_dict({"budget": {"param_ratio": 0.8}, "tune": {"epochs": 5}})
    settings = recipe.tune.refinement()
    assert (settings.loss, settings.epochs, settings.learning_rate) == ("kl", 5, 5e-5)
    assert settings.patience == recipe.tune.patience
    assert not recipe.is_sequential


@pytest.mark.parametrize(
    ("given", "needs", "of_profile"),
    [
        ({"method": "swift-svd"}, {"original"}, "swift-svd"),
        ({"allocation": "global"}, {"original", "gradients"}, "kfac-svd"),
        ({"allocation": "global", "global_ranks": {"unit": "relative"}}, {"original"}, "swift-svd"),
        ({"allocation": "threshold"}, {"original", "mean_gradients"}, "swift-svd"),
        (
            {"allocation": "threshold", "method": "kfac-svd"},
            {"original", "gradients", "mean_gradients"},
            "kfac-svd",
        ),
        ({"method": "asvd"}, {"magnitudes"}, "swift-svd"),
        (
            {"method": "swift-svd", "refine": {"preset": "fast", "loss": "gradient"}},
            {"original", "gradients"},
            "swift-svd",
        ),
    ],
)
def test_needs_are_those_of_method_ranks_and_training(given, needs, of_profile):
    recipe = CompressionRecipe.from_dict({"budget": {"param_ratio": 0.8}, **given})
    assert recipe.needs == needs
    assert recipe.for_profile().method == of_profile


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "svd", "alpha": 0.3}, "an alpha is given, but svd has none; 'asvd' has"),
        ({"method": "svd", "damping": 0.3}, "a damping is given, but svd has none; 'kfac-svd' has"),
        (
            {"method": "svd", "global_ranks": {"unit": "relative"}},
            "settings of allocation 'global' are given, but allocation is 'uniform'",
        ),
    ],
)
def test_settings_of_what_is_not_chosen_are_refused(given, message):
    with pytest.raises(RecipeError, match=message):
        CompressionRecipe.from_dict({"budget": {"param_ratio": 0.8}, **given})


def with_value(path, value):
    values = {key: dict(v) if isinstance(v, dict) else v for key, v in FULL.items()}
    *parents, last = path.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "there_are"),
    [
        ("methd", "version, effort, method, budget"),
        ("budget.ratio", "param_ratio, scope, multiple_of, min_rank"),
        ("calibration.samples", "source, subset, split"),
        ("swift.alpha", "importance_weight, retained_share, importance_after_norm"),
        ("kv_cache.share", "keep"),
        ("refine.lr", "preset, epochs, learning_rate, warmup"),
    ],
)
def test_an_unknown_key_is_named_with_those_beside_it(path, there_are):
    with pytest.raises(RecipeError, match=rf"r\.yaml: {path}: unknown key; there are {there_are}"):
        CompressionRecipe.from_dict(with_value(path, 1), "r.yaml")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", 2),
        ("version", "one"),
        ("method", "swift"),
        ("method", None),
        ("allocation", "greedy"),
        ("budget", None),
        ("budget", 0.8),
        ("budget.param_ratio", "most"),
        ("budget.param_ratio", None),
        ("budget.scope", "embeddings"),
        ("budget.multiple_of", 1.5),
        ("calibration.num_sequences", 0),
        ("calibration.num_sequences", -3),
        ("calibration.num_sequences", 2.5),
        ("calibration.sequence_length", 1),
        ("calibration.held_out_sequences", -1),
        ("kv_cache", 0.5),
        ("kv_cache.keep", 2),
        ("swift", None),
        ("swift.importance_weight", 1.1),
        ("swift.importance_weight", -0.1),
        ("swift.importance_weight", "best"),
        ("swift.retained_share", 2),
        ("swift.retained_share", None),
        ("swift.importance_after_norm", "often"),
        ("within_block", "swift"),
        ("order", "both"),
        ("ridge", -0.1),
        ("ridge", 1.1),
        ("anchor", 1.1),
        ("anchor", None),
        ("refine", None),
        ("refine", "slow"),
        ("refine.preset", "slow"),
        ("refine.epochs", 0),
        ("refine.learning_rate", 0),
        ("refine.warmup", 1),
        ("refine.final_learning_rate", 1.5),
        ("refine.weight_decay", -1),
        ("refine.clip_norm", 0),
        ("refine.batch_sequences", 0),
        ("refine.patience", 0),
        ("refine.loss", "mae"),
        ("refine.loss", None),
        ("refine.damping", -0.1),
        ("refine.damping", 1.1),
        ("refine.trains", []),
        ("refine.trains", ["heads"]),
        ("refine.seed", -1),
        ("calibration.seed", -1),
        ("calibration.seed", 2**70),
        ("calibration.source", "a.txt"),
        ("calibration.source", [1]),
        ("targets", "q_proj"),
        ("targets", [None]),
        ("ignore", None),
        ("dtype", "int8"),
    ],
)
def test_a_bad_value_is_named_by_its_key(path, value):
    with pytest.raises(RecipeError, match=rf"recipe: {path}") as caught:
        CompressionRecipe.from_dict(with_value(path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.0001, 80, float("nan"), float("inf")])
def test_a_budget_out_of_range(ratio):
    with pytest.raises(BudgetError, match=r"budget: keep is the share .* lies in \(0, 1\]"):
        CompressionRecipe.from_dict({"budget": {"param_ratio": ratio}})


@pytest.mark.parametrize("key", ["multiple_of", "min_rank"])
def test_ranks_begin_at_one(key):
    with pytest.raises(BudgetError, match="at least 1"):
        CompressionRecipe.from_dict({"budget": {"param_ratio": 0.5, key: 0}})


@pytest.mark.parametrize(
    "values", [{}, None, [], "text", {"method": "svd"}, {"param_ratio": 0.8}, {"budget": {}}]
)
def test_what_is_no_recipe(values):
    with pytest.raises(RecipeError):
        CompressionRecipe.from_dict(values)


@pytest.mark.parametrize("text", ["", "just text", "- a\n- b", "a: b: c", "{", "\t- x", "\x00"])
def test_what_is_no_yaml_mapping(text):
    with pytest.raises(RecipeError, match=r"r.yaml") as caught:
        CompressionRecipe.from_yaml(text, "r.yaml")
    assert "\n" not in str(caught.value)


def test_yaml_makes_no_objects():
    with pytest.raises(RecipeError, match="not YAML"):
        CompressionRecipe.from_yaml("budget: !!python/object/apply:os.getcwd []")


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none.yaml"):
        CompressionRecipe.from_file(tmp_path / "none.yaml")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        CompressionRecipe.from_file(tmp_path / "r.yaml")


def test_every_setting_is_in_the_fingerprint():
    changes = {
        "method": "svd",
        "budget.param_ratio": 0.71,
        "budget.scope": "targets",
        "budget.multiple_of": 4,
        "budget.min_rank": 8,
        "calibration.source": ["a.txt"],
        "calibration.subset": None,
        "calibration.split": "train",
        "calibration.text_column": "text",
        "calibration.num_sequences": 4,
        "calibration.sequence_length": 78,
        "calibration.held_out_sequences": 3,
        "calibration.seed": 6,
        "swift.importance_weight": None,
        "swift.retained_share": 0.5,
        "swift.importance_after_norm": False,
        "within_block": "fixed",
        "order": None,
        "ridge": 0.2,
        "refine": "off",
        "refine.preset": "paper",
        "refine.epochs": 4,
        "refine.learning_rate": 0.003,
        "refine.warmup": 0.1,
        "refine.final_learning_rate": 0.1,
        "refine.weight_decay": 0.1,
        "refine.clip_norm": None,
        "refine.batch_sequences": 6,
        "refine.shuffle": True,
        "refine.damping": 0.2,
        "refine.scale_loss": True,
        "refine.patience": None,
        "refine.trains": ["factors"],
        "refine.seed": 8,
        "kv_cache.keep": 0.6,
        "kv_cache": None,
        "targets": None,
        "ignore": [],
        "blocks": None,
        "dtype": "auto",
    }
    recipes = [FULL, *(with_value(path, value) for path, value in changes.items())]
    recipes += [{**FULL, "swift": {}}, {**FULL, "swift": {}, "allocation": "uniform"}]
    refine = {key: value for key, value in FULL["refine"].items() if key != "damping"}
    losses = ("mse", "gradient", "kl")
    recipes += [{**FULL, "refine": {**refine, "loss": loss}} for loss in losses]
    recipes += [{**FULL, "method": "aa-svd", "anchor": anchor} for anchor in (1.0, 0.5, 0.0)]
    prints = {CompressionRecipe.from_dict(values).fingerprint() for values in recipes}
    assert len(prints) == len(recipes)


def test_a_recipe_is_frozen():
    recipe = CompressionRecipe.from_dict(FULL)
    with pytest.raises(ValidationError):
        recipe.method = "svd"
    with pytest.raises(ValidationError):
        recipe.budget.param_ratio = 0.1


def test_errors_are_ours():
    assert issubclass(RecipeError, SlimrankError)
    assert issubclass(BudgetError, SlimrankError)


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, "half", None, float("nan")])
def test_a_share_of_the_cache_out_of_range(keep):
    with pytest.raises(RecipeError, match=r"recipe: kv_cache\.keep: "):
        CompressionRecipe.from_dict(with_value("kv_cache.keep", keep))


@pytest.mark.parametrize("key", ["importance_weight", "retained_share"])
def test_the_ends_of_swifts_shares_are_inside(key):
    for value in (0, 1):
        swift = CompressionRecipe.from_dict(with_value(f"swift.{key}", value)).swift
        assert getattr(swift, key) == value


def test_settings_that_nothing_reads_are_refused():
    values = {"budget": {"param_ratio": 0.5}, "swift": {"importance_weight": 0.5}}
    with pytest.raises(RecipeError, match="allocation is 'global'"):
        CompressionRecipe.from_dict(values)
    assert CompressionRecipe.from_dict(values | {"allocation": "swift"}).swift.importance_weight


def with_others(**others):
    return CompressionRecipe.from_dict({"budget": {"param_ratio": 0.5}, **others})


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("fast", {"epochs": 8, "learning_rate": 3e-4, "batch_sequences": 8, "patience": 2}),
        ("paper", {"epochs": 25, "learning_rate": 1e-4, "batch_sequences": 32, "patience": None}),
    ],
)
def test_a_preset_settles_what_is_not_given(preset, expected):
    is_fast = preset == "fast"
    expected = expected | {"shuffle": is_fast, "scale_loss": is_fast, "weight_decay": 0.01}
    expected |= {"warmup": 0.1, "final_learning_rate": 0.1, "clip_norm": 1.0}
    by_name, by_mapping = with_others(refine=preset), with_others(refine={"preset": preset})
    assert by_name == by_mapping
    assert by_name.refines
    assert by_name.refine.model_dump().items() >= expected.items()
    given = {"preset": preset, "epochs": 3, "patience": 7, "shuffle": not is_fast}
    changed = with_others(refine=given).refine
    assert changed.model_dump().items() >= (expected | given).items()


@pytest.mark.parametrize("preset", ["off", "paper", "fast"])
def test_a_written_preset_reads_back(preset):
    recipe = with_others(refine={"preset": preset})
    assert CompressionRecipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("refine", [{"epochs": 3}, {"preset": "off", "trains": ["factors"]}])
def test_settings_of_a_refinement_that_is_off_are_refused(refine):
    with pytest.raises(RecipeError, match=r"refine: .* it is off; say --refine paper or fast"):
        with_others(refine=refine)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_a_damping_is_for_the_loss_with_a_metric(loss):
    with pytest.raises(RecipeError, match=f"refine: a damping is given, but loss '{loss}' has no"):
        with_others(refine={"preset": "fast", "loss": loss, "damping": 0.5})
    refine = with_others(refine={"preset": "fast", "loss": "gradient", "damping": 0.5}).refine
    assert (refine.loss, refine.damping) == ("gradient", 0.5)


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_presets_train_by_the_squared_error(preset):
    assert with_others(refine=preset).refine.loss == "mse"


@pytest.mark.parametrize("method", ["svd", "svd-llm", "swift-svd", "shift-aware"])
def test_an_anchor_is_for_the_anchored_method(method):
    with pytest.raises(RecipeError, match=f"an anchor is given, but {method} has none; 'aa-svd'"):
        with_others(method=method, anchor=0.5)
    assert with_others(method="aa-svd", anchor=0.5).make_method().anchor == 0.5


@pytest.mark.parametrize(
    ("others", "what"),
    [({"refine": "fast"}, "refinement"), ({"within_block": "greedy"}, "--within-block greedy")],
)
def test_one_shot_is_not_for_what_needs_the_blocks_before(others, what):
    with pytest.raises(RecipeError, match=f"{what} takes .* one after the other: --order seq"):
        with_others(order="one-shot", **others)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({}, False),
        ({"method": "svd"}, False),
        ({"method": "svd-llm"}, False),
        ({"method": "shift-aware"}, True),
        ({"method": "aa-svd"}, True),
        ({"method": "svd", "refine": "paper"}, True),
        ({"within_block": "greedy"}, True),
        ({"method": "aa-svd", "order": "one-shot"}, False),
        ({"method": "svd", "order": "sequential"}, True),
    ],
)
def test_order_is_as_the_rest_needs(others, expected):
    recipe = with_others(**others)
    assert recipe.is_sequential == expected
    assert recipe.order == others.get("order")


def test_the_ridge_is_the_methods_own_unless_given():
    assert with_others().relative_ridge() == 0.0
    assert with_others(method="aa-svd").relative_ridge() == 0.1
    assert with_others(method="aa-svd", ridge=0.0).relative_ridge() == 0.0
    assert with_others(ridge=0.3).relative_ridge() == 0.3


def test_ranks_come_from_a_profile_of_one_pass():
    for method in ("svd-llm", "swift-svd"):
        recipe = with_others(method=method, ridge=0.1)
        assert recipe.for_profile() is recipe
    for method in ("svd", "shift-aware", "aa-svd"):
        recipe = with_others(method=method, ridge=0.1).for_profile()
        assert (recipe.method, recipe.ridge) == ("swift-svd", None)
    assert with_others(method="aa-svd", anchor=0.5).for_profile() == with_others(method="swift-svd")


@pytest.mark.parametrize("values", [{"effort": [1]}, {"effort": {}}, {"refine": {"preset": []}}])
def test_a_name_that_cannot_be_looked_up(values):
    with pytest.raises(RecipeError, match=r"recipe: (effort|refine\.preset): "):
        CompressionRecipe.from_dict({"budget": {"param_ratio": 0.5}, **values})


def aliases(pattern, times):
    lines = [f"a{n + 1}: &a{n + 1} {pattern.format(f'*a{n}')}" for n in range(times)]
    return "\n".join(["a0: &a0 {a: 1}", *lines])


@pytest.mark.parametrize(
    "text",
    [
        aliases("[{0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}]", 20),
        aliases("{{a: {0}, b: {0}}}", 40),
        aliases("{{<<: [{0}, {0}, {0}, {0}, {0}]}}", 15),
        "budget: &a {param_ratio: *a}",
    ],
)
def test_aliases_of_aliases_are_not_written_out(text):
    with pytest.raises(RecipeError, match=r"recipe: over 100000 values; it is not a recipe"):
        CompressionRecipe.from_yaml(text)


def test_an_alias_may_be_used():
    recipe = CompressionRecipe.from_yaml("{budget: {param_ratio: 1}, targets: &t [a], ignore: *t}")
    assert (recipe.targets, recipe.ignore) == (("a",), ("a",))


@pytest.mark.parametrize("text", ["[" * 20_000, "{a: " * 3_000])
def test_yaml_that_is_deep(text):
    with pytest.raises(RecipeError, match="nested too deeply"):
        CompressionRecipe.from_yaml(text)


@pytest.mark.parametrize(
    "value",
    [
        *("!!bool x", "!!timestamp x", "!!int x", "!!binary x"),
        *("0x_", "2001-99-99", "9" * 5_000, '"\\ud800"'),
    ],
)
def test_values_that_yaml_cannot_make(value):
    with pytest.raises(RecipeError, match="not YAML"):
        CompressionRecipe.from_yaml(f"blocks: {value}")


@pytest.mark.parametrize("text", ["{1: 2}", "{null: 2}"])
def test_keys_are_words(text):
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        CompressionRecipe.from_yaml(text)


def test_a_recipe_that_names_many_layers_is_read_back(tmp_path):
    names = [f"model.layers.{n // 256}.mlp.experts.{n % 256}.up_proj" for n in range(7_000)]
    recipe = CompressionRecipe.from_dict({"budget": {"param_ratio": 0.5}, "targets": names})
    path = tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml())
    assert CompressionRecipe.from_file(path) == recipe


def test_what_has_too_many_values_is_not_held_in_memory(monkeypatch):
    monkeypatch.setattr("slimrank.recipe.YAML_VALUES", 50)
    seen, real = [], yaml.SafeLoader.get_event
    monkeypatch.setattr(yaml.SafeLoader, "get_event", lambda self: seen.append(1) or real(self))
    with pytest.raises(RecipeError, match=r"recipe: over 50 values; it is not a recipe"):
        CompressionRecipe.from_yaml("[" + "0," * 1000 + "]")
    assert len(seen) == 104


def test_a_file_that_is_too_long(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("#" * (YAML_CHARACTERS + 1))
    with pytest.raises(RecipeError, match="it is no recipe"):
        CompressionRecipe.from_file(path)
