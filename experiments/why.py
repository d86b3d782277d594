"""Why it is as it is: small runs that look inside, of variants that differ in one thing each.

    python experiments/why.py --model FOLDER --data-dir glue    # runs what is missing, many hours
    python experiments/why.py --no-run                          # the page again, of the file alone

PLAN says what runs, in which order. Each run is one loop over train.py's own functions, with an
evaluation after the last step. results/why.json is written anew after each; the same command goes
on. Learning rate and scale are those that the study on a GPU chose, but for the rows in SEARCHED:
these search for their own on a seed that is not reported. A run that diverged is recorded.
"""
import argparse
import math
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from experiments import search, summary
from formats import disk
from lora2 import LoRA2Linear, RankPruner, lora2_layers
from methods import baselines, three_scales
from running import machine, options

HERE = Path(__file__).resolve().parent
FILE, STUDY = HERE / "results" / "why.json", HERE / "results" / "study-gpu.json"
COMMON = "--limit-train 2000 --epochs 4 --dtype fp32 --device cpu"
SEARCH_SEED = 1000
# Row → its label, its options of train.py, and whose learning rate and scale it has.
ROWS = {
    "lora": ("LoRA r=1", "--method lora --r 1", "lora-r1"),
    "lora2": ("LoRA² k=1", "--r 4 --init orthonormal", "lora2-k1-orthonormal"),
    "unpruned": ("not pruned", "--r 4 --target-rank 4 --init orthonormal", "lora2-k1-orthonormal"),
    "small": ("started small", "--r 1 --init orthonormal", "lora2-k1-orthonormal"),
    "of-task": ("scores of the task alone", "--r 4 --init orthonormal", "lora2-k1-orthonormal"),
    "by-mean": ("scores of Ī alone", "--r 4 --init orthonormal", "lora2-k1-orthonormal"),
    "sum": ("sum of R", "--r 4 --init orthonormal --reg 10.8", "lora2-k1-orthonormal"),
    "noreg": ("without R", "--r 4 --init orthonormal --reg 0", "lora2-k1-orthonormal"),
    "gradient": ("--init gradient", "--r 4 --init gradient", None),
    "three": ("three scales", "--r 4 --init orthonormal", None)}
SEARCHED = {"gradient": {"lr": 0.003, "scale": 32}, "three": {"lr": 0.003, "scale": 128}}
PLAN = [("lora lora2", "stsb", 3), ("of-task by-mean unpruned small sum", "stsb", 3),
        ("gradient", "stsb", 0), ("lora lora2", "stsb", 5), ("gradient", "stsb", 5),
        ("three", "stsb", 3), ("lora lora2", "cola", 3), ("three", "cola", 3),
        ("noreg", "stsb", 3)]


class Judge(RankPruner):
    """A RankPruner that may look at less, and may judge without pruning.

    of_task: its I is that of the task's gradient, without what R adds. by_mean: S = Ī, without Ū.
    """

    of_task, by_mean, prunes = False, False, True
    returned = 0                        # how often a choice took back what the one before left out

    def see(self):
        """Remember the gradients of the task, before those of R are added."""
        self.seen = {}
        for factor in self.joins:
            self.seen[factor] = [w.grad.clone() for w in self.weights(factor)]

    def gradients(self, factor):
        if not self.of_task:
            return super().gradients(factor)
        return [gradient * self.clipped for gradient in self.seen[factor]]

    def scores(self):
        if not self.by_mean:
            return super().scores()
        return (self.sensitivity_lam + self.sensitivity_u.mean(1) + self.sensitivity_U.mean(2))

    def prune(self):
        before = [lam.clone() for lam in self.weights("lam")]
        keep = self.keep.clone()
        super().prune()
        self.returned += (self.keep & ~keep).sum().item()
        if not self.prunes:
            for lam, value in zip(self.weights("lam"), before):
                lam.copy_(value)


# --- what is looked at -----------------------------------------------------------------------

def inner(X, Y):
    """⟨ΔW, ΔW'⟩, a scalar, of two updates B A and B' A' of one matrix, without building them."""
    return ((X[1].T @ Y[1]) * (X[0] @ Y[0].T)).sum()


