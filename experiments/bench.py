"""How fast LoRA² is, against its own frozen backbone, AdaLoRA, and transformers with peft.

    python experiments/bench.py --model all-MiniLM-L6-v2 --data-dir glue   # all there is to measure
    python experiments/bench.py --quick     # two layers, a few rows: does it work? no verdicts
    python experiments/bench.py --texts --spm deberta-v3-base --data-dir glue   # row 13 alone
    python experiments/bench.py --growth    # cost against T, B, k, depth and data instead

A ratio of times is taken within a round, in which all variants run one after the other, each time
in another order; shown are the median over the rounds, the least and the greatest. Counts are
exact. Before anything is timed, own and peer have to compute the same logits and gradients. Ours
are the public functions of this project, the peers are transformers and peft in train mode with
dropout (speed/peers.py). Without them, without a GPU, without --model (a folder; for rows 9 and 12)
or --spm (a folder; for row 13) the rows concerned are "not run".
"""
import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from experiments import summary
from experiments.speed import counts, growth, peers, steps, table, tasks
from formats import disk
from lora2 import lora2_layers, merge_lora2
from running import machine

OURS = ("own LoRA² k=1", "own LoRA² k=8")
PEERS = ("transformers, frozen", "transformers, lora", "transformers, adalora")
# Named in steps.json: own and peers' steps; eager ones tell what recording is worth on a GPU.
STEPS = disk.read_json(Path(__file__).parent / "speed" / "steps.json", "restore it")
LONGER = ("own frozen", "own LoRA² k=8", "transformers, frozen", "transformers, adalora")


def make(job, name, T, folder=None, **more):
    """The step of that name on a batch T tokens wide, all as the job says unless `more` does."""
    kind = peers.PeerStep if name in PEERS else steps.OwnStep
    usual = {"batch": steps.make_batch(job.config, job.B, T, job.device), "dtype": job.dtype}
    return kind(folder or job.folder, **usual | STEPS[name] | more)


# --- what is counted -------------------------------------------------------------------------

def count_operations(job):
    """Rows 6 and 7, on a narrow model: how many operations depends on depth, not on width."""
    config = steps.SHAPES["roberta-narrow" if "roberta" in job.shape else "deberta-narrow"]
    batch = steps.make_batch(config, 2, job.T, job.device)
    names = ["own frozen", "own AdaLoRA r=8", *OURS, *(PEERS if job.peers else [])]
    depth, found = config["num_hidden_layers"], {}
    for layers, name in itertools.product((2, depth), names):
        shape = config | {"num_hidden_layers": layers}
        folder = steps.write_checkpoint(job.work / f"narrow-{layers}", shape)
        step = make(job, name, job.T, folder, batch=batch)
        found[name, layers] = counts.count_parts(step)
    job.details["operations"] = [{"step": name, "layers": layers} | parts
                                 for (name, layers), parts in found.items()]
    changes = [found[name, depth]["update"] - found[name, 2]["update"] for name in OURS]
    job.results["6 depth"] = table.worst(changes)
    for row, what in (("6", "total"), ("6 update", "update"), ("7", "host reads")):
        job.results[row] = table.worst(found[name, depth][what] for name in OURS)


def count_saved(job):
    """Row 5: bytes a forward pass keeps. Of four ratios (two k, two peers) the worst counts."""
    theirs = PEERS[1:] if job.peers else []                # that adapt
    lines = []
    for row, T in (("5 T=128", job.T), ("5 T=256", 2 * job.T)):
        line = {"B": job.B, "T": T, "layers": job.layers}
        for name in [*OURS, *theirs]:
            step = make(job, name, T, dtype="fp32")
            line[name] = counts.saved(step.loss, step.net).total()
        lines.append(line)
        if theirs:
            job.results[row] = table.worst(line[a] / line[b] for a in OURS for b in theirs)
    job.details["saved bytes"] = lines


# --- what is timed ---------------------------------------------------------------------------

def products(job, T):
    """({size: function}, {size: FLOPs}) of matrix products: the step's largest, a large square.

    On a CPU ten in a row: for long enough to be as exposed to whatever else runs there as a step.
    """
    N, d, f = job.B * T, job.config["hidden_size"], job.config["intermediate_size"]
    repeat = 1 if job.device == "cuda" else 10
    dtype = torch.bfloat16 if job.dtype == "bf16" else torch.float32
    side = 256 if job.quick else 2048
    functions, flops = {}, {}
    for name, (n, d_in, d_out) in {"feed-forward": (N, d, f), "square": [side] * 3}.items():
        x = torch.randn(n, d_in, device=job.device, dtype=dtype)
        W = torch.randn(d_out, d_in, device=job.device, dtype=dtype)

        def multiply(x=x, W=W):
            for _ in range(repeat):
                torch.nn.functional.linear(x, W)

        functions[name], flops[name] = multiply, repeat * 2 * n * d_in * d_out
    return functions, flops


