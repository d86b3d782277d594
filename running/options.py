"""The command line of train.py: presets, the table of options, how they resolve."""
import argparse
import math
import os
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from data import TASKS
from formats.disk import warn
from methods import baselines
from running.errors import user_errors

# The authors' released settings: batch 32, AdamW, clip 1.0, linear decay after a warm-up, dropout
# 0.1 in the backbone. Warm-up and pruning (Algorithm 1's t_i, t_f, ΔT) are steps of all T steps of
# a full-length run; runs of another length use the same fractions of theirs.
SCHEDULE = ("warmup", "prune_warmup", "prune_final", "prune_interval")
COLUMNS = ("lr", "epochs", "all_steps", "warmup", "max_len", "head_dropout", "weight_decay",
           "alpha", *SCHEDULE[1:], "r", "target_rank", "reg", "seed")
ROWS = {
    #        lr    epochs  T     warmup  len drop decay alpha ti    tf     dT r target reg seed
    "cola": (8e-4,   25, 6700,   100,    64, .10, 0,    32,  800,  3500,  10, 4, 3,    .1, 6),
    "sst2": (8e-4,   24, 50520,  1000,  128, 0,   .01,  16, 6000, 22000, 100, 8, 2,    .1, 6),
    "mrpc": (1e-3,   30, 3450,   345,   320, 0,   .01,  32,  600,  1800,   1, 8, 1,    .1, 6),
    "qqp":  (8e-4,   20, 227420, 2000,  320, .15, .01,  16, 8000, 25000, 100, 8, 3,    .1, 6),
    "stsb": (2.2e-3, 25, 4500,   100,   128, .20, .1,   32,  800,  2000,  10, 4, 1,    .3, 6),
    "mnli": (5e-4,    7, 85904,  1000,  256, .15, 0,    16, 8000, 50000, 100, 8, 3,    .1, 6),
    "qnli": (1.2e-3,  5, 16370,  500,   512, .10, .01,  32, 2000,  8000, 100, 8, 2,    .1, 6),
    "rte":  (1.2e-3, 50, 3900,   200,   320, .20, .01,  32,  600,  1800,   1, 4, 3,    .3, 4),
    "demo": (5e-3,    7, 441,    20,     16, 0,   0,    32,   50,   150,   5, 8, 2,    .1, 0),
    "own":  (8e-4,   10, 1000,   60,    128, .10, .01,  32,  120,   450,  10, 8, 2,    .1, 0),
}
PRESETS = {task: dict(zip(COLUMNS, row)) for task, row in ROWS.items()}
# What a method, or a method on one task, wants otherwise. alpha 16 at r = 8 is scale 2, as LoRA's
# and SoRA's authors have it (LoRA at alpha 32 collapsed on CoLA); SoRA's authors clip at 0.1.
EXCEPTIONS = {
    "full": {"lr": 2e-5}, "lora": {"r": 8, "alpha": 16}, "adalora": {"r": 2, "target_rank": 1},
    "sora": {"r": 8, "alpha": 16, "weight_decay": .1, "warmup": .06, "clip": .1},
    ("adalora", "cola"): {"r": 3}, ("adalora", "mnli"): {"r": 3}, ("adalora", "qqp"): {"epochs": 5},
    ("adalora", "qnli"): {"lr": 5e-4}, ("full", "demo"): {"lr": 1e-3}}

# --- the table of options -----------------------------------------------------------------

PRESET = "from the preset"
COUNT, AMOUNT = (1, 10**9), (0, math.inf)                  # bounds of whole numbers and of others
LORA2, SORA = ("lora2",), ("sora",)
PRUNING, ADAPTERS = ("lora2", "adalora"), ("lora2", "adalora", "lora", "sora")


class Option(NamedTuple):
    """One option: a row of the table.

    kind: a class; a tuple of choices; list: some of its default; bool: a switch; "path" of a file
    or folder; "steps": a number of optimizer steps or, below 1, a fraction of them all.
    limits: the least value and what it must stay below; () where what it belongs to judges it.
    methods: those to which it means something.
    beside: "resume", "eval": may differ there from what the run or the adapter stores.
    """
    name: str
    kind: object
    default: object
    help: str
    limits: tuple = ()
    methods: tuple = baselines.METHODS
    beside: tuple = ()


