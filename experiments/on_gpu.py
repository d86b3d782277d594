"""What only a GPU can show, within eight minutes: is the CUDA path right?

    python experiments/on_gpu.py --out OUT
    python experiments/on_gpu.py --out OUT --rehearse          # the same on a CPU, small
    python experiments/on_gpu.py --out OUT --only parity,sync  # some of it

Each item prints one line as soon as it is known, and OUT/on-gpu.json is written after each; what
an earlier call found stays there. One that fails does not end the others. The oracles are the CPU,
in fp32, and eager execution. How fast it is, bench.py says.
"""
import argparse
import datetime
import math
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from experiments import summary
from experiments.speed import peers, steps
from formats import disk
from lora2 import lora2_layers
from methods import by_name
from running import demo, errors, folder, machine, progress

# 60 steps on made-up sentences, of the demo.
SHORT = "--task demo --batch-size 32 --limit-train 640 --limit-dev 100 --epochs 3".split()
PRUNED = "--r 4 --target-rank 2 --prune-warmup 5 --prune-final 10 --prune-interval 5".split()
METHODS = {"lora2": ["--k", "2", *PRUNED], "adalora": PRUNED, "lora": ["--r", "4"],
           "sora": ["--r", "4"], "bitfit": [], "head": [], "full": []}
# Family → its shape, and that in a rehearsal.
FAMILIES = {"deberta": ("deberta-v3-base", "tiny"), "roberta": ("roberta-base", "tiny-roberta"),
            "bert": ("bert-base", "tiny-bert")}
WHAT = ("logits", "gradients", "scores")                   # of a step is compared


# --- a run --------------------------------------------------------------------------------

