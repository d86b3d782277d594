"""What bench.py times on our side: a training step of LoRA², of AdaLoRA or of the frozen backbone.

The step calls the functions of train.py's loop one after the other, so that each part can be
counted by itself. Shapes: B rows, T tokens, d hidden size, f feed-forward size, H heads.
"""
import contextlib
import functools
import io
import random
import time
from pathlib import Path

import torch

import data
import model as models
import train
from formats import disk
from methods import by_name, fast
from running import errors, machine, schedule

# config.json of the released models, but for the vocabulary, whose 128,100 rows take no part in a
# step. "narrow" is for counting operations, which do not depend on width; "tiny" for the tests.
SHAPES = disk.read_json(Path(__file__).parent / "shapes.json", "restore it")
HEAD = ["pooler", "classifier"]         # parts of names in the head, of any model with these names


def write_checkpoint(folder, config, seed=0):
    """A checkpoint with random weights and a head, for ours and theirs; its folder, made once.

    The matrices are larger than at a fresh init: attention scores have a spread of about 1 in place
    of nearly 0, so that two implementations cannot agree by attending to nothing in particular.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    shapes = models.SequenceClassifier(models.check_config(dict(config), folder), 2).state_dict()
    torch.manual_seed(seed)
    weights = {}
    for name, tensor in shapes.items():
        spread = 1.4 / config["hidden_size"] ** 0.5 if tensor.dim() == 2 else 0.1
        mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        weights[name] = torch.randn(tensor.shape) * spread + mean
    disk.write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
    disk.write_json(folder / "config.json", config)
    return folder


def make_batch(config, B, T, device="cpu", seed=0):
    """A data.Batch of random tokens, the last one padding: transformers drops a mask of ones."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config["vocab_size"], (B, T), generator=generator)
    labels = torch.randint(0, 2, (B,), generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    ids[-1, -1] = config["pad_token_id"]
    mask[-1, -1] = False
    batch = data.Batch(ids, mask, torch.zeros_like(ids), labels, torch.arange(B))
    return data.Batch(*(tensor.to(device) for tensor in batch))


def freeze(net, names):
    """Train the head and three biases, those of q, k and v in the first layer.

    net: any model with our module names; names: of its adapted matrices. These biases are the
    cheapest thing that makes the gradient flow exactly as far down as adapters need it: through all
    layers, but not into the input of the first.
    """
    first = [f"{name}.bias" for name in names[:3]]
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in first or models.in_head(name, HEAD))


class OwnStep:
    """One training step of our model, called without arguments, of train.py's own functions.

    method: "lora2", "adalora" or "frozen" (forward and backward alone, which every step needs).
    extras: with False neither regulariser nor pruner.
    dtype: "fp32" or "bf16", that is autocast.
    eager: on a GPU as with train.py --eager, where otherwise each pass and R are recorded.
    The pruner is in the middle of its schedule and chooses anew at every step, as with the presets
    of MRPC and RTE.
    """

    def __init__(self, folder, method, batch, k=1, r=8, extras=True, dtype="fp32", compile=False,
                 eager=False):
        self.net = net = models.from_pretrained(folder, 2)
        names = models.target_modules(net, models.TARGETS[net.kind])
        self.method, self.batch = method, batch
        self.here = machine.Machine(batch.input_ids.device, dtype, 0, 1)
        if method == "frozen":
            freeze(net, names)
        else:
            by_name.add_method(method, net, names, net.head_parts, k, r, 32, None)
        fast.speed_up(net.to(self.here.device).train(), dtype, compile)
        self.optimizer, self.parameters = train.make_optimizer(net, 1e-3, 1e-3, weight_decay=0.0)
        self.loss_of = functools.partial(train.part_loss, net, self.here)
        self.loss = functools.partial(self.loss_of, *batch)
        self.R_of = by_name.regulariser(method, net, ("uv", "UV", "PQ")) if extras else None
        self.differentiate = fast.make_differentiate(net, self.parameters, eager)
        self.plan = schedule.Plan(1000, 1000, 0, 0, 10, 1, None, None, None)
        self.step, self.pruner = 0, None
        if extras:
            self.pruner = by_name.make_pruner(method, net, max(1, r // 2), **self.plan.pruning())
        self.finite = errors.FiniteCheck(self.here.device, ".")

    def __call__(self, part=lambda name: contextlib.nullcontext()):
        """One step. part(name) is a context around each of its parts, to count them."""
        with part("forward, backward"):
            loss = train.forward_backward(self.loss_of, self.batch, self.here, 1,
                                          self.differentiate)
        if self.method != "frozen":
            self.step += 1
            with part("R"):
                if self.R_of:
                    self.differentiate(self.R_of, weight=0.1)
            with part("clip, AdamW"):
                train.update(self.optimizer, self.parameters, loss, self.plan, self.step, 1.0,
                             self.finite)
            with part("importance, selection"):
                if self.pruner:
                    self.pruner.step()
        self.optimizer.zero_grad()


def heard(action, *arguments):
    """Call it in this process: (what it returns, what it said meanwhile)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        returned = action(*arguments)
    return returned, said.getvalue()


# --- timing ----------------------------------------------------------------------------------

def interleave(variants, rounds, device="cpu"):
    """{name: function} → {name: times}, one a round, after a round that warms up.

    Each round has an order of its own, drawn with a fixed seed: what one variant leaves in caches
    and memory is not always found by the same other one. On a GPU a time is of ten calls.
    """
    repeat = 10 if device == "cuda" else 1
    wait = torch.get_device_module(device).synchronize     # on a CPU it does nothing
    times = {name: [] for name in variants}
    rng = random.Random(0)
    for i in range(rounds + 1):
        for name in rng.sample(list(variants), len(variants)):
            wait()
            start = time.perf_counter()
            for _ in range(repeat):
                variants[name]()
            wait()
            if i:
                times[name].append((time.perf_counter() - start) / repeat)
    return times


def profile(function, device="cpu"):
    """Where one call spends its time: [{"operation", "calls", "seconds", "GFLOP/s"}, ...].

    The longest come first. The time is that in an operation itself, without those it calls; on a
    GPU that of its kernels. GFLOP/s is 0 where the profiler knows no count: it knows those of
    matrix products. They are counted in a call of their own: the profiler keeps much for them, the
    step gets fresh memory, and whatever operation touches that first would be charged for it. For
    the same reason the fastest of five profiled calls is shown.
    """
    flops = {op.key: op.flops for op in profiled(function, with_flops=True)}
    calls = [profiled(function) for _ in range(5)]
    own_time = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    fastest = min(calls, key=lambda ops: sum(getattr(op, own_time) for op in ops))
    table = []
    for op in fastest:
        taken = getattr(op, own_time) / 1e6
        is_kernel = device == "cuda" and not op.key.startswith("aten::")       # once more
        if taken and not is_kernel:
            table.append({"operation": op.key.removeprefix("aten::"), "calls": op.count,
                          "seconds": taken, "GFLOP/s": flops.get(op.key, 0) / taken / 1e9})
    return sorted(table, key=lambda line: -line["seconds"])


def launches(function):
    """How often the host asks a GPU for work in one call: kernels, copies, fills, graphs."""
    calls = 0
    for op in profiled(function):
        name = op.key.removeprefix("cuda").removeprefix("cu")
        if name.startswith(("Launch", "GraphLaunch", "Memcpy", "Memset")):
            calls += op.count
    return calls


def profiled(function, **more):
    """The profiler's entries for one call, an operation each."""
    with torch.profiler.profile(**more) as seen:
        function()
    return seen.key_averages()
