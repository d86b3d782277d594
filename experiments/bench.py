"""How fast LoRA² is, against its own frozen backbone, against AdaLoRA and against transformers with peft.

    python experiments/bench.py --model all-MiniLM-L6-v2 --data-dir glue    # all that can be measured
    python experiments/bench.py --quick                  # two layers, a few rows: does it work? no verdicts
    python experiments/bench.py --counts                 # rows 5, 6, 7, 9 alone: nothing is timed
    python experiments/bench.py --growth                 # cost against T, B, k, depth and data instead

A ratio of times is taken within a round, in which all variants run one after the other, each time in another
order; shown are the median over the rounds, the least and the greatest. Counts are exact. Before anything is
timed, own and peer have to compute the same logits and gradients. Ours are the public functions of this
project, the peers are transformers and peft in train mode with dropout: speed/peers.py. Without them, without
a GPU, without --model (a folder; for rows 9 and 12) the rows concerned are "not run".
"""
import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import importlib.util
import io
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.speed import counts
from experiments.speed import peers
from experiments.speed import steps
import data
from running import options
from running import machine as processes
from formats import glue
import train
from experiments.speed.table import ROWS, page, paired, report, summary, worst, write
from lora2 import lora2_layers, merge_lora2

TASKS = ("rte", "mrpc", "stsb", "cola")


# --- what is counted ----------------------------------------------------------------------------------------

def count_operations(job):
    """Rows 6 and 7, on a narrow model: the number of operations depends on depth, not on width."""
    config = steps.SHAPES[job.narrow]
    folder = steps.write_checkpoint(job.work / "narrow", config)
    batch, all_layers = steps.make_batch(config, 2, job.T, job.device), config["num_hidden_layers"]
    ours, table = ("own LoRA² k=1", "own LoRA² k=8"), {}
    for layers in (2, all_layers):
        own = lambda method, k=1: steps.OwnStep(folder, method, batch, k=k, layers=layers, dtype=job.dtype)
        table |= {("own frozen", layers): own("frozen"), ("own AdaLoRA r=8", layers): own("adalora")}
        table |= {(name, layers): own("lora2", k) for name, k in zip(ours, (1, 8))}
        for method in peers.METHODS if job.peers else ():
            peer = peers.PeerStep(folder, method, batch, layers=layers, dtype=job.dtype)
            table[f"transformers, {method}", layers] = peer
    table = {name: counts.count_parts(step) for name, step in table.items()}
    total = lambda parts: sum(part.total for part in parts.values())
    reads = lambda parts: sum(part.reads for part in parts.values())
    update = lambda parts: parts["clip, AdamW"].total + parts["importance, selection"].total
    mine = [table[name, all_layers] for name in ours]
    job.results["6"] = worst(map(total, mine))
    job.results["6 update"] = worst(map(update, mine))
    job.results["6 depth"] = worst(update(table[name, all_layers]) - update(table[name, 2]) for name in ours)
    job.results["7"] = worst(map(reads, mine))
    job.details["operations"] = [
        {"step": name, "layers": layers} | {part: ops.total for part, ops in parts.items()} | {
            "total": total(parts), "views": sum(ops.views for ops in parts.values()),
            "host reads": reads(parts)}
        for (name, layers), parts in table.items()]


def count_saved(job):
    """Row 5: bytes that a forward pass keeps. Of four ratios (two k, two peers) the worst one counts."""
    batches = [steps.make_batch(job.config, job.B, T) for T in (job.T, 2 * job.T)]
    layers = 2 if job.counts else job.layers
    make = {f"own LoRA² k={k}": lambda k=k: steps.OwnStep(
        job.folder, "lora2", batches[0], k, layers=layers) for k in (1, 8)}
    for method in ("lora", "adalora") if job.peers else ():
        make[f"transformers, {method}"] = lambda method=method: peers.PeerStep(
            job.folder, method, batches[0], layers=layers)
    table = [{"B": job.B, "T": batch[0].shape[1], "layers": layers or "all"} for batch in batches]
    for name, build in make.items():
        step = build()
        for step.batch, row in zip(batches, table):
            row[name] = counts.saved_bytes(step.loss, step.net)
    job.details["saved bytes"] = table
    for key, row in zip(("5 T=128", "5 T=256"), table):
        ratios = [row[a] / row[b] for a in row for b in row if "own" in a and "transformers" in b]
        if ratios:
            job.results[key] = worst(ratios)


def count_tokens(job):
    """Row 9: what an epoch's batches of 32 hold, padding included, per token of the data."""
    for task in TASKS:
        examples = encoded(job, task)
        total = real = 0
        for batch in data.batches(examples, 32, 0, torch.Generator().manual_seed(0)):
            total += batch.attention_mask.numel()
            real += int(batch.attention_mask.sum())
        job.results[f"9 {task}"] = summary([total / real], processed=total, real=real)


