"""Workers: processes that run one cell after the other, and who tells them which."""
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait

import torch

import train
from experiments import grid as grids
from experiments import summary
from experiments.speed import steps
from formats import disk


def work(cell, is_timed):
    """Run a cell in this process, or go on with it; returns its record.

    RuntimeError if it failed but did not diverge, ValueError for a mistake.
    """
    words, folder = grids.command_line(cell.flags), str(cell.folder)
    status = 2
    if (cell.folder / "last.pt").exists() and not is_timed:
        status, said = steps.heard(train.main, [*words, "--resume", folder])
    if status == 2:                                        # anew, also if its files do not fit
        status, said = steps.heard(train.main, [*words, "--out", folder, "--overwrite"])
    last = (said.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
    if status == 2:
        raise ValueError(last)
    if status and "not finite" not in last:
        raise RuntimeError(f"{cell.folder}: status {status}, {last}")
    if status:
        failed = last.partition(";")[0].strip()
        record = {"settings": grids.own_settings(cell), "failed": failed}
    else:
        with disk.reading(cell.folder, "remove it and run it again"):
            record = summary.record(cell.folder)
            if is_timed:
                record["step_seconds"] = summary.step_seconds(cell.folder)
    shutil.rmtree(cell.folder)
    return grids.about(cell) | record


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


def run_all(args, pool, keep):
    """Run until nothing is left to do, or to begin; returns how many runs failed.

    pool: an Executor. keep: called with each record. Whenever a run has ended grid.py says anew
    what is missing: a result may change what to try.
    """
    grid, until = args.grid, time.monotonic() + args.seconds
    running, begun, failures = {}, set(), 0                # running: {future: cell}
    while True:
        for cell in grids.missing(grid):
            if len(running) == args.workers or time.monotonic() >= until:
                break
            tuning = {other.row for other in running.values() if other.seed == grids.TUNE_SEED}
            # What is reported waits for what tunes its row: the choice may still change.
            may_begin = cell.seed == grids.TUNE_SEED or grids.row_of(cell.row)[2] not in tuning
            if may_begin and cell not in begun:
                begun.add(cell)
                running[pool.submit(work, cell, grid.is_timed)] = cell
        if not running:
            return failures
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            cell = running.pop(future)
            try:
                record = future.result()
            except BrokenExecutor:
                raise OSError("a worker was killed, perhaps for its memory: the same command goes "
                              "on, with fewer --workers") from None
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                failures += 1                              # the others go on
                continue
            assert record["settings"] == grids.own_settings(cell), cell
            grid.file["runs"].append(record)
            keep(record)
