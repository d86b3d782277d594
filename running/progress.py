"""What a person sees of a run: settings and counts, bar or lines, the table and the map.

Of several processes the first one speaks and writes.
"""
import contextlib
import json
import math
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import data
import model as models
from formats import disk, glue
from lora2 import lora2_layers, orthogonality_floor
from running import options
from running.errors import user_errors

LOG_STEPS = 10                                             # between two lines of log.jsonl


# --- before a run -------------------------------------------------------------------------

def announce(o, here, plan, task, examples, net):
    """Before the first step: settings, counts, matches, schedule."""
    settings = vars(o) | {"dtype": here.dtype}
    print("settings  " + "  ".join(f"{name}={shown(value)}" for name, value in settings.items()
                                   if value is not None and value is not False))
    adapted, (body, head, frozen) = lora2_layers(net), counts(net).values()
    what = f"adapter parameters in {len(adapted)} matrices" if adapted else "backbone parameters"
    print(f"{body:,} {what} + {head:,} head parameters are trained, {frozen:,} are frozen")
    if o.alpha is not None:
        print(f"the update is scaled by alpha / r = {o.alpha / o.r:g}")
    for short in o.targets or []:
        modules = models.target_modules(net, [short])
        print(f"  {short:2} {len(modules)} × {modules[0]} ...")
    print(f"new weights: {', '.join(net.new_weights) or 'none'}")
    if o.target_rank is not None:
        print(f"{len(adapted) * o.r} singular values are pruned to {len(adapted) * o.target_rank} "
              f"between the steps {plan.prune_warmup} and {plan.steps - plan.prune_final}, every "
              f"{plan.prune_interval}")
    dev = next(name for name in examples if name != "train")
    print(f"{plan.steps} steps, warm-up {plan.lr_warmup}; the best is chosen by {task.metrics[0]} "
          f"on {dev}; {here.device}, {here.dtype}, {here.world} process(es)", flush=True)


def first_look(examples, task, tokenizer):
    """What the data turn out to be, for {split: Examples}."""
    for name, split in examples.items():
        length = split.starts.diff()                       # (N,)
        print(f"{name}: {len(length):,} rows of {length.min()} to {length.max()} tokens, half of "
              f"them up to {length.median()}; {split.truncated:,} are cut to {split.max_len}"
              f"{labels_text(split.labels, task)}")
    name, split = next(iter(examples.items()))
    ids = split.ids[:split.starts[1]][:60].tolist()
    words = [tokenizer.id_to_token(number) or "?" for number in ids]  # ?: check_ids() refuses it
    if split.labels is not None:                           # of --predict there are none
        words += ["→", shown(*glue.answers(task, split.labels[:1]))]
    print(f"first row of {name}: {' '.join(words)}", flush=True)


def labels_text(labels, task):
    """How many rows there are of each class, the most frequent first; or what scores: text."""
    if labels is None:                                     # of --predict
        return ""
    if not task.labels:
        scores = glue.answers(task, labels)
        mean, deviation = task.unit
        learns = f"; the model learns (score - {mean:g}) / {deviation:g}"
        return f"; scores {min(scores):g} to {max(scores):g}{learns}"
    counts = Counter(dict.fromkeys(task.labels, 0))
    counts.update(glue.answers(task, labels))
    texts = [f"{count:,} {label[:60]!r}" for label, count in counts.most_common(20)]
    more = f" and {len(counts) - 20} other classes" if len(counts) > 20 else ""
    positive = f"; f1 is of {task.labels[1]!r}" if "f1" in task.metrics else ""
    return f"; {', '.join(texts)}{more}{positive}"


