"""What bench.py times on our side, a training step of LoRA², of AdaLoRA or of the frozen backbone; and how.

The step is that of train.py's loop, part by part, so that each part can be counted by itself; a test trains
with both and finds the same weights. Shapes: B rows, T tokens, d hidden size, f feed-forward size, H heads.
"""
import contextlib
import json
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from methods import baselines
from methods import fast
import model as models

SIX = ["q", "k", "v", "o", "f1", "f2"]
COMMON = {"hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
          "initializer_range": 0.02, "vocab_size": 1000, "pad_token_id": 0}
DEBERTA = COMMON | {"model_type": "deberta-v2", "relative_attention": True, "position_buckets": 256,
                    "max_position_embeddings": 512, "norm_rel_ebd": "layer_norm", "share_att_key": True,
                    "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1,
                    "position_biased_input": False, "type_vocab_size": 0, "pooler_dropout": 0,
                    "pooler_hidden_act": "gelu", "cls_dropout": 0.1}
ROBERTA = COMMON | {"model_type": "roberta", "max_position_embeddings": 514, "layer_norm_eps": 1e-5,
                    "type_vocab_size": 1, "pad_token_id": 1}


def sized(config, layers, d, f, H):
    """A config of so many layers, hidden size d, feed-forward size f and H heads."""
    return config | {"num_hidden_layers": layers, "hidden_size": d, "intermediate_size": f,
                     "num_attention_heads": H}


# The released sizes but for the vocabulary, whose 128,100 rows take no part in a step. "narrow" is for
# counting operations, which do not depend on the width; "tiny" is for the tests.
SHAPES = {"deberta-v3-base": sized(DEBERTA, 12, 768, 3072, 12),
          "roberta-large": sized(ROBERTA, 24, 1024, 4096, 16),
          "deberta-narrow": sized(DEBERTA, 12, 64, 128, 4), "roberta-narrow": sized(ROBERTA, 12, 64, 128, 4),
          "tiny": sized(DEBERTA, 2, 32, 64, 2), "tiny-roberta": sized(ROBERTA, 2, 32, 64, 2)}


def write_checkpoint(folder, config, seed=0):
    """A checkpoint with random weights, head included; returns its folder, for ours and theirs to load.

    The matrices are larger than at a fresh init: attention scores have a spread of about 1 in place of nearly
    0, so that the two implementations cannot agree where they attend to nothing in particular.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    shapes = models.SequenceClassifier(models.check_config(dict(config), folder), 2).state_dict()
    torch.manual_seed(seed)
    spread = 1.4 / config["hidden_size"] ** 0.5
    weights = {name: torch.randn(tensor.shape) * (spread if tensor.dim() == 2 else 0.1)
               + (1.0 if name.endswith("LayerNorm.weight") else 0.0) for name, tensor in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_batch(config, B, T, device="cpu", seed=0):
    """(ids, mask, labels): random tokens, the last one padding: transformers drops a mask of ones alone."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config["vocab_size"], (B, T), generator=generator)
    labels, mask = torch.randint(0, 2, (B,), generator=generator), torch.ones(B, T, dtype=torch.bool)
    ids[-1, -1], mask[-1, -1] = config["pad_token_id"], False
    return ids.to(device), mask.to(device), labels.to(device)


def head_of(net):
    """The parts of parameter names that make up the head, as in train.py."""
    parts = {part for name, _ in net.named_parameters() for part in name.split(".")}
    return [name for name in ("pooler", "classifier") if name in parts]


def freeze(net, names, head):
    """Train the head and the q, k and v biases of the first layer, of any model with our module names.

    These biases are the cheapest thing that makes the gradient flow exactly as far down as adapters need it:
    through all layers, but not into the input of the first.
    """
    first = tuple(name.removeprefix("base_model.model.") + ".bias" for name in names[:3])
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in first or not set(head).isdisjoint(name.split(".")))


