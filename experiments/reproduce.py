"""The paper's tables by one command: run what is missing, write what there is, beside what the paper reports.

    python experiments/reproduce.py table1 --preset small --model models/all-MiniLM-L6-v2 --data-dir glue
    python experiments/reproduce.py table1                           # DeBERTaV3-base: wants GPUs, and days
    python experiments/reproduce.py table1 --model roberta-large
    python experiments/reproduce.py table3 --tasks cola,stsb --seeds 0,1,2 --dry-run

    tune      learning rate and scale of each method, on a seed that is never reported
    table1    the methods            table2   time per step             table3   groups of the regulariser
    table4    adapted matrices       figure3  kept singular values      pruning  pruned against not pruned
    overlap   what Eq. 8 and Eq. 9 keep

Each run is one call of train.py in a folder of its own below RUNS/PRESET-MODEL (grid.py says which). However
it was stopped, the same command goes on: finished runs are read, begun ones resumed, damaged ones run again.
What tables need of finished runs goes into OUT/PRESET-MODEL/TABLE.json (summary.py), from which TABLE.md is
made (tables.py). A run that such a file lists need not be run again. As many go at once as there are GPUs.
"""
import argparse
import json
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
from experiments import plot
from experiments import summary
from experiments import tables
from formats import disk
from running import machine
from running import options

TRAIN = [sys.executable, str(grids.ROOT / "train.py")]
PAPER = json.loads((grids.ROOT / "experiments" / "paper.json").read_text(encoding="utf-8"))


# --- running ------------------------------------------------------------------------------------------------

