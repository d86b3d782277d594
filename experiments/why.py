"""Why LoRA and LoRA² differ, measured on runs: how ΔW grows and turns, what R does to the pruning.

    python experiments/why.py --out FILE.json --model FOLDER --data-dir glue --workers 12

The options are study.py's. FILE.json is a study's; of its rows with rank-1 updates, on each task, a
few seeds run again with the tuning that was chosen there, and are watched. FILE-why.json holds what
was seen, from which FILE-why.md and FILE-why.svg are made (with --no-run: alone). Seen are, as
means over all adapters:

    size        ‖ΔW‖_F / ‖W0‖_F
    direction   cosine between ΔW now and ΔW in the end
    v, V        |cosine| between v now and at the start, V likewise; of LoRA A counts as v
    shared      of the singular values that would be kept by the gradients of task + γ R, the part
                that would be kept by the task's gradients alone, in % (nothing else differs)
"""
import contextlib
import io
import shutil
import sys
import tempfile
from concurrent.futures import TimeoutError, as_completed
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from experiments import grid as grids
from experiments import plot, search, study, summary, tables
from formats import disk
from lora2 import lora2_layers
from running.errors import Refused

ROWS = ("lora-r1", "lora2-k1-orthonormal", "lora2-k1-rates", "lora2-k1", "lora2-k1-gradient")
SEEDS = 3
EVERY = 9                               # steps between two looks
SERIES = {"size": "‖ΔW‖ / ‖W0‖", "direction": "cos(ΔW, its end)", "v": "|cos(v, its start)|"}
COLUMNS = {"size": "‖ΔW‖ / ‖W0‖ in the end", "direction": "cos(ΔW half-way, end)",
           "v": "cos(v end, start)", "V": "cos(V end, start)", "shared": "kept without γ R, %"}


# --- watching a run --------------------------------------------------------------------------

class Watch:
    """Looks at a run from inside: its methods stand before or behind functions of train.py."""

    def __init__(self):
        self.t, self.steps, self.looks = 0, [], []
        self.pruner = self.of_task = self.with_R = None    # the run's, and two that only count
        self.make_pruner = train.baselines.make_pruner
        self.gradients, self.update = train.gradients, train.update

    def see_pruner(self, *arguments, **more):
        """make_pruner()."""
        self.pruner = self.make_pruner(*arguments, **more)
        if arguments[0] == "lora2":
            self.of_task = self.make_pruner(*arguments, **more)
            self.with_R = self.make_pruner(*arguments, **more)
        return self.pruner

    def see_task(self, net, *rest):
        """gradients(): the task's alone are there when it has returned."""
        loss = self.gradients(net, *rest)
        if net.training:                                   # not those of --init gradient
            self.net = net
            if self.t % EVERY == 0:
                self.look()
            self.t += 1
            self.count(self.of_task)
        return loss

    def see_update(self, *arguments):
        """update(): R has been added."""
        self.count(self.with_R)
        self.update(*arguments)

    def count(self, pruner):
        """Let a pruner score what there is; it prunes nothing."""
        if pruner is not None and self.t <= pruner.total_steps - pruner.final:
            pruner.update_averages()

    @torch.no_grad()
    def look(self):
        """Keep ΔW as a LoRA, v and V of all adapters."""
        self.steps.append(self.t)
        seen = []
        for _, layer in lora2_layers(self.net):
            A, B = layer.to_lora()
            v, V = getattr(layer, "v", A), getattr(layer, "V", None)
            parts = {"A": A, "B": B, "v": v.flatten(), "V": None if V is None else V.flatten()}
            seen.append({name: part if part is None else part.clone().cpu()
                         for name, part in parts.items()})
        self.looks.append(seen)

    @torch.no_grad()
    def found(self):
        """What was seen, {name: [value at each look] or a value}."""
        self.look()                                        # the end
        bases = [layer.base.weight.norm().item() for _, layer in lora2_layers(self.net)]
        found = {"steps": self.steps, "size": [], "direction": [], "v": [], "V": []}
        for seen in self.looks:
            sizes = [product(a, a) ** 0.5 / W0 for a, W0 in zip(seen, bases)]
            found["size"].append(mean(sizes))
            found["direction"].append(mean(map(cosine_of_updates, seen, self.looks[-1])))
            for name in ("v", "V"):
                pairs = [(a[name], b[name]) for a, b in zip(seen, self.looks[0])]
                found[name].append(mean(abs(cosine(a, b)) for a, b in pairs if a is not None))
        if self.of_task is not None:
            chosen = [choice(pruner, self.pruner.kept_total)
                      for pruner in (self.of_task, self.with_R)]
            found["shared"] = 100 * len(chosen[0] & chosen[1]) / max(1, self.pruner.kept_total)
        return found


def product(a, b):
    """⟨ΔW_a, ΔW_b⟩ of two updates B A: the sum over (B_aᵀ B_b) ⊙ (A_a A_bᵀ)."""
    return ((a["B"].T @ b["B"]) * (a["A"] @ b["A"].T)).sum().item()


def cosine_of_updates(a, b):
    """The cosine between two updates; None where one is 0."""
    sizes = product(a, a) * product(b, b)
    return product(a, b) / sizes ** 0.5 if sizes > 0 else None


