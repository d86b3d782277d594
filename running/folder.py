"""The folder of a run: what is written there, going on after a stop.

    last.pt               all that --resume needs: tensors and plain values
    adapter.safetensors   the best adapter and head, and the settings that define the function
    predictions_*.tsv     its predictions for each dev split
    log.jsonl             one object for each logged step and each evaluation
    ranks.json            kept singular values of each adapted matrix
    result.json           best, last, counts, settings, versions; a run that has it is finished

Every file but the log is written beside and renamed: at any moment it is whole or absent. After a
kill the log may be ahead of last.pt, which knows how long it was; so may adapter.safetensors,
which knows the best.
"""
import contextlib
import hashlib
import json
import math
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import safetensors
import torch

from data import METRICS, TASKS, labelled_splits
from formats import config, disk, glue, hub
from formats.disk import digest
from lora2 import load_lora2_state_dict, lora2_layers, lora2_state_dict
from methods.baselines import surviving_parameters
from running import machine, progress
from running.errors import Stopped, refusing
from running.options import STORED

FORMAT = 3                                                 # of last.pt and adapter.safetensors
HASH = 32                                                  # digits of the hash behind last.pt
FILES = ("result.json", "adapter.safetensors", "log.jsonl", "ranks.json", "last.pt")
# What last.pt and an adapter hold, as fits() has it.
STATE = {"format": int, "settings": dict, "base": str, "rows": str, "adapter": str, "step": int,
         "tokens": int, "seconds": float, "evaluations": [dict], "rng": [dict], "log_bytes": int,
         "weights": dict, "optimizer": {"state": dict, "param_groups": list}, "pruner": dict}
COLUMNS = {"texts": [str], "label": str, "labels": [str], "metrics": [str], "unit": [float]}
FACTS = {"format": int, "settings": dict, "columns": COLUMNS, "base": str, "best": dict}
ROOT = Path(__file__).resolve().parents[1]


# --- hashes -------------------------------------------------------------------------------

def hash_of_code():
    """Hash of the sources that a run depends on, as they are when the program begins."""
    sources = []
    for room in ("", "methods", "formats", "running"):
        paths = sorted((ROOT / room).glob("*.py"))
        sources += [path.read_bytes() for path in paths if not path.name.startswith("test_")]
    return digest(*sources)[:16]


CODE = hash_of_code()


def fingerprint(net, tokenizer):
    """Hash of all that makes a base model compute what it does; a new head is not part of it."""
    weights = {name: tensor for name, tensor in net.state_dict().items()
               if name not in net.new_weights}
    meaning = [(name, net.config[name]) for name in config.OPTIONS[net.config["model_type"]]]
    try:
        rules = tokenizer.to_str()
    except Exception:                                      # spm.model's has a part in Python
        file = hub.tokenizer_files(net.source, network=False)["spm.model"]
        rules = f"{disk.read_bytes(file)} {tokenizer.get_added_tokens_decoder()}"
    return digest(weights, str(meaning), rules)


def hash_of_data(examples):
    """Hash of the encoded rows of {split: Examples}."""
    parts = []
    for name, split in examples.items():
        parts += [name, split.ids, split.types, split.starts, split.labels]
    return digest(*parts)


def identity_of(o, here, task, net, tokenizer):
    """What a run is: settings, a hash of the base model, what the data's columns mean.

    train.py adds "rows", the hash of the data.
    """
    columns = {"texts": list(task.texts), "label": task.label, "labels": list(task.labels),
               "metrics": list(task.metrics)}
    if task.unit != (0.0, 1.0):                            # of a user's own scores
        columns["unit"] = list(task.unit)
    return {"settings": vars(o) | {"dtype": here.dtype, "resume": None},
            "base": fingerprint(net, tokenizer), "columns": columns}


# --- what changes -------------------------------------------------------------------------

