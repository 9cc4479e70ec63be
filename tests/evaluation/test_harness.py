"""Zero-shot accuracy against a direct computation; hostile files of questions."""

import json
import math
import sys

import pytest
import torch

from slimrank.errors import NumericalError, SlimrankError, SlimrankWarning, TextError
from slimrank.evaluation import ChoiceTask, quiet, read_choice_tasks, zero_shot

WORDS = ("cat", "dog", "tree", "old house", "sea", "a")
GOOD = {"context": "a", "choices": [" b", " c"], "gold": 1}


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture
def folder(tmp_path):
    rows = [
        {
            "context": f"The {WORDS[n % 6]} and the",
            "choices": [f" {WORDS[(n + k) % 6]}" for k in range(2 + n % 3)],
            "gold": n % 2,
        }
        for n in range(9)
    ]
    write(tmp_path, "plain", rows)
    partial = [
        {
            "contexts": [f"Say {WORDS[n % 6]}", f"Say {WORDS[(n + 1) % 6]}"],
            "continuation": f" is {WORDS[(n + 2) % 6]}.",
            "gold": n % 2,
        }
        for n in range(7)
    ]
    write(tmp_path, "partial", partial)
    return tmp_path


@torch.no_grad()
def likelihood(model, tokenizer, context, answer):
    """Of the answer's tokens, taken one by one in float64."""
    ids = tokenizer(context + answer)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids)))


def accuracy(model, tokenizer, task, per_character=False):
    right = []
    for pairs, row in zip(task.pairs(), task.rows, strict=True):
        scores = [
            likelihood(model, tokenizer, *pair) / (len(pair[1]) - 1 if per_character else 1)
            for pair in pairs
        ]
        right.append(scores.index(max(scores)) == row["gold"])
    share = sum(right) / len(right)
    return share, math.sqrt(share * (1 - share) / (len(right) - 1))


@pytest.mark.parametrize("compressed", [False, True])
def test_against_a_direct_computation(
    compressed, folder, make_model, make_compressed, tiny_tokenizer
):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    model = make_compressed("llama")[0] if compressed else make_model("llama")
    model.train()
    padding = tiny_tokenizer.pad_token
    tasks = read_choice_tasks(folder, ["plain", "partial"])
    found = zero_shot(model, tiny_tokenizer, tasks, batch_size=4)
    assert model.training
    assert tiny_tokenizer.pad_token == padding
    model.eval()
    for task in tasks:
        result = found[task.name]
        assert (result.accuracy, result.stderr) == pytest.approx(
            accuracy(model, tiny_tokenizer, task)
        )
        assert (result.num_questions, result.num_cut) == (len(task.rows), 0)
        assert result.data_fingerprint == task.fingerprint()
    plain = found["plain"]
    assert (plain.accuracy_norm, plain.stderr_norm) == pytest.approx(
        accuracy(model, tiny_tokenizer, tasks[0], per_character=True)
    )
    assert found["partial"].accuracy_norm is None


def test_a_model_that_knows_gets_all_right(folder, make_model, tiny_tokenizer):
    """The head is made to say 't' after anything; the right answers are of t alone."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    model = make_model("llama")
    token = tiny_tokenizer("t")["input_ids"][-1]
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(32, 96)
        model.lm_head.bias.fill_(0.0)
        model.lm_head.bias[token] = 9.0
    rows = [{"context": "a", "choices": ["zz", "tt", "zt"], "gold": 1}] * 3
    found = zero_shot(model, tiny_tokenizer, [ChoiceTask("known", tuple(rows))])
    assert (found["known"].accuracy, found["known"].stderr) == (1.0, 0.0)


def test_likelihoods_that_are_not_finite_raise(folder, make_model, tiny_tokenizer):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    model = make_model("llama")
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError, match=r"plain, question \d+: a log-likelihood is not"):
        zero_shot(model, tiny_tokenizer, read_choice_tasks(folder, ["plain"]))


def test_answers_that_are_cut_are_counted(make_model, tiny_tokenizer):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    long = {"context": "x" * 127, "choices": [" a", " bcd"], "gold": 0}  # 1 + 127 + 2 or 4 tokens
    task = ChoiceTask("long", (long, {**long, "context": "x"}))
    with pytest.warns(SlimrankWarning, match="2 answers of long do not fit"):
        found = zero_shot(make_model("llama"), tiny_tokenizer, [task])
    assert found["long"].num_cut == 2
    assert found["long"].num_questions == 2


def test_nothing_goes_to_the_network(folder, make_model, tiny_tokenizer, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import datasets

    asked = []
    monkeypatch.setattr(datasets.load, "get_session", lambda: asked.append("a session"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    zero_shot(make_model("llama"), tiny_tokenizer, read_choice_tasks(folder, ["plain"]))
    assert asked == []
    assert datasets.config.HF_HUB_OFFLINE is False


def test_without_lm_eval(monkeypatch, make_model, tiny_tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SlimrankError, match=r"pip install 'slimrank\[eval\]'"):
        zero_shot(make_model("llama"), tiny_tokenizer, [ChoiceTask("a", (GOOD, GOOD))])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a question is {context, choices, gold} or {contexts, continuation, gold}"),
        (json.dumps({"context": "a", "gold": 0}), "a question is"),
        (json.dumps({**GOOD, "choices": [" b"]}), "choices is to be a list of at least 2"),
        (json.dumps({**GOOD, "choices": "bc"}), "choices is to be a list"),
        (json.dumps({**GOOD, "choices": [" b", 3]}), "choices and context are to be text"),
        (json.dumps({**GOOD, "context": None}), "are to be text"),
        (json.dumps({**GOOD, "choices": [" b", " "]}), "an empty text cannot be scored"),
        (json.dumps({**GOOD, "gold": 2}), "gold is 2; it numbers one of 2 answers"),
        (json.dumps({**GOOD, "gold": -1}), "gold is -1"),
        (json.dumps({**GOOD, "gold": True}), "gold is True"),
        (json.dumps({"contexts": ["a", "b"], "continuation": "c", "gold": 0}), "of both forms"),
    ],
)
def test_lines_that_are_no_question(line, message, tmp_path):
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(TextError) as caught:
        read_choice_tasks(tmp_path, ["bad"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files(tmp_path, folder):
    with pytest.raises(TextError, match=r"no such task: .*other.jsonl; there are partial, plain"):
        read_choice_tasks(folder, ["other"])
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(TextError, match="cannot read the task"):
        read_choice_tasks(tmp_path, ["latin"])
    write(tmp_path, "one", [GOOD])
    with pytest.raises(TextError, match="1 questions; an accuracy needs at least 2"):
        read_choice_tasks(tmp_path, ["one"])


def test_limit_takes_the_first_and_changes_the_fingerprint(folder):
    (whole,) = read_choice_tasks(folder, ["plain"])
    (first,) = read_choice_tasks(folder, ["plain"], limit=4)
    assert first.rows == whole.rows[:4]
    assert first.fingerprint() != whole.fingerprint()


def test_quiet_puts_levels_back():
    import logging
    import warnings

    logger = logging.getLogger("some.package")
    logger.setLevel(logging.INFO)
    with quiet("some.package"):
        warnings.warn("unheard", stacklevel=1)
        assert logger.level == logging.ERROR
    assert logger.level == logging.INFO
