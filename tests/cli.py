"""What the tests of the command line share: small data, a process of its own, what a refusal is."""
import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path

import data
from formats import toy
import train

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

def refused(done, *says):
    """One error for the user, status 2."""
    assert done.status == 2 and len(done.errors) == 1, done.err
    assert done.errors[0].startswith("error: "), done.err
    assert all(word in done.errors[0] for word in says), done.err


def child(words, out="child.out", err="child.err", within=contextlib.nullcontext(), **environment):
    """Process id of a fork that runs train.py and nothing else. (It need not import torch again.)

    out, err: where it writes, files or a terminal. within: a context manager to run it in.
    """
    if pid := os.fork():
        return pid
    status = 70
    try:
        os.environ.update(environment)
        sys.stdout, sys.stderr = open(out, "w"), open(err, "w")
        with within:
            status = train.main(words.split())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.close()
        sys.stderr.close()
        os._exit(status)


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