@dataclass
class State:
    """All that changes in a run beside tensors; last.pt holds it."""
    step: int = 0                    # optimizer steps done
    tokens: int = 0                  # of the training rows seen, without padding
    seconds: float = 0.0             # that the run took before this process
    evaluations: list = field(default_factory=list)  # [{"step", "scores", "score", perhaps "kept"}]
    best: Optional[dict] = None      # one of them; of equals the last, which is pruned more
    adapter: str = ""                # the hash of its adapter.safetensors
    started: float = field(default_factory=time.monotonic)

    def elapsed(self):
        """Seconds that the run has taken so far."""
        return self.seconds + time.monotonic() - self.started


# --- before a run -------------------------------------------------------------------------

def check_destinations(o):
    """OSError or ValueError unless all that will be written has a free place of its own."""
    named = {"--out": o.out, "--merge": o.merge, "--export-peft": o.export_peft}
    if o.eval and not o.predict:
        del named["--out"]                                 # nothing is written there
    folders = {name: Path(place) for name, place in named.items() if place}
    for name, folder in folders.items():
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise OSError(f"{name} {folder}: {nearest} is no folder to write to: give another")
        there = os.listdir(folder) if folder.exists() else []
        cut_off = [file for file in there if file.endswith(disk.LEFT)]         # by a kill
        if len(there) == len(cut_off) or cut_off and name != "--out":
            continue
        if name != "--out":
            raise ValueError(f"{name} {folder}: this folder is not empty: give a new or an empty "
                             "one")
        if o.overwrite:
            files_to_replace(folder)                       # refuses a folder of somebody else
        elif not (o.resume or o.eval):
            has_run = (folder / "last.pt").exists()
            way = f"go on with its run by --resume {folder}, " if has_run else ""
            raise ValueError(f"{folder} is not empty: {way}replace it by --overwrite, or give "
                             "another --out")
    if len({folder.resolve() for folder in folders.values()}) < len(folders):
        raise ValueError(f"{', '.join(folders)} need a folder each")


def check_predictions(o, task):
    """ValueError if --predict would write over a file that is no part of a run to be replaced."""
    if o.predict is None:
        return
    path = glue.place_of_predictions(o.out, task, Path(o.predict).stem)
    if path.exists() and not (o.overwrite and are_predictions(path)):
        raise ValueError(f"the predictions for {o.predict} would replace {path}: move that away, "
                         "or give another --out, beside --eval if the run has ended")
    if o.predict_scores and not task.labels:
        raise ValueError("--predict-scores: here a score is all that is predicted: leave it out")


def files_to_replace(folder):
    """What --overwrite removes from a folder, in order: the files of a run of ours alone.

    The result goes first, since half removed is not finished; last.pt goes last, by which a run is
    known. ValueError for a folder that holds such names without a run of ours.
    """
    there = [folder / name for name in FILES if (folder / name).exists()]
    if not there:
        return []
    if not is_run(folder):
        raise ValueError(f"{there[0]} is not of a run of this program, --overwrite leaves it "
                         "alone: give another --out")
    splits = {name for task in TASKS.values() for name in labelled_splits(task, train=False)}
    tables = [folder / f"predictions_{name}.tsv" for name in sorted(splits)]
    ours = [path for path in tables if path.exists() and are_predictions(path)]
    return there[:-1] + ours + there[-1:]


