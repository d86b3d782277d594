"""The paper's tables by one command: run what is missing, write what there is, beside the paper's.

    python experiments/reproduce.py table1 --preset small --model FOLDER --data-dir glue
    python experiments/reproduce.py table1                    # DeBERTaV3-base: wants GPUs, and days
    python experiments/reproduce.py table1 --model roberta-large
    python experiments/reproduce.py table3 --tasks cola,stsb --seeds 0,1,2 --dry-run
    python experiments/reproduce.py study --workers 12 --seconds 300

    tune      learning rate and scale of each method, on a seed that is never reported
    table1    the methods                    table2    time per step
    table3    groups of the regulariser      table4    adapted matrices
    figure3   kept singular values           pruning   pruned against not pruned
    overlap   what Eq. 8 and Eq. 9 keep
    study     the methods, each with a tuning that is at no edge of what was tried
    why       small runs that look inside: why.py, which has options of its own

Each worker is a process that calls train.py's main() for one run after the other, each in a folder
of its own below RUNS/PRESET-MODEL, which lasts until the run is recorded. The records of all tables
are in OUT/PRESET-MODEL/runs.json (summary.py), written anew after each run; TABLE.md is made of
them (pages.py). What that file lists is not run again. However it was stopped, the same command
goes on. A run that diverged is recorded as that.
"""
import argparse
import multiprocessing
import os
import shlex
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from experiments import grid as grids
from experiments import pages, plot, search, summary, tables, workers
from formats import disk
from running import machine, options
from running.errors import Refused

PAPER = disk.read_json(grids.ROOT / "experiments" / "paper.json", "restore it")
NOTES = disk.read_json(grids.ROOT / "experiments" / "notes.json", "restore it")


# --- running ---------------------------------------------------------------------------------

def run_all(args):
    """Run what is missing, and say what goes wrong. Returns how many runs failed.

    A user's mistake ends it all as a ValueError, as do runs of another model, data or device beside
    which something would run. When stopped, the runs are told to save.
    """
    if grids.missing(args.grid):
        here = machine.name_of(machine.find_device(args.device, 0, 1))
        tables.check_sources(grids.finished(args.grid), here)
    started = time.monotonic()

    def keep(record):
        summary.write(args.grid.path, args.grid.file)
        left = len(grids.missing(args.grid))
        result = record.get("failed") or f"{record['last']['score']:.4f}"
        point = search.point_text(record["tuned"])
        print(f"[{time.monotonic() - started:.0f} s, {left} to go] {tables.name_of(record)}"
              f"{point and ': '}{point}: {result}", flush=True)

    with disk.alone(args.grid.path.parent, "reproduce.py"):
        pool = workers.make_pool(args.workers)
        try:
            return workers.run_all(args, pool, keep)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()     # SIGTERM: train.py saves its state and ends
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def list_grid(grid):
    """--dry-run: the state and the command of every run."""
    cells, later = grids.cells_of(grid)
    for cell in cells:
        state = "to run"
        if grids.record_of(grid, cell):
            state = "done  "
        elif (cell.folder / "last.pt").exists() and not grid.is_timed:
            state = "resume"
        words = [*grids.command_line(cell.flags), "--out", str(cell.folder)]
        print(state, shlex.join(["python", "train.py", *words]))
    for row, task in later:
        print(f"later  {row} on {task}: tuned by the runs above first")


# --- writing ---------------------------------------------------------------------------------

def notes_of(grid, preset):
    """The sentences below a table."""
    notes = []
    if grid.table in PAPER:
        notes += [*PAPER[grid.table]["notes"], PAPER["source"]]
    notes += NOTES.get(grid.table, []) + grid.file.get("notes", [])
    if grid.is_timed:
        steps_each = grid.preset["timed_steps"]
        return [*notes, f"{steps_each} steps of each run, with train.py's own settings."]
    notes += NOTES[preset]
    if grid.preset["points"]:
        notes.append(NOTES["tuned" if grid.table in ("tune", "table1") else "shared"])
    return notes


def paper_of(grid):
    """{row: what the paper says of it}; of Table 2 it does not say which k and r its rows have."""
    found = {}
    for name, entry in PAPER.get(grid.table, {"rows": {}})["rows"].items():
        row = grids.full_name(name, grid.preset["base"])
        if row in grid.rows or grid.is_timed:
            found[row] = entry
    return found


def content_of(args):
    """What a page is made of (pages.py): the table that was asked for, with its finished runs."""
    grid, table, tasks = args.grid, grids.TABLES[args.table], args.grid.tasks
    if grid.table == "tune":
        tasks = list(dict.fromkeys(grid.preset["tuned_on"].get(task, task) for task in tasks))
    labels, pairs = {}, []
    for row in grid.rows:               # of variants of one row their names alone
        labels[row], _, base = grids.row_of(row)
        if row != base and grid.starts:
            labels[row] = f"{grids.row_of(base)[0]}, {labels[row]}"
    for pair in table["pairs"]:
        pairs.append([grids.full_name(row, grid.preset["base"]) for row in pair])
    runs = grids.finished(grid)
    if not (grid.starts or grid.table == "tune"):          # they alone show what was tried
        runs = [run for run in runs if run["part"] == "reported"]
    return {"name": grid.table, "title": table["title"], "command": args.command,
            "model": args.name, "tasks": tasks, "rows": labels, "pairs": pairs,
            "notes": notes_of(grid, args.preset), "paper": paper_of(grid), "runs": runs}