RESUME, EVAL, BOTH = ("resume",), ("eval",), ("resume", "eval")
OPTIONS = {
    "data and model": (
        Option("task", str, None, "one of " + ", ".join(TASKS)),
        Option("model", "path", "microsoft/deberta-v3-base", "Hub name, or a folder", beside=BOTH),
        Option("data-dir", "path", "glue", "has CoLA/, RTE/ ..., fetched if missing", beside=BOTH),
        Option("train-file", "path", None, "your own TSV: sentence (or sentence1, sentence2), and "
               "label or score", beside=RESUME),
        Option("dev-file", "path", None, "the same, to evaluate on", beside=BOTH),
        Option("limit-train", int, None, "train on the first N rows only", COUNT),
        Option("limit-dev", int, None, "evaluate on the first N rows only", COUNT, beside=EVAL)),
    "method": (
        Option("method", baselines.METHODS, "lora2", "what to train"),
        Option("k", int, 1, "projected dimension of LoRA²", COUNT, LORA2),
        Option("r", int, PRESET, "singular values per matrix, or LoRA's rank", COUNT, ADAPTERS),
        Option("target-rank", int, PRESET, "how many of the r pruning leaves", (), PRUNING),
        Option("alpha", float, PRESET, "the update is scaled by alpha / r; --r alone keeps the "
               "preset's scale", (), ADAPTERS),
        Option("targets", list, "q,k,v,o,f1,f2", "query, key, value, attention output, "
               "feed-forward matrices", (), ADAPTERS),
        Option("init", ("gaussian", "orthonormal", "gradient"), "gaussian", "how v, u, U and V "
               "start; gradient: v and V along the first gradient of W0", (), LORA2),
        Option("reg", float, PRESET, "gamma, the weight of the regulariser R", AMOUNT, PRUNING),
        Option("reg-terms", list, "uv,UV,PQ", "groups of Eq. 5 to add", (), LORA2),
        Option("importance", ("reduced", "full"), "reduced", "scores Λ, u and U (Eq. 9), or v and "
               "V too (Eq. 8)", (), PRUNING),
        Option("sora-threshold", float, 3e-4, "what each SoRA gate loses per step", AMOUNT, SORA)),
    "training": (
        Option("epochs", int, PRESET, "passes over the training rows", COUNT),
        Option("max-steps", int, None, "train exactly N optimizer steps instead", COUNT),
        Option("stop-at", float, None, "end at this dev metric, without pruning only", AMOUNT),
        Option("batch-size", int, 32, "rows per optimizer step", COUNT, beside=EVAL),
        Option("accum", int, 1, "compute each batch in N parts: less memory, same result", COUNT),
        Option("lr", float, PRESET, "peak learning rate", AMOUNT),
        Option("head-lr", float, None, "the same for the head; by default lr", AMOUNT),
        Option("outer-lr", float, None, "the same for v and V, of lora and sora A, of adalora P "
               "and Q; by default lr", AMOUNT, ADAPTERS),
        Option("warmup", "steps", PRESET, "steps in which lr rises; then it falls linearly"),
        Option("clip", float, 1.0, "gradients with a larger norm are scaled down to it", AMOUNT),
        Option("max-len", int, PRESET, "longest input in tokens", COUNT),
        Option("head-dropout", float, PRESET, "in the head; elsewhere the checkpoint's", (0, 1)),
        Option("weight-decay", float, PRESET, "of all but biases and LayerNorms", AMOUNT),
        Option("seed", int, PRESET, "draws new weights, the order of rows and dropout", (0, 2**32)),
        Option("prune-warmup", "steps", PRESET, "steps before pruning begins", (), PRUNING),
        Option("prune-final", "steps", PRESET, "last steps, with the selection fixed", (), PRUNING),
        Option("prune-interval", "steps", PRESET, "steps between two selections", (), PRUNING),
        Option("eval-steps", int, None, "evaluate every N steps too, besides each epoch", COUNT)),
    "machine": (
        Option("device", str, None, "cuda, mps or cpu; by default the first there is", beside=BOTH),
        Option("dtype", ("fp32", "bf16"), None, "bf16 is autocast; by default on a GPU that has "
               "it, else fp32", beside=EVAL),
        Option("compile", bool, False, "torch.compile the layers of the model", beside=EVAL),
        Option("eager", bool, False, "on a GPU, steps are not recorded and replayed", beside=BOTH)),
    "files": (
        Option("out", "path", None, "run folder; by default runs/TASK-MODEL-METHOD-sSEED. Beside "
               "--eval: where --predict writes", beside=EVAL),
        Option("overwrite", bool, False, "replace the run in that folder"),
        Option("save-steps", int, None, "write last.pt every N steps too", COUNT, beside=RESUME),
        Option("resume", "path", None, "go on with the run in this folder; needs nothing else, "
               "but what to write elsewhere has to be said again", beside=RESUME),
        Option("eval", "path", None, "evaluate this adapter.safetensors: no training", beside=EVAL),
        Option("predict", "path", None, "predict this TSV, which needs no labels", beside=BOTH),
        Option("predict-scores", bool, False, "there also each class's probability", beside=BOTH),
        Option("merge", "path", None, "write the best model here as a checkpoint", beside=BOTH),
        Option("export-peft", "path", None, "the best adapter as peft's LoRA", (), ADAPTERS, BOTH)),
}
TABLE = {option.name.replace("-", "_"): option for group in OPTIONS.values() for option in group}
AFTERWARDS = {"predict", "merge", "export_peft"}           # what can be asked of a finished adapter
# In an adapter stands what was learnt and from which model, not where things are.
PLACES = {"data_dir", "train_file", "dev_file", "device", "eager"} | {
    option.name.replace("-", "_") for option in OPTIONS["files"]}
