"""What keeps a run safe and visible: whole files or none, resuming, signals, several processes, log, bar, map.

A run folder holds
    adapter.safetensors   the best adapter and head, with the settings that define the function: the product
    last.pt               everything that --resume needs; tensors and plain values only
    log.jsonl             one object per logged step or evaluation
    result.json           best, last, counts, settings, seconds, versions
    ranks.json            kept singular values per adapted matrix
    predictions_*.tsv     the best dev predictions
All but the log are written beside and renamed, so that each is whole or absent at any moment.
"""
import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from tqdm import tqdm

from hub import read_json

# --- files ---------------------------------------------------------------------------------------------------


def write_file(path, content):
    """Write bytes or text so that `path` is the old file or the whole new one, also if the power fails."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as e:
        raise OSError(f"{path} could not be written ({e.strerror or e}); the previous one is untouched: "
                      "make room or give another --out") from e
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_json(path, content):
    write_file(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def save_state(path, state):
    """A dict of tensors and plain values → a file that load_state() reads."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


def load_state(path):
    """Inverse of save_state(), on the CPU; ValueError if the file is damaged or holds anything but plain data."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path} is not there: nothing to resume in this folder") from e
    except Exception as e:                                 # whatever a damaged file makes the reader raise
        raise ValueError(f"{path} is damaged ({' '.join(str(e).split())[:120]}): start the run anew") from e


def save_adapter(path, tensors, facts):
    """Tensors and one JSON object of facts → a safetensors file; equal contents give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    write_file(path, safetensors.torch.save(tensors, metadata={"lora2": json.dumps(facts, sort_keys=True)}))


def load_adapter(path):
    """(tensors, facts) of save_adapter(); OSError or ValueError that names the file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["lora2"])
            if not isinstance(facts, dict) or facts.get("format") != 1:
                raise KeyError("lora2")
            return {name: file.get_tensor(name) for name in file.keys()}, facts
    except FileNotFoundError as e:
        raise FileNotFoundError(f"there is no file {path}: give the adapter.safetensors of a run") from e
    except OSError as e:
        raise OSError(f"{path} cannot be read ({e.strerror or e}): give the adapter.safetensors of a run") from e
    except (KeyError, ValueError, RecursionError, safetensors.SafetensorError) as e:
        raise ValueError(f"{path} is damaged or no adapter of this program ({str(e)[:120]}): "
                         "give the adapter.safetensors of a run") from e


def fingerprint(model, skip=()):
    """Hash of all weights but those named in `skip` (a new head): the same base model, the same hash."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if name not in skip:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prepare_folder(folder, overwrite):
    """Make the run folder; ValueError if it holds a run that nobody asked to overwrite."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            known = [folder / name for name in ("last.pt", "log.jsonl", "result.json", "adapter.safetensors",
                                                "ranks.json")]
            if not overwrite:
                raise ValueError(f"{folder} is not empty: continue that run with --resume {folder}, replace it with "
                                 "--overwrite, or give another --out")
            for path in known + sorted(folder.glob("predictions_*.tsv")):
                path.unlink(missing_ok=True)
        write_file(folder / ".probe", b"")
        (folder / ".probe").unlink()
    except OSError as e:
        raise OSError(f"{folder} cannot be written ({e}): give another --out") from e


# --- the log and what is seen ----------------------------------------------------------------------------------

class Log:
    """log.jsonl, one object a line, and what a person sees: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, path, total, step, quiet):
        self.path, self.total, self.quiet = Path(path), total, quiet
        self.started, self.first = time.monotonic(), step
        self.bar = None
        if quiet:
            return
        if self.path.exists():                             # a resumed run: forget what came after the saved step
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= step]
            write_file(self.path, "".join(line + "\n" for line in lines))
        self.file = open(self.path, "a", encoding="utf-8")
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def write(self, record):
        """Append one record, which must hold "step"."""
        if self.quiet:
            return
        self.file.write(json.dumps(record, sort_keys=True) + "\n")
        self.file.flush()

    def show(self, step, text):
        """Bring the bar to `step`, with text; without a terminal print a line about every 5 % of the way."""
        if self.quiet:
            return
        if self.bar:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step == self.total or step * 20 // self.total > (step - 1) * 20 // self.total:
            left = (time.monotonic() - self.started) / max(1, step - self.first) * (self.total - step)
            print(f"step {step}/{self.total}  {text}  {left:.0f} s left", flush=True)

    def say(self, text):
        """A line of its own, above the bar."""
        if not self.quiet:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def close(self):
        if not self.quiet:
            self.file.close()
            if self.bar:
                self.bar.close()


def _step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):              # a line cut off by a kill
        return float("inf")


def kept_map(kept, targets, r):
    """The kept singular values as a picture for the terminal, as Figure 3: matrices down, layers across.

    kept: {module name: count}; targets: {short name: end of module names}; r: the count at the start.
    """
    cells = {}
    for name, count in kept.items():
        layer = int(next(part for part in name.split(".") if part.isdigit()))
        short = max((s for s, end in targets.items() if name.endswith("." + end)), key=lambda s: len(targets[s]))
        cells[short, layer] = count
    layers = sorted({layer for _, layer in cells})
    shades = " ░▒▓█"
    lines = [f"kept singular values of {r} per matrix (columns: layers {layers[0]} to {layers[-1]})"]
    for short in targets:
        if any((short, layer) in cells for layer in layers):
            row = [cells.get((short, layer), 0) for layer in layers]
            lines.append(f"  {short:>2} " + " ".join(f"{n:2}{shades[-(-4 * n // r)]}" for n in row) + f"  {sum(row):4}")
    return "\n".join(lines)


# --- signals and processes -------------------------------------------------------------------------------------

class Stopped(Exception):
    """Ctrl-C or SIGTERM arrived; .signal says which."""


class Signals:
    """Inside `with`, Ctrl-C and SIGTERM are remembered; check() raises Stopped where the state is whole."""

    def __enter__(self):
        self.caught = None
        self.previous = {n: signal.signal(n, self._catch) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _catch(self, number, frame):
        if self.caught == number == signal.SIGINT:         # a second Ctrl-C: at once
            raise KeyboardInterrupt
        self.caught = number

    def check(self):
        if self.caught:
            raise Stopped(self.caught)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def start_processes(device):
    """(rank, world size) under torchrun, after joining the others; (0, 1) otherwise."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world


def sum_over_processes(tensors):
    """Add up tensors over all processes, in place and in one message. A no-op for one process."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def gather_rng():
    """The random state of every process, for last.pt, in the order of ranks."""
    mine = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    if not dist.is_initialized():
        return [mine]
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    return states


# --- going elsewhere -------------------------------------------------------------------------------------------

def export_peft(folder, layers, trained, base_name, targets):
    """Write a peft adapter folder: each update as a plain LoRA of its own rank, and the head.

    layers: (name, LoRA2Linear) pairs; trained: {name: tensor} of the head. The export is exact: see to_lora().
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in trained.items()}
    for name, layer in layers:
        A, B = layer.to_lora()
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    rank = len(A)
    heads = sorted({name.split(".")[0] if not name.startswith(("bert.", "roberta.", "deberta.")) else
                    name.split(".")[1] for name in trained})
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": base_name, "r": rank,
              "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
              "target_modules": [name for name, _ in layers], "modules_to_save": heads}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(folder / "adapter_model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", config)
