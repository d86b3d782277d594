"""What the tests of the command line share: small data, runs that are broken off, what a refusal is."""
import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest

import data
from formats import toy
import train

BUSY = "--eval-steps 3 --save-steps 2 --max-steps 8"       # with 6 steps to an epoch, of all kinds of steps
on_unix = pytest.mark.skipif(os.name == "nt", reason="links, signals, fork and locks as Unix has them")

# ---- data --------------------------------------------------------------------------------------

def sentences(n, seed):
    """n rows of the demo's words: (text, label) with labels that a model can learn."""
    split = toy.language("adapt", n, seed)
    return [(text, label) for (text,), label in zip(split.texts, split.labels)]


def write_task(name, folder=Path("glue"), n=48):
    """Small files in the official layout of a task, of the demo's words; {split: its file}.

    24 rows each, but n for train.
    """
    task = data.TASKS[name]
    paths = {}
    for number, split in enumerate(task.rows):
        labelled = not split.startswith("test")
        columns = ["index", *task.texts]
        if labelled:
            columns.append(task.label)
        rows = [columns]
        if labelled and task.header:                       # CoLA: no header line
            columns = list(task.header)
            rows = []
        for i, (text, label) in enumerate(sentences(n if split == "train" else 24, number)):
            value = f"{label * 3 + i % 3:.1f}"             # a score from 0 to 5
            if task.labels:
                value = task.labels[(label + i % 2) % len(task.labels)]
            row = dict.fromkeys(columns, "x")
            row["index"] = str(i)
            row.update(dict.fromkeys(task.texts, text))
            row[task.label] = value
            rows.append([row[column] for column in columns])
        paths[split] = folder / task.folder / f"{split}.tsv"
        paths[split].parent.mkdir(parents=True, exist_ok=True)
        paths[split].write_text("".join("\t".join(row) + "\n" for row in rows))
    return paths


# ---- runs --------------------------------------------------------------------------------------

def contents(place):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in Path(place).iterdir() if path.is_file()}


def refused(done, *says):
    """One error for the user, status 2."""
    assert done.status == 2 and len(done.errors) == 1, done.err
    assert done.errors[0].startswith("error: "), done.err
    assert all(word in done.errors[0] for word in says), done.err


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing catches it."""


def die(*_):
    raise Killed


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def at_step(step, action, where="task_loss"):
    """Meanwhile the action is taken once: in that step of a run, or when train.py's `where` is called next."""
    loss, steps, taken = train.task_loss, 0, False

    def wrapped(real):
        def call(*arguments):
            nonlocal steps, taken
            steps += real is loss                          # called once a step, and not to evaluate
            if steps == step and real is place and not taken:
                taken = True
                action()
            return real(*arguments)
        return call

    place = getattr(train, where)
    with pytest.MonkeyPatch.context() as patch:
        for name in {"task_loss", where}:
            patch.setattr(train, name, wrapped(getattr(train, name)))
        yield


@pytest.fixture
def stopped(cli):
    """cli, with a run in the folder "run" that was stopped after 4 of 8 steps, and one evaluation."""
    with at_step(4, ctrl_c):
        assert cli.tiny(BUSY).status == 130
    return cli


@contextlib.contextmanager
def at_rename(n, end):
    """Meanwhile end() is called before the n-th rename, from 1: files change by os.replace alone. Gives the list of
    the names that were to be written."""
    names, rename = [], os.replace

    def counted(source, target):
        names.append(Path(target).name)
        if len(names) == n:
            end()
        rename(source, target)

    with mock.patch.object(os, "replace", counted):
        yield names


def sigkill():
    os.kill(os.getpid(), signal.SIGKILL)


def child(words, out="child.out", err="child.err", within=contextlib.nullcontext(), **environment):
    """Process id of a fork that runs train.py and nothing else. (It need not import torch again.)

    words: of its command line, or a function to call in its place. out, err: where it writes, files or a terminal.
    within: a context manager to run it in.
    """
    if pid := os.fork():
        return pid
    status = 70
    try:
        os.environ.update(environment)
        sys.stdout, sys.stderr = open(out, "w"), open(err, "w")
        with within:
            status = words() if callable(words) else train.main(words.split())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.close()
        sys.stderr.close()
        os._exit(status or 0)


@contextlib.contextmanager
def soon(what, seconds=30):
    """Fail if it takes longer. (On Windows it may.)"""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_):
        raise AssertionError(f"{what} hangs")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
