"""Workers: processes that run one cell after the other, and who tells them which.

A Scheduler hands out runs in the order of their stages. It asks grid.py what comes next whenever
the runs that it waited for are there.
"""
import multiprocessing
import os
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait

import torch

import train
from experiments import grid as grids
from experiments import summary
from experiments.speed import steps

# What a table's records leave out; others leave out what each matrix kept.
LEFT_OUT = {"overlap": (), "study": ("kept", "ranks")}


def without(grid, record):
    """A record with what its table keeps of it."""
    left_out = LEFT_OUT.get(grid.table, ("kept",))
    return {name: value for name, value in record.items() if name not in left_out}


def work(cell, is_timed, keep):
    """Run a cell in this process, or go on with it; returns its record.

    keep: leave its folder. RuntimeError if it failed but did not diverge, ValueError for a mistake.
    """
    words = grids.command_line(cell.flags)
    anew = ["--out", str(cell.folder), "--overwrite"]
    goes_on = (cell.folder / "last.pt").exists() and not is_timed
    place = ["--resume", str(cell.folder)] if goes_on else anew
    status, said = steps.heard(train.main, words + place)
    if status == 2 and goes_on:                            # its files do not fit together
        status, said = steps.heard(train.main, words + anew)
    last = (said.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
    if status == 2:
        raise ValueError(last)
    if status and "not finite" not in last:
        raise RuntimeError(f"{cell.folder}: status {status}, {last}")
    if status:
        record = summary.start_of(cell, grids.settings_of(cell.flags))
        record["failed"] = last.partition(";")[0].strip()
    else:
        record = summary.record(cell)
        if is_timed:
            record["tokens_per_second"] = summary.speed(cell.folder)
    if not keep:
        shutil.rmtree(cell.folder)
    return record


def make_pool(workers):
    """Processes that share the cores and the GPUs, and import torch once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # torch's, the tokenizer's
        os.environ[name] = str(max(1, cores // workers))
    fresh, gpus = multiprocessing.get_context("spawn"), visible_gpus()
    theirs = fresh.SimpleQueue()
    for i in range(workers):
        theirs.put(gpus[i % len(gpus)] if gpus else "")
    return ProcessPoolExecutor(workers, fresh, begin, (theirs,))


def begin(gpus):
    """What a worker does first: it takes one of the GPUs, and Ctrl-C is ours."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    if hasattr(os, "setsid"):
        os.setsid()


def visible_gpus():
    """What to set CUDA_VISIBLE_DEVICES to for each GPU that there is for us."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


# --- running ---------------------------------------------------------------------------------

class Scheduler:
    """Gives runs to workers in the order of their stages, and asks for more as results come in."""

    def __init__(self, args, pool, keep):
        """pool: an Executor. keep: called with each record, and how many runs are to come."""
        self.args, self.grid, self.pool, self.keep = args, args.grid, pool, keep
        self.until = time.monotonic() + args.seconds       # when the last one may begin
        self.seen = set()               # what was ever put into the line
        self.waiting = []               # (stage, cell), in order
        self.running = {}               # future → cell
        self.failures = []
        self.ask()

    def ask(self):
        """Put what is needed next into the line: of a row whose tuning is under way, nothing."""
        tuning, reported, _ = grids.cells_of(self.grid)
        busy = {cell[:2] for cell in [*self.running.values(), *(cell for _, cell in self.waiting)]
                if cell.seed == grids.TUNE_SEED}
        for cell, stage in (tuning | reported).items():
            is_busy = cell in tuning and cell[:2] in busy
            if cell not in self.seen and not is_busy and not grids.record_of(self.grid, cell):
                self.seen.add(cell)
                self.waiting.append((stage, cell))
        self.waiting.sort(key=lambda entry: entry[0])      # by stage; within one as they came

    def hand_out(self):
        """Start runs while a worker is free and there is time."""
        while (self.waiting and len(self.running) < self.args.workers
               and time.monotonic() < self.until):
            _, cell = self.waiting.pop(0)
            future = self.pool.submit(work, cell, self.grid.is_timed, self.args.keep)
            self.running[future] = cell

    def take_in(self, future):
        """Keep the record of a run that has ended, and ask for more."""
        cell = self.running.pop(future)
        try:
            record = future.result()
        except BrokenExecutor:
            raise OSError("a worker was killed, perhaps for its memory: the same command goes on, "
                          "with fewer --workers") from None
        except RuntimeError as error:
            self.failures.append(str(error))
            return                                         # it was seen: others go on
        assert grids.key_of(record["settings"]) == grids.key_of_flags(cell.flags), cell
        record = without(self.grid, record)
        record |= {"part": grids.part_of(cell.seed), "tuned": dict(cell.tuned),
                   "tuned_as": grids.row_of(cell.row)[2]}
        self.grid.remember(record)
        self.ask()
        self.keep(record, len(self.waiting) + len(self.running))

    def run(self):
        """Run until nothing is left to do, or to begin; returns what went wrong, a line each."""
        self.hand_out()
        while self.running:
            done, _ = wait(self.running, return_when=FIRST_COMPLETED)
            for future in done:
                self.take_in(future)
            self.hand_out()
        return self.failures