def are_predictions(path):
    """Whether a text file, which may be anybody's, begins as those that we write."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline(100).startswith("index\tprediction")


def is_run(folder):
    """Whether a folder holds a run of ours: a last.pt with its hash, or a result with settings."""
    state, result = folder / "last.pt", folder / "result.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        has_hash = state.exists() and last_bytes(state).isalnum()
        return has_hash or "settings" in json.loads(result.read_text(encoding="utf-8"))
    return False


# --- the run folder -----------------------------------------------------------------------

def is_finished(folder):
    """Whether the run in a folder has ended."""
    return (Path(folder) / "result.json").exists()


class RunFolder:
    """The folder of one run. Of several processes the first one writes.

    Inside `with` it is locked for this process, and a run that is stopped there is saved.
    identity: from identity_of(). net, optimizer, pruner (or None): what is saved and restored.
    guard: its check() is called before anything is written.
    """

    def __init__(self, identity, here, plan, net, optimizer, pruner, guard):
        self.identity = identity
        self.path = Path(identity["settings"]["out"])
        self.here, self.plan, self.guard = here, plan, guard
        self.net, self.optimizer, self.pruner = net, optimizer, pruner
        self.state = State()
        self.lock = contextlib.ExitStack()

    @refusing()
    def __enter__(self):
        if self.here.speaks:                               # two runs would mix up their files
            self.lock.enter_context(disk.alone(self.path, "train.py"))
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if isinstance(error, Stopped):
                self.save()
                error.args = (f"stopped after step {self.state.step} of {self.plan.steps}: "
                              f"--resume {self.path} goes on",)
        finally:
            self.lock.close()

    @refusing()
    def begin(self, o):
        """Make the folder of a new run, without an older one; returns its State."""
        if self.here.speaks:
            check_destinations(o)                          # again: another run may just have ended
            for path in files_to_replace(self.path):
                path.unlink()
            for path in sorted(self.path.glob("*.tsv")):   # of --predict, or somebody's
                disk.warn(f"{path} stays: it is of --predict, or not of this run")
        self.save()
        return self.state

    @refusing()
    def restore(self, saved):
        """Put everything where save() left it; returns the State.

        saved: from load_run(). ValueError if base model, data or number of processes are others.
        """
        if saved.pop("hash") != last_bytes(self.path / "last.pt"):
            raise ValueError(f"another train.py has gone on with {self.path} meanwhile: --resume "
                             "again")
        self.check(saved)
        state = self.state
        state.step, state.tokens = saved["step"], saved["tokens"]
        state.seconds, state.evaluations = saved["seconds"], saved["evaluations"]
        self.restore_best(saved)
        load_lora2_state_dict(self.net, saved["weights"])
        groups = self.optimizer.state_dict()["param_groups"]
        moments = saved["optimizer"]["state"]              # the rest is this run's own
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.pruner:
            self.pruner.load_state_dict(saved["pruner"])
        try:
            machine.set_random_state(self.here, saved["rng"][self.here.rank])
        except RuntimeError as e:
            raise ValueError(f"{self.path / 'last.pt'} holds random numbers that no generator can "
                             "have: begin again with --overwrite") from e
        log = self.path / "log.jsonl"
        if self.here.speaks and log.exists():              # the steps of later lines come again
            with open(log, "rb", opener=disk.unfollowed) as file:
                lines = file.read(min(saved["log_bytes"], log.stat().st_size))
            disk.write_file(log, lines)
        saved.clear()                                      # its tensors are copied: free them
        return state

    def restore_best(self, saved):
        """The best evaluation and the hash of its adapter, from the adapter, which may be ahead."""
        adapter = self.path / "adapter.safetensors"
        if not self.state.evaluations and not adapter.exists():
            return
        stored = load_adapter(adapter)[1]
        is_ahead = stored["best"]["step"] > saved["step"]  # a kill came before the next last.pt
        is_that_one = is_ahead or stored["digest"] == saved["adapter"]
        mine = self.facts(stored["best"]) | {"digest": stored["digest"]}
        mine["settings"]["model"] = stored["settings"].get("model")    # it may be elsewhere now
        if not is_that_one or stored != mine:
            raise ValueError(f"{adapter} is not of this run: give back the one that was there")
        self.state.best, self.state.adapter = stored["best"], stored["digest"]

    def check(self, saved):
        """ValueError unless a saved state is of this base model, these data, as many processes."""
        if saved["base"] != self.identity["base"]:
            model = self.identity["settings"]["model"]
            raise ValueError(f"{model} is not the model that the run began with: give that one as "
                             "--model")
        if saved["rows"] != self.identity["rows"]:
            raise ValueError("the data are not those that the run began with: give them back")
        if len(saved["rng"]) != self.here.world:
            raise ValueError(f"{len(saved['rng'])} process(es) began this run: resume it with as "
                             "many")
        wrong = [name for name, is_right in self.fitting(saved).items() if not is_right]
        if wrong:
            raise ValueError(f"{self.path / 'last.pt'} holds {', '.join(wrong)} that cannot be of "
                             "this run: begin again with --overwrite")

    def fitting(self, saved):
        """{what of a saved state: whether this run can have written it}."""
        step, seconds, pruner = saved["step"], saved["seconds"], saved["pruner"]
        moments = saved["optimizer"]["state"]
        own = self.pruner.state_dict() if self.pruner else {}
        rng, mine = saved["rng"][self.here.rank], machine.random_state(self.here)
        known = {name: rng.get(name, mine[name]) for name in mine}     # another device has others
        metrics = self.identity["columns"]["metrics"]
        return {
            "a step": 0 <= step <= self.plan.steps,
            "counts": min(saved["tokens"], saved["log_bytes"]) >= 0 and 0 <= seconds < math.inf,
            "evaluations": are_evaluations(saved["evaluations"], metrics),
            "weights": fits(saved["weights"], lora2_state_dict(self.net)),
            "moments of AdamW": fits(moments, self.own_moments(moments)),
            "a pruner": fits(pruner, own) and step == int(pruner.get("_extra_state", [step])[0]),
            "random numbers": "cpu" in rng and fits(known, mine)}

    def own_moments(self, stored):
        """AdamW's moments as this run has them, of the parameters that have some in a saved state.

        Shapes, strides and dtypes have to be those: fused AdamW would write elsewhere.
        """
        moments = {}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(parameters):
            if i in stored:                                # before the first step there are none
                like_p = torch.empty_like(p, device="meta")
                moments[i] = {"step": torch.zeros(()), "exp_avg": like_p, "exp_avg_sq": like_p}
        return moments

    def save(self):
        """Write last.pt: everything on which the rest of the run depends."""
        self.guard.check()
        state = self.state
        rng = machine.gathered(machine.random_state(self.here), self.here)
        if not self.here.speaks:
            return
        log = self.path / "log.jsonl"
        write_state(self.path, {
            "settings": self.identity["settings"], "base": self.identity["base"],
            "rows": self.identity["rows"], "adapter": state.adapter,
            "step": state.step, "tokens": state.tokens,
            "seconds": state.elapsed(),
            "evaluations": state.evaluations, "rng": rng,
            "log_bytes": log.stat().st_size if log.exists() else 0,
            "weights": lora2_state_dict(self.net), "optimizer": self.optimizer.state_dict(),
            "pruner": dict(self.pruner.state_dict()) if self.pruner else {}})

    def keep_best(self, task, scores, predictions):
        """Note an evaluation; write its predictions and adapter.safetensors if none was better.

        scores: {dev split: {metric: value}}, of which the first decides; predictions: {dev split:
        (N,)}.
        """
        state, first = self.state, next(iter(scores.values()))
        evaluation = {"step": state.step, "scores": scores, "score": first[task.metrics[0]]}
        if self.budget is not None:
            evaluation["kept"] = sum(self.pruner.kept().values())
        state.evaluations.append(evaluation)
        if state.best is not None and evaluation["score"] < state.best["score"]:
            return
        state.best = evaluation
        if self.here.speaks:                               # the adapter last: never ahead of these
            for name, values in predictions.items():
                glue.write_predictions(self.path / f"predictions_{name}.tsv", task, values)
            tensors = lora2_state_dict(self.net)
            facts = json.dumps(self.facts(state.best), sort_keys=True)
            state.adapter = digest(tensors, facts)
            disk.write_tensors(self.path / "adapter.safetensors", tensors,
                               {"lora2": json.dumps([facts, state.adapter])})

    def facts(self, best):
        """What an adapter says of itself: no paths, times, devices; equal runs give equal bytes."""
        settings = {name: self.identity["settings"][name] for name in STORED}
        if Path(settings["model"]).is_dir():
            settings["model"] = None
        return {"format": FORMAT, "settings": settings, "columns": self.identity["columns"],
                "base": self.identity["base"], "best": best}

    @property
    def budget(self):
        """How many singular values pruning leaves; None for a method without such a number."""
        target = self.identity["settings"]["target_rank"]
        return None if target is None else len(lora2_layers(self.net)) * target

    def finish(self, task, numbers):
        """Write and print ranks.json and result.json. numbers: of parameters, {what: how many}."""
        state, settings = self.state, self.identity["settings"]
        kept = self.pruner.kept() if self.pruner else None
        peak = machine.peak_memory(self.here.device)
        result = {
            "task": settings["task"], "method": settings["method"], "settings": settings,
            "metric": task.metrics[0], "steps": state.step,
            "best": state.best, "last": state.evaluations[-1], "evaluations": state.evaluations,
            "kept": sum(kept.values()) if kept else None, "budget": self.budget,
            "singular_values": len(kept) * settings["r"] if kept else None,
            "seconds": round(state.elapsed(), 1),
            "peak_memory_gb": round(peak, 2) if peak else None,
            "device": machine.name_of(self.here.device), "dtype": self.here.dtype,
            "processes": self.here.world, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"), "code": CODE,
            "base": self.identity["base"], "rows": self.identity["rows"],
            "adapter": state.adapter, **numbers,
            "surviving_parameters": surviving_parameters(self.net, kept,
                                                         numbers["adapter_parameters"])}
        assert self.budget is None or result["kept"] == self.budget, kept
        if self.here.speaks:
            if kept:
                disk.write_json(self.path / "ranks.json", kept)
            hash_ = digest(json.dumps(result, sort_keys=True))
            disk.write_json(self.path / "result.json", result | {"hash": hash_})
            progress.show_result(result, kept, self.path)


def fits(value, form):
    """Whether a value from a file has a form, and is nothing more.

    form: a type; [the form of each item]; {key: its form}; {str: the form of each value}, of which
    there is one at least; or a tensor that differs in its numbers alone.
    """
    if isinstance(form, dict) and isinstance(value, dict):
        if str in form:
            return len(value) > 0 and fits(value, dict.fromkeys(value, form[str]))
        return value.keys() == form.keys() and all(fits(value[key], form[key]) for key in form)
    if isinstance(form, list) and isinstance(value, list):
        return all(fits(item, form[0]) for item in value)
    if isinstance(form, torch.Tensor) and isinstance(value, torch.Tensor):
        return (value.dtype, value.shape, value.stride()) == (form.dtype, form.shape, form.stride())
    return type(value) is form


def are_evaluations(records, metrics):
    """Whether a file's dicts can be State.evaluations, of these metrics."""
    scores = {str: dict.fromkeys(metrics, float)}
    form = {"step": int, "scores": scores, "score": float, "kept": int}
    return fits([{"kept": 0} | record for record in records], [form])


