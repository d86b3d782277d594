"""What only a GPU can show, within eight minutes: is the CUDA path right, and how fast is it?

    python experiments/on_gpu.py --out OUT --model all-MiniLM-L6-v2 --data-dir glue
    python experiments/on_gpu.py --out OUT --rehearse          # the same on a CPU, small
    python experiments/on_gpu.py --out OUT --only parity,sync  # some of it

Each item prints one line as soon as it is known, and OUT/on-gpu.json is written after each; what
an earlier call found stays there. One that fails does not end the others. Correctness comes first,
then speed: OUT/bench-cuda.json is bench.py's. The oracles are the CPU, in fp32, and eager
execution.
"""
import argparse
import contextlib
import datetime
import functools
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import model as models
import train
from experiments import bench
from experiments.speed import peers, steps
from formats import disk
from lora2 import lora2_layers
from methods import baselines, fast
from running import demo, folder, machine, progress
from running.errors import Stopped

SIX = ["q", "k", "v", "o", "f1", "f2"]
BERT = {"model_type": "bert", "type_vocab_size": 2, "pad_token_id": 0,
        "max_position_embeddings": 512}
# 60 steps on made-up sentences, of the demo.
SHORT = "--task demo --batch-size 32 --limit-train 640 --limit-dev 100 --epochs 3".split()
PRUNED = "--r 4 --target-rank 2 --prune-warmup 5 --prune-final 10 --prune-interval 5".split()
METHODS = {"lora2": ["--k", "2", *PRUNED], "adalora": PRUNED, "lora": ["--r", "4"],
           "sora": ["--r", "4"], "bitfit": [], "head": [], "full": []}


# --- shared -------------------------------------------------------------------------------

def small_model(job, dropout=0.0):
    """A folder with a random DeBERTa of the demo's size; made once for each dropout."""
    path = job.work / f"model-{dropout}"
    if not path.exists():
        settings = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        usual = demo.CONFIG.copy()
        demo.CONFIG.update(settings)
        demo.write_random_model(path, seed=0)
        demo.CONFIG.update(usual)
    return path


def call(words):
    """train.py on these words, in this process: (exit status, what it said)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main([str(word) for word in words])
    return status, said.getvalue()


def run(job, name, *words, method="lora2", model=None, device=None, dtype="fp32", expect=0):
    """A short run of train.py; its folder. AssertionError if it ends with another status."""
    out = job.work / name
    place = ["--device", device or job.device, "--dtype", dtype, "--out", out, "--overwrite"]
    short = [*SHORT, "--max-steps", "24"] if job.rehearse else SHORT
    what = [*short, "--method", method, *METHODS[method], "--model", model or small_model(job)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                               # matrices this small are slower on more
    status, said = call([*what, *place, *words])
    torch.set_num_threads(threads)
    assert status == expect, f"{name}: status {status}, {said[-600:]}"
    return out


def losses(out):
    """The logged losses of a run."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def state(out):
    """{name: tensor} of what a run trained, as its last step left it."""
    return folder.load_state(out)["weights"]


def farthest(a, b):
    """The largest difference of two {name: tensor}, relative to the largest number."""
    assert a.keys() == b.keys()
    largest = max(tensor.abs().max().item() for tensor in b.values())
    return max((a[name] - b[name]).abs().max().item() for name in a) / largest


