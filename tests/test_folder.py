"""Tests of running/folder.py, saving.py, machine.py and progress.py: a run loses nothing. Docstrings name oracles."""
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

import data
from formats import disk, glue
from running import folder, inputs, machine, options, progress, saving
from tests.conftest import SMALL, outcome, write_checkpoint
from tests.cli import (BUSY, Killed, at_rename, at_step, child, contents, ctrl_c, die, on_unix, refused, sigkill, soon,
                       stopped, write_task)

ROOT = Path(__file__).parents[1]


def goes_on(cli, words=BUSY):
    """--resume, and the outcome of the unbroken run, byte for byte; seconds never go back."""
    assert cli("--resume run").status == 0 and outcome("run") == cli.whole(words)
    lines = map(json.loads, Path("run/log.jsonl").read_text().splitlines())
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    assert seconds and seconds == sorted(seconds)


# --- killed, stopped, and gone on ---------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["lora", "adalora", "sora", "bitfit", "head", "full"])
def test_every_method_goes_on(cli, method):
    """Oracle: the unbroken run, byte for byte; the other one dies in step 6. (LoRA²: all tests below.)"""
    words = f"--method {method} {BUSY}"
    with at_step(6, die), pytest.raises(Killed):
        cli.tiny(words)
    goes_on(cli, words)


@pytest.mark.ci
def test_killed_at_every_write(cli):
    """Oracle: the unbroken run. Files change by os.replace alone: the run dies before each of them. The order
    by hand: an adapter is never ahead of its predictions, and last.pt never behind for long."""
    words = "--batch-size 32 --save-steps 1 --eval-steps 4 --max-steps 5"  # 3 steps to an epoch
    whole = cli.whole(words)
    for last in range(1, 100):
        shutil.rmtree("run", ignore_errors=True)
        with contextlib.suppress(Killed), at_rename(last, die) as written:
            assert cli.tiny(words).status == 0
            break                                          # it made fewer writes than `last`
        begun = Path("run/last.pt").exists()
        if begun:
            with open("run/log.jsonl", "a") as file:
                file.write('{"step": 4, "loss')            # a line that was cut off
        again = cli("--resume run") if begun else cli.tiny(words)
        assert again.status == 0 and outcome("run") == whole, last
    assert last > 12
    at = [i for i, name in enumerate(written) if name == "adapter.safetensors"]
    assert at and all(written[i - 1:i + 2:2] == ["predictions_dev.tsv", "last.pt"] for i in at)


@on_unix
def test_sigkill(cli):
    """Oracle: the unbroken run. A process of its own is killed in its first step, and in one after an evaluation."""
    words = f"--task demo --model {cli.models['deberta']} {SMALL} {BUSY} --out run --overwrite"
    for step in (1, 6):
        assert os.waitpid(child(words, within=at_step(step, sigkill)), 0)[1] == signal.SIGKILL
        goes_on(cli)


@on_unix
@pytest.mark.slow
def test_sigkill_at_random(cli, n=20):
    """Oracle: the unbroken run, but for seconds, tokens per second and date; at n random moments of training,
    which are not all the same one."""
    words = f"--task demo --model {cli.models['deberta']} {SMALL} --max-steps 30 --eval-steps 7 "
    words += "--save-steps 3 --out "
    began, back = time.monotonic(), []
    assert os.waitpid(child(words + "whole"), 0)[1] == 0
    longest = time.monotonic() - began
    while len(back) < n:
        shutil.rmtree("run", ignore_errors=True)
        pid, moment = child(words + "run"), random.uniform(0, longest)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] == 0:                     # too late: the machine is faster than it was
            longest = moment
        begun = Path("run/last.pt").exists()
        if begun and not Path("run/result.json").exists():
            back.append(folder.load_state("run")["step"])
        assert cli("--resume run" if begun else words + "run").status == 0
        assert outcome("run") == outcome("whole"), moment
    print(f"killed {n} times, resumed from the steps {sorted(back)} of 30: equal outcomes")
    assert len(set(back)) > n // 4