def encoded(job, task):
    """A task's training rows as data.Examples, at the length of its preset."""
    split = glue.load_split(data.TASKS[task], job.data_dir, "train")
    return data.encode(data.load_tokenizer(job.model), split, options.PRESETS[task]["max_len"])


# --- what is timed ------------------------------------------------------------------------------------------

def products(batch, config, device, dtype):
    """{size: (function, its FLOPs)} of matrix products alone: the step's largest, and a large square one.

    On a CPU ten in a row: for long enough to be as exposed to whatever else runs there as a step is.
    """
    N, d, f = batch[0].numel(), config["hidden_size"], config["intermediate_size"]
    sizes, times = {"feed-forward": (N, d, f), "square": (2048, 2048, 2048)}, 1 if device == "cuda" else 10
    dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    chosen = {}
    for name, (n, d_in, d_out) in sizes.items():
        x, W = (torch.randn(rows, d_in, device=device, dtype=dtype) for rows in (n, d_out))
        chosen[name] = (lambda x=x, W=W: [torch.nn.functional.linear(x, W) for _ in range(times)],
                        times * 2 * n * d_in * d_out)
    return chosen


def eval_of(step, merge):
    """A forward pass without gradients: of a merged model whose update is not 0, or of a plain one."""
    if merge:
        for _, layer in lora2_layers(step.net):
            torch.nn.init.normal_(layer.lam)
        merge_lora2(step.net)
    step.net.eval()
    return torch.no_grad()(step.loss)


def time_steps(job, T):
    """Rows 1 to 4, 8, 10 and 11 at one length: all variants in the same rounds."""
    if job.compile:
        torch.compiler.reset()                             # each length has its own limit of graphs
    batch = steps.make_batch(job.config, job.B, T, job.device)
    common = dict(batch=batch, dtype=job.dtype, layers=job.layers)
    own = lambda method, k=1, r=8, **more: steps.OwnStep(job.folder, method, k=k, r=r, **common, **more)
    variants = {"own frozen": own("frozen", compile=job.compile)}
    for k in (1, 8):
        variants[f"own LoRA² k={k}"] = own("lora2", k, compile=job.compile)
        variants[f"own AdaLoRA r={k}"] = own("adalora", r=k, compile=job.compile)
    variants["own LoRA² k=8, task loss alone"] = own("lora2", 8, extras=False, compile=job.compile)
    variants |= {"plain": eval_of(own("frozen"), False), "merged": eval_of(own("lora2", 8), True)}
    for method in ("frozen", "adalora") if job.peers else ():
        variants[f"transformers, {method}"] = peers.PeerStep(job.folder, method, **common)
    matrices = products(batch, job.config, job.device, job.dtype)
    variants |= {name: function for name, (function, _) in matrices.items()}
    times = steps.interleave(variants, job.rounds, job.device, 10 if job.device == "cuda" else 1)
    job.details[f"seconds, T={T}"] = {name: summary(values) for name, values in times.items()}
    if job.device == "cuda":
        counted = job.results["7"]["value"]                # no less than was counted, or found at another T
        job.results["7"] = worst([counted, synchronises(variants["own LoRA² k=8"])])
    ratio = lambda a, b: paired(times[a], times[b])
    found = {}
    for k in (1, 8):
        found[f"1 k={k}"] = ratio(f"own LoRA² k={k}", "own frozen")
        found[f"2 k={k}"] = ratio(f"own LoRA² k={k}", f"own AdaLoRA r={k}")
    if job.peers:
        found["3"] = ratio("transformers, adalora", "own LoRA² k=8")
        found["4"] = ratio("transformers, frozen", "own frozen")
    found |= {"8": ratio("own LoRA² k=8", "own LoRA² k=8, task loss alone"),
              "11 k": ratio("own LoRA² k=8", "own LoRA² k=1"), "11 merged": ratio("merged", "plain")}
    config = job.config | ({"num_hidden_layers": job.layers} if job.layers else {})
    flops = counts.frozen_flops(config, job.B, T)
    rates = [max(n / times[name][i] for name, (_, n) in matrices.items()) for i in range(job.rounds)]
    found["10 rate"] = summary(flops / t / 1e12 for t in times["own frozen"])
    share = lambda name: summary(flops / t / rate for t, rate in zip(times[name], rates))
    found["10 share"] = share("own frozen")
    if job.peers:
        found["10 peer"] = share("transformers, frozen")
    job.details[f"products, T={T}"] = {"GFLOP": flops / 1e9, "GFLOP/s": summary(rate / 1e9 for rate in rates)}
    return found


