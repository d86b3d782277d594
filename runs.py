"""What keeps a run safe: whole files or none, resuming, signals, several processes; adapters to hand out.

A run folder holds
    last.pt               all that --resume needs: tensors and plain values
    adapter.safetensors   the best adapter and head, and the settings that define the function
    predictions_*.tsv     its predictions for each dev split
    log.jsonl             one object for each logged step and each evaluation
    ranks.json            kept singular values of each adapted matrix
    result.json           best, last, counts, settings, seconds, versions; a run that has it is finished
Every file but the log is written beside and renamed: at any moment it is whole or absent. After a kill the log
may be ahead of last.pt, which knows how long it was; so may adapter.safetensors, which knows the best score.
"""
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist

import data
import hub
import model as models
from lora2 import load_lora2_state_dict, lora2_layers, lora2_state_dict, merge_lora2
from options import INCIDENTAL, flag


# --- files --------------------------------------------------------------------------------------------------

def write_file(path, content):
    """Write bytes or text so that `path` is either as before or complete, also if the power fails."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({e.strerror or e}), what was there is untouched: make "
                      "room or give another folder") from e


def write_json(path, content):
    write_file(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_tensors(path, tensors, metadata):
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    write_file(path, safetensors.torch.save(tensors, metadata=metadata))


@contextlib.contextmanager
def reading(path, advice):
    """What a missing or damaged file makes its reader raise becomes one sentence: OSError or ValueError."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path} cannot be read ({e.strerror or hub.one_line(e)}): {advice}") from e
    except Exception as e:
        cause = hub.one_line(e, 100)
        raise ValueError(f"{path} is damaged or another kind of file ({cause}): {advice}") from e


def digest(*content):
    """Hash of tensors and plain values in dicts, lists and tuples: the file formats here check no content."""
    hasher = hashlib.blake2b(digest_size=16)

    def add(value):
        if isinstance(value, torch.Tensor):
            hasher.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            hasher.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, dict):
            add(sorted(value.items(), key=lambda item: str(item[0])))
        elif isinstance(value, (list, tuple)):
            hasher.update(f"{len(value)} ".encode())
            for item in value:
                add(item)
        else:
            hasher.update(f"{value!r} ".encode())

    add(content)
    return hasher.hexdigest()


