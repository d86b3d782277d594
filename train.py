"""Fine-tune DeBERTaV3, RoBERTa or BERT on GLUE with LoRA² or one of the methods it is compared with.

    python train.py --task demo                                    # nothing to download, under a minute
    python train.py --task rte --k 1                               # DeBERTaV3-base and RTE, fetched if missing
    python train.py --task cola --k 8 --model roberta-large --data-dir ~/glue --out runs/cola
    python train.py --resume runs/cola                             # go on after a stop, or print the result
    python train.py --eval runs/cola/adapter.safetensors --data-dir ~/glue --predict ~/glue/CoLA/test.tsv
    python train.py --train-file mine.tsv --dev-file dev.tsv       # your own columns: sentence, label
    torchrun --nproc_per_node=2 train.py --task mnli --k 8         # several devices, the same result
"""
import argparse
import math
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import baselines
import data
import model as models
import runs
from hub import read_json
from lora2 import load_lora2_state_dict, lora2_layers, lora2_state_dict, merge_lora2

# The released scripts' settings (method.md in words: batch 32, AdamW, linear decay after warm-up, clip 1.0, dropout
# 0.1 in the backbone). ti, tf and dT are steps of the T steps of the full-length run; a shorter run uses the same
# fractions of its own length. MRPC and RTE prune at every step; QNLI's long texts need 512 tokens.
PRESETS = {task: dict(zip(("lr", "epochs", "T", "warmup", "max_len", "head_dropout", "weight_decay", "alpha", "ti",
                           "tf", "dT", "r", "target_rank", "reg", "seed"), row)) for task, row in {
    #        lr      epochs T       warmup max_len drop wd   alpha ti    tf     dT  r  target reg seed
    "cola": (8e-4,   25,    6700,   100,   64,    .10, 0,    32,   800,  3500,  10,  4, 3,    .1, 6),
    "sst2": (8e-4,   24,    50520,  1000,  128,   0,   .01,  16,   6000, 22000, 100, 8, 2,    .1, 6),
    "mrpc": (1e-3,   30,    3450,   345,   320,   0,   .01,  32,   600,  1800,  1,   8, 1,    .1, 6),
    "qqp":  (8e-4,   20,    227420, 2000,  320,   .15, .01,  16,   8000, 25000, 100, 8, 3,    .1, 6),
    "stsb": (2.2e-3, 25,    4500,   100,   128,   .20, .1,   32,   800,  2000,  10,  4, 1,    .3, 6),
    "mnli": (5e-4,   7,     85904,  1000,  256,   .15, 0,    16,   8000, 50000, 100, 8, 3,    .1, 6),
    "qnli": (1.2e-3, 5,     16370,  500,   512,   .10, .01,  32,   2000, 8000,  100, 8, 2,    .1, 6),
    "rte":  (1.2e-3, 50,    3900,   200,   320,   .20, .01,  32,   600,  1800,  1,   4, 3,    .3, 4),
    "demo": (5e-3,   7,     441,    20,    16,    0,   0,    32,   50,   150,   5,   8, 2,    .1, 0),
    "own":  (8e-4,   10,    1000,   60,    128,   .10, .01,  32,   120,  450,   10,  8, 2,    .1, 0),
}.items()}
# Where a method needs something else. LoRA's alpha gives scale 2 at r = 8, its authors' setting (alpha 32 there
# collapsed on CoLA); the rank of AdaLoRA starts at 1.5 to 3 times its target; full fine-tuning wants small steps.
METHOD_PRESETS = {
    "lora2": {}, "head": {}, "bitfit": {}, "full": {"lr": 2e-5}, "lora": {"r": 8, "alpha": 16, "target_rank": None},
    "adalora": {"r": 2, "target_rank": 1}, "sora": {"r": 8, "alpha": 16, "weight_decay": .1, "warmup": .06,
                                                    "target_rank": None},
}
TASK = "from the task's preset"
# (name, type, default, help). Types: a class, a tuple of choices, list for a,b,c, bool for a switch, "steps" for a
# number of optimizer steps or a fraction below 1 of all of them.
OPTIONS = {
    "data and model": (
        ("task", str, None, "one of " + ", ".join(data.TASKS)),
        ("model", str, "microsoft/deberta-v3-base", "name on the Hub, or a folder"),
        ("data-dir", str, "glue", "folder that holds CoLA/, RTE/ ...; a missing task is fetched into it"),
        ("train-file", str, None, "your own TSV: columns sentence (or sentence1, sentence2) and label or score"),
        ("dev-file", str, None, "the same, to evaluate on"),
        ("limit-train", int, None, "use only the first N rows"),
        ("limit-dev", int, None, "use only the first N rows")),
    "method": (
        ("method", baselines.METHODS, "lora2", "what to train"),
        ("k", int, 1, "projected dimension of LoRA²"),
        ("r", int, TASK, "singular values per matrix; the rank of lora, adalora and sora"),
        ("target-rank", int, TASK, "singular values per matrix that pruning leaves, at most r"),
        ("alpha", float, TASK, "the update is scaled by alpha / r"),
        ("targets", list, "q,k,v,o,f1,f2", "matrices to adapt: query, key, value, attention output, feed-forward"),
        ("init", ("gaussian", "orthonormal"), "gaussian", "of v, u, U and V"),
        ("reg", float, TASK, "gamma, the weight of the regulariser"),
        ("reg-terms", list, "uv,UV,PQ", "groups of Eq. 5"),
        ("importance", ("reduced", "full"), "reduced", "Eq. 9 or Eq. 8"),
        ("sora-threshold", float, 3e-4, "of SoRA's gates, at each step")),
    "training": (
        ("epochs", int, TASK, "passes over the training rows"),
        ("max-steps", int, None, "train exactly N optimizer steps instead"),
        ("stop-at", float, None, "stop once the dev metric reaches this (methods that do not prune)"),
        ("batch-size", int, 32, "rows per optimizer step"),
        ("accum", int, 1, "compute each batch in N parts to save memory, with the same result"),
        ("lr", float, TASK, "peak learning rate"),
        ("head-lr", float, None, "the same for the head; by default lr"),
        ("warmup", "steps", TASK, "of the learning rate, which then falls linearly"),
        ("max-len", int, TASK, "longest input in tokens"),
        ("head-dropout", float, TASK, "dropout in the head; the backbone's is the checkpoint's"),
        ("weight-decay", float, TASK, "not on biases and LayerNorms"),
        ("seed", int, TASK, "of the new weights, the order of rows and dropout"),
        ("prune-warmup", "steps", TASK, "before pruning begins"),
        ("prune-final", "steps", TASK, "at the end, with the selection fixed"),
        ("prune-interval", "steps", TASK, "between two selections"),
        ("eval-steps", int, None, "evaluate every N steps too, besides each epoch and the end")),
    "machine": (
        ("device", str, None, "cuda, mps or cpu; by default the first there is"),
        ("dtype", ("fp32", "bf16"), None, "bf16 is autocast; by default bf16 on a GPU that has it, else fp32"),
        ("compile", bool, False, "torch.compile the model")),
    "files": (
        ("out", str, None, "run folder; by default runs/TASK-METHOD-sSEED"),
        ("overwrite", bool, False, "replace the run in that folder"),
        ("save-steps", int, None, "write last.pt every N steps too, besides each evaluation"),
        ("resume", str, None, "go on with the run in this folder; it needs no other option"),
        ("eval", str, None, "load this adapter.safetensors and evaluate instead of training"),
        ("predict", str, None, "write predictions for this TSV of the task, labels not needed"),
        ("merge", str, None, "write the best model to this folder as a plain checkpoint"),
        ("export-peft", str, None, "write the best adapter to this folder as peft's LoRA")),
}
NAMES = {name.replace("-", "_"): default for group in OPTIONS.values() for name, _, default, _ in group}
# What does not change the function that is learnt: not stored in an adapter, free to differ on --resume.
INCIDENTAL = {name.replace("-", "_") for name, *_ in OPTIONS["files"]} | {"data_dir", "train_file", "dev_file", "device"}
PRUNING = ("lora2", "adalora")
ADAPTERS = PRUNING + ("lora", "sora")
ONLY_FOR = {"k": ("lora2",), "init": ("lora2",), "reg_terms": ("lora2",), "importance": ("lora2",), "reg": PRUNING,
            "target_rank": PRUNING, "prune_warmup": PRUNING, "prune_final": PRUNING, "prune_interval": PRUNING,
            "r": ADAPTERS, "alpha": ADAPTERS, "targets": ADAPTERS, "export_peft": ADAPTERS,
            "sora_threshold": ("sora",)}
