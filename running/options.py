"""The command line of train.py: presets, every option with type, default and help, and how they resolve."""
import argparse
import math
import os
from pathlib import Path

from methods import baselines
from data import TASKS

# The authors' released settings: batch 32, AdamW, clip 1.0, linear decay after a warm-up, dropout 0.1 in the
# backbone. ti, tf and dT (Algorithm 1) are steps of the T steps of a full-length run; runs of another length
# use the same fractions of theirs. QNLI has the longest texts; MRPC and RTE choose anew at every step.
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
# What a method, or a method on one task, wants otherwise. alpha 16 at r = 8 is scale 2, the setting of LoRA's
# and SoRA's authors (LoRA at alpha 32 collapsed on CoLA); full fine-tuning needs small steps.
EXCEPTIONS = {
    "full": {"lr": 2e-5}, "lora": {"r": 8, "alpha": 16}, "adalora": {"r": 2, "target_rank": 1},
    "sora": {"r": 8, "alpha": 16, "weight_decay": .1, "warmup": .06},
    ("adalora", "cola"): {"r": 3}, ("adalora", "mnli"): {"r": 3}, ("adalora", "qqp"): {"epochs": 5},
    ("adalora", "qnli"): {"lr": 5e-4}, ("full", "demo"): {"lr": 1e-3}}

TASK = "from the preset"
# (name, type, default, help). Types: a class; a tuple of choices; list for a,b,c; bool for a switch; "path"
# of a file or folder; "steps" for a number of optimizer steps or, below 1, a fraction of them all.
OPTIONS = {
    "data and model": (
        ("task", str, None, "one of " + ", ".join(TASKS)),
        ("model", "path", "microsoft/deberta-v3-base", "name on the Hub, or a folder"),
        ("data-dir", "path", "glue", "folder that holds CoLA/, RTE/ ...; a missing task is fetched into it"),
        ("train-file", "path", None, "your own TSV: sentence (or sentence1, sentence2), and label or score"),
        ("dev-file", "path", None, "the same, to evaluate on"),
        ("limit-train", int, None, "train on the first N rows only"),
        ("limit-dev", int, None, "evaluate on the first N rows only")),
    "method": (
        ("method", baselines.METHODS, "lora2", "what to train"),
        ("k", int, 1, "projected dimension of LoRA²"),
        ("r", int, TASK, "singular values per matrix; the rank of lora, adalora and sora"),
        ("target-rank", int, TASK, "singular values per matrix that pruning leaves, at most r"),
        ("alpha", float, TASK, "the update is scaled by alpha / r"),
        ("targets", list, "q,k,v,o,f1,f2", "query, key, value, attention output, feed-forward matrices"),
        ("init", ("gaussian", "orthonormal"), "gaussian", "how v, u, U and V start"),
        ("reg", float, TASK, "gamma, the weight of the regulariser R"),
        ("reg-terms", list, "uv,UV,PQ", "the groups of Eq. 5 that count"),
        ("importance", ("reduced", "full"), "reduced", "scores Λ, u and U (Eq. 9), or v and V too (Eq. 8)"),
        ("sora-threshold", float, 3e-4, "what each of SoRA's gates loses per step")),
    "training": (
        ("epochs", int, TASK, "passes over the training rows"),
        ("max-steps", int, None, "train exactly N optimizer steps instead"),
        ("stop-at", float, None, "stop once the dev metric reaches this (methods that do not prune)"),
        ("batch-size", int, 32, "rows per optimizer step"),
        ("accum", int, 1, "compute each batch in N parts to save memory, with the same result"),
        ("lr", float, TASK, "peak learning rate"),
        ("head-lr", float, None, "the same for the head; by default lr"),
        ("warmup", "steps", TASK, "steps in which the learning rate rises; then it falls linearly"),
        ("max-len", int, TASK, "longest input in tokens"),
        ("head-dropout", float, TASK, "dropout in the head; the backbone's is the checkpoint's"),
        ("weight-decay", float, TASK, "of all but biases and LayerNorms"),
        ("seed", int, TASK, "draws the new weights, the order of rows and dropout"),
        ("prune-warmup", "steps", TASK, "steps before pruning begins"),
        ("prune-final", "steps", TASK, "steps at the end with the selection fixed"),
        ("prune-interval", "steps", TASK, "steps between two selections"),
        ("eval-steps", int, None, "evaluate every N steps too, besides each epoch and the end")),
    "machine": (
        ("device", str, None, "cuda, mps or cpu; by default the first there is"),
        ("dtype", ("fp32", "bf16"), None, "bf16 is autocast; by default on a GPU that has it, else fp32"),
        ("compile", bool, False, "torch.compile the model")),
    "files": (
        ("out", "path", None, "run folder; by default runs/TASK-MODEL-METHOD-sSEED"),
        ("overwrite", bool, False, "replace the run in that folder"),
        ("save-steps", int, None, "write last.pt every N steps too, besides each evaluation"),
        ("resume", "path", None, "go on with the run in this folder; it needs no other option"),
        ("eval", "path", None, "load this adapter.safetensors and evaluate instead of training"),
        ("predict", "path", None, "write predictions for this TSV of the task, labels not needed"),
        ("merge", "path", None, "write the best model to this folder as a plain checkpoint"),
        ("export-peft", "path", None, "write the best adapter to this folder as peft's LoRA")),
}
DEFAULTS = {name.replace("-", "_"): default for group in OPTIONS.values() for name, _, default, _ in group}
# Where things are and what is done with them: changes nothing that is learnt, is not stored in an adapter.
INCIDENTAL = ({name.replace("-", "_") for name, *_ in OPTIONS["files"]}
              | {"data_dir", "train_file", "dev_file", "device"})
