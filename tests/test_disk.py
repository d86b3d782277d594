"""Tests of disk.py: a file is as before or complete. Each docstring names its oracle."""
import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from formats import checkpoint, disk, toy
from tests.cli import contents


def fails(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_write_file(tmp_path, monkeypatch, name):
    """Oracle: the old content, when the new one cannot be flushed or renamed."""
    disk.write_file(tmp_path / "x", "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="x could not be written .No space left"):
        patch.setattr(os, name, fails)
        disk.write_file(tmp_path / "x", b"new")
    assert contents(tmp_path) == {"x": b"old"}
    disk.write_file(tmp_path / "x", "new é")
    assert contents(tmp_path) == {"x": "new é".encode()}


@pytest.mark.parametrize("write", [lambda path: path.write_text("x"),
                                   lambda path: save_file({"x": torch.zeros(1)}, path)])
def test_several_files_or_none(tmp_path, write):
    """Oracle: the folder before, when not all can be written: no such file, safetensors' own error."""
    places = [tmp_path / "a", tmp_path / "b"]
    places[0].write_text("old")
    with pytest.raises(OSError, match="I/O|No such file"), disk.replacing(*places) as (a, b):
        a.write_text("new")
        write(b / "no such folder")
    assert contents(tmp_path) == {"a": b"old"}
    with disk.replacing(*places) as (a, b):
        a.write_text("1")
        b.write_text("2")
        assert places[0].read_text() == "old"
    assert contents(tmp_path) == {"a": b"1", "b": b"2"}


def test_synced_before_renamed(tmp_path, monkeypatch):
    """Oracle: the system calls: each file that gets its final name has been synced, whole, before any has."""
    calls, sync, replace = [], os.fsync, os.replace

    def syncing(file):
        calls.append(("sync", os.fstat(file).st_ino, os.fstat(file).st_size))
        sync(file)

    def replacing(source, target):
        calls.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    (tmp_path / "base").mkdir()
    toy.tokenizer().save(str(tmp_path / "base" / "tokenizer.json"))
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    checkpoint.write(tmp_path / "out", {"a": 1}, {"x": torch.zeros(9)}, tmp_path / "base")
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json",
                                                  "tokenizer_config.json"]
    assert [call[0] for call in calls] == ["sync"] * 4 + ["replace"] * 4 and all(size > 0 for _, _, size in calls)
    assert [call[1:] for call in calls[:4]] == [call[1:] for call in calls[4:]]


def test_one_line():
    """Oracle: by hand: of an address its password is not said, nor a token of the Hub, wherever they stand."""
    assert disk.one_line(ValueError("a\n  b\tc")) == "a b c" and disk.one_line(KeyError()) == "KeyError"
    assert disk.one_line(ValueError("x" * 300)) == "x" * 200 + " ..."
    said = disk.one_line("GET https://me:secret@host/x?a=1 and http://proxy:8 failed for hf_" + "a" * 30 + " a@b")
    assert said == "GET https://host/x?a=1 and http://proxy:8 failed for  a@b"


@pytest.mark.parametrize("rank, said", [(None, 1), ("", 1), ("0", 1), ("1", 0), ("10", 0)])
def test_one_of_several_processes_warns(rank, said, monkeypatch, capsys):
    """Oracle: torchrun's environment, where each process reads the same files; without it there is one process."""
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    disk.warn("a.tsv is short")
    assert capsys.readouterr() == ("", "warning: a.tsv is short\n" * said)
