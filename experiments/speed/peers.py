"""The peers of bench.py: transformers with peft, what a user would pick instead.

The same checkpoint, the same six matrices of each layer (by their full names: "dense" would also
hit the pooler), the same head trained, train mode with the same dropout, fused AdamW. AdaLoRA calls
update_and_allocate after each optimizer step, as its documentation says. Needs
requirements-dev.txt.
"""
import contextlib
import math
import time
import warnings
from types import SimpleNamespace

import torch

import data
import model as models
from experiments.speed.steps import HEAD, OwnStep, freeze
from formats import glue
from lora2 import lora2_layers
from methods import by_name

INPUTS = ("input_ids", "attention_mask", "labels")         # of a data.Batch


def available():
    """Whether both packages are there."""
    try:
        import peft
        import transformers
    except ImportError:
        return False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return bool(peft)


def target_names(config):
    """Dotted names of the six matrices of each layer: transformers' are the checkpoint's."""
    as_ours = SimpleNamespace(kind=config.model_type, config=config.to_dict())
    return models.target_modules(as_ours, models.TARGETS[config.model_type])


def adapt(net, method, r, total):
    """peft's LoRA, of scale 1, or AdaLoRA over `total` steps on all six matrices; and the head."""
    import peft
    common = {"task_type": "SEQ_CLS", "target_modules": target_names(net.config),
              "modules_to_save": HEAD}
    if method == "lora":
        return peft.get_peft_model(net, peft.LoraConfig(r=r, lora_alpha=r, **common))
    return peft.get_peft_model(net, peft.AdaLoraConfig(
        init_r=r, target_r=max(1, r // 2), lora_alpha=32, tinit=0, tfinal=10, total_step=total,
        deltaT=1 if r > 1 else total,                      # peft cannot prune nothing: kthvalue
        orth_reg_weight=0.1, beta1=0.85, beta2=0.85, **common))


class PeerStep:
    """One training step of transformers, called as OwnStep. method: "frozen", "lora", "adalora".

    batch: None if `inputs` are set later; then `device` says where. labels: how many, 1 of a score.
    """

    def __init__(self, folder, method, batch, r=8, dtype="fp32", device=None, labels=2,
                 total=1000):
        from transformers import AutoModelForSequenceClassification
        self.net = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=labels, dtype=torch.float32)
        self.inputs = {name: getattr(batch, name, None) for name in INPUTS}
        self.method, self.dtype = method, dtype
        self.step = 0
        if method == "frozen":
            freeze(self.net, target_names(self.net.config))
        else:
            self.net = adapt(self.net, method, r, total)
        self.net.to(device or batch.input_ids.device).train()
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=0.0, fused=True)

    def loss(self):
        """Cross entropy; peft adds its regulariser inside where it gets the labels."""
        kind = self.net.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.net(**self.inputs).loss

    def __call__(self, part=lambda name: contextlib.nullcontext()):
        """One step, R inside "forward, backward": peft does not let them apart. Its loss."""
        with part("forward, backward"):
            loss = self.loss()
            loss.backward()
        if self.method != "frozen":
            self.step += 1
            with part("clip, AdamW"):
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
            with part("importance, selection"):
                if self.method == "adalora":
                    self.net.base_model.update_and_allocate(self.step)
        self.optimizer.zero_grad()
        return loss


# --- do own and peer compute the same? -------------------------------------------------------

def parity(folder, batch, tolerance=1e-4):
    """{what: largest difference between own and peer, relative to the largest number}.

    In train mode, in which some attention takes another path, with every dropout at 0.
    AssertionError for what differs by more than `tolerance`.
    """
    errors = parity_of_lora2(folder, batch) | parity_of_adalora(folder, batch)
    wrong = {what: error for what, error in errors.items() if not error <= tolerance}
    assert not wrong, f"own and peer do not compute the same: {wrong}"
    return errors


def parity_of_lora2(folder, batch):
    """Fresh LoRA² against the frozen model; with random factors against the LoRA it equals.

    That LoRA, peft's, has A = vᵀ and B = (C V)ᵀ, so that dv = dAᵀ and dV = Cᵀ dBᵀ.
    """
    own = OwnStep(folder, "lora2", batch, k=4, r=8, extras=False)
    peer = PeerStep(folder, "frozen", batch)
    errors = {"frozen logits": logits_differ(own, peer)}

    peer = PeerStep(folder, "lora", batch, r=4)
    adapters = pairs(own, peer)
    for layer, theirs in adapters:
        A, B = layer.to_lora()
        theirs.lora_A["default"].weight.data.copy_(A)
        theirs.lora_B["default"].weight.data.copy_(B)
    errors["LoRA² logits"] = logits_differ(own, peer)
    own.loss().backward()
    peer.loss().backward()
    of_v, of_V = [], []
    for layer, theirs in adapters:
        dA, dB = (side["default"].weight.grad for side in (theirs.lora_A, theirs.lora_B))
        of_v.append((layer.v.grad, dA.T))
        of_V.append((layer.V.grad, layer.core().detach().T @ dB.T))
    errors["LoRA² gradient of v"] = difference(of_v)
    errors["LoRA² gradient of V"] = difference(of_V)
    return errors