def eval_of(step):
    """A forward pass without gradients, of a model whose adapters were merged, not as 0."""
    for _, layer in lora2_layers(step.net):
        torch.nn.init.normal_(layer.lam)
    merge_lora2(step.net).eval()
    return torch.no_grad()(step.loss)


def time_steps(job, T, only=None):
    """{row: summary} of rows 1 to 4, 8, 10 and 11 at one length: all in the same rounds.

    only: names of steps; by default all.
    """
    variants = {}
    for name in only or STEPS:
        if name.endswith("eager") and job.device != "cuda":
            continue
        if name not in PEERS or (job.peers and name != "transformers, lora"):
            variants[name] = make(job, name, T)
    if only is None:
        variants["plain"] = eval_of(make(job, "own frozen", T))
        variants["merged"] = eval_of(make(job, "own LoRA² k=8", T))
    matrices, flops = products(job, T)
    times = steps.interleave(variants | matrices, job.rounds, job.device)
    job.details[f"seconds, T={T}"] = {name: table.summary(some) for name, some in times.items()}
    if job.device == "cuda" and only is None:              # no less than was counted
        waits = counts.synchronises(variants["own LoRA² k=8"])
        job.results["7"] = table.worst([job.results["7"]["value"], waits])
        job.results["14"] = table.worst([steps.launches(variants["own LoRA² k=8"])])
        job.details["host calls, eager"] = steps.launches(variants["own LoRA² k=8, eager"])
    found = {}
    for row, (_, _, _, *pair) in table.ROWS.items():
        if pair and times.keys() >= set(pair):
            found[row] = table.paired(*(times[name] for name in pair))
    return found | rates(job, T, times, flops)


def rates(job, T, times, products):
    """{row: summary} of row 10: how near the frozen steps come to the rate of products alone.

    products: {name: FLOPs} of those that were timed in the same rounds.
    """
    flops = counts.flops(make(job, "own frozen", T, eager=True))
    best = [max(n / times[name][i] for name, n in products.items()) for i in range(job.rounds)]
    job.details[f"products, T={T}"] = {
        "GFLOP": flops / 1e9, "GFLOP/s": table.summary(rate / 1e9 for rate in best)}
    found = {"10 rate": table.summary(flops / t / 1e12 for t in times["own frozen"])}
    for row, name in (("10 share", "own frozen"), ("10 peer", "transformers, frozen")):
        if name in times:
            found[row] = table.summary(flops / t / rate for t, rate in zip(times[name], best))
    return found


def peak_memory(job):
    """Row "5 peak", on a GPU: bytes that a step takes of it, weights included, one model at a time.

    Reserved bytes, not allocated ones: a recorded step does not give back what it works in.
    """
    peak = {}
    for side, name in (("own", "own LoRA² k=8"), ("peer", "transformers, adalora")):
        gc.collect()                                       # what others left, in circles
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        peak[side] = counts.peak_bytes(make(job, name, job.T), before)
    job.details["peak memory"] = peak
    job.results["5 peak"] = table.summary([peak["own"] / peak["peer"]])


def look_inside(job):
    """Where a frozen step spends its time, and what the forward pass of a LoRA² step keeps."""
    step = make(job, "own frozen", job.T, eager=True)      # a replayed graph has no operations
    job.details["profile"] = steps.profile(step, job.device)
    step = make(job, "own LoRA² k=8", job.T, eager=True)
    unit = 4 * job.B * job.T * job.config["hidden_size"] * job.config["num_hidden_layers"]
    kept = counts.saved(step.loss, step.net).most_common(12)
    job.details["saved"] = {what: n / unit for what, n in kept}


# --- the whole -------------------------------------------------------------------------------

def circumstances(job, words):
    """What has to stand beside every number. Folders are given by their last part alone."""
    versions = {}
    for name in ("torch", "tokenizers", "transformers", "peft"):
        if importlib.util.find_spec(name):
            versions[name] = importlib.metadata.version(name)
    versions["python"] = platform.python_version()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        models = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    name = f"{name}, {os.cpu_count()} cores"
    return {
        "command": summary.command_of("bench.py", words, "--model", "--spm", "--data-dir", "--out"),
        "device": torch.cuda.get_device_name() if job.device == "cuda" else name,
        "threads": torch.get_num_threads(), "versions": versions,
        "date": datetime.date.today().isoformat(), "shape": job.shape,
        "dtype": job.dtype,
        "dropout": {name: value for name, value in job.config.items() if "dropout" in name},
        "pruning": "a new selection at every step, ours and peft's",
        "memory": "malloc keeps what is freed, as train.py has it do on a CPU, for ours and the "
                  "peers",
        "own AdaLoRA": "adapter by adapter, as it is to be read: nothing of it is batched"}