STORED = TABLE.keys() - PLACES


def flag(name):
    """How an option is written: "head_lr" is --head-lr."""
    return "--" + name.replace("_", "-")


# --- from words to options ----------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Mistakes are ValueErrors of one sentence, not exits with the whole usage."""

    def error(self, message):
        raise ValueError(f"{message}: python {self.prog} --help lists the options")


def number_of_steps(text):
    """The type of an option that counts steps: a whole number, or a fraction below 1."""
    value = float(text)
    if not 0 <= value < COUNT[1] or (value >= 1 and value % 1 > 0):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of steps nor a fraction "
                                         "below 1")
    return value


def path_of(text):
    """The type of an option that names a file or a folder."""
    if not text:  # as from a shell variable that is not set
        raise argparse.ArgumentTypeError("this path is empty")
    return os.path.expanduser(text)                        # no shell does that after --out=


def list_of(text):
    """The type of an option that lists names: a,b,c."""
    return [part.strip() for part in text.split(",")]


# kind of an option → what argparse is told of it: metavar is what stands for its value in --help
KINDS = {"steps": {"type": number_of_steps, "metavar": "S"},
         "path": {"type": path_of, "metavar": "PATH"},
         list: {"type": list_of, "metavar": "A,B"}, bool: {"action": "store_true"},
         int: {"type": int, "metavar": "N"}, float: {"type": float, "metavar": "X"},
         str: {"metavar": "NAME"}}


