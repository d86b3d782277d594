"""The folder of a run: going on after a stop, and what a finished run hands out.

A run folder holds
    last.pt               all that --resume needs: tensors and plain values
    adapter.safetensors   the best adapter and head, and the settings that define the function
    predictions_*.tsv     its predictions for each dev split
    log.jsonl             one object for each logged step and each evaluation
    ranks.json            kept singular values of each adapted matrix
    result.json           best, last, counts, settings, seconds, versions; a run that has it is finished
Every file but the log is written beside and renamed: at any moment it is whole or absent. After a kill the
log may be ahead of last.pt, which knows how long it was; so may adapter.safetensors, which knows the best.
"""
import contextlib
import hashlib
import io
import json
import os
import time
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist

from formats import config
from formats import hub
import model as models
from running import machine as processes
from formats import glue
from formats.disk import one_line, reading, write_file, write_tensors, writing
from lora2 import load_lora2_state_dict, lora2_layers, lora2_state_dict, merge_lora2
from running.options import INCIDENTAL, flag

FORMAT = 1                                                 # of last.pt and adapter.safetensors

# --- hashes -------------------------------------------------------------------------------------------------

def digest(*parts):
    """Hash of texts, bytes, tensors and dicts of them: the formats of our files notice no changed bit."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, torch.Tensor):
            hasher.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        elif isinstance(part, dict):
            part = digest(*(item for name in sorted(part) for item in (name, part[name])))
        part = part.encode() if isinstance(part, str) else part
        hasher.update(f"{len(part)} ".encode())
        hasher.update(part)
    return hasher.hexdigest()


def fingerprint(net, tokenizer):
    """Hash of all that makes a base model compute what it does; a new head is not part of it."""
    weights = {name: tensor for name, tensor in net.state_dict().items() if name not in net.new_weights}
    meaning = [(name, net.config[name]) for name in config.OPTIONS[net.config["model_type"]]]
    words = sorted(tokenizer.get_vocab())[::tokenizer.get_vocab_size() // 100 + 1]
    probe = " ".join(words + [word.swapcase() for word in words])              # how text is cut and cased
    probe = tokenizer.encode(probe, "It's a Naïve TEST № ½ (3.5 %).")
    return digest(weights, str(meaning), str(sorted(tokenizer.get_vocab().items())), str(probe.ids),
                  str(probe.type_ids))


# --- the run folder -----------------------------------------------------------------------------------------

def check_destinations(settings, resumed):
    """OSError or ValueError unless whatever will be written has a place of its own that holds nothing yet."""
    folders = {name: Path(settings[name]) for name in ("out", "merge", "export_peft") if settings[name]}
    for name, folder in folders.items():
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise OSError(f"{flag(name)} {folder}: {nearest} is no folder to write to: give another")
        if not folder.exists() or all(path.suffix == ".tmp" for path in folder.iterdir()):
            continue                                       # .tmp: a write that was cut off
        if name != "out":
            raise ValueError(f"{flag(name)} {folder}: this folder is not empty: give a new or an empty one")
        if not (resumed or settings["overwrite"]):
            way = f"go on with its run by --resume {folder}, " if (folder / "last.pt").exists() else ""
            raise ValueError(f"{folder} is not empty: {way}replace it by --overwrite, or give another --out")
    if len({folder.absolute() for folder in folders.values()}) < len(folders):
        raise ValueError(f"{', '.join(map(flag, folders))} need a folder each")


def prepare_folder(run):
    """Make the run folder without an older run. Its result goes first: half removed is not finished."""
    if run.rank == 0:
        folder = Path(run.out)
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("result.json", "last.pt", "adapter.safetensors", "log.jsonl", "ranks.json",
                        "predictions_*.tsv", "*_predictions.tsv", *run.row.submissions.values()):
            for path in folder.glob(pattern):
                path.unlink()


def save(run):
    """Write everything on which the rest of the run depends."""
    check_finite(run)
    mine = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(run.device)
    rng = [mine] * run.world
    if run.world > 1:
        processes.together(dist.all_gather_object, rng, mine)
    log = Path(run.out) / "log.jsonl"
    if run.rank == 0:
        write_state(run.out, {
            "settings": run.settings, "base": run.base, "rows": run.rows, "step": run.step, "rng": rng,
            "evaluations": run.evaluations, "log_bytes": log.stat().st_size if log.exists() else 0,
            "seconds": run.seconds + time.monotonic() - run.started, "weights": lora2_state_dict(run.net),
            "optimizer": run.optimizer.state_dict(), "pruner": run.pruner.state_dict() if run.pruner else {}})


def write_state(folder, state):
    """last.pt: what torch.save makes, and its hash."""
    buffer = io.BytesIO()
    torch.save(state | {"format": FORMAT}, buffer)
    write_file(Path(folder) / "last.pt", buffer.getbuffer(), digest(buffer.getbuffer()))


def load_state(folder):
    """What write_state() wrote to that folder, on the CPU."""
    path = Path(folder) / "last.pt"
    below = [str(found.parent) for found in sorted(Path(folder).glob("*/last.pt"))]
    with reading(path, f"--resume one of {', '.join(below)}" if below else "there is no run to resume"):
        content = path.read_bytes()
        if content[-32:] != digest(content[:-32]).encode():
            raise ValueError("its hash does not fit")
        return of_this_version(torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True))


def of_this_version(content):
    """What last.pt or an adapter file holds, if this program can know what it means."""
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']} is of another version of this program")
    return content


def restore(run, state):
    """Put a run where save() left it. ValueError if base model, data or number of processes are others."""
    if state["base"] != run.base:
        raise ValueError(f"{run.model} is not the model that the run began with: give that one as --model")
    if state["rows"] != run.rows:
        raise ValueError("the data are not those that the run began with: give them back")
    if len(state["rng"]) != run.world:
        raise ValueError(f"{len(state['rng'])} process(es) began this run: resume it with as many")
    adapter = Path(run.out) / "adapter.safetensors"
    if state["evaluations"] or adapter.exists():
        stored, mine = load_adapter(adapter)[1], facts(run)
        run.best = stored["best"]
        for each in stored, mine:                          # the same base may come from another place now
            each["best"] = each["settings"]["model"] = None
        if stored != mine:
            raise ValueError(f"{adapter} is not of this run: give back the one that was there")
    load_lora2_state_dict(run.net, state["weights"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.pruner:
        run.pruner.load_state_dict(state["pruner"])
    run.step, run.evaluations, run.seconds = state["step"], state["evaluations"], state["seconds"]
    rng = state["rng"][run.rank]
    torch.set_rng_state(rng["cpu"])
    if run.device.type == "cuda" and "cuda" in rng:        # a run that began on a CPU has none
        torch.cuda.set_rng_state(rng["cuda"], run.device)
    log = Path(run.out) / "log.jsonl"
    if run.rank == 0 and log.exists() and log.stat().st_size > state["log_bytes"]:
        os.truncate(log, state["log_bytes"])               # the steps of these lines come again


# --- the adapter file ---------------------------------------------------------------------------------------

def facts(run):
    """What an adapter file says of itself. No paths, times, hosts or devices: equal runs give equal bytes."""
    settings = {name: value for name, value in run.settings.items() if name not in INCIDENTAL}
    if Path(run.model).is_dir():
        settings["model"] = None
    return {"format": FORMAT, "settings": settings, "columns": columns(run), "base": run.base,
            "best": run.best}


def columns(run):
    """What the data mean: columns, names of labels in the order of the model's outputs, metrics."""
    return {name: getattr(run.row, name) for name in ("texts", "label", "labels", "metrics")}


