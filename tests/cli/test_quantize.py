"""``slimrank quantize`` prints what it did, and errors in one line."""

import json

import pytest
import torch
from typer.testing import CliRunner

from slimrank.checkpoint import read_folder
from slimrank.cli import app

runner = CliRunner()


def assert_others_read(out, seen, text_file):
    """`inspect` says of a folder what is to be `seen`, and `evaluate` measures it."""
    inspected = runner.invoke(app, ["inspect", str(out)])
    assert inspected.exit_code == 0, inspected.output
    assert seen in inspected.stdout
    short = ["--sequence-length", "64", "--num-windows", "2"]
    measured = runner.invoke(app, ["evaluate", str(out), "--text", str(text_file), *short])
    assert measured.exit_code == 0, measured.output
    assert "perplexity" in measured.stdout


def test_it_writes_prints_and_is_read_by_the_others(compressed_folder, text_file, tmp_path):
    out = tmp_path / "int8"
    done = runner.invoke(app, ["quantize", str(compressed_folder), str(out), "--bits", "8"])
    assert done.exit_code == 0, done.output
    assert "lost by rounding" in done.stdout
    assert f"wrote {out}" in done.stdout.replace("\n", "")
    assert_others_read(out, "linears in 8 bits", text_file)


def test_json_is_what_the_folder_holds(compressed_folder, tmp_path):
    out = tmp_path / "int8"
    done = runner.invoke(app, ["quantize", str(compressed_folder), str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == read_folder(out).quantization.model_dump(mode="json")


def test_remapped_factors_are_read_by_the_others(
    make_compressed, tiny_tokenizer, text_file, tmp_path
):
    folder, out = tmp_path / "a", tmp_path / "b"
    model, _ = make_compressed("llama", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    done = runner.invoke(app, ["quantize", str(folder), str(out), "--packing", "remapped"])
    assert done.exit_code == 0, done.output
    assert_others_read(out, "linears in 8 bits, remapped", text_file)


@pytest.mark.parametrize(
    ("options", "source", "message"),
    [
        (["--bits", "4"], "compressed_folder", "bits is 4"),
        (["--bits", "8"], "dense_folder", "not compressed by slimrank"),
        (["--packing", "q"], "compressed_folder", "packing is 'q'"),
        (["--packing", "remapped"], "compressed_folder", "for models of 16 bits"),
    ],
)
def test_errors_are_one_line(options, source, message, tmp_path, request):
    folder, out = request.getfixturevalue(source), tmp_path / "int8"
    done = runner.invoke(app, ["quantize", str(folder), str(out), *options])
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()
