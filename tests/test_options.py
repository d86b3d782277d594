"""Tests of options.py and of the mistakes that can be made on the command line. Docstrings name oracles."""
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from data import TASKS
from running import demo, export, folder, inputs, machine, options, progress, saving, schedule
from tests.cli import refused, write_task

ROOT = Path(__file__).parents[1]


# --- the table ----------------------------------------------------------------------------------------------

def test_every_option_is_read():
    """Oracle: the source: each option is used as o.NAME, settings["NAME"] or given["NAME"]."""
    source = "".join(inspect.getsource(module) for module in (train, inputs, saving, schedule, progress, export))
    source += inspect.getsource(options).split("# --- from words to options")[1]
    used = re.findall(r"""\bo\.(\w+)|\b(?:settings|given)\[["'](\w+)""", source)
    assert not options.TABLE.keys() - {name for pair in used for name in pair}


def test_help_tells_all(capsys):
    """Oracle: the tables. Every option, its default and every preset's numbers stand in --help."""
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 110
    for group, rows in options.OPTIONS.items():
        assert f"\n{group}:\n" in text
        for name, _, default, says, *_ in rows:
            entry = re.search(rf"\n  --{name}(?![\w-])(.*?)(?=\n  --|\n\n)", text, re.DOTALL)
            words = re.sub(r"\s+", " ", entry[1])
            assert says in words and (default in (None, False) or f"({default})" in words), name
    table = [line.split(maxsplit=1) for line in text.split("presets:")[1].splitlines()]
    lines = dict(line for line in table if len(line) == 2)
    for name in ("lr", "epochs", "alpha", "target-rank", "seed", "max-len"):
        expected = [row[name.replace("-", "_")] for row in options.PRESETS.values()]
        assert [float(number) for number in lines[name].split()] == expected


def test_commands_in_help(capsys):
    """Oracle: the parser, on each command of train.py's description, which --help shows as it stands."""
    commands = re.findall(r"train\.py (--[^#\n]*)", train.__doc__)
    given = [options.parse(command.split()) for command in commands]
    assert len(given) == 7 and given[1] == {"task": "rte", "k": 1}
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: python train.py [options]\n") and train.__doc__.strip() in text


def test_presets_by_method():
    """Oracle: AdaLoRA's scripts (r0 → target), LoRA's and SoRA's scale 2, full fine-tuning's small steps."""
    def of(task, method, **given):
        return vars(options.resolve({"task": task, "method": method} | given))

    for task, r in (("cola", 3), ("mnli", 3), ("rte", 2)):
        assert (of(task, "adalora")["r"], of(task, "adalora")["target_rank"]) == (r, 1)
    for method in ("lora", "sora"):
        assert of("rte", method)["alpha"] / of("rte", method)["r"] == 2
    assert of("rte", "full")["lr"] == 2e-5 and of("rte", "lora2")["lr"] == 1.2e-3
    assert of("sst2", "lora2", r=1)["target_rank"] == 1    # never above r
    assert of("rte", "head")["k"] is None and of("rte", "bitfit")["r"] is None
    assert of("rte", "lora2")["head_lr"] == 1.2e-3 and of("rte", "lora2", lr=1.0)["head_lr"] == 1.0
    rte = {"alpha": 32, "r": 4, "target_rank": 3, "reg": 0.3, "seed": 4, "max_len": 320}
    assert rte.items() <= of("rte", "lora2").items()


def test_r_alone_keeps_the_scale():
    """Oracle: the scale of the preset, alpha / r, worked out by hand; alpha given too is taken as it is."""
    def scale(task, method, **given):
        o = options.resolve({"task": task, "method": method} | given)
        return o.alpha / o.r

    assert [scale("cola", "lora", r=r) for r in (1, 8, 16)] == [2, 2, 2]       # it was 16 for r = 1
    assert [scale("cola", "lora2", r=r) for r in (1, 4, 8)] == [8, 8, 8]       # 32 / 4
    assert [scale("rte", "adalora", r=r) for r in (2, 12)] == [16, 16]
    assert scale("cola", "adalora") == 32 / 3              # its own preset of r, not one that was given
    assert scale("cola", "lora", r=1, alpha=16) == 16 and scale("cola", "lora", alpha=8) == 1


@pytest.mark.parametrize("words, scale", [("--r 4 --alpha 32", "8"), ("--method lora --r 1", "2")])
def test_the_scale_is_said(cli, words, scale):
    """Oracle: alpha / r by hand, in a line of its own; the adapter's layers have it."""
    said = cli.tiny(words).out.splitlines()
    assert f"the update is scaled by alpha / r = {scale}" in said
    tensors = folder.load_adapter("run/adapter.safetensors")[0]
    assert {float(t) for name, t in tensors.items() if name.endswith(".scale")} == {float(scale)}


