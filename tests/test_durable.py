"""Files that are whole or not there, also where a file system knows no modes and no flush of folders."""

import errno
import os
import stat

import pytest

from ggml_diffusion import durable
from ggml_diffusion.durable import fsync_path, replace_file, replace_text
from ggml_diffusion.errors import UserError


def write(path):
    path.write_text("new")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
def test_a_file_system_without_modes_gets_its_files(tmp_path, monkeypatch, number):
    def refuse(*_: object) -> None:
        raise OSError(number, "no modes here")

    monkeypatch.setattr(os, "chmod", refuse)
    replace_file(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_a_folder_gets_its_files(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "no flush of folders here")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    replace_file(tmp_path / "a", write)
    fsync_path(tmp_path)
    assert (tmp_path / "a").read_text() == "new"


def test_a_folder_that_cannot_be_opened_is_left_to_itself(tmp_path, monkeypatch):
    opened = os.open

    def refuse_folders(path, *rest):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "folders cannot be opened here")
        return opened(path, *rest)

    monkeypatch.setattr(durable.os, "open", refuse_folders)
    replace_file(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINVAL])
def test_a_disk_that_fails_is_one_line_and_the_old_file_stays(tmp_path, monkeypatch, number):
    (tmp_path / "a").write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(number, "the disk fails")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="a: could not be written: the disk fails"):
        replace_file(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_stands_where_the_temporary_file_goes_is_neither_followed_nor_waited_for(tmp_path, kind):
    temporary, other = tmp_path / ".file.tmp", tmp_path / "other"
    other.write_text("somebody else's")
    if kind == "link":
        temporary.symlink_to(other)
    else:
        os.mkfifo(temporary)
    replace_text(tmp_path / "file", "mine")
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "file").is_symlink()
    assert other.read_text() == "somebody else's"
    assert not os.path.lexists(temporary)