@user_errors()
def parse(argv, description=None):
    """Command line → {name: value} of the options that were given. Refused on a mistake."""
    parser = Parser(prog="train.py", usage="python train.py [options]", description=description,
                    epilog=epilog(), formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            text = option.help
            if option.default not in (None, False):
                text += f" ({option.default})"
            kind = KINDS.get(option.kind) or {"choices": option.kind}
            group.add_argument(f"--{option.name}", help=text, **kind)
    given = vars(parser.parse_args(argv))
    if "predict_scores" in given and "predict" not in given:
        raise ValueError("--predict-scores says what --predict writes: give both")
    return given


def epilog():
    """What --help says about S and the presets: a table with a column for each task."""
    lines = ["S: a number of optimizer steps, or a fraction below 1 of them all.", "",
             "presets:        " + "".join(f"{task:>8}" for task in PRESETS)]
    for name in COLUMNS:
        cells = "".join(f"{row[name]:8g}" for row in PRESETS.values())
        lines.append(f"  {name.replace('_', '-'):14}{cells}")
    lines += ["", "Steps are those of a full-length run; a run of another length keeps the "
              "fractions.", "Other methods have presets of their own:"]
    for key, changes in EXCEPTIONS.items():
        where = key if isinstance(key, str) else " on ".join(key)
        values = ", ".join(f"{flag(name)} {value:g}" for name, value in changes.items())
        lines.append(f"  {where}: {values}")
    return "\n".join(lines)


# --- from options given to all settings ---------------------------------------------------

def preset_of(task, method):
    """{name: value} that a task and a method want; schedules are fractions of all steps."""
    preset = dict(PRESETS[task])
    T = preset.pop("all_steps")
    for name in SCHEDULE:
        preset[name] /= T
    return preset | EXCEPTIONS.get(method, {}) | EXCEPTIONS.get((method, task), {})


def task_of(given):
    """The name of the task that the options mean: one of GLUE's, or "own"."""
    own = bool(given.keys() & {"train_file", "dev_file"})
    task = given.get("task", "own" if own else None)
    if own and (task != "own" or not given.keys() >= {"train_file", "dev_file"}):
        raise ValueError("your own data need both --train-file and --dev-file, and no --task")
    if not own and task not in TASKS:
        raise ValueError(f"there is no --task {task or 'given'}: give one of {', '.join(TASKS)}, "
                         "or your own --train-file and --dev-file")
    return task


@user_errors()
def resolve(given):
    """Options given, {name: value} → all settings of a new run. Refused for what cannot be."""
    task, method = task_of(given), given.get("method", "lora2")
    preset = preset_of(task, method)
    settings = {name: option.default for name, option in TABLE.items()}
    settings |= preset | given | {"task": task}
    for name, option in TABLE.items():
        if option.kind is list and name not in given:
            settings[name] = settings[name].split(",")
        if method not in option.methods and name not in given:
            settings[name] = None                          # means nothing to the method
    if "r" in given and "alpha" not in given and "r" in preset and method in ADAPTERS:
        settings["alpha"] = preset["alpha"] / preset["r"] * given["r"]         # the preset's scale
    if "target_rank" not in given and method in PRUNING:
        settings["target_rank"] = min(settings["target_rank"], settings["r"])
    if settings["out"] is None:
        which = f"lora2-k{settings['k']}" if method == "lora2" else method
        model = Path(settings["model"]).resolve().name
        settings["out"] = f"runs/{task}-{model}-{which}-s{settings['seed']}"
    return checked(settings)


@user_errors()
def resumed(stored, given):
    """The settings of an interrupted run, with what may differ taken from the command line.

    Where to write is taken from there alone: no file chooses it.
    """
    check_stored(given["resume"], TABLE.keys(), stored)
    for name in sorted(AFTERWARDS - given.keys()):
        if stored[name] is not None:
            warn(f"this run began with {flag(name)} {stored[name]}: --resume does that only if it "
                 "is given again")
    places = dict.fromkeys(AFTERWARDS) | {"eval": None, "overwrite": False}
    places |= beside_resume(stored, given) | {"out": given["resume"]}
    return checked(stored | places)


def beside_resume(stored, given):
    """What is given beside --resume; ValueError if it differs from the run where it must not."""
    fixed = {name: stored[name] for name in stored.keys() - {"out", "overwrite", "eval"}}
    unread = {"data_dir"} if stored["task"] == "own" else {"train_file", "dev_file"}
    return agreed(fixed, given, "resume", unread)


@user_errors()
def evaluating(stored, given):
    """The settings with which to evaluate an adapter that stores its own."""
    check_stored(given["eval"], STORED, stored)
    unread = set() if "predict" in given else {"out"}
    settings = {name: option.default for name, option in TABLE.items()} | stored
    settings["batch_size"] = min(settings["batch_size"], 256)      # no file chooses all memory
    settings |= agreed(stored, given, "eval", unread)
    if settings["model"] is None:
        raise ValueError(f"{given['eval']} belongs to a model in a folder: give that folder as "
                         "--model")
    if settings["task"] == "own" and settings["dev_file"] is None:
        raise ValueError(f"{given['eval']} was trained on a file of your own: give one to evaluate "
                         "it on as --dev-file")
    if settings["out"] is None:
        settings["out"] = str(Path(given["eval"]).parent)
    return checked(settings)


def check_stored(path, known, stored):
    """ValueError that names the options which a file of ours lacks, has too many, or spoilt."""
    differ = [f"{flag(name)} is new" for name in sorted(known - stored.keys())]
    differ += [f"{flag(name)} is unknown" for name in sorted(stored.keys() - known)]
    if differ:
        raise ValueError(f"{path} is of another version of this program: {', '.join(differ)}")
    for name in sorted(known):
        if not can_be(TABLE[name], stored[name], stored["method"]):
            raise ValueError(f"{path} is damaged: {flag(name)} cannot be {stored[name]!r:.60}")


def can_be(option, value, method):
    """Whether parse() and resolve() can have given an option that value."""
    kind = option.kind
    if value is None:                                      # of an adapter: the model was a folder
        return option.default is None or method not in option.methods or option.name == "model"
    if isinstance(kind, tuple):
        return value in kind
    if kind is list:
        return type(value) is list and set(map(type, value)) == {str}
    if kind in ("steps", float):
        return type(value) in (int, float) and (kind is float or 0 <= value < COUNT[1])
    return type(value) is (str if kind == "path" else kind)


def agreed(fixed, given, what, unread):
    """`given`; ValueError that names all options in it that differ from `fixed` and must not.

    what: "resume" or "eval": beside it some may differ, but for those that are `unread` there.
    """
    differ = []
    free = {name for name, option in TABLE.items() if what in option.beside}
    for name in sorted(given.keys() - (free - unread)):
        if name not in fixed:
            differ.append(f"no {flag(name)}")
        elif given[name] != fixed[name]:
            differ.append(f"{flag(name)} {fixed[name]}, not {given[name]}")
    if differ:
        raise ValueError(f"{flag(what)} has to keep {'; '.join(differ)}: leave that out")
    return given


def checked(settings):
    """The settings as a Namespace; ValueError for what is out of range or means nothing here.

    alpha, target-rank, schedules, and whether k and r are too large are judged where the matrices
    and the number of steps are known.
    """
    method = settings["method"]
    if settings["head_lr"] is None:
        settings["head_lr"] = settings["lr"]
    for name, option in TABLE.items():
        value = settings[name]
        if value is None:
            continue
        if method not in option.methods:
            raise ValueError(f"{flag(name)} means nothing to --method {method}: leave it out")
        if option.kind is list:
            if len(set(value)) < len(value) or not set(value) <= set(option.default.split(",")):
                raise ValueError(f"{flag(name)} {','.join(value)}: give some of {option.default}, "
                                 "each once")
        elif option.limits and not option.limits[0] <= value < option.limits[1]:
            least, below = option.limits
            most = f" and less than {below}" if below < math.inf else ""
            raise ValueError(f"{flag(name)} {value}: give at least {least}{most}")
    if settings["stop_at"] is not None and method in PRUNING:
        raise ValueError(f"--stop-at could end --method {method} before its pruning: give "
                         "--max-steps")
    for name in ("model", "data_dir", "train_file", "dev_file"):
        if settings[name] and os.path.exists(settings[name]):  # or a name on the Hub
            settings[name] = os.path.abspath(settings[name])   # --resume may be elsewhere
    return Namespace(**settings)