LOG_STEPS = 10


def parse(argv):
    """Command line → {name: value} of the options that were given. ValueError on a mistake."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ValueError(f"{message}: python train.py --help lists the options")

    def steps(text):
        value = float(text)
        if value < 0 or (value >= 1 and value != int(value)):
            raise argparse.ArgumentTypeError(f"{text} is neither a number of steps nor a fraction below 1")
        return value

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, epilog="Presets (T: the steps of a full run, in which ti, "
                    "tf and dT are prune-warmup,\nprune-final and prune-interval; a shorter run uses the same "
                    "fractions):\n" + "\n".join(f"  {task:5}" + "".join(f" {name}={value:g}" for name, value in row.items())
                                               for task, row in PRESETS.items()))
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in options:
            text += "" if default in (None, False) else f" ({default})"
            if kind is bool:
                group.add_argument(f"--{name}", action="store_true", help=text)
            elif isinstance(kind, tuple):
                group.add_argument(f"--{name}", choices=kind, help=text)
            else:
                convert = {"steps": steps, list: lambda text: [part.strip() for part in text.split(",")]}.get(kind, kind)
                group.add_argument(f"--{name}", type=convert, help=text, metavar="S" if kind == "steps" else "X")
    return vars(parser.parse_args(argv))


def resolve(given):
    """Options given → all settings, a plain dict; ValueError for what does not go together."""
    task, method = given.get("task") or ("own" if "train_file" in given else None), given.get("method", "lora2")
    if task not in PRESETS or ("dev_file" in given) != ("train_file" in given) or ("train_file" in given) != (task == "own"):
        raise ValueError(f"--task {task!r}: give one of {', '.join(data.TASKS)}, or --train-file and --dev-file")
    unused = [name for name in given if method not in ONLY_FOR.get(name, baselines.METHODS)]
    if unused:
        raise ValueError(f"--{unused[0].replace('_', '-')} has no meaning for --method {method}: leave it out")
    preset = PRESETS[task] | METHOD_PRESETS[method]
    T = PRESETS[task]["T"]
    preset |= {"warmup": preset["warmup"] / T if preset["warmup"] >= 1 else preset["warmup"],
               "prune_warmup": preset["ti"] / T, "prune_final": preset["tf"] / T, "prune_interval": preset["dT"] / T}
    settings = {name: preset.get(name) if default is TASK else default for name, default in NAMES.items()}
    for name in ("targets", "reg_terms"):
        settings[name] = settings[name].split(",")
    settings |= {name: None for name, methods in ONLY_FOR.items() if method not in methods}
    settings |= given | {"task": task}
    if "target_rank" not in given and settings["target_rank"] is not None:
        settings["target_rank"] = min(settings["target_rank"], settings["r"])
    settings["head_lr"] = settings["lr"] if settings["head_lr"] is None else settings["head_lr"]
    settings["out"] = settings["out"] or f"runs/{task}-{method}-s{settings['seed']}"
    for name in ("epochs", "max_steps", "batch_size", "accum", "eval_steps", "save_steps", "limit_train", "limit_dev"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} {settings[name]}: give at least 1")
    for name in ("lr", "head_lr", "reg", "weight_decay", "head_dropout", "sora_threshold"):
        top = 1 if name == "head_dropout" else math.inf
        if settings[name] is not None and not 0 <= settings[name] < top:
            raise ValueError(f"--{name.replace('_', '-')} {settings[name]}: give a number from 0 to below {top}")
    if settings["stop_at"] is not None and method in PRUNING:
        raise ValueError(f"--stop-at would end --method {method} before its pruning: give --epochs or --max-steps")
    return settings


def set_up(settings, task=None, facts=None):
    """Everything a run needs, as one namespace: data, model with adapters, pruner, optimizer, schedule.

    task: a data.Task, where the settings cannot name it. facts: what an adapter file says, to evaluate it.
    """
    run = SimpleNamespace(step=0, evaluations=[], best=None, **settings)
    run.settings, run.pick = settings, None
    run.device = pick_device(run.device)
    run.rank, run.world = runs.start_processes(run.device)
    run.say = (lambda *text: print(*text, flush=True)) if run.rank == 0 else (lambda *text: None)
    bf16 = run.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    run.dtype = run.dtype or ("bf16" if bf16 else "fp32")

    splits, run.row = load_data(run, task)
    labels = run.row.labels
    if facts and facts["labels"] != list(labels):
        raise ValueError(f"the adapter knows the labels {facts['labels']}, the data have {list(labels)}")
    tokenizer = data.load_tokenizer(run.model)
    torch.manual_seed(run.seed)                            # before the head and the adapters are made
    run.net = net = models.from_pretrained(run.model, max(1, len(labels)), run.head_dropout)
    if labels:
        net.config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    if tokenizer.get_vocab_size() > net.config["vocab_size"]:
        raise ValueError(f"{run.model}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model rows for "
                         f"{net.config['vocab_size']}: they do not belong together")
    if run.max_len > net.max_len:
        raise ValueError(f"--max-len {run.max_len}: the model takes {net.max_len} tokens at most")
    run.base = runs.fingerprint(net, net.new_weights)
    if facts and facts["base"] != run.base:
        raise ValueError(f"{run.model} is not the base model of this adapter, which was trained on "
                         f"{facts['settings'].get('model') or 'another'}: give --model")
    run.encode = lambda split: data.encode(tokenizer, split, run.max_len)
    run.data = {name: run.encode(split) for name, split in splits.items()}

    names_of = [set(name.split(".")) for name, _ in net.named_parameters()]
    run.head = head = [part for part in ("pooler", "classifier") if any(part in parts for parts in names_of)]
    names = models.target_modules(net, run.targets) if run.targets else []
    run.adapted = baselines.add_method(run.method, net, names, head, run.k, run.r, run.alpha, run.init)
    net.to(run.device)
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    run.parameters = [p for _, p in trained]
    in_head = lambda name: not set(head).isdisjoint(name.split("."))
    run.counts = {"adapter_parameters": sum(p.numel() for n, p in trained if not in_head(n)),
                  "head_parameters": sum(p.numel() for n, p in trained if in_head(n)),
                  "frozen_parameters": sum(p.numel() for p in net.parameters() if not p.requires_grad)}
    run.forward = torch.compile(net) if run.compile else net
    return run


def prepare_training(run):
    """Schedule, pruner and optimizer, once the data say how many steps there are; prints what is about to run."""
    run.steps_per_epoch = math.ceil(len(run.data["train"].labels) / run.batch_size)
    run.T = T = run.max_steps or run.epochs * run.steps_per_epoch
    steps = lambda value: int(value * T) if value < 1 else int(value)      # rounded down: their sum stays below T
    run.lr_warmup, run.pruner, run.budget = steps(run.warmup), None, None
    phases = ()
    if run.method in PRUNING:
        phases = steps(run.prune_warmup), steps(run.prune_final), max(1, steps(run.prune_interval))
        run.budget = len(run.adapted) * run.target_rank
        run.pruner = baselines.make_pruner(run.method, run.net, run.target_rank, T, *phases, run.importance)
    elif run.method == "sora":
        run.pruner = baselines.SparseGates(run.net, run.sora_threshold)
    run.floor = baselines.regulariser_floor(run.method, run.k, run.r, run.reg_terms)
    groups = {}                                            # (learning rate, weight decay) → parameters
    for name, parameter in run.net.named_parameters():
        if parameter.requires_grad:
            lr = run.lr if set(run.head).isdisjoint(name.split(".")) else run.head_lr
            decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else run.weight_decay
            groups.setdefault((lr, decay), []).append(parameter)
    run.optimizer = torch.optim.AdamW([{"params": group, "lr": lr, "peak": lr, "weight_decay": decay}
                                       for (lr, decay), group in groups.items()], fused=run.device.type != "mps")
    run.say("settings: " + ", ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {','.join(v) if isinstance(v, list) else v}"
                                     for n, v in run.settings.items() if v not in (None, False)))
    run.say(f"{run.counts['adapter_parameters']:,} adapter parameters in {len(run.adapted)} matrices, "
            f"{run.counts['head_parameters']:,} head parameters, {run.counts['frozen_parameters']:,} frozen; "
            f"new: {', '.join(run.net.new_weights) or 'nothing'}")
    for short, end in models.TARGETS[run.net.config["model_type"]].items():
        if run.targets and short in run.targets:
            run.say(f"  {short:2} *.{end}: {len(models.target_modules(run.net, [short]))} matrices")
    if phases:
        run.say(f"pruning {len(run.adapted) * run.r} singular values to {run.budget}: from step {phases[0] + 1} to "
                f"{T - phases[1]} of {T}, every {phases[2]}")
    run.say(f"best by {run.row.metrics[0]} on {list(run.data)[1]}; {run.device}, {run.dtype}, {run.world} process(es)")


def pick_device(name):
    """The torch.device of that name, or the first there is of cuda, mps, cpu."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} cannot be used here: leave it out or give cpu") from e


