"""train.py's CUDA path, on a GPU that is simulated: tests/simulated_gpu.py. Each docstring names its oracle."""
import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import frozen, made_once, outcome, write_checkpoint

from experiments import on_gpu
from formats import toy
from methods import fast
from running import folder

pytestmark = pytest.mark.ci                                # half a minute: in CI only

ROOT = Path(__file__).resolve().parents[1]
# Six steps, three to an epoch, of 16, 16 and 15 rows. What is eager at first, then records, then repeats is a part of
# 8 rows; the third batch has one of 8 rows too, of another share.
SMALL = "--task demo --limit-train 47 --limit-dev 16 --batch-size 16 --lr 0.02 --max-steps 6 --overwrite"
METHODS = {"lora2": "--k 2", "lora2, Eq. 8": "--importance full --init orthonormal", "adalora": "--method adalora",
           "lora": "--method lora", "sora": "--method sora", "bitfit": "--method bitfit", "head": "--method head",
           "full": "--method full"}
# Steps 3 to 5 log nothing: none may wait for the GPU. (The first ones make plans.)
STRICT = (("batch = next(batches)",
           "torch.cuda.set_sync_debug_mode('error' if state.step in (2, 3, 4) else 'default')\n"
           "            batch = next(batches)"),
          ("kept, optimizer, pruner)", "kept, optimizer, pruner); torch.cuda.set_sync_debug_mode('default')"))
R_IS_RECORDED = ("run_folder.finish(", "assert R_of is None or differentiate.graphs[R_of, o.reg]; run_folder.finish(")
STOP_AT_3 = ("signals.check(state.step)",
             "signals.number = 15 if state.step == 3 else 0; signals.check(state.step)")


