"""Tests of disk.py: a file is as before or complete. Each docstring names its oracle."""
import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from formats import disk
from formats import checkpoint
from data import TASKS
from formats import glue, toy


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def fails(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_file(tmp_path, monkeypatch):
    """Oracle: the old content, when the new one cannot be flushed or renamed."""
    path = tmp_path / "x"
    disk.write_file(path, "old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(OSError, match="x could not be written .No space left"):
                disk.write_file(path, b"new")
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    disk.write_file(path, "new é")
    assert path.read_bytes() == "new é".encode()


@pytest.mark.parametrize("name", ["fsync", "second", "safetensors"])
def test_several_files_or_none(tmp_path, monkeypatch, name):
    """Oracle: the folder before, when not all can be written: a full disk, no file, safetensors' error."""
    (tmp_path / "a").write_text("old")
    if name == "fsync":
        monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="I/O|No such file" if name != "fsync" else "No space left"):
        with disk.replacing(tmp_path / "a", tmp_path / "b") as (a, b):
            a.write_text("new")
            if name == "fsync":
                b.write_text("new")
            if name == "safetensors":
                save_file({"x": torch.zeros(1)}, tmp_path / "no such folder" / "b")
    assert contents(tmp_path) == {"a": b"old"}
    monkeypatch.undo()
    with disk.replacing(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write_text("1")
        b.write_text("2")
        assert (tmp_path / "a").read_text() == "old"
    assert contents(tmp_path) == {"a": b"1", "b": b"2"}


@pytest.mark.parametrize("kind", ["file", "submission", "checkpoint"])
def test_synced_before_renamed(tmp_path, monkeypatch, kind):
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
    if kind == "file":
        disk.write_json(tmp_path / "out", {"a": 1})
    elif kind == "submission":
        glue.write_submission(tmp_path / "out", TASKS["rte"], [0, 1], "mine")
    else:
        checkpoint.write(tmp_path / "out", {"a": 1}, {"x": torch.zeros(9)}, tmp_path / "base")
        assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json",
                                                      "tokenizer_config.json"]
    n = len(calls) // 2
    assert n == (4 if kind == "checkpoint" else 1) and all(size > 0 for _, _, size in calls)
    assert [call[0] for call in calls] == ["sync"] * n + ["replace"] * n
    assert [call[1:] for call in calls[:n]] == [call[1:] for call in calls[n:]]


def test_one_line():
    """Oracle: by hand."""
    assert disk.one_line(ValueError("a\n  b\tc")) == "a b c" and disk.one_line(KeyError()) == "KeyError"
    assert disk.one_line(ValueError("x" * 300)) == "x" * 200 + " ..."