@pytest.mark.parametrize("word, value", [
    ("--warmup=0", 0), ("--warmup=0.25", 0.25), ("--warmup=1", 1), ("--warmup=2e3", 2000),
    ("--targets=q, k", ["q", "k"]), ("--out=~/x", "/home/me/x"), ("--data-dir=a~b", "a~b")])
def test_what_is_typed(monkeypatch, word, value):
    """Oracle: by hand: steps or a fraction below 1; what a shell does with ~ where it sees one."""
    monkeypatch.setenv("HOME", "/home/me")
    assert list(options.parse([word]).values()) == [value]


@pytest.fixture
def machine_with(monkeypatch):
    """machine_with(gpus, mps, environment): torch reports that; returns the list of devices that are tried."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def pretend(gpus, mps, environment, works=True):
        tried, zeros = [], torch.zeros

        def try_device(n, device):
            tried.append(device)
            if not works:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
            return zeros(n)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch, "zeros", try_device)
        for word in environment.split():
            monkeypatch.setenv(*word.split("="))
        return tried
    return pretend


@pytest.mark.parametrize("gpus, mps, environment, name, device", [
    (4, True, "LOCAL_RANK=1", None, "cuda:1"), (0, True, "", None, "mps"), (0, False, "", None, "cpu"),
    (4, True, "", "cpu", "cpu"), (0, False, "WORLD_SIZE=", None, "cpu"), (0, False, "WORLD_SIZE=1", None, "cpu"),
    (0, True, "WORLD_SIZE=2", None, "cpu"),                # torch.distributed has no backend for mps
    (1, False, "LOCAL_RANK=3 CUDA_VISIBLE_DEVICES=3", None, "cuda:0"),
    (1, False, "LOCAL_RANK=3 CUDA_VISIBLE_DEVICES=GPU-8a1", "cuda", "cuda:0"),
    (2, False, "LOCAL_RANK=1 CUDA_VISIBLE_DEVICES=5,7", None, "cuda:1")])
def test_the_device_is_the_first_there_is(machine_with, monkeypatch, gpus, mps, environment, name, device):
    """Oracle: by hand: cuda → mps → cpu by what torch reports, with a GPU for each process of a machine; device 0
    where a launcher shows each process its own GPU alone."""
    tried = machine_with(gpus, mps, environment)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    world = 2 if "WORLD_SIZE=2" in environment else 1
    assert machine.join(name, "fp32") == (torch.device("cpu"), "fp32", world - 1, world) and tried == [device]


@pytest.mark.parametrize("gpus, environment, works, says", [
    (2, "LOCAL_RANK=2", True, "process 2 has no GPU, there are 2: give --nproc_per_node=2"),
    (1, "LOCAL_RANK=1", True, "process 1 has no GPU, there are 1: give --nproc_per_node=1"),
    (1, "", False, "--device cuda .*out of memory.*: give another, such as cpu"),
    (0, "LOCAL_RANK=one", True, "LOCAL_RANK=one, which is no number"),
    (0, "WORLD_SIZE=2", True, "fitting RANK, MASTER_ADDR, MASTER_PORT: .*torchrun"),
    (0, "WORLD_SIZE=2 RANK=0 MASTER_PORT=9", True, "fitting MASTER_ADDR: "),
    (0, "WORLD_SIZE=2 RANK= MASTER_ADDR=here MASTER_PORT=9", True, "fitting RANK: "),
    (0, "WORLD_SIZE=2 RANK=2 MASTER_ADDR=here MASTER_PORT=9", True, "fitting RANK, "),
    (0, "WORLD_SIZE=2 RANK=x MASTER_ADDR=here MASTER_PORT=9", True, "RANK=x, which is no number"),
    (0, "WORLD_SIZE=2 RANK=0 MASTER_ADDR=here MASTER_PORT=nine", True, "MASTER_PORT=nine"),
    (0, "WORLD_SIZE=2 RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=9", True, "do not find each other .Duplicate GPU")])
def test_no_device_and_no_others(machine_with, monkeypatch, gpus, environment, works, says):
    """Oracle: by hand: what torchrun would set and is not there, a GPU that is not there or full: a way out that is
    not the same once more, and at once, not after a wait for others."""
    def as_nccl(*_, **__):
        raise RuntimeError("Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000")
    machine_with(gpus, False, environment, works)
    monkeypatch.setattr(torch.distributed, "init_process_group", as_nccl)
    with pytest.raises(ValueError, match=says):
        machine.join()


def test_paths_survive_a_change_of_folder(cli, tmp_path, monkeypatch):
    """Oracle: the run that is resumed where it began. Of models on the Hub the name stays a name."""
    shutil.copytree(cli.models["bert"], "base")
    Path("own.tsv").write_text("sentence\tlabel\n" + "cue0 filler1\ta\ncue0 filler2\tb\n" * 20)
    words = "--train-file own.tsv --dev-file own.tsv --model base --max-len 16 --max-steps 4 --save-steps 2 --out "
    assert cli(words + "whole").status == 0 and cli(words + "run --export-peft peft").status == 0
    shutil.copytree("run", "again")
    Path("again/result.json").unlink()                     # as if it had been stopped at its end
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert cli("--resume ../again").status == 0
    for name in ("adapter.safetensors", "predictions_dev.tsv"):
        assert Path("../again", name).read_bytes() == Path("../whole", name).read_bytes()
    config = json.loads(Path("../peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None       # a folder's name is not for others
    assert options.resolve({"task": "rte", "model": "someone/base"}).model == "someone/base"


def test_a_cpu_that_imitates_bf16_is_told(cli, monkeypatch):
    """Oracle: by hand: fp32 says nothing and is the default; bf16 is what the user asked for, and is done."""
    cases = (True, "--dtype bf16", True), (False, "--dtype bf16", False), (True, "", False)
    for imitates, words, told in cases:
        monkeypatch.setattr(machine, "emulates_bf16", lambda device: imitates)
        done = cli.tiny("--max-steps 2 --overwrite", words)
        assert done.status == 0
        assert ("no bf16 arithmetic and imitates it" in done.err) == told


def in_python(program):
    """The numbers that a program prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return map(float, done.stdout.split())