def execute(cell, resume, device, processes, stop):
    """Run train.py to its end; (exit status, what it said last)."""
    argv = grids.command_line(cell.flags) + ["--out", str(cell.folder), "--overwrite"]
    if resume:                                             # both may be in another place by now
        places = [flag for flag in cell.flags if flag[0] in ("model", "data-dir")]
        argv = ["--resume", str(cell.folder), *grids.command_line(places)]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
    process = subprocess.Popen(TRAIN + argv, env=env, text=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, start_new_session=True)             # Ctrl-C is ours
    processes.append(process)
    if stop.is_set():                                      # since we asked for the last time
        process.terminate()
    _, said = process.communicate()
    return process.returncode, (said.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")


def tidy(cell, keep):
    """Note what tables need of a finished run; then remove what is large, unless `keep`."""
    record = summary.record(cell, grids.is_timed(cell))
    disk.write_file(cell.folder / "record.json", summary.layout(record) + "\n")
    for path in [cell.folder / "last.pt", cell.folder / "adapter.safetensors",
                 *cell.folder.glob("predictions_*.tsv")]:
        if not keep:
            path.unlink(missing_ok=True)


class Progress:
    """One line for the whole grid, rewritten on a terminal; elsewhere a line for each finished run."""

    def __init__(self, total):
        self.total, self.done, self.ran, self.started = total, 0, 0, time.monotonic()

    def show(self, text):
        left = (time.monotonic() - self.started) / max(1, self.ran) * (self.total - self.done)
        text = f"[{self.done}/{self.total}, about {left / 3600:.1f} h left] {text}"
        terminal = sys.stdout.isatty()
        print(f"\r{text:<108.108}" if terminal else text, end="" if terminal else "\n", flush=True)


def run_one(cell, resume, devices, processes, stop):
    """Run a cell to its end on a device that is free; (exit status, what it said last)."""
    device = devices.get()
    try:
        if stop.is_set():
            return 1, "stopped"
        outcome = execute(cell, resume, device, processes, stop)
        if resume and outcome[0] == 2:                     # its files do not fit together: begin anew
            outcome = execute(cell, False, device, processes, stop)
        if outcome[0] == 2:
            stop.set()
        return outcome
    finally:
        devices.put(device)


def run_all(args, cells, progress):
    """Run the cells that are not finished, args.jobs at once. Returns what went wrong, a line each.

    A user's mistake (status 2) ends the whole grid as a ValueError. When stopped, the runs are told to save.
    """
    waiting = [cell for cell in cells if grids.record_of(args.grid, cell) is None]
    resume = {cell: grids.resumable(cell) for cell in waiting}             # ends here at another run's folder
    progress.done += len(cells) - len(waiting)
    devices, processes, failures, stop = queue.Queue(), [], [], threading.Event()
    for i in range(args.jobs):
        devices.put(args.gpus[i % len(args.gpus)] if args.gpus else None)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            futures = {pool.submit(run_one, cell, resume[cell], devices, processes, stop): cell
                       for cell in waiting}
            for future in as_completed(futures):
                cell, (status, said) = futures[future], future.result()
                if status == 2:
                    raise ValueError(said)
                if status:
                    failures.append(f"{cell.folder}: status {status}, {said}")
                else:
                    tidy(cell, args.keep)
                progress.done, progress.ran = progress.done + 1, progress.ran + 1
                progress.show(f"{cell.folder.relative_to(args.grid.runs)} {said if status else 'done'}")
        except BaseException:
            stop.set()                                     # what has not begun does not begin
            for process in processes:
                process.terminate()                        # SIGTERM: train.py saves its state and ends
            raise
    return failures


def run_grid(args):
    """Run all that a table needs: task by task the tuning, then the rows. Returns what went wrong."""
    grid, failures = args.grid, []
    each = 0 if grid.table == "tune" else len(grid.rows) * len(grid.seeds)
    progress = Progress(sum(len(grids.tuning_cells(grid, task)) + each for task in grid.tasks))
    for task in grid.tasks:
        failures += run_all(args, grids.tuning_cells(grid, task), progress)
        failures += run_all(args, grids.reported_cells(grid, task), progress)
    if sys.stdout.isatty():
        print()
    return failures


def list_grid(grid):
    """--dry-run: the state and the command of every run."""
    listed = set()                                         # two tasks may share their tuning
    for task in grid.tasks:
        reported = grids.reported_cells(grid, task)
        cells = [cell for cell in grids.tuning_cells(grid, task) + reported if cell not in listed]
        listed.update(cells)
        for cell in cells:
            state = "done  " if grids.record_of(grid, cell) else "resume" if grids.resumable(cell) else "to run"
            line = ["python", "train.py", *grids.command_line(cell.flags), "--out", str(cell.folder)]
            print(state, shlex.join(line))
        if grid.table != "tune":
            for row in [row for row in grid.rows if row not in {cell.row for cell in reported}]:
                print(f"later  {row} on {task}, seeds {grid.seeds}: tuned by the runs above first")


# --- writing ------------------------------------------------------------------------------------------------

def notes_of(grid):
    """The sentences below a table."""
    notes = [*PAPER[grid.table]["notes"], PAPER["source"]] if grid.table in PAPER else []
    notes += grids.NOTES.get(grid.table, [])
    if grid.table == "table2":
        return notes + [f"{grid.preset['timed_steps']} steps of each run, with train.py's own settings."]
    notes += grid.preset["notes"]
    if grid.preset["lrs"]:
        notes.append(grids.TUNED if grid.table in ("tune", "table1") else grids.SHARED)
    return notes


def facts_of(runs):
    """Where runs come from: on what, with what, when, how long."""
    facts = {}
    for name in ("device", "dtype", "threads", "torch", "python", "date"):
        facts[name] = sorted({str(run[name]) for run in runs})
    facts["date"] = list(dict.fromkeys(facts["date"][:1] + facts["date"][-1:]))        # the first, the last
    peaks = [run["peak_memory_gb"] for run in runs if run["peak_memory_gb"]]           # older runs do not tell
    return facts | {"hours": round(sum(run["seconds"] for run in runs) / 3600, 2),
                    "peak_memory_gb": max(peaks, default=None)}


def write_table(args):
    """Write TABLE.json and TABLE.md of the finished runs; returns the path of the latter.

    What TABLE.json held before and the table does not show stays in it, as "left_out".
    """
    grid = args.grid
    runs = grids.finished(grid)
    if grid.table != "overlap":
        runs = [{name: value for name, value in run.items() if name != "kept"} for run in runs]
    path, left_out = grid.folder / f"{grid.table}.json", []
    if path.exists():
        before, shown = summary.load(path), [run["settings"] for run in runs]
        for run in before["runs"] + before["left_out"]:
            if run["settings"] not in shown:
                left_out.append(run)
    paper = PAPER.get(grid.table, {"rows": {}})["rows"]
    if grid.table != "table2":
        paper = {row: paper[name] for row, name in grid.rows.items() if name in paper}
    tasks = list(dict.fromkeys(grids.tuned_on(grid.preset, task) for task in grid.tasks))
    content = {"name": grid.table, "title": grids.TABLES[grid.table].title, "command": args.command,
               "model": grid.model, "tasks": tasks if grid.table == "tune" else grid.tasks,
               "seeds": [grids.TUNE_SEED] if grid.table == "tune" else grid.seeds,
               "rows": {row: grids.row_of(row)[0] for row in grid.rows}, "pairs": grid.pairs,
               **facts_of(runs), "notes": notes_of(grid), "paper": paper, "runs": runs, "left_out": left_out}
    text = tables.page(content)                            # before anything is written: it may be refused
    grid.folder.mkdir(parents=True, exist_ok=True)
    if grid.table == "figure3":
        plot.figure3(content, grid.folder / grid.table)
    summary.write(path, content)
    disk.write_file(path.with_suffix(".md"), text)
    return path.with_suffix(".md")


# --- the command line ---------------------------------------------------------------------------------------

def parse(argv):
    """Command line → what to do. ValueError with one sentence for a mistake."""
    parser = options.Parser(prog="experiments/reproduce.py", description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
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
    add("--keep", action="store_true", help="keep adapters, last.pt and predictions of finished runs")
    add("--dry-run", action="store_true", help="list all runs and their state; run and write nothing")
    add("--no-run", action="store_true", help="run nothing; write the table from what is finished")
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
    tasks = table.tasks[args.preset]
    if args.tasks is not None:
        tasks = list(dict.fromkeys(args.tasks.split(",")))
    for task in tasks:
        if task not in tables.COLUMNS:
            raise ValueError(f"there is no task {task!r}: the tasks are {', '.join(tables.COLUMNS)}")
    seeds = args.seeds.split(",")
    if not all(seed.isdecimal() and int(seed) != grids.TUNE_SEED for seed in seeds):
        raise ValueError(f"--seeds {args.seeds}: give numbers such as 0,1,2 and not {grids.TUNE_SEED}, by "
                         "which learning rates are chosen")
    base, rows = preset["base"], table.rows
    if isinstance(rows, dict):
        rows = rows[args.preset]
    rows = {grids.full_name(row, base): grids.full_name(row, "lora2-k1") for row in rows}
    pairs = [[grids.full_name(row, base) for row in pair] for pair in table.pairs]
    pairs = [pair for pair in pairs if rows.keys() >= set(pair)]           # a preset may lack a row
    flags = dict(preset["flags"])
    if flags.get("dtype") == "bf16" and machine.emulates_bf16("cuda" if torch.cuda.is_available() else "cpu"):
        flags["dtype"] = "fp32"
    model = args.model or preset["model"]
    name = f"{args.preset}-{os.path.basename(os.path.abspath(model))}"     # of "." too, of a name on the Hub
    folder = Path(args.out) / name
    return grids.Grid(args.table, preset, flags, model, args.data_dir, tasks, rows, pairs,
                      sorted(set(map(int, seeds))), folder, Path(args.runs) / name, summary.load_all(folder))


def visible_gpus():
    """What to set CUDA_VISIBLE_DEVICES to for each GPU that there is for us."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def main(argv=None):
    """Run and write a table; returns the exit status."""
    def stop(number, frame):
        raise KeyboardInterrupt

    failures = []
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.dry_run:
            list_grid(args.grid)
            return 0
        if threading.current_thread() is threading.main_thread():
            for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:     # a lost terminal
                signal.signal(number, stop)
        try:
            if not args.no_run:
                with disk.alone(args.grid.runs, "reproduce.py", "--runs"):
                    failures = run_grid(args)
        except KeyboardInterrupt:
            print("\nstopped: the same command goes on", file=sys.stderr)
            failures = None
        print(write_table(args))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for failure in failures or []:
        print(f"error: {failure}", file=sys.stderr)
    return 130 if failures is None else 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
