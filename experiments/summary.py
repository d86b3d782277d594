"""What is left of runs: a record of each, in a JSON file, from which all that is printed is made.

A record is a dict, made from the folder of a finished run of train.py:

    row, task, seed, settings   which run it is
    part, tuned                 "tune" or "reported", its point on the grid
    best, last                  two of its evaluations: step, score, scores {split: {metric: value}}
    FACTS                       as in result.json; null where that does not say
    ranks                       {matrix: [how many singular values each layer kept]}, if it pruned
    kept                        {matrix: [which ones each layer kept]}, of LoRA² and AdaLoRA
    step_seconds                of a timed run
    failed                      of a run that diverged, in place of all since best: how

A file holds all runs on a model, whatever table shows them, one a line. Settings that all of them
share stand there once. "notes" is what its pages say of how it was made.
"""
import json
import shlex
from pathlib import Path

from experiments import tables
from formats import disk
from running import folder as runs
from running import options, progress

FACTS = ("adapter_parameters", "surviving_parameters", "head_parameters", "frozen_parameters",
         "singular_values", "budget", "steps", "seconds", "peak_memory_gb", "device", "dtype",
         "processes", "threads", "torch", "python", "date", "code", "base", "rows")
FREE = options.PLACES | {"dtype"}   # the device decides it; tables tell it


def command_of(program, words, *places):
    """A command line to be shown: of the folders after the options `places` the last part alone."""
    shown = [f"python experiments/{program}"]
    for before, word in zip(["", *words], words):
        shown.append(Path(word).name if before in places else shlex.quote(word))
    return " ".join(shown)


# --- from a run folder to a record -----------------------------------------------------------

def comparable(settings):
    """The settings that make a run what it is; of a model in a folder its name alone."""
    found = {name: value for name, value in settings.items()
             if value is not None and name not in FREE}
    return found | {"model": Path(str(settings.get("model"))).name}


def facts_of(result):
    """What a result.json says that is kept."""
    facts = {name: result.get(name) for name in FACTS}
    return {"settings": comparable(result["settings"]), "best": result["best"],
            "last": result["last"]} | facts


def record(folder):
    """The record of a finished run, from settings on."""
    run = facts_of(json.loads((folder / "result.json").read_bytes()))
    run["peak_memory_gb"] = None                           # would be that of all runs so far
    if (folder / "ranks.json").exists():
        run["ranks"] = by_place(json.loads((folder / "ranks.json").read_bytes()))
        kept = {}
        for name, tensor in runs.load_state(folder)["weights"].items():
            if name.endswith(".lam"):   # what is pruned is 0 from the last phase on
                kept[name.removesuffix(".lam")] = tensor.nonzero().flatten().tolist()
        if kept:
            run["kept"] = by_place(kept)
    return run


def by_place(values):
    """{module name: value} → {matrix: [value of layer 0, layer 1, ...]}, in Figure 3's order."""
    places = {progress.place_of(name): value for name, value in values.items()}
    found = {}
    for short in tables.MATRICES:
        layers = sorted(layer for matrix, layer in places if matrix == short)
        if layers:
            found[short] = [places[short, layer] for layer in layers]
    return found


def read_log(folder):
    """The lines of a run's log that are about a training step."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def step_seconds(folder):
    """Seconds of one of a run's training steps, from its log.

    The first line but that of step 1 ends the warm-up; what is between it and the last one counts.
    """
    first, *_, last = [line for line in read_log(folder) if line["step"] > 1]
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


# --- the file of records ----------------------------------------------------------------------

def write(path, content):
    """Write a file of records. content: a dict, with records in the list "runs"."""
    runs, shared, brief = content["runs"], {}, []
    for name, value in runs[0]["settings"].items():
        if all(run["settings"].get(name) == value for run in runs):
            shared[name] = value
    elsewhere = shared.keys() | {"task", "seed"}           # which a record has anyway
    for run in runs:
        own = {name: value for name, value in run["settings"].items() if name not in elsewhere}
        brief.append(run | {"settings": own})
    disk.write_file(path, layout(content | {"settings": shared, "runs": brief}) + "\n")


def load(path):
    """The content of such a file as it was given to write(). ValueError for a damaged one."""
    content = disk.read_json(path, "restore it, or remove it to make it anew")
    for run in content["runs"]:
        run["settings"] = content["settings"] | run["settings"] | {
            "task": run["task"], "seed": run["seed"]}
    return content


def layout(value, indent=""):
    """JSON with a line for each entry of a dict, and one for each dict that is in a list."""
    if isinstance(value, dict) and value:
        inner = []
        for name, item in value.items():
            inner.append(f"{json.dumps(str(name))}: {layout(item, indent + ' ')}")
        start, end = "{}"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        inner = [json.dumps(item, ensure_ascii=False) for item in value]
        start, end = "[]"
    else:
        return json.dumps(value, ensure_ascii=False)
    lines = f",\n{indent} ".join(inner)
    return f"{start}\n{indent} {lines}\n{indent}{end}"
