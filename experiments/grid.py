"""Which runs of train.py the paper's tables consist of, and which of those are finished.

tables.json says what a table has: rows and tasks. A cell is one run, of a row on a task with a
seed, in a folder of its own. A run is finished if there is a record of it (summary.py), in that
folder or in a TABLE.json, with the very settings that are asked for.
"""
import functools
from pathlib import Path
from typing import NamedTuple

from experiments import search, summary, tables
from formats import disk
from running import options

ROOT = Path(__file__).resolve().parents[1]
TIMING = "timing"                       # the folder of Table 2's runs
TUNE_SEED = 1000                        # of the runs that choose, never of a reported one
# Presets: "paper" has train.py's own settings, which are the authors'. In "small", on CoLA all
# methods are near chance after 3 epochs: too early to choose by. On RTE they are after 6, and its
# dev set has 277 rows: the best of six such runs would be luck, so that it has MRPC's tuning.
# Rows: label, options of train.py. LoRA and SoRA have their authors' alpha / r = 2 where it is not
# tuned. What AdaLoRA calls r = 2 is what pruning leaves (0.32M survive): it begins with 3.
# Variants: of the preset's base row, whose tuning they share; in a table their names alone.
# Pairs of a table: rows whose difference it shows.
GIVEN = disk.read_json(ROOT / "experiments" / "tables.json", "restore it")
PRESETS, TABLES = GIVEN["presets"], GIVEN["tables"]
ROWS, VARIANTS = GIVEN["rows"], GIVEN["variants"]


class Cell(NamedTuple):
    """One run of train.py."""
    row: str
    task: str
    seed: int
    folder: Path
    flags: tuple                        # options of train.py: (name, value)


class Grid(NamedTuple):
    """What was asked for: a table on a model, with all that decides what its runs are."""
    table: str
    preset: dict
    flags: dict                         # options of train.py that all runs share
    model: str
    data_dir: str
    tasks: list
    rows: dict                          # row → its name in paper.json
    pairs: list
    seeds: list
    folder: Path                        # of the table's files
    runs: Path                          # of the run folders
    known: list                         # records of finished runs in the folder's tables


def full_name(row, base):
    """The row that a name in TABLES means, given the base row: "noreg" → "lora2-k1-noreg"."""
    if row == "base":
        return base
    return f"{base}-{row}" if row in VARIANTS else row


def row_of(name):
    """(label, options, the row whose tuning it uses) of a row, or of a variant of one."""
    base, _, variant = name.rpartition("-")
    if variant in VARIANTS:
        label, flags = VARIANTS[variant]
        return label, ROWS[base][1] | flags, base
    return *ROWS[name], name


def command_line(flags):
    """((name, value), ...) as words for train.py."""
    words = []
    for name, value in flags:
        words += [f"--{name}", str(value)]
    return words


@functools.cache
def settings_of(flags):
    """All settings that train.py would run with; ValueError for what it would refuse."""
    return vars(options.resolve(options.parse(command_line(flags))))


def make_cell(grid, row, task, seed, tuned, part="reported", **extra):
    """A row's run on a task. tuned: {"lr": ..., "scale": ...}, or {} for train.py's presets.

    The folder's name says how it is tuned: runs with another choice have others.
    """
    flags = {"task": task, "model": grid.model, "data-dir": grid.data_dir, "seed": seed}
    flags |= grid.flags | row_of(row)[1] | extra
    task_settings = settings_of((("task", task), ("method", flags.get("method", "lora2"))))
    if flags.get("r") == "target-rank":                    # as small at first as others in the end
        flags["r"] = task_settings["target_rank"]
    r = flags.get("r", task_settings["r"])
    if "r" in flags:
        flags.setdefault("alpha", task_settings["alpha"])  # given r alone, the scale would stay
    if flags.get("target-rank") == "r":
        flags["target-rank"] = r
    if "lr" in tuned:
        flags["lr"] = tuned["lr"]
    if "scale" in tuned:
        flags["alpha"] = tuned["scale"] * r
    tag = "".join(f"-{name}{value:g}" for name, value in tuned.items())
    folder = grid.runs / part / task / f"{row}{tag}-s{seed}"
    return Cell(row, task, seed, folder, tuple(flags.items()))


def is_timed(cell):
    """Whether a cell is one of Table 2's."""
    return cell.folder.parent.parent.name == TIMING