@on_unix
def test_nohup_is_left_to_work(cli):
    """Oracle: the unbroken run: a lost terminal is nothing to a run that was started to outlive it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with at_step(4, lambda: signal.raise_signal(signal.SIGHUP)):
            assert cli.tiny(BUSY).status == 0 and outcome("run") == cli.whole(BUSY)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def small_disk():
    """small_disk(n): from now on the system lets no file grow beyond n bytes; None ends it."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n):
        resource.setrlimit(resource.RLIMIT_FSIZE, before if n is None else (n, before[1]))
    yield limit
    limit(None)


# Step, where in it, signals or torch's error or a full disk, status, what is said, step of the state to go on from.
GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ...")
ENDS = [
    (6, "task_loss", ["SIGINT"], 130, "--resume run goes on", 6),
    (6, "evaluate", ["SIGINT"], 130, "--resume run goes on", 6),
    (6, "predict_batch", ["SIGTERM"], 143, "--resume run goes on", 6),
    (6, "predict_batch", ["SIGHUP"], 129, "--resume run goes on", 6),
    (5, "task_loss", ["SIGINT", "SIGINT"], 130, "what was written before is whole", 4),
    (3, "task_loss", GPU_FULL, 1, "--accum 2", 2), (3, "task_loss", CUBLAS, 1, "--accum 2", 2),
    (4, "task_loss", None, 1, "could not be written", 3), (6, "task_loss", None, 1, "could not be written", 4)]