PEAK = """
import resource, torch
from running import machine
before = machine.peak_memory(torch.device("cpu"))
tensor = torch.ones(100_000_000)
now = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e9
del tensor
print(before, machine.peak_memory(torch.device("cpu")), now)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what is held now is asked of Linux")
def test_peak_memory():
    """Oracles: a tensor of 0.4 GB in a process of its own, and what the kernel says it held with it."""
    before, after, now = in_python(PEAK)
    assert after == pytest.approx(now, rel=0.02) and after - before == pytest.approx(0.4, abs=0.05)


FAULTS = """
import resource, torch
from running import machine
def last():
    for _ in range(12):                                    # at first holes of other sizes are left
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.zeros(2**20 * million) for million in (1, 4, 12, 3)]              # 4 to 48 MB
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
default = last()
machine.keep_freed_memory()
print(default, last())
"""


@pytest.mark.ci
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc is left as it is")
def test_freed_memory_is_kept():
    """Oracle: the kernel's count of fresh pages: none for blocks of sizes that were freed before."""
    default, kept = in_python(FAULTS)
    if not default:
        pytest.skip("this kernel counts no fresh pages")
    assert kept < 100 < default                            # 100 pages of 80 MB: Python's own small objects


def test_peak_memory_is_unknown_without_its_line(tmp_path, monkeypatch):
    """Oracle: /proc/self/status as gVisor's kernel writes it: no VmHWM. A run must not end for its sake."""
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmSize:\t9 kB\nVmRSS:\t5 kB\n")
    monkeypatch.setattr("builtins.open", lambda path, *_, true=open, **more: true(
        status if path == "/proc/self/status" else path, *_, **more))
    assert machine.peak_memory(torch.device("cpu")) is None
    status.write_text("VmHWM:\t5000000 kB\n")
    assert machine.peak_memory(torch.device("cpu")) == 5.12


def test_tasks_in_their_own_spelling():
    """Oracle: the names that GLUE's files have: CoLA, SST-2, STS-B ..."""
    for name, task in TASKS.items():
        assert options.parse(["--task", task.folder]) == {"task": name}


# --- the command line's mistakes ----------------------------------------------------------------------------

