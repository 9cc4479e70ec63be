"""Text from files, folders, JSON lines, a hub data set and the package."""

import json
import re
import sys
from pydoc_data.topics import topics
from types import ModuleType

import pytest

from slimrank.calibration import packaged_text, read_text
from slimrank.errors import TextError
from slimrank.recipe import CalibrationRecipe


def read(*sources, **settings):
    return read_text(CalibrationRecipe(source=tuple(map(str, sources)), **settings))


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "b.txt").write_text("second ü", encoding="utf-8")
    (tmp_path / "a.md").write_text("first", encoding="utf-8")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "n": 1}\n')
    (tmp_path / "skip.py").write_text("not text")
    return tmp_path


def test_one_file(texts):
    assert read(texts / "b.txt") == "second ü"


def test_several_files_in_the_order_given(texts):
    assert read(texts / "b.txt", texts / "a.md") == "second ü\n\nfirst"


def test_a_folder_in_the_order_of_names(texts):
    assert read(texts) == "first\n\nsecond ü\n\nthird\n\nfourth"


def test_json_lines_by_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"body": "here\nand there", "text": "no"}))
    assert read(path, text_column="body") == "here\nand there"


@pytest.mark.parametrize("line", ['{"other": "x"}', "{not json", "[1]", '"text"', "3", "null"])
def test_a_row_without_text_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(TextError, match=r"rows\.jsonl, line 2: no text under 'text'"):
        read(path)


@pytest.mark.parametrize("value", ["null", "[]", "{}"])
def test_a_row_whose_text_is_no_text_is_refused(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{{"text": {value}}}\n')
    with pytest.raises(TextError, match="line 2"):
        read(path)


def test_unicode_line_separators_do_not_cut_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False), "utf-8")
    assert read(path) == "one\u2028two\x85three"


@pytest.mark.parametrize("name", ["missing.txt", "missing.md", "missing.jsonl", "nothing"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(TextError, match=f"no such text file: .*{name}"):
        read(tmp_path / name)


def test_a_missing_relative_file_is_no_hub_data_set():
    with pytest.raises(TextError, match=r"no such text file: ./corpus"):
        read("./corpus")


@pytest.mark.parametrize("content", ["", "  \n \n"])
def test_an_empty_text_is_an_error(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(TextError, match=r"the text is empty: .*empty\.txt"):
        read(path)


def test_a_folder_without_text_is_an_error(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(TextError, match=re.escape(f"no .txt, .md, .jsonl file in {tmp_path}")):
        read(tmp_path)


def test_what_is_not_utf8_is_an_error(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("Käse".encode("latin-1"))
    with pytest.raises(TextError, match=r"cannot read the text .*latin\.txt"):
        read(path)


class Rows(list):
    """What `load_dataset` gives, as far as it is used."""

    def shuffle(self, seed, buffer_size):
        self.seed = seed
        return self


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the `datasets` package."""
    module = ModuleType("datasets")
    module.calls = []
    module.rows = Rows([{"text": "one", "body": "eins"}, {"text": "two", "body": "zwei"}])

    def load_dataset(name, subset, split, streaming):
        assert streaming
        module.calls.append((name, subset, split))
        return module.rows

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_hub_data_set(hub):
    assert read("Salesforce/wikitext", subset="raw", split="test", seed=3) == "one\n\ntwo"
    assert hub.calls == [("Salesforce/wikitext", "raw", "test")]
    assert hub.rows.seed == 3


def test_a_column_of_a_hub_data_set(hub):
    assert read("wikitext", text_column="body") == "eins\n\nzwei"
    assert hub.calls == [("wikitext", None, "train")]


def test_a_column_that_a_hub_data_set_lacks(hub):
    with pytest.raises(TextError, match=r"wikitext.*'nope'"):
        read("wikitext", text_column="nope")


def test_a_row_of_a_hub_data_set_without_text_is_not_read_as_the_word_none(hub):
    hub.rows.append({"text": None, "body": None})
    with pytest.raises(TextError, match="wikitext"):
        read("wikitext")


@pytest.mark.parametrize("error", [FileNotFoundError, ValueError, ConnectionError, RuntimeError])
def test_a_hub_data_set_that_cannot_be_had(hub, error):
    def fail(*_args, **_kwargs):
        raise error("gone\nfor good")

    hub.load_dataset = fail
    with pytest.raises(
        TextError, match=r"neither a text file nor a hub data set: a/b \(gone for good\)"
    ):
        read("a/b")


def test_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"no such text file: a/b; .*pip install slimrank\[hub\]"):
        read("a/b")


def test_no_source_is_the_packaged_text():
    assert read() == packaged_text("calibration")


def test_packaged_parts_share_no_paragraph():
    def paragraphs(part):
        lines = (line.strip() for line in packaged_text(part).splitlines())
        return {line for line in lines if len(line) > 30}

    calibration, evaluation = paragraphs("calibration"), paragraphs("evaluation")
    assert len(calibration) > 1000
    assert len(evaluation) > 100
    assert not calibration & evaluation


def test_every_stretch_of_the_packaged_calibration_text_is_mixed():
    text = packaged_text("calibration")
    assert len(text.encode()) < 1_300_000
    for start in range(0, len(text) - 40_000, 20_000):
        lines = text[start : start + 40_000].split("\n")
        prose = sum(len(line) for line in lines if len(line) > 200)
        assert 0.4 < prose / 40_000 < 0.75, start
        assert sum(line.startswith(("def ", "    def ")) for line in lines) > 1, start


def test_the_packaged_calibration_text_is_not_the_manual_that_benchmarks_test_on():
    def lines(text):
        return {line.strip() for line in text.splitlines() if len(line) > 40}

    assert not lines(packaged_text("calibration")) & lines("\n".join(topics.values()))


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_packaged_text_is_clean(part):
    text = packaged_text(part)
    assert "\ufffd" not in text
    assert "\x00" not in text
    assert "\r" not in text
