"""The command line of train.py: the table of options, and how they resolve."""
import argparse
import math
import os
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import NamedTuple

from data import TASKS
from formats.disk import warn
from methods import by_name
from running.errors import user_errors
from running.presets import COLUMNS, EXCEPTIONS, PRESETS, preset_of

# --- what makes a value of a typed word ---------------------------------------------------

def path(text):
    """The name of a file or a folder."""
    if not text:  # as from a shell variable that is not set
        raise ArgumentTypeError("this path is empty")
    return os.path.expanduser(text)                        # no shell does that after --out=


def names(text):
    """A list of names: a,b,c."""
    return [part.strip() for part in text.split(",")]


def steps(text):
    """A whole number of optimizer steps, or a fraction of them all, below 1."""
    value = float(text)
    if not 0 <= value < COUNT[1] or (value >= 1 and value % 1 > 0):
        raise ArgumentTypeError(f"{text} is neither a number of steps nor a fraction below 1")
    return value


# What stands for a value in --help.
SHOWN = {int: "N", float: "X", str: "NAME", path: "PATH", names: "A,B", steps: "STEPS"}

# --- the table of options -----------------------------------------------------------------

PRESET = "from the preset"
COUNT, AMOUNT = (1, 10**9), (0, math.inf)                  # bounds of whole numbers and of others
LORA2, SORA = ("lora2",), ("sora",)
PRUNING, ADAPTERS = ("lora2", "adalora"), ("lora2", "adalora", "lora", "sora")
UNPRUNED = tuple(method for method in by_name.METHODS if method not in PRUNING)


class Option(NamedTuple):
    """One option: a row of the table.

    kind: what makes a value of a word; a tuple of choices; bool: a switch.
    limits: the least value and what it must stay below; () where what it belongs to judges it.
    methods: those to which it means something.
    beside: "resume", "eval": may differ there from what the run or the adapter stores.
    """
    name: str
    kind: object
    default: object
    help: str
    limits: tuple = ()
    methods: tuple = by_name.METHODS
    beside: tuple = ()