# What is typed after `python train.py --model FOLDER`, and words of the answer. "..." is --task demo.
MISTAKES = """
                                        => no --task | cola
--task nli                              => nli | cola, sst2
--tas rte                               => --tas | --help
--task rte extra                        => extra
--train-file x                          => --dev-file
--task rte --train-file x --dev-file y  => --task
--train-file no.tsv --dev-file no.tsv   => --train-file no.tsv | no such file
--resume nowhere                        => nowhere/last.pt
--resume .                              => last.pt
--resume a --eval b                     => --eval | --resume
--eval nowhere                          => nowhere
--eval .                                => adapter.safetensors
... --dev-file x                        => --train-file
... --merge=                            => --merge | empty
--task rte --predict=                   => --predict | empty
... --predict no.tsv                    => --predict no.tsv | no such file
... --predict .                         => cannot be read
... --k                                 => --k
... --k one                             => --k | one
... --k 0                               => --k 0 | at least 1
... --k 33                              => k = 33
... --r 0                               => --r 0
... --target-rank 9                     => target_rank = 9 | r = 8
... --alpha 0                           => alpha
... --alpha nan                         => alpha
... --targets q,x                       => --targets | q,k,v,o,f1,f2
... --targets ,                         => --targets
... --targets q,q                       => --targets
... --reg-terms qp                      => --reg-terms | uv,UV,PQ
... --reg -1                            => --reg
... --init zeros                        => --init
... --importance x                      => --importance
... --method qlora                      => --method
... --method lora --k 2                 => --k | --method lora
... --method head --r 2                 => --r
... --method full --export-peft x       => --export-peft
... --sora-threshold 1                  => --sora-threshold
... --method bitfit --outer-lr 0.1      => --outer-lr means nothing to --method bitfit
... --epochs 0                          => --epochs
... --max-steps 0                       => --max-steps
... --batch-size 0                      => --batch-size
... --batch-size 99999999999999999999   => --batch-size
... --accum -2                          => --accum
... --lr -1                             => --lr
... --lr nan                            => --lr
... --lr inf                            => --lr
... --head-lr -1                        => --head-lr
... --clip -1                           => --clip
... --warmup -1                         => --warmup
... --warmup 1.5                        => 1.5
... --warmup nan                        => --warmup
... --warmup 1e300                      => 1e300
... --warmup 441                        => --warmup 441 | 441 steps
... --max-len 2                         => 2
... --max-len 41                        => 40 tokens
... --head-dropout 1                    => --head-dropout
... --head-dropout -0.1                 => --head-dropout
... --weight-decay -1                   => --weight-decay
... --seed -1                           => --seed
... --seed 99999999999999999999         => --seed
... --eval-steps 0                      => --eval-steps
... --save-steps 0                      => --save-steps
... --limit-train 0                     => --limit-train
... --limit-dev -1                      => --limit-dev
... --stop-at 0.9                       => --stop-at | --method lora2
... --max-steps 5 --prune-warmup 3 --prune-final 2 => --prune-warmup 3 | --prune-final 2 | 5 steps
... --prune-warmup 0.7 --prune-final 0.5 => 308 | 220 | 441 steps
... --prune-interval -5                 => --prune-interval
... --device tpu                        => --device tpu
... --device meta                       => --device meta
... --model nowhere/at/all              => nowhere/at/all
... --dtype fp16                        => --dtype
"""
MISTAKES = [line.split("=>") for line in MISTAKES.strip("\n").splitlines()]


@pytest.mark.parametrize("words, says", MISTAKES, ids=[words.strip() or "nothing" for words, _ in MISTAKES])
def test_mistakes(cli, words, says):
    """Oracle: the promise: one line that names the option, status 2, nothing written."""
    done = cli("--model", cli.models["deberta"], words.replace("...", "--task demo"))
    refused(done, *says.strip().split(" | "))
    assert list(Path().iterdir()) == []