def synchronises(step):
    """1 if the host waits for the GPU inside a step, else 0."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        return 0
    except RuntimeError as error:
        print(f"row 7: {error}", file=sys.stderr)
        return 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_memory(job):
    """Row "5 peak", on a GPU: most bytes allocated in a step, weights included, one model at a time."""
    batch = steps.make_batch(job.config, job.B, job.T, job.device)
    common = dict(batch=batch, dtype=job.dtype, layers=job.layers)
    make, peak = {"own": lambda: steps.OwnStep(job.folder, "lora2", k=8, **common)}, {}
    if job.peers:
        make["peer"] = lambda: peers.PeerStep(job.folder, "adalora", **common)
    for name, build in make.items():
        gc.collect()                                       # what others left, in circles of references
        before = torch.cuda.memory_allocated()
        step = build()
        step()                                             # makes the optimizer's state
        torch.cuda.reset_peak_memory_stats()
        step()
        peak[name] = torch.cuda.max_memory_allocated() - before
        del step
    job.details["peak memory"] = peak
    if job.peers:
        job.results["5 peak"] = summary([peak["own"] / peak["peer"]])


def epochs(job, task, rows):
    """Seconds of an epoch on a task's first `rows` (0: all) as a user starts it: (train.py's, the peer's).

    Both choose anew at every step and are without their imports.
    """
    device, max_len = torch.device(job.device).type, options.PRESETS[task]["max_len"]
    words = f"--task {task} --k 8 --r 8 --epochs 1 --limit-dev 1 --device {device} --overwrite".split()
    words += "--prune-warmup 0 --prune-final 0 --prune-interval 1".split()
    words += ["--dtype", job.dtype, "--model", job.model, "--data-dir", job.data_dir]
    words += ["--out", str(job.work / "epoch")] + ["--limit-train", str(rows)] * bool(rows)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        start = time.perf_counter()
        status = train.main(words)
        ours = time.perf_counter() - start
        if status:
            raise RuntimeError(f"train.py ended with {status}: {said.getvalue()[-2000:]}")
        return ours, peers.epoch(job.model, task, job.data_dir, rows, max_len, device, job.dtype)


def time_epochs(job):
    """Row 12, one of each in turn; three of each where the first is within a tenth of the goal."""
    epochs(job, TASKS[-1], 32)                             # warms up
    for task in TASKS:
        goal = float(ROWS[f"12 {task}"][1 + (job.device == "cuda")].split()[1])
        times = [epochs(job, task, job.epoch_rows)]
        if not job.epoch_rows and abs(times[0][1] / times[0][0] / goal - 1) < 0.1:
            times += [epochs(job, task, 0) for _ in range(2)]
        ours, theirs = zip(*times)
        job.results[f"12 {task}"] = paired(theirs, ours) | {
            "own_seconds": ours, "peer_seconds": theirs, "rows": job.epoch_rows or "all"}


# --- the whole ----------------------------------------------------------------------------------------------

def circumstances(job, words):
    """What has to stand beside every number. Folders are given by their last part alone."""
    shown = [word if i == 0 or words[i - 1] not in ("--model", "--data-dir", "--out") else Path(word).name
             for i, word in enumerate(words)]
    gpu = torch.cuda.get_device_name() if job.device == "cuda" else None
    packages = [name for name in ("torch", "tokenizers", "transformers", "peft")
                if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"command": " ".join(["python experiments/bench.py", *shown]), "device": gpu or cpu_name(),
            "threads": torch.get_num_threads(), "versions": versions | {"python": platform.python_version()},
            "date": datetime.date.today().isoformat(), "shape": job.shape, "layers": job.layers or "all",
            "dtype": job.dtype, "B": job.B, "T": job.T, "compile": job.compile, "rounds": job.rounds,
            "dropout": {name: job.config[name] for name in job.config if "dropout" in name},
            "pruning": "a new selection at every step, ours and peft's",
            "memory": "malloc keeps what is freed, as train.py has it do on a CPU, for ours and the peers",
            "own AdaLoRA": "adapter by adapter, as it is to be read: nothing of it is batched"}


def cpu_name():
    """The processor's name and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def parse(argv):
    """Command line → what to do. ValueError with one sentence for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="two layers, few rows, no verdicts: in under 90 s")
    add("--counts", action="store_true", help="rows 5 (two layers), 6, 7, 9 alone; nothing timed or written")
    add("--growth", action="store_true", help="how the cost grows, instead of the table")
    add("--shape", choices=list(steps.SHAPES), default="deberta-v3-base")
    add("--compile", action="store_true", help="torch.compile our model, as train.py --compile does")
    add("--model", help="folder of all-MiniLM-L6-v2, for rows 9 and 12")
    add("--data-dir", default="glue", help="folder that holds CoLA/, MRPC/, RTE/, STS-B/ (glue)")
    add("--epoch-rows", type=int, default=256,
        help="first rows of each task in row 12; 0 for all, which alone is judged (256)")
    add("--rounds", type=int, default=7, help="of timing (7)")
    add("--out", default="experiments/results", help="folder for the JSON (experiments/results)")
    return parser.parse_args(argv)


def prepare(job):
    """Sizes and what there is: the table's sizes, or those of --quick. ValueError if there are no data."""
    cuda = job.device == "cuda"
    job.T, job.B, job.layers, job.dtype = 128, 32 if cuda else 8, None, "bf16" if cuda else "fp32"
    if job.quick:
        job.layers, job.epoch_rows, job.rounds = 2, 64, 3
    if job.shape.startswith("tiny"):
        job.T = 16
    job.narrow = "roberta-narrow" if "roberta" in job.shape else "deberta-narrow"
    job.config, job.peers = steps.SHAPES[job.shape], peers.available()
    folders = [Path(job.data_dir) / data.TASKS[task].folder for task in TASKS]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if job.model and missing and not job.growth:
        raise ValueError(f"rows 9 and 12 need {', '.join(missing)}: give --data-dir, or leave out --model")
    job.has_data = bool(job.model)
    job.results, job.details = {}, {}


