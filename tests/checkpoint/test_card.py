"""What the card says is what the report has, and what it shows can be run."""

import re
import shlex

import pytest
from typer.testing import CliRunner

from slimrank.checkpoint import model_card, read_report
from slimrank.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def report(compressed_folder):
    return read_report(compressed_folder)


@pytest.fixture(scope="module")
def card(report):
    return model_card(report, "small")


def test_its_table_has_the_figures_of_the_report(report, card):
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if "_proj |" in line]
    assert {row[0] for row in rows} == {x.name.rpartition(".")[2] for x in report.linears}
    for kind, number, dense, ranks, kept, promised, measured in rows:
        linears = [x for x in report.linears if x.name.endswith(kind)]
        known = [x.rank for x in linears if x.rank is not None]
        assert int(number) == len(linears)
        assert int(dense) == len(linears) - len(known)
        assert ranks == (f"{min(known)}–{max(known)}" if known else "")
        share = sum(x.params for x in linears) / sum(x.params_before for x in linears)
        assert kept == f"{share:.1%}"
        assert promised == f"{sum(x.predicted_loss for x in linears) / len(linears):.2%}"
        assert measured == f"{sum(x.measured_loss for x in linears) / len(linears):.2%}"


def test_its_commands_are_known(card):
    shown = re.findall(r"slimrank (?:[a-z]+) [^`\n]+", card)
    commands = [shlex.split(line)[1:] for line in shown if "factorised" not in line]
    assert {command[0] for command in commands} >= {"compress", "evaluate", "export", "chat"}
    for name, *arguments in commands:
        text = runner.invoke(app, [name, "--help"]).stdout
        for argument in arguments:
            assert not argument.startswith("--") or argument in text, (name, argument)


def test_it_names_each_engine(card):
    for engine in ("transformers", "vLLM", "SGLang", "ONNX Runtime", "OpenVINO", "GGUF"):
        assert engine in card


def test_it_says_where_it_was_made(report, card):
    environment = report.environment
    assert f"torch {environment['torch']}, transformers {environment['transformers']}" in card
    assert f"On {environment['device']} in {environment['dtype']}" in card


def test_nothing_is_left_to_be_filled_in(card):
    assert "{" not in card
    assert "unknown" not in card


def test_it_speaks_of_the_modelling_file_where_there_is_one(report):
    assert "trust_remote_code" in model_card(report, "small", remote_code=True)
    assert "trust_remote_code" not in model_card(report, "small")