def small_model(job, dropout=0.0):
    """A folder with a random DeBERTa of the demo's size."""
    path = job.work / f"model-{dropout}"
    config = demo.write_random_model(path, seed=0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    disk.write_json(path / "config.json", config | rates)
    return path


def call(*words, expect=0, says=""):
    """train.py on these words. AssertionError if it ends with another status, or other words."""
    status, said = steps.heard(train.main, [str(word) for word in words])
    assert status == expect and says in said, f"status {status}, {said[-600:]}"


def run(job, name, *words, method="lora2", model=None, device=None, dtype="fp32", **expected):
    """A short run of train.py, which is call()ed; its folder."""
    out = job.work / name
    place = ["--device", device or job.device, "--dtype", dtype, "--out", out, "--overwrite"]
    short = [*SHORT, "--max-steps", "24"] if job.rehearse else SHORT
    what = [*short, "--method", method, *METHODS[method], "--model", model or small_model(job)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                               # matrices this small are slower on more
    call(*what, *place, *words, **expected)
    torch.set_num_threads(threads)
    return out


def state(out):
    """{name: tensor} of what a run trained, as its last step left it."""
    return folder.load_state(out)["weights"]


def trained(job, *words, **more):
    """state() of a short run."""
    return state(run(job, "trained", *words, **more))


# --- a step -------------------------------------------------------------------------------

def shape(job, family):
    """(a folder with random weights of a family's shape, its config)."""
    config = steps.SHAPES[FAMILIES[family][job.rehearse]]
    return steps.write_checkpoint(job.work / family, config), config


def farthest(a, b):
    """The difference() of two {name: tensor}: 0 if they are equal."""
    assert a.keys() == b.keys()
    return peers.difference([(a[name], b[name]) for name in b])


def make_step(place, batch, k, **more):
    """An OwnStep of LoRA², the same on any device: its update is not 0, dropout is."""
    torch.manual_seed(0)
    step = steps.OwnStep(place, "lora2", batch, k=k, eager=True, **more)
    for _, layer in lora2_layers(step.net):
        layer.lam.data.copy_(0.1 * torch.randn(layer.lam.shape))
    peers.without_dropout(step.net)
    return step


def outcome(step, batch):
    """{"logits": ..., "gradients v": ..., "scores full": ..., ...} of one step, on the CPU.

    The gradients of one kind of parameter, all v say, are one vector: what hardly moves the loss
    has gradients that are rounding alone.
    """
    step.net.zero_grad()
    logits = train.predict_batch(step.net, batch, step.here)
    train.task_loss(logits, batch.labels).backward()
    found = {"logits": logits.detach()}
    for name, p in step.net.named_parameters():
        if p.requires_grad:
            kind = "gradients " + name.rpartition(".")[2]
            found[kind] = torch.cat([found.get(kind, p.grad[:0].flatten()), p.grad.flatten()])
    for importance in ("reduced", "full"):
        pruner = by_name.make_pruner("lora2", step.net, 4, importance, total_steps=10, warmup=0,
                                     final=0, interval=1)
        pruner.update_averages()
        found[f"scores {importance}"] = pruner.scores()
    return {name: tensor.double().cpu() for name, tensor in found.items()}


def compare(a, b):
    """{"logits", "gradients", "scores"}: how far a is from b, relative to b, all finite."""
    errors = {name: ((a[name] - b[name]).norm() / b[name].norm()).item() for name in b}
    assert all(map(math.isfinite, errors.values())), errors
    found = {}
    for what in WHAT:
        found[what] = max(error for name, error in errors.items() if name.startswith(what))
    return found


# --- what is checked ----------------------------------------------------------------------

def card(job):
    """What there is: names and versions."""
    facts = {"torch": torch.__version__, "python": sys.version.split()[0], "cores": os.cpu_count(),
             "device": machine.name_of(torch.device(job.device))}
    if job.device == "cuda":
        facts["properties"] = str(torch.cuda.get_device_properties(0))
    return facts


def parity(job):
    """Logits, gradients and scores of three families, on the GPU against the CPU, in fp32.

    In bf16 they are shown, and have the same bits once more, also where T > 132 shares buckets.
    """
    facts = {}
    for family, T, k in (("deberta", 128, 1), ("deberta", 128, 8), ("deberta", 256, 8),
                         ("deberta", 512, 8), ("roberta", 128, 1), ("roberta", 128, 8),
                         ("bert", 128, 1), ("bert", 128, 8)):
        place, config = shape(job, family)
        found = []
        for device, dtype in (("cpu", "fp32"), (job.device, "fp32"), (job.device, job.low_name),
                              (job.device, job.low_name)):
            batch = steps.make_batch(config, 2, T, device)
            found.append(outcome(make_step(place, batch, k, dtype=dtype), batch))
        right, ours, low, again = found
        assert farthest(again, low) == 0, f"{family} T={T} k={k}, twice"
        facts[f"{family} T={T} k={k}"] = compare(ours, right) | {"in bf16": compare(low, right)}
    worst = {}
    for what in WHAT:
        worst[what] = max(line[what] for line in facts.values())
        worst[f"{what} in bf16"] = max(line["in bf16"][what] for line in facts.values())
    assert worst["logits"] <= 1e-5 and worst["gradients"] <= 1e-4, (worst, facts)
    return {"worst": worst} | facts


def whole_run(job):
    """A run of 60 steps without dropout, on the GPU against the CPU: losses, ranks, weights."""
    gpu, cpu = run(job, "gpu"), run(job, "cpu", device="cpu")
    pairs = list(zip(summary.read_log(gpu), summary.read_log(cpu), strict=True))
    facts = {"losses": max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs),
             "weights": farthest(state(gpu), state(cpu)), "lines": len(pairs),
             "ranks equal": (gpu / "ranks.json").read_bytes() == (cpu / "ranks.json").read_bytes()}
    assert facts["losses"] <= 1e-4 and facts["weights"] <= 1e-3 and facts["ranks equal"], facts
    return facts


def recorded(job):
    """How far recorded steps are from eager ones: 0, with dropout, in parts, in bf16."""
    facts = {}
    for dropout in (0.0, 0.1):
        model = small_model(job, dropout)
        for words, more in ((["--accum", "1"], {}), (["--accum", "2"], {}),
                            ([], {"method": "adalora"}), ([], {"dtype": job.low_name})):
            a = trained(job, *words, model=model, **more)
            b = trained(job, *words, "--eager", model=model, **more)
            facts[f"dropout {dropout} {words} {more}"] = farthest(a, b)
    assert not any(facts.values()), facts
    return facts


def resumed(job):
    """How far a run that was stopped at step 20 is from a whole one: 0; GPU → CPU goes on."""
    facts, model = {}, small_model(job, 0.1)

    def stop_at_20(signals, step):
        if step == 20:
            raise errors.Stopped(15)

    for device, words in ((job.device, []), (job.device, ["--eager"]), ("cpu", [])):
        with mock.patch.object(machine.Signals, "check", stop_at_20):
            half = run(job, "half", *words, model=model, expect=143)
        call("--resume", half, "--device", device, *words)
        if device == job.device:
            whole = trained(job, *words, model=model)
            facts[f"twice {words}"] = farthest(trained(job, *words, model=model), whole)
            facts[f"resumed {words}"] = farthest(state(half), whole)
    assert not any(facts.values()), facts
    return facts


def sync(job):
    """No step waits for the GPU: steps 8 to 18 of every method, whole and in parts."""
    facts, usual = {}, train.update

    def wait_for_nothing(is_strict):
        if job.device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if is_strict else "default")

    def update(optimizer, parameters, loss, plan, step, *rest):
        usual(optimizer, parameters, loss, plan, step, *rest)
        wait_for_nothing(8 <= step < 18)                   # the first ones make plans and record

    for method in METHODS:
        for accum in (1, 2):
            with (mock.patch.object(train, "update", update),
                  mock.patch.object(progress, "LOG_STEPS", 10**9)):
                try:
                    run(job, "sync", "--accum", accum, method=method)
                except RuntimeError as error:
                    facts[f"{method} accum {accum}"] = f"{error}"[:200]
                finally:
                    wait_for_nothing(False)
    assert not facts, facts
    return {"methods": list(METHODS)}