def load_data(run, task):
    """({split: data.Split}, data.Task) of the task or of the user's own files."""
    if run.train_file:
        task = data.own_task(run.train_file)
        splits = {"train": data.read_split(run.train_file, task), "dev": data.read_split(run.dev_file, task)}
        limits = {"train": run.limit_train, "dev": run.limit_dev}
        return {name: split.first(limits[name]) for name, split in splits.items()}, task
    task = task or data.get_task(run.task)
    if task.downloads and not (Path(run.data_dir) / task.folder).exists():
        data.fetch_task(task, run.data_dir)
    return data.load_task(task, run.data_dir, run.limit_train, run.limit_dev), task


# --- the loop --------------------------------------------------------------------------------------------------

def train(run, log, signals):
    """Train from run.step to the end, evaluating and saving on the way; see lora2.py for what the calls mean."""
    bad = torch.zeros((), device=run.device)               # the first step with a non-finite loss or gradient
    batches, started, tokens = stream(run), time.monotonic(), 0
    while True:
        if due(run) and not (run.evaluations and run.evaluations[-1]["step"] == run.step):
            stop_on(bad, run)
            score = evaluate_and_keep(run, log, signals)
            save(run)
            if run.stop_at is not None and score >= run.stop_at:
                break
        elif run.save_steps and run.step % run.save_steps == 0 and run.step > 0:
            stop_on(bad, run)
            save(run)
        if run.step == run.T:
            break
        signals.check()

        batch = next(batches)
        run.step += 1
        tokens += batch.input_ids.numel()
        loss = torch.zeros((), device=run.device)
        for part in parts(batch, run.rank, run.world, run.accum):
            part_loss = task_loss(run, part) * (len(part.rows) / len(batch.rows))
            part_loss.backward()
            loss += part_loss.detach()
        runs.sum_over_processes([loss] + gradients(run.parameters))
        R = baselines.regulariser(run.method, run.net, run.reg_terms)
        if R is not None and run.reg > 0:
            (run.reg * R).backward()                                       # LoRA²: Eq. 5, once per optimizer step
        norm = torch.nn.utils.clip_grad_norm_(run.parameters, 1.0)

        bad = torch.where((bad == 0) & ~torch.isfinite(loss + norm), float(run.step), bad)
        run.optimizer.found_inf = (bad > 0).float()                        # AdamW leaves the weights as they are
        for group in run.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor(run.step, run.lr_warmup, run.T)
        run.optimizer.step()
        kept = run.pruner.step() if run.pruner else None                   # LoRA²: Algorithm 1
        run.optimizer.zero_grad()

        if run.step % LOG_STEPS == 0 or run.step == run.T or run.step == 1:
            stop_on(bad, run)
            speed = tokens / (time.monotonic() - started)
            record = {"step": run.step, "loss": loss.item(), "lr": run.optimizer.param_groups[0]["lr"],
                      "tokens_per_second": round(speed)}
            text = f"loss {record['loss']:.4f}"
            if R is not None:
                record["R"] = R.item() - run.floor
                text += f"  R {record['R']:.4f}"
            if run.budget is not None:
                record["kept"] = kept
                text += f"  kept {kept}/{len(run.adapted) * run.r}"
            if run.evaluations:
                text += f"  {run.row.metrics[0]} {score_of(run, run.evaluations[-1]):.4f}"
            log.write(record)
            log.show(run.step, f"{text}  {speed:.0f} tokens/s")
    if run.budget is not None and sum(run.pruner.kept().values()) != run.budget:
        raise RuntimeError(f"{sum(run.pruner.kept().values())} singular values are left where {run.budget} were due")