def tuned_on(preset, task):
    """The task whose tuning a task has: its own, unless the preset names another."""
    return preset["tuned_on"].get(task, task)


def tunings(grid, row, task):
    """[(tuning, its cell)]: one grid for all rows, but for the lower rates of full fine-tuning."""
    task = tuned_on(grid.preset, task)
    method = row_of(row)[1].get("method", "lora2")
    found = []
    for lr in grid.preset["lrs"]:
        rate = {"lr": float(f"{lr / 10:g}") if method == "full" else lr}
        for scale in grid.preset["scales"] if method in options.ADAPTERS else [None]:
            tuned = rate if scale is None else rate | {"scale": scale}
            extra = grid.preset["tuning"].get(task, {})
            found.append((tuned, make_cell(grid, row, task, TUNE_SEED, tuned, "tune", **extra)))
    return found


def choose(grid, row, task):
    """The tuning with the best score, the first of equals.

    {}: nothing is tuned; None: no run is finished. The score is that after the last step, as it is
    reported: the best of many evaluations near chance is luck.
    """
    if not grid.preset["lrs"]:
        return {}
    tried = []
    for tuned, cell in tunings(grid, row_of(row)[2], task):
        run = record_of(grid, cell)
        if run:
            tried.append((tuned, run["last"]["score"]))
    return search.best(tried)


def tuning_cells(grid, task):
    """The tuning runs that the table's rows depend on, each once."""
    rows = [] if grid.table == "table2" else dict.fromkeys(row_of(row)[2] for row in grid.rows)
    return [cell for row in rows for _, cell in tunings(grid, row, task)]


def reported_cells(grid, task):
    """The runs of the table's rows, without those whose tuning has yet to run."""
    if grid.table == "tune":
        return []
    cells = []
    if grid.table == "table2":          # seed by seed, one method after the other
        extra = {"max-steps": grid.preset["timed_steps"], "limit-dev": 32}
        for seed in grid.seeds:
            cells += [make_cell(grid, row, task, seed, {}, TIMING, **extra) for row in grid.rows]
        return cells
    for row in grid.rows:
        tuned = choose(grid, row, task)
        if tuned is not None:
            cells += [make_cell(grid, row, task, seed, tuned) for seed in grid.seeds]
    return cells


# --- what is there ---------------------------------------------------------------------------

def record_of(grid, cell):
    """The record of a finished run, in its folder or in a table; None without one.

    ValueError if the folder holds a finished run with other settings.
    """
    asked = summary.comparable(settings_of(cell.flags))
    path = cell.folder / "record.json"
    if path.exists():
        run = disk.read_json(path, f"remove {cell.folder} and run it again")
        found = run["settings"]
        for name in sorted(asked.keys() | found.keys()):
            if asked.get(name) != found.get(name):
                raise ValueError(f"{cell.folder} holds a run with {options.flag(name)} "
                                 f"{found.get(name)}, not {asked.get(name)}: move it away, or give "
                                 "another --runs")
        return run
    for run in grid.known:
        is_enough = grid.table != "overlap" or cell.seed == TUNE_SEED or "kept" in run
        if run["settings"] == asked and is_enough:
            return run | {"row": cell.row}
    return None


def is_begun(cell):
    """Whether a run can go on. A timed one never does: its log would be of two times of day."""
    return (cell.folder / "last.pt").exists() and not is_timed(cell)


def finished(grid):
    """The records of the table's finished runs.

    ValueError if they, and the runs that chose their tuning, are not of one model and of one data
    set for each task.
    """
    shown, all_runs = [], []
    for task in grid.tasks:
        tuned, reported = tuning_cells(grid, task), reported_cells(grid, task)
        for cell in reported + tuned:
            run = record_of(grid, cell)
            if run and run not in all_runs:                # two tasks may share their tuning
                all_runs.append(run)
                if cell in (tuned if grid.table == "tune" else reported):
                    shown.append(run)
    check_sources("models", all_runs, "base")
    for task in tables.COLUMNS:
        check_sources(f"{task} data", [run for run in all_runs if run["task"] == task], "rows")
    return shown


def check_sources(what, runs, name):
    """ValueError unless the runs that have a fingerprint of this name have the same one."""
    known = [run for run in runs if run[name] is not None]
    for run in known:
        if run[name] != known[0][name]:
            raise ValueError(f"{tables.name_of(known[0])} and {tables.name_of(run)} are runs on "
                             f"different {what} of one name: give another --runs and --out")
