"""How the cost of a step grows with T, B, k and depth, and what a large file costs.

This is bench.py --growth: time and memory of a full LoRA² step, beside those of transformers + peft
AdaLoRA with r = k, on two layers of the shape unless depth itself is varied: what is looked for is
the slope. Memory is what a forward pass saves for the backward pass, on a GPU the most that was
allocated. The files are made up, the largest as large as MNLI's: 392,702 pairs of about its
lengths, each read and tokenised in a process whose peak is measured.
"""
import multiprocessing
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch

import data
from experiments import pages
from experiments.speed import counts, peers, steps, table
from formats import glue, toy
from running import machine

BASE = {"T": 128, "B": 8, "k": 8, "layers": 2}
SWEEPS = {"T": (64, 128, 256, 512), "B": (1, 4, 16, 64), "k": (1, 4, 16, 64),
          "layers": (1, 2, 4, 8, 12)}
LIMITS = {"seconds": 60, "GB": 2.0}                        # of the MNLI-sized file
PARTS = (16, 4, 1)                                         # of it: a sixteenth, a quarter, all


def measure(job, name, value):
    """{name: value, and seconds and bytes of a step of ours and of theirs} at one point."""
    at = BASE | {name: value}
    shape = job.config | {"num_hidden_layers": at["layers"]}
    folder = steps.write_checkpoint(job.work / f"{at['layers']} layers", shape)
    batch = steps.make_batch(shape, at["B"], at["T"], job.device)
    variants = {"own LoRA²": steps.OwnStep(folder, "lora2", batch, at["k"], dtype=job.dtype)}
    if job.peers:
        peer = peers.PeerStep(folder, "adalora", batch, at["k"], job.dtype)
        variants["transformers + peft AdaLoRA"] = peer
    times = steps.interleave(variants, 3, job.device)
    point = {name: value}
    for variant, step in variants.items():
        if job.device == "cuda":
            memory = counts.peak_bytes(step, torch.cuda.memory_allocated())
        else:
            memory = counts.saved(step.loss, step.net).total()
        point[variant] = {"seconds": table.summary(times[variant]), "bytes": memory}
    print(f"{name} = {value}", file=sys.stderr, flush=True)
    return point


def write_mnli(path, rows, tokenizer):
    """A made-up train.tsv: random words, 20 to a premise and 10 to a hypothesis, as in MNLI."""
    words = [word for word in tokenizer.get_vocab() if word.isalnum() and word.isascii()]
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        file.write("index\tsentence1\tsentence2\tgold_label\n")
        for i in range(rows):
            premise = " ".join(rng.choices(words, k=rng.randint(3, 37)))
            hypothesis = " ".join(rng.choices(words, k=rng.randint(4, 16)))
            label = rng.choice(data.TASKS["mnli"].labels)
            file.write(f"{i}\t{premise}\t{hypothesis}\t{label}\n")


def read_mnli(path, tokenizer):
    """What a run does with the file, in numbers: read, tokenise, make an epoch's plan."""
    start = time.perf_counter()
    split = glue.read_split(path, data.TASKS["mnli"])
    loaded = time.perf_counter() - start
    examples = data.encode(tokenizer, split, 256)
    next(data.batches(examples, 32, 0, torch.Generator().manual_seed(0)))
    return {"rows": len(split.texts), "tokens": len(examples.ids), "load": loaded,
            "seconds": time.perf_counter() - start,
            "GB": machine.peak_memory(torch.device("cpu"))}


def markdown(content):
    """What growth-DEVICE.json holds as Markdown."""
    base = ", ".join(f"{name} = {value}" for name, value in content["base"].items())
    parts = [
        "# How the cost of a step grows\n",
        f"{base} of the shape {content['shape']} unless varied; memory is what waits for the "
        "backward pass (on a GPU the peak).\n",
        f"`{content['command']}`, {content['device']}, {content['dtype']}, threads "
        f"{content['threads']}, {content['date']}.\n"]
    for name, points in content["sweeps"].items():
        head = [name]
        for variant in list(points[0])[1:]:
            head += [f"{variant}, s", f"{variant}, MB"]
        lines = []
        for point in points:
            lines.append([str(point[name])])
            for variant in list(point)[1:]:
                lines[-1].append(f"{point[variant]['seconds']['value']:.3f}")
                lines[-1].append(f"{point[variant]['bytes'] / 1e6:,.0f}")
        parts.append(pages.markdown(head, lines))
    lines = []
    for file in content["data"]:
        lines.append([f"{file['rows']:,}", f"{file['tokens']:,}", f"{file['load']:.2f}",
                      f"{file['seconds']:.2f}", f"{file['GB']:.2f}"])
    head = ["rows of a file", "tokens", "s to read", "s with tokens and batches", "peak GB"]
    parts.append(pages.markdown(head, lines))
    largest = content["data"][-1]
    fits = all(largest[name] <= limit for name, limit in LIMITS.items())
    parts.append(f"The largest is {'within' if fits else 'OVER'} {LIMITS['seconds']} s and "
                 f"{LIMITS['GB']:g} GB.\n")
    return "\n".join(parts)


def measure_all(job, about):
    """Measure, print, write growth-DEVICE.json and .md into job.out."""
    sweeps = {}
    for name, values in SWEEPS.items():
        if name == "layers":
            values = [n for n in values if n <= job.config["num_hidden_layers"]]
        sweeps[name] = [measure(job, name, value) for value in values[:2 if job.quick else None]]
    rows = 20_000 if job.quick else data.TASKS["mnli"].rows["train"]
    tokenizer = data.load_tokenizer(job.model) if job.model else toy.tokenizer()
    fresh, read = multiprocessing.get_context("spawn"), []
    for part in PARTS:
        write_mnli(job.work / "train.tsv", rows // part, tokenizer)
        with ProcessPoolExecutor(1, fresh) as pool:        # its peak is that of this file
            read.append(pool.submit(read_mnli, job.work / "train.tsv", tokenizer).result())
    content = about | {"base": BASE, "sweeps": sweeps, "data": read}
    table.write("growth", job, content, markdown(content))
