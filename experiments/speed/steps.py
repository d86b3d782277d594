"""What bench.py times on our side, a training step of LoRA², of AdaLoRA or of the frozen backbone;
and how.

The step calls the functions of train.py's loop one after the other, so that each part can be
counted by itself. Shapes: B rows, T tokens, d hidden size, f feed-forward size, H heads.
"""
import contextlib
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import data
import model as models
import train
from methods import baselines, fast
from running import errors, machine, options

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


# The released sizes but for the vocabulary, whose 128,100 rows take no part in a step. "narrow" is
# for counting operations, which do not depend on the width; "tiny" is for the tests.
SHAPES = {"deberta-v3-base": sized(DEBERTA, 12, 768, 3072, 12),
          "roberta-large": sized(ROBERTA, 24, 1024, 4096, 16),
          "deberta-narrow": sized(DEBERTA, 12, 64, 128, 4), "roberta-narrow": sized(ROBERTA, 12, 64, 128, 4),
          "tiny": sized(DEBERTA, 2, 32, 64, 2), "tiny-roberta": sized(ROBERTA, 2, 32, 64, 2)}


def write_checkpoint(folder, config, seed=0):
    """A checkpoint with random weights, head included; returns its folder, for ours and theirs to
    load.

    The matrices are larger than at a fresh init: attention scores have a spread of about 1 in place
    of nearly 0, so that the two implementations cannot agree where they attend to nothing in
    particular.
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
    """A data.Batch of random tokens, the last one padding: transformers drops a mask of ones
    alone."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config["vocab_size"], (B, T), generator=generator)
    labels = torch.randint(0, 2, (B,), generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    ids[-1, -1], mask[-1, -1] = config["pad_token_id"], False
    batch = data.Batch(ids, mask, torch.zeros_like(ids), labels, torch.arange(B))
    return data.Batch(*(tensor.to(device) for tensor in batch))


def head_of(net):
    """The parts of parameter names that make up the head, of any model with our module names."""
    parts = {part for name, _ in net.named_parameters() for part in name.split(".")}
    return [name for name in ("pooler", "classifier") if name in parts]


def freeze(net, names, head):
    """Train the head and the q, k and v biases of the first layer, of any model with our module
    names.

    These biases are the cheapest thing that makes the gradient flow exactly as far down as adapters
    need it: through all layers, but not into the input of the first.
    """
    first = tuple(name.removeprefix("base_model.model.") + ".bias" for name in names[:3])
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in first or models.in_head(name, head))


class OwnStep:
    """One training step of our model, called without arguments: the parts are train.py's own
    functions.

    method: "lora2", "adalora" or "frozen" (forward and backward alone, the step nothing can do
    without).
    extras: with False neither regulariser nor pruner. dtype: "fp32" or "bf16", that is autocast.
    The pruner is in the middle of its schedule and chooses anew at every step, as with the presets
    of MRPC and RTE.
    """

    def __init__(self, folder, method, batch, k=1, r=8, extras=True, dtype="fp32", compile=False,
                 layers=None):
        self.net = net = models.from_pretrained(folder, 2)
        if layers is not None:
            del net.backbone.encoder.layer[layers:]
            net.config["num_hidden_layers"] = layers
        names = models.target_modules(net, SIX)
        self.method, self.batch, self.extras, self.k, self.r = method, batch, extras, k, r
        self.task = data.TASKS["rte"]                      # two classes
        self.here = machine.Machine(batch.input_ids.device, dtype, 0, 1)
        if method == "frozen":
            freeze(net, names, net.head)
        else:
            baselines.add_method(method, net, names, net.head, k, r, 32, None)
        fast.speed_up(net.to(self.here.device).train(), dtype, compile)
        self.pruner = None
        if method == "frozen":
            self.parameters = [p for p in net.parameters() if p.requires_grad]
            return
        self.optimizer, self.parameters = train.make_optimizer(net, lr=1e-3, head_lr=1e-3, weight_decay=0.0)
        self.plan = options.Plan(1000, 1000, 0, 0, 10, 1, None, None, None)
        self.step = 0
        if extras:
            self.pruner = baselines.make_pruner(method, net, max(1, r // 2), 1000, 0, 10, 1, None)
        self.guard = errors.Guard(self.here.device, ".")

    def loss(self):
        """The loss of the batch, with all that the forward pass of a step does: saved bytes need
        it."""
        logits = train.predict_batch(self.net, self.batch, self.here)
        return train.task_loss(logits, self.batch.labels, self.task)

    def __call__(self, part=lambda name: contextlib.nullcontext()):
        """One step. part(name) is a context around each of its parts, to count them."""
        with part("forward, backward"):
            loss = train.gradients(self.net, self.batch, self.task, self.here, accum=1)
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
            train.update(self.optimizer, self.parameters, loss, self.plan, self.step, 1.0,
                         self.guard)
        with part("importance, selection"):
            if self.pruner:
                self.pruner.step()
        self.optimizer.zero_grad()


# --- timing -------------------------------------------------------------------------------

def seconds(function, device, repeat=1):
    """Time of one call: the host's on a CPU; on a GPU between two events, of `repeat` calls,
    without gaps."""
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

    Each round has an order of its own, drawn with a fixed seed: what one variant leaves in caches
    and memory is not always found by the same other one.
    """
    times, rng = {name: [] for name in variants}, random.Random(0)
    for i in range(rounds + 1):
        for name in rng.sample(list(variants), len(variants)):
            time_of_one = seconds(variants[name], device, repeat)
            if i:
                times[name].append(time_of_one)
    return times


def profile(function, device="cpu"):
    """Where one call spends its time: [{"operation", "calls", "seconds", "GFLOP/s"}], the longest
    first.

    The time in an operation itself, without those it calls; on a GPU that of its kernels. GFLOP/s
    is 0 where the profiler knows no count: it knows those of matrix products. They are counted in a
    call of their own: the profiler keeps much for them, the step gets fresh memory, and whatever
    operation touches that first would be charged for it. For the same reason the fastest of five
    profiled calls is shown.
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