@pytest.fixture(scope="module")
def simulation(tmp_path_factory):
    """A process in which torch has a GPU."""
    if torch.backends.cuda.is_built():
        pytest.skip("torch's CUDA build, which has GPUs of its own: the CPU build is needed")
    library = tmp_path_factory.mktemp("gpu") / "simulated_gpu.so"
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    words = ["g++", "-std=c++20", "-w", "-shared", "-fPIC", ROOT / "tests" / "simulated_gpu.cpp", "-o", library,
             f"-I{torch_folder}/include", f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib",
             "-lc10", "-ltorch_cpu"]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no g++ here")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"simulated_gpu.cpp does not fit torch {torch.__version__}: {error.stderr[-300:]}")
    with subprocess.Popen([sys.executable, "-m", "tests.simulated_gpu", library], cwd=ROOT, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        yield process


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: folder} of checkpoints of one layer; the others than "deberta" are without dropout."""
    made = tmp_path_factory.mktemp("models")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {"deberta": write_checkpoint(made / "deberta", "deberta", num_hidden_layers=1)} | {
        f"still {name}": write_checkpoint(made / f"still-{name}", name, num_hidden_layers=1, **still)
        for name in ("deberta", "bert", "roberta")}


@pytest.fixture
def gpu(simulation, models, tmp_path):
    """gpu(words, changes) runs train.py on the simulated GPU, small: .status, .said, .out, its folder.

    changes: of the text of train.py, (old, new). status: None after an exception.
    """
    def run(words="", *changes, model="deberta", out="run", resume=False):
        place = tmp_path / out
        given = ["--resume", str(place)] if resume else [
            *SMALL.split(), "--model", str(models[model]), "--out", str(place), "--device", "cuda"]
        print(json.dumps([[*given, *words.split()], changes]), file=simulation.stdin, flush=True)
        return SimpleNamespace(**json.loads(simulation.stdout.readline()), out=place)
    return run


def trained(done):
    """What a run that went well has made: all that its last step left, and its log; as bytes and numbers."""
    assert done.status == 0, done.said[-2000:]
    state = folder.load_state(done.out)
    return frozen([state[name] for name in ("weights", "optimizer", "pruner")]), outcome(done.out)["log.jsonl"]


def distance(a, b):
    """The largest difference of what two runs trained."""
    first, second = (folder.load_state(done.out)["weights"] for done in (a, b))
    return max((first[name] - second[name]).abs().max().item() for name in first)


# --- what runs -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("method", METHODS)
def test_recorded_is_eager_and_nothing_waits(gpu, method, dtype):
    """Oracle: --eager, bit for bit, with dropout, pruning and two parts to a batch; in a step that logs nothing the
    simulated GPU refuses what would wait for it, as set_sync_debug_mode("error") does."""
    words = f"{METHODS[method]} --dtype {dtype} --accum 2"
    recorded = gpu(words, *STRICT, R_IS_RECORDED, out="recorded")
    assert trained(recorded) == trained(gpu(f"{words} --eager", *STRICT, out="eager"))


def test_a_recorded_step_asks_little_of_the_host(gpu):
    """Oracle: a count: the forward and backward pass are one call to the GPU, R is one, and 58 are left of a step's
    some 400. (One operation on all parameters counts once here; a real GPU's host launches it in several parts.)"""
    count = ("batch = next(batches)", "torch.cuda.asked.clear(); batch = next(batches)"), (
        "kept, optimizer, pruner)", "kept, optimizer, pruner); print('ASKED', *torch.cuda.asked.items(), sep='|')")

    def asked(words):
        done = gpu(f"--k 2 {words}", *count, out=words.strip("-") or "recorded")
        last = [line for line in done.said.splitlines() if line.startswith("ASKED")][-3]   # no line of the log
        return Counter(dict(map(ast.literal_eval, last.split("|")[1:])))

    recorded, eager = asked(""), asked("--eager")
    assert recorded["replay"] == 2 and recorded.total() <= 60 and eager.total() > 400, (recorded, eager.total())


@pytest.mark.parametrize("model", ["still deberta", "still bert", "still roberta"])
def test_the_numbers_are_those_of_a_cpu(gpu, model, tmp_path):
    """Oracle: the same run on the CPU, where other forms of the attention compute; no dropout."""
    runs, merged = [], []
    for device in ("cuda", "cpu"):
        place = tmp_path / f"merged-{device}"
        done = gpu(f"--device {device} --dtype fp32 --merge {place}", model=model, out=device)
        assert done.status == 0, done.said[-2000:]
        runs.append(done)
        merged.append(load_file(place / "model.safetensors"))
    assert distance(*runs) < 1e-4
    torch.testing.assert_close(*merged, rtol=0, atol=1e-4)


@pytest.mark.parametrize("words", ["--dtype bf16", "--dtype fp32 --eager"])
def test_resumed_gives_the_same_bits(gpu, words):
    """Oracle: the run that nothing stopped. Dropout is on: the GPU's random numbers go on too."""
    whole = trained(gpu(words, out="whole"))
    assert gpu(words, STOP_AT_3).status == 143
    assert trained(gpu(resume=True)) == whole


def test_stopped_on_the_gpu_resumed_on_the_cpu(gpu):
    """Oracle: the run that was on the CPU from the start."""
    whole = gpu("--device cpu", model="still deberta", out="whole")
    assert gpu("--dtype fp32", STOP_AT_3, model="still deberta").status == 143
    half = gpu("--device cpu", resume=True)
    assert half.status == whole.status == 0, half.said
    assert distance(half, whole) < 1e-4


def test_a_step_that_is_not_finite_is_named(gpu):
    """Oracle: the step at which the loss was made infinite; fused AdamW was told on the GPU."""
    infinite = ("loss + norm, step)", "loss + norm + (math.inf if step == 4 else 0), step)")
    done = gpu("", infinite, *STRICT)
    assert done.status == 1 and "not finite at step 4" in done.said


def test_a_process_without_rows_takes_part(monkeypatch):
    """Oracle: the gradient of the weight's square. Where a batch has no row for a process, sum_gradients() gives it
    gradients before the first graph could: what R adds afterwards must be in these."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    differentiate = fast.Recorded([weight])
    for already in (None, torch.tensor([10.0, 20.0])):
        weight.grad = already
        assert differentiate(lambda: (weight ** 2).sum(), weight=0.5) == 5
        assert weight.grad is differentiate.gradients[0]
        assert torch.equal(weight.grad, weight if already is None else weight + already)


# --- what a GPU refuses ----------------------------------------------------------------------------------------

LOSS = "task_loss(predict_batch(net, part, here), part.labels)"
PART = "part = here.copies(*(tensor[i::n] for tensor in batch))"
REFUSED = {
    "a loss whose graph is kept while recording": (
        "R = differentiate(R_of, weight=o.reg) if R_of else None", "R = R_of(); fast.add_gradients(R, parameters, o.reg)",
        "operation would make the legacy stream depend on a capturing blocking stream"),
    "a number read while recording": (LOSS, f"{LOSS} + 0 * part.labels.sum().item()", "is capturing: _local_scalar"),
    "a copy while recording": (LOSS, f"{LOSS} + 0 * torch.ones(2).to(here.device).sum()", "is capturing: a copy to"),
    "a number read in a step": (PART, f"{PART}; loss.item()", "synchronizing CUDA operation: _local_scalar"),
    "a truth value in a step": (PART, f"{PART}; bool(loss > 1)", "synchronizing CUDA operation: "),
    "a copy that is waited for": (PART, "part = [tensor[i::n].to(here.device) for tensor in batch]",
                                  "synchronizing CUDA operation: a copy to the GPU"),
    "a copy from memory that is not pinned": (
        PART, "part = [tensor[i::n].to(here.device, non_blocking=True) for tensor in batch]",
        "synchronizing CUDA operation: a copy to the GPU"),
    "two devices": (PART, "part = [tensor[i::n] for tensor in batch]",
                    "all tensors to be on the same device"),
    "a gradient in another layout": (
        "    optimizer.step()",
        "    for p in parameters: p.grad = p.grad if p.dim() == 1 else p.grad.mT.contiguous().mT\n    optimizer.step()",
        "must have same dtype, device, and layout")}


@pytest.mark.parametrize("what", REFUSED)
def test_the_simulated_gpu_refuses(gpu, what):
    """Oracle: what CUDA and torch say to it, the first one on an H100: the runs above would have failed."""
    old, new, says = REFUSED[what]
    done = gpu("--eager" if "recording" not in what else "", (old, new), *STRICT)
    assert done.status is None and says in done.said, done.said[-2000:]


# --- the script for a real one ---------------------------------------------------------------------------------

def test_the_script_for_a_real_gpu_still_runs(tmp_path, one_thread, monkeypatch, capsys):
    """Oracle: each item's own assertions, on a CPU."""
    monkeypatch.setattr(toy, "language", made_once)
    items = ["card", "parity", "recorded", "not_finite"]
    assert on_gpu.main(["--rehearse", "--out", str(tmp_path), "--only", ",".join(items)]) == 0, capsys.readouterr()
    found = json.loads((tmp_path / "on-gpu.json").read_text())["items"]
    assert list(found) == sorted(items) and all(item["ok"] for item in found.values())
    assert found["parity"]["found"]["worst"]["gradients"] < 1e-4
