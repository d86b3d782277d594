"""The command line of train.py: presets, every option once with type, default and help, and what they resolve to."""
import argparse
import math

import baselines
import data

# The authors' released settings: batch 32, AdamW, clip 1.0, linear decay after a warm-up, dropout 0.1 in the
# backbone. ti, tf and dT (Algorithm 1) are steps of the T steps of a full-length run; runs of another length use the
# same fractions of theirs. QNLI has the longest texts; MRPC and RTE choose anew at every step.
PRESETS = {task: dict(zip(("lr", "epochs", "T", "warmup", "max_len", "head_dropout", "weight_decay", "alpha",
                           "ti", "tf", "dT", "r", "target_rank", "reg", "seed"), row)) for task, row in {
    #        lr      epochs  T       warmup  len  drop  decay  alpha  ti    tf     dT   r  target reg  seed
    "cola": (8e-4,   25,     6700,   100,    64,  .10,  0,     32,    800,  3500,  10,  4, 3,     .1,  6),
    "sst2": (8e-4,   24,     50520,  1000,   128, 0,    .01,   16,    6000, 22000, 100, 8, 2,     .1,  6),
    "mrpc": (1e-3,   30,     3450,   345,    320, 0,    .01,   32,    600,  1800,  1,   8, 1,     .1,  6),
    "qqp":  (8e-4,   20,     227420, 2000,   320, .15,  .01,   16,    8000, 25000, 100, 8, 3,     .1,  6),
    "stsb": (2.2e-3, 25,     4500,   100,    128, .20,  .1,    32,    800,  2000,  10,  4, 1,     .3,  6),
    "mnli": (5e-4,   7,      85904,  1000,   256, .15,  0,     16,    8000, 50000, 100, 8, 3,     .1,  6),
    "qnli": (1.2e-3, 5,      16370,  500,    512, .10,  .01,   32,    2000, 8000,  100, 8, 2,     .1,  6),
    "rte":  (1.2e-3, 50,     3900,   200,    320, .20,  .01,   32,    600,  1800,  1,   4, 3,     .3,  4),
    "demo": (5e-3,   7,      441,    20,     16,  0,    0,     32,    50,   150,   5,   8, 2,     .1,  0),
    "own":  (8e-4,   10,     1000,   60,     128, .10,  .01,   32,    120,  450,   10,  8, 2,     .1,  0),
}.items()}
# What a method, or a method on one task, wants otherwise. alpha 16 at r = 8 is scale 2, the setting of LoRA's and
# SoRA's authors (LoRA at alpha 32 collapsed on CoLA); full fine-tuning needs small steps.
EXCEPTIONS = {
    "full": {"lr": 2e-5}, "lora": {"r": 8, "alpha": 16}, "adalora": {"r": 2, "target_rank": 1},
    "sora": {"r": 8, "alpha": 16, "weight_decay": .1, "warmup": .06},
    ("adalora", "cola"): {"r": 3}, ("adalora", "mnli"): {"r": 3}, ("adalora", "qqp"): {"epochs": 5},
    ("adalora", "qnli"): {"lr": 5e-4}, ("full", "demo"): {"lr": 1e-3}}

TASK = "from the preset"
# (name, type, default, help). Types: a class; a tuple of choices; list for a,b,c; bool for a switch; "steps" for a
# number of optimizer steps or, below 1, a fraction of them all.
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
DEFAULTS = {name.replace("-", "_"): default for group in OPTIONS.values() for name, _, default, _ in group}
# What does not change the function that is learnt: not stored in an adapter, free to differ on --resume.
INCIDENTAL = ({name.replace("-", "_") for name, *_ in OPTIONS["files"]}
              | {"data_dir", "train_file", "dev_file", "device"})
PRUNING = ("lora2", "adalora")
ADAPTERS = ("lora2", "adalora", "lora", "sora")
ONLY_FOR = {"k": ("lora2",), "init": ("lora2",), "reg_terms": ("lora2",), "importance": PRUNING, "reg": PRUNING,
            "target_rank": PRUNING, "prune_warmup": PRUNING, "prune_final": PRUNING, "prune_interval": PRUNING,
            "r": ADAPTERS, "alpha": ADAPTERS, "targets": ADAPTERS, "export_peft": ADAPTERS,
            "sora_threshold": ("sora",)}


