"""Why it is as it is: small runs that look inside, of variants that differ in one thing each.

    python experiments/why.py --model FOLDER --data-dir glue    # runs what is missing: hours
    python experiments/why.py --no-run                          # the page again, of the file alone

`python experiments/reproduce.py why ...` is the same.
why.json says what runs, in which order. Each run is one loop over train.py's own functions, with an
evaluation after the last step. results/why.json is written anew after each; the same command goes
on. Learning rate and scale are those that the study on a GPU chose, or those in "points"; rows in
"starts" search for theirs, on a seed that is not reported. A run that diverged is recorded. Of all
runs results/why.md is made; of those that compare tuned methods, results/fair-cpu.md.
"""
import argparse
import itertools
import math
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from experiments import look_inside, search, summary, why_page
from experiments.first_gradient import start_at_gradient
from formats import disk
from lora2 import LoRA2Linear, lora2_layers
from methods import by_name, fast, three_scales
from running import errors, machine, options, schedule

HERE = Path(__file__).resolve().parent
GIVEN = disk.read_json(HERE / "why.json", "restore it")
STUDY = disk.read_json(HERE / "results" / "study-gpu.json", "restore it")
EVERY = 14                                                 # steps from look to look
NEAR_0 = 1e-6                                              # as in torch's clip_grad_norm_()
LAMBDA = 0.25           # where V = 0 at first: times scale 8 that is 2, as Λ ends in row "lora2"


# --- one run ---------------------------------------------------------------------------------

def run(row, task_name, seed, point, args):
    """(record of a run, its updates at the end); (record, []) if it diverged."""
    o = options.resolve(options.parse(words_of(row, task_name, seed, point, args)))
    here, began = machine.join(o.device, o.dtype), time.monotonic()
    layer = three_scales.ThreeScaleLinear if row == "three" else LoRA2Linear
    with mock.patch.dict(by_name.LAYERS, lora2=layer):
        task, examples, _, net, _ = train.prepare(o, here)
    plan = schedule.plan(o, rows=len(examples["train"].labels))
    optimizer, parameters = train.make_optimizer(net, o.lr, o.head_lr, o.weight_decay, o.outer_lr)
    batches = partial(train.endless_batches, examples["train"], o, plan, 0, net, here)
    loss_of, differentiate = partial(train.part_loss, net, here), fast.Eager(parameters)
    forward_backward = partial(train.forward_backward, loss_of, here=here, accum=1,
                               differentiate=differentiate)
    R_of = by_name.regulariser(o.method, net, o.reg_terms)
    if row == "three":
        R_of = partial(three_scales.orthogonality_loss, net)
    begin(row, net, forward_backward, batches())
    judges = look_inside.make_judges(row, o, net, plan)
    film = look_inside.Film(net, judges)
    record = {"row": row, "task": task_name, "seed": seed, "tuned": point,
              "part": "tune" if seed == GIVEN["search_seed"] else "reported"}
    finite, pruners = errors.FiniteCheck(here.device, "."), pruners_of(o, net, plan, judges)
    for t, batch in zip(range(1, plan.steps + 1), batches()):
        loss = forward_backward(batch)
        for judge in judges.values():
            judge.see()
        if R_of:
            differentiate(R_of, weight=o.reg)
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf).item()     # clips nothing
        if not norm < math.inf:
            return record | {"failed": f"a gradient was not finite at step {t}"}, []
        train.update(optimizer, parameters, loss, plan, t, o.clip, finite)
        for pruner in pruners:
            pruner.clipped = min(1.0, o.clip / (norm + NEAR_0))
            pruner.step()
        optimizer.zero_grad()
        if t in (1, plan.steps) or t % EVERY == 0:
            film.look(t)
    scores, _ = train.evaluate(net, examples, task, o.batch_size, here)
    last = {"score": scores["dev"][task.metrics[0]], "scores": scores}
    record |= {"last": last, "film": film.developed(), "device": here.device.type, "dtype": o.dtype,
               "torch": torch.__version__, "seconds": round(time.monotonic() - began, 1)}
    return record, film.updates[-1]