def shown(value):
    """The value of an option as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(value) if isinstance(value, list) else str(value)


def counts(net):
    """Numbers of parameters: what the method trains, the head, the rest."""
    numbers = {"adapter_parameters": 0, "head_parameters": 0, "frozen_parameters": 0}
    for name, parameter in net.named_parameters():
        kind = "frozen"
        if parameter.requires_grad:
            kind = "head" if models.in_head(name, net.head_parts) else "adapter"
        numbers[f"{kind}_parameters"] += parameter.numel()
    return numbers


# --- during a run -------------------------------------------------------------------------

class Log(contextlib.ExitStack):
    """What is said before the first step; then log.jsonl, and a bar or about 20 lines.

    finite: its check() is called before a line about a step.
    """

    def __init__(self, o, plan, here, task, net, finite):
        super().__init__()                                 # its end closes the bar
        self.o, self.plan, self.here, self.task, self.net = o, plan, here, task, net
        self.finite = finite
        self.path = Path(o.out) / "log.jsonl"
        is_lora2 = o.method == "lora2"
        self.floor = orthogonality_floor(o.k, o.r, o.reg_terms) if is_lora2 else 0.0
        self.between = LOG_STEPS * math.ceil(plan.steps / 20 / LOG_STEPS)  # about 20 lines

    def start(self, state, examples):
        """Announce the run, which goes on from this state."""
        self.first_step, self.first_tokens = state.step, state.tokens
        self.started = time.perf_counter()                 # finer than others on Windows
        if not self.here.is_main:
            return
        announce(self.o, self.here, self.plan, self.task, examples, self.net)
        self.bar = tqdm(total=self.plan.steps, initial=state.step, unit="step",
                        dynamic_ncols=True, disable=None)  # None: where there is no terminal
        self.callback(self.bar.close)

    def is_due(self, step, between):
        """Whether a line belongs after this step."""
        return step % between == 0 or step in (1, self.plan.steps)

    def write(self, record):
        """One line of log.jsonl."""
        with (disk.writing(self.path, "make room, --resume"),
              open(self.path, "a", encoding="utf-8") as file):
            file.write(json.dumps(record, sort_keys=True) + "\n")

    def training(self, state, loss, R, kept, optimizer, pruner):
        """A line about step state.step, if one is due.

        loss, R: scalars on the device; R is given as the distance from its floor. kept: how many
        singular values the last selection kept, or None; then the pruner is asked where, and
        "ranks" lists it in the order of ranks.json. Tokens and seconds are the whole run's.
        """
        if not self.is_due(state.step, LOG_STEPS):
            return
        self.finite.check()
        if not self.here.is_main:
            return
        seconds = time.perf_counter() - self.started       # of this process, for the rates
        rate = round((state.tokens - self.first_tokens) / seconds)
        record = {"step": state.step, "loss": loss.item(), "lr": optimizer.param_groups[0]["lr"],
                  "tokens": state.tokens, "seconds": round(state.elapsed(), 3),
                  "tokens_per_second": rate}
        text = f"loss {record['loss']:.4f}"
        if R is not None:
            record["R"] = R.item() - self.floor
            text += f"  R {record['R']:.3f}"
        if kept is not None:
            record["kept"] = kept
            record["ranks"] = [count for _, count in sorted(pruner.kept().items())]
            text += f"  kept {kept}/{len(record['ranks']) * self.o.r}"
        if state.evaluations:
            text += f"  {self.task.metrics[0]} {state.evaluations[-1]['score']:.4f}"
        text += f"  {rate} tokens/s"
        self.write(record)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(state.step - self.bar.n)
        if self.bar.disable and self.is_due(state.step, self.between):
            left = seconds / (state.step - self.first_step) * (self.plan.steps - state.step)
            print(f"step {state.step}/{self.plan.steps}  {text}  {left:.0f} s left", flush=True)

    def evaluation(self, state, scores, predictions):
        """A line about the evaluation that was just made; see RunFolder.note_evaluation()."""
        if not self.here.is_main:
            return
        warn_if_equal(predictions)
        evaluation = state.evaluations[-1]
        self.write(evaluation)
        best = "  (best so far)" if evaluation is state.best else ""
        tqdm.write(f"step {state.step}/{self.plan.steps}  {scores_text(scores)}{best}")
        sys.stdout.flush()


def bar_around(batches, total, here):
    """The batches, which are predicted, with a bar if there is a terminal."""
    return tqdm(batches, "predicting", total, leave=False, unit="batch", dynamic_ncols=True,
                disable=None if here.is_main else True)


def warn_if_equal(predictions):
    """Say so if all predictions for a dev split, {split: (N,)}, are one and the same."""
    for name, p in predictions.items():
        if len(p) > 1 and bool((p == p[0]).all()):
            disk.warn(f"all {len(p)} predictions for {name} are equal: the model may have "
                      "collapsed; a smaller --lr or a longer --warmup may help")


def show_scores(scores, predictions):
    """What --eval says: {dev split: {metric: value}}."""
    warn_if_equal(predictions)
    print(scores_text(scores))


def scores_text(splits):
    """{split: {metric: value}} as text."""
    texts = []
    for split, values in splits.items():
        numbers = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
        texts.append(f"{split} {numbers}")
    return "; ".join(texts)


# --- after a run --------------------------------------------------------------------------

def kept_map(kept, r):
    """The kept singular values as a picture: matrices down, layers across, as in Figure 3.

    kept: {module name: count}; r: the count at the start.
    """
    cells = {place_of(name): count for name, count in kept.items()}  # (matrix, layer)
    layers = sorted({layer for _, layer in cells})
    lines = [f"kept of {r} singular values, layers {layers[0]} to {layers[-1]} from left to right"]
    for matrix in models.TARGETS["bert"]:                   # the same short names in every family
        counts = [cells.get((matrix, layer)) for layer in layers]
        if counts != [None] * len(layers):
            shades = [f"{n or 0:2}{' ░▒▓█'[math.ceil(4 * (n or 0) / r)]}" for n in counts]
            lines.append(f"  {matrix:2} {' '.join(shades)}")
    return "\n".join(lines)


def place_of(name):
    """Which matrix, in which layer: "bert.encoder.layer.3.output.dense" → ("f2", 3).

    ValueError for any other module.
    """
    layer, _, end = name.rpartition("layer.")[2].partition(".")  # "3", "output.dense"
    for targets in models.TARGETS.values():
        for short, path in targets.items():
            if end == path and layer.isdecimal():
                return short, int(layer)
    raise ValueError(f"{name} is no matrix of an encoder layer")


def summary(result, folder):
    """The table of a finished run, from its result.json, and how to evaluate its adapter."""
    lines = []
    for name in ("best", "last"):
        line = f"{name}  step {result[name]['step']:6}  {scores_text(result[name]['scores'])}"
        if result[name].get("kept") is not None:
            line += f"  kept {result[name]['kept']} of {result['singular_values']}"
        lines.append(line)
    memory = f", at most {result['peak_memory_gb']} GB" if result.get("peak_memory_gb") else ""
    lines.append(f"{result['seconds']:.0f} s{memory}; files in {folder}; to evaluate the best "
                 "again:")
    words = [f"{options.flag(name)} {shlex.quote(value)}"
             for name, value in evaluation_of(result, folder).items()]
    lines.append(f"  python train.py {' '.join(words)}")
    return "\n".join(lines)


def evaluation_of(result, folder):
    """The options that evaluate the adapter of a finished run."""
    settings = result["settings"]
    places = {"own": ["dev_file"], "demo": []}.get(result["task"], ["data_dir"])
    given = {"eval": str(Path(folder) / "adapter.safetensors"), "model": settings["model"]}
    return given | {name: settings[name] for name in places}


@user_errors()
def finished(given, result):
    """Show the finished run of --resume; the options for what more is asked of it, or {}."""
    folder, settings = given["resume"], result["settings"]
    options.check_beside(settings, given, "resume")
    with disk.reading(f"{folder}/result.json", f"remove it, and --resume {folder} makes it anew"):
        text = summary(result, folder)
    print(f"this run is finished:\n{text}")
    if not given.keys() & options.AFTERWARDS:
        return {}
    place, task = settings["data_dir"], data.TASKS.get(settings["task"])
    if "data_dir" not in given and task and glue.is_missing(task, place, train=False):
        raise ValueError(f"{place} does not hold {task.folder} any more: give a --data-dir")
    beside = {name: given[name] for name in given if "eval" in options.TABLE[name].beside}
    return evaluation_of(result, folder) | beside