def measure(job):
    """All rows, the exact ones first."""
    job.folder = steps.write_checkpoint(job.work / "model", job.config)
    start, job.details["seconds until"] = time.perf_counter(), {}

    def say(text):
        job.details["seconds until"][text.partition(":")[0]] = round(time.perf_counter() - start)
        print(f"{time.perf_counter() - start:4.0f} s: {text}", file=sys.stderr, flush=True)

    for T in (job.T, 2 * job.T) if job.peers else ():      # DeBERTa's distances share buckets at 2 · 128
        small = steps.make_batch(job.config, 2, T, job.device)
        job.details[f"parity, T={T}"] = errors = peers.parity(job.folder, small, job.layers)
        found = ", ".join(f"{what} {error:.0e}" for what, error in errors.items())
        say(f"T = {T}, own and peer agree: {found}")
    say("counting operations")
    count_operations(job)
    say("counting saved bytes")
    count_saved(job)
    if job.has_data:
        count_tokens(job)
    if job.counts:
        return
    say("timing steps")
    job.results |= {"3 T=128" if key == "3" else key: value for key, value in time_steps(job, job.T).items()}
    common = dict(batch=steps.make_batch(job.config, job.B, job.T, job.device), dtype=job.dtype,
                  layers=job.layers)
    job.details["profile"] = steps.profile(steps.OwnStep(job.folder, "frozen", **common), job.device)
    step = steps.OwnStep(job.folder, "lora2", k=8, **common)
    unit = 4 * job.B * job.T * job.config["hidden_size"] * len(step.net.backbone.encoder.layer)
    job.details["saved"] = {what: n / unit for what, n in counts.saved(step.loss, step.net).most_common(12)}
    if job.device == "cuda":
        if job.peers:
            job.results["3 T=256"] = time_steps(job, 2 * job.T)["3"]
        peak_memory(job)
    if job.has_data and job.peers:
        say("timing epochs")
        try:
            time_epochs(job)
        except KeyboardInterrupt:                          # the longest part: what is measured stays
            say("stopped")
    say("done")


def main(argv=None):
    """Measure, print the table and write it; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    job = parse(words)
    try:
        prepare(job)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if job.device == "cpu":
        processes.keep_freed_memory()
    if job.growth:
        from experiments.speed import growth as bench_growth
        return bench_growth.main(job, circumstances(job, words))
    with tempfile.TemporaryDirectory() as work:
        job.work = Path(work)
        measure(job)
    if job.counts:
        counted = [key for key in ROWS if key[0] in "5679" and key != "5 peak"]
        print(report(job.results, job.device, counted, counted))
        for line in job.details["operations"] + job.details["saved bytes"]:
            print(line)
        return 0
    rows = {}
    for key, (what, *goals) in ROWS.items():
        rows[key] = {"ratio": what, "goal": goals[job.device == "cuda"],
                     "result": job.results.get(key, "not run")}
    content = circumstances(job, words) | {"seconds": job.details["seconds until"]["done"], "rows": rows,
                                           "details": job.details}
    shape = "" if job.shape == "deberta-v3-base" else f"-{job.shape}"
    quick = "-quick" if job.quick else ""
    text = page(content, job.device)
    path = write(Path(job.out) / f"bench-{job.device}{shape}{quick}", content, text)
    print(text.partition("\n## ")[0], f"written: {path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
