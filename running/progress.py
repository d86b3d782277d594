"""What a person sees of a run: settings and counts before it, bar or lines during it, table and map after.

Of several processes the first one speaks and writes.
"""
import hashlib
import json
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from formats import disk
import model as models
from running import options
from running import machine as processes
from methods.baselines import surviving_parameters

LOG_STEPS = 10                                             # between two lines of the log
ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for room in ("", "methods", "formats", "running") for path in sorted((ROOT / room).glob("*.py"))
           if not path.name.startswith("test_")]
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]    # when it began


def announce(run):
    """Before the first step: settings, counts, matches, schedule."""
    if run.rank > 0:
        return
    print("settings  " + "  ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else
        f"{name}={','.join(value)}" if isinstance(value, list) else f"{name}={value}"
        for name, value in run.settings.items() if value is not None and value is not False))
    trained, head, frozen = counts(run).values()
    what = f"adapter parameters in {len(run.adapted)} matrices" if run.adapted else "backbone parameters"
    print(f"{trained:,} {what} + {head:,} head parameters are trained, {frozen:,} are frozen")
    for short in run.targets or []:
        modules = models.target_modules(run.net, [short])
        print(f"  {short:2} {len(modules)} × {modules[0]} ...")
    print(f"new weights: {', '.join(run.net.new_weights) or 'none'}")
    print(rows(run))
    for name, examples in run.data.items():
        if examples.truncated:
            print(f"{examples.truncated} of {len(examples.starts) - 1} rows of {name} are cut to "
                  f"{run.max_len} tokens")
    if run.budget is not None:
        warmup, final, interval = run.phases
        print(f"{len(run.adapted) * run.r} singular values are pruned to {run.budget} between the steps "
              f"{warmup} and {run.T - final}, every {interval}")
    dev = next(name for name in run.data if name != "train")
    print(f"{run.T} steps, warm-up {run.lr_warmup}; the best is chosen by {run.row.metrics[0]} on {dev}; "
          f"{run.device}, {run.dtype}, {run.world} process(es)", flush=True)


def rows(run):
    """How much data there is, and which labels: text."""
    sizes = ", ".join(f"{len(examples.starts) - 1:,} rows of {name}" for name, examples in run.data.items())
    return sizes + (f"; labels {', '.join(map(repr, run.row.labels))}" if run.row.labels else "; a score")


def counts(run):
    """Numbers of parameters: what the method trains, the head, the rest."""
    body, head = (sum(p.numel() for _, p in named) for named in (run.body_parameters, run.head_parameters))
    return {"adapter_parameters": body, "head_parameters": head,
            "frozen_parameters": sum(p.numel() for p in run.net.parameters()) - body - head}


class Log:
    """log.jsonl, and the bar on a terminal or about 20 lines elsewhere."""

    def __init__(self, run):
        self.path, self.bar = Path(run.out) / "log.jsonl", None
        self.first, self.started = run.step, time.perf_counter()           # finer than others on Windows
        if run.rank == 0 and sys.stderr.isatty():
            self.bar = tqdm(total=run.T, initial=run.step, unit="step", dynamic_ncols=True)

    def write(self, record):
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, sort_keys=True) + "\n")
        except OSError as e:
            raise OSError(f"{self.path} could not be written ({e.strerror or e}): make room, --resume") from e

    def training(self, run, loss, R, kept, tokens):
        """A line about step run.step. R is given as the distance from its floor; tokens: since the start."""
        if run.rank > 0:
            return
        seconds = time.perf_counter() - self.started
        record = {"step": run.step, "loss": loss.item(), "lr": run.optimizer.param_groups[0]["lr"],
                  "tokens": tokens, "seconds": round(seconds, 3),
                  "tokens_per_second": round(tokens / seconds)}
        text = f"loss {record['loss']:.4f}"
        if R is not None:
            record["R"] = R.item() - run.floor
            text += f"  R {record['R']:.3f}"
        if kept is not None:
            record["kept"] = kept
            text += f"  kept {kept}/{len(run.adapted) * run.r}"
        if run.evaluations:
            text += f"  {run.row.metrics[0]} {run.evaluations[-1]['score']:.4f}"
        text += f"  {record['tokens_per_second']} tokens/s"
        self.write(record)
        if self.bar:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(run.step - self.bar.n)
        elif run.step == run.T or run.step * 20 // run.T > (run.step - LOG_STEPS) * 20 // run.T:
            left = seconds / (run.step - self.first) * (run.T - run.step)
            print(f"step {run.step}/{run.T}  {text}  {left:.0f} s left", flush=True)

    def evaluation(self, run, evaluation):
        if run.rank > 0:
            return
        self.write(evaluation)
        best = "  (best so far)" if evaluation is run.best else ""
        text = f"step {run.step}/{run.T}  {scores(evaluation['scores'])}{best}"
        tqdm.write(text) if self.bar else print(text, flush=True)

    def close(self):
        if self.bar:
            self.bar.close()


