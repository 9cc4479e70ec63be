"""The commands do what they say, on a tiny model, and flags and YAML say the same thing."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slimrank
from slimrank.checkpoint import has_remote_code
from slimrank.cli import app
from slimrank.cli.options import build_recipe
from slimrank.errors import RecipeError
from slimrank.recipe import CompressionRecipe

runner = CliRunner()
SMALL = ["--effort", "fast", "--num-sequences", "4", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat and the dog ran to the tree . " * 40)
    return path


def run(*arguments: object) -> str:
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def made(dense_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed folder, not to be changed."""
    out = tmp_path_factory.mktemp("made") / "out"
    run("compress", dense_folder, out, "--keep", 0.6, "--calibration", text, *SMALL)
    return out


@pytest.fixture
def compressed(made: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_compress_puts_the_modelling_file_into_the_folder(dense_folder, text, tmp_path):
    out = tmp_path / "out"
    flags = ["--keep", 0.6, "--calibration", text, "--remote-code", *SMALL]
    run("compress", dense_folder, out, *flags)
    assert has_remote_code(out)


def test_compress_prints_the_budget_line_and_writes_a_folder(
    dense_folder, text, count_params, tmp_path
):
    out = tmp_path / "out"
    printed = run("compress", dense_folder, out, "--keep", 0.6, "--calibration", text, *SMALL)
    report = slimrank.CompressionReport.model_validate_json((out / "report.json").read_text())
    assert report.size.line() in printed
    expected = {"config.json", "generation_config.json", "model.safetensors", "recipe.yaml"}
    assert expected | {"report.json", "README.md", "tokenizer.json"} <= {
        p.name for p in out.iterdir()
    }
    assert count_params(AutoModelForCausalLM.from_pretrained(out)) == report.size.model_params


def test_the_same_budget_line_everywhere(dense_folder, compressed):
    line = slimrank.CompressionReport.model_validate_json(
        (compressed / "report.json").read_text()
    ).size.line()
    assert line in run("inspect", compressed)
    assert line in run("plan", dense_folder, "--keep", 0.6, "--effort", "fast")


def test_json_is_all_that_stdout_holds(dense_folder, text, compressed, tmp_path):
    plan = json.loads(run("plan", dense_folder, "--keep", 0.6, "--effort", "fast", "--json"))
    contents = json.loads(run("inspect", compressed, "--json"))
    assert plan["size"] == contents["size"]
    assert {x["name"]: x["rank"] for x in plan["linears"]} == contents["ranks"]
    value = json.loads(
        run("evaluate", compressed, "--text", text, "--sequence-length", 32, "--json")
    )
    assert value["skipped"] == 0
    arguments = ["--keep", 0.6, "--calibration", text, *SMALL, "--json"]
    report = json.loads(run("compress", dense_folder, tmp_path / "again", *arguments))
    assert report["size"] == plan["size"]


def test_evaluate_dense_and_compressed(dense_folder, compressed, text):
    for folder in (dense_folder, compressed):
        printed = run("evaluate", folder, "--text", text, "--sequence-length", 32)
        assert printed.startswith("perplexity ")
    few = run("evaluate", dense_folder, "--text", text, "--sequence-length", 32, "--num-windows", 2)
    assert "in 2 windows of 32" in few


def test_inspect_without_a_report(compressed):
    (compressed / "report.json").unlink()
    printed = run("inspect", compressed)
    assert "no report.json" in printed
    assert "kept " in printed


def test_inspect_with_a_report_of_other_weights(compressed):
    path = compressed / "report.json"
    report = json.loads(path.read_text())
    report["size"]["weight_bytes"] += 8
    path.write_text(json.dumps(report))
    assert "describes other weights" in run("inspect", compressed)


def test_flags_and_yaml_build_the_same_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "method: svd-llm\nbudget: {param_ratio: 0.5, scope: model}\n"
        "calibration: {source: [a.txt], seed: 3}\ntargets: [q_proj]\n"
    )
    flags = build_recipe(
        None,
        method="svd-llm",
        budget__param_ratio=0.5,
        budget__scope="model",
        calibration__source=["a.txt"],
        calibration__seed=3,
        targets=["q_proj"],
        ignore=None,
    )
    assert build_recipe(path) == flags == CompressionRecipe.from_file(path)
    assert build_recipe(path, budget__param_ratio=0.7).budget.param_ratio == 0.7


def test_the_recipe_of_a_folder_makes_it_again(dense_folder, compressed, tmp_path):
    again = tmp_path / "again"
    run("compress", dense_folder, again, "--recipe", compressed / "recipe.yaml")
    one, two = (p / "model.safetensors" for p in (compressed, again))
    assert one.read_bytes() == two.read_bytes()