def test_mistakes_in_the_demo(cli, monkeypatch):
    """Oracle: the promise; the demo never writes over a folder that it did not make."""
    refused(cli("--task demo --k 8"), "--out and --seed", "--model runs/demo/base")
    Path("mine").mkdir()
    Path("mine/base").write_text("x")
    refused(cli("--task demo --out mine"), "mine is not empty")
    assert [path.name for path in Path().iterdir()] == ["mine"]
    for world in ("", "1"):                                # as in a shell whose variable is not set
        monkeypatch.setenv("WORLD_SIZE", world)
        assert demo.place_and_seed({"task": "demo", "out": "new"}) == (Path("new"), 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(cli("--task demo --out new"), "the demo is one process")


def test_mistakes_in_files(cli, monkeypatch):
    """Oracle: the file and its line, or the layout that is expected; nothing is fetched from this machine. (What else
    a file can have wrong: test_glue.py.)"""
    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr("urllib.request.OpenerDirector.open", no_network)
    Path("glue/RTE").mkdir(parents=True)
    words = f"--task rte --max-len 32 --max-steps 2 --out run --model {cli.models['bert']}"
    refused(cli(words), "no network", "dl.fbaipublicfiles.com", "glue/RTE holds train.tsv, dev.tsv")
    refused(cli(words, "--data-dir new"), "--data-dir new does not hold RTE/")
    refused(cli(words, "--data-dir", Path(__file__)), "--data-dir", "test_options.py is a file")
    Path("own.tsv").write_text("sentence\tlabel\nx\ta\ny\tb\n")
    Path("dev.tsv").write_text("sentence\tlabel\nx\tc\n")
    refused(cli(f"--train-file own.tsv --dev-file dev.tsv --model {cli.models['bert']}"), "dev.tsv:2", "'c'")
    assert {path.name for path in Path().iterdir()} == {"glue", "new", "own.tsv", "dev.tsv"}


def test_what_is_fetched_can_be_predicted(cli, monkeypatch):
    """Oracle: the README's command: before the data are fetched there is no such file."""
    monkeypatch.setattr(inputs.fetch, "fetch_task", lambda task, folder: write_task("rte", Path(folder)))
    words = f"--task rte --predict glue/RTE/test.tsv --max-len 32 --max-steps 4 --out run --model {cli.models['bert']}"
    assert cli(words).status == 0 and Path("run/RTE.tsv").exists()


def test_mistakes_with_own_files_of_a_run(cli):
    """Oracle: the option that names what is missing: not given, or not there any more."""
    Path("own.tsv").write_text("sentence\tlabel\n" + "cue0 filler1\ta\ncue0 filler2\tb\n" * 20)
    words = f"--train-file own.tsv --dev-file own.tsv --max-len 16 --out run --model {cli.models['bert']}"
    assert cli(words, "--max-steps 4").status == 0
    evaluation = f"--eval run/adapter.safetensors --model {cli.models['bert']}"
    refused(cli("--eval run/adapter.safetensors"), "--dev-file and --model")
    refused(cli(evaluation), "--dev-file")
    refused(cli(evaluation, "--dev-file gone.tsv"), "--dev-file gone.tsv: there is no such file")
    refused(cli(evaluation, "--dev-file own.tsv --train-file own.tsv"), "no --train-file")
    refused(cli(evaluation, "--dev-file own.tsv --predict gone.tsv"), "--predict gone.tsv")
    Path("own.tsv").rename("moved.tsv")
    Path("run/result.json").unlink()                       # as if it had been stopped at its end
    refused(cli("--resume run"), "--train-file", "own.tsv: there is no such file")
    assert cli("--resume run --train-file moved.tsv --dev-file moved.tsv").status == 0


def test_mistakes_with_an_adapter(cli, tmp_path):
    """Oracle: the adapter's own settings, of which none may be gainsaid."""
    assert cli.tiny().status == 0
    model = f"--model {cli.models['deberta']}"
    refused(cli("--eval run/adapter.safetensors"), "give them as --model")
    refused(cli("--eval run/adapter.safetensors --k 2", model), "--k 1, not 2")
    refused(cli("--eval run/adapter.safetensors --out x --save-steps 3", model), "--out", "--save-steps")
    refused(cli("--eval run/adapter.safetensors --batch-size 0", model), "--batch-size")
    refused(cli("--eval run/adapter.safetensors --task rte", model), "--task demo, not rte")
    refused(cli("--eval run/adapter.safetensors --merge run", model), "--merge")
    refused(cli("--eval run/last.pt", model), "run/last.pt")
    refused(cli("--eval", cli.models["deberta"] / "model.safetensors", model), "model.safetensors")
    assert cli("--eval run/adapter.safetensors --k 1 --batch-size 7", model).status == 0
    assert cli.tiny("--method bitfit", out="bias").status == 0
    refused(cli("--eval bias/adapter.safetensors --export-peft x", model), "--export-peft", "bitfit")


NOBODY = "http://127.0.0.1:9"                              # nobody listens on the discard port


def test_mistakes_for_the_shell(tiny, tmp_path):
    """Oracle: a real process: its status, one line on stderr, nothing else."""
    (tmp_path / "empty/RTE").mkdir(parents=True)
    words = ["--task", "rte", "--data-dir", "empty", "--model", str(tiny["bert"])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "https_proxy": NOBODY}
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words], cwd=tmp_path, text=True,
                          capture_output=True, env=environment)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ") and "train.tsv" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("name, error", [("task_loss", ValueError), ("evaluate", ValueError),
                                         ("evaluate", RuntimeError), ("prepare", RuntimeError)])
def test_a_bug_is_no_mistake_of_the_user(cli, monkeypatch, name, error):
    """Oracle: Python's own behaviour: an exception in the loop keeps its type and its traceback."""
    def fails(*_):
        raise error("a bug")
    monkeypatch.setattr(train, name, fails)
    with pytest.raises(error, match="a bug"):
        cli.tiny()