AFTERWARDS = {"predict", "merge", "export_peft"}           # what can be asked of a finished adapter
WITH_RESUME = AFTERWARDS | {"model", "data_dir", "train_file", "dev_file", "device", "save_steps"}
WITH_EVAL = AFTERWARDS | {"eval", "model", "data_dir", "dev_file", "limit_dev", "batch_size", "device",
                          "dtype", "compile"}
PRUNING, ADAPTERS = ("lora2", "adalora"), ("lora2", "adalora", "lora", "sora")
ONLY_FOR = {**dict.fromkeys(("k", "init", "reg_terms"), ("lora2",)), "sora_threshold": ("sora",),
            **dict.fromkeys(("r", "alpha", "targets", "export_peft"), ADAPTERS),
            **dict.fromkeys(("importance", "reg", "target_rank", "prune_warmup", "prune_final",
                             "prune_interval"), PRUNING)}
# (least value, what it must stay below). alpha, target-rank, schedules, and whether k and r are too large are
# judged where the matrices and the number of steps are known.
COUNT, AMOUNT = (1, 10**9), (0, math.inf)
RANGES = {**dict.fromkeys(("k", "r", "epochs", "max_steps", "batch_size", "accum", "eval_steps", "save_steps",
                           "max_len", "limit_train", "limit_dev"), COUNT),
          **dict.fromkeys(("lr", "head_lr", "reg", "weight_decay", "sora_threshold", "stop_at"), AMOUNT),
          "seed": (0, 2**32), "head_dropout": (0, 1)}
LISTS = {"targets": ("q", "k", "v", "o", "f1", "f2"), "reg_terms": ("uv", "UV", "PQ")}


def flag(name):
    """How an option is written: "head_lr" is --head-lr."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Mistakes are ValueErrors of one sentence, not exits with the whole usage."""

    def error(self, message):
        raise ValueError(f"{message}: python train.py --help lists the options")