def pruners_of(o, net, plan, judges):
    """Those whose step() is called: the judges, of whom one may prune; else what train.py has."""
    if judges:
        return list(judges.values())
    pruner = by_name.make_pruner(o.method, net, o.target_rank, o.importance, o.sora_threshold,
                                 **plan.pruning())
    return [pruner] if pruner else []


def begin(row, net, forward_backward, batches):
    """Put the factors where training begins, if that is not where the init does.

    V = 0 makes ΔW = 0 as B does in LoRA, and not Λ: the first gradient says where V goes.
    """
    if row == "gradient":
        start_at_gradient(net, forward_backward, batches)
    if row.startswith("zero"):
        for _, layer in lora2_layers(net):
            layer.V.data.zero_()
            layer.lam.data.fill_(LAMBDA)


# --- which runs ------------------------------------------------------------------------------

def words_of(row, task, seed, point, args):
    """The command line of train.py that means the same run."""
    words = f"--task {task} --seed {seed} {GIVEN['rows'][row][1]} {GIVEN['flags']}".split()
    words += ["--lr", str(point["lr"]), "--model", args.model, "--data-dir", args.data_dir]
    if "scale" in point:
        r = options.resolve(options.parse(words)).r
        words += ["--alpha", str(point["scale"] * r)]
    return words


def next_run(runs):
    """(row, task, seed, point) of the first run of the plan that is missing; None if none is."""
    have = {(known["row"], known["task"], known["seed"]) for known in runs}
    for rows, task, seeds in GIVEN["plan"]:
        for row, seed in itertools.product(rows.split(), range(seeds)):
            if row in GIVEN["points"]:
                point = GIVEN["points"][row]
            elif row in GIVEN["starts"]:
                tried = search.tried({"runs": runs}, row, task)
                missing = search.missing(tried, GIVEN["starts"][row])
                if missing:
                    return row, task, GIVEN["search_seed"], missing[0]
                point = search.best(tried)
            else:                                          # what the study on a GPU chose
                tuned_as = GIVEN["rows"][row][2]
                point = search.best(search.tried(STUDY, tuned_as, task))
            if (row, task, seed) not in have:
                return row, task, seed, point
    return None


def run_all(content, path, args):
    """Run what is missing, and keep each record."""
    ends = Path(args.runs)
    ends.mkdir(parents=True, exist_ok=True)
    while wanted := next_run(content["runs"]):
        record, end = run(*wanted, args)
        if end and record["part"] == "reported":           # not if there is no adapter
            record["cosines"] = {}                         # to each run before on that task
            for other in sorted(ends.glob(f"*.{record['task']}.*.pt")):
                record["cosines"][other.stem] = look_inside.cosine(torch.load(other), end)
            torch.save(end, ends / f"{record['row']}.{record['task']}.{record['seed']}.pt")
        content["runs"].append(record)
        disk.write_file(path, summary.layout(content) + "\n")
        print(*wanted, record.get("failed") or record["last"]["scores"]["dev"], flush=True)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="name, or a folder")
    add("--data-dir", default="glue", help="folder of the GLUE files")
    add("--out", default=HERE / "results" / "why.json", type=Path, help="the JSON file")
    add("--runs", default="runs/why", help="folder for the updates at the end of each run")
    add("--no-run", action="store_true", help="write the page of the file as it is")
    args = parser.parse_args(argv)
    content = {"runs": []}
    if args.out.exists():
        content = disk.read_json(args.out, "restore it")
    if not args.no_run:
        run_all(content, args.out, args)
    content |= GIVEN
    disk.write_file(args.out.with_suffix(".md"), why_page.page(content))
    disk.write_file(args.out.with_name("fair-cpu.md"), why_page.fair_page(content))
    why_page.draw(content)


if __name__ == "__main__":
    main()
