"""The paper's tables by one command: run what is missing, write what there is, beside what the paper reports.

    python experiments/reproduce.py table1 --preset small --model models/all-MiniLM-L6-v2 --data-dir glue
    python experiments/reproduce.py table1                           # DeBERTaV3-base: wants GPUs, and days
    python experiments/reproduce.py table1 --model roberta-large
    python experiments/reproduce.py table3 --tasks cola,stsb --seeds 0,1,2 --dry-run

    tune      learning rate and scale of each method, on a seed that is never reported
    table1    the methods            table2   time per step             table3   groups of the regulariser
    table4    adapted matrices       figure3  kept singular values      pruning  pruned against not pruned
    overlap   what Eq. 8 and Eq. 9 keep

Each run is one call of train.py in a folder of its own below OUT/PRESET-MODEL (grid.py says which). However
it was stopped, the same command goes on: finished runs are read, begun ones resumed, damaged ones run again.
Tables are made from the files of finished runs alone (tables.py). As many runs go at once as there are GPUs.
"""
import argparse
import itertools
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
from formats import disk
from experiments import plot
from running import folder as runs
from experiments import tables

TRAIN = [sys.executable, str(grids.ROOT / "train.py")]
PAPER = json.loads((grids.ROOT / "experiments" / "paper.json").read_text(encoding="utf-8"))


# --- running ------------------------------------------------------------------------------------------------

def execute(cell, resume, device, processes, stop):
    """Run train.py to its end; (exit status, what it said last)."""
    for name in ("result.json", "kept.json"):              # there only if damaged, or of a damaged run
        (cell.folder / name).unlink(missing_ok=True)
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
    """Note which singular values a finished run kept; then remove what no table needs, unless `keep`."""
    last, kept = cell.folder / "last.pt", cell.folder / "kept.json"
    if last.exists() and (cell.folder / "ranks.json").exists() and not kept.exists():
        weights = runs.load_state(cell.folder)["weights"]
        lams = {name.removesuffix(".lam"): weights[name] for name in weights if name.endswith(".lam")}
        if lams:                                           # what is pruned is 0 from the last phase on
            disk.write_json(kept, {name: lam.nonzero().flatten().tolist() for name, lam in lams.items()})
    for path in [last, cell.folder / "adapter.safetensors", *cell.folder.glob("predictions_*.tsv")]:
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


def run_all(args, cells, progress):
    """Run the cells that are not finished, args.jobs at once. Returns what went wrong, a line each.

    A user's mistake (status 2) ends the whole grid as a ValueError. When stopped, the runs are told to save.
    """
    waiting = [cell for cell in cells if grids.read(cell) is None]
    resume = {cell: grids.resumable(cell) for cell in waiting}             # ends here at another run's folder
    progress.done += len(cells) - len(waiting)
    for cell in set(cells) - set(waiting):                 # one that was stopped between its end and this
        tidy(cell, args.keep)
    devices, processes, failures, stop = queue.Queue(), [], [], threading.Event()
    for i in range(args.jobs):
        devices.put(args.gpus[i % len(args.gpus)] if args.gpus else None)

    def work(cell):
        device = devices.get()
        try:
            if stop.is_set():
                return 1, "stopped"
            outcome = execute(cell, resume[cell], device, processes, stop)
            if resume[cell] and outcome[0] == 2:           # its files do not fit together: begin anew
                outcome = execute(cell, False, device, processes, stop)
            if outcome[0] == 2:
                stop.set()
            return outcome
        finally:
            devices.put(device)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            futures = {pool.submit(work, cell): cell for cell in waiting}
            for future in as_completed(futures):
                cell, (status, said) = futures[future], future.result()
                if status == 2:
                    raise ValueError(said)
                if status:
                    failures.append(f"{cell.folder}: status {status}, {said}")
                else:
                    tidy(cell, args.keep)
                progress.done, progress.ran = progress.done + 1, progress.ran + 1
                progress.show(f"{cell.folder.relative_to(args.grid.folder)} {said if status else 'done'}")
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
            state = "done  " if grids.read(cell) else "resume" if grids.resumable(cell) else "to run"
            line = ["python", "train.py", *grids.command_line(cell.flags), "--out", str(cell.folder)]
            print(state, shlex.join(line))
        if grid.table != "tune":
            for row in [row for row in grid.rows if row not in {cell.row for cell in reported}]:
                print(f"later  {row} on {task}, seeds {grid.seeds}: tuned by the runs above first")


