"""The paper's tables by one command: run what is missing, write what there is, beside the paper's.

    python experiments/reproduce.py table1 --preset small --model FOLDER --data-dir glue
    python experiments/reproduce.py table1                    # DeBERTaV3-base: wants GPUs, and days
    python experiments/reproduce.py table1 --model roberta-large
    python experiments/reproduce.py table3 --tasks cola,stsb --seeds 0,1,2 --dry-run

    tune      learning rate and scale of each method, on a seed that is never reported
    table1    the methods                    table2    time per step
    table3    groups of the regulariser      table4    adapted matrices
    figure3   kept singular values           pruning   pruned against not pruned
    overlap   what Eq. 8 and Eq. 9 keep

Each run is one call of train.py in a folder of its own below RUNS/PRESET-MODEL (grid.py says
which). However it was stopped, the same command goes on. What tables need of finished runs goes
into OUT/PRESET-MODEL/TABLE.json (summary.py), from which TABLE.md is made (tables.py). A run that
such a file lists is not run again. As many runs go at once as there are GPUs.
"""
import argparse
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from experiments import grid as grids
from experiments import plot, summary, tables
from formats import disk
from running import machine, options

TRAIN = [sys.executable, str(grids.ROOT / "train.py")]
PAPER = disk.read_json(grids.ROOT / "experiments" / "paper.json", "restore it")
NOTES = disk.read_json(grids.ROOT / "experiments" / "notes.json", "restore it")


# --- running ---------------------------------------------------------------------------------

def execute(cell, resume, device, processes, stop):
    """Run train.py to its end; (exit status, what it said last)."""
    place = ["--resume", str(cell.folder)] if resume else ["--out", str(cell.folder), "--overwrite"]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
    process = subprocess.Popen(TRAIN + grids.command_line(cell.flags) + place, env=env, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               start_new_session=True)     # Ctrl-C is ours
    processes.append(process)
    if stop.is_set():                                      # since we asked for the last time
        process.terminate()
    _, said = process.communicate()
    last = (said.strip().splitlines() or ["no message"])[-1]
    return process.returncode, last.removeprefix("error: ")


def tidy(cell, keep):
    """Note what tables need of a finished run; then remove what is large, unless `keep`."""
    record = summary.record(cell, grids.is_timed(cell))
    disk.write_file(cell.folder / "record.json", summary.layout(record) + "\n")
    for path in [cell.folder / "last.pt", cell.folder / "adapter.safetensors",
                 *cell.folder.glob("predictions_*.tsv")]:
        if not keep:
            path.unlink(missing_ok=True)


class Progress:
    """A line for each run that has ended."""

    def __init__(self, total):
        self.total, self.done, self.ran, self.started = total, 0, 0, time.monotonic()

    def show(self, text):
        self.done, self.ran = self.done + 1, self.ran + 1
        left = (time.monotonic() - self.started) / self.ran * (self.total - self.done)
        print(f"[{self.done}/{self.total}, about {left / 3600:.1f} h left] {text}", flush=True)


def run_one(cell, devices, processes, stop):
    """Run a cell to its end on a device that is free; (exit status, what it said last)."""
    device, resume = devices.get(), grids.is_begun(cell)
    try:
        if stop.is_set():
            return 1, "stopped"
        status, said = execute(cell, resume, device, processes, stop)
        if status == 2 and resume:      # its files do not fit together: begin anew
            status, said = execute(cell, False, device, processes, stop)
        if status == 2:
            stop.set()
        return status, said
    finally:
        devices.put(device)


def run_all(args, cells, progress):
    """Run the cells that are not finished, args.jobs at once. Returns what went wrong, a line each.

    A user's mistake (status 2) ends the whole grid as a ValueError. When stopped, the runs are told
    to save.
    """
    waiting = [cell for cell in cells if grids.record_of(args.grid, cell) is None]
    progress.done += len(cells) - len(waiting)
    devices, processes, failures, stop = queue.Queue(), [], [], threading.Event()
    for i in range(args.jobs):
        devices.put(args.gpus[i % len(args.gpus)] if args.gpus else None)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            futures = {}
            for cell in waiting:
                futures[pool.submit(run_one, cell, devices, processes, stop)] = cell
            for future in as_completed(futures):
                cell, (status, said) = futures[future], future.result()
                if status == 2:
                    raise ValueError(said)
                if status:
                    failures.append(f"{cell.folder}: status {status}, {said}")
                else:
                    tidy(cell, args.keep)
                name = cell.folder.relative_to(args.grid.runs)
                progress.show(f"{name} {said if status else 'done'}")
        except BaseException:
            stop.set()                  # what has not begun does not begin
            for process in processes:
                process.terminate()     # SIGTERM: train.py saves its state and ends
            raise
    return failures