def are_facts(facts):
    """Whether an adapter of ours can say this of itself."""
    columns = {"unit": [0.0, 1.0]} | facts["columns"]
    if not fits(facts | {"columns": columns}, FACTS):
        return False
    (mean, deviation), metrics = columns["unit"], columns["metrics"]
    is_unit = math.isfinite(mean) and 0 < deviation < math.inf
    has_metrics = len(metrics) > 0 and METRICS.keys() >= set(metrics)
    return (len(columns["texts"]) in (1, 2) and is_unit and has_metrics
            and are_evaluations([facts["best"]], metrics))


@refusing()
def load_result(folder):
    """What result.json of a finished run holds; it and the adapter beside it have to be whole."""
    path = Path(folder) / "result.json"
    with disk.reading(path, f"remove it, and --resume {folder} makes it anew"):
        result = json.loads(disk.read_bytes(path))
        if result.pop("hash", None) != digest(json.dumps(result, sort_keys=True)):
            raise ValueError("its hash does not fit, or it is of another version of this program")
        hash_, _ = result["adapter"], result["settings"]["method"]
    adapter = Path(folder) / "adapter.safetensors"
    if adapter.exists() and load_adapter(adapter)[1]["digest"] != hash_:
        raise ValueError(f"{adapter} is not of this run: give back the one that was there")
    return result