def same_bits(a, b):
    """Whether two {name: tensor} are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def replaced(place, name, value):
    """Inside, place.name is that value."""
    usual = getattr(place, name)
    setattr(place, name, value)
    try:
        yield usual
    finally:
        setattr(place, name, usual)


# --- the card -----------------------------------------------------------------------------

def card(job):
    """What there is: names, versions, and three rates to hold the others beside."""
    facts = {"torch": torch.__version__, "python": sys.version.split()[0], "cores": os.cpu_count(),
             "device": machine.name_of(torch.device(job.device))}
    if job.device == "cuda":
        facts["driver"] = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, check=False).stdout.strip()
        facts["capability"] = torch.cuda.get_device_capability()
    x = torch.zeros(1, device=job.device)
    n = 100 if job.rehearse else 10_000
    facts["us a launch"] = 1e6 * timed(job, functools.partial(add_often, x, n)) / n
    size = 2**20 if job.rehearse else 2**30
    a = torch.ones(size, dtype=torch.uint8, device=job.device)
    b = torch.empty_like(a)
    facts["copy, TB/s read and written"] = 2 * size / timed(job, lambda: b.copy_(a)) / 1e12
    sizes = [(256, 256, 256)] if job.rehearse else [
        (8192, 8192, 8192), (4096, 768, 768), (4096, 768, 3072)]
    for N, d, f in sizes:
        x = torch.randn(N, d, device=job.device, dtype=job.low)
        W = torch.randn(f, d, device=job.device, dtype=job.low)
        taken = timed(job, lambda x=x, W=W: torch.nn.functional.linear(x, W), repeat=50)
        facts[f"bf16 product {N}×{d}×{f}, TFLOP/s"] = 2 * N * d * f / taken / 1e12
    return facts


def add_often(x, n):
    """n operations that hardly compute anything."""
    for _ in range(n):
        x.add_(1)


def timed(job, function, repeat=5):
    """Seconds of one of some calls, after one that warms up."""
    function()
    return steps.seconds(function, job.device, repeat)


# --- correctness --------------------------------------------------------------------------

def build(job, config, k, device):
    """(model with LoRA² whose update is not 0, its trained parameters): no dropout, train mode."""
    torch.manual_seed(0)
    net = models.from_pretrained(config, 2)
    names = models.target_modules(net, SIX)
    baselines.add_method("lora2", net, names, net.head, k, 8, 32, None)
    for _, layer in lora2_layers(net):
        torch.nn.init.normal_(layer.lam, std=0.1)
    peers.without_dropout(net.to(device))
    return net, [p for p in net.parameters() if p.requires_grad]


def outcome(job, config, k, batch, device, dtype="fp32"):
    """{"logits": ..., name: gradient, "score …": importance of one step}, on the CPU."""
    net, parameters = build(job, config, k, device)
    here = machine.Machine(torch.device(device), dtype, 0, 1)
    fast.speed_up(net, dtype)
    logits = train.predict_batch(net, batch, here)
    [labels] = here.copies(batch.labels)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    for importance in ("reduced", "full"):
        pruner = baselines.make_pruner("lora2", net, 4, 10, 0, 0, 1, importance)
        pruner.update_averages()
        found[f"score {importance}"] = pruner.scores()
    return {"logits": logits.detach()} | {name: tensor.cpu() for name, tensor in found.items()}


def parity(job):
    """Logits, gradients and scores of three families, on the GPU against the CPU, in fp32."""
    base = steps.SHAPES["tiny" if job.rehearse else "deberta-v3-base"]
    sizes = {name: base[name] for name in ("hidden_size", "num_attention_heads",
                                           "intermediate_size", "num_hidden_layers")}
    shapes = {"deberta": base, "roberta": steps.SHAPES["roberta-large"] | sizes}
    shapes["bert"] = {name: value for name, value in base.items()
                      if name not in ("relative_attention", "pos_att_type")} | BERT
    facts = {}
    for family, config in shapes.items():
        place = steps.write_checkpoint(job.work / family, config)
        for T in (128, 256, 512) if family == "deberta" else (128,):
            for k in (1, 8) if T == 128 else (8,):
                batch = steps.make_batch(config, 2, T)
                right = outcome(job, place, k, batch, "cpu")
                facts[f"{family} T={T} k={k}"] = compare(
                    outcome(job, place, k, batch, job.device), right) | {
                    "in bf16": compare(outcome(job, place, k, batch, job.device, job.low_name),
                                       right)}
    worst = {}
    for what in ("logits", "gradients", "scores"):
        worst[what] = max(line[what] for line in facts.values())
        worst[f"{what} in bf16"] = max(line["in bf16"][what] for line in facts.values())
    assert worst["logits"] <= 1e-5 and worst["gradients"] <= 1e-4, (worst, facts)
    return {"worst": worst} | facts


def compare(a, b):
    """{"logits", "gradients", "scores"}: how far a is from b, relative to b, all finite.

    The gradients of one kind of parameter, all v say, are one vector: what hardly moves the loss
    has gradients that are rounding alone.
    """
    kinds = {}
    for name in b:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    found = {"logits": 0.0, "gradients": 0.0, "scores": 0.0}
    for kind, names in kinds.items():
        ours = torch.cat([a[name].flatten().cpu().double() for name in names])
        right = torch.cat([b[name].flatten().double() for name in names])
        error = ((ours - right).norm() / right.norm()).item()
        assert math.isfinite(error), kind
        what = kind if kind == "logits" else "scores" if "score" in kind else "gradients"
        found[what] = max(found[what], error)
    return found


def agrees_with_peers(job):
    """Own against transformers and peft on the GPU: logits and gradients (peers.parity)."""
    if not peers.available():
        return {"not run": "transformers or peft is not there"}
    config = steps.SHAPES["tiny" if job.rehearse else "deberta-v3-base"]
    place = steps.write_checkpoint(job.work / "peers", config)
    batch = steps.make_batch(config, 8, 16 if job.rehearse else 128, job.device)
    facts = peers.parity(place, batch)
    for side, make in (("own", steps.OwnStep), ("peer", peers.PeerStep)):
        found = []
        for dtype in (job.low_name, "fp32"):
            step = make(place, "frozen", batch, dtype=dtype)
            with torch.autocast(job.device, torch.bfloat16, enabled=dtype == "bf16"):
                found.append(peers.logits(step).float())
        facts[f"{side}, bf16 from fp32"] = ((found[0] - found[1]).norm() / found[1].norm()).item()
    assert facts["own, bf16 from fp32"] <= 2 * facts["peer, bf16 from fp32"] + 1e-6, facts
    return facts


def whole_run(job):
    """A run of 60 steps without dropout, on the GPU against the CPU: losses, ranks, weights."""
    gpu, cpu = run(job, "gpu"), run(job, "cpu", device="cpu")
    pairs = list(zip(losses(gpu), losses(cpu), strict=True))
    facts = {"losses": max(abs(a - b) / abs(b) for a, b in pairs),
             "weights": farthest(state(gpu), state(cpu)), "lines": len(pairs),
             "ranks equal": (gpu / "ranks.json").read_bytes() == (cpu / "ranks.json").read_bytes()}
    assert facts["losses"] <= 1e-4 and facts["weights"] <= 1e-3 and facts["ranks equal"], facts
    return facts


def recorded(job):
    """Recorded steps against eager ones: the same bits, with dropout, in parts, in bf16."""
    facts = {}
    for dropout in (0.0, 0.1):
        model = small_model(job, dropout)
        for words, more in ((["--accum", "1"], {}), (["--accum", "2"], {}),
                            ([], {"method": "adalora"}), ([], {"dtype": job.low_name})):
            a = state(run(job, "a", *words, model=model, **more))
            b = state(run(job, "b", *words, "--eager", model=model, **more))
            facts[f"dropout {dropout} {words} {more}"] = (
                "same bits" if same_bits(a, b) else farthest(a, b))
    assert set(facts.values()) == {"same bits"}, facts
    return facts


def resumed(job):
    """Stopped after 20 of 60 steps and resumed: the same bits; also GPU → CPU, which goes on."""
    facts, model = {}, small_model(job, 0.1)

    def stop_at_20(signals, step):
        if step == 20:
            raise Stopped(15)

    for words in ([], ["--eager"]):
        whole = run(job, "whole", *words, model=model)
        facts[f"twice {words}"] = same_bits(state(whole), state(run(job, "again", *words,
                                                                    model=model)))
        with replaced(machine.Signals, "check", stop_at_20):
            half = run(job, "half", *words, model=model, expect=143)
        status, said = call(["--resume", half, *words])
        assert status == 0, said[-600:]
        facts[f"resumed {words}"] = same_bits(state(whole), state(half))
    with replaced(machine.Signals, "check", stop_at_20):
        half = run(job, "half", model=model, expect=143)
    status, said = call(["--resume", half, "--device", "cpu"])
    assert status == 0, said[-600:]
    facts["GPU → CPU goes on"] = True
    assert all(facts.values()), facts
    return facts


def deterministic(job):
    """Three steps on random batches, twice: the same bits, where T > 132 shares buckets too."""
    config = steps.SHAPES["tiny" if job.rehearse else "deberta-v3-base"]
    place, facts = steps.write_checkpoint(job.work / "twice", config), {}
    for T in (16,) if job.rehearse else (128, 256):
        found = []
        for _ in range(2):
            torch.manual_seed(1)
            step = steps.OwnStep(place, "lora2", steps.make_batch(config, 8, T, job.device), k=8,
                                 dtype=job.low_name)
            for _ in range(3):
                step()
            found.append({str(i): p.detach().cpu() for i, p in enumerate(step.parameters)})
        facts[f"T={T}"] = same_bits(*found)
    assert all(facts.values()), facts
    return facts


def sync(job):
    """No step waits for the GPU: steps 8 to 18 of every method, whole and in parts."""
    facts = {}
    real = train.update

    def update(*given):
        real(*given)
        if job.device == "cuda":
            step = given[4]
            strict = 8 <= step < 18                        # the first ones make plans and record
            torch.cuda.set_sync_debug_mode("error" if strict else "default")

    for method in METHODS:
        for accum in (1, 2):
            with replaced(train, "update", update), replaced(progress, "LOG_STEPS", 10**9):
                try:
                    run(job, "sync", "--accum", accum, method=method)
                    facts[f"{method} accum {accum}"] = 0
                except RuntimeError as error:
                    facts[f"{method} accum {accum}"] = f"{error}"[:200]
                finally:
                    if job.device == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
    assert not any(facts.values()), facts
    return facts


def not_finite(job):
    """An infinite gradient at step 7 is named, and what is on disk is from before."""
    real = train.update

    def update(optimizer, parameters, loss, plan, step, *rest):
        if step == 7:
            parameters[0].grad.fill_(math.inf)
        real(optimizer, parameters, loss, plan, step, *rest)

    with replaced(train, "update", update):
        out = job.work / "inf"
        status, said = call([*SHORT, "--model", small_model(job), "--device", job.device, "--out",
                             out, "--overwrite", "--save-steps", "5"])
    assert status == 1 and "not finite at step 7" in said, (status, said[-600:])
    assert all(tensor.isfinite().all() for tensor in state(out).values())
    return {"said": said.strip().splitlines()[-1]}


def out_of_memory(job):
    """A full GPU is one sentence, whether memory ends in a step or while the model is loaded."""
    if job.device != "cuda":
        return {"not run": "needs a GPU"}
    config = steps.SHAPES["deberta-v3-base"]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    facts = {}
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        step = steps.OwnStep(job.work / "deberta", "lora2",
                             steps.make_batch(config, 32, 512, "cuda"), k=8, dtype="bf16")
        facts["no error"] = str(step())
    except RuntimeError as error:
        facts["error"] = f"{type(error).__name__}: {error}"[:120]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        out = job.work / "oom"
        status, said = call([*SHORT, "--model", small_model(job), "--device", "cuda", "--out", out,
                             "--overwrite", "--batch-size", "100000"])
        facts["train.py"] = [status, said.strip().splitlines()[-1]]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in facts.get("error", "") and facts["train.py"][0] in (0, 1), facts
    return facts


def nccl(job):
    """A group of one: barrier, sum, gather; then a step is recorded while its watchdog looks on."""
    if job.device != "cuda":
        return {"not run": "needs a GPU"}
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1,
                            device_id=torch.device("cuda:0"))
    try:
        machine.wait_for_all()
        x = torch.arange(5.0, device="cuda")
        machine.sum_up([x])
        assert x.tolist() == [0, 1, 2, 3, 4]
        values = [None]
        dist.all_gather_object(values, "here")
        out = run(job, "nccl")
        return {"gathered": values, "steps": len(losses(out))}
    finally:
        machine.leave()


def compiled(job):
    """Layers compiled, any T: gradients against eager ones, graphs, seconds; recorded too."""
    config = steps.SHAPES["tiny" if job.rehearse else "deberta-v3-base"]
    place, facts = steps.write_checkpoint(job.work / "compiled", config), {}
    plain, _ = build(job, place, 8, job.device)
    ours, _ = build(job, place, 8, job.device)
    fast.speed_up(plain)
    fast.speed_up(ours, compile=True)
    torch._dynamo.utils.counters.clear()
    here, task = machine.Machine(torch.device(job.device), "fp32", 0, 1), data.TASKS["rte"]
    worst = 0.0
    for B, T in zip((8, 6), (8, 24) if job.rehearse else (64, 160)):
        batch = steps.make_batch(config, B, T, job.device)
        start = time.perf_counter()
        train.gradients(ours, batch, task, here, 1)
        train.gradients(plain, batch, task, here, 1)
        error = compare(named_gradients(ours), named_gradients(plain))["gradients"]
        facts[f"B={B} T={T}"] = {"gradients": error,
                                 "seconds": round(time.perf_counter() - start, 2)}
        worst = max(worst, error)
        ours.zero_grad()
        plain.zero_grad()
    facts["graphs"] = torch._dynamo.utils.counters["stats"].get("unique_graphs")
    if job.device == "cuda":
        facts["ms a step, T=128"] = compiled_times(job, place, config)
    assert worst <= 1e-4, facts
    return facts


def compiled_times(job, place, config):
    """{what: ms} of recorded steps in bf16, with layers compiled and without."""
    batch, times = steps.make_batch(config, 32, 128, "cuda"), {}
    for compile in (False, True):
        for method in ("frozen", "lora2"):
            step = steps.OwnStep(place, method, batch, k=8, dtype="bf16", compile=compile)
            step()                                         # once as it is, then it is recorded
            name = f"{method}{', compiled' if compile else ''}"
            times[name] = 1000 * timed(job, step, repeat=10)
    return times


def named_gradients(net):
    """{name: gradient}, on the CPU, of what is trained."""
    return {name: p.grad.cpu() for name, p in net.named_parameters() if p.requires_grad}


def demo_in_bf16(job):
    """The demo's question on the GPU in bf16: LoRA² at k = 1 answers it, accuracy ≥ 0.98."""
    base = job.work / "demo" / "base"
    if job.rehearse:
        return {"not run": "takes half a minute of pretraining"}
    done = job.pretraining.wait()
    assert done == 0 and base.is_dir(), f"the demo ended with {done}"
    facts = {}
    for dtype in ("fp32", "bf16"):
        status, said = call(["--task", "demo", "--model", base, *demo.WAYS["LoRA² k=1, pruned"],
                             "--device", job.device, "--dtype", dtype, "--out", job.work / "answer",
                             "--overwrite", "--seed", "1"])
        assert status == 0, said[-600:]
        result = disk.read_json(job.work / "answer" / "result.json", "")
        facts[dtype] = result["last"]["scores"]["dev"]["accuracy"]
    assert min(facts.values()) >= 0.98, facts
    return facts