def run_grid(args):
    """Run what a table needs: task by task the tuning, then the rows. Returns what went wrong."""
    grid, failures = args.grid, []
    each = 0 if grid.table == "tune" else len(grid.rows) * len(grid.seeds)
    progress = Progress(sum(len(grids.tuning_cells(grid, task)) + each for task in grid.tasks))
    for task in grid.tasks:
        failures += run_all(args, grids.tuning_cells(grid, task), progress)
        failures += run_all(args, grids.reported_cells(grid, task), progress)
    return failures


def list_grid(grid):
    """--dry-run: the state and the command of every run."""
    cells, later = {}, []               # a dict: two tasks may share their tuning
    for task in grid.tasks:
        reported = grids.reported_cells(grid, task)
        cells |= dict.fromkeys(grids.tuning_cells(grid, task) + reported)
        tuned = {cell.row for cell in reported}
        if grid.table != "tune":
            later += [f"{row} on {task}" for row in grid.rows if row not in tuned]
    for cell in cells:
        state = "resume" if grids.is_begun(cell) else "to run"
        if grids.record_of(grid, cell):
            state = "done  "
        words = [*grids.command_line(cell.flags), "--out", str(cell.folder)]
        print(state, shlex.join(["python", "train.py", *words]))
    for what in later:
        print(f"later  {what}, seeds {grid.seeds}: tuned by the runs above first")


# --- writing ---------------------------------------------------------------------------------

def notes_of(args):
    """The sentences below a table."""
    grid, notes = args.grid, []
    if grid.table in PAPER:
        notes += [*PAPER[grid.table]["notes"], PAPER["source"]]
    notes += NOTES.get(grid.table, [])
    if grid.table == "table2":
        steps = grid.preset["timed_steps"]
        return [*notes, f"{steps} steps of each run, with train.py's own settings."]
    notes += NOTES[args.preset]
    if grid.preset["lrs"]:
        notes.append(NOTES["tuned"] if grid.table in ("tune", "table1") else NOTES["shared"])
    return notes


def write_table(args):
    """Write TABLE.json and TABLE.md of the finished runs; returns the path of the latter.

    What TABLE.json held before and the table does not show stays in it, as "left_out".
    """
    grid, path = args.grid, args.grid.folder / f"{args.table}.json"
    runs = grids.finished(grid)
    if grid.table != "overlap":
        runs = [{name: run[name] for name in run if name != "kept"} for run in runs]
    before = summary.load(path) if path.exists() else {"runs": [], "left_out": []}
    shown = [run["settings"] for run in runs]
    left_out = [run for run in before["runs"] + before["left_out"] if run["settings"] not in shown]
    tasks, seeds = grid.tasks, grid.seeds
    if grid.table == "tune":
        tasks = list(dict.fromkeys(grids.tuned_on(grid.preset, task) for task in tasks))
        seeds = [grids.TUNE_SEED]
    paper = PAPER.get(grid.table, {"rows": {}})["rows"]
    if grid.table != "table2":          # whose rows are tasks
        paper = {row: paper[name] for row, name in grid.rows.items() if name in paper}
    labels = {row: grids.row_of(row)[0] for row in grid.rows}
    content = {"name": grid.table, "title": grids.TABLES[grid.table]["title"],
               "command": args.command, "model": grid.model, "tasks": tasks, "seeds": seeds,
               "rows": labels, "pairs": grid.pairs, "notes": notes_of(args), "paper": paper,
               "runs": runs, "left_out": left_out}
    text = tables.page(content)         # before anything is written: it may be refused
    grid.folder.mkdir(parents=True, exist_ok=True)
    if grid.table == "figure3":
        plot.figure3(content, grid.folder / grid.table)
    summary.write(path, content)
    disk.write_file(path.with_suffix(".md"), text)
    return path.with_suffix(".md")


