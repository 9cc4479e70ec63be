"""What is synced, and which answers of a file system are no failure."""

import errno
import os
from pathlib import Path

import pytest

from slimrank.checkpoint.durable import sync_all, sync_folder


@pytest.fixture
def synced(monkeypatch):
    """Paths that were synced, in order."""
    done, real = [], os.fsync

    def fsync(descriptor):
        done.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return done


def test_all_files_and_the_names_in_all_folders(tmp_path, synced):
    (tmp_path / "in").mkdir()
    for name in ("a", "in/b"):
        (tmp_path / name).write_text("x")
    sync_all(tmp_path)
    assert sorted(synced[:2]) == [str(tmp_path / "a"), str(tmp_path / "in" / "b")]
    assert synced[2:] == [str(tmp_path / "in"), str(tmp_path)]
    synced.clear()
    sync_all(tmp_path, ["a"])
    assert synced == [str(tmp_path / "a"), str(tmp_path)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_file_system_that_does_not_sync_folders(number, tmp_path, monkeypatch):
    def refuse(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)
    (tmp_path / "a").write_text("x")
    with pytest.raises(OSError, match=os.strerror(number)):  # of a file it is a failure
        sync_all(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_other_failures_are_told(number, tmp_path, monkeypatch):
    def refuse(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync_folder(tmp_path)
