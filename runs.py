"""What keeps a run safe and visible: whole files or none, resuming, signals, processes, log, bar and map.

A run folder holds
    adapter.safetensors   the best adapter and head, and the settings that define the function
    last.pt               all that --resume needs: tensors and plain values
    log.jsonl             one object for each logged step and each evaluation
    result.json           best, last, counts, settings, seconds, versions
    ranks.json            kept singular values of each adapted matrix
    predictions_*.tsv     the best predictions for each dev split
Every file but the log is written beside and renamed: at any moment it is whole or absent.
"""
import contextlib
import hashlib
import io
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from tqdm import tqdm

import model as models
import options
from hub import read_json
from lora2 import load_lora2_state_dict, lora2_layers, lora2_state_dict, merge_lora2

RUN_FILES = ("adapter.safetensors", "last.pt", "log.jsonl", "result.json", "ranks.json")


# --- files --------------------------------------------------------------------------------------------------

def write_file(path, content):
    """Write bytes or text so that `path` is either as before or complete, also if the power fails."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as e:
        raise OSError(f"{path} could not be written ({e.strerror or e}); what was there is untouched: make room, "
                      "or give another folder") from e
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_json(path, content):
    write_file(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def load_state(path):
    """The dict in a last.pt, on the CPU; OSError or ValueError that names the file if it is not one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != 1:
            raise ValueError("another version wrote it")
        return state
    except OSError as e:
        raise OSError(f"{path} cannot be read ({e.strerror or e}): there is no run to resume there") from e
    except Exception as e:                                 # whatever a damaged file makes the reader raise
        raise ValueError(f"{path} is damaged ({' '.join(str(e).split())[:100]}): start the run anew") from e