def stream(run):
    """Batches without end from step run.step on: the order of epoch e depends on seed and e alone."""
    epoch, skip = divmod(run.step, run.steps_per_epoch)
    while True:
        order = torch.Generator().manual_seed(run.seed * 1_000_003 + epoch)
        yield from data.batches(run.data["train"], run.batch_size, run.net.config["pad_token_id"], order, skip)
        epoch, skip = epoch + 1, 0


def parts(batch, rank, world, accum):
    """The micro-batches of one process: every world-th row, cut in `accum` parts; none is empty."""
    for i in range(rank, world * accum, world):
        part = data.Batch(*(tensor[i::world * accum] for tensor in batch))
        if len(part.rows):
            yield part


def task_loss(run, batch):
    logits = predict_batch(run, batch)                     # (B, labels), fp32
    labels = batch.labels.to(run.device)
    return F.cross_entropy(logits, labels) if run.row.labels else F.mse_loss(logits.squeeze(1), labels)


def predict_batch(run, batch):
    """Logits (B, labels) in fp32 of one batch."""
    ids, mask, types = (tensor.to(run.device, non_blocking=True) for tensor in batch[:3])
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == "bf16"):
        return run.forward(ids, mask, types).float()


def gradients(parameters):
    """The gradients, zeros where a process had no row to compute one from."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in parameters]


def lr_factor(step, warmup, T):
    """Linear up over `warmup` steps, then linear down; step = 1 .. T, and neither the first nor the last one is 0."""
    return step / warmup if step <= warmup else (T - step + 1) / (T - warmup)


def stop_on(bad, run):
    """End the run if a loss or gradient was not finite. The one place where the loop waits for the device."""
    if bad.item():
        last = Path(run.out) / "last.pt"
        kept = f"the last good state is in {last}" if last.exists() else "no state had been saved yet"
        raise FloatingPointError(f"loss or gradient was not finite at step {int(bad.item())}; no update was made from "
                                 f"it; {kept}: try a smaller --lr, more --warmup or --dtype fp32")


# --- evaluating, saving, ending --------------------------------------------------------------------------------

def due(run):
    """Whether step run.step is followed by an evaluation."""
    return run.step > 0 and (run.step % run.steps_per_epoch == 0 or run.step == run.T
                             or bool(run.eval_steps) and run.step % run.eval_steps == 0)


@torch.no_grad()
def predict(run, examples, signals=None):
    """Predictions of a split, (N,): class ids, or scores. The rows may be spread over several processes."""
    outputs = torch.zeros(len(examples.starts) - 1, run.net.num_labels, device=run.device)
    run.net.eval()
    for i, batch in enumerate(data.batches(examples, run.batch_size, run.net.config["pad_token_id"])):
        if signals:
            signals.check()
        if i % run.world == run.rank:
            outputs[batch.rows.to(run.device)] = predict_batch(run, batch)
    run.net.train()
    runs.sum_over_processes([outputs])
    return (outputs.argmax(1) if run.row.labels else outputs.squeeze(1)).cpu()


def evaluate(run, signals=None):
    """({dev split: {metric: value}}, {dev split: predictions})."""
    predictions = {name: predict(run, examples, signals) for name, examples in run.data.items() if name != "train"}
    scores = {name: data.metrics(run.row, p, run.data[name].labels) for name, p in predictions.items()}
    for name, p in predictions.items():
        if len(p) > 1 and (p == p[0]).all():
            run.say(f"warning: all {len(p)} predictions on {name} are {p[0].item():g}: the model may have collapsed; "
                    "try a smaller --lr or more --warmup")
    return scores, predictions


def score_of(run, evaluation):
    """The number that selects the best: the task's first metric on its first dev split."""
    return next(iter(evaluation["scores"].values()))[run.row.metrics[0]]