def fingerprint(net, tokenizer):
    """Hash of all that makes a base model compute what it does; a new head is not part of it."""
    weights = {name: tensor for name, tensor in net.state_dict().items() if name not in net.new_weights}
    config = {name: net.config[name] for name in models.OPTIONS[net.config["model_type"]]}
    vocabulary = sorted(tokenizer.get_vocab().items())
    some = [word for word, _ in vocabulary[::len(vocabulary) // 100 + 1]]      # shows how text is cut and cased
    probe = tokenizer.encode(" ".join(some + [word.swapcase() for word in some]), "It's a Naïve TEST № ½ (3.5 %).")
    return digest(weights, config, str(vocabulary), probe.ids, probe.type_ids)


# --- the run folder -----------------------------------------------------------------------------------------

def check_destinations(settings, resumed):
    """OSError or ValueError unless whatever will be written has a place of its own that holds nothing yet."""
    folders = {name: Path(settings[name]) for name in ("out", "merge", "export_peft") if settings[name]}
    for name, folder in folders.items():
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise OSError(f"{flag(name)} {folder}: {nearest} is no folder to write to: give another")
        if not folder.exists() or all(path.suffix == ".tmp" for path in folder.iterdir()):    # cut off writes
            continue
        if name != "out":
            raise ValueError(f"{flag(name)} {folder}: this folder is not empty: give a new or an empty one")
        if not (resumed or settings["overwrite"]):
            way = f"go on with its run by --resume {folder}, " if (folder / "last.pt").exists() else ""
            raise ValueError(f"{folder} is not empty: {way}replace it by --overwrite, or give another --out")
    if len({folder.absolute() for folder in folders.values()}) < len(folders):
        raise ValueError(f"{', '.join(map(flag, folders))} need a folder each")


def is_finished(folder):
    return (Path(folder) / "result.json").exists()


def prepare_folder(run):
    """Make the run folder without an older run. Its result goes first: half removed is not finished."""
    if run.rank == 0:
        folder = Path(run.out)
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("result.json", "last.pt", "adapter.safetensors", "log.jsonl", "ranks.json",
                        "predictions_*.tsv"):
            for path in folder.glob(pattern):
                path.unlink()


def save(run):
    """Write last.pt: everything on which the rest of the run depends."""
    check_finite(run)
    rng = [{"cpu": torch.get_rng_state()}]
    if run.device.type == "cuda":
        rng[0]["cuda"] = torch.cuda.get_rng_state(run.device)
    if run.world > 1:
        mine, rng = rng[0], [None] * run.world
        together(dist.all_gather_object, rng, mine)
    if run.rank == 0:
        log = Path(run.out) / "log.jsonl"
        state = {"settings": run.settings, "base": run.base, "rows": run.rows, "step": run.step,
                 "evaluations": run.evaluations, "log_bytes": log.stat().st_size if log.exists() else 0,
                 "seconds": run.seconds + time.monotonic() - run.started, "rng": rng,
                 "weights": lora2_state_dict(run.net), "optimizer": run.optimizer.state_dict(),
                 "pruner": run.pruner.state_dict() if run.pruner else {}}
        buffer = io.BytesIO()
        torch.save({"format": 1, "digest": digest(state), "state": state}, buffer)
        write_file(Path(run.out) / "last.pt", buffer.getbuffer())


def load_state(folder):
    """What save() wrote to that folder, on the CPU."""
    path = Path(folder) / "last.pt"
    with reading(path, "there is no run to resume"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != 1 or content["digest"] != digest(content["state"]):
            raise ValueError("its content does not fit its digest")
        return content["state"]


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
        stored = load_adapter(adapter)[1]
        if stored | {"best": None} != facts(run) | {"best": None}:
            raise ValueError(f"{adapter} is not of this run: give back the one that was there")
        run.best = stored["best"]
    load_lora2_state_dict(run.net, state["weights"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.pruner:
        run.pruner.load_state_dict(state["pruner"])
    run.step, run.evaluations, run.seconds = state["step"], state["evaluations"], state["seconds"]
    torch.set_rng_state(state["rng"][run.rank]["cpu"])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(state["rng"][run.rank]["cuda"], run.device)
    log = Path(run.out) / "log.jsonl"
    if run.rank == 0 and log.exists() and log.stat().st_size > state["log_bytes"]:
        os.truncate(log, state["log_bytes"])               # the steps of these lines come again


# --- the adapter file ---------------------------------------------------------------------------------------

def facts(run):
    """What an adapter file says of itself. No paths, times, hosts or devices: equal runs give equal bytes."""
    settings = {name: value for name, value in run.settings.items() if name not in INCIDENTAL}
    if Path(run.model).is_dir():
        settings["model"] = None
    task = run.row
    columns = [list(task.texts), task.label, list(task.labels), list(task.metrics)]
    return {"format": 1, "settings": settings, "columns": columns, "base": run.base, "best": run.best}


def stored_task(facts):
    """The data.Task of the user's own files on which an adapter was trained."""
    texts, label, labels, metrics = facts["columns"]
    return data.Task("", {}, tuple(texts), label, tuple(labels), tuple(metrics))


def save_best(run, predictions):
    """Write the predictions, {dev split: (N,)}, then the adapter, which thereby is never ahead of them."""
    if run.rank == 0:
        for name, values in predictions.items():
            values = [run.row.labels[value] if run.row.labels else value for value in values.tolist()]
            rows = "".join(f"{i}\t{value}\n" for i, value in enumerate(values))
            write_file(Path(run.out) / f"predictions_{name}.tsv", "index\tprediction\n" + rows)
        tensors, mine = lora2_state_dict(run.net), facts(run)
        text = json.dumps(mine | {"digest": digest(tensors, mine)}, sort_keys=True)
        write_tensors(Path(run.out) / "adapter.safetensors", tensors, {"lora2": text})


def load_adapter(path):
    """({name: tensor}, facts) of an adapter.safetensors."""
    with reading(path, "give the adapter.safetensors of a run"):
        with safetensors.safe_open(path, "pt") as file:
            stored = json.loads(file.metadata()["lora2"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if stored.pop("digest") != digest(tensors, stored) or stored["format"] != 1:
            raise ValueError("its content does not fit its digest")
        return tensors, stored


def export(run):
    """--export-peft, then --merge, of the adapters that the model now holds."""
    if run.export_peft:
        export_peft(run, Path(run.export_peft))
        print(f"the adapter as a LoRA for peft is in {run.export_peft}")
    if run.merge:
        models.save_pretrained(merge_lora2(run.net), run.merge)
        print(f"the merged model is in {run.merge}")


def export_peft(run, folder):
    """Write a folder that peft opens: each update as its LoRA (to_lora: exact), the head, the tokenizer."""
    tensors = {f"base_model.model.{name}": parameter for name, parameter in run.head_parameters}
    for name, layer in lora2_layers(run.net):
        A, B = layer.to_lora()
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    folder.mkdir(parents=True, exist_ok=True)
    for path in hub.tokenizer_files(run.net.source):
        shutil.copyfile(path, folder / path.name)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": run.model, "r": len(A),
        "lora_alpha": len(A), "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": run.adapted, "modules_to_save": run.head})


# --- what ends a run early ----------------------------------------------------------------------------------

class Refused(Exception):
    """What a user gave cannot be used; the message says what to do."""


@contextlib.contextmanager
def refusing():
    """Around all that a user's mistake can break and around nothing else: a bug shall look like one."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise Refused(hub.one_line(error, 2000)) from error


def check_finite(run):
    """End the run if a loss or gradient was not finite: the one place where it waits for the device."""
    if bad_step := int(run.bad_step.item()):
        raise FloatingPointError(
            f"loss or gradient was not finite at step {bad_step}; no update was made from it. The last good "
            f"state is in {Path(run.out) / 'last.pt'}: try a smaller --lr, a longer --warmup or --dtype fp32")


class Stopped(Exception):
    """Ctrl-C or SIGTERM arrived, and the run can be saved. status: for the shell."""

    def __init__(self, number, run):
        way = f"python train.py --resume {run.out} goes on"
        super().__init__(f"stopped after step {run.step} of {run.T}: {way}")
        self.status = 128 + number


class Signals:
    """Inside `with`, Ctrl-C and SIGTERM are only noted; check() raises Stopped where the state is whole."""

    def __enter__(self):
        self.number = 0
        self.previous = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        if self.number:
            raise KeyboardInterrupt                        # the second one does not wait
        self.number = number

    def check(self, run):
        """Several processes agree first, so that none waits for another that has stopped."""
        number = self.number
        if run.world > 1:
            highest = torch.tensor(float(number), device=run.device)
            together(dist.all_reduce, highest, dist.ReduceOp.MAX)
            number = int(highest.item())
        if number:
            raise Stopped(number, run)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# --- devices and processes --------------------------------------------------------------------------------

def pick_device(name):
    """The torch.device of that name, or the first there is of cuda, mps and cpu."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name or found).device
        assert device.type in ("cuda", "mps", "cpu")
    except (RuntimeError, AssertionError) as e:            # unknown, or this torch was built without it
        raise ValueError(f"--device {name} cannot be used here: leave it out or give {found}") from e
    return device


def join_processes(device):
    """(rank, number of processes); joins the others when torchrun started this one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world


def together(operation, *arguments):
    """An operation of all processes. Where one has died the others end with a sentence instead of waiting."""
    try:
        operation(*arguments)
    except RuntimeError as e:
        raise ConnectionError(f"another process of this run has ended ({hub.one_line(e, 100)}): see what it "
                              "says; --resume goes on from last.pt") from e


def wait_for_all():
    if dist.is_initialized():
        together(dist.barrier)


def sum_over_processes(tensors):
    """Add up tensors over all processes, in place and in one message."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        together(dist.all_reduce, flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def gradients(parameters):
    """The gradients; zeros for a parameter that got none, as in a process without a row of a small batch."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in parameters]