# --- last.pt ------------------------------------------------------------------------------

def write_state(folder, state):
    """last.pt: what torch.save makes, and its hash. It is never in memory as a whole."""
    path = Path(folder) / "last.pt"
    with disk.writing(path), disk.replacing(path) as (beside,):
        try:
            torch.save(state | {"format": FORMAT}, beside)
        except RuntimeError as error:                      # torch's word for a full disk
            raise OSError(disk.one_line(error)) from error
        hash_ = hash_of_file(beside)
        with open(beside, "ab") as file:
            file.write(hash_)


def load_state(folder):
    """What write_state() wrote to that folder, on the CPU."""
    path = Path(folder) / "last.pt"
    below = [str(found.parent) for found in sorted(Path(folder).glob("*/last.pt"))]
    advice = f"--resume one of {', '.join(below)}" if below else "there is no run to resume"
    with disk.reading(path, advice):
        if hash_of_file(path, behind=HASH) != last_bytes(path):
            raise ValueError("its hash does not fit, or it is of another version of this program")
        return of_this_version(disk.load_pickle(path))


@refusing()
def load_run(folder):
    """load_state(), and its "hash", of a run to go on with: nothing lacks in it or is too much."""
    path = Path(folder) / "last.pt"
    hash_ = last_bytes(path) if path.exists() else b""     # before: it may be replaced meanwhile
    saved = load_state(folder)
    if not fits(saved, STATE):
        raise ValueError(f"{path} is of another version of this program, or damaged: begin again "
                         "with --overwrite")
    return saved | {"hash": hash_}


