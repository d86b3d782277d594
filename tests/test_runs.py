"""Tests of runs.py: a run loses nothing. Each docstring names its oracle."""
import errno
import fcntl
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from conftest import outcome, write_checkpoint
from safetensors import safe_open

import options
import runs
import train

ROOT = Path(__file__).parents[1]
BUSY = "--eval-steps 3 --save-steps 2 --max-steps 8"       # with 6 steps to an epoch, of all kinds of steps


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def refused(done, *says):
    """One error for the user, status 2."""
    assert done.status == 2 and len(done.errors) == 1 and done.errors[0].startswith("error: "), done.err
    assert all(word in done.errors[0] for word in says), done.err


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing catches it."""


# --- killed, stopped, and gone on ---------------------------------------------------------------------------

def test_killed_at_every_write(cli, monkeypatch):
    """Oracle: the unbroken run. Files change by os.replace and by nothing else: the run dies before each of them."""
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


def kill_and_resume(cli, moments):
    """SIGKILL at moments, as parts of a run's time, and resume; every time the outcome of an unbroken run."""
    words = f"--task demo --model {cli.models['deberta']} --limit-train 96 --limit-dev 64 --batch-size 16 --lr 0.02 "
    words += "--max-steps 60 --eval-steps 7 --save-steps 3 --out "

    def child(words):
        """A process that does this and nothing else. (A fork: it need not import torch once more.)"""
        if (pid := os.fork()) == 0:
            os.dup2(os.open("child.txt", os.O_CREAT | os.O_WRONLY), 1)
            os._exit(train.main(words.split()))
        return pid

    began = time.monotonic()
    assert os.waitpid(child(words + "whole"), 0)[1] == 0
    duration, killed = time.monotonic() - began, 0
    for moment in moments:
        shutil.rmtree("run", ignore_errors=True)
        pid = child(words + "run")
        time.sleep(moment * duration)
        os.kill(pid, signal.SIGKILL)
        killed += os.waitpid(pid, 0)[1] != 0
        begun = Path("run/last.pt").exists()
        assert cli("--resume run" if begun else words + "run").status == 0
        assert outcome("run") == outcome("whole"), moment
    return killed


def test_sigkill(cli):
    """Oracle: the unbroken run, bit for bit, but for seconds, tokens per second and date."""
    rng = random.Random()
    assert kill_and_resume(cli, [rng.uniform(0.1 + 0.3 * i, 0.4 + 0.3 * i) for i in range(3)]) >= 1


@pytest.mark.slow
def test_sigkill_often(cli):
    """Oracle: the unbroken run, at 20 random moments."""
    rng = random.Random()
    killed = kill_and_resume(cli, [rng.uniform(0.05, 1) for _ in range(20)])
    print(f"{killed} of 20 were killed before the end")
    assert killed >= 12