RESUME, EVAL, BOTH = ("resume",), ("eval",), ("resume", "eval")
OPTIONS = {
    "data and model": (
        Option("task", str, None, "one of " + ", ".join(TASKS) + "; STS-B is stsb"),
        Option("model", path, "microsoft/deberta-v3-base", "Hub name, or a folder", beside=BOTH),
        Option("data-dir", path, "glue", "has CoLA/, RTE/ ..., fetched if missing", beside=BOTH),
        Option("train-file", path, None, "your own TSV: sentence (or sentence1, sentence2), and "
               "label or score", beside=RESUME),
        Option("dev-file", path, None, "the same, to evaluate on", beside=BOTH),
        Option("limit-train", int, None, "train on the first N rows only", COUNT),
        Option("limit-dev", int, None, "evaluate on the first N rows only", COUNT, beside=EVAL)),
    "method": (
        Option("method", by_name.METHODS, "lora2", "what to train"),
        Option("k", int, 1, "projected dimension of LoRA²", COUNT, LORA2),
        Option("r", int, PRESET, "singular values per matrix, or LoRA's rank", COUNT, ADAPTERS),
        Option("target-rank", int, PRESET, "how many of the r pruning leaves", (), PRUNING),
        Option("alpha", float, PRESET, "the update is scaled by alpha / r; --r alone keeps the "
               "preset's scale", (), ADAPTERS),
        Option("targets", names, "q,k,v,o,f1,f2", "query, key, value, attention output, "
               "feed-forward matrices", (), ADAPTERS),
        Option("init", ("gaussian", "orthonormal"), "gaussian", "of v, u, U and V", (), LORA2),
        Option("reg", float, PRESET, "gamma, the weight of the regulariser R", AMOUNT, PRUNING),
        Option("reg-terms", names, "uv,UV,PQ", "groups of Eq. 5 to add", (), LORA2),
        Option("importance", ("reduced", "full"), "reduced", "scores Λ, u and U (Eq. 9), or v and "
               "V too (Eq. 8)", (), PRUNING),
        Option("sora-threshold", float, 3e-4, "what each SoRA gate loses per step", AMOUNT, SORA)),
    "training": (
        Option("epochs", int, PRESET, "passes over the training rows", COUNT),
        Option("max-steps", int, None, "train exactly N optimizer steps instead", COUNT),
        Option("stop-at", float, None, "end at this dev metric", AMOUNT, UNPRUNED),
        Option("batch-size", int, 32, "rows per optimizer step", COUNT, beside=EVAL),
        Option("accum", int, 1, "compute each batch in N parts: less memory, other dropout", COUNT),
        Option("lr", float, PRESET, "peak learning rate", AMOUNT),
        Option("head-lr", float, None, "the same for the head; by default lr", AMOUNT),
        Option("outer-lr", float, None, "the same for v and V, of lora and sora A, of adalora P "
               "and Q; by default lr", AMOUNT, ADAPTERS),
        Option("warmup", steps, PRESET, "steps in which lr rises; then it falls linearly"),
        Option("clip", float, 1.0, "gradients with a larger norm are scaled down to it", AMOUNT),
        Option("max-len", int, PRESET, "longest input in tokens", COUNT),
        Option("head-dropout", float, PRESET, "in the head; elsewhere the checkpoint's", (0, 1)),
        Option("weight-decay", float, PRESET, "of all but biases and LayerNorms", AMOUNT),
        Option("seed", int, PRESET, "draws new weights, the order of rows and dropout", (0, 2**32)),
        Option("prune-warmup", steps, PRESET, "steps before pruning begins", (), PRUNING),
        Option("prune-final", steps, PRESET, "last steps, with the selection fixed", (), PRUNING),
        Option("prune-interval", steps, PRESET, "steps between two selections", (), PRUNING),
        Option("eval-steps", int, None, "evaluate every N steps too, besides each epoch", COUNT)),
    "machine": (
        Option("device", str, None, "cuda, mps or cpu; by default the first there is", beside=BOTH),
        Option("dtype", ("fp32", "bf16"), None, "bf16 is autocast; by default on a GPU that has "
               "it, else fp32", beside=EVAL),
        Option("compile", bool, False, "torch.compile the layers of the model", beside=EVAL),
        Option("eager", bool, False, "on a GPU, steps are not recorded and replayed", beside=BOTH)),
    "files": (
        Option("out", path, None, "run folder; by default runs/TASK-MODEL-METHOD-sSEED. Beside "
               "--eval: where --predict writes", beside=EVAL),
        Option("overwrite", bool, False, "replace the run in that folder"),
        Option("save-steps", int, None, "write last.pt every N steps too", COUNT, beside=RESUME),
        Option("resume", path, None, "go on with the run in this folder; needs nothing else, "
               "but what to write elsewhere has to be said again", beside=RESUME),
        Option("eval", path, None, "evaluate this adapter.safetensors: no training", beside=EVAL),
        Option("predict", path, None, "predict this TSV, which needs no labels", beside=BOTH),
        Option("predict-scores", bool, False, "there also each class's probability", beside=BOTH),
        Option("merge", path, None, "write the best model here as a checkpoint", beside=BOTH),
        Option("export-peft", path, None, "the best adapter as peft's LoRA", (), ADAPTERS, BOTH)),
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
            if isinstance(option.kind, tuple):
                how = {"choices": option.kind}
            elif option.kind is bool:
                how = {"action": "store_true"}
            else:
                how = {"type": option.kind, "metavar": SHOWN[option.kind]}
            group.add_argument(f"--{option.name}", help=text, **how)
    given = vars(parser.parse_args(argv))
    if "task" in given:
        given["task"] = given["task"].lower().replace("-", "")     # RTE, STS-B
    if "predict_scores" in given and "predict" not in given:
        raise ValueError("--predict-scores says what --predict writes: give both")
    if {"eval", "resume"} <= given.keys():
        raise ValueError("--eval shows an adapter, --resume goes on with a run: give one of them")
    return given


def epilog():
    """What --help says about STEPS and the presets: a table with a column for each task."""
    lines = ["STEPS: a number of optimizer steps, or a fraction below 1 of them all.", "",
             "presets:        " + "".join(f"{task:>8}" for task in PRESETS)]
    for name in COLUMNS:
        cells = "".join(f"{row[name]:8g}" for row in PRESETS.values())
        lines.append(f"  {name.replace('_', '-'):14}{cells}")
    lines += ["", "Steps are those of a full-length run; a run of another length keeps the "
              "fractions.", "Other methods have presets of their own:"]
    for where, changes in EXCEPTIONS.items():
        values = ", ".join(f"{flag(name)} {value:g}" for name, value in changes.items())
        lines.append(f"  {where}: {values}")
    return "\n".join(lines)


# --- from options given to all settings ---------------------------------------------------

def task_of(given):
    """The name of the task that the options mean: one of GLUE's, or "own"."""
    own = {"train_file", "dev_file"} & given.keys()
    if own and (len(own) < 2 or "task" in given):
        raise ValueError("your own data need both --train-file and --dev-file, and no --task")
    task = given.get("task", "given")
    if not own and task not in TASKS:
        raise ValueError(f"there is no --task {task}: give one of {', '.join(TASKS)}, or your own "
                         "--train-file and --dev-file")
    return "own" if own else task


@user_errors()
def resolve(given):
    """Options given, {name: value} → all settings of a new run. Refused for what cannot be."""
    task, method = task_of(given), given.get("method", "lora2")
    preset = preset_of(task, method)
    settings = {}
    for name, option in TABLE.items():
        if method not in option.methods:
            settings[name] = None                          # means nothing to the method
        elif option.kind is names:
            settings[name] = names(option.default)
        else:
            settings[name] = preset.get(name, option.default)
    settings |= given | {"task": task}
    if "r" in given and "alpha" not in given and method in ADAPTERS:
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
    check_beside(stored, given, "resume")
    for name in sorted(AFTERWARDS - given.keys()):
        if stored[name] is not None:
            warn(f"this run began with {flag(name)} {stored[name]}: --resume does that only if it "
                 "is given again")
    places = dict.fromkeys(AFTERWARDS) | {"eval": None, "overwrite": False}
    return checked(stored | places | given | {"out": given["resume"]})


def evaluating(stored, given):
    """The settings with which to evaluate an adapter, which stores its own; or ValueError."""
    check_beside(stored, given, "eval")
    settings = {name: option.default for name, option in TABLE.items()} | stored
    settings["batch_size"] = min(settings["batch_size"], 256)      # no file chooses all memory
    settings |= given
    needed = {"model"}
    if settings["task"] == "own" and not AFTERWARDS & given.keys():
        needed.add("dev_file")                             # else there would be nothing to do
    missing = [flag(name) for name in sorted(needed) if settings[name] is None]
    if missing:
        raise ValueError(f"{given['eval']} does not name files and folders of your own: give "
                         f"them as {' and '.join(missing)}")
    evaluates = settings["task"] != "own" or settings["dev_file"]
    if evaluates and settings["limit_dev"] and "limit_dev" not in given:
        warn(f"{settings['limit_dev']} rows at most, as in the run: give --limit-dev for more")
    if settings["out"] is None:
        settings["out"] = str(Path(given["eval"]).parent)
    return checked(settings)


def check_stored(place, known, stored):
    """ValueError that names the options which a file of ours lacks, has too many, or spoilt."""
    differ = [f"{flag(name)} is new" for name in sorted(known - stored.keys())]
    differ += [f"{flag(name)} is unknown" for name in sorted(stored.keys() - known)]
    if differ:
        raise ValueError(f"{place} is of another version of this program: {', '.join(differ)}")
    for name in sorted(known):
        if not can_be(TABLE[name], stored[name], stored["method"]):
            raise ValueError(f"{place} is damaged: {flag(name)} cannot be {stored[name]!r:.60}")


def can_be(option, value, method):
    """Whether parse() and resolve() can have given an option that value."""
    kind = option.kind
    if value is None:                                      # of an adapter: the model was a folder
        return option.default is None or method not in option.methods or option.name == "model"
    if isinstance(kind, tuple):
        return value in kind
    if kind is bool:
        return type(value) is bool
    try:
        return value == kind(",".join(value) if kind is names else str(value))
    except (ValueError, TypeError, ArgumentTypeError):
        return False


def check_beside(stored, given, what):
    """ValueError that names all given options that must not stand beside --resume or --eval.

    what: "resume" or "eval". Beside it some are free, the rest is as the run or the adapter stores.
    """
    check_stored(given[what], STORED if what == "eval" else TABLE.keys(), stored)
    free = {name for name, option in TABLE.items() if what in option.beside}
    if what == "eval" and "predict" not in given:
        free.remove("out")                                 # nothing is written there
    elif what == "resume":                                 # what the run does not read
        free -= {"data_dir"} if stored["task"] == "own" else {"train_file", "dev_file"}
    differ = []
    for name in sorted(given.keys() - free):
        if name not in STORED:
            differ.append(f"no {flag(name)}")
        elif given[name] != stored[name]:
            differ.append(f"{flag(name)} {stored[name]}, not {given[name]}")
    if differ:
        raise ValueError(f"beside {flag(what)} stands {'; '.join(differ)}: leave that out")


def checked(settings):
    """The settings as a Namespace; ValueError for what is out of range or means nothing here.

    alpha, target-rank, schedules, and whether k and r are too large are judged where the matrices
    and the number of steps are known.
    """
    method = settings["method"]
    if settings["head_lr"] is None:
        settings["head_lr"] = settings["lr"]
    for name, option in TABLE.items():
        if settings[name] is not None:
            check_value(option, settings[name], method)
    for name in ("model", "data_dir", "train_file", "dev_file"):
        if settings[name] and os.path.exists(settings[name]):  # or a name on the Hub
            settings[name] = os.path.abspath(settings[name])   # --resume may be elsewhere
    return Namespace(**settings)


def check_value(option, value, method):
    """ValueError for a value that an option cannot have, or that means nothing to the method."""
    if method not in option.methods:
        raise ValueError(f"--{option.name} means nothing to --method {method}: leave it out")
    if option.kind is names:
        if len(set(value)) < len(value) or not set(value) <= set(names(option.default)):
            raise ValueError(f"--{option.name} {','.join(value)}: give some of {option.default}, "
                             "each once")
    elif option.limits:
        least, below = option.limits
        if not least <= value < below:
            most = f" and less than {below}" if below < math.inf else ""
            raise ValueError(f"--{option.name} {value}: give at least {least}{most}")