def evaluate_and_keep(run, log, signals):
    """Evaluate at run.step, note it, and write the adapter and its predictions if it is the best so far."""
    scores, predictions = evaluate(run, signals)
    evaluation = {"step": run.step, "scores": scores}
    run.evaluations.append(evaluation)
    score, is_best = score_of(run, evaluation), False
    if run.best is None or score > score_of(run, run.best):
        run.best, is_best = evaluation, True
        if run.rank == 0:
            out = Path(run.out)
            runs.save_adapter(out / "adapter.safetensors", lora2_state_dict(run.net), facts(run))
            for name, p in predictions.items():
                runs.write_file(out / f"predictions_{name}.tsv",
                                "".join(f"{i}\t{value}\n" for i, value in enumerate(p.tolist())))
    log.write(evaluation)
    log.say(f"step {run.step}: {show_scores(scores)}{'  (best)' if is_best else ''}")
    return score


def show_scores(scores):
    return "; ".join(f"{name} " + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
                     for name, values in scores.items())


def facts(run):
    """What an adapter file says of itself: no paths, times or devices, so that equal runs give equal bytes."""
    settings = {name: value for name, value in run.settings.items() if name not in INCIDENTAL}
    if Path(run.model).is_dir():
        settings["model"] = None
    return {"format": 1, "settings": settings, "labels": list(run.row.labels), "base": run.base, "best": run.best}