def parse(argv):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="two layers, few rows, no verdicts: in under 90 s")
    add("--texts", action="store_true", help="row 13 alone; nothing written")
    add("--growth", action="store_true", help="how the cost grows, instead of the table")
    add("--shape", choices=list(steps.SHAPES), default="deberta-v3-base")
    add("--model", help="folder of all-MiniLM-L6-v2, for rows 9 and 12")
    add("--spm", help="folder of DeBERTaV3's spm.model, for row 13")
    add("--data-dir", default="glue", help="folder that holds CoLA/, MRPC/, RTE/, STS-B/ (glue)")
    add("--epoch-rows", type=int, default=256,
        help="first rows of each task in row 12; 0 for all, which alone is judged (256)")
    add("--rounds", type=int, default=7, help="of timing (7)")
    add("--out", default="experiments/results", help="folder for the JSON (experiments/results)")
    return parser.parse_args(argv)


def prepare(job):
    """Add sizes, those of the table or of --quick, and what there is. ValueError without data."""
    cuda = job.device == "cuda"
    job.T = 16 if job.shape.startswith("tiny") else 128
    job.B = 32 if cuda else 8
    job.dtype = "bf16" if cuda else "fp32"
    job.config, job.layers = steps.SHAPES[job.shape], "all"
    if job.quick:
        job.epoch_rows, job.rounds, job.layers = 64, 3, 2
        job.config = job.config | {"num_hidden_layers": 2}
    job.peers = peers.available()
    folders = [Path(job.data_dir) / data.TASKS[task].folder for task in tasks.TASKS]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if (job.model or job.spm) and missing and not job.growth:
        raise ValueError(f"rows 9, 12 and 13 need {', '.join(missing)}: give --data-dir, or leave "
                         "out --model and --spm")
    if job.texts and not (job.spm and job.peers):
        raise ValueError("row 13 needs --spm and requirements-dev.txt")
    job.results, job.details = {}, {}


def measure(job):
    """All rows, the exact ones first; returns the seconds it took."""
    start = time.perf_counter()

    def say(text):
        print(f"{time.perf_counter() - start:4.0f} s: {text}", file=sys.stderr, flush=True)

    if job.spm and job.peers:
        say("timing texts")
        tasks.time_texts(job)
    job.folder = steps.write_checkpoint(job.work / "model", job.config)
    for T in (job.T, 2 * job.T) if job.peers else ():      # at 256 distances share buckets
        small = steps.make_batch(job.config, 2, T, job.device)
        job.details[f"parity, T={T}"] = errors = peers.parity(job.folder, small)
        say(f"T = {T}, own and peer agree: all within {max(errors.values()):.0e}")
    say("counting operations")
    count_operations(job)
    if job.device == "cpu":                                # a GPU has "5 peak" instead
        say("counting saved bytes")
        count_saved(job)
    if job.model:
        tasks.count_tokens(job)
    say("timing steps")
    job.results |= time_steps(job, job.T)
    look_inside(job)
    if job.device == "cuda" and job.peers:
        longer = time_steps(job, 2 * job.T, LONGER)
        job.results["3 T=256"] = longer["3 T=128"]
        job.details["1 k=8, T=256"] = longer["1 k=8"]
        peak_memory(job)
    if job.model and job.peers:
        say("timing epochs")
        try:
            tasks.time_epochs(job)
        except KeyboardInterrupt:                          # the longest part: the rest stays
            say("stopped")
    say("done")
    return round(time.perf_counter() - start)


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
        machine.keep_freed_memory()
    about = circumstances(job, words)
    with tempfile.TemporaryDirectory() as work:
        job.work = Path(work)
        if job.growth:
            growth.measure_all(job, about)
        elif job.texts:
            tasks.time_texts(job)
            lines = table.rows(job.results, job.device)
            of_texts = {row: line for row, line in lines.items() if row.startswith("13")}
            print(table.report(of_texts), job.details, sep="\n")
        else:
            content = about | {"layers": job.layers, "B": job.B, "T": job.T, "rounds": job.rounds}
            content |= {"seconds": measure(job)}
            content |= {"rows": table.rows(job.results, job.device), "details": job.details}
            table.write("bench", job, content, table.page(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