def not_finite(job):
    """An infinite gradient at step 7 is named, and what is on disk is from before."""
    usual = train.update

    def update(optimizer, parameters, loss, plan, step, *rest):
        if step == 7:
            parameters[0].grad.fill_(math.inf)
        usual(optimizer, parameters, loss, plan, step, *rest)

    with mock.patch.object(train, "update", update):
        out = run(job, "inf", "--save-steps", "5", expect=1, says="not finite at step 7")
    assert all(tensor.isfinite().all() for tensor in state(out).values())
    return {"step": 7}


def out_of_memory(job):
    """A full GPU is one sentence, whether memory ends in a step or while the model is loaded."""
    if job.device != "cuda":
        return {"not run": "needs a GPU"}
    place, config = shape(job, "deberta")
    total = torch.cuda.get_device_properties(0).total_memory

    def large_step():
        batch = steps.make_batch(config, 32, 512, "cuda")
        steps.OwnStep(place, "lora2", batch, k=8, dtype="bf16")()

    def heard_within(share, *action):
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            return steps.heard(*action)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()

    torch.cuda.empty_cache()
    left = (torch.cuda.memory_reserved() + 2**28) / total
    step = heard_within(left, errors.exit_status, large_step)
    words = ["--model", small_model(job), "--device", "cuda", "--out", job.work / "oom",
             "--overwrite", "--batch-size", "100000"]
    whole = heard_within(1e-6, train.main, [*SHORT, *map(str, words)])
    facts = {"a step": step, "train.py": whole}
    assert step[0] == 1 and errors.GPU_IS_FULL in step[1] and whole[0] in (0, 1), facts
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
        return {"gathered": values, "steps": len(summary.read_log(run(job, "nccl")))}
    finally:
        machine.leave()