# --- the command line ------------------------------------------------------------------------

def parse(argv):
    """Command line → what to do. ValueError with one sentence for a mistake."""
    parser = options.Parser(prog="experiments/reproduce.py", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            allow_abbrev=False)
    add = parser.add_argument
    add("table", choices=grids.TABLES)
    add("--preset", choices=grids.PRESETS, default="paper")
    add("--model", help="name on the Hub, or a folder; by default the preset's")
    add("--data-dir", default="glue", help="folder of the GLUE files")
    add("--tasks", help="a,b,c; by default the table's")
    add("--seeds", default="0,1,2", help="a,b,c")
    add("--out", default="experiments/results", help="folder for tables (experiments/results)")
    add("--runs", default="runs/reproduce", help="folder for runs (runs/reproduce)")
    add("--jobs", type=int, help="runs at once; by default one for each visible GPU, else one")
    add("--keep", action="store_true", help="keep adapters, last.pt, predictions of finished runs")
    add("--dry-run", action="store_true", help="list all runs and their state; run nothing")
    add("--no-run", action="store_true", help="write the table from what is finished")
    args = parser.parse_args(argv)
    args.grid = make_grid(args)
    args.gpus = visible_gpus()
    if args.jobs is None:
        args.jobs = max(1, len(args.gpus))
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: give at least 1")
    if args.table == "table2":                             # what is timed runs alone
        args.jobs = 1
    args.command = shlex.join(["python", "experiments/reproduce.py", *argv])
    return args


def make_grid(args):
    """The Grid that a command line asks for. ValueError with one sentence for a mistake."""
    preset, table = grids.PRESETS[args.preset], grids.TABLES[args.table]
    tasks = table["tasks"][args.preset].split()
    if args.tasks is not None:
        tasks = list(dict.fromkeys(args.tasks.split(",")))
    for task in tasks:
        if task not in tables.COLUMNS:
            known = ", ".join(tables.COLUMNS)
            raise ValueError(f"there is no task {task!r}: the tasks are {known}")
    seeds = args.seeds.split(",")
    if not all(seed.isdecimal() and int(seed) != grids.TUNE_SEED for seed in seeds):
        raise ValueError(f"--seeds {args.seeds}: give numbers such as 0,1,2 and not "
                         f"{grids.TUNE_SEED}, by which learning rates are chosen")
    base = preset["base"]
    rows, pairs = {}, []
    for row in table["rows"][args.preset].split():
        rows[grids.full_name(row, base)] = grids.full_name(row, "lora2-k1")
    for pair in table["pairs"]:
        a, b = (grids.full_name(row, base) for row in pair)
        if a in rows and b in rows:     # a preset may lack a row
            pairs.append([a, b])
    flags = dict(preset["flags"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if flags.get("dtype") == "bf16" and machine.emulates_bf16(device):
        flags["dtype"] = "fp32"
    model = args.model or preset["model"]
    name = os.path.basename(os.path.abspath(model))        # of "." too, and of a name on the Hub
    folder = Path(args.out) / f"{args.preset}-{name}"
    return grids.Grid(args.table, preset, flags, model, args.data_dir, tasks, rows, pairs,
                      sorted(set(map(int, seeds))), folder,
                      Path(args.runs) / f"{args.preset}-{name}", summary.load_all(folder))


def visible_gpus():
    """What to set CUDA_VISIBLE_DEVICES to for each GPU that there is for us."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def stop_on_signals():
    """Have SIGTERM, and a lost terminal's SIGHUP, end this program as Ctrl-C does."""
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.default_int_handler)


def main(argv=None):
    """Run and write a table; returns the exit status."""
    failures, status = [], 0
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.dry_run:
            list_grid(args.grid)
            return 0
        stop_on_signals()
        try:
            if not args.no_run:
                with disk.alone(args.grid.runs, "reproduce.py", "--runs"):
                    failures = run_grid(args)
        except KeyboardInterrupt:
            print("\nstopped: the same command goes on", file=sys.stderr)
            status = 130
        print(write_table(args))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return status or int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