# --- speed --------------------------------------------------------------------------------

def speed(job):
    """bench.py's column for a GPU: its table is OUT/bench-cuda.md."""
    words = ["--device", job.device, "--out", str(job.out), "--rounds", str(job.rounds)]
    if job.model:
        words += ["--model", job.model, "--data-dir", job.data_dir, "--tasks", "rte,cola",
                  "--epoch-rows", "64" if job.rehearse else "0"]
    if job.rehearse:
        words += ["--quick", "--shape", "tiny"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = bench.main(words)
    assert status == 0, said.getvalue()[-600:]
    rows = [line for line in said.getvalue().splitlines() if line.startswith("|")]
    print("\n".join(rows), flush=True)
    return {"rows": len(rows)}


ITEMS = (card, parity, agrees_with_peers, whole_run, recorded, resumed, deterministic, sync,
         not_finite, out_of_memory, nccl, demo_in_bf16, speed, compiled)


# --- the whole ----------------------------------------------------------------------------

def parse(argv):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for what is found")
    add("--model", help="folder of all-MiniLM-L6-v2, for whole epochs")
    add("--data-dir", default="glue", help="folder that holds CoLA/, MRPC/, RTE/, STS-B/ (glue)")
    add("--only", help="names of items, a,b,c, in place of all")
    add("--seconds", type=float, default=460, help="no item begins later than that (460)")
    add("--rounds", type=int, default=5, help="of timing (5)")
    add("--rehearse", action="store_true", help="small, on a CPU if there is no GPU")
    return parser.parse_args(argv)


def main(argv=None):
    """Look at the items; returns the exit status, 1 if one has failed."""
    job = parse(argv)
    job.device = "cuda" if torch.cuda.is_available() else "cpu"
    if job.device == "cpu" and not job.rehearse:
        print("error: there is no GPU here: give --rehearse", file=sys.stderr)
        return 2
    job.low = torch.bfloat16 if job.device == "cuda" else torch.float32
    job.low_name = "bf16" if job.device == "cuda" else "fp32"
    job.out.mkdir(parents=True, exist_ok=True)
    path = job.out / "on-gpu.json"
    found = {"command": "python experiments/on_gpu.py", "items": {}}
    if path.exists():                                      # what is not looked at again stays
        found = disk.read_json(path, "remove it")
    with tempfile.TemporaryDirectory() as work:
        job.work = Path(work)
        seen = look_at_all(job, found, path)
    failed = [name for name in seen if not found["items"][name]["ok"]]
    print(f"{len(seen)} items, failed: {', '.join(failed) or 'none'}; written: {path}")
    return 1 if failed else 0


def look_at_all(job, found, path):
    """Put each item that is wanted into found["items"], and that into a file; returns their names.

    The demo's pretraining, half a minute of one core, goes on meanwhile.
    """
    chosen = job.only.split(",") if job.only else [item.__name__ for item in ITEMS]
    job.pretraining = None
    if "demo_in_bf16" in chosen and not job.rehearse:
        words = ["--task", "demo", "--seed", "1", "--out", str(job.work / "demo")]
        job.pretraining = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words],
                                           stdout=subprocess.DEVNULL)
    begun, seen = time.perf_counter(), []
    for item in ITEMS:
        name = item.__name__
        if name in chosen and time.perf_counter() - begun < job.seconds:
            found["items"][name] = look(job, item)
            seen.append(name)
            disk.write_json(path, found)
    if job.pretraining:
        job.pretraining.wait()
    return seen


def look(job, item):
    """One item: {"ok", "seconds", "found" or "error"}, said in a line."""
    start = time.perf_counter()
    line = {"ok": True}
    try:
        line["found"] = item(job)
    except Exception as error:                             # whatever it is, the others go on
        line |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:4000],
                 "where": traceback.format_exc()}
    line |= {"seconds": round(time.perf_counter() - start, 1), "torch": torch.__version__,
             "date": datetime.date.today().isoformat()}
    shown = line.get("found", line.get("error"))
    print(f"{'ok  ' if line['ok'] else 'FAIL'} {item.__name__} {line['seconds']} s: "
          f"{str(shown)[:1500]}", flush=True)
    return line


if __name__ == "__main__":
    sys.exit(main())