def demo_in_bf16(job):
    """The demo's question on the GPU in bf16: LoRA² at k = 1 answers it, accuracy ≥ 0.98."""
    if job.rehearse:
        return {"not run": "takes half a minute of pretraining"}
    call("--task", "demo", "--seed", "1", "--out", job.work / "demo")
    facts = {}
    for dtype in ("fp32", "bf16"):
        call("--task", "demo", "--model", job.work / "demo" / "base",
             *demo.WAYS["LoRA² k=1, pruned"], "--device", job.device, "--dtype", dtype,
             "--out", job.work / "answer", "--overwrite", "--seed", "1")
        result = disk.read_json(job.work / "answer" / "result.json", "")
        facts[dtype] = result["last"]["scores"]["dev"]["accuracy"]
    assert min(facts.values()) >= 0.98, facts
    return facts


def compiled(job):
    """Layers compiled, any T: gradients against eager ones, how many graphs, seconds.

    Differences are relative to the largest gradient of the model: one that is 1e-8 is rounding.
    """
    (place, config), facts = shape(job, "deberta"), {}
    torch._dynamo.utils.counters.clear()
    first = steps.make_batch(config, 8, 8, job.device)
    both = [make_step(place, first, 8, compile=compile) for compile in (True, False)]
    for B, T in zip((8, 6), (8, 24) if job.rehearse else (64, 160)):
        batch = steps.make_batch(config, B, T, job.device)
        start = time.perf_counter()
        gradients = []
        for step in both:
            found = outcome(step, batch)
            gradients.append({name: found[name] for name in found if "gradients" in name})
        seconds = round(time.perf_counter() - start, 2)
        facts[f"B={B} T={T}"] = {"gradients": farthest(*gradients), "seconds": seconds}
    assert max(found["gradients"] for found in facts.values()) <= 1e-4, facts
    return facts | {"graphs": torch._dynamo.utils.counters["stats"].get("unique_graphs")}


ITEMS = (card, parity, whole_run, recorded, resumed, sync, not_finite, out_of_memory, nccl,
         demo_in_bf16, compiled)


# --- the whole ----------------------------------------------------------------------------

def main(argv=None):
    """Look at the items; returns the exit status, 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for what is found")
    add("--only", help="names of items, a,b,c, in place of all")
    add("--seconds", type=float, default=460, help="no item begins later than that (460)")
    add("--rehearse", action="store_true", help="small, on a CPU if there is no GPU")
    job, begun = parser.parse_args(argv), time.perf_counter()
    job.device = "cuda" if torch.cuda.is_available() else "cpu"
    if job.device == "cpu" and not job.rehearse:
        print("error: there is no GPU here: give --rehearse", file=sys.stderr)
        return 2
    job.low_name = "bf16" if job.device == "cuda" else "fp32"
    job.out.mkdir(parents=True, exist_ok=True)
    path, seen = job.out / "on-gpu.json", {}
    found = {"command": "python experiments/on_gpu.py", "items": {}}
    if path.exists():                                      # what is not looked at again stays
        found = disk.read_json(path, "remove it")
    with tempfile.TemporaryDirectory() as work:
        job.work = Path(work)
        for item in ITEMS:
            name = item.__name__
            is_wanted = not job.only or name in job.only.split(",")
            if is_wanted and time.perf_counter() - begun < job.seconds:
                found["items"][name] = seen[name] = look(job, item)
                disk.write_json(path, found)
    failed = [name for name, line in seen.items() if not line["ok"]]
    print(f"{len(seen)} items, failed: {', '.join(failed) or 'none'}; written: {path}")
    return 1 if failed else 0


def look(job, item):
    """One item: {"ok", "seconds", "found" or "error"}, said in a line."""
    start = time.perf_counter()
    try:
        line = {"ok": True, "found": item(job)}
    except Exception as error:                             # whatever it is, the others go on
        line = {"ok": False, "error": f"{type(error).__name__}: {error}"[:4000],
                "where": traceback.format_exc()}
    line |= {"seconds": round(time.perf_counter() - start, 1), "torch": torch.__version__,
             "date": datetime.date.today().isoformat()}
    shown = line.get("found", line.get("error"))
    print(f"{'ok  ' if line['ok'] else 'FAIL'} {item.__name__} {line['seconds']} s: "
          f"{str(shown)[:1500]}", flush=True)
    return line


if __name__ == "__main__":
    sys.exit(main())
