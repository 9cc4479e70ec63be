"""``slimrank benchmark`` prints a table or JSON, and errors in one line."""

import json

import pytest
from typer.testing import CliRunner

from slimrank.cli import app

runner = CliRunner()
SHORT = ["--batches", "1,2", "--contexts", "4", "--new-tokens", "1", "--rounds", "1"]


def test_a_table_holds_the_model_against_another(compressed_folder, dense_folder):
    command = ["benchmark", str(compressed_folder), "--against", str(dense_folder), *SHORT]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    names = [line.split()[0] for line in lines[2:6]]
    assert names == [compressed_folder.name, dense_folder.name] * 2
    assert lines[3].count("x") >= 2
    assert f"faster: {compressed_folder.name} over this one" in done.stdout


def test_json_has_all_seconds(dense_folder):
    done = runner.invoke(app, ["benchmark", str(dense_folder), *SHORT, "--json"])
    assert done.exit_code == 0, done.output
    (model,) = json.loads(done.stdout)["models"]
    assert [case["batch"] for case in model["cases"]] == [1, 2]
    case = model["cases"][1]
    assert case["decode_rate"] == pytest.approx(2 / case["decode_seconds"][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "1;8"], "--batches is '1;8'; give whole numbers"),
        (["--contexts", ""], "--contexts is ''"),
        (["--rounds", "0"], "rounds is 0"),
        (["--dtype", "int3"], "int3"),
        (["--device", "cuda:99"], "cuda"),
    ],
)
def test_errors_are_one_line(dense_folder, options, message):
    done = runner.invoke(app, ["benchmark", str(dense_folder), *options])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
