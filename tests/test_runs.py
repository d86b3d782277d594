"""Tests of running/folder.py: a run loses nothing. Each docstring names its oracle."""
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import train
from formats import disk
from running import machine, options, progress
from running import folder as runs
from tests.conftest import SMALL, outcome, write_checkpoint
from tests.cli import child, refused, write_task

on_unix = pytest.mark.skipif(os.name == "nt", reason="signals, fork and terminals as Unix has them")

ROOT = Path(__file__).parents[1]
BUSY = "--eval-steps 3 --save-steps 2 --max-steps 8"       # with 6 steps to an epoch, of all kinds of steps


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def at_step(step, action, patch):
    """Do something in the middle of a step of a run from its start, with pytest's monkeypatch."""
    real, steps = train.task_loss, 0

    def task_loss(*arguments):                             # called once a step, and not to evaluate
        nonlocal steps
        steps += 1
        if steps == step:
            action()
        return real(*arguments)
    patch.setattr(train, "task_loss", task_loss)


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing catches it."""


# --- killed, stopped, and gone on ---------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["lora", "adalora", "sora", "bitfit", "head", "full"])
def test_every_method_goes_on(cli, monkeypatch, method):
    """Oracle: the unbroken run, byte for byte; the other one dies in step 6. (LoRA²: all tests below.)"""
    def die():
        raise Killed

    words = f"--method {method} {BUSY}"
    assert cli.tiny(words, out="whole").status == 0
    with monkeypatch.context() as patch:
        at_step(6, die, patch)
        with pytest.raises(Killed):
            cli.tiny(words)
    assert cli("--resume run").status == 0 and outcome("run") == outcome("whole")


def test_killed_at_every_write(cli, monkeypatch):
    """Oracle: the unbroken run. Files change by os.replace alone: the run dies before each of them."""
    assert cli.tiny(BUSY, out="whole").status == 0
    replace, calls = os.replace, 0

    def dying(source, target):
        nonlocal calls
        calls += 1
        if calls == last:
            raise Killed
        replace(source, target)

    for last in range(1, 100):
        shutil.rmtree("run", ignore_errors=True)
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                assert cli.tiny(BUSY).status == 0
                break                                      # it made fewer writes than `last`
            except Killed:
                pass
        if Path("run/last.pt").exists():
            with open("run/log.jsonl", "a") as file:
                file.write('{"step": 7, "loss')            # a line that was cut off
            assert cli("--resume run").status == 0
        else:                                              # it had not begun: the same command does
            assert cli.tiny(BUSY).status == 0
        assert outcome("run") == outcome("whole"), last
    assert last > 12


def kill_and_resume(cli, n):
    """SIGKILL n runs at random moments of training and resume them: each time the unbroken run's outcome.

    Returns the steps to which they went back.
    """
    words = f"--task demo --model {cli.models['deberta']} {SMALL} --max-steps 60 --eval-steps 7 "
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
            back.append(runs.load_state("run")["step"])
        assert cli("--resume run" if begun else words + "run").status == 0
        assert outcome("run") == outcome("whole"), moment
    return back


@on_unix
def test_sigkill(cli):
    """Oracle: the unbroken run, bit for bit, but for seconds, tokens per second and date."""
    assert len(kill_and_resume(cli, 3)) == 3


@on_unix
@pytest.mark.slow
def test_sigkill_often(cli):
    """Oracle: the unbroken run, at 20 random moments, which are not all the same one."""
    back = kill_and_resume(cli, 20)
    print(f"killed 20 times, resumed from the steps {sorted(back)} of 60: 20 equal outcomes")
    assert len(set(back)) > 5


@on_unix
@pytest.mark.parametrize("where", ["step", "evaluation", "save"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_save_first(cli, monkeypatch, where, name):
    """Oracle: the unbroken run. Ctrl-C or a lost terminal in a step, an evaluation, before it; --resume."""
    assert cli.tiny(BUSY, out="whole").status == 0
    number = getattr(signal, name)
    names = {"step": "update", "evaluation": "predict_batch", "save": "evaluate"}
    update, steps = train.update, 0

    def counted(*arguments):
        nonlocal steps
        steps += 1
        if where == "step" and steps == 6:
            signal.raise_signal(number)
        update(*arguments)

    def interrupted(net, *rest, real=getattr(train, names[where])):
        if steps == 6 and (where == "save" or not net.training):
            signal.raise_signal(number)
        return real(net, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "update", counted)
        if where != "step":
            patch.setattr(train, names[where], interrupted)
        stopped = cli.tiny(BUSY)
    assert stopped.status == 128 + number and "--resume run goes on" in stopped.errors[-1]
    assert runs.load_state("run")["step"] == 6 and not Path("run/result.json").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert cli("--resume run").status == 0 and outcome("run") == outcome("whole")


@on_unix
def test_nohup_is_left_to_work(cli, monkeypatch):
    """Oracle: the unbroken run: a lost terminal is nothing to a run that was started to outlive it."""
    assert cli.tiny(out="whole").status == 0
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(4, lambda: signal.raise_signal(signal.SIGHUP), monkeypatch)
        assert cli.tiny().status == 0 and outcome("run") == outcome("whole")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_does_not_wait(cli, monkeypatch):
    """Oracle: the state of the last save, from which the run goes on as if nothing had been."""
    assert cli.tiny(BUSY, out="whole").status == 0
    with monkeypatch.context() as patch:
        at_step(5, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)], patch)
        assert cli.tiny(BUSY).status == 130
    assert runs.load_state("run")["step"] == 4
    assert cli("--resume run").status == 0 and outcome("run") == outcome("whole")


def test_stop_at_survives_a_kill(cli, monkeypatch):
    """Oracle: the unbroken run, which ends at its first evaluation; the one killed after it must end too."""
    words = "--method head --stop-at 0.1 --eval-steps 2"
    assert cli.tiny(words, out="whole").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(runs.RunFolder, "finish", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            cli.tiny(words)
    assert cli("--resume run").status == 0
    assert outcome("run") == outcome("whole") and outcome("run")["result.json"]["steps"] == 2


# --- what a run refuses to go on with -----------------------------------------------------------------------

@pytest.fixture
def stopped(cli, monkeypatch):
    """cli, with a run in the folder "run" that was stopped after 4 of 12 steps."""
    def stop(words="", out="run"):
        with monkeypatch.context() as patch:
            at_step(4, lambda: signal.raise_signal(signal.SIGINT), patch)
            assert cli.tiny("--eval-steps 2", words, out=out).status == 130
        return cli
    cli.stop = stop
    stop()
    return cli


def test_one_run_at_a_time_in_a_folder(stopped):
    """Oracle: nothing in the folder changes by --resume, --overwrite or a new run while it is held."""
    before = contents("run")
    with disk.alone("run", "train.py"), disk.alone("new", "train.py"):
        refused(stopped("--resume run"), "another train.py is running in run", "--out")
        refused(stopped.tiny("--overwrite"), "another train.py is running in run")
        refused(stopped.tiny(out="new"), "another train.py is running in new")
        assert contents("run") == before and not list(Path("new").iterdir())
    assert stopped("--resume run").status == 0 and stopped.tiny(out="new").status == 0


def test_resume_refuses_other_settings(stopped):
    """Oracle: each option that differs is named with both values; the run folder stays as it was."""
    before = contents("run")
    refused(stopped("--resume run --k 2 --lr 0.1 --seed 1"),
            "--k 1, not 2", "--lr 0.02, not 0.1", "--seed 0, not 1")
    refused(stopped("--resume run --out other"), "--out")
    refused(stopped("--resume run --overwrite"), "--overwrite")
    refused(stopped("--resume run --eval run/adapter.safetensors"))
    refused(stopped("--resume ."), "--resume one of run")
    refused(stopped("--resume run --train-file a.tsv"), "--train-file")
    refused(stopped("--resume run --dev-file a.tsv"), "--dev-file")
    assert contents("run") == before and not Path("other").exists()
    assert stopped("--resume run --k 1 --lr 0.02 --save-steps 5").status == 0
    refused(stopped("--resume run --k 2 --lr 0.1"), "--k 1, not 2", "--lr 0.02, not 0.1")  # also if finished
    assert stopped("--resume run --k 1").out.startswith("this run is finished:")
    assert stopped("--resume run --save-steps 3 --merge merged").status == 0 and Path("merged").exists()


def test_resume_refuses_another_base(stopped, tmp_path):
    """Oracle: a checkpoint of another seed, also behind a link. A copy of the right one is fine."""
    other = write_checkpoint(tmp_path / "other", "deberta", seed=1)
    shutil.copytree(stopped.models["deberta"], "copy")
    refused(stopped("--resume run --model", other), "other is not the model")
    Path("link").symlink_to(other)
    refused(stopped("--resume run --model link"), "link is not the model")
    refused(stopped("--eval run/adapter.safetensors --model link"), "link is not the model")
    assert stopped("--eval run/adapter.safetensors --model copy").status == 0
    assert stopped("--resume run --model copy").status == 0


def test_the_same_base_may_come_from_another_place(stopped, monkeypatch):
    """Oracle: the run that was never stopped. It began with a name on the Hub and goes on with a folder."""
    def named(files, best, facts=runs.RunFolder.facts):
        stored = facts(files, best)
        return stored | {"settings": stored["settings"] | {"model": "someone/tiny"}}

    with monkeypatch.context() as patch:
        patch.setattr(runs.RunFolder, "facts", named)
        stopped.stop(out="hub")
    assert runs.load_adapter("hub/adapter.safetensors")[1]["settings"]["model"] == "someone/tiny"
    assert stopped("--resume hub --model", stopped.models["deberta"]).status == 0
    assert stopped("--resume run").status == 0
    for name in ("predictions_dev.tsv", "ranks.json"):
        assert Path("hub", name).read_bytes() == Path("run", name).read_bytes()


def test_a_run_that_began_on_a_cpu_goes_on_on_a_gpu(stopped, monkeypatch):
    """Oracle: the promise of --device beside --resume: last.pt of a CPU has no random state of a GPU."""
    state = runs.load_state("run")["rng"][0]
    gpu = machine.Machine(torch.device("cuda"), "fp32", 0, 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: pytest.fail("there is none"))
    machine.set_random_state(gpu, state)
    assert torch.equal(torch.get_rng_state(), state["cpu"]) and set(state) == {"cpu"}


def test_a_macs_random_state_is_kept(monkeypatch):
    """Oracle: the state of its generator, which dropout draws from: without it --resume is another run."""
    mac, seen = machine.Machine(torch.device("mps"), "fp32", 0, 1), []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "of the Mac")
    monkeypatch.setattr(torch.mps, "set_rng_state", seen.append)
    state = machine.random_state(mac)
    machine.set_random_state(mac, state)
    machine.set_random_state(mac, {"cpu": state["cpu"]})   # of a run that began elsewhere
    assert seen == ["of the Mac"]


def test_files_of_another_version(stopped, monkeypatch):
    """Oracle: the promise, with files that a later version wrote."""
    evaluation = f"--eval run/adapter.safetensors --model {stopped.models['deberta']}"
    assert stopped(evaluation).status == 0
    monkeypatch.setattr(runs, "FORMAT", 3)
    refused(stopped("--resume run"), "run/last.pt", "format 2 is of another version of this program")
    refused(stopped(evaluation), "run/adapter.safetensors", "format 2 is of another version of this program")


@pytest.mark.parametrize("what", ["layer_norm_eps", "hidden_act", "vocabulary", "lower case", "weights"])
def test_a_base_model_is_more_than_its_weights(cli, tmp_path, what):
    """Oracle: the model's function. Whatever changes it must be refused with an adapter of the old one."""
    shutil.copytree(cli.models["bert"], "base")
    assert cli.tiny("--model base", model="bert").status == 0
    if what == "weights":
        shutil.rmtree("base")
        write_checkpoint(tmp_path / "base", "bert", seed=1)
    elif what in ("vocabulary", "lower case"):
        tokenizer = json.loads(Path("base/tokenizer.json").read_text())
        if what == "lower case":
            tokenizer["normalizer"] = {"type": "Lowercase"}
        else:
            words = tokenizer["model"]["vocab"]
            words["cue0"], words["cue1"] = words["cue1"], words["cue0"]
        Path("base/tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        config = json.loads(Path("base/config.json").read_text())
        config[what] = 0.07 if what == "layer_norm_eps" else "relu"
        Path("base/config.json").write_text(json.dumps(config))
    refused(cli("--eval run/adapter.safetensors --model base"),
            "hidden_act" if what == "hidden_act" else "is not the model")


def test_resume_refuses_other_data(cli, monkeypatch):
    """Oracle: one word of one row changed since."""
    text = "sentence\tlabel\n" + "cue0 filler1\ta\ncue0 filler2\tb\n" * 20
    Path("own.tsv").write_text(text)
    words = "--train-file own.tsv --dev-file own.tsv --out run --batch-size 16 --max-steps 6 --max-len 16"
    with monkeypatch.context() as patch:
        at_step(4, lambda: signal.raise_signal(signal.SIGINT), patch)
        assert cli(words, "--model", cli.models["bert"]).status == 130
    Path("own.tsv").write_text(text.replace("filler1", "filler3", 1))
    refused(cli("--resume run"), "data")
    Path("own.tsv").write_text(text)
    assert cli("--resume run").status == 0


def test_resume_refuses_another_adapter_in_its_folder(stopped):
    """Oracle: the promise. The best adapter so far is part of the state; another run's is not it."""
    stopped.stop("--seed 9", out="other")
    mine = Path("run/adapter.safetensors").read_bytes()
    shutil.copy("other/adapter.safetensors", "run/adapter.safetensors")
    refused(stopped("--resume run"), "run/adapter.safetensors")
    Path("run/adapter.safetensors").unlink()
    refused(stopped("--resume run"), "run/adapter.safetensors")
    Path("run/adapter.safetensors").write_bytes(mine)
    assert stopped("--resume run").status == 0


def test_damaged_files_are_one_error(stopped):
    """Oracle: the promise, for files cut short anywhere and with any byte changed."""
    rng = random.Random(0)
    evaluation = f"--eval run/adapter.safetensors --model {stopped.models['deberta']}"
    for name, command in (("last.pt", "--resume run"), ("adapter.safetensors", evaluation)):
        path = Path("run", name)
        whole = path.read_bytes()
        damaged = [whole[:rng.randrange(len(whole))] for _ in range(5)] + [b"", b"PK", whole + b"x" * 10]
        for _ in range(8):
            at = rng.randrange(len(whole))
            damaged.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
        for content in damaged:
            path.write_bytes(content)
            refused(stopped(command), f"run/{name}")
        path.write_bytes(whole)
    assert stopped("--resume run").status == 0


def test_checkpoints_hold_tensors_and_plain_values(stopped, tmp_path):
    """Oracle: the types themselves; torch's reader that executes nothing; no trace of place in an adapter."""
    def plain(value):
        if isinstance(value, dict):
            return all(plain(key) and plain(item) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (torch.Tensor, str, int, float, bool)
    assert plain(torch.load("run/last.pt", weights_only=True))
    with safe_open("run/adapter.safetensors", "pt") as file:
        text = json.dumps(file.metadata())
    for secret in (str(tmp_path), os.uname().nodename, time.strftime("%Y-%m-%d"), "cpu", "run"):
        assert f'"{secret}' not in text and str(tmp_path) not in text


def test_digest():
    """Oracle: equality of the parts, by hand: content, type, shape, order, and where one part ends."""
    x = torch.tensor([1.0, 2.0])
    assert runs.digest("a", x) == runs.digest(b"a", torch.stack([x, -x])[0]) and len(runs.digest()) == 32
    others = [("a", x), (x, "a"), ("a",), ("a", -x), ("a", x.double()), ("a", x[None]), ("a", x[:1]), (),
              ("", "a", x), ("ab", "c"), ("a", "bc"), ("abc",), ("a", x[:0]), ("a", x[0])]
    assert len({runs.digest(*parts) for parts in others}) == len(others)


# --- the run folder -----------------------------------------------------------------------------------------

def test_a_run_is_not_overwritten(cli):
    """Oracle: the old run's bytes, until --overwrite comes with a run that can begin."""
    assert cli.tiny("--seed 1").status == 0
    before = contents("run")
    refused(cli.tiny(), "--resume run", "--overwrite", "--out")
    for words in ("--k 99", "--prune-warmup 9 --prune-final 9", "--model nowhere", "--targets q,x",
                  "--device tpu", "--warmup 50", "--merge run/last.pt", "--predict none.tsv", "--max-len 41"):
        refused(cli.tiny("--overwrite", words))
        assert contents("run") == before, words
    assert cli.tiny("--overwrite").status == 0
    assert outcome("run") != before and outcome("run")["result.json"]["settings"]["seed"] == 0
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("x")
    refused(cli.tiny(out="notes"), "notes is not empty")
    assert cli.tiny("--overwrite", out="notes").status == 0 and Path("notes/mine.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["log.jsonl", "result.json", "last.pt", "adapter.safetensors"])
def test_overwrite_leaves_other_peoples_files_alone(cli, name):
    """Oracle: their bytes. A folder that never was a run is refused where names would clash; in one that was,
    tables that are not predictions of ours stay."""
    Path("mine").mkdir()
    Path("mine", name).write_text("{}")
    refused(cli.tiny("--overwrite", out="mine"), f"mine/{name}", "not of a run", "--out")
    assert contents("mine") == {name: b"{}"}
    Path("mine", name).unlink()
    gold = Path("mine/gold_predictions.tsv")
    gold.write_text("index\tlabel\n0\tyes\n")
    for _ in range(2):                                     # into a folder that was no run, then into the run
        assert cli.tiny("--overwrite --max-steps 2", out="mine").status == 0
        assert gold.read_text() == "index\tlabel\n0\tyes\n"
    Path("mine/old_predictions.tsv").write_text("index\tprediction\n0\t1\n")
    assert cli.tiny("--overwrite --max-steps 2", out="mine").status == 0
    assert gold.exists() and not Path("mine/old_predictions.tsv").exists()


def test_one_folder_under_two_names(cli):
    """Oracle: the file system: sub/../run and a link are the run folder."""
    Path("sub").mkdir()
    Path("link").symlink_to("run")
    for merge in ("sub/../run", "link"):
        refused(cli.tiny("--merge", merge), "a folder each")
    assert not Path("run").exists()


def test_an_adapter_of_another_version_names_what_differs(cli, monkeypatch):
    """Oracle: by hand: a setting that the file lacks, as if it were added later, and one that it has too many."""
    assert cli.tiny("--max-steps 2").status == 0
    evaluation = f"--eval run/adapter.safetensors --model {cli.models['deberta']}"
    for names, told in ((options.STORED | {"dora"}, "--dora is new"),
                        (options.STORED - {"clip"}, "--clip is unknown")):
        monkeypatch.setattr(options, "STORED", names)
        refused(cli(evaluation), "of another version of this program", told)


def test_tokens_and_seconds_go_on(stopped):
    """Oracle: the run that was never stopped: as many tokens at each step; seconds never go back."""
    assert stopped("--resume run").status == 0 and stopped.tiny("--eval-steps 2", out="whole").status == 0
    lines = [[json.loads(line) for line in Path(name, "log.jsonl").read_text().splitlines()]
             for name in ("run", "whole")]
    steps = [[(line["step"], line["tokens"]) for line in log if "tokens" in line] for log in lines]
    assert steps[0] == steps[1] and len(steps[0]) == 3
    seconds = [line["seconds"] for line in lines[0] if "seconds" in line]
    assert seconds == sorted(seconds)


def test_a_state_is_in_memory_once(tmp_path):
    """Oracle: the sizes of what torch and Python allocate, by tracemalloc: less than a tenth of the state is
    copied on the way to the disk or back. (It used to be whole in memory once more to write, thrice to read.)"""
    state = {"weights": {"w": torch.zeros(10_000_000)}}    # 40 MB
    for action in (lambda: runs.write_state(tmp_path, state), lambda: runs.load_state(tmp_path)):
        tracemalloc.start()
        action()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4_000_000
    assert torch.equal(runs.load_state(tmp_path)["weights"]["w"], state["weights"]["w"])


def test_half_removed_is_not_finished(cli, monkeypatch):
    """Oracle: no result.json beside a run that has not ended, wherever the removal of an older one is cut."""
    unlink, calls = Path.unlink, 0

    def dying(path, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise Killed
        unlink(path, *args, **kwargs)

    for limit in range(1, 6):
        assert cli.tiny("--overwrite --max-steps 2").status == 0
        calls = 0
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "unlink", dying)
            cli.tiny("--overwrite")
        assert not Path("run/result.json").exists()


@pytest.mark.parametrize("words", ["--out file/run", "--out file", "--out run --merge file",
                                   "--out run --merge full", "--out run --export-peft file/x",
                                   "--out run --merge x --export-peft x", "--out run --merge run"])
def test_places_that_cannot_be_written(cli, words):
    """Oracle: one line that names the place, before any work, and nothing new in the folder."""
    Path("file").write_text("x")
    Path("full").mkdir()
    Path("full/x").write_text("x")
    done = cli("--task demo --limit-train 96 --limit-dev 64 --model", cli.models["bert"], words)
    refused(done)
    assert sorted(path.name for path in Path().iterdir()) == ["file", "full"]
    assert [path.name for path in Path("full").iterdir()] == ["x"]


@pytest.fixture
def small_disk():
    """small_disk(n): from now on the system lets no file grow beyond n bytes; None ends it."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, before if n is None else (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_before_the_first_step(cli, small_disk):
    """Oracle: the promise: one line, and no file that is half there."""
    small_disk(10_000)
    done = cli.tiny()
    small_disk(None)
    refused(done, "run/last.pt", "make room")
    assert list(Path("run").iterdir()) == []
    assert cli.tiny().status == 0


@pytest.mark.parametrize("step, last", [(4, 3), (5, 4), (6, 4)])
def test_a_full_disk_later(cli, small_disk, monkeypatch, step, last):
    """Oracle: the unbroken run. The last checkpoint stays, of an evaluation (3) or of --save-steps (4); with
    room again the run goes on."""
    assert cli.tiny(BUSY, out="whole").status == 0
    with monkeypatch.context() as patch:
        at_step(step, lambda: small_disk(10_000), patch)
        done = cli.tiny(BUSY)
    small_disk(None)
    assert done.status == 1 and len(done.errors) == 1 and "could not be written" in done.errors[0]
    assert runs.load_state("run")["step"] == last and not list(Path("run").glob("*.tmp"))
    assert cli("--resume run").status == 0 and outcome("run") == outcome("whole")


def test_a_full_disk_in_the_end(cli, small_disk):
    """Oracle: the promise: one line, and no merged model, LoRA or predictions that are half there."""
    assert cli.tiny().status == 0
    before = contents("run")
    Path("new.tsv").write_text("sentence\n" + "cue0 filler1\n" * 3000)
    for words in ("--merge merged", "--export-peft peft", "--predict new.tsv"):
        for limit in (100, 4_000, 6_000):                 # no file, no tokenizer, no weights
            small_disk(limit)
            done = cli("--eval run/adapter.safetensors --model", cli.models["deberta"], words)
            small_disk(None)
            assert done.status == 1 and len(done.errors) == 1 and "make room" in done.errors[0], done.err
            assert contents("run") == before
            assert not [*Path().glob("merged/*"), *Path().glob("peft/*")]
    assert cli("--eval run/adapter.safetensors --merge merged --model", cli.models["deberta"]).status == 0


# --- what is said -------------------------------------------------------------------------------------------

def test_a_full_gpu_is_one_line(cli, monkeypatch):
    """Oracle: torch's own error, raised in step 3: status 1, what to do, and a run that can be resumed."""
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    with monkeypatch.context() as patch:
        at_step(3, full, patch)
        done = cli.tiny("--save-steps 2")
    assert done.status == 1 and len(done.errors) == 1 and "--accum 2" in done.errors[0]
    assert cli("--resume run").status == 0


@pytest.mark.parametrize("task", ["demo", "rte", "own"])
def test_the_printed_command_evaluates(cli, task):
    """Oracle: the best score of result.json, of the printed line as it stands."""
    write_task("rte", Path("my glue"))
    Path("own.tsv").write_text("sentence\tlabel\n" + "cue0 filler1\ta\ncue0 filler2\tb\n" * 20)
    words = {"demo": SMALL, "rte": "--task rte", "own": "--train-file own.tsv --dev-file own.tsv"}[task]
    words += " --task demo" if task == "demo" else " --max-steps 2 --max-len 32"
    folder = ["--data-dir", Path("my glue")] if task == "rte" else []
    begun = cli(words, "--out run --model", cli.models["deberta"], *folder)
    for done in (begun, cli("--resume run")):
        line = done.out.splitlines()[-1]
        assert done.status == 0 and line.startswith("  python train.py --eval run/adapter.safetensors ")
        again = cli(*map(Path, shlex.split(line)[2:]))     # Path: a word of its own, blanks and all
        best = json.loads(Path("run/result.json").read_text())["best"]["scores"]["dev"]["accuracy"]
        assert again.status == 0, again.err
        assert again.out.splitlines()[-1].startswith(f"dev accuracy {best:.4f}")


def test_settings_are_said_once_and_stored(cli):
    """Oracle: the settings in the adapter: each that is set stands in the one line, with its value."""
    done = cli.tiny("--k 2 --targets q,v")
    lines = [line for line in done.out.splitlines() if line.startswith("settings  ")]
    said = dict(word.split("=", 1) for word in lines[0].split("  ")[1:])
    stored = runs.load_adapter("run/adapter.safetensors")[1]["settings"]
    assert len(lines) == 1 and said["k"] == "2" and said["targets"] == "q,v" and said["target_rank"] == "2"
    for name, value in stored.items():
        if value is None or value is False:
            assert name == "model" or name not in said     # a folder is said and not stored
        elif isinstance(value, (int, float)):
            assert float(said[name]) == pytest.approx(value, rel=1e-3)
        else:
            assert said[name] == (",".join(value) if isinstance(value, list) else value)


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

def processes(words, before=None, n=2):
    """n processes as torchrun makes them: [(status, output, errors)]. before: what each does first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pids = [child(words, f"rank{i}", before, RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(n),
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for i in range(n)]
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    texts = [[Path(f"rank{i}.{kind}").read_text() for kind in ("out", "err")] for i in range(n)]
    return [(end, *text) for end, text in zip(ends, texts)]


@on_unix
def test_two_processes_are_one(cli):
    """Oracle: one process, within float error, without dropout: losses, pruning, metrics counted once."""
    words = f"--task demo --model {cli.models['still']} {SMALL} --max-steps 7 --eval-steps 2 --batch-size 15 "
    words += "--limit-dev 61 --out "
    assert cli(words + "one").status == 0
    (status, said, _), (other, silent, _) = ends = processes(words + "two")
    assert (status, other) == (0, 0), ends
    assert silent == "" and "2 process(es)" in said        # one of them speaks and writes
    one, two = outcome("one"), outcome("two")
    assert one.keys() == two.keys() and one["ranks.json"] == two["ranks.json"]
    for a, b in zip(one["log.jsonl"], two["log.jsonl"], strict=True):
        assert a.keys() == b.keys() and a.get("kept") == b.get("kept") and a.get("scores") == b.get("scores")
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)
    a, b = (runs.load_adapter(f"{name}/adapter.safetensors")[0] for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@on_unix
def test_a_dead_process_ends_the_others(cli, monkeypatch):
    """Oracle: the promise: a sentence within seconds, where a lost process would be waited for."""
    def dies_early():
        if os.environ["RANK"] == "1":
            at_step(5, lambda: os._exit(9), monkeypatch)
    began = time.monotonic()
    (status, _, errors), (lost, *_) = processes(
        f"--task demo --model {cli.models['deberta']} {SMALL} --save-steps 2 --out run", dies_early)
    assert lost == 9 and status == 1 and time.monotonic() - began < 60
    assert "error: another process of this run has ended" in errors and "Traceback" not in errors
    assert runs.load_state("run")["step"] == 4
    refused(cli("--resume run"), "2 process(es)")


@on_unix
def test_one_of_two_processes_is_stopped(cli, monkeypatch):
    """Oracle: two processes that nobody stopped. They agree on a step, save, and go on later."""
    words = f"--task demo --model {cli.models['deberta']} {SMALL} --max-steps 14 --out "
    assert [status for status, *_ in processes(words + "whole")] == [0, 0]

    def ctrl_c():
        if os.environ["RANK"] == "1":
            at_step(3, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    assert [status for status, *_ in processes(words + "run", ctrl_c)] == [130, 130]
    assert runs.load_state("run")["step"] == 3             # on GPUs it would be 10
    assert [status for status, *_ in processes("--resume run")] == [0, 0]
    assert outcome("run") == outcome("whole")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("there", [[], ["train"], ["train", "dev"]])
def test_all_processes_wait_for_a_fetched_task(rank, there, tmp_path, monkeypatch):
    """Oracle: one barrier for each process, whether it comes before or after the folder is there: one that
    passes by would leave the others waiting. The first one alone fetches, and only what is missing."""
    calls = []
    monkeypatch.setattr(train.glue, "fetch_task", lambda task, folder: calls.append("fetch"))
    monkeypatch.setattr(train.machine, "wait_for_all", lambda: calls.append("wait"))
    for name, path in write_task("rte", tmp_path).items():
        if name not in there:
            path.unlink()
    o = options.resolve({"task": "rte", "data_dir": str(tmp_path), "limit_train": 2, "limit_dev": 3})
    here = machine.Machine(torch.device("cpu"), "fp32", rank, 2)
    whole = len(there) == 2
    with contextlib.nullcontext() if whole else pytest.raises(FileNotFoundError):
        splits, _ = train.load_splits(o, here, None)
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


def test_a_bar_on_a_terminal(cli):
    """Oracle: a terminal of our own (pty): one line rewritten with all numbers, evaluations above it."""
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    words = f"{ROOT / 'train.py'} --task demo {SMALL} --max-steps 30 --out run --model {cli.models['still']}"
    shown = subprocess.Popen([sys.executable, *words.split()], stdout=theirs, stderr=theirs, stdin=theirs,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(mine, 1 << 16)
        except OSError:                                    # EIO: the other side is closed
            break
        seen += piece
    assert shown.wait() == 0
    text = seen.decode()
    bars = [part for part in re.split(r"[\r\n]+", text) if "step" in part and "%|" in part]
    numbers = r"30/30 .*loss \d.*R \d.*kept 24/96.*accuracy 0\.\d+.*tokens/s"
    assert len(bars) >= 3 and re.search(numbers, bars[-1])
    assert re.search(r"\d\d:\d\d<", bars[-1])              # time gone and time left
    assert "dev accuracy" in text and "\nstep 1/30  loss" not in text


def test_plain_lines_elsewhere(cli):
    """Oracle: no carriage return or escape where the output is no terminal; about 20 lines of steps."""
    done = cli.tiny("--max-steps 90 --eval-steps 90")
    lines = [line for line in done.out.splitlines() if line.startswith("step ")]
    assert "\r" not in done.out + done.err and "\x1b" not in done.out + done.err and 5 <= len(lines) <= 40
    last = r"step 90/90  loss \d.*  R \d.*  kept 24/96  accuracy 0\.\d+  \d+ tokens/s  0 s left"
    assert re.fullmatch(last, lines[-2])