def flag(name):
    return "--" + name.replace("_", "-")


def parse(argv, description=None):
    """Command line → {name: value} of the options that were given, and only those. ValueError on a mistake."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ValueError(f"{message}: python train.py --help lists the options")

    def steps(text):
        value = float(text)
        if not (0 <= value < 1 or value == int(value) >= 1):
            raise argparse.ArgumentTypeError(f"{text} is neither a number of steps nor a fraction below 1")
        return value

    def names(text):
        return [part.strip() for part in text.split(",")]

    presets = "\n".join(f"  {task:5}" + "".join(f" {name} {value:g}," for name, value in row.items()).rstrip(",")
                        for task, row in PRESETS.items())
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    epilog="S: a number of optimizer steps, or a fraction below 1 of them all.\n\nPresets (T: steps of"
                    " a full-length run, in which ti, tf and dT are --prune-warmup, --prune-final\nand "
                    f"--prune-interval; another length keeps the fractions):\n{presets}")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in options:
            text += "" if default in (None, False) else f" ({default})"
            if kind is bool:
                group.add_argument(f"--{name}", action="store_true", help=text)
            elif isinstance(kind, tuple):
                group.add_argument(f"--{name}", choices=kind, help=text)
            else:
                group.add_argument(f"--{name}", type={"steps": steps, list: names}.get(kind, kind), help=text,
                                   metavar={"steps": "S", int: "N", float: "X", list: "A,B"}.get(kind, "NAME"))
    return vars(parser.parse_args(argv))


def resolve(given):
    """Options given → all settings, a plain dict. ValueError for what cannot be or does not go together."""
    own = "train_file" in given
    task, method = given.get("task", "own" if own else None), given.get("method", "lora2")
    if task not in PRESETS or own != (task == "own") or own != ("dev_file" in given):
        what = "no --task" if task is None else f"--task {task}"
        raise ValueError(f"{what}: give one of {', '.join(data.TASKS)}; or your own --train-file and --dev-file")
    unused = [name for name in given if method not in ONLY_FOR.get(name, baselines.METHODS)]
    if unused:
        raise ValueError(f"{flag(unused[0])} means nothing to --method {method}: leave it out")
    T = PRESETS[task]["T"]
    preset = PRESETS[task] | {"warmup": PRESETS[task]["warmup"] / T, "prune_warmup": PRESETS[task]["ti"] / T,
                              "prune_final": PRESETS[task]["tf"] / T, "prune_interval": PRESETS[task]["dT"] / T}
    preset |= EXCEPTIONS.get(method, {}) | EXCEPTIONS.get((method, task), {})

    settings = {name: preset[name] if default is TASK else default for name, default in DEFAULTS.items()}
    settings |= {"targets": settings["targets"].split(","), "reg_terms": settings["reg_terms"].split(",")}
    settings |= given | {"task": task}
    if "target_rank" not in given:
        settings["target_rank"] = min(settings["target_rank"], settings["r"])
    settings |= {name: None for name, methods in ONLY_FOR.items() if method not in methods}
    if settings["head_lr"] is None:
        settings["head_lr"] = settings["lr"]
    settings["out"] = settings["out"] or f"runs/{task}-{method}-s{settings['seed']}"

    counts = ("epochs", "max_steps", "batch_size", "accum", "eval_steps", "save_steps", "limit_train", "limit_dev")
    numbers = {"lr": math.inf, "head_lr": math.inf, "reg": math.inf, "weight_decay": math.inf, "head_dropout": 1,
               "sora_threshold": math.inf}
    for name, low, below in [(n, 1, math.inf) for n in counts] + [(n, 0, top) for n, top in numbers.items()]:
        if settings[name] is not None and not low <= settings[name] < below:
            raise ValueError(f"{flag(name)} {settings[name]}: give at least {low}"
                             + (f" and less than {below}" if below < math.inf else ""))
    if settings["stop_at"] is not None and method in PRUNING:
        raise ValueError(f"--stop-at could end --method {method} before its pruning: give --epochs or --max-steps")
    return settings