def hash_of_file(path, behind=0):
    """The hash of a file without its last bytes, as many as are `behind`."""
    hasher, left = hashlib.blake2b(digest_size=HASH // 2), path.stat().st_size - behind
    with open(path, "rb") as file:
        while piece := file.read(min(max(left, 0), 1 << 20)):
            hasher.update(piece)
            left -= len(piece)
    return hasher.hexdigest().encode()


def last_bytes(path):
    """What stands where last.pt has its hash."""
    with open(path, "rb") as file:
        file.seek(-min(HASH, path.stat().st_size), os.SEEK_END)
        return file.read()


def of_this_version(content):
    """What last.pt or an adapter file holds, if this program can know what it means."""
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']} is of another version of this program")
    return content


# --- adapter.safetensors ------------------------------------------------------------------

def load_adapter(path):
    """({name: tensor}, facts) of an adapter.safetensors."""
    with disk.reading(path, "give the adapter.safetensors of a run"):
        with safetensors.safe_open(path, "pt") as file:
            text, hash_ = json.loads(file.metadata()["lora2"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if hash_ != digest(tensors, text):
            raise ValueError("its hash does not fit")
        facts = of_this_version(json.loads(text))
        if not are_facts(facts):
            raise ValueError("what it says of itself is not what this program writes")
        return tensors, facts | {"digest": hash_}


def check_adapter(stored, identity, name):
    """ValueError unless the adapter of that name, which stores these facts, fits model and data."""
    settings = identity["settings"]
    if stored["base"] != identity["base"]:
        right = stored["settings"]["model"] or "a folder"
        raise ValueError(f"{settings['model']} is not the model of {name}, or another version of "
                         f"it: give the right one as --model, {right}")
    if stored["columns"] != identity["columns"]:
        raise ValueError(f"{name} is for {stored['columns']}, here {settings['task']} has "
                         f"{identity['columns']}: use the version of this program that trained it")