def parse(argv, description=None):
    """Command line → {name: value} of the options that were given and only those. ValueError on a mistake."""
    def steps(text):
        value = float(text)
        if not (0 <= value < 1 or 1 <= value < COUNT[1] and value == int(value)):
            raise argparse.ArgumentTypeError(f"{text} is neither a number of steps nor a fraction below 1")
        return value

    def given_path(text):
        if not text:                                       # as from a shell variable that is not set
            raise argparse.ArgumentTypeError("this path is empty")
        return os.path.expanduser(text)                    # no shell does that after --out=

    def names(text):
        return [part.strip() for part in text.split(",")]

    parser = Parser(usage="python train.py [options]", description=description, epilog=epilog(),
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in options:
            text += "" if default in (None, False) else f" ({default})"
            if kind is bool:
                group.add_argument(f"--{name}", action="store_true", help=text)
            elif isinstance(kind, tuple):
                group.add_argument(f"--{name}", choices=kind, help=text)
            else:
                metavar = {"steps": "S", "path": "PATH", int: "N", float: "X", list: "A,B"}.get(kind, "NAME")
                group.add_argument(f"--{name}", help=text, metavar=metavar,
                                   type={"steps": steps, "path": given_path, list: names}.get(kind, kind))
    return vars(parser.parse_args(argv))


def epilog():
    """What --help says about S and the presets: a table with a column for each task."""
    names = {"T": "all steps", "ti": "prune-warmup", "tf": "prune-final", "dT": "prune-interval"}
    rows = [f"  {names.get(name, name.replace('_', '-')):14}"
            + "".join(f"{row[name]:8g}" for row in PRESETS.values()) for name in PRESETS["rte"]]
    others = [f"  {key if isinstance(key, str) else ' on '.join(key)}: "
              + ", ".join(f"{flag(name)} {value:g}" for name, value in changes.items())
              for key, changes in EXCEPTIONS.items()]
    return "\n".join(["S: a number of optimizer steps, or a fraction below 1 of them all.", "",
                      "presets:        " + "".join(f"{task:>8}" for task in PRESETS), *rows, "",
                      "Steps are those of a full-length run; a run of another length keeps the fractions.",
                      "Other methods have presets of their own:", *others])


def resolve(given):
    """Options given → all settings of a new run, a plain dict. ValueError for what cannot be or not fit."""
    own, method = bool(given.keys() & {"train_file", "dev_file"}), given.get("method", "lora2")
    task = given.get("task", "own" if own else None)
    if own and (task != "own" or not given.keys() >= {"train_file", "dev_file"}):
        raise ValueError("your own data need both --train-file and --dev-file, and no --task")
    if not own and task not in TASKS:
        raise ValueError(("there is no --task" if task is None else f"--task {task} is unknown")
                         + f": give one of {', '.join(TASKS)}, or your own --train-file and --dev-file")
    preset = PRESETS[task]
    T = preset["T"]
    preset = preset | {"warmup": preset["warmup"] / T, "prune_warmup": preset["ti"] / T,
                       "prune_final": preset["tf"] / T, "prune_interval": preset["dT"] / T}
    preset |= EXCEPTIONS.get(method, {}) | EXCEPTIONS.get((method, task), {})

    settings = {name: preset[name] if default is TASK else default for name, default in DEFAULTS.items()}
    settings |= {name: settings[name].split(",") for name in LISTS} | given | {"task": task}
    if "target_rank" not in given:
        settings["target_rank"] = min(settings["target_rank"], settings["r"])
    settings |= {name: None for name, methods in ONLY_FOR.items()
                 if method not in methods and name not in given}
    if settings["head_lr"] is None:
        settings["head_lr"] = settings["lr"]
    which = method if method != "lora2" else f"lora2-k{settings['k']}"
    name = f"{task}-{Path(settings['model']).resolve().name}-{which}-s{settings['seed']}"
    settings["out"] = settings["out"] or f"runs/{name}"
    return checked(settings)


def schedule(settings, T):
    """Steps, of T: warm-up of the learning rate, then prune-warmup, prune-final and prune-interval."""
    def steps(name):
        """Fractions are rounded down, so that a sum of them that is below 1 stays below T."""
        value = settings[name] or 0
        return int(round(value * T, 6)) if value < 1 else int(value)

    warmup, start, final = steps("warmup"), steps("prune_warmup"), steps("prune_final")
    if warmup >= T:
        raise ValueError(f"--warmup {warmup} must be less than the {T} steps of this run")
    if start + final >= T:
        raise ValueError(f"--prune-warmup {start} and --prune-final {final} together must be less than the "
                         f"{T} steps of this run")
    return warmup, start, final, max(1, steps("prune_interval"))


def resume(settings, given):
    """The settings of an interrupted run, with what may differ taken from the command line."""
    return checked(settings | beside_resume(settings, given) | {"out": given["resume"]})


def beside_resume(settings, given):
    """What is given beside --resume; ValueError if it differs from a run's settings where it must not."""
    fixed = {name: settings[name] for name in settings if name not in ("out", "overwrite", "eval")}
    unread = {"data_dir"} if settings["task"] == "own" else {"train_file", "dev_file"}
    return agreed(fixed, {name: given[name] for name in given if name != "resume"}, WITH_RESUME - unread,
                  "--resume")


def evaluate(stored, given):
    """The settings with which to evaluate an adapter that stores its own."""
    settings = checked(DEFAULTS | stored | agreed(stored, given, WITH_EVAL, "--eval"))
    if settings["model"] is None:
        raise ValueError(f"{given['eval']} belongs to a model in a folder: give that folder as --model")
    if settings["task"] == "own" and settings["dev_file"] is None:
        raise ValueError(f"{given['eval']} was trained on a file of your own: give one to evaluate it on as "
                         "--dev-file")
    return settings


def agreed(fixed, given, free, what):
    """`given`; ValueError that names all options in it that are not free and not as in `fixed`."""
    differ = [f"{flag(name)} {fixed[name]}, not {given[name]}" if name in fixed else f"no {flag(name)}"
              for name in given.keys() - free if name not in fixed or given[name] != fixed[name]]
    if differ:
        raise ValueError(f"{what} has to keep {'; '.join(sorted(differ))}: leave that out")
    return given


def checked(settings):
    """The settings; ValueError for a value out of range or an option that means nothing here."""
    method = settings["method"]
    for name, methods in ONLY_FOR.items():
        if settings[name] is not None and method not in methods:
            raise ValueError(f"{flag(name)} means nothing to --method {method}: leave it out")
    for name, (low, below) in RANGES.items():
        if settings[name] is not None and not low <= settings[name] < below:
            raise ValueError(f"{flag(name)} {settings[name]}: give at least {low}"
                             + (f" and less than {below}" if below < math.inf else ""))
    for name, known in LISTS.items():
        values = settings[name]
        if values is not None and (len(set(values)) < len(values) or not set(values) <= set(known)):
            raise ValueError(f"{flag(name)} {','.join(values)}: give some of {','.join(known)}, each once")
    if settings["stop_at"] is not None and method in PRUNING:
        raise ValueError(f"--stop-at could end --method {method} before its pruning: give --max-steps")
    return settings
