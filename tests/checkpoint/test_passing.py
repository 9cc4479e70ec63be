import pytest

from slimrank.checkpoint import renamed_when_done
from slimrank.errors import CheckpointError


def write(out, is_file, then=lambda: None):
    with renamed_when_done(out, is_file=is_file) as passing:
        (passing if is_file else passing / "inside").write_text("ours")
        then()


@pytest.mark.parametrize("is_file", [True, False])
def test_it_is_there_once_it_is_whole(is_file, tmp_path):
    out = tmp_path / "deep" / "out.png"
    with renamed_when_done(out, is_file=is_file) as passing:
        (passing if is_file else passing / "inside").write_text("ours")
        assert passing.suffix == ".png" or not is_file
        assert not out.exists()
    assert list(out.parent.iterdir()) == [out]
    assert (out if is_file else out / "inside").read_text() == "ours"


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_nothing_is_left_of_what_was_cut_off(is_file, error, tmp_path):
    def cut_off():
        raise error

    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write(tmp_path / "out", is_file, cut_off)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_file", [True, False])
def test_what_appears_meanwhile_stays(is_file, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="appeared meanwhile"):
        write(out, is_file, lambda: out.write_text("theirs"))
    assert out.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [out]
