"""How the cost of a step grows with T, B, k and depth, and what a large file costs: bench.py --growth.

Time and memory of a full LoRA² step, beside those of transformers + peft AdaLoRA with r = k, on two layers of
the shape unless depth itself is varied: what is looked for is the slope. Memory is what a forward pass saves
for the backward pass, on a GPU the most that was allocated. The files are made up, the largest as large as
MNLI's: 392,702 pairs of about its lengths, each read and tokenised in a process whose peak is measured.
"""
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from experiments.speed import counts
from experiments.speed import peers
from experiments.speed import steps
import data
from running import machine as processes
from experiments import tables
from experiments.speed import table
from formats import glue
from formats import toy
from experiments.speed.table import summary

ROOT = Path(__file__).resolve().parents[2]
BASE = {"T": 128, "B": 8, "k": 8, "layers": 2}
SWEEPS = {"T": (64, 128, 256, 512), "B": (1, 4, 16, 64), "k": (1, 4, 16, 64), "layers": (1, 2, 4, 8, 12)}
QUICK = {"T": (64, 128), "B": (1, 4), "k": (1, 8), "layers": (1, 2)}
LIMITS = {"seconds": 60, "GB": 2.0}                        # of the MNLI-sized file
PARTS = 16, 4, 1                                           # of that file: a sixteenth, a quarter, all


def measure(job, name, values):
    """[{the point, seconds and bytes of a step of ours and of theirs}, ...] along one axis."""
    points = []
    for value in values:
        at = BASE | {name: value}
        if at["layers"] > job.config["num_hidden_layers"]:
            continue
        batch = steps.make_batch(job.config, at["B"], at["T"], job.device)
        common = dict(batch=batch, dtype=job.dtype, layers=at["layers"])
        variants = {"own LoRA²": steps.OwnStep(job.folder, "lora2", k=at["k"], r=8, **common)}
        if job.peers:
            peer = peers.PeerStep(job.folder, "adalora", r=at["k"], **common)
            variants["transformers + peft AdaLoRA"] = peer
        point = {name: value}
        times = steps.interleave(variants, 3, job.device, 10 if job.device == "cuda" else 1)
        for variant, step in variants.items():
            point[variant] = {"seconds": summary(times[variant]), "bytes": memory(job, step)}
        points.append(point)
        print(f"{name} = {value}", file=sys.stderr, flush=True)
    return points


def memory(job, step):
    """Bytes of activations a step needs."""
    if job.device == "cpu":
        return counts.saved_bytes(step.loss, step.net)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def write_mnli(path, rows, tokenizer, seed=0):
    """A made-up train.tsv: random words, 20 to a premise and 10 to a hypothesis on average, as in MNLI."""
    words = [word for word in tokenizer.get_vocab() if word.isalnum() and word.isascii()]
    rng, labels = random.Random(seed), data.TASKS["mnli"].labels
    path.parent.mkdir(parents=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write("index\tsentence1\tsentence2\tgold_label\n")
        text = lambda low, high: " ".join(rng.choices(words, k=rng.randint(low, high)))
        for i in range(rows):
            premise, hypothesis = text(3, 37), text(4, 16)
            file.write(f"{i}\t{premise}\t{hypothesis}\t{rng.choice(labels)}\n")


def read_mnli(folder, model, max_len=256):
    """What a run does with the file: read, tokenise, make an epoch's plan. Prints one JSON line."""
    start = time.perf_counter()
    split = glue.load_split(data.TASKS["mnli"], folder, "train")
    loaded = time.perf_counter() - start
    examples = data.encode(data.load_tokenizer(model) if model else toy.tokenizer(), split, max_len)
    next(data.batches(examples, 32, 0, torch.Generator().manual_seed(0)))
    print(json.dumps({"rows": len(split.texts), "tokens": len(examples.ids), "load": loaded,
                      "seconds": time.perf_counter() - start,
                      "GB": processes.peak_memory(torch.device("cpu"))}))


def measure_data(job, rows):
    """Time and peak memory of read_mnli in a fresh process, imports included in the memory."""
    tokenizer = data.load_tokenizer(job.model) if job.model else toy.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        write_mnli(Path(folder) / "MNLI" / "train.tsv", rows, tokenizer)
        command = [sys.executable, "-m", __name__, folder, *([job.model] if job.model else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def markdown(about, sweeps, read):
    """The sweeps and the data as Markdown."""
    text = ("# How the cost of a step grows\n\n" + ", ".join(f"{name} = {n}" for name, n in BASE.items())
            + f" of the shape {about['shape']} unless varied; memory is what waits for the backward pass (on "
            f"a GPU the peak).\n\n`{about['command']}`, {about['device']}, {about['dtype']}, threads "
            f"{about['threads']}, {about['date']}.\n")
    for name, points in sweeps.items():
        variants = [key for key in points[0] if key != name]
        head = [name, *(f"{variant}, {unit}" for variant in variants for unit in ("s", "MB"))]
        text += "\n" + tables.markdown(head, [[str(point[name]), *(
            cell for variant in variants for cell in (f"{point[variant]['seconds']['value']:.3f}",
                                                      f"{point[variant]['bytes'] / 1e6:,.0f}"))]
            for point in points])
    text += "\n" + tables.markdown(
        ["rows of a file", "tokens", "s to read", "s with tokens and batches", "peak GB"],
        [[f"{one['rows']:,}", f"{one['tokens']:,}", *(f"{one[key]:.2f}" for key in ("load", "seconds", "GB"))]
         for one in read])
    within = read[-1]["seconds"] <= LIMITS["seconds"] and read[-1]["GB"] <= LIMITS["GB"]
    return text + (f"\nThe largest is {'within' if within else 'OVER'} {LIMITS['seconds']} s and "
                   f"{LIMITS['GB']:g} GB.\n")


def main(job, about):
    """Measure, print, write growth-DEVICE.json and .md into job.out."""
    axes = QUICK if job.quick else SWEEPS
    with tempfile.TemporaryDirectory() as work:
        job.folder = steps.write_checkpoint(Path(work) / "model", job.config)
        sweeps = {name: measure(job, name, values) for name, values in axes.items()}
    rows = 20_000 if job.quick else data.TASKS["mnli"].rows["train"]
    read = [measure_data(job, rows // part) for part in PARTS]
    about = {name: value for name, value in about.items() if name not in ("B", "T", "layers", "rounds")}
    content = about | {"base": BASE, "sweeps": sweeps, "data": read}
    text, quick = markdown(about, sweeps, read), "-quick" if job.quick else ""
    path = table.write(Path(job.out) / f"growth-{job.device}{quick}", content, text)
    print(text, f"written: {path}", sep="\n")
    return 0


if __name__ == "__main__":
    read_mnli(*sys.argv[1:], *[None] * (3 - len(sys.argv)))
