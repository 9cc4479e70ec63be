"""Messages are one line that can be printed, whatever a file made them say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimrank.errors import LONGEST, CheckpointError, SlimrankError, in_one_line


@given(text=st.text(st.characters(codec=None, exclude_categories=())))
def test_any_text_becomes_one_line(text):
    line = in_one_line(text)
    assert line.isprintable()
    assert in_one_line(line) == line


@pytest.mark.parametrize("length", [LONGEST, LONGEST + 1, 100_000])
def test_a_long_message_keeps_both_ends(length):
    line = in_one_line("ab" + "x" * (length - 4) + "yz")
    assert len(line) <= LONGEST
    assert line.startswith("ab")
    assert line.endswith("yz")


def test_plain_messages_are_as_they_were():
    message = "no model ‘x’ in /a/b: a rank of 4 – not 5"
    assert str(SlimrankError(message)) == message
    assert str(CheckpointError("a\nb\x1b[2J\ud800")) == "a b\\x1b[2J\\ud800"
