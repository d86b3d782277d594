"""Which runs of train.py a table consists of, which are finished, and what has to run next.

tables.json says what a table has: rows, tasks, seeds. A cell is one run, of a row on a task with a
seed. It is finished if the model's file (summary.py) has a record with the very settings that are
asked for.
"""
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

from experiments import search, summary, tables
from formats import disk
from running import options

ROOT = Path(__file__).resolve().parents[1]
TUNE_SEED = 1000                        # of the runs that choose, never of a reported one
# Presets: "paper" has train.py's own settings, which are the authors'. In "small", on CoLA all
# methods are near chance after 3 epochs: too early to choose by. On RTE they are after 6, and its
# dev set has 277 rows: the best of six such runs would be luck, so that it has MRPC's tuning.
# Rows: label, options of train.py. LoRA and SoRA have their authors' alpha / r = 2 where it is not
# tuned. What AdaLoRA calls r = 2 is what pruning leaves (0.32M survive): it begins with 3.
# Variants: of the preset's base row, whose tuning they share; in a table their names alone.
# Pairs of a table: rows whose difference it shows.
# Stages: [rows, seeds], in the order in which they run; by default one for each seed.
# Starts: where the search for a row's tuning begins (search.py); else a preset may have its points.
GIVEN = disk.read_json(ROOT / "experiments" / "tables.json", "restore it")
PRESETS, TABLES = GIVEN["presets"], GIVEN["tables"]
ROWS, VARIANTS = GIVEN["rows"], GIVEN["variants"]


class Cell(NamedTuple):
    """One run of train.py."""
    row: str
    task: str
    seed: int
    tuned: tuple                        # its point on the grid: (("lr", 0.001), ...)
    folder: Path                        # while it lasts
    flags: tuple                        # options of train.py: (name, value)


class Grid(NamedTuple):
    """What was asked for: a table on a model, with all that decides what its runs are."""
    table: str
    preset: dict
    flags: dict                         # options of train.py that all runs share
    tasks: list
    rows: list
    stages: list                        # [[rows], [seeds]], in the order in which they run
    starts: dict                        # {row: where its search begins}; {} if there is none
    is_timed: bool                      # measures time: nothing is tuned, no run goes on later
    path: Path                          # of the file of records
    runs: Path                          # of the run folders
    file: dict                          # what that file holds


# --- what a run is ---------------------------------------------------------------------------

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
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return words


@functools.cache
def settings_of(flags):
    """All settings that train.py would run with; ValueError for what it would refuse."""
    return vars(options.resolve(options.parse(command_line(flags))))


def own_settings(cell):
    """The settings that tell the run of a cell from others, as they stand in its record."""
    return summary.comparable(settings_of(cell.flags))


def make_cell(grid, row, task, seed, tuned):
    """A row's run on a task. tuned: {"lr": ..., "scale": ..., "outer": ...}, or {} for presets.

    The folder's name says how it is tuned: runs with another choice have others.
    """
    flags = {"task": task} | grid.flags | row_of(row)[1] | {"seed": seed}
    if grid.is_timed:
        flags |= {"max-steps": grid.preset["timed_steps"], "limit-dev": 32}
    elif seed == TUNE_SEED:
        flags |= grid.preset["tuning"].get(task, {})
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
    if "outer" in tuned:
        flags["outer-lr"] = float(f"{tuned['lr'] * tuned['outer']:g}")
    tag = "-timed" if grid.is_timed else ""
    tag += "".join(f"-{name}{value:g}" for name, value in tuned.items())
    folder = grid.runs / task / f"{row}{tag}-s{seed}"
    return Cell(row, task, seed, tuple(tuned.items()), folder, tuple(flags.items()))


def about(cell):
    """How the record of a cell begins."""
    return {"row": cell.row, "task": cell.task, "seed": cell.seed,
            "part": "tune" if cell.seed == TUNE_SEED else "reported", "tuned": dict(cell.tuned)}


def record_of(grid, cell):
    """The record of a finished run, of whatever row; None without one."""
    settings = own_settings(cell)
    for run in grid.file["runs"]:
        if run["settings"] == settings:                    # 8 and 8.0 are the same
            return run | about(cell)
    return None


# --- how a row is tuned ----------------------------------------------------------------------

def tuning_of(grid, row, task):
    """([cell], the point that is chosen): all that the tuning of a row has tried or tries next.

    row, task: those whose tuning it is. The choice is the best, the first of equals; None before
    all have run, or if the best is at an edge where a search goes on; {} if nothing is tuned.
    """
    fixed = grid.preset["points"]
    if grid.is_timed or not (grid.starts or fixed):
        return [], {}
    if grid.starts:                                        # those in the file, in its order
        points = [point for point, _ in search.tried(grid.file, row, task)]
    else:
        points = fixed.get(row, fixed["others"])
    tried = []
    for point in points:
        run = record_of(grid, make_cell(grid, row, task, TUNE_SEED, point))
        if run:
            tried.append((point, tables.final_score(run)))
    if grid.starts:
        points = [point for point, _ in tried] + search.missing(tried, grid.starts[row])
    cells = [make_cell(grid, row, task, TUNE_SEED, point) for point in points]
    has_all = len(tried) == len(points) and (not grid.starts or search.is_inside(tried))
    return cells, search.best(tried) if has_all else None


# --- what runs -------------------------------------------------------------------------------

def cells_of(grid):
    """([cell] in the order in which they run, [(row, task)] that wait).

    A stage begins with what tunes its rows. What waits has no reported cell before its tuning has
    run. Each cell is there once, as rows and tasks may share their tuning.
    """
    cells, later = {}, {}                                  # as sets in order
    for rows, seeds in grid.stages:
        reported = []
        for task, row in itertools.product(grid.tasks, rows):
            tuned_on = grid.preset["tuned_on"].get(task, task)
            tuning, chosen = tuning_of(grid, row_of(row)[2], tuned_on)
            cells |= dict.fromkeys(tuning)
            if grid.table == "tune":
                continue
            if chosen is None:
                later[row, task] = None
            else:
                reported += [make_cell(grid, row, task, seed, chosen) for seed in seeds]
        cells |= dict.fromkeys(reported)
    return list(cells), list(later)


def missing(grid):
    """[cell] of all that can run now and has no record, in order."""
    return [cell for cell in cells_of(grid)[0] if not record_of(grid, cell)]


def finished(grid):
    """The records of all runs of a table that there are."""
    return [run for cell in cells_of(grid)[0] if (run := record_of(grid, cell))]
