"""A plan, made from a configuration alone, is what compression then does, to the byte."""

import json

import pytest
import torch

import slimrank
from slimrank.checkpoint import weight_file_bytes
from slimrank.checkpoint.aligned import LINE
from slimrank.errors import BudgetError, CoverageWarning, ModelError, RecipeError
from slimrank.report import PlanReport

QUIET = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")


@pytest.fixture
def config_folder(make_model, tmp_path):
    """Only a configuration: no weight, no tokenizer."""

    def make(family, dtype=torch.float32):
        folder = tmp_path / "config only"
        config = make_model(family, dtype=dtype).config
        config.architectures = None
        config.dtype = dtype
        config.save_pretrained(folder)
        assert [p.name for p in folder.iterdir() if p.name != "generation_config.json"] == [
            "config.json"
        ]
        return folder

    return make


@QUIET
@pytest.mark.parametrize(
    ("dtype", "scope", "keep"),
    [
        (torch.bfloat16, "targets", 0.5),
        (torch.float32, "model", 0.96),
    ],
)
def test_a_plan_is_what_is_written(
    family, config_folder, make_folder, make_recipe, tmp_path, dtype, scope, keep
):
    recipe = make_recipe(keep=keep, scope=scope)
    plan = slimrank.plan(config_folder(family, dtype), recipe)
    out = tmp_path / "out"
    report = slimrank.compress(make_folder(family, dtype=dtype), recipe, out=out)
    assert plan.size == report.size
    assert plan.size.weight_bytes == weight_file_bytes(out)
    assert {x.name: (x.rank, x.params) for x in plan.linears} == {
        x.name: (x.rank, x.params) for x in report.linears
    }


@QUIET
def test_a_plan_of_a_model_in_memory_is_the_same(family, make_model, make_recipe, config_folder):
    model = make_model(family)
    plan = slimrank.plan(model, make_recipe())
    assert plan.size == slimrank.plan(config_folder(family), make_recipe()).size
    assert not any(isinstance(m, slimrank.LowRankLinear) for m in model.modules())


def test_what_a_plan_tells(make_skeleton, make_recipe):
    plan = slimrank.plan(make_skeleton("llama"), make_recipe())
    assert plan.inputs == 8
    assert len(plan.linears) == 14
    assert plan.method == "swift-svd"
    assert plan.warnings == ()
    assert plan.linears[0].name == "model.layers.0.self_attn.q_proj"
    assert (plan.linears[1].out_features, plan.linears[1].in_features) == (16, 32)
    assert plan.size.target_params == sum(x.params for x in plan.linears)
    assert PlanReport.model_validate_json(plan.model_dump_json()) == plan


def test_keeping_all_needs_no_solve(make_skeleton, make_model, make_recipe, windows, tmp_path):
    plan = slimrank.plan(make_skeleton("llama"), make_recipe(keep=1.0))
    assert not any("solve" in phase.memory for phase in plan.needs.phases)
    slimrank.compress(
        make_model("llama"), make_recipe(keep=1.0), out=tmp_path / "out", windows=windows
    )
    assert plan.size.weight_bytes == weight_file_bytes(tmp_path / "out")
    assert 0 <= plan.size.weight_bytes - plan.size.weight_bytes_before < LINE
    assert all(x.rank is None for x in plan.linears)


def test_int8_bytes(make_skeleton, make_recipe):
    plan = slimrank.plan(make_skeleton("llama"), make_recipe())
    outputs = sum(x.out_features for x in plan.linears)
    saved = 3 * plan.size.target_params_before - 2 * outputs
    assert plan.size.int8_bytes == plan.size.weight_bytes_before - saved


def test_int8_is_of_all_linears_of_the_blocks(make_skeleton, make_recipe):
    whole = slimrank.plan(make_skeleton("llama"), make_recipe())
    part = slimrank.plan(make_skeleton("llama"), make_recipe(targets=["up_proj"]))
    assert whole.size.int8_bytes == part.size.int8_bytes


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_warnings_are_in_the_plan(family, config_folder, make_recipe, recwarn):
    plan = slimrank.plan(config_folder(family), make_recipe())
    assert len(plan.warnings) == 1
    assert "fused tensors stay dense" in plan.warnings[0]
    assert not [w for w in recwarn if issubclass(w.category, CoverageWarning)]


def test_errors_come_before_any_work(config_folder, make_recipe, tmp_path):
    folder = config_folder("llama")
    with pytest.raises(RecipeError, match="nope"):
        slimrank.plan(folder, make_recipe(targets=["nope"]))
    with pytest.raises(BudgetError):
        slimrank.plan(folder, make_recipe(keep=0.001))
    with pytest.raises(ModelError, match="no block list 'nope'"):
        slimrank.plan(folder, make_recipe(blocks="nope"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        slimrank.plan(tmp_path, make_recipe())


def test_gpt2_is_refused(config_folder, make_recipe):
    with pytest.raises(ModelError, match="Conv1D"):
        slimrank.plan(config_folder("gpt2"), make_recipe())


def test_a_compressed_folder_is_refused(compressed_folder, make_recipe):
    with pytest.raises(ModelError, match="compressed already"):
        slimrank.plan(compressed_folder, make_recipe())


def test_a_compressed_model_is_refused(make_compressed, make_recipe):
    model, _ = make_compressed("llama")
    with pytest.raises(ModelError, match="compressed already"):
        slimrank.plan(model, make_recipe())


def test_the_recipes_dtype_decides_the_bytes(config_folder, make_recipe):
    folder = config_folder("llama")
    full = slimrank.plan(folder, make_recipe(dtype="float32")).size
    half = slimrank.plan(folder, make_recipe(dtype="bfloat16")).size
    assert full.model_params == half.model_params
    assert half.weight_bytes < 0.65 * full.weight_bytes


def test_a_config_without_a_dtype(make_folder, make_recipe, tmp_path):
    """`auto` is then the dtype of the weights, as it is for `compress`."""
    folder = make_folder("llama", dtype=torch.bfloat16)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["dtype"]
    path.write_text(json.dumps(values))
    plan = slimrank.plan(folder, make_recipe())
    report = slimrank.compress(folder, make_recipe(), out=tmp_path / "out")
    assert plan.size == report.size


@pytest.mark.parametrize("allocation", ["swift", "global", "threshold"])
def test_a_plan_of_dynamic_ranks_says_that_it_cannot_know_them(
    make_skeleton, make_recipe, allocation
):
    dynamic = slimrank.plan(make_skeleton("llama"), make_recipe(allocation=allocation))
    assert any("uniform ones" in message for message in dynamic.warnings)
    assert dynamic.size == slimrank.plan(make_skeleton("llama"), make_recipe()).size