# --- the command line ------------------------------------------------------------------------

def parse(argv):
    """Command line → what to do. ValueError with one sentence for a mistake."""
    parser = options.Parser(prog="experiments/reproduce.py", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            allow_abbrev=False)
    add = parser.add_argument
    add("table", choices=grids.TABLES)
    add("--preset", choices=grids.PRESETS, help="by default the table's first: paper")
    add("--model", help="name on the Hub, or a folder; by default the preset's")
    add("--data-dir", default="glue", help="folder of the GLUE files")
    add("--tasks", help="a,b,c; by default the table's")
    add("--rows", help="a,b,c; by default the table's")
    add("--seeds", help="a,b,c; by default 0,1,2, or the study's")
    add("--out", default="experiments/results", help="folder for tables (experiments/results), or "
        "the one file of records NAME.json, beside NAME.md")
    add("--runs", default="runs/reproduce", help="folder for runs (runs/reproduce)")
    add("--workers", type=int, default=max(1, len(workers.visible_gpus())),
        help="processes; by default one for each visible GPU, else one")
    add("--device", help="cuda or cpu; by default the first there is")
    add("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    add("--more", default="", help='options of train.py for all runs: "--limit-train 64"')
    add("--dry-run", action="store_true", help="list all runs and their state; run nothing")
    add("--no-run", action="store_true", help="write the page of the finished runs")
    args = parser.parse_args(argv)
    args.grid = make_grid(args)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: give at least 1")
    if args.grid.is_timed:                                 # what is timed runs alone
        args.workers = 1
    words = [word for word in argv if word != "--no-run"]
    args.command = summary.command_of("reproduce.py", words, "--model", "--data-dir", "--out",
                                      "--runs")
    return args


def chosen(words, known, what):
    """The names in "a,b,c", each once; all that are known for None. ValueError for another one."""
    names = list(known) if words is None else list(dict.fromkeys(words.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}: there are {', '.join(known)}")
    return names


def stages_of(args, rows):
    """[[rows], [seeds]]: the table's stages, cut to what was asked for, or one for each seed."""
    seeds = (args.seeds or "0,1,2").split(",")
    if not all(seed.isdecimal() and int(seed) != grids.TUNE_SEED for seed in seeds):
        raise ValueError(f"--seeds {args.seeds}: give numbers such as 0,1,2 and not "
                         f"{grids.TUNE_SEED}, by which learning rates are chosen")
    seeds = sorted(set(map(int, seeds)))
    stages = []
    in_turn = [[" ".join(rows), [seed]] for seed in seeds]
    for some, theirs in grids.TABLES[args.table].get("stages", in_turn):
        if args.seeds:
            theirs = [seed for seed in theirs if seed in seeds]
        stages.append([[row for row in some.split() if row in rows], theirs])
    return stages


def make_grid(args):
    """The Grid that a command line asks for. ValueError with one sentence for a mistake."""
    table = grids.TABLES[args.table]
    args.preset = chosen(args.preset, table["tasks"], f"preset of {args.table}")[0]
    preset = grids.PRESETS[args.preset]
    tasks = table["tasks"][args.preset].split()
    if args.tasks is not None:
        tasks = chosen(args.tasks, tables.COLUMNS, "task")
    rows = [grids.full_name(row, preset["base"]) for row in table["rows"][args.preset].split()]
    rows = chosen(args.rows, rows, "row")
    flags = {"model": args.model or preset["model"], "data-dir": args.data_dir} | preset["flags"]
    for name, value in options.parse(shlex.split(args.more)).items():
        flags[name.replace("_", "-")] = ",".join(value) if isinstance(value, list) else value
    if args.device:
        flags["device"] = args.device
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if flags.get("dtype") == "bf16" and machine.emulates_bf16(device):
        flags["dtype"] = "fp32"
    args.name = os.path.basename(os.path.abspath(flags["model"]))      # "." too, a name on the Hub
    folder = f"{args.preset}-{args.name}"
    path = Path(args.out) / folder / "runs.json"
    args.page = path.with_name(f"{args.table}.md")
    if args.out.endswith(".json"):
        path = Path(args.out)
        args.page = path.with_suffix(".md")
    file = {"settings": {}, "runs": []}
    if path.exists() or args.no_run:
        file = summary.load(path)
    return grids.Grid(args.table, preset, flags, tasks, rows, stages_of(args, rows),
                      table.get("starts", {}), args.table == "table2", path,
                      Path(args.runs) / folder, file)


def main(argv=None):
    """Run and write a table; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["why"]:
        from experiments import why                        # it reads a file of results
        return why.main(words[1:])
    status = 0
    try:
        args = parse(words)
        if args.dry_run:
            list_grid(args.grid)
            return 0
        for name in ("SIGTERM", "SIGHUP"):                 # end it as Ctrl-C does
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.default_int_handler)
        try:
            if not args.no_run:
                status = int(run_all(args) > 0)
        except KeyboardInterrupt:
            print("\nstopped: the same command goes on", file=sys.stderr)
            status = 130
        content = content_of(args)
        text = pages.page(content)      # before anything is written: it may be refused
        if content["name"] == "figure3":
            plot.figure3(content, args.page.with_suffix(""))
        disk.write_file(args.page, text)
        print(args.page)
    except (ValueError, OSError, ImportError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