def bar_of(batches, run, examples):
    """The batches, with a bar on a terminal while they are predicted; not in training, which has its own."""
    total = -(-(len(examples.starts) - 1) // run.batch_size)
    return tqdm(batches, "predicting", total, leave=False, unit="batch", dynamic_ncols=True,
                disable=run.rank > 0 or not sys.stderr.isatty())


def warn_if_equal(run, predictions):
    """Say so, once for each, if all predictions for a dev split, {split: (N,)}, are one and the same."""
    for name, p in predictions.items():
        if len(p) > 1 and (p == p[0]).all() and run.rank == 0 and name not in run.warned:
            run.warned.add(name)
            print(f"warning: all {len(p)} predictions for {name} are equal: the model may have collapsed; "
                  "a smaller --lr or a longer --warmup may help", file=sys.stderr)


def scores(splits):
    """{split: {metric: value}} as text."""
    return "; ".join(f"{split} " + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
                     for split, values in splits.items())


def kept_map(kept, targets, r):
    """The kept singular values as a picture for the terminal, like Figure 3: matrices down, layers across.

    kept: {module name: count}; targets: {short name: end of the module names}; r: the count at the start.
    """
    cells = {}
    for name, count in kept.items():
        layer = int(next(part for part in name.split(".") if part.isdigit()))
        matches = [short for short, end in targets.items() if name.endswith("." + end)]
        cells[max(matches, key=lambda short: len(targets[short])), layer] = count
    layers = sorted({layer for _, layer in cells})
    lines = [f"kept of {r} singular values, layers {layers[0]} to {layers[-1]} from left to right"]
    for short in (s for s in targets if any((s, layer) in cells for layer in layers)):
        row = [cells.get((short, layer), 0) for layer in layers]
        lines.append(f"  {short:2} " + " ".join(f"{n:2}{' ░▒▓█'[-(-4 * n // r)]}" for n in row))
    return "\n".join(lines)


def finish(run):
    """Write ranks.json and result.json, show table and map. Returns the result."""
    kept, numbers = run.pruner.kept() if run.pruner else None, counts(run)
    numbers["surviving_parameters"] = surviving_parameters(run.net, kept, numbers["adapter_parameters"])
    peak = processes.peak_memory(run.device)
    result = {"task": run.task, "method": run.method, "settings": run.settings, "metric": run.row.metrics[0],
              "best": run.best, "last": run.evaluations[-1], "evaluations": run.evaluations,
              "kept": sum(kept.values()) if kept else None, "budget": run.budget, "steps": run.step,
              "singular_values": len(run.adapted) * run.r if kept else None,
              "seconds": round(run.seconds + time.monotonic() - run.started, 1),
              "peak_memory_gb": round(peak, 2) if peak else None, "device": processes.name_of(run.device),
              "dtype": run.dtype, "processes": run.world, "threads": torch.get_num_threads(),
              "torch": torch.__version__, "python": platform.python_version(),
              "date": time.strftime("%Y-%m-%d"), "code": CODE, "base": run.base, "rows": run.rows, **numbers}
    if run.rank == 0:
        if kept:
            disk.write_json(Path(run.out) / "ranks.json", kept)
        disk.write_json(Path(run.out) / "result.json", result)
        if kept:
            print(kept_map(kept, models.TARGETS[run.net.config["model_type"]], run.r))
        print(summary(result, run.out), flush=True)
    return result


def summary(content, folder):
    """The table of a finished run, from its result.json, and the command that evaluates its adapter: text."""
    lines = []
    for name in ("best", "last"):
        kept = content[name].get("kept")
        lines.append(f"{name}  step {content[name]['step']:6}  {scores(content[name]['scores'])}"
                     + (f"  kept {kept} of {content['singular_values']}" if kept is not None else ""))
    again = evaluation_of(content, folder)
    words = [word for name in again for word in (options.flag(name), again[name])]
    memory = f", at most {content['peak_memory_gb']} GB" if content.get("peak_memory_gb") else ""
    return "\n".join([*lines, f"{content['seconds']:.0f} s{memory}; files in {folder}; to evaluate the best "
                      "again:", f"  python train.py {shlex.join(words)}"])


def evaluation_of(content, folder):
    """The options that evaluate the adapter of a finished run."""
    settings = content["settings"]
    where = {"own": ["dev_file"], "demo": []}.get(content["task"], ["data_dir"])
    return ({"eval": str(Path(folder) / "adapter.safetensors")}
            | {name: settings[name] for name in ["model"] + where})


def finished(given):
    """Show the finished run that --resume names; the options for what else is asked of its adapter, or {}."""
    folder = given["resume"]
    path = Path(folder) / "result.json"
    with disk.reading(path, f"remove it, and --resume {folder} makes it anew"):
        content = json.loads(path.read_text(encoding="utf-8"))
        text, again, settings = summary(content, folder), evaluation_of(content, folder), content["settings"]
    wanted = options.beside_resume(settings, given)
    print(f"this run is finished:\n{text}")
    if not wanted.keys() & options.AFTERWARDS:
        return {}
    return again | {name: wanted[name] for name in wanted.keys() & options.WITH_EVAL}