def cosine(a, b):
    """The cosine between two vectors."""
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def mean(values):
    """The mean of those that are not None; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def choice(pruner, how_many):
    """The indices of the singular values that a pruner would keep."""
    ranking = pruner.scores().flatten().argsort(descending=True, stable=True)
    return set(ranking[:how_many].tolist())


def watch(cell):
    """Run a cell in this process and remove its folder; what was seen, with the last score."""
    words = [*grids.command_line(cell.flags), "--out", str(cell.folder), "--overwrite"]
    seen, said = Watch(), io.StringIO()
    try:
        with (mock.patch.object(train.baselines, "make_pruner", seen.see_pruner),
              mock.patch.object(train, "gradients", seen.see_task),
              mock.patch.object(train, "update", seen.see_update),
              contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said)):
            status = train.main(words)
        if status:
            raise RuntimeError(f"{cell.folder.name}: status {status}, {said.getvalue()[-300:]}")
        result = disk.read_json(cell.folder / "result.json", "run it again")
        return {"row": cell.row, "task": cell.task, "seed": cell.seed,
                "score": result["last"]["score"], "device": result["device"]} | seen.found()
    finally:
        shutil.rmtree(cell.folder, ignore_errors=True)


# --- what to run, what to show ---------------------------------------------------------------

def cells_of(asked, seeds):
    """The runs to watch: of what has a choice that is inside its grid."""
    cells = []
    for task in asked.grid.tasks:
        for row in ROWS:
            points = study.tried(asked, row, task)
            if row in asked.plan and search.is_inside(points):
                for seed in range(seeds):
                    cells.append(study.make_cell(asked, row, task, seed, search.best(points)))
    return cells


def run_all(args, asked, path):
    """Watch all runs; what went wrong, a line each. The file is written after each."""
    content = {"command": args.command.replace("study.py", "why.py"), "runs": [],
               "rows": {row: grids.row_of(row)[0] for row in ROWS}, "tasks": asked.grid.tasks}
    failures, cells = [], cells_of(asked, min(SEEDS, args.seeds))
    if not cells:
        raise ValueError(f"{args.out} has no choice that is inside its grid: run study.py first")
    pool = study.make_pool(args.workers)
    futures = [pool.submit(watch, cell) for cell in cells]
    try:
        for future in as_completed(futures, args.seconds if args.seconds < 1e6 else None):
            try:
                content["runs"].append(future.result())
            except RuntimeError as error:
                failures.append(str(error))
            disk.write_file(path, summary.layout(content) + "\n")
    except TimeoutError:
        failures.append(f"the time was over: {len(content['runs'])} of {len(futures)} runs")
    finally:
        pool.shutdown(cancel_futures=True)
    return failures


def numbers(content, row, task, name):
    """A column's value of each seed."""
    found = []
    for one in content["runs"]:
        if (one["row"], one["task"]) == (row, task):
            values = one.get(name)
            if isinstance(values, list):
                values = values[len(values) // 2 if name == "direction" else -1]
            found.append(values)
    return [value for value in found if value is not None]


def page(content, picture):
    """Markdown: a table of means ± standard deviations over the seeds."""
    lines = []
    for task in content["tasks"]:
        for row, label in content["rows"].items():
            line = [tables.COLUMNS[task][0], label]
            for name in COLUMNS:
                values = numbers(content, row, task, name)
                digits = 1 if name == "shared" else 3
                line.append(tables.show(tables.summary(values), len(values), digits)
                            if values else "–")
            lines.append(line)
    devices = ", ".join(sorted({one["device"] for one in content["runs"]})) or "–"
    return "\n".join(["# Why it is as it is\n", f"![ΔW over training]({picture})\n",
                      tables.markdown(["task", "method", *COLUMNS.values()], lines),
                      f"{len(content['runs'])} runs, at most {SEEDS} seeds; device {devices}.\n",
                      "## How it was made\n", f"- `{content['command']}`\n"])


def draw(content, stem):
    """The series over training, of the first task that has runs: the mean over the seeds."""
    task = next((one["task"] for one in content["runs"]), None)
    figure, all_axes = plot.new_figure(len(SERIES), 2.4)
    for axes, (name, label) in zip(all_axes, SERIES.items()):
        for row, title in content["rows"].items():
            runs = [one for one in content["runs"] if (one["row"], one["task"]) == (row, task)]
            if runs:
                values = [mean(at) for at in zip(*(one[name] for one in runs))]
                axes.plot(runs[0]["steps"], [float("nan") if x is None else x for x in values],
                          label=title)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if task:
        all_axes[0].set_title(tables.COLUMNS[task][0], fontsize=10)
        all_axes[0].legend(fontsize=8)
    all_axes[-1].set_xlabel("optimizer step")
    return plot.save_svg(figure, stem)


def main(argv=None):
    """Watch runs, write what was seen; returns the exit status."""
    failures = []
    try:
        args = study.parse(sys.argv[1:] if argv is None else argv)
        path = Path(args.out)
        path = path.with_name(f"{path.stem}-why.json")
        if not args.no_run:
            with tempfile.TemporaryDirectory(dir=args.runs) as runs:
                failures = run_all(args, study.make_study(args, runs), path)
        content = disk.read_json(path, "run it without --no-run")
        stem = path.with_suffix("")
        disk.write_file(path.with_suffix(".md"), page(content, f"{stem.name}.svg"))
        with contextlib.suppress(ImportError):             # without matplotlib: later, --no-run
            draw(content, stem)
        print(path.with_suffix(".md"))
    except (ValueError, OSError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