def load_adapter(path):
    """({name: tensor}, facts) of an adapter.safetensors; OSError or ValueError that names the file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["lora2"])
            if facts["format"] != 1 or not {"settings", "labels", "base", "best"} <= facts.keys():
                raise ValueError("another version wrote it")
            return {name: file.get_tensor(name) for name in file.keys()}, facts
    except OSError as e:
        raise OSError(f"{path} cannot be read ({e.strerror or e}): give the adapter.safetensors of a run") from e
    except Exception as e:                                 # whatever a damaged file makes the reader raise
        raise ValueError(f"{path} is damaged, or no adapter of this program ({' '.join(str(e).split())[:100]}): "
                         "give the adapter.safetensors of a run") from e


def save_tensors(path, tensors, metadata):
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    write_file(path, safetensors.torch.save(tensors, metadata=metadata))


def fingerprint(model, skip):
    """Hash of all weights but those named in `skip` (a new head): the same base model, the same hash."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if name not in skip:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def prepare_folder(folder, overwrite):
    """Make the run folder; ValueError if it holds something and nobody asked to replace that."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not overwrite:
            raise ValueError(f"{folder} is not empty: go on with its run by --resume {folder}, replace it by "
                             "--overwrite, or give another --out")
        for path in [folder / name for name in RUN_FILES] + list(folder.glob("predictions_*.tsv")):
            path.unlink(missing_ok=True)
        write_file(folder / "log.jsonl", "")
    except OSError as e:
        raise OSError(f"{folder} cannot be written ({e.strerror or e}): give another --out") from e


def check_destinations(run):
    """ValueError unless --merge and --export-peft name new or empty folders."""
    for name in ("merge", "export_peft"):
        folder = getattr(run, name)
        if folder and Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
            raise ValueError(f"{options.flag(name)} {folder}: give a new or an empty folder")


# --- saving, resuming, evaluating later ---------------------------------------------------------------------

def save(run):
    """Write last.pt: everything on which the rest of the run depends."""
    mine = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(run.device)
    rng = [mine]
    if run.world > 1:
        rng = [None] * run.world
        dist.all_gather_object(rng, mine)
    if run.rank == 0:
        state = {"format": 1, "settings": run.settings, "base": run.base, "step": run.step, "best": run.best,
                 "evaluations": run.evaluations, "seconds": run.seconds + time.monotonic() - run.started,
                 "weights": lora2_state_dict(run.net), "optimizer": run.optimizer.state_dict(),
                 "pruner": run.pruner.state_dict() if run.pruner else {}, "rng": rng}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(Path(run.out) / "last.pt", buffer.getbuffer())


def restore(run, state):
    """Put a run where save() left it. ValueError if the base model or the number of processes is another."""
    if state["base"] != run.base:
        raise ValueError(f"{run.model} holds other weights than when the run began: give back the old ones")
    if len(state["rng"]) != run.world:
        raise ValueError(f"{len(state['rng'])} process(es) began this run: resume it with as many")
    load_lora2_state_dict(run.net, state["weights"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.pruner:
        run.pruner.load_state_dict(state["pruner"])
    run.step, run.evaluations, run.best = state["step"], state["evaluations"], state["best"]
    run.seconds = state["seconds"]
    torch.set_rng_state(state["rng"][run.rank]["cpu"])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(state["rng"][run.rank]["cuda"], run.device)


def resumed_settings(state, given):
    """The settings of an interrupted run, with what may differ taken from the command line."""
    old = state["settings"]
    differ = [name for name, value in given.items() if name not in options.INCIDENTAL and value != old[name]]
    if differ:
        raise ValueError("the run to resume has " + ", ".join(f"{options.flag(name)} {old[name]}, not {given[name]}"
                                                              for name in differ) + ": leave the option out")
    return old | {name: given[name] for name in given if name in options.INCIDENTAL} | {"out": given["resume"]}


def facts(run):
    """What an adapter file says of itself. No paths, times, hosts or devices: equal runs give equal bytes."""
    settings = {name: value for name, value in run.settings.items() if name not in options.INCIDENTAL}
    if Path(run.model).is_dir():
        settings["model"] = None
    return {"format": 1, "settings": settings, "labels": list(run.row.labels), "base": run.base, "best": run.best}


def evaluation_settings(facts, given):
    """The settings with which to evaluate an adapter: its own, and from the command line what may differ."""
    free = options.INCIDENTAL | {"model", "batch_size", "dtype", "compile", "limit_dev"}
    fixed = [name for name in given if name not in free and given[name] != facts["settings"].get(name)]
    if fixed:
        raise ValueError(f"{options.flag(fixed[0])} {given[fixed[0]]}: this adapter was trained with "
                         f"{facts['settings'].get(fixed[0])}: leave the option out")
    settings = options.DEFAULTS | facts["settings"] | given
    if settings["model"] is None:
        raise ValueError(f"{given['eval']} belongs to a model in a folder: give that folder as --model")
    return settings


def check_facts(run, facts):
    """ValueError unless an adapter file belongs to this base model and to the labels of these data."""
    if facts["base"] != run.base:
        raise ValueError(f"{run.model} is not the base model of {run.eval}"
                         + (f", {facts['settings']['model']}" if facts["settings"]["model"] else "") + ": give it as --model")
    if facts["labels"] != list(run.row.labels):
        raise ValueError(f"{run.eval} tells {facts['labels']} apart, the data have {list(run.row.labels)}")


def save_best(run, tensors, predictions):
    """Write adapter.safetensors and the dev predictions."""
    if run.rank == 0:
        save_tensors(Path(run.out) / "adapter.safetensors", tensors, {"lora2": json.dumps(facts(run), sort_keys=True)})
        for name, values in predictions.items():
            rows = "".join(f"{i}\t{value}\n" for i, value in enumerate(values.tolist()))
            write_file(Path(run.out) / f"predictions_{name}.tsv", "index\tprediction\n" + rows)


def stop_on(bad_step, run):
    """End the run if a loss or gradient was not finite: the one place where the loop waits for the device."""
    if bad_step.item():
        last = Path(run.out) / "last.pt"
        raise FloatingPointError(
            f"loss or gradient was not finite at step {int(bad_step.item())}, no update was made from it; "
            + (f"the last good state is {last}" if last.exists() else "no state had been saved yet")
            + ": try a smaller --lr, a longer --warmup or --dtype fp32")


# --- several processes, signals -----------------------------------------------------------------------------

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


def gradients(parameters):
    """The gradients; zeros for a parameter that got none, as in a process without a row of a small batch."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in parameters]


