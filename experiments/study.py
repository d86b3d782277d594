"""LoRA² and the other methods, each with a tuning that is at no edge: one command, one JSON file.

    python experiments/study.py --model FOLDER --data-dir glue --workers 2 --device cpu
    python experiments/study.py --model FOLDER --data-dir glue --workers 12 --seconds 300
    python experiments/study.py --out FILE.json --no-run    # the page again, of the file alone

study.json says what runs, in stages, and in which order. Of each row on each task the learning rate
and scale are chosen first (search.py), on a seed that is not reported; then come the seeds. Each
worker is a process that calls train.py's main() for one run after the other, and keeps no folder.
OUT.json (as summary.py writes it) is written anew after each run, OUT.md at the end
(study_page.py). However it was stopped, the same command goes on. A run that diverged is recorded.
"""
import argparse
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from experiments import grid as grids
from experiments import reproduce, search, study_page, summary
from experiments.speed import steps
from formats import disk
from running import machine, options
from running.errors import Refused

GIVEN = disk.read_json(grids.ROOT / "experiments" / "study.json", "restore it")


class Study(NamedTuple):
    """What was asked for."""
    grid: grids.Grid
    plan: dict                          # row that is tuned → [(stage, row with its tuning, seed)]
    known: dict                         # name of a run (name_of) → its record


# --- which runs ------------------------------------------------------------------------------

def name_of(row, task, seed, point):
    """What a run is known by."""
    return row, task, seed, tuple(point.items())


def make_cell(study, row, task, seed, point):
    """A run of a row with that tuning. Its folder is a temporary one."""
    part = "tune" if seed == grids.TUNE_SEED else "reported"
    extra = {}
    if "outer" in point:
        extra["outer-lr"] = float(f"{point['lr'] * point['outer']:g}")
    return grids.make_cell(study.grid, row, task, seed, point, part, **extra)


def next_runs(study, row, task):
    """[(stage, row, task, seed, point)]: what a row that is tuned needs next, [] for nothing.

    To be asked when nothing that was asked for before is missing: first the start and what is
    around it, then what is around the best, then the reported seeds of all rows with this tuning.
    """
    stages = study.plan[row]
    points = study_page.tried({"runs": study.known.values()}, row, task)
    wanted = search.missing(points, GIVEN["starts"][row])
    if wanted:
        first = min(stage for stage, _, _ in stages)
        return [(first, row, task, grids.TUNE_SEED, point) for point in wanted]
    if not search.is_inside(points):                       # at the end of a ladder: no table either
        return []
    chosen, found = search.best(points), []
    for stage, other, seed in stages:
        if name_of(other, task, seed, chosen) not in study.known:
            found.append((stage, other, task, seed, chosen))
    return found


# --- running ---------------------------------------------------------------------------------

def work(cell):
    """Run a cell in this process and remove its folder; returns its record.

    RuntimeError if it failed but did not diverge, ValueError for a mistake.
    """
    words = [*grids.command_line(cell.flags), "--out", str(cell.folder), "--overwrite"]
    try:
        status, said = steps.heard(train.main, words)
        last = (said.strip().splitlines() or ["no message"])[-1]
        if status == 2:
            raise ValueError(last.removeprefix("error: "))
        if status and "not finite" not in last:
            raise RuntimeError(f"{cell.folder.name}: status {status}, {last}")
        if status:
            settings = summary.comparable(grids.settings_of(cell.flags))
            return {"row": cell.row, "task": cell.task, "seed": cell.seed, "settings": settings,
                    "failed": last.partition(":")[2].partition(";")[0].strip()}
        found = summary.record(cell, is_timed=False)
        found["peak_memory_gb"] = None                     # would be that of all runs so far
        return {name: found[name] for name in found if name not in ("kept", "ranks")}
    finally:
        shutil.rmtree(cell.folder, ignore_errors=True)


class Scheduler:
    """Gives runs to workers in the order of their stages, and asks for more as results come in."""

    def __init__(self, study, pool, capacity, until, keep):
        """pool: an Executor. capacity: runs handed out at once. until: when the last one may begin,
        in time.monotonic()'s seconds. keep: called with each record."""
        self.study, self.pool, self.capacity = study, pool, capacity
        self.until, self.keep = until, keep
        self.under_way = {}             # chain: (tuned row, task) → how many of its runs
        for row in study.plan:
            for task in study.grid.tasks:
                self.under_way[row, task] = 0
        self.waiting = []               # (chain, wanted), in order
        self.running = {}               # future → (chain, wanted)
        self.failures = []

    def ask(self, chain):
        """Put what a (tuned row, task) needs next into the line."""
        for wanted in next_runs(self.study, *chain):
            self.waiting.append((chain, wanted))
            self.under_way[chain] += 1
        self.waiting.sort(key=lambda entry: entry[1][0])   # by stage; within one as they came

    def hand_out(self):
        """Start runs while there is room and time."""
        while (self.waiting and len(self.running) < self.capacity
               and time.monotonic() < self.until):
            chain, wanted = self.waiting.pop(0)
            cell = make_cell(self.study, *wanted[1:])
            self.running[self.pool.submit(work, cell)] = chain, wanted

    def take_in(self, future):
        """Keep the record of a run that has ended. A failure ends its chain alone."""
        chain, wanted = self.running.pop(future)
        try:
            record = future.result()
        except RuntimeError as error:
            self.failures.append(str(error))
            return                                         # its chain is never asked again
        _, row, task, seed, point = wanted
        part = "tune" if seed == grids.TUNE_SEED else "reported"
        record |= {"part": part, "tuned": point, "tuned_as": chain[0]}
        self.study.known[name_of(row, task, seed, point)] = record
        self.keep(record)
        self.under_way[chain] -= 1
        if self.under_way[chain] == 0:
            self.ask(chain)

    def run(self):
        """Run until nothing is left to do, or to begin."""
        for chain in self.under_way:
            self.ask(chain)
        self.hand_out()
        while self.running:
            done, _ = wait(self.running, return_when=FIRST_COMPLETED)
            for future in done:
                self.take_in(future)
            self.hand_out()


