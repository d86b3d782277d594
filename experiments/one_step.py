"""One step of LoRA² on two devices: what on_gpu.py holds against the CPU, in fp32, and eager steps.

An item is given `job`: device, low_name (the dtype beside fp32), work (a folder), rehearse.
"""
import math
import time

import torch

import train
from experiments.speed import peers, steps
from lora2 import lora2_layers
from methods import by_name

# Family → its shape, and that in a rehearsal.
FAMILIES = {"deberta": ("deberta-v3-base", "tiny"), "roberta": ("roberta-base", "tiny-roberta"),
            "bert": ("bert-base", "tiny-bert")}


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
    found = {"logits": 0.0, "gradients": 0.0, "scores": 0.0}
    for name in b:
        error = ((a[name] - b[name]).norm() / b[name].norm()).item()
        assert math.isfinite(error), name
        what = name.split()[0]
        found[what] = max(found[what], error)
    return found


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
    for what in ("logits", "gradients", "scores"):
        worst[what] = max(line[what] for line in facts.values())
        worst[f"{what} in bf16"] = max(line["in bf16"][what] for line in facts.values())
    assert worst["logits"] <= 1e-5 and worst["gradients"] <= 1e-4, (worst, facts)
    return {"worst": worst} | facts


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