def sum_over_processes(tensors):
    """Add up tensors over all processes, in place and in one message."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


class Stopped(Exception):
    """Ctrl-C or SIGTERM arrived, and the run can be saved. signal: its number."""

    def __init__(self, number):
        self.signal = number


class Signals:
    """Inside `with`, Ctrl-C and SIGTERM are only noted; check() raises Stopped where the state is whole."""

    def __enter__(self):
        self.number = 0
        self.previous = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.number = number

    def check(self, run):
        """Several processes agree first, so that none waits for another that has stopped."""
        number = self.number
        if run.world > 1:
            flag = torch.tensor(float(number), device=run.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            number = int(flag.item())
        if number:
            raise Stopped(number)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# --- what a person sees -------------------------------------------------------------------------------------

def announce(run):
    """Before the first step: settings, counts, matches, schedule."""
    shown = {name: value for name, value in run.settings.items() if value not in (None, False)}
    print("settings  " + "  ".join(f"{name}={value:.4g}" if isinstance(value, float) else
                                   f"{name}={','.join(value)}" if isinstance(value, list) else f"{name}={value}"
                                   for name, value in shown.items()))
    adapter, head, frozen = counts(run).values()
    print(f"{adapter:,} adapter parameters in {len(run.adapted)} matrices + {head:,} head parameters; {frozen:,} frozen")
    for short in run.targets or []:
        modules = models.target_modules(run.net, [short])
        print(f"  {short:2} {len(modules)} × {modules[0]} ...")
    print(f"new weights: {', '.join(run.net.new_weights) or 'none'}")
    if run.budget is not None:
        warmup, final, interval = run.phases
        print(f"{len(run.adapted) * run.r} singular values are pruned to {run.budget} between the steps {warmup} and "
              f"{run.T - final} of {run.T}, every {interval}")
    dev = [name for name in run.data if name != "train"]
    print(f"{run.T} steps; the best is chosen by {run.row.metrics[0]} on {dev[0]}; {run.device}, {run.dtype}, "
          f"{run.world} process(es)", flush=True)


def counts(run):
    """Numbers of parameters: what the method trains, the head, the rest."""
    body, head = (sum(p.numel() for _, p in named) for named in (run.body_parameters, run.head_parameters))
    return {"adapter_parameters": body, "head_parameters": head,
            "frozen_parameters": sum(p.numel() for p in run.net.parameters()) - body - head}


class Log:
    """log.jsonl, and what a person sees of it: a bar on a terminal, some lines elsewhere."""

    def __init__(self, run):
        self.run, self.first, self.started = run, run.step, time.monotonic()
        self.path, self.bar, self.text = Path(run.out) / "log.jsonl", None, ""
        if run.rank == 0:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            kept = [line for line in lines if step_of(line) <= run.step]       # a resumed run repeats the others
            write_file(self.path, "".join(line + "\n" for line in kept))
            if sys.stderr.isatty():
                self.bar = tqdm(total=run.T, initial=run.step, unit="step", dynamic_ncols=True)

    def write(self, record):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")

    def training(self, run, loss, R, kept, speed):
        """A line about step run.step. R is given as the distance from its floor."""
        if run.rank > 0:
            return
        record = {"step": run.step, "loss": loss.item(), "lr": run.optimizer.param_groups[0]["lr"],
                  "tokens_per_second": round(speed)}
        text = f"loss {record['loss']:.4f}"
        if R is not None:
            record["R"] = R.item() - run.floor
            text += f"  R {record['R']:.3f}"
        if kept is not None:
            record["kept"] = kept
            text += f"  kept {kept}/{len(run.adapted) * run.r}"
        if run.evaluations:
            text += f"  {run.row.metrics[0]} {run.evaluations[-1]['score']:.4f}"
        self.write(record)
        left = (time.monotonic() - self.started) / (run.step - self.first) * (run.T - run.step)
        if self.bar:
            self.bar.set_postfix_str(f"{text}  {speed:.0f} tokens/s", refresh=False)
            self.bar.update(run.step - self.bar.n)
        elif run.step == run.T or run.step * 20 // run.T > (run.step - 10) * 20 // run.T:
            print(f"step {run.step}/{run.T}  {text}  {speed:.0f} tokens/s  {left:.0f} s left", flush=True)

    def evaluation(self, evaluation, is_best):
        if self.run.rank > 0:
            return
        self.write(evaluation)
        text = f"step {evaluation['step']}/{self.run.T}  {show_scores(evaluation['scores'])}" + "  *" * is_best
        tqdm.write(text) if self.bar else print(text, flush=True)

    def close(self):
        if self.bar:
            self.bar.close()


def step_of(line):
    """The step of a log line; infinity for one that a kill cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def show_scores(scores):
    return "; ".join(f"{split} " + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
                     for split, values in scores.items())


