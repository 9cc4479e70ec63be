"""A profile and the sizes made from it, through the command line; bad ones in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import slimrank
from slimrank.cli import app
from slimrank.cli.options import build_recipe

SMALL = [
    "--effort",
    "fast",
    "--num-sequences",
    "4",
    "--sequence-length",
    "32",
    "--held-out-sequences",
    "2",
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:uniform ranks do better:slimrank.errors.NumericalWarning"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat and the dog ran to the tree . " * 200)
    return path


@pytest.fixture(scope="module")
def other_text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text("a hill and a lake and a road that no one walks twice . " * 200)
    return path


@pytest.fixture(scope="module")
def folder(dense_folder, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "profile"
    run("profile", dense_folder, out, "--calibration", text, *SMALL)
    return out


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fails(*arguments: object) -> str:
    """Run, expect exit code 1, and give the one line on stderr."""
    result = invoke(*arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    assert "Traceback" not in result.output
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    return line


def test_profile_says_what_it_will_take_and_took(dense_folder, text, tmp_path):
    out = tmp_path / "profile"
    arguments = [dense_folder, out, "--calibration", text, *SMALL]
    result = invoke("profile", *arguments)
    assert result.exit_code == 0, result.output
    assert "the profile will take about 0.000 GB; --spectra-only keeps less" in result.stderr
    assert "block influence" in result.stdout
    assert "14 linears, 128 tokens" in result.stdout
    size = sum(path.stat().st_size for path in out.iterdir())
    assert f"written to {out}, {size / 1e6:.1f} MB" in result.stdout
    found = slimrank.read_profile(out)
    assert found.held_out().tokens == 64


def test_a_profile_that_is_cut_off_goes_on(dense_folder, text, folder, tmp_path, monkeypatch):
    out, real = tmp_path / "profile", slimrank.checkpoint.profile_state.ProfileState.save
    command = ["profile", dense_folder, out, "--calibration", text, *SMALL, "--json"]

    def stop(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("slimrank.checkpoint.profile_state.ProfileState.save", stop)
        result = invoke(*command, "--resume")
    assert (result.exit_code, result.stdout) == (130, "")
    lines = result.stderr.splitlines()
    assert "note: nothing is kept of an earlier run; this one begins at the start" in lines
    assert lines[-1] == (
        "interrupted: finished blocks are kept; go on: slimrank profile … --resume"
    )
    assert [path.name for path in tmp_path.iterdir()] == [".profile.unfinished"]
    line = fails(*command)
    assert "go on with --resume, or delete it" in line
    assert "begun with another choice of --kv" in fails(*command, "--resume", "--kv")
    result = invoke(*command, "--resume")
    assert "note: " not in result.stderr
    assert json.loads(result.stdout)["files"] == slimrank.read_profile(folder).manifest.files
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


def test_a_profile_interrupted_before_the_first_block(dense_folder, text, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("slimrank.profile_pass.solve", stop)
    result = invoke("profile", dense_folder, tmp_path / "out", "--calibration", text, *SMALL)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted: nothing was kept"
    assert not list(tmp_path.iterdir())


def test_json_is_all_that_stdout_holds(dense_folder, text, tmp_path):
    out = tmp_path / "profile"
    arguments = [dense_folder, out, "--calibration", text, *SMALL, "--spectra-only", "--json"]
    values = json.loads(run("profile", *arguments))
    assert values["files"].keys() == {"spectra.safetensors", "held_out.safetensors"}
    assert values == json.loads((out / "profile.json").read_text())


def test_a_recipe_file_and_kv(dense_folder, text, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"budget: {{param_ratio: 0.001}}\ntargets: [up_proj]\ncalibration: {{source: [{text}], "
        "num_sequences: 4, sequence_length: 32, held_out_sequences: 2}\n"
    )
    run("profile", dense_folder, tmp_path / "profile", "--recipe", recipe, "--kv")
    names = slimrank.read_profile(tmp_path / "profile").linears
    assert {n.rsplit(".", 1)[1] for n in names} == {"up_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("keep", [0.7, 0.4])
def test_compress_from_a_profile(dense_folder, text, folder, tmp_path, keep):
    direct, built = tmp_path / "direct", tmp_path / "built"
    run("compress", dense_folder, direct, "--keep", keep, "--calibration", text, *SMALL)
    arguments = ["--keep", keep, "--profile", folder, "--effort", "fast"]
    printed = run("compress", dense_folder, built, *arguments)
    assert "build " in printed
    assert "calibrate " not in printed
    one, other = (path / "model.safetensors" for path in (direct, built))
    assert one.read_bytes() == other.read_bytes()
    rows = [x for x in printed.splitlines() if "_proj" in x]
    assert rows
    assert all(row.rstrip().endswith("-") for row in rows)  # no moments, so no stored losses
    assert "kept " in run("inspect", built)


def test_the_same_calibration_may_be_named(dense_folder, text, folder, tmp_path):
    arguments = ["--keep", 0.7, "--profile", folder, "--calibration", text, *SMALL]
    run("compress", dense_folder, tmp_path / "out", *arguments)


def test_dynamic_ranks_from_a_profile(dense_folder, folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["--keep", 0.7, "--profile", folder, "--allocation", "swift", "--json"]
    report = slimrank.CompressionReport.from_json(
        run("compress", dense_folder, out, *arguments), "stdout"
    )
    assert len(report.allocation.trials) == 11
    assert report.allocation.held_out_tokens == 64
    printed = run("inspect", out)
    assert "perplexity on 64 held-out tokens of the calibration text" in printed
    for trial in report.allocation.trials:
        assert f"{trial.perplexity:.4f}" in printed
    assert f"{report.allocation.uniform_perplexity:.4f}" in printed
    chosen = report.allocation.importance_weight
    assert f"ranks by importance weight {chosen:g}, retained share 0.5" in printed


def test_dynamic_ranks_in_one_go(dense_folder, text, tmp_path):
    arguments = ["--keep", 0.7, "--calibration", text, *SMALL, "--allocation", "swift"]
    arguments += ["--importance-weight", 0.4, "--retained-share", 0.2, "--importance-after-norm"]
    printed = run("compress", dense_folder, tmp_path / "out", *arguments)
    assert "ranks by importance weight 0.4, retained share 0.2" in printed
    assert "held-out" not in printed
    recipe = slimrank.CompressionRecipe.from_file(tmp_path / "out" / "recipe.yaml")
    assert recipe.swift.importance_after_norm
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_plan_says_what_a_profile_takes(dense_folder):
    values = json.loads(run("plan", dense_folder, "--keep", 0.7, "--json"))
    assert values["profile_bytes"] > 0
    said = f"a profile would take {values['profile_bytes'] / 1e9:.2f} GB on disk"
    assert said in run("plan", dense_folder, "--keep", 0.7)


def test_flags_and_yaml_build_the_same_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "budget: {param_ratio: 0.5}\nallocation: swift\nkv_cache: {keep: 0.5}\n"
        "swift: {importance_weight: 0.0, retained_share: 0.2, importance_after_norm: true}\n"
        "calibration: {held_out_sequences: 0}\n"
    )
    flags = build_recipe(
        None,
        budget__param_ratio=0.5,
        allocation="swift",
        kv_cache__keep=0.5,
        swift__importance_weight=0.0,  # falsy, and given
        swift__retained_share=0.2,
        swift__importance_after_norm=True,
        calibration__held_out_sequences=0,
    )
    assert build_recipe(path) == flags


# What is bad is told in one line.


def test_a_profile_of_another_model(make_folder, folder, tmp_path):
    other = make_folder("llama", seed=3)
    arguments = ["--keep", 0.7, "--profile", folder, "--effort", "fast"]
    line = fails("compress", other, tmp_path / "out", *arguments)
    assert "is a profile of" in line
    assert "with other weights than" in line
    assert not list(tmp_path.iterdir())


def test_a_profile_in_another_dtype(dense_folder, folder, tmp_path):
    arguments = ["--keep", 0.7, "--profile", folder, "--dtype", "bfloat16"]
    line = fails("compress", dense_folder, tmp_path / "out", *arguments)
    assert "profile in float32; the model is in bfloat16" in line


def test_a_profile_on_other_text(dense_folder, other_text, folder, tmp_path):
    arguments = ["--keep", 0.7, "--profile", folder, "--calibration", other_text, *SMALL]
    line = fails("compress", dense_folder, tmp_path / "out", *arguments)
    assert "a profile on other text than the recipe's" in line
    assert not list(tmp_path.iterdir())


def test_no_profile(dense_folder, text, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path, text, dense_folder):
        line = fails("compress", dense_folder, tmp_path / "out", "--keep", 0.7, "--profile", path)
        assert "holds no profile.json; it is no profile" in line


@pytest.mark.parametrize("name", ["profile.json", "spectra.safetensors", "block-00001.safetensors"])
def test_a_truncated_profile(dense_folder, folder, tmp_path, name):
    spoilt = Path(shutil.copytree(folder, tmp_path / "profile"))
    content = (spoilt / name).read_bytes()
    (spoilt / name).write_bytes(content[: len(content) // 2])
    arguments = ["--keep", 0.7, "--effort", "fast", "--profile", spoilt]
    line = fails("compress", dense_folder, tmp_path / "out", *arguments)
    assert f"{name} is damaged" in line
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


def test_spectra_only_does_not_compress(dense_folder, text, tmp_path):
    out = tmp_path / "profile"
    run("profile", dense_folder, out, "--calibration", text, *SMALL, "--spectra-only")
    arguments = ["--keep", 0.7, "--effort", "fast", "--profile", out]
    line = fails("compress", dense_folder, tmp_path / "out", *arguments)
    assert "holds spectra only" in line


def test_out_of_a_profile_exists(dense_folder, folder, tmp_path):
    for out in (folder, tmp_path):
        assert "exists already" in fails("profile", dense_folder, out)
        line = fails("compress", dense_folder, out, "--keep", 0.7, "--profile", folder)
        assert "exists already" in line


def test_nothing_held_out(dense_folder, text, tmp_path):
    arguments = ["--keep", 0.7, "--calibration", text, "--allocation", "swift"]
    arguments += ["--held-out-sequences", 0, "--sequence-length", 32]
    line = fails("compress", dense_folder, tmp_path / "out", *arguments)
    assert "no held-out text" in line
    assert "--importance-weight" in line


@pytest.mark.parametrize(
    ("flag", "value", "key"),
    [
        ("--importance-weight", 1.5, "swift.importance_weight"),
        ("--importance-weight", -0.1, "swift.importance_weight"),
        ("--retained-share", 2, "swift.retained_share"),
        ("--allocation", "greedy", "allocation"),
        ("--kv-keep", 0, "kv_cache.keep"),
        ("--kv-keep", 1.1, "kv_cache.keep"),
        ("--held-out-sequences", -1, "calibration.held_out_sequences"),
    ],
)
def test_values_out_of_range(dense_folder, tmp_path, flag, value, key):
    line = fails("compress", dense_folder, tmp_path / "out", "--keep", 0.7, f"{flag}={value}")
    assert f"recipe: {key}: " in line


def test_a_method_that_needs_no_profile(dense_folder, tmp_path):
    line = fails("profile", dense_folder, tmp_path / "out", "--method", "svd")
    assert "svd looks at no moments of activations" in line
    line = fails("profile", dense_folder, tmp_path / "out", "--recipe", anchored(tmp_path))
    assert "aa-svd looks at what arrives in the compressed model" in line
    assert "a profile by swift-svd serves it" in line


def anchored(folder: Path) -> Path:
    path = folder / "anchored.yaml"
    path.write_text("method: aa-svd\nbudget: {param_ratio: 0.5}\n")
    return path


def test_an_anchored_method_takes_its_ranks_from_a_profile(dense_folder, folder, tmp_path):
    flags = ["--keep", 0.7, "--profile", folder, "--allocation", "swift"]
    flags += ["--importance-weight", 0.4, "--json"]
    one, other = (
        slimrank.CompressionReport.from_json(
            run("compress", dense_folder, tmp_path / method, *flags, "--method", method), "stdout"
        )
        for method in ("swift-svd", "aa-svd")
    )
    assert [x.rank for x in one.linears] == [x.rank for x in other.linears]
    assert other.recipe.calibration == one.recipe.calibration
    assert len(other.blocks) == 2


def test_weights_that_are_not_finite(make_model, tiny_tokenizer, text, tmp_path):
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    line = fails("profile", tmp_path / "model", tmp_path / "out", "--calibration", text, *SMALL)
    assert "model.layers.1.mlp.up_proj.weight" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