def save(run):
    """Write last.pt: all that decides how the run goes on."""
    rng = runs.gather_rng()
    if run.rank == 0:
        runs.save_state(Path(run.out) / "last.pt", {
            "settings": run.settings, "base": run.base, "step": run.step, "evaluations": run.evaluations,
            "best": run.best, "seconds": run.seconds + time.monotonic() - run.started,
            "weights": lora2_state_dict(run.net), "optimizer": run.optimizer.state_dict(),
            "pruner": run.pruner.state_dict() if run.pruner else {}, "rng": rng})


def restore(run, state):
    """Put a run back where save() found it."""
    if state["base"] != run.base:
        raise ValueError(f"{run.model} has changed since the run began: give back the same weights to resume")
    load_lora2_state_dict(run.net, state["weights"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.pruner:
        run.pruner.load_state_dict(state["pruner"])
    run.step, run.evaluations, run.best, run.seconds = (state[n] for n in ("step", "evaluations", "best", "seconds"))
    if len(state["rng"]) != run.world:
        raise ValueError(f"the run was made by {len(state['rng'])} processes: resume it with as many")
    torch.set_rng_state(state["rng"][run.rank]["cpu"])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(state["rng"][run.rank]["cuda"])


def finish(run):
    """After the last step: result.json, ranks.json, the table and the map, and what else was asked for."""
    out = Path(run.out)
    kept = run.pruner.kept() if run.pruner else {}
    result = {"task": run.task, "method": run.method, "settings": run.settings, "metric": run.row.metrics[0],
              "best": run.best, "last": run.evaluations[-1], "evaluations": run.evaluations, **run.counts,
              "kept": sum(kept.values()) if kept else None, "budget": run.budget, "steps": run.step,
              "seconds": round(run.seconds + time.monotonic() - run.started, 1), "device": str(run.device),
              "dtype": run.dtype, "processes": run.world, "torch": torch.__version__,
              "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    if run.rank == 0:
        if kept:
            runs.write_json(out / "ranks.json", kept)
            print(runs.kept_map(kept, models.TARGETS[run.net.config["model_type"]], run.r))
        runs.write_json(out / "result.json", result)
        report(result, out)
    return result


def report(result, out):
    """What a finished run tells, also when it is asked again."""
    print(f"best  step {result['best']['step']:6}  {show_scores(result['best']['scores'])}")
    print(f"last  step {result['last']['step']:6}  {show_scores(result['last']['scores'])}")
    print(f"files in {out}; evaluate again with\n  python train.py --eval {out}/adapter.safetensors "
          f"--model {result['settings']['model']}" + (f" --data-dir {result['settings']['data_dir']}"
                                                     if result["task"] != "demo" else ""))


def hand_out(run, adapter):
    """--predict, --export-peft and --merge, with the best adapter."""
    if not (run.predict or run.export_peft or run.merge) or run.rank != 0:
        return
    load_lora2_state_dict(run.net, runs.load_adapter(adapter)[0])
    if run.predict:
        name = Path(run.predict).stem
        split = data.read_split(run.predict, run.row, labelled=False)
        path = data.write_submission(Path(adapter).parent, run.row, predict(run, run.encode(split)), name)
        print(f"predictions for {run.predict} in {path}")
    if run.export_peft:
        layers = lora2_layers(run.net)
        trained = {name: p for name, p in run.net.named_parameters() if p.requires_grad
                   and not any(name.startswith(layer + ".") for layer, _ in layers)}
        runs.export_peft(run.export_peft, layers, trained, run.model)
        print(f"the adapter as a peft LoRA is in {run.export_peft}")
    if run.merge:
        models.save_pretrained(merge_lora2(run.net), run.merge)
        print(f"the merged model is in {run.merge}")


# --- from the command line -------------------------------------------------------------------------------------

def start(given, task=None):
    """Options given → a run ready to go on from run.step; its folder is made or found."""
    state = None
    if given.get("resume"):
        state = runs.load_state(Path(given["resume"]) / "last.pt")
        settings = state["settings"] | {name: value for name, value in given.items() if name in INCIDENTAL}
        differ = [name for name, value in given.items() if name not in INCIDENTAL and value != state["settings"][name]]
        if differ:
            raise ValueError(f"the run in {given['resume']} has other settings: " + ", ".join(
                f"--{n.replace('_', '-')} {state['settings'][n]} (not {given[n]})" for n in differ))
        settings["out"] = given["resume"]
    else:
        settings = resolve(given)
    run = set_up(settings, task)
    run.seconds, run.started = 0.0, time.monotonic()
    prepare_training(run)
    if state:
        restore(run, state)
    elif run.rank == 0:
        runs.prepare_folder(run.out, run.overwrite)
    return run


def complete(run):
    """Train a started run to its end; the result."""
    log = runs.Log(Path(run.out) / "log.jsonl", run.T, run.step, quiet=run.rank != 0)
    try:
        with runs.Signals() as signals:
            train(run, log, signals)
    except runs.Stopped:
        save(run)
        raise
    finally:
        log.close()
    return finish(run)


def evaluate_adapter(given):
    """--eval: load an adapter onto its base model, evaluate it, and hand out what was asked for."""
    tensors, facts = runs.load_adapter(given["eval"])
    given = {name: value for name, value in given.items()}
    wrong = [name for name in given if name not in INCIDENTAL and name not in ("model", "task", "batch_size", "dtype")]
    if wrong:
        raise ValueError(f"--{wrong[0].replace('_', '-')} cannot be changed after training: leave it out with --eval")
    settings = {name: None for name in NAMES} | facts["settings"] | {"data_dir": NAMES["data_dir"]} | given
    if settings["model"] is None:
        raise ValueError(f"{given['eval']} was trained on a model in a folder: give that folder as --model")
    run = set_up(settings, facts=facts)
    load_lora2_state_dict(run.net, tensors)
    scores, _ = evaluate(run)
    run.say(show_scores(scores))
    hand_out(run, given["eval"])
    return scores


def main(argv=None):
    """The command line; the exit status. Only set-up errors are turned into one line: a bug keeps its traceback."""
    try:
        given = parse(argv)
        if given.get("task") == "demo" and not {"model", "resume", "eval"} & set(given):
            import demo
            demo.main(given)
            return 0
        if "eval" in given:
            evaluate_adapter(given)
            return 0
        result = Path(given.get("resume", "")) / "result.json"
        if "resume" in given and result.exists():
            print(f"the run in {given['resume']} is finished")
            report(read_json(result), given["resume"])
            return 0
        run = start(given)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        complete(run)
        hand_out(run, Path(run.out) / "adapter.safetensors")
    except runs.Stopped as stop:
        print(f"stopped at step {run.step} of {run.T}; go on with: python train.py --resume {run.out}", file=sys.stderr)
        return 128 + stop.args[0]
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