def parity_of_adalora(folder, batch):
    """AdaLoRA with random factors against peft's, regulariser included."""
    own = OwnStep(folder, "adalora", batch, r=8, extras=False)
    peer = PeerStep(folder, "adalora", batch, r=8)
    adapters, factors = pairs(own, peer), {}
    for name, its in (("P", "lora_A"), ("lam", "lora_E"), ("Q", "lora_B")):
        factors[name] = [(getattr(a, name), getattr(b, its)["default"]) for a, b in adapters]
        for ours, theirs in factors[name]:
            theirs.data.copy_(in_pefts_layout(ours.data))
    errors = {"AdaLoRA logits": logits_differ(own, peer)}
    (own.loss() + 0.1 * by_name.regulariser("adalora", own.net, None)()).backward()
    peer.loss().backward()
    for name, some in factors.items():
        gradients = [(in_pefts_layout(ours.grad), theirs.grad) for ours, theirs in some]
        errors[f"AdaLoRA gradient of {name}"] = difference(gradients)
    return errors


def in_pefts_layout(factor):
    """One of these factors of ours, or its gradient, as peft has it."""
    return factor.mT if factor.dim() == 2 else factor[:, None]


def pairs(own, peer):
    """[(our adapter, peft's), ...]. Both models lose their dropout, ours gets random factors.

    Their size lets the update be about as large as what the frozen matrix does: at the usual init
    it would be lost in rounding, and with it any difference.
    """
    without_dropout(own.net)
    without_dropout(peer.net)
    found = []
    for name, layer in lora2_layers(own.net):
        for which, factor in layer.named_parameters(recurse=False):
            std = 0.5 / layer.scale if which == "lam" else len(factor) ** -0.5
            torch.nn.init.normal_(factor, std=std)
        found.append((layer, peer.net.get_submodule(f"base_model.model.{name}")))
    return found


def without_dropout(net):
    """The model with every dropout at 0, in train mode."""
    for module in net.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return net


@torch.no_grad()
def logits_differ(own, peer):
    """The difference() of the logits without dropout, in fp32."""
    inputs = {"input_ids": own.batch.input_ids, "attention_mask": own.batch.attention_mask}
    ours, theirs = (without_dropout(step.net)(**inputs) for step in (own, peer))
    return difference([(ours, theirs.logits)])


def difference(pairs):
    """max |a − b| / max |b| over all pairs (a, b)."""
    farthest = max((a - b).abs().max() for a, b in pairs)
    return (farthest / max(b.abs().max() for _, b in pairs)).item()


# --- row 12: an epoch ------------------------------------------------------------------------

def epoch(folder, task, data_dir, rows, max_len, device, dtype="fp32", batch_size=32):
    """Seconds for one epoch of transformers + peft AdaLoRA, from files to the last step.

    Imports do not count. As in transformers' own example for GLUE: rows in random order, each batch
    padded to its longest row.
    """
    from transformers import AutoTokenizer, DataCollatorWithPadding
    start = time.perf_counter()
    split = glue.load_split(data.TASKS[task], data_dir, "train").part(0, rows or None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(*map(list, zip(*split.texts)), truncation=True, max_length=max_len)
    table = []
    for i, label in enumerate(split.labels):
        table.append({name: column[i] for name, column in encoded.items()} | {"labels": label})
    loader = torch.utils.data.DataLoader(table, batch_size, shuffle=True,
                                         pin_memory=device == "cuda",
                                         collate_fn=DataCollatorWithPadding(tokenizer))
    labels = max(1, len(data.TASKS[task].labels))
    step = PeerStep(folder, "adalora", None, dtype=dtype, device=device, labels=labels,
                    total=len(loader) + 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda n: 1 - n / len(loader))
    for batch in loader:
        step.inputs = batch.to(device, non_blocking=True)
        loss = step()
        schedule.step()
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the peer's loss on {task} is not finite")
    return time.perf_counter() - start
