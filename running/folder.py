"""The files in a run's folder: what run they are of, how they are written, read and checked.

saving.py says which there are and in which order they come.
"""
import contextlib
import json
import math
import zipfile
from pathlib import Path

import safetensors
import torch

from data import METRICS
from formats import config, disk, hub
from formats.disk import digest
from running.errors import user_errors
from running.options import STORED

FORMAT = {"last.pt": 5, "adapter.safetensors": 3}          # what this version writes
OURS = b"a run of lora2"                                   # comment of a last.pt, which is a zip
# What an adapter says of itself, as fits() has it.
EVALUATION = {"step": int, "scores": {str: {str: float}}, "score": float, "kept": int}
COLUMNS = {"texts": [str], "label": str, "labels": [str], "metrics": [str], "unit": [float]}
MAY_LACK = {"kept", "unit"}                                # of what prunes, of a user's own scores
FACTS = {"format": int, "settings": dict, "columns": COLUMNS, "base": str, "best": EVALUATION}
ROOT = Path(__file__).resolve().parents[1]


# --- what run it is -----------------------------------------------------------------------

def hash_of_code():
    """Hash of the sources that a run depends on, as they are when the program begins."""
    paths = [ROOT / f"{name}.py" for name in ("lora2", "model", "data", "train")]
    for room in ("methods", "formats", "running"):
        paths += sorted((ROOT / room).glob("*.py"))
    return digest(*[path.read_bytes() for path in paths])[:16]


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
        with disk.reading(file, "get it again"):
            rules = f"{disk.read_bytes(file)} {tokenizer.get_added_tokens_decoder()}"
    return digest(weights, str(meaning), rules)


def identity_of(o, here, task, net, tokenizer, examples):
    """What a run is: settings, hashes of base model and data, what the data's columns mean."""
    columns = {"texts": list(task.texts), "label": task.label, "labels": list(task.labels),
               "metrics": list(task.metrics)}
    if task.unit != (0.0, 1.0):                            # of a user's own scores
        columns["unit"] = list(task.unit)
    rows = []                                              # as they are encoded
    for name, split in examples.items():
        rows += [name, split.ids, split.types, split.starts, split.labels]
    return {"settings": vars(o) | {"dtype": here.dtype, "resume": None}, "columns": columns,
            "base": fingerprint(net, tokenizer), "rows": digest(*rows)}


def is_run(folder):
    """Whether a folder holds a run of ours: a last.pt that says so, or a result with settings."""
    with (contextlib.suppress(OSError, zipfile.BadZipFile),
          zipfile.ZipFile(folder / "last.pt") as file):
        if file.comment == OURS:
            return True
    with contextlib.suppress(OSError, ValueError, TypeError):
        return "settings" in json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return False


# --- what a file may hold -----------------------------------------------------------------

def fits(value, form):
    """Whether a value from a file has a form, and is nothing more.

    form: a type; [the form of each item]; {key: its form}, where MAY_LACK may be absent; {str: the
    form of each value}, of which there is one at least; or a tensor that differs in its numbers.
    """
    if isinstance(form, dict) and isinstance(value, dict):
        if str in form:
            return len(value) > 0 and fits(list(value.values()), [form[str]])
        is_whole = value.keys() | MAY_LACK == form.keys() | MAY_LACK
        return is_whole and all(fits(value[key], form.get(key)) for key in value)
    if isinstance(form, list) and isinstance(value, list):
        return all(fits(item, form[0]) for item in value)
    if isinstance(form, torch.Tensor) and isinstance(value, torch.Tensor):
        return (value.dtype, value.shape, value.stride()) == (form.dtype, form.shape, form.stride())
    return type(value) is form


def of_this_version(content, file):
    """What last.pt or an adapter file holds, if this program can know what it means."""
    if content["format"] != FORMAT[file]:
        raise ValueError(f"format {content['format']} is of another version of this program")
    return content


# --- last.pt ------------------------------------------------------------------------------

def write_state(folder, state):
    """last.pt: what torch.save makes, a zip, with a comment. It is never in memory as a whole."""
    path = Path(folder) / "last.pt"
    with disk.writing(path), disk.replacing(path) as (beside,):
        try:
            torch.save(state | {"format": FORMAT["last.pt"]}, beside)
        except RuntimeError as error:                      # torch's word for a full disk
            raise OSError(disk.one_line(error)) from error
        with zipfile.ZipFile(beside, "a") as file:
            file.comment = OURS