def test_flags_of_a_sequential_run_and_yaml_build_the_same_recipe(
    dense_folder, text, tmp_path, monkeypatch
):
    path = tmp_path / "r.yaml"
    path.write_text(
        "effort: fast\nmethod: aa-svd\n"
        "budget: {param_ratio: 0.6}\norder: sequential\nanchor: 0.5\nridge: 0.0\n"
        "within_block: greedy\nrefine: fast\n"
        f"calibration: {{source: [{text}], num_sequences: 4, sequence_length: 32}}\n"
    )
    asked = []

    def compress(model, recipe, **others):
        asked.append((recipe, others["options"].memory, others["resume"]))
        raise RecipeError("seen")

    monkeypatch.setattr("slimrank.cli.compress.compress", compress)
    flags = ["--keep", 0.6, "--method", "aa-svd", "--order", "sequential", "--anchor", 0.5]
    flags += ["--ridge", 0.0, "--within-block", "greedy", "--refine", "fast"]
    flags += ["--calibration", text, *SMALL]
    for arguments in (flags, ["--recipe", path], [*flags, "--memory", 0.5, "--resume"]):
        command = ["compress", dense_folder, tmp_path / "out", *arguments]
        assert runner.invoke(app, [str(a) for a in command]).exit_code == 1
    (one, *how), (two, *same), (three, *limited) = asked
    assert one == two == three == CompressionRecipe.from_file(path)
    assert how == same == [None, False]
    assert limited == [500_000_000, True]


def test_a_flag_changes_the_refinement_of_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("budget: {param_ratio: 0.5}\nrefine: {preset: paper, epochs: 3}\n")
    assert (
        build_recipe(path, refine__preset="fast").refine.model_dump().items()
        >= {
            "preset": "fast",
            "epochs": 3,
            "batch_sequences": 8,
        }.items()
    )


def test_two_passes_and_tuning_from_the_command_line(dense_folder, text, tmp_path):
    out = tmp_path / "out"
    arguments = ["--keep", 0.6, "--passes", 2, "--generate", 3, "--tune", 1, "--calibration", text]
    printed = run("compress", dense_folder, out, *arguments, "--held-out-sequences", 2, *SMALL)
    report = slimrank.CompressionReport.model_validate_json((out / "report.json").read_text())
    found = report.tuning
    assert (report.recipe.passes, report.recipe.tune.epochs) == (2, 1)
    assert report.recipe.generated_sequences == 3
    kept = found.epochs[0].held_out_loss if found.kept_epoch else found.start_held_out_loss
    assert f"held-out text {found.start_held_out_loss:.4f} -> {kept:.4f} nats a token" in printed
    assert f"all blocks trained together for {found.kept_epoch} epochs" in printed


def test_a_sequential_run_prints_its_blocks(dense_folder, text, tmp_path):
    out = tmp_path / "out"
    arguments = ["--keep", 0.6, "--method", "aa-svd", "--refine", "fast", "--calibration", text]
    arguments += ["--held-out-sequences", 2, *SMALL, "--resume"]
    printed = run("compress", dense_folder, out, *arguments)
    report = slimrank.CompressionReport.model_validate_json((out / "report.json").read_text())
    assert "aa-svd: mean relative output error (squared)" in printed
    assert "error of each block's output on held-out text" in printed
    for block in report.blocks:
        cells = [
            str(block.index),
            f"{block.unrefined_held_out.relative_error:.4f}",
            f"{block.held_out.relative_error:.4f}",
            f"{block.held_out.cosine_distance:.4f}",
            str(block.refinement.kept_epoch),
        ]
        assert any(line.split()[:5] == cells for line in printed.splitlines())
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_ranks_by_threshold_are_told(dense_folder, text, tmp_path):
    out, how = tmp_path / "out", ["--allocation", "threshold", "--calibration", text]
    printed = run("compress", dense_folder, out, "--keep", 0.6, *how, *SMALL)
    line = next(x for x in printed.splitlines() if x.startswith("ranks by threshold, "))
    report = slimrank.CompressionReport.model_validate_json((out / "report.json").read_text())
    assert f"loss {report.allocation.predicted_change:.2g} nats a token, to first order" in line
    assert line in run("inspect", out).splitlines()


def test_svd_needs_no_text(dense_folder, tmp_path):
    printed = run("compress", dense_folder, tmp_path / "out", "--keep", 0.6, "--method", "svd")
    assert "weight error" in printed


def test_warnings_are_one_line_on_stderr(dense_folder, text, tmp_path):
    arguments = ["--keep", "0.6", "--calibration", str(text), "--num-sequences", "9999"]
    arguments += ["--sequence-length", "64", "--effort", "fast"]
    result = runner.invoke(app, ["compress", str(dense_folder), str(tmp_path / "out"), *arguments])
    assert result.exit_code == 0
    warnings = [x for x in result.stderr.splitlines() if x.startswith("warning: ")]
    assert any("9999 were asked for" in line for line in warnings)


def test_version_and_help():
    assert run("--version").strip() == slimrank.__version__
    for command in ("compress", "plan", "inspect", "evaluate", "demo"):
        assert command in run("--help")
        assert "Usage" in run(command, "--help")