def check_facts(run, stored):
    """ValueError unless the adapter of --eval, which stores these facts, belongs to model and data."""
    if stored["base"] != run.base:
        raise ValueError(f"{run.model} is not the model of {run.eval}, or another version of it: give the "
                         f"right one as --model, {stored['settings']['model'] or 'a folder'}")
    if stored["columns"] != columns(run):
        raise ValueError(f"{run.eval} is for {stored['columns']}, here {run.task} has {columns(run)}: use "
                         "the version of this program that trained it")


def save_best(run, predictions):
    """Write the predictions, {dev split: (N,)}, then the adapter, which thereby is never ahead of them."""
    if run.rank == 0:
        for name, values in predictions.items():
            glue.write_predictions(Path(run.out) / f"predictions_{name}.tsv", run.row, values.tolist())
        tensors, mine = lora2_state_dict(run.net), json.dumps(facts(run), sort_keys=True)
        write_tensors(Path(run.out) / "adapter.safetensors", tensors,
                      {"lora2": json.dumps([mine, digest(tensors, mine)])})


def load_adapter(path):
    """({name: tensor}, facts) of an adapter.safetensors."""
    with reading(path, "give the adapter.safetensors of a run"):
        with safetensors.safe_open(path, "pt") as file:
            stored, hash_ = json.loads(file.metadata()["lora2"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if hash_ != digest(tensors, stored):
            raise ValueError("its hash does not fit")
        stored = of_this_version(json.loads(stored))
        stored["columns"] = {name: tuple(value) if isinstance(value, list) else value
                             for name, value in stored["columns"].items()}
        return tensors, stored


def hand_out(run, predictions):
    """--predict, --export-peft and --merge, of the adapters that the model now holds."""
    if predictions is not None:
        folder = run.out or Path(run.eval).parent
        path = glue.write_submission(folder, run.row, predictions, Path(run.predict).stem)
        print(f"predictions for {run.predict} are in {path}")
    if run.export_peft:
        with writing(run.export_peft):
            export_peft(run, run.export_peft)
        print(f"the adapter as a LoRA for peft is in {run.export_peft}: there give num_labels="
              f"{run.net.num_labels}")
    if run.merge:
        with writing(run.merge):
            models.save_pretrained(merge_lora2(run.net), run.merge)
        print(f"the merged model is in {run.merge}")


def export_peft(run, folder):
    """Write a folder that peft opens: each update as its LoRA (to_lora: exact), the head, the tokenizer."""
    tensors, rank = dict(run.head_parameters), run.k if run.method == "lora2" else run.r
    for name, layer in lora2_layers(run.net):
        A, B = layer.to_lora()
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    tensors = {f"base_model.model.{name}": tensor.detach().contiguous() for name, tensor in tensors.items()}
    hub.write_checkpoint(folder, {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": run.model, "r": rank,
        "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": run.adapted, "modules_to_save": run.head},
        tensors, tokenizer_of=run.net.source, prefix="adapter_")


# --- mistakes and divergence --------------------------------------------------------------------------------

class Refused(Exception):
    """What a user gave cannot be used; the message says what to do."""


@contextlib.contextmanager
def refusing():
    """Around all that a user's mistake can break and around nothing else: a bug shall look like one."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise Refused(one_line(error, 2000)) from error


def check_finite(run):
    """End the run if a loss or gradient was not finite: the one place where it waits for the device."""
    if bad_step := int(run.bad_step.item()):
        raise FloatingPointError(
            f"loss or gradient was not finite at step {bad_step}; no update was made from it. The last good "
            f"state is in {Path(run.out) / 'last.pt'}: begin again with a smaller --lr, a longer --warmup or "
            "--dtype fp32, and --overwrite")