@user_errors()
def load_state(folder):
    """What write_state() wrote to that folder, on the CPU, and when it was "written"."""
    path = Path(folder) / "last.pt"
    below = [str(found.parent) for found in sorted(Path(folder).glob("*/last.pt"))]
    advice = f"--resume one of {', '.join(below)}" if below else "there is no run to resume"
    with disk.reading(path, advice):
        written = path.stat().st_mtime_ns                  # before: it may be replaced meanwhile
        state = of_this_version(disk.load_pickle(path), "last.pt")
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("a checksum does not fit")
        return state | {"written": written, "settings": dict(state["settings"])}


def check_state(saved, mine, identity, steps, here, optimizer):
    """ValueError unless a saved state can be of this run.

    mine: what this run would save now. steps: how many it has. optimizer: whose parameters the
    moments belong to.
    """
    if saved.get("base") != identity["base"]:
        raise ValueError(f"{identity['settings']['model']} is not the model that the run began "
                         "with: give that one as --model")
    if saved.get("rows") != identity["rows"]:
        raise ValueError("the data are not those that the run began with: give them back")
    form = {key: type(value) for key, value in mine.items()}
    form |= {"format": int, "written": int, "settings": dict, "base": str, "rows": str,
             "log_bytes": int, "evaluations": [EVALUATION], "rng": [dict],
             "optimizer": {"state": dict, "param_groups": list},
             "weights": mine["weights"], "pruner": mine["pruner"]}
    if not (fits(saved, form) and are_moments(saved["optimizer"]["state"], optimizer)
            and 0 <= saved["step"] <= steps and 0 <= saved["seconds"] < math.inf
            and min(saved["tokens"], saved["log_bytes"]) >= 0
            and saved["step"] == int(saved["pruner"].get("_extra_state", [saved["step"]])[0])):
        raise ValueError(f"{identity['settings']['out']}/last.pt holds what this run cannot have "
                         "written: begin again with --overwrite")
    if len(saved["rng"]) != here.world:
        raise ValueError(f"{len(saved['rng'])} process(es) began this run: resume it with as many")


def are_moments(stored, optimizer):
    """Whether these can be AdamW's moments, of all or some of its parameters.

    Shapes, strides and dtypes have to be the parameters': fused AdamW would write elsewhere.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    whole = {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
             for i, p in enumerate(parameters)}
    return stored.keys() <= whole.keys() and fits(stored, {i: whole[i] for i in stored})


# --- adapter.safetensors ------------------------------------------------------------------

def facts_of(identity, best):
    """What an adapter says of itself: no paths, times, devices; equal runs give equal bytes."""
    settings = {name: identity["settings"][name] for name in STORED}
    if Path(settings["model"]).is_dir():
        settings["model"] = None
    return {"format": FORMAT["adapter.safetensors"], "settings": settings,
            "columns": identity["columns"], "base": identity["base"], "best": best}


def write_adapter(folder, tensors, facts):
    """adapter.safetensors: {name: tensor} and what it says of itself; returns its hash."""
    text = json.dumps(facts, sort_keys=True)
    hash_ = digest(tensors, text)
    disk.write_tensors(Path(folder) / "adapter.safetensors", tensors,
                       {"lora2": json.dumps([text, hash_])})
    return hash_


def load_adapter(path):
    """({name: tensor}, facts) of an adapter.safetensors."""
    with disk.reading(path, "give the adapter.safetensors of a run"):
        if Path(path).is_dir():
            raise ValueError("it is a folder")
        with safetensors.safe_open(path, "pt") as file:
            text, hash_ = json.loads(file.metadata()["lora2"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if hash_ != digest(tensors, text):
            raise ValueError("its hash does not fit")
        facts = of_this_version(json.loads(text), "adapter.safetensors")
        metrics = facts["columns"]["metrics"]              # texts and unit are judged with the data
        if not (fits(facts, FACTS) and metrics and METRICS.keys() >= set(metrics)):
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


# --- result.json --------------------------------------------------------------------------

@user_errors()
def load_result(folder):
    """What result.json holds, None before a run has ended; the adapter has to be whole too."""
    path = Path(folder) / "result.json"
    if not path.exists():
        return None
    with disk.reading(path, f"remove it, and --resume {folder} makes it anew"):
        result = json.loads(disk.read_bytes(path))
        if result.pop("hash", None) != digest(json.dumps(result, sort_keys=True)):
            raise ValueError("its hash does not fit, or it is of another version of this program")
        hash_, _ = result["adapter"], result["settings"]["method"]
    adapter = Path(folder) / "adapter.safetensors"
    if adapter.exists() and load_adapter(adapter)[1]["digest"] != hash_:
        raise ValueError(f"{adapter} is not of this run: give back the one that was there")
    return result