# --- writing ------------------------------------------------------------------------------------------------

def tune_table(grid):
    """What each row scored over its grid: (dict for JSON, Markdown)."""
    table, lines = {row: {} for row in grid.rows}, []
    tasks = dict.fromkeys(grids.tuned_on(grid.preset, task) for task in grid.tasks)
    for row, task in itertools.product(grid.rows, tasks):
        tried = [tuned | {which: 100 * result[which]["score"] for which in tables.WHICH}
                 for tuned, cell in grids.tunings(grid, row, task) if (result := grids.read(cell))]
        table[row][task] = {"chosen": grids.choose(grid, row, task), "tried": tried}
    for row, cells in table.items():
        cells = [", ".join(f"{name} {value:g}" for name, value in cell["chosen"].items())
                 + f" ({max(one['last'] for one in cell['tried']):.2f}, of {len(cell['tried'])})"
                 if cell["tried"] else "not run" for cell in cells.values()]
        lines.append([grids.row_of(row)[0], *cells])
    head = ["chosen (score, of how many runs)", *(tables.COLUMNS[task][0] for task in tasks)]
    return table, tables.markdown(head, lines)


def contents(grid, found):
    """What a table says: (dict for JSON, Markdown)."""
    labels = {row: grids.row_of(row)[0] for row in grid.rows}
    paper = PAPER.get(grid.table, {"rows": {}})
    if grid.table == "tune":
        return tune_table(grid)
    if grid.table == "table2":
        return tables.time_table(found, list(grid.rows), labels, grid.tasks, paper)
    if grid.table == "figure3":
        return plot.figure3(found, labels, grid.folder / grid.table)
    rows = tables.score_rows(found, grid.rows, labels, grid.tasks, paper)
    pairs = tables.differences(rows, grid.pairs, grid.tasks)
    table = {"rows": rows, "differences": pairs}
    text = tables.score_markdown(rows, grid.tasks)
    if pairs:
        text += "\n" + tables.differences_markdown(pairs, grid.tasks)
    if grid.table == "overlap":
        table["overlap"], more = tables.overlap_table(found, list(grid.rows), grid.tasks)
        text += "\n" + more
    return table, text


def notes_of(grid):
    """The sentences below a table."""
    notes = [*PAPER[grid.table]["notes"], PAPER["source"]] if grid.table in PAPER else []
    notes += grids.NOTES.get(grid.table, [])
    if grid.table == "table2":
        return notes + [f"{grid.preset['timed_steps']} steps of each run, with train.py's own settings."]
    tuned = grids.TUNED if grid.table in ("tune", "table1") else grids.SHARED
    return notes + grid.preset["notes"] + [tuned] * bool(grid.preset["lrs"])