class OwnStep:
    """One training step of our model, called without arguments.

    method: "lora2", "adalora" or "frozen" (forward and backward alone, the step nothing can do without).
    extras: with False neither regulariser nor pruner. dtype: "fp32" or "bf16", that is autocast.
    The pruner is in the middle of its schedule and chooses anew at every step, as with the presets of MRPC
    and RTE.
    """

    def __init__(self, folder, method, batch, k=1, r=8, extras=True, dtype="fp32", compile=False,
                 layers=None):
        self.net = models.from_pretrained(folder, 2)
        if layers is not None:
            del self.net.backbone.encoder.layer[layers:]
            self.net.config["num_hidden_layers"] = layers
        names = models.target_modules(self.net, SIX)
        self.method, self.batch, self.dtype, self.extras = method, batch, dtype, extras
        if method == "frozen":
            freeze(self.net, names, head_of(self.net))
        else:
            baselines.add_method(method, self.net, names, head_of(self.net), k, r, 32, None)
        self.net.to(batch[0].device).train()
        self.forward = fast.speed_up(self.net, dtype, compile)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.pruner, self.steps = None, 1000
        if method == "frozen":
            return
        if extras:
            self.pruner = baselines.make_pruner(method, self.net, max(1, r // 2), self.steps, 0, 10, 1, None)
        body = [p for n, p in self.net.named_parameters()
                if p.requires_grad and set(head_of(self.net)).isdisjoint(n.split("."))]
        mine = set(map(id, body))
        self.optimizer = torch.optim.AdamW([
            {"params": group, "peak": 1e-3, "lr": 1e-3, "weight_decay": 0.0} for group in (
                body, [p for p in self.parameters if id(p) not in mine])], fused=True)
        self.step, self.bad_step = 0, torch.zeros((), device=batch[0].device)

    def loss(self):
        """Cross entropy, with all that the forward pass of a step is in train.py: saved bytes need it."""
        ids, mask, labels = self.batch
        with (torch.autocast(ids.device.type, torch.bfloat16, enabled=self.dtype == "bf16"),
              fast.shared_updates(self.net)):
            logits = self.forward(ids, mask).float()
        return F.cross_entropy(logits, labels)

    def __call__(self, part=lambda name: contextlib.nullcontext()):
        """One step. part(name) is a context around each of its parts, to count them."""
        with part("forward"):
            loss = self.loss()
        with part("backward"):
            loss.backward()
        if self.method == "frozen":
            for parameter in self.parameters:
                parameter.grad = None
            return
        self.step += 1
        with part("R"):
            if self.extras:
                R = baselines.regulariser(self.method, self.net, ("uv", "UV", "PQ"))
                fast.add_gradients(0.1 * R, self.parameters)
        with part("clip, AdamW"):
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            is_bad = (self.bad_step == 0) & ~torch.isfinite(loss.detach() + norm)
            self.bad_step = torch.where(is_bad, float(self.step), self.bad_step)
            self.optimizer.found_inf = (self.bad_step > 0).float()
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * (1 - self.step / self.steps)
            self.optimizer.step()
        with part("importance, selection"):
            if self.pruner:
                self.pruner.step()
        self.optimizer.zero_grad()


# --- timing -------------------------------------------------------------------------------------------------

def seconds(function, device, repeat=1):
    """Time of one call: the host's on a CPU; on a GPU between two events, of `repeat` calls, without gaps."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / repeat
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(variants, rounds, device="cpu", repeat=1):
    """{name: function} → {name: times}, one a round, after a round that warms up.

    Each round has an order of its own, drawn with a fixed seed: what one variant leaves in caches and memory
    is not always found by the same other one.
    """
    times, rng = {name: [] for name in variants}, random.Random(0)
    for i in range(rounds + 1):
        for name in rng.sample(list(variants), len(variants)):
            time_of_one = seconds(variants[name], device, repeat)
            if i:
                times[name].append(time_of_one)
    return times


def profile(function, device="cpu"):
    """Where one call spends its time: [{"operation", "calls", "seconds", "GFLOP/s"}], the longest first.

    The time in an operation itself, without those it calls; on a GPU that of its kernels. GFLOP/s is 0 where
    the profiler knows no count: it knows those of matrix products. They are counted in a call of their own:
    the profiler keeps much for them, the step gets fresh memory, and whatever operation touches that first
    would be charged for it. For the same reason the fastest of five profiled calls is shown.
    """
    kinds, on_gpu = torch.profiler.ProfilerActivity, device == "cuda"

    def profiled(**more):
        with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * on_gpu, **more) as seen:
            function()
        return seen.key_averages()

    own_time = lambda op: (op.self_device_time_total if on_gpu else op.self_cpu_time_total) / 1e6
    flops = {op.key: op.flops for op in profiled(with_flops=True)}
    fastest = min((profiled() for _ in range(5)), key=lambda ops: sum(map(own_time, ops)))
    table = [{"operation": op.key.removeprefix("aten::"), "calls": op.count, "seconds": own_time(op),
              "GFLOP/s": flops.get(op.key, 0) / own_time(op) / 1e9} for op in fastest
             if own_time(op) and (op.key.startswith("aten::") or not on_gpu)]  # not the kernels once more
    return sorted(table, key=lambda line: -line["seconds"])