@on_unix
@pytest.mark.parametrize("step, where, what, status, says, last", ENDS)
def test_what_ends_a_run_early(cli, small_disk, step, where, what, status, says, last):
    """Oracle: the unbroken run. Ctrl-C or a lost terminal in a step, before or in its evaluation, which is not waited
    for, saves first; a second Ctrl-C does not wait; torch's errors of a full GPU and the system's of a full disk are
    a line, and the run goes on from its last state, of an evaluation (3) or of --save-steps (2, 4)."""
    def action():
        if isinstance(what, Exception):
            raise what
        if what is None:
            small_disk(10_000)
        for name in what or []:
            signal.raise_signal(getattr(signal, name))

    with at_step(step, action, where):
        done = cli.tiny(BUSY)
    small_disk(None)
    assert done.status == status and len(done.errors) == 1 and says in done.errors[0], done.err
    state = folder.load_state("run")
    assert state["step"] == last and [e["step"] for e in state["evaluations"]] == [3] * (last > 2)
    assert not Path("run/result.json").exists() and not list(Path("run").glob(".*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    goes_on(cli)


def test_stop_at_survives_a_kill(cli, monkeypatch):
    """Oracle: the unbroken run, which ends at its first evaluation; the one killed after it must end too."""
    words = "--method head --stop-at 0.1 --eval-steps 2"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(saving.RunFolder, "finish", die)
        cli.tiny(words)
    goes_on(cli, words)
    assert outcome("run")["result.json"]["steps"] == 2


# --- what a run refuses to go on with -----------------------------------------------------------------------

def test_one_run_at_a_time_in_a_folder(stopped):
    """Oracle: nothing in the folder changes by --resume, --overwrite or a new run while it is held."""
    before = contents("run")
    with disk.alone("run", "train.py"), disk.alone("new", "train.py"):
        refused(stopped("--resume run"), "another train.py is running in run", "--out")
        refused(stopped.tiny("--overwrite"), "another train.py is running in run")
        refused(stopped.tiny(out="new"), "another train.py is running in new")
        assert contents("run") == before and not list(Path("new").iterdir())
    assert stopped("--resume run").status == 0 and stopped.tiny(out="new").status == 0


def of_fewer_options(stopped):
    """last.pt from before an option was there."""
    state = folder.load_state("run")
    del state["settings"]["clip"]
    folder.write_state("run", state)


def gone(stopped):
    """No adapter, though there was an evaluation."""
    Path("run/adapter.safetensors").unlink()


# What becomes of the folder, what is given beside --resume run, what is said.
REFUSALS = [
    (None, "--k 2 --lr 0.1 --seed 1", ["--k 1, not 2", "--lr 0.02, not 0.1", "--seed 0, not 1"]),
    (None, "--out other", ["--out"]), (None, "--overwrite", ["--overwrite"]),
    (None, "--train-file a.tsv", ["--train-file"]), (None, "--eval run/adapter.safetensors", []),
    (None, "--model base", ["base is not the model"]), (None, "--model link", ["link is not the model"]),
    (of_fewer_options, "", ["another version of this program", "--clip is new"]),
    (gone, "", ["run/adapter.safetensors"])]


def test_what_resume_refuses(stopped, tmp_path):
    """Oracle: the promise: each option that differs is named with both values; base model (also behind a link), state
    and adapter have to be this run's; the folder stays as it was, and the run goes on from it."""
    write_checkpoint(tmp_path / "base", "deberta", seed=1)
    Path("link").symlink_to("base")
    shutil.copytree(stopped.models["deberta"], "copy")
    whole = contents("run")
    for change, words, says in REFUSALS:
        if change:
            change(stopped)
        before = contents("run")
        refused(stopped("--resume run", words), *says)
        assert contents("run") == before
        for name, content in whole.items():
            Path("run", name).write_bytes(content)
    refused(stopped("--resume ."), "--resume one of ")
    refused(stopped("--eval run/adapter.safetensors --model link"), "link is not the model")
    assert stopped("--eval run/adapter.safetensors --model copy").status == 0
    assert stopped("--resume run --model copy --k 1 --lr 0.02 --save-steps 5").status == 0
    refused(stopped("--resume run --k 2 --lr 0.1"), "--k 1, not 2", "--lr 0.02, not 0.1")  # also if finished
    assert stopped("--resume run --k 1").out.startswith("this run is finished:")
    assert stopped("--resume run --save-steps 3 --merge merged").status == 0 and Path("merged").exists()


def test_the_same_base_may_come_from_another_place(stopped, monkeypatch):
    """Oracle: the run that was never stopped. It began with a name on the Hub and goes on with a folder."""
    def named(identity, best, facts=folder.facts_of):
        stored = facts(identity, best)
        return stored | {"settings": stored["settings"] | {"model": "someone/tiny"}}

    with monkeypatch.context() as patch, at_step(4, ctrl_c):
        patch.setattr(folder, "facts_of", named)
        assert stopped.tiny(BUSY, "--overwrite").status == 130
    assert folder.load_adapter("run/adapter.safetensors")[1]["settings"]["model"] == "someone/tiny"
    goes_on(stopped)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_the_random_state_of_a_gpu_is_kept(monkeypatch, name):
    """Oracle: the state of its generator, which dropout draws from: without it --resume is another run. A run
    that began on a CPU has none, and goes on."""
    here, seen = machine.Machine(torch.device(name), "fp32", 0, 1), []
    monkeypatch.setattr(getattr(torch, name), "get_rng_state", lambda *_: "of the GPU")
    monkeypatch.setattr(getattr(torch, name), "set_rng_state", lambda state, *_: seen.append(state))
    state = machine.random_state(here)
    torch.rand(1)
    for saved in (state, {"cpu": state["cpu"]}):
        machine.set_random_state(here, saved)
    assert seen == ["of the GPU"] and torch.equal(torch.get_rng_state(), state["cpu"])


def test_only_the_first_process_looks_at_what_it_overwrites(tmp_path, monkeypatch):
    """Oracle: the promise: while it removes an older run, another process must not judge the half that is left."""
    (tmp_path / "adapter.safetensors").write_bytes(b"half removed")
    second = machine.Machine(torch.device("cpu"), "fp32", 1, 2)
    run_folder = saving.RunFolder({"settings": {"out": tmp_path}}, None, second, dict)
    o = options.resolve({"task": "demo", "out": str(tmp_path), "overwrite": True})
    run_folder.begin(o)
    assert (tmp_path / "adapter.safetensors").exists()


def test_files_of_another_version(stopped, monkeypatch):
    """Oracle: the promise, with files of another format, and of the same one with a setting that the adapter
    lacks, as if it were added later, or one that it has too many."""
    evaluation = f"--eval run/adapter.safetensors --model {stopped.models['deberta']}"
    assert stopped(evaluation).status == 0
    told = "of another version of this program"
    for names, says in ((options.STORED | {"dora"}, "--dora is new"),
                        (options.STORED - {"clip"}, "--clip is unknown")):
        with monkeypatch.context() as patch:
            patch.setattr(options, "STORED", names)
            refused(stopped(evaluation), told, says)
    mine = folder.FORMAT
    monkeypatch.setattr(folder, "FORMAT", {file: number + 1 for file, number in mine.items()})
    refused(stopped("--resume run"), "run/last.pt", f"format {mine['last.pt']} is", told)
    refused(stopped(evaluation), "run/adapter.safetensors", f"format {mine['adapter.safetensors']} is", told)


def test_resume_refuses_other_data(cli):
    """Oracle: one word of one row changed since, or one label."""
    text = "sentence\tlabel\n" + "cue0 filler1\ta\ncue0 filler2\tb\n" * 20
    Path("own.tsv").write_text(text)
    with at_step(4, ctrl_c):
        assert cli("--train-file own.tsv --dev-file own.tsv --out run --batch-size 16 --max-steps 6 --max-len 16",
                   "--model", cli.models["bert"]).status == 130
    for old, new in (("filler1", "filler3"), ("\ta", "\tb")):
        Path("own.tsv").write_text(text.replace(old, new, 1))
        refused(cli("--resume run"), "data")
    Path("own.tsv").write_text(text)
    assert cli("--resume run").status == 0


def test_digest():
    """Oracle: equality of the parts, by hand: content, type, shape, order, and where one part ends."""
    x = torch.tensor([1.0, 2.0])
    assert folder.digest("a", x) == folder.digest(b"a", torch.stack([x, -x])[0]) and len(folder.digest()) == 32
    others = [("a", x), (x, "a"), ("a",), ("a", -x), ("a", x.double()), ("a", x[None]), ("a", x[:1]), (),
              ("", "a", x), ("ab", "c"), ("a", "bc"), ("abc",), ("a", x[:0]), ("a", x[0])]
    assert len({folder.digest(*parts) for parts in others}) == len(others)


# --- the run folder -----------------------------------------------------------------------------------------

def test_a_run_is_not_overwritten(cli):
    """Oracle: the old run's bytes, until --overwrite comes with a run that can begin."""
    assert cli.tiny("--seed 1").status == 0
    before = contents("run")
    refused(cli.tiny(), "--resume run", "--overwrite", "--out")
    for words in ("--k 99", "--prune-warmup 9 --prune-final 9", "--model nowhere", "--warmup 50",
                  "--merge run/last.pt", "--predict none.tsv", "--max-len 41"):
        refused(cli.tiny("--overwrite", words))
        assert contents("run") == before, words
    assert cli.tiny("--overwrite").status == 0
    assert outcome("run") != before and outcome("run")["result.json"]["settings"]["seed"] == 0


def test_overwrite_leaves_other_peoples_files_alone(cli):
    """Oracle: their bytes. A folder that never was a run is refused where names would clash; in one that was, no
    table goes but the dev predictions that a run itself makes, and what stays is named."""
    Path("mine").mkdir()
    for name in ("result.json", "last.pt", "adapter.safetensors"):
        Path("mine", name).write_text("{}")
        refused(cli.tiny("--overwrite", out="mine"), f"mine/{name}", "not of a run", "--out")
        assert contents("mine") == {name: b"{}"}
        Path("mine", name).unlink()
    torch.save({}, "mine/last.pt")                         # a zip as ours is one, but somebody else's
    refused(cli.tiny("--overwrite", out="mine"), "mine/last.pt is not of a run")
    Path("mine/last.pt").unlink()
    Path("mine/gold.tsv").write_text("index\tlabel\n0\tyes\n")
    refused(cli.tiny(out="mine"), "mine is not empty")
    for name in ("last.pt", "result.json", "last.pt"):     # into a folder that was no run, then into the run
        done = cli.tiny("--overwrite --max-steps 2", out="mine")
        Path("mine", name).write_bytes(b"")                # a partial copy: the other one tells whose it is
        assert done.status == 0 and "mine/gold.tsv stays" in done.err
        assert Path("mine/gold.tsv").read_text() == "index\tlabel\n0\tyes\n"
        assert "predictions_dev.tsv stays" not in done.err and Path("mine/predictions_dev.tsv").exists()


def test_all_that_a_run_writes_may_be_replaced(cli, monkeypatch):
    """Oracle: the folder of a run, and the dev splits of all tasks: --overwrite knows each file. What is cut half-way
    is not finished, and still known as a run: result.json goes first, last.pt last."""
    assert cli.tiny("--max-steps 2").status == 0
    splits = {split for task in data.TASKS.values() for split in glue.labelled_splits(task, train=False)}
    written, unlink, gone = set(contents("run")), Path.unlink, []
    assert {f"predictions_{split}.tsv" for split in splits} | written == set(saving.FILES)
    monkeypatch.setattr(Path, "unlink", lambda path, *_, **__: gone.append(path.name) or unlink(path))
    assert cli.tiny("--overwrite --max-steps 2").status == 0
    assert (gone[0], gone[-1]) == ("result.json", "last.pt") and set(gone) == written


def test_a_state_is_in_memory_once(tmp_path):
    """Oracle: the sizes of what torch and Python allocate, by tracemalloc: less than a tenth of the state is
    copied on the way to the disk or back. (It used to be whole in memory once more to write, thrice to read.)"""
    state = {"settings": {}, "weights": {"w": torch.zeros(10_000_000)}}  # 40 MB
    for action in (lambda: folder.write_state(tmp_path, state), lambda: folder.load_state(tmp_path)):
        tracemalloc.start()
        action()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4_000_000
    assert torch.equal(folder.load_state(tmp_path)["weights"]["w"], state["weights"]["w"])


@pytest.mark.parametrize("words, says", [
    ("--out file/run", "--out file/run"), ("--out file", "--out file"),
    ("--out x --merge full", "--merge full"), ("--out x --export-peft file/x", "--export-peft file"),
    ("--out x --merge x", "a folder each"), ("--out x --merge link", "a folder each")])
def test_places_that_cannot_be_written(cli, words, says):
    """Oracle: one line that names the place, before any work, and nothing new in the folder."""
    Path("file").write_text("x")
    Path("full").mkdir()
    Path("full/x").write_text("x")
    Path("link").symlink_to("x")
    there = sorted(path.name for path in Path().iterdir())
    done = cli("--task demo --limit-train 96 --limit-dev 64 --model", cli.models["bert"], words)
    refused(done, says)
    assert sorted(path.name for path in Path().iterdir()) == there
    assert [path.name for path in Path("full").iterdir()] == ["x"]


def test_a_full_disk_before_the_first_step(cli, small_disk):
    """Oracle: the promise: one line, and no file that is half there."""
    small_disk(10_000)
    done = cli.tiny()
    small_disk(None)                                       # pytest's own output may be a file
    refused(done, "run/last.pt", "make room")
    assert list(Path("run").iterdir()) == []


@pytest.mark.parametrize("words, limits", [("--merge merged", [100, 4_000, 6_000]), ("--export-peft peft", [6_000]),
                                           ("--predict new.tsv", [4_000])])
def test_a_full_disk_in_the_end(cli, small_disk, words, limits):
    """Oracle: the promise: one line, and no merged model, LoRA or predictions that are half there."""
    assert cli.tiny("--max-steps 2").status == 0
    before = contents("run")
    Path("new.tsv").write_text("sentence\n" + "cue0 filler1\n" * 1000)
    evaluation = f"--eval run/adapter.safetensors --model {cli.models['deberta']}"
    for limit in limits:                                   # no file, no tokenizer, no weights
        small_disk(limit)
        done = cli(evaluation, words)
        small_disk(None)
        assert done.status == 1 and len(done.errors) == 1 and "make room" in done.errors[0], done.err
        assert contents("run") == before and not [*Path().glob("merged/*"), *Path().glob("peft/*")]
    assert cli(evaluation, words).status == 0


# --- what is said -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["demo", "rte", "own"])
def test_the_printed_command_evaluates(cli, task):
    """Oracle: the best score of result.json, of the printed line as it stands."""
    write_task("rte", Path("my glue"))
    Path("own.tsv").write_text("sentence\tlabel\n" + "cue0 filler1\ta\ncue0 filler2\tb\n" * 20)
    data_of = {"demo": ["--task demo", SMALL], "own": ["--train-file own.tsv --dev-file own.tsv"],
               "rte": ["--task rte --data-dir", Path("my glue")]}
    begun = cli(*data_of[task], "--max-steps 2 --max-len 32 --out run --model", cli.models["deberta"])
    for done in (begun, cli("--resume run")):
        line = done.out.splitlines()[-1]
        assert done.status == 0 and line.startswith("  python train.py --eval run/adapter.safetensors ")
        again = cli(*map(Path, shlex.split(line)[2:]))     # Path: a word of its own, blanks and all
        best = json.loads(Path("run/result.json").read_text())["best"]["scores"]["dev"]["accuracy"]
        assert again.status == 0, again.err
        assert again.out.splitlines()[-1].startswith(f"dev accuracy {best:.4f}")


def test_map_of_kept_values():
    """Oracle: a picture drawn by hand: rows in the paper's order, empty where nothing is adapted."""
    kept = {"layer.0.attention.self.query": 8, "layer.1.attention.self.query": 1,
            "layer.10.attention.self.query": 0, "layer.1.output.dense": 4,
            "layer.10.attention.output.dense": 5}
    assert progress.kept_map(kept, 8).splitlines() == [
        "kept of 8 singular values, layers 0 to 10 from left to right",
        "  q   8█  1░  0 ",
        "  o   0   0   5▓",
        "  f2  0   4▒  0 "]


# --- several processes, terminals ---------------------------------------------------------------------------

def processes(words, last=contextlib.nullcontext()):
    """Two processes as torchrun makes them: [(status, output, errors)]. last: in what the second one runs.

    AssertionError, and no process is left, if they take longer than two minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pids, ends = [], []
    for i, within in enumerate((contextlib.nullcontext(), last)):
        pids.append(child(words, f"{i}.out", f"{i}.err", within, RANK=str(i), LOCAL_RANK=str(i),
                          WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    try:
        with soon("one of the processes", 120):
            for pid in pids:
                ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    finally:
        for pid in pids[len(ends):]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return [(end, *(Path(f"{i}.{kind}").read_text() for kind in ("out", "err"))) for i, end in enumerate(ends)]


@on_unix
def test_two_processes_are_one(cli):
    """Oracle: one process, within float error, without dropout: losses, pruning, metrics counted once."""
    words = f"--task demo --model {cli.models['still']} {SMALL} --max-steps 7 --eval-steps 2 --batch-size 15 "
    words += "--limit-dev 61 --k 2 --r 4 --init orthonormal --reg 0.3 --out "
    assert cli(words + "one").status == 0
    (status, said, _), (other, silent, _) = ends = processes(words + "two")
    assert (status, other) == (0, 0), ends
    assert silent == "" and "2 process(es)" in said        # one of them speaks and writes
    one, two = outcome("one"), outcome("two")
    assert one.keys() == two.keys() and one["ranks.json"] == two["ranks.json"]
    for a, b in zip(one["log.jsonl"], two["log.jsonl"], strict=True):
        assert a.keys() == b.keys() and a.get("kept") == b.get("kept") and a.get("scores") == b.get("scores")
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)
    a, b = (folder.load_adapter(f"{name}/adapter.safetensors")[0] for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@on_unix
def test_a_dead_process_ends_the_others(cli):
    """Oracle: the promise: a sentence within seconds, where a lost process would be waited for."""
    words = f"--task demo --model {cli.models['deberta']} {SMALL} --save-steps 2 --out run"
    began = time.monotonic()
    (status, _, errors), (lost, *_) = processes(words, at_step(5, lambda: os._exit(9)))
    assert lost == 9 and status == 1 and time.monotonic() - began < 60
    assert "error: another process of this run has ended" in errors and "Traceback" not in errors
    assert folder.load_state("run")["step"] == 4
    refused(cli("--resume run"), "2 process(es)")


@on_unix
def test_one_of_two_processes_is_stopped(cli):
    """Oracle: two processes that nobody stopped. They agree on a step, save, and go on later."""
    words = f"--task demo --model {cli.models['deberta']} {SMALL} --max-steps 7 --out "
    assert [status for status, *_ in processes(words + "whole")] == [0, 0]
    assert [status for status, *_ in processes(words + "run", at_step(3, ctrl_c))] == [130, 130]
    assert folder.load_state("run")["step"] == 3             # on GPUs it would be 10
    assert [status for status, *_ in processes("--resume run")] == [0, 0]
    assert outcome("run") == outcome("whole")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("there", [["train"], ["train", "dev"]])
def test_all_processes_wait_for_a_fetched_task(rank, there, tmp_path, monkeypatch):
    """Oracle: one barrier for each process, whether it comes before or after the folder is there: one that
    passes by would leave the others waiting. The first one alone fetches, and only what is missing."""
    calls = []
    monkeypatch.setattr(inputs.fetch, "fetch_task", lambda task, folder: calls.append("fetch"))
    monkeypatch.setattr(inputs.machine, "wait_for_all", lambda: calls.append("wait"))
    for name, path in write_task("rte", tmp_path).items():
        if name not in there:
            path.unlink()
    o = options.resolve({"task": "rte", "data_dir": str(tmp_path), "limit_train": 2, "limit_dev": 3})
    here, whole = machine.Machine(torch.device("cpu"), "fp32", rank, 2), "dev" in there
    with contextlib.nullcontext() if whole else pytest.raises(FileNotFoundError):
        splits, _ = inputs.load_splits(o, here, None)
        assert {name: len(split.texts) for name, split in splits.items()} == {"train": 2, "dev": 3}
    assert calls == ["fetch"] * (rank == 0 and not whole) + ["wait"]


@pytest.mark.slow
def test_torchrun(cli):
    """Oracle: the command of the README, to the end."""
    words = f"-m torch.distributed.run --nproc_per_node=2 {ROOT / 'train.py'} --task demo {SMALL} --out run"
    done = subprocess.run([sys.executable, *words.split(), "--model", cli.models["still"]],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and Path("run/result.json").exists(), done.stderr
    assert outcome("run")["result.json"]["processes"] == 2


def test_bars_on_a_terminal(cli, monkeypatch):
    """Oracle: 30 steps, 4 batches of 16 rows: one line rewritten with all numbers, evaluations above it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    done = cli.tiny("--max-steps 30", model="still")
    bars = [part for part in re.split(r"[\r\n]+", done.err) if "step" in part and "%|" in part]
    numbers = r"30/30 .*loss \d.*R \d.*kept 24/96.*accuracy 0\.\d+.*tokens/s"
    assert len(bars) >= 3 and re.search(numbers, bars[-1])
    assert re.search(r"\d\d:\d\d<", bars[-1])              # time gone and time left
    assert "dev accuracy" in done.out and "\nstep 1/30  loss" not in done.out
    done = cli("--eval run/adapter.safetensors --model", cli.models["still"])
    assert re.search(r"\rpredicting: .*/4 ", done.err) and "dev accuracy" in done.out


def test_plain_lines_elsewhere(cli):
    """Oracle: no carriage return or escape where the output is no terminal; about 20 lines of steps."""
    done = cli.tiny("--batch-size 4 --max-steps 40 --eval-steps 90")
    lines = [line for line in done.out.splitlines() if line.startswith("step ")]
    assert "\r" not in done.out + done.err and "\x1b" not in done.out + done.err and 5 <= len(lines) <= 40
    last = r"step 40/40  loss \d.*  R \d.*  kept 24/96  accuracy 0\.\d+  \d+ tokens/s  0 s left"
    assert re.fullmatch(last, lines[-2])