def write_table(args):
    """Write TABLE.json and TABLE.md from the files of finished runs; returns the path of the latter."""
    grid = args.grid
    found = grids.finished(grid)
    grid.folder.mkdir(parents=True, exist_ok=True)
    table, text = contents(grid, found)
    results = [result for some in found.values() for _, result in some.values()]
    if grid.table == "tune":
        cells = dict.fromkeys(cell for task in grid.tasks for cell in grids.tuning_cells(grid, task))
        results = [result for cell in cells if (result := grids.read(cell))]
    facts = {name: sorted({str(result.get(name)) for result in results})
             for name in ("device", "dtype", "threads", "torch", "python", "date")}
    facts["date"] = list(dict.fromkeys(facts["date"][:1] + facts["date"][-1:]))        # the first, the last
    peak = max((result.get("peak_memory_gb") or 0 for result in results), default=0)
    about = {"command": args.command, "model": grid.model, "runs": len(results), **facts,
             "hours": round(sum(result.get("seconds", 0) for result in results) / 3600, 2),
             "peak_memory_gb": peak or None,               # runs of before it was measured do not tell
             "notes": notes_of(grid)}
    facts = "; ".join(f"{name} {', '.join(values) or '–'}" for name, values in facts.items())
    notes = [*about["notes"], f"{about['runs']} runs, {about['hours']} hours; {facts}", f"`{args.command}`"]
    disk.write_json(grid.folder / f"{grid.table}.json", about | {"table": table})
    path = grid.folder / f"{grid.table}.md"
    title = f"{grids.TABLES[grid.table][0]} ({Path(grid.model).name})"
    legend = tables.LEGEND if grid.table not in ("tune", "table2", "figure3") else tables.SPREAD
    disk.write_file(path, f"# {title}\n\n{text.strip()}\n\n{legend}\n\n"
                    + "".join(f"- {note}\n" for note in notes))
    return path


# --- the command line ---------------------------------------------------------------------------------------

def parse(argv):
    """Command line → what to do. ValueError with one sentence for a mistake."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ValueError(f"{message}: python experiments/reproduce.py --help lists what there is")

    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", choices=grids.TABLES)
    add("--preset", choices=grids.PRESETS, default="paper")
    add("--model", help="name on the Hub, or a folder; by default the preset's")
    add("--data-dir", default="glue", help="folder of the GLUE files")
    add("--tasks", help="a,b,c; by default the table's")
    add("--seeds", default="0,1,2", help="a,b,c")
    add("--out", default="experiments/results", help="folder for runs and tables")
    add("--jobs", type=int, help="runs at once; by default one for each visible GPU, else one")
    add("--keep", action="store_true", help="keep adapters, last.pt and predictions of finished runs")
    add("--dry-run", action="store_true", help="list all runs and their state; run and write nothing")
    add("--no-run", action="store_true", help="run nothing; write the table from what is finished")
    args = parser.parse_args(argv)
    preset = grids.PRESETS[args.preset]
    _, choices, pairs = grids.TABLES[args.table]
    tasks, rows = (text.split() for text in choices[args.preset])
    tasks = list(dict.fromkeys(args.tasks.split(","))) if args.tasks is not None else tasks
    unknown = [task for task in tasks if task not in tables.COLUMNS]
    if unknown:
        raise ValueError(f"there is no task {unknown[0]!r}: the tasks are {', '.join(tables.COLUMNS)}")
    seeds = args.seeds.split(",")
    if not all(seed.isdecimal() and int(seed) != grids.TUNE_SEED for seed in seeds):
        raise ValueError(f"--seeds {args.seeds}: give numbers such as 0,1,2 and not {grids.TUNE_SEED}, by "
                         "which learning rates are chosen")
    model = args.model or preset["model"]
    name = os.path.basename(os.path.abspath(model))        # of "." too, and of a name on the Hub
    full = lambda row: row.replace("*", preset["base"])
    rows = {full(row): row.replace("*", "lora2-k1") for row in rows}
    pairs = [tuple(map(full, pair.split())) for pair in pairs]
    args.grid = grids.Grid(args.table, preset, model, args.data_dir, tasks, rows,
                           [pair for pair in pairs if {*pair} <= rows.keys()], sorted(set(map(int, seeds))),
                           Path(args.out) / f"{args.preset}-{name}")
    args.gpus = visible_gpus()
    args.jobs = 1 if args.table == "table2" else max(1, len(args.gpus)) if args.jobs is None else args.jobs
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: give at least 1")
    args.command = shlex.join(["python", "experiments/reproduce.py", *argv])
    return args


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
                with disk.alone(args.grid.folder, "reproduce.py"):
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