@pytest.mark.parametrize("where", ["step", "evaluation", "save"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_first(cli, monkeypatch, where, number):
    """Oracle: the unbroken run. Ctrl-C in a step, in an evaluation and while last.pt is written; then --resume."""
    assert cli.tiny(BUSY, out="whole").status == 0
    name = {"step": "task_loss", "evaluation": "predict_batch", "save": "evaluate_and_keep"}[where]
    real = getattr(train, name)

    def interrupted(run, *rest):
        if run.step == 6 and (where != "evaluation" or not run.net.training):
            signal.raise_signal(number)
        return real(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, name, interrupted)
        stopped = cli.tiny(BUSY)
    assert stopped.status == 128 + number and "--resume run goes on" in stopped.errors[-1]
    assert runs.load_state("run")["step"] == 6 and not runs.is_finished("run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert cli("--resume run").status == 0 and outcome("run") == outcome("whole")


def test_a_second_ctrl_c_does_not_wait(cli, monkeypatch):
    """Oracle: the state of the last save, from which the run goes on as if nothing had been."""
    assert cli.tiny(BUSY, out="whole").status == 0
    real = train.task_loss

    def impatient(run, batch):
        if run.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "task_loss", impatient)
        assert cli.tiny(BUSY).status == 130
    assert runs.load_state("run")["step"] == 4
    assert cli("--resume run").status == 0 and outcome("run") == outcome("whole")


def test_stop_at_survives_a_kill(cli, monkeypatch):
    """Oracle: the unbroken run, which ends at its first evaluation. Killed after it, the resumed one must too."""
    words = "--method head --stop-at 0.1 --eval-steps 2"
    assert cli.tiny(words, out="whole").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(train.show, "finish", lambda run: (_ for _ in ()).throw(Killed()))
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
            real = train.task_loss
            patch.setattr(train, "task_loss", lambda run, batch: (
                signal.raise_signal(signal.SIGINT) if run.step == 4 else None, real(run, batch))[1])
            assert cli.tiny("--eval-steps 2", words, out=out).status == 130
        return cli
    cli.stop = stop
    stop()
    return cli


def test_resume_refuses_other_settings(stopped):
    """Oracle: each option that differs is named with both values; the run folder stays as it was."""
    before = contents("run")
    refused(stopped("--resume run --k 2 --lr 0.1 --seed 1"), "--k 1, not 2", "--lr 0.02, not 0.1", "--seed 0, not 1")
    refused(stopped("--resume run --out other"), "--out")
    refused(stopped("--resume run --overwrite"), "--overwrite")
    refused(stopped("--resume run --eval run/adapter.safetensors"))
    assert contents("run") == before and not Path("other").exists()
    assert stopped("--resume run --k 1 --lr 0.02 --save-steps 5").status == 0


def test_resume_refuses_another_base(stopped, tmp_path):
    """Oracle: a checkpoint that differs in the seed of its weights alone, also behind the old name; a copy is fine."""
    other = write_checkpoint(tmp_path / "other", "deberta", seed=1)
    shutil.copytree(stopped.models["deberta"], "copy")
    refused(stopped("--resume run --model", other), "other is not the model")
    Path("link").symlink_to(other)
    refused(stopped("--resume run --model link"), "link is not the model")
    refused(stopped("--eval run/adapter.safetensors --model link"), "link is not the model")
    assert stopped("--eval run/adapter.safetensors --model copy").status == 0
    assert stopped("--resume run --model copy").status == 0


@pytest.mark.parametrize("what", ["initializer_range", "layer_norm_eps", "vocabulary", "lower case", "weight"])
def test_a_base_model_is_more_than_its_weights(cli, tmp_path, what):
    """Oracle: the model's function. Whatever changes it must be refused with an adapter of the old one."""
    shutil.copytree(cli.models["bert"], "base")
    assert cli.tiny("--model base", model="bert").status == 0
    config, tokenizer = json.loads(Path("base/config.json").read_text()), Path("base/tokenizer.json").read_text()
    if what == "vocabulary":
        tokenizer = tokenizer.replace('"cue0"', '"cueX"').replace('"cue1"', '"cue0"').replace('"cueX"', '"cue1"')
    elif what == "lower case":
        tokenizer = tokenizer.replace('"normalizer":null', '"normalizer":{"type":"Lowercase"}')
        tokenizer = tokenizer.replace('"normalizer": null', '"normalizer":{"type":"Lowercase"}')
    elif what == "weight":
        shutil.rmtree("base")
        write_checkpoint(tmp_path / "base", "bert", seed=1)
    else:
        config[what] = 0.07
    if what != "weight":
        Path("base/config.json").write_text(json.dumps(config))
        Path("base/tokenizer.json").write_text(tokenizer)
    refused(cli("--eval run/adapter.safetensors --model base"), "is not the model")


def test_resume_refuses_other_data(cli, monkeypatch):
    """Oracle: one word of one row changed since."""
    text = "sentence\tlabel\n" + "cue0 filler1\ta\ncue0 filler2\tb\n" * 20
    Path("own.tsv").write_text(text)
    words = "--train-file own.tsv --dev-file own.tsv --out run --batch-size 16 --max-steps 6 --max-len 16 --model"
    real = train.task_loss
    with monkeypatch.context() as patch:
        patch.setattr(train, "task_loss", lambda run, batch: (
            signal.raise_signal(signal.SIGINT) if run.step == 4 else None, real(run, batch))[1])
        assert cli(words, cli.models["bert"]).status == 130
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
    for name, command in (("last.pt", "--resume run"), ("adapter.safetensors", "--eval run/adapter.safetensors")):
        path = Path("run", name)
        whole = path.read_bytes()
        command = command + f" --model {stopped.models['deberta']}" if "eval" in command else command
        damaged = [whole[:rng.randrange(len(whole))] for _ in range(5)] + [b"", b"PK", whole + b"x" * 10]
        for _ in range(8):
            at = rng.randrange(len(whole))
            damaged.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
        for content in damaged:
            path.write_bytes(content)
            done = stopped(command)
            if done.status == 0:                           # bytes that mean nothing, as the padding of a zip
                assert name == "last.pt"
                shutil.rmtree("run")
                stopped.stop()
            else:
                refused(done, f"run/{name}")
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
    """Oracle: equality of the content, worked out by hand."""
    x = torch.tensor([1.0, 2.0])
    same = [{"b": x, "a": [1, "z"]}, {"a": (1, "z"), "b": x.clone()}, {"a": [1, "z"], "b": torch.stack([x, x])[0]}]
    assert len({runs.digest(value) for value in same}) == 1
    other = [{"a": [1, "z"]}, {"a": [1, "z"], "b": x.double()}, {"a": [1, "z"], "b": x[None]}, {"a": [1, "z"], "b": -x},
             {"a": ["1", "z"], "b": x}, {"a": [[1], "z"], "b": x}, {"a": [1.0, "z"], "b": x}, {"a": [], "b": x}]
    assert len({runs.digest(value) for value in other + same[:1]}) == len(other) + 1


# --- the run folder -----------------------------------------------------------------------------------------

def test_a_run_is_not_overwritten(cli):
    """Oracle: the old run's bytes, until --overwrite comes with a run that can begin."""
    assert cli.tiny("--seed 1").status == 0
    before = contents("run")
    refused(cli.tiny(), "--resume run", "--overwrite", "--out")
    for words in ("--k 99", "--prune-warmup 9 --prune-final 9", "--model nowhere", "--targets q,x", "--device tpu",
                  "--warmup 50", "--merge run/last.pt", "--predict none.tsv", "--max-len 41"):
        refused(cli.tiny("--overwrite", words))
        assert contents("run") == before, words
    assert cli.tiny("--overwrite").status == 0
    assert outcome("run") != before and outcome("run")["result.json"]["settings"]["seed"] == 0
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("x")
    refused(cli.tiny(out="notes"), "notes is not empty")
    assert cli.tiny("--overwrite", out="notes").status == 0 and Path("notes/mine.txt").read_text() == "x"


def test_half_removed_is_not_finished(cli, monkeypatch):
    """Oracle: no result.json in a folder whose run has not ended, wherever the removal of an older run is cut."""
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
        assert not runs.is_finished("run")


@pytest.mark.parametrize("words", ["--out file/run", "--out file", "--out run --merge file", "--out run --merge full",
                                   "--out run --export-peft file/x", "--out run --merge x --export-peft x",
                                   "--out run --merge run"])
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
    """small_disk(n): from now on no file can grow beyond n bytes; None ends it. (A real refusal by the system.)"""
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


@pytest.mark.parametrize("step", [4, 5, 6])
def test_a_full_disk_later(cli, small_disk, monkeypatch, step):
    """Oracle: the unbroken run. The last checkpoint stays; with room again the run goes on to the same end."""
    assert cli.tiny(BUSY, out="whole").status == 0
    real = train.task_loss
    with monkeypatch.context() as patch:
        patch.setattr(train, "task_loss", lambda run, batch: (small_disk(10_000) if run.step == step else None,
                                                             real(run, batch))[1])
        done = cli.tiny(BUSY)
    small_disk(None)
    assert done.status == 1 and len(done.errors) == 1 and "could not be written" in done.errors[0]
    assert runs.load_state("run")["step"] in (step - 1, step - 2) and not list(Path("run").glob("*.tmp"))
    assert cli("--resume run").status == 0 and outcome("run") == outcome("whole")


def test_write_file(tmp_path, monkeypatch):
    """Oracle: the old content, when the new one cannot be flushed or renamed."""
    path = tmp_path / "x"
    runs.write_file(path, "old")
    for name in ("fsync", "replace"):
        def fails(*args):
            raise OSError(errno.ENOSPC, "No space left on device")
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(OSError, match="x could not be written .No space left"):
                runs.write_file(path, b"new")
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    runs.write_file(path, "new é")
    assert path.read_bytes() == "new é".encode()


# --- several processes, terminals ---------------------------------------------------------------------------

def processes(words, before="", n=2):
    """n processes as torchrun makes them: [(status, output, errors)]. `before`: code that each runs first."""
    port = str(20_000 + os.getpid() % 20_000 + random.randrange(10_000))
    code = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, train\ntorch.set_num_threads(1)\n{before}\n"
    children = [subprocess.Popen([sys.executable, "-c", code + f"sys.exit(train.main({words.split()!r}))"], text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {
                                     "RANK": str(i), "WORLD_SIZE": str(n), "LOCAL_RANK": str(i), "MASTER_PORT": port,
                                     "MASTER_ADDR": "127.0.0.1"}) for i in range(n)]
    ends = [child.communicate(timeout=120) for child in children]
    return [(child.returncode, *end) for child, end in zip(children, ends)]


def test_two_processes_are_one(cli):
    """Oracle: one process, within float error, without dropout: losses, pruning, metrics counted once."""
    words = "--max-steps 7 --eval-steps 2 --batch-size 15 --limit-dev 61"
    assert cli.tiny(words, model="still", out="one").status == 0
    command = (f"--task demo --model {cli.models['still']} --limit-train 96 --limit-dev 64 --batch-size 16 --lr 0.02 "
               f"--out two {words}")
    ends = processes(command)
    assert [status for status, *_ in ends] == [0, 0], ends
    assert ends[1][1] == "" and "2 process(es)" in ends[0][1]          # one of them speaks and writes
    one, two = outcome("one"), outcome("two")
    assert one.keys() == two.keys() and one["ranks.json"] == two["ranks.json"]
    for a, b in zip(one["log.jsonl"], two["log.jsonl"], strict=True):
        assert a.keys() == b.keys() and a.get("kept") == b.get("kept")
        assert a.get("scores") == b.get("scores")
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)
    a, b = (runs.load_adapter(f"{name}/adapter.safetensors")[0] for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_a_dead_process_ends_the_others(cli):
    """Oracle: the promise: a sentence within seconds, where a lost process would be waited for."""
    before = ("real = train.task_loss\n"
              "train.task_loss = lambda run, batch: os._exit(9) if run.rank == 1 and run.step == 5 else real(run, batch)")
    began = time.monotonic()
    command = (f"--task demo --model {cli.models['still']} --limit-train 96 --limit-dev 64 --batch-size 16 "
               "--max-steps 12 --save-steps 2 --out run")
    (status, _, errors), (lost, *_) = processes(command, before)
    assert lost == 9 and status == 1 and time.monotonic() - began < 60
    assert "error: another process of this run has ended" in errors and "Traceback" not in errors
    assert runs.load_state("run")["step"] == 4
    refused(cli("--resume run"), "2 process(es)")
    assert [status for status, *_ in processes("--resume run")] == [0, 0]


@pytest.mark.slow
def test_torchrun(cli):
    """Oracle: the command of the README, to the end."""
    command = (f"{ROOT / 'train.py'} --task demo --model {cli.models['still']} --limit-train 96 --limit-dev 64 "
               "--batch-size 16 --max-steps 12 --out run")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *command.split()],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and runs.is_finished("run"), done.stderr
    assert outcome("run")["result.json"]["processes"] == 2


def test_a_bar_on_a_terminal(cli):
    """Oracle: a terminal of our own (pty): one line rewritten with all numbers, evaluations above it."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    command = (f"{ROOT / 'train.py'} --task demo --model {cli.models['still']} --limit-train 96 --limit-dev 64 "
               "--batch-size 16 --max-steps 30 --out run")
    child = subprocess.Popen([sys.executable, *command.split()], stdout=theirs, stderr=theirs, stdin=theirs,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(mine, 1 << 16)
        except OSError:                                    # EIO: the other side is closed
            break
        seen += piece
    assert child.wait() == 0
    text = seen.decode()
    bars = [part for part in re.split(r"[\r\n]+", text) if "step" in part and "%|" in part]
    assert len(bars) >= 3 and re.search(r"30/30 .*loss \d.*R \d.*kept 24/96.*accuracy 0\.\d+.*tokens/s", bars[-1])
    assert re.search(r"\d\d:\d\d<", bars[-1])              # time gone and time left
    assert "dev accuracy" in text and "\nstep 1/30  loss" not in text


def test_plain_lines_elsewhere(cli):
    """Oracle: no carriage return or escape where the output is no terminal; at most about 20 lines of steps."""
    done = cli.tiny("--max-steps 90 --eval-steps 90")
    lines = [line for line in done.out.splitlines() if line.startswith("step ")]
    assert "\r" not in done.out + done.err and "\x1b" not in done.out + done.err and 5 <= len(lines) <= 40
    assert re.fullmatch(r"step 90/90  loss \d.*  R \d.*  kept 24/96  accuracy 0\.\d+  \d+ tokens/s  0 s left", lines[-2])