def kept_map(kept, targets, r):
    """The kept singular values as a picture for the terminal, like Figure 3: matrices down, layers across.

    kept: {module name: count}; targets: {short name: end of the module names}; r: the count at the start.
    """
    cells = {}
    for name, count in kept.items():
        layer = int(next(part for part in name.split(".") if part.isdigit()))
        short = max((s for s, end in targets.items() if name.endswith("." + end)), key=lambda s: len(targets[s]))
        cells[short, layer] = count
    layers = sorted({layer for _, layer in cells})
    lines = [f"kept of {r} singular values, layers {layers[0]} to {layers[-1]} from left to right"]
    for short in (s for s in targets if any((s, layer) in cells for layer in layers)):
        row = [cells.get((short, layer), 0) for layer in layers]
        lines.append(f"  {short:2} " + " ".join(f"{n:2}{' ░▒▓█'[-(-4 * n // r)]}" for n in row))
    return "\n".join(lines)


# --- the end ------------------------------------------------------------------------------------------------

def finish(run):
    """Write result.json and ranks.json, show table and map. Returns the result."""
    kept = run.pruner.kept() if run.pruner else None
    result = {"task": run.task, "method": run.method, "settings": run.settings, "metric": run.row.metrics[0],
              "best": run.best, "last": run.evaluations[-1], "evaluations": run.evaluations, **counts(run),
              "kept": sum(kept.values()) if kept else None, "budget": run.budget, "steps": run.step,
              "seconds": round(run.seconds + time.monotonic() - run.started, 1), "device": str(run.device),
              "dtype": run.dtype, "processes": run.world, "threads": torch.get_num_threads(),
              "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    if run.rank == 0:
        if kept:
            write_json(Path(run.out) / "ranks.json", kept)
            print(kept_map(kept, models.TARGETS[run.net.config["model_type"]], run.r))
        write_json(Path(run.out) / "result.json", result)
        show_result(result, run.out)
    return result


def show_result(result, folder):
    for name in ("best", "last"):
        print(f"{name}  step {result[name]['step']:6}  {show_scores(result[name]['scores'])}")
    where = f" --data-dir {result['settings']['data_dir']}" if result["task"] not in ("demo", "own") else ""
    print(f"{result['seconds']:.0f} s; files in {folder}; to evaluate the best again:\n  python train.py --eval "
          f"{Path(folder) / 'adapter.safetensors'} --model {result['settings']['model']}{where}", flush=True)


def show_finished(folder):
    """Whether the run in that folder is finished; if so, its result is shown."""
    path = Path(folder) / "result.json"
    if not path.exists():
        return False
    print("this run is finished:")
    show_result(read_json(path), folder)
    return True


def export(run):
    """--export-peft, then --merge, of the adapters that the model now holds."""
    if run.export_peft:
        export_peft(run, Path(run.export_peft))
        print(f"the adapter as a LoRA for peft is in {run.export_peft}")
    if run.merge:
        models.save_pretrained(merge_lora2(run.net), run.merge)
        print(f"the merged model is in {run.merge}")


def export_peft(run, folder):
    """Write a folder that peft.PeftModel.from_pretrained opens: each update as its LoRA (to_lora: exact), and the
    head."""
    tensors = {f"base_model.model.{name}": parameter for name, parameter in run.head_parameters}
    for name, layer in lora2_layers(run.net):
        A, B = layer.to_lora()
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    rank = len(A)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": run.model, "r": rank,
        "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": run.adapted, "modules_to_save": run.head})