def cosine(X, Y):
    """The cosine between two updates of all matrices, each seen as one long vector; 0 for ΔW = 0."""
    size = 1.0
    for Z in (X, Y):
        size *= math.sqrt(sum(inner(z, z).item() for z in Z))
    return sum(inner(x, y).item() for x, y in zip(X, Y)) / size if size else 0.0


def turned(a, b):
    """Degrees between two vectors, whatever their sign: the principal angle of what they span."""
    share = torch.dot(a.flatten(), b.flatten()).abs() / (a.norm() * b.norm())
    return math.degrees(math.acos(min(1.0, share.item())))


@torch.no_grad()
def look(net, start, judges):
    """(the updates as (A, B) of each matrix, {what: a number} of all matrices, {judge: kept})."""
    layers = [layer for _, layer in lora2_layers(net)]
    updates = [layer.to_lora() for layer in layers]
    sizes = [math.sqrt(inner(x, x)) / layer.base.weight.norm().item()
             for x, layer in zip(updates, layers)]
    seen = {"size": sum(sizes) / len(sizes), "largest": max(sizes)}
    for factor in ("v", "V", "A"):
        if hasattr(layers[0], factor):
            angles = [turned(getattr(layer, factor), first[factor])
                      for layer, first in zip(layers, start)]
            norms = [getattr(layer, factor).norm().item() for layer in layers]
            seen[f"turned {factor}"] = sum(angles) / len(angles)
            seen[f"norm {factor}"] = sum(norms) / len(norms)
    if judges:
        seen["kept"] = judges["itself"].kept_total
        seen["returned"] = judges["itself"].returned
        seen["lam"] = sum(layer.lam.abs().max().item() for layer in layers) / len(layers)
        seen["emptied"] = (~judges["itself"].keep.any(1)).sum().item()
        for name, judge in judges.items():
            both = judge.keep & judges["itself"].keep
            seen[f"shared with {name}"] = both.sum().item() / judges["itself"].kept_total
    return updates, seen


# --- one run ---------------------------------------------------------------------------------

def make_judges(row, o, net, plan):
    """{name: Judge} of a LoRA² run: "itself" prunes, the others judge beside it; {} for LoRA."""
    judges = {}
    for name in ("itself", "of-task", "by-mean") if o.method == "lora2" else ():
        judge = Judge(net, o.target_rank, *plan.pruning())
        judge.prunes = name == "itself"
        judge.of_task = "of-task" in (name, row if judge.prunes else "")
        judge.by_mean = "by-mean" in (name, row if judge.prunes else "")
        judges[name] = judge
    return judges


def step_of(o, net, R, optimizer, parameters, judges, factor):
    """The rest of a step, after the backward pass of the task's loss; returns if all was finite."""
    for judge in judges.values():
        judge.see()
    if R is not None:
        (o.reg * R).backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, o.clip)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    optimizer.step()
    for judge in judges.values():
        judge.clipped = min(1.0, o.clip / (norm.item() + 1e-6))
        judge.step()
    optimizer.zero_grad()
    return norm.isfinite().item()