def make_pool(workers):
    """Processes that share the cores and import torch once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # torch's, the tokenizer's
        os.environ[name] = str(max(1, cores // workers))
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


# --- the summary -----------------------------------------------------------------------------

def load_known(study, path, device):
    """Put the file's runs into study.known. ValueError if they are of other settings, or devices.

    No table shall mix them.
    """
    here = machine.name_of(machine.find_device(device, 0, 1))
    for record in summary.load(path)["runs"] if path.exists() else []:
        which = [record[name] for name in ("row", "task", "seed", "tuned")]
        cell = make_cell(study, *which)
        if record["settings"] != summary.comparable(grids.settings_of(cell.flags)):
            raise ValueError(f"{path} holds runs with other settings: give another --out")
        other = record.get("device", here)                 # one that diverged does not tell
        if other != here:
            raise ValueError(f"{path} holds runs on {other}, this is {here}: give another --out")
        study.known[name_of(*which)] = record


def write_page(path, rows):
    """OUT.md beside OUT.json, of that file alone; returns its path. rows: "a,b,c", None for all."""
    content = summary.load(path)
    if rows:
        content["rows"] = {row: content["rows"][row] for row in rows.split(",")}
    text = study_page.page(content)
    grids.check_sources("models", study_page.finished(content), "base")
    disk.write_file(path.with_suffix(".md"), text)
    return path.with_suffix(".md")


# --- the command line ------------------------------------------------------------------------

def parse(argv):
    """Command line → what to do. ValueError with one sentence for a mistake."""
    parser = options.Parser(prog="experiments/study.py", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="name, or a folder")
    add("--data-dir", default="glue", help="folder of the GLUE files")
    add("--out", default="experiments/results/study.json", help="the JSON file; a GPU has its own")
    add("--runs", help="folder for what lasts as long as a run; by default the system's")
    add("--workers", type=int, default=1, help="processes")
    add("--device", help="cuda or cpu; by default the first there is")
    add("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    add("--tasks", default=",".join(GIVEN["tasks"]), help="a,b,c")
    add("--rows", help="a,b,c of study.json; by default all")
    add("--seeds", type=int, default=10, help="seeds from 0 on, at most")
    add("--more", default="", help='options of train.py for all runs: "--limit-train 64"')
    add("--no-run", action="store_true", help="write the page of the file as it is")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: give at least 1")
    places = "--model", "--data-dir", "--out", "--runs"
    args.command = summary.command_of("study.py", argv, *places)
    return args


def make_study(args, runs):
    """The Study that a command line asks for, its run folders below `runs`."""
    labels, seeds, plan = {}, set(), {}
    for stage, (rows, some) in enumerate(GIVEN["stages"]):
        for row in rows.split():
            if args.rows and row not in args.rows.split(","):
                continue
            label, _, tuned_as = grids.row_of(row)
            if row != tuned_as:
                label = f"{grids.row_of(tuned_as)[0]}, {label}"
            labels[row] = label
            for seed in some:
                if seed < args.seeds:
                    plan.setdefault(tuned_as, []).append((stage, row, seed))
                    seeds.add(seed)
    if not plan:
        raise ValueError(f"--rows {args.rows}: there are none of these: see experiments/study.json")
    flags = dict(GIVEN["flags"])
    for name, value in options.parse(shlex.split(args.more)).items():
        flags[name.replace("_", "-")] = value
    if args.device:
        flags["device"] = args.device
    tasks = args.tasks.split(",")
    grid = grids.Grid("study", {}, flags, args.model, args.data_dir, tasks, labels, [],
                      sorted(seeds), None, Path(runs), [])
    study = Study(grid, plan, {})
    load_known(study, Path(args.out), args.device)
    return study


def run_all(args, study):
    """Run what is missing; returns what went wrong, a line each."""
    path, started, before, grid = Path(args.out), time.monotonic(), len(study.known), study.grid
    content = {"name": "study", "title": GIVEN["title"], "command": args.command,
               "model": Path(grid.model).name, "tasks": grid.tasks, "seeds": grid.seeds,
               "rows": grid.rows, "pairs": GIVEN["pairs"], "notes": GIVEN["notes"]}
    path.parent.mkdir(parents=True, exist_ok=True)

    def write():
        summary.write(path, content | {"runs": list(study.known.values()), "left_out": []})

    def keep(record):
        write()
        result = record.get("failed") or f"{record['last']['score']:.4f}"
        seconds = time.monotonic() - started
        point = study_page.point_text(record["tuned"])
        print(f"[{len(study.known) - before}, {seconds:.0f} s] {record['row']} {record['task']} "
              f"s{record['seed']} {point}: {result}", flush=True)

    write()
    pool = make_pool(args.workers)
    scheduler = Scheduler(study, pool, args.workers + 2, started + args.seconds, keep)
    try:
        scheduler.run()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return scheduler.failures


def main(argv=None):
    """Run a study and write its page; returns the exit status."""
    failures = []
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        reproduce.stop_on_signals()
        if not args.no_run:
            with tempfile.TemporaryDirectory(dir=args.runs) as runs:
                study = make_study(args, runs)
                failures = run_all(args, study)
        print(write_page(Path(args.out), args.rows))
    except (ValueError, OSError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on", file=sys.stderr)
        return 130
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
