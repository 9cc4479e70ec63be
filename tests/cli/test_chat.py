"""``slimrank chat`` answers what is typed, piped or given."""

import json
import shutil

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from slimrank.cli import app

runner = CliRunner()
SHORT = ["--max-new-tokens", "5"]


@pytest.fixture(scope="module")
def folder(compressed_folder, tmp_path_factory):
    copied = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(compressed_folder, copied)
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(copied)
    return copied


def test_prompts_are_answered_in_turn(folder):
    command = ["chat", str(folder), "--prompt", "a cat", "--prompt", "a dog", "--json", *SHORT]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["prompt"], second["prompt"]) == ("a cat", "a dog")
    assert 0 < first["tokens"] <= 5
    assert first["seconds"] > 0
    shown = runner.invoke(app, ["chat", str(folder), "--prompt", "a cat", *SHORT])
    assert shown.stdout == first["answer"] + "\n"


def test_lines_are_answered_until_the_end(folder):
    typed = "a cat\n\n/new\na cat\n/exit\nnever\n"
    done = runner.invoke(app, ["chat", str(folder), *SHORT, "--json"], input=typed)
    assert done.exit_code == 0, done.output
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["a cat", "a cat"]
    assert answers[0]["answer"] == answers[1]["answer"]  # nothing was remembered


def test_a_line_that_is_too_long_does_not_end_the_talk(folder):
    done = runner.invoke(app, ["chat", str(folder), *SHORT], input="x" * 200 + "\na cat\n")
    assert done.exit_code == 0, done.output
    assert "the model is made for 128" in done.stderr
    assert done.stdout.strip()


def test_it_says_that_there_is_no_template(compressed_folder):
    done = runner.invoke(app, ["chat", str(compressed_folder), "--prompt", "a", *SHORT])
    assert "no chat template" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", " "], "nothing to answer"),
        (["--prompt", "x" * 200], "the model is made for 128"),
        (["--prompt", "a", "--temperature", "inf"], "--temperature is inf"),
    ],
)
def test_errors_are_one_line(folder, options, message):
    done = runner.invoke(app, ["chat", str(folder), *options])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("error:") == 1


def test_a_folder_that_is_not_there(tmp_path):
    done = runner.invoke(app, ["chat", str(tmp_path / "none"), "--prompt", "a"])
    assert done.exit_code == 1
    assert "none" in done.stderr
