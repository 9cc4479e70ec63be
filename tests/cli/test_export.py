"""``slimrank export`` prints what it did, and errors in one line."""

import json

import pytest
from typer.testing import CliRunner

from slimrank import compress
from slimrank.checkpoint import has_remote_code, weight_file_bytes
from slimrank.cli import app

runner = CliRunner()


def test_it_writes_and_prints(compressed_folder, tmp_path):
    done = runner.invoke(app, ["export", str(compressed_folder), str(tmp_path / "dense")])
    assert done.exit_code == 0, done.output
    assert "linears multiplied out" in done.stdout
    assert f"wrote {tmp_path / 'dense'}" in done.stdout.replace("\n", "")


def test_json_says_the_same(compressed_folder, tmp_path):
    out = tmp_path / "dense"
    done = runner.invoke(app, ["export", str(compressed_folder), str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["weight_bytes"] == weight_file_bytes(out)


def test_a_copy_with_the_modelling_file(compressed_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["export", str(compressed_folder), str(out), "--to", "remote-code"]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "modeling_low_rank.py loads" in done.stdout
    assert has_remote_code(out)
    arguments[2] = str(tmp_path / "again")
    done = runner.invoke(app, [*arguments, "--json"])
    assert json.loads(done.stdout)["file"] == "modeling_low_rank.py"


def test_a_graph_is_written_and_nothing_else_is_printed(
    make_folder, make_recipe, windows, tmp_path
):
    small, out = tmp_path / "small", tmp_path / "out"
    compress(make_folder("llama", num_hidden_layers=1), make_recipe(), out=small, windows=windows)
    done = runner.invoke(app, ["export", str(small), str(out), "--to", "onnx", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["form"] == "onnx"
    assert done.stderr == ""
    assert (out / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("dense_folder", [], "not compressed by slimrank"),
        (
            "compressed_folder",
            ["--to", "gguf"],
            "--to is 'gguf'; it is one of dense, onnx, openvino, remote-code",
        ),
    ],
)
def test_errors_are_one_line(source, options, message, request, tmp_path):
    folder = request.getfixturevalue(source)
    done = runner.invoke(app, ["export", str(folder), str(tmp_path / "out"), *options])
    assert done.exit_code == 1
    assert message in done.output
    assert not list(tmp_path.iterdir())
