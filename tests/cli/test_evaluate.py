"""`slimrank evaluate`: perplexity, answers to local questions, or both; errors by name."""

import json
import sys

import pytest
from typer.testing import CliRunner

from slimrank.cli import app
from slimrank.evaluation import read_choice_tasks, zero_shot
from slimrank.source import load_model, load_tokenizer, parse_source


@pytest.fixture
def folder(tmp_path):
    """Two tasks, one of each form."""
    plain = [
        {"context": f"The {word} and", "choices": [" a cat", " dogs", " it"], "gold": n % 3}
        for n, word in enumerate(("cat", "dog", "sea", "old tree"))
    ]
    partial = [
        {"contexts": [f"Say {word}", "Say it"], "continuation": " at once.", "gold": n % 2}
        for n, word in enumerate(("cat", "dog", "sea"))
    ]
    for name, rows in {"plain": plain, "partial": partial}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def run(dense_folder):
    """`run(*flags, code=0)` gives stdout and stderr."""

    def run(*flags, code=0):
        arguments = ["evaluate", dense_folder, "--sequence-length", 32, *flags]
        result = CliRunner().invoke(app, [str(x) for x in arguments])
        assert result.exit_code == code, (result.output, result.exception)
        return result.stdout, result.stderr

    return run


@pytest.fixture
def direct(dense_folder, folder):
    """Results of the library itself, by task."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    source = parse_source(str(dense_folder))
    tasks = read_choice_tasks(folder, ["partial", "plain"])
    return zero_shot(load_model(source, "auto"), load_tokenizer(source), tasks)


def test_a_table_of_accuracies(run, folder, direct):
    printed, said = run("--zero-shot", folder)
    title, head, *rows = printed.splitlines()
    assert title == "zero-shot accuracy, %"
    assert head.split() == ["task", "questions", "accuracy"]
    expected = {
        name: [str(found.num_questions), f"{100 * found.accuracy:.1f}", f"{100 * found.stderr:.1f}"]
        for name, found in direct.items()
    }
    for row, name in zip(rows, ("partial", "plain"), strict=False):
        assert row.replace("±", " ").split() == [name, *expected[name]]
    mean = (direct["plain"].accuracy + direct["partial"].accuracy) / 2
    assert len(rows) == 3
    assert rows[2].startswith("mean of tasks")
    assert rows[2].split()[3:5] == ["7", f"{100 * mean:.1f}"]
    assert "partial (1 of 2): 3 questions" in said
    assert "plain (2 of 2): 4 questions" in said


def test_json_has_both(run, folder, text_file, direct):
    alone = json.loads(run("--text", text_file, "--num-windows", 2, "--json")[0])
    both = json.loads(
        run("--text", text_file, "--num-windows", 2, "--zero-shot", folder, "--json")[0]
    )
    assert "zero_shot" not in alone
    asked = both.pop("zero_shot")
    assert {**both, "seconds": 0} == {**alone, "seconds": 0}
    assert asked["tasks"] == {name: found.model_dump() for name, found in direct.items()}
    errors = [found.stderr for found in direct.values()]
    assert asked["stderr"] == pytest.approx(sum(e**2 for e in errors) ** 0.5 / 2)


def test_both_on_stdout(run, folder, text_file):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    printed, _ = run("--text", text_file, "--num-windows", 2, "--zero-shot", folder)
    lines = printed.splitlines()
    assert lines[0].startswith("perplexity ")
    assert lines[1] == "zero-shot accuracy, %"


def test_some_tasks_and_the_first_questions(run, folder):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    printed, _ = run("--zero-shot", folder, "--tasks", "plain, partial", "--limit", 2, "--json")
    tasks = json.loads(printed)["zero_shot"]["tasks"]
    assert [(name, task["num_questions"]) for name, task in tasks.items()] == [
        ("plain", 2),
        ("partial", 2),
    ]
    printed, _ = run("--zero-shot", folder, "--tasks", "plain", "--json")
    assert list(json.loads(printed)["zero_shot"]["tasks"]) == ["plain"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing to evaluate on: give --text, --zero-shot or both"),
        (("--text", "t.txt", "--tasks", "plain"), "--tasks and --limit are for --zero-shot FOLDER"),
        (("--text", "t.txt", "--limit", 2), "--tasks and --limit are for --zero-shot FOLDER"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, run):
    printed, said = run(*flags, code=1)
    assert printed == ""
    assert said.splitlines() == [f"error: {message}"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("other", "no such task: "),
        ("plain,plain", "'plain' is no name of a task, or is named twice"),
        ("../plain", "'../plain' is no name of a task"),
        ("", "'' is no name of a task"),
    ],
)
def test_tasks_that_are_not_there(tasks, message, run, folder, monkeypatch):
    monkeypatch.setattr("slimrank.cli.evaluate.require_harness", lambda: None)
    _, said = run("--zero-shot", folder, "--tasks", tasks, code=1)
    assert said.startswith(f"error: {message}")
    assert len(said.splitlines()) == 1


def test_a_folder_without_questions(run, tmp_path, monkeypatch):
    monkeypatch.setattr("slimrank.cli.evaluate.require_harness", lambda: None)
    _, said = run("--zero-shot", tmp_path / "none", code=1)
    assert said == f"error: no file of questions, <task>.jsonl, in {tmp_path / 'none'}\n"


def test_an_answer_that_is_longer_than_the_context(run, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    row = json.dumps({"context": "a", "choices": [" b" * 100, " c"], "gold": 0})
    (tmp_path / "long.jsonl").write_text(f"{row}\n{row}\n")
    _, said = run("--zero-shot", tmp_path, code=1)
    assert "lm-eval cannot score these questions: an answer may be longer than" in said


def test_without_lm_eval_nothing_is_begun(run, folder, text_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    printed, said = run("--zero-shot", folder, "--text", text_file, code=1)
    assert printed == ""
    assert said == "error: zero-shot accuracy needs lm-eval: pip install 'slimrank[eval]'\n"