def run(row, task_name, seed, point, args):
    """(record of a run, the updates at its end)."""
    o = options.resolve(options.parse(words_of(row, task_name, seed, point, args)))
    here, began = machine.join(o.device, o.dtype), time.monotonic()
    layer = three_scales.ThreeScaleLinear if row == "three" else LoRA2Linear
    with mock.patch.dict(baselines.LAYERS, lora2=layer):
        task, examples, _, net, _ = train.prepare(o, here)
    plan = options.plan(o, rows=len(examples["train"].labels))
    optimizer, parameters = train.make_optimizer(net, o.lr, o.head_lr, o.weight_decay, o.outer_lr)
    batches = train.stream(examples["train"], o, plan, 0, net, here)
    if o.init == "gradient":
        train.start_at_gradient(net, lambda batch: train.gradients(net, batch, task, here, 1),
                                train.stream(examples["train"], o, plan, 0, net, here))
    judges = make_judges(row, o, net, plan)
    start = [{name: p.detach().clone() for name, p in layer.named_parameters()}
             for _, layer in lora2_layers(net)]
    record = {"row": row, "task": task_name, "seed": seed, "point": point, "steps": plan.steps}
    films, updates = [], []
    for t in range(1, plan.steps + 1):
        loss = train.gradients(net, next(batches), task, here, 1)
        if row == "three":
            R = three_scales.orthogonality_loss(net)
        else:
            R = baselines.regulariser(o.method, net, o.reg_terms)
        if not step_of(o, net, R, optimizer, parameters, judges, plan.lr_factor(t)):
            return record | {"failed": f"not finite at step {t}"}, None
        if t in (1, plan.steps) or t % 14 == 0:
            update, seen = look(net, start, judges)
            updates.append(update)
            films.append({"t": t, "loss": loss.item()} | seen)
    scores, _ = train.evaluate(net, examples, task, o.batch_size, here, lambda all, _: all)
    for film, update in zip(films, updates):
        film["to final"] = cosine(update, updates[-1])
    record |= {"score": scores["dev"][task.metrics[0]], "films": films,
               "seconds": time.monotonic() - began, "torch": torch.__version__}
    return record, updates[-1]


# --- which runs ------------------------------------------------------------------------------

def words_of(row, task, seed, point, args):
    """The command line of train.py that means the same run."""
    text = f"--task {task} --seed {seed} {ROWS[row][1]} {COMMON} --lr {point['lr']}"
    words = [*text.split(), "--model", args.model, "--data-dir", args.data_dir]
    r = options.resolve(options.parse(words)).r
    return [*words, "--alpha", str(point["scale"] * r)]


def chosen_by_study(row, task):
    """The learning rate and scale that the study on a GPU chose."""
    for known in disk.read_json(STUDY, "restore it")["runs"]:
        if (known["part"], known["row"], known["task"]) == ("reported", ROWS[row][2], task):
            return known["tuned"]


def tried(runs, row, task):
    """[(point, score)] of a row's search, −inf for a run that diverged."""
    return [(known["point"], known.get("score", -math.inf)) for known in runs
            if (known["row"], known["task"], known["seed"]) == (row, task, SEARCH_SEED)]


def next_run(runs):
    """(row, task, seed, point) of the first run of PLAN that is missing; None if there is none."""
    have = {(known["row"], known["task"], known["seed"]) for known in runs}
    for rows, task, seeds in PLAN:
        for row in rows.split():
            if row in SEARCHED:
                missing = search.missing(tried(runs, row, task), SEARCHED[row])
                if missing:
                    return row, task, SEARCH_SEED, missing[0]
                point = search.best(tried(runs, row, task))
            else:
                point = chosen_by_study(row, task)
            for seed in range(seeds):
                if (row, task, seed) not in have:
                    return row, task, seed, point
    return None


def run_all(runs, args):
    """Run what is missing, and keep each record."""
    ends = Path(args.runs)
    ends.mkdir(parents=True, exist_ok=True)
    while wanted := next_run(runs):
        row, task, seed, point = wanted
        record, end = run(row, task, seed, point, args)
        if end is not None and seed != SEARCH_SEED:
            record["cosines"] = {}
            for path in sorted(ends.glob(f"*-{task}-*.pt")):
                record["cosines"][path.stem] = cosine(torch.load(path), end)
            torch.save(end, ends / f"{row}-{task}-{seed}.pt")
        runs.append(record)
        disk.write_file(FILE, summary.layout({"runs": runs}) + "\n")
        print(row, task, seed, point, record.get("score", record.get("failed")),
              round(record.get("seconds", 0)), flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data-dir", default="glue")
    parser.add_argument("--runs", default="runs/why", help="folder of the last updates")
    parser.add_argument("--no-run", action="store_true")
    args = parser.parse_args(argv)
    runs = disk.read_json(FILE, "restore it")["runs"] if FILE.exists() else []
    if not args.no_run:
        run_all(runs, args)


if __name__ == "__main__":
    main()
