"""Tests of reproduce.py: which runs a table has, what runs when, what is recorded, trusted, refused.

Offline, in an empty folder. Most run no train.py: records are a stand-in's. The real one runs in the last tests:
    pytest -m ci tests/test_reproduce.py
"""
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data import TASKS
from experiments import grid as grids
from experiments import reproduce, search, summary, why, workers
from formats import disk
from running import folder as runs
from running import options
from tests.cli import write_task

ROOT = Path(__file__).parent.parent
PAPER = reproduce.PAPER
POINT = {"lr": 0.001, "scale": 8}
TINY = ["--more", "--limit-train 32 --limit-dev 16 --epochs 1 --max-len 16"]
FOUR = "table4 --tasks cola --seeds 0"                     # has four runs
STUDY = "study --model tiny --device cpu --tasks stsb"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- a stand-in for train.py ---------------------------------------------------------------------------------

def scores_of(value):
    """The scores of a run that has the same value everywhere."""
    names = ("matthews", "pearson", "spearman", "accuracy", "f1")
    return {split: dict.fromkeys(names, value) for split in ("dev", "dev_matched", "dev_mismatched")}


def leave_run(cell, last=0.75, kept=None, **more):
    """The folder of a cell as train.py leaves it. kept: {module name: indices} of a method that prunes."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    result = {"settings": grids.settings_of(cell.flags), "steps": 10, "adapter_parameters": 1560,
              "head_parameters": 10, "seconds": 36.0, "device": "cpu", "dtype": "fp32", "threads": 1,
              "torch": "2", "python": "3", "date": "2026-01-01",
              "best": {"step": 5, "scores": scores_of(last + 0.1), "score": last + 0.1},
              "last": {"step": 10, "scores": scores_of(last), "score": last}}
    (cell.folder / "result.json").write_text(json.dumps(result | more))
    points = (1, 9.0), (10, 20.0), (20, 24.0)              # slow up to step 10
    lines = [{"step": step, "loss": 1.0, "seconds": at} for step, at in points]
    lines.append({"step": 20, "score": 0.5})
    (cell.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if kept is not None:
        (cell.folder / "ranks.json").write_text(json.dumps({name: len(some) for name, some in kept.items()}))
        weights = {f"{name}.lam": torch.zeros(12).index_fill(0, torch.tensor(some, dtype=torch.long), -2.0)
                   for name, some in kept.items()}
        runs.write_state(cell.folder, {"settings": {}, "weights": weights | {"layer.0.u": torch.ones(2)}})


def begin(cell):
    """A last.pt as a stopped run leaves it."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    runs.write_state(cell.folder, {"settings": grids.settings_of(cell.flags), "weights": {}})


def record_of(cell, **more):
    """How a record of a cell begins, and more."""
    return grids.about(cell) | {"settings": summary.comparable(grids.settings_of(cell.flags))} | more


def height(cell):
    """A score that is best at lr 0.01 and scale 32, whatever the row; each seed has its own luck."""
    point = {"lr": 0.01, "scale": 32} | dict(cell.tuned)
    lr, scale = point["lr"], point["scale"]
    return 0.5 - abs(math.log10(lr / 0.01)) / 10 - abs(math.log(scale / 32)) / 100 + cell.seed % 7 / 1000


class Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def here(monkeypatch):
    """One worker, which is this process."""
    monkeypatch.setattr(workers, "make_pool", lambda number: Here())


@pytest.fixture
def ran(here, monkeypatch):
    """Instead of train.py: the record of a run that scored height(). ran.cells: what ran; ran.fails: {(row, task,
    seed): what it raises, or how it diverged}; a learning rate of 0.03 diverges. ran(words): what it ran."""
    class Ran:
        cells, fails = [], {}

        def __call__(self, words, status=0):
            """(row, task, seed) of what a command runs."""
            self.cells.clear()
            assert reproduce.main(words.split()) == status
            return [cell[:3] for cell in self.cells]

    told = Ran()

    def work(cell, is_timed):
        told.cells.append(cell)
        fails = told.fails.get(cell[:3])
        if isinstance(fails, BaseException):
            raise fails
        if fails or dict(cell.tuned).get("lr") == 0.03:
            return record_of(cell, failed=fails or "not finite")
        leave_run(cell, height(cell), {"layer.0.output.dense": [0, 1], "layer.1.output.dense": [cell.seed % 3]})
        record = record_of(cell, **summary.record(cell.folder))
        if is_timed:
            record["step_seconds"] = summary.step_seconds(cell.folder)
        shutil.rmtree(cell.folder)
        return record

    monkeypatch.setattr(workers, "work", work)
    return told


def grid_of(words):
    return reproduce.parse(words.split()).grid


def content_of(words):
    return reproduce.content_of(reproduce.parse(words.split()))


def page_of(words):
    return reproduce.parse(words.split()).page.read_text(encoding="utf-8")


def refused(argv, capsys, *says, main=reproduce.main):
    """Status 2 and one line "error: ..." that has all of `says`; the line."""
    capsys.readouterr()
    assert main(argv if isinstance(argv, list) else argv.split()) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in says), line
    return line


def reported(grid, tuned=None):
    """The runs that a table shows; of one that is tuned as if it had chosen that."""
    if tuned is None:
        return [cell for cell in grids.cells_of(grid)[0] if cell.seed != grids.TUNE_SEED]
    return [grids.make_cell(grid, row, task, seed, tuned) for task in grid.tasks for row in grid.rows
            for rows, seeds in grid.stages for seed in seeds if row in rows]


def change(words, change_one):
    """Write the file of records anew, with change_one(record) done to each."""
    grid = grid_of(words)
    for one in grid.file["runs"]:
        change_one(one)
    summary.write(grid.path, grid.file)


# --- the search ---------------------------------------------------------------------------------------------

def test_the_grid_grows_until_the_best_is_inside():
    """Oracle: by hand: a rung up and down on each axis, the end of a ladder has one side; first the start and
    around it, then around the best, the first of equals, until both sides of it are there."""
    assert search.neighbours(POINT) == [POINT | {"lr": 0.0003}, POINT | {"lr": 0.003},
                                        POINT | {"scale": 2}, POINT | {"scale": 32}]
    assert search.neighbours({"lr": 1e-5}) == [{"lr": 3e-5}] and search.neighbours({"lr": 0.3}) == [{"lr": 0.1}]
    start, tried = {"lr": 0.001}, []
    assert search.missing(tried, start) == [{"lr": 0.001}, {"lr": 0.0003}, {"lr": 0.003}]
    tried += [({"lr": 0.001}, 0.5), ({"lr": 0.0003}, 0.4), ({"lr": 0.003}, 0.6)]
    assert search.best(tried) == {"lr": 0.003} and not search.is_inside(tried)
    assert search.missing(tried, start) == [{"lr": 0.01}]
    tried.append(({"lr": 0.01}, -math.inf))                # diverged: tried, and worse
    assert search.missing(tried, start) == [] and search.is_inside(tried)
    assert search.best([*tried, ({"lr": 0.1}, 0.6)]) == {"lr": 0.003}
    assert not search.is_inside([({"lr": 1e-5}, 1), ({"lr": 3e-5}, 0)])        # the ladder's end
    assert search.best([({"lr": 0.1}, -math.inf)]) is None and search.missing([], start)


# --- which runs ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("table, preset", [(table, preset) for table in grids.TABLES
                                           for preset in grids.TABLES[table]["tasks"]])
def test_every_run_is_legal(table, preset):
    """Oracle: train.py's own reading of options. Every run of every table is accepted and has a folder of its
    own; where a row is tuned, none is reported before that; a timed run ends before its first epoch does; in the
    paper's preset every row of Tables 1, 3 and 4 has its numbers in paper.json."""
    grid = grid_of(f"{table} --preset {preset}")
    tuning, later = grids.cells_of(grid)
    if grid.preset["points"] and not grid.is_timed or grid.starts:
        assert {cell.seed for cell in tuning} <= {grids.TUNE_SEED} and len(later) == len(grid.tasks) * len(grid.rows) * (table != "tune")
        adapted = [row for row in grid.rows if grids.row_of(row)[1].get("method") not in ("full", "head", "bitfit")]
        shown = reported(grid._replace(rows=adapted), POINT)
    else:
        tuning, shown = [], tuning
    cells = [*tuning, *shown]
    assert len({cell.folder for cell in cells}) == len(cells) and (cells or (table, preset) == ("tune", "paper"))
    for cell in cells:
        settings = grids.settings_of(cell.flags)
        assert (settings["task"], settings["seed"], settings["model"]) == (cell.task, cell.seed, grid.flags["model"])
        if preset == "small":
            epochs = 3 if cell.seed == grids.TUNE_SEED and cell.task == "stsb" else 6
            assert (settings["epochs"], settings["limit_train"]) == (epochs, 2000)
        if grid.is_timed:
            rows = min(TASKS[settings["task"]].rows["train"], settings["limit_train"] or math.inf)
            assert settings["max_steps"] < rows / settings["batch_size"]
    if preset == "paper" and table in ("table1", "table3", "table4"):
        named = reproduce.paper_of(grid)
        assert len(named) == len(PAPER[table]["rows"]) and set(grid.rows) - set(named) <= {"lora2-k1-noreg"}
    if table == "study":
        assert {row for pair in grids.TABLES[table]["pairs"] for row in pair} <= set(grid.rows)
        assert {cell.row for cell in tuning} == set(grid.starts)
        assert len(tuning) == sum(1 + 2 * len(start) for start in grid.starts.values()) * len(grid.tasks)
        assert {("lora2-k1", 9), ("sora-r1", 2), ("lora2-k1-rates-unpruned", 4)} <= {
            (cell.row, cell.seed) for cell in reported(grid, {})}


@pytest.mark.parametrize("row, tuned, expected", [
    ("lora-r1", {}, {"method": "lora", "r": 1, "alpha": 2}), ("lora-r8", {}, {"r": 8, "alpha": 16}),
    ("sora-r8", {}, {"r": 8, "alpha": 16}), ("adalora-r2", {}, {"r": 3, "target_rank": 2, "alpha": 32}),
    ("adalora-r8", {}, {"r": 12, "target_rank": 8}),
    ("lora2-k8", {}, {"method": "lora2", "k": 8, "r": 4, "target_rank": 3, "alpha": 32}),
    ("lora2-k1-unpruned", {}, {"target_rank": 4}), ("lora2-k1-eq8", {}, {"importance": "full"}),
    ("lora2-k1-small", {}, {"r": 3, "alpha": 32}), ("lora2-k1-noreg", {}, {"reg": 0}),
    ("lora2-k1-qk", {}, {"targets": ["q", "k"]}), ("lora2-k1-factors", {}, {"reg_terms": ["uv", "UV"]}),
    ("lora2-k1", {"lr": 0.5, "scale": 8, "outer": 0.1}, {"alpha": 8 * 4, "lr": 0.5, "outer_lr": 0.05})])
def test_rows_are_what_they_are_called(row, tuned, expected):
    """Oracle: the paper's names and the authors' scales, on the task whose preset has r = 4."""
    found = grids.settings_of(grids.make_cell(grid_of("table1"), row, "cola", 0, tuned).flags)
    assert {name: found[name] for name in expected} == expected


def test_choice():
    """Oracle: by hand: the best last score, the first of equals, None before all have run; variants as their base;
    one that diverged is the worst. Of a search none whose neighbours cannot be tried."""
    grid = grid_of("table3 --preset small --tasks cola --seeds 0")
    base = grid.preset["base"]
    cells, chosen = grids.tuning_of(grid, base, "cola")
    assert chosen is None and len(cells) == 6
    for cell, value in zip(cells, (0.1, 0.3, 0.3, 0.2, None, 0.0)):
        assert len(grids.cells_of(grid)[1]) == len(grid.rows)
        more = {"failed": "at step 3"} if value is None else {"last": {"score": value}}
        grid.file["runs"].append(record_of(cell, **more))
    assert grids.tuning_of(grid, base, "cola")[1] == dict(cells[1].tuned)
    assert {dict(cell.flags)["lr"] for cell in reported(grid)} == {dict(cells[1].tuned)["lr"]}
    assert grids.tuning_of(grid_of("table3 --tasks cola"), "lora2-k1", "cola") == ([], {})
    study = grid_of(f"{STUDY} --rows head")
    while wanted := grids.missing(study):                  # the larger the better: it ends at the ladder's end
        for cell in wanted:
            study.file["runs"].append(record_of(cell, last={"score": dict(cell.tuned)["lr"]}))
    assert grids.tuning_of(study, "head", "stsb")[1] is None and grids.cells_of(study)[1] == [("head", "stsb")]


def test_two_rows_may_be_one_run(ran):
    """Oracle: by hand: where nothing is pruned a row and its unpruned variant have the same settings: one run, and
    the table has both."""
    words = "pruning --tasks cola --seeds 0 --more=--target-rank=4"
    assert ran(words) == [("lora2-k1-unpruned", "cola", 0)] and "not run" not in page_of(words)


def test_a_task_may_have_the_tuning_of_another(ran):
    """Oracle: by hand. On RTE nothing is chosen: its runs have what MRPC chose, and a scale is alpha over
    RTE's own r = 4; MRPC's runs are made once, for both tasks, and tune.md shows them under MRPC."""
    words = "--preset small --tasks mrpc,rte --seeds 0 --rows lora2-k1,full"
    called = ran(f"table1 {words}")
    tuning = [cell for cell in ran.cells if cell.seed == 1000]
    assert {cell.task for cell in tuning} == {"mrpc"} and len(set(tuning)) == len(tuning) == 6 + 3
    assert [call[1] for call in called].count("rte") == 2
    cell = next(cell for cell in ran.cells if cell[:2] == ("lora2-k1", "rte"))
    settings = grids.settings_of(cell.flags)
    assert cell.tuned == (("lr", 0.01), ("scale", 8))
    assert (settings["task"], settings["r"], settings["lr"], settings["alpha"]) == ("rte", 4, 0.01, 4 * 8)
    assert ran(f"tune {words}") == []
    tune = content_of(f"tune {words}")
    assert tune["tasks"] == ["mrpc"] and len(tune["runs"]) == len(tuning)


# --- in which order -----------------------------------------------------------------------------------------

def test_tuning_comes_first_then_seed_by_seed(ran):
    """Oracle: the list of runs: the whole grid on seed 1000, then the reported seeds with the best of it (here the
    highest rate and scale, by height()); tune.md says so, of full fine-tuning with a tenth of the rates, where
    nothing is adapted without scales; no reported number is of that seed."""
    words = "--preset small --tasks cola --seeds 0,1"
    assert [call[2] for call in ran(f"table4 {words}")] == [1000] * 3 * 2 + [0] * 4 + [1] * 4
    assert {run["seed"] for run in content_of(f"table4 {words}")["runs"]} == {0, 1}
    called = ran(f"tune {words} --rows full,head,{grids.PRESETS['small']['base']}")
    assert [call[::2] for call in called] == [("full", 1000)] * 3 + [("head", 1000)] * 3
    for line in ("full fine-tuning | 0.001 (of 3)", "head alone | 0.01 (of 3)",
                 "LoRA² k=1, orthonormal | 0.01, 8 (of 6)"):                # at the edge, where the grid ends
        assert f"| {line} |" in page_of("tune --preset small")


def test_timings_are_interleaved(ran):
    """Oracle: the order by hand: each seed runs all methods before the next seed does; one run at a time."""
    words = "table2 --tasks cola --seeds 0,1 --workers 4"
    args = reproduce.parse(words.split())
    assert args.workers == 1
    assert ran(words) == [(row, "cola", seed) for seed in (0, 1) for row in args.grid.rows]
    assert {dict(cell.flags)["max-steps"] for cell in ran.cells} == {grids.PRESETS["paper"]["timed_steps"]}
    assert "| LoRA² k=8 | 0.400±0.000 | 0.400±0.000 |" in page_of(words)
    assert "| LoRA² k=8 − AdaLoRA r=8 | ≈+0.000 [+0.000, +0.000] |" in page_of(words)


def handed_out(args, error):
    """The cells that are handed out to workers, in order, where every run ends in this error."""
    handed = []

    def submit(function, cell, *more):
        handed.append(cell)
        ended = Future()
        ended.set_exception(error)
        return ended

    with contextlib.suppress(KeyboardInterrupt):
        workers.run_all(args, SimpleNamespace(submit=submit), None)
    return handed


def test_stages_come_in_order():
    """Oracle: tables.json: what is handed out first is of the first stage; no more than there are workers."""
    args = reproduce.parse(f"{STUDY},cola --workers 50".split())
    args.grid.rows.reverse()
    handed = [cell.row for cell in handed_out(args, KeyboardInterrupt())]
    first, second = (set(rows.split()) for rows, _ in grids.TABLES["study"]["stages"][:2])
    assert len(handed) == 50 and set(handed[:44]) == first and set(handed[44:]) <= second


def test_what_is_reported_waits_for_its_tuning(monkeypatch):
    """Oracle: the order by hand: a run that tunes may still change the choice of its row, not of another's."""
    args = reproduce.parse(f"{STUDY},cola --workers 50".split())
    tunes = grids.missing(args.grid)[0]
    other = next(row for row in args.grid.rows if grids.row_of(row)[2] != tunes.row)
    cells = [tunes, tunes._replace(seed=0), tunes._replace(seed=0, row=other)]
    monkeypatch.setattr(grids, "missing", lambda grid: cells)
    assert [cells.index(cell) for cell in handed_out(args, RuntimeError())] == [0, 2, 1]


def test_a_study(ran):
    """Oracle: by hand, from the stand-in's scores. The optimum of height() is chosen though two rungs away, 0.03
    diverged and is recorded; reported runs have the choice, seeds pair; a second call runs nothing."""
    words = f"{STUDY} --rows lora-r1,lora2-k1-rates,lora2-k1-rates-noreg --seeds 0,1,2"
    ran(words)
    content, page = content_of(words), page_of(words)
    shown = [run for run in content["runs"] if run["part"] == "reported"]
    assert len(shown) == 3 * 3 and {run["seed"] for run in shown} == {0, 1, 2}
    assert all(run["tuned"] | {"outer": 3} == {"lr": 0.01, "scale": 32, "outer": 3} for run in shown)
    assert {run["tuned"]["lr"] for run in content["runs"] if "failed" in run} == {0.03}
    assert "| LoRA r=1 | 50.10±0.10 | 50.10±0.10 |" in page
    assert "| LoRA² k=1, orthonormal, two rates | 50.00 |" in page                       # the worst seed
    assert "| LoRA² k=1, orthonormal, two rates − LoRA r=1 | ≈+0.00 [+0.00, +0.00] |" in page
    assert re.search(r"0.01, 32 \(of \d+, \d diverged\)", page) and "0.01, 32, × 3 (of" in page
    assert "LoRA² k=1, orthonormal, two rates, no regulariser" in page
    for more in ("", " --no-run"):
        assert ran(words + more) == [] and page_of(words) == page
    again = ran(f"{words} --more=--epochs=2")              # other settings are another search, by the same scores
    assert sorted(again) == sorted((run["row"], run["task"], run["seed"]) for run in content["runs"])
    assert ran(words) == [] and page_of(words) == page


def test_a_deadline_and_going_on(ran, monkeypatch):
    """Oracle: the clock of the stand-in: after the deadline nothing begins; the same command runs the rest."""
    words = f"{STUDY} --rows lora-r1,head --seeds 0,1"
    assert ran(f"{words} --seconds 0") == []
    clock = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock))
        first = ran(f"{words} --seconds 20")
    assert 0 < len(first) < 20 and len(content_of(words)["runs"]) == len(first)
    second = ran(words)
    assert len(first + second) == len(content_of(words)["runs"])


# --- what goes wrong ----------------------------------------------------------------------------------------

def test_a_mistake_ends_it_all_a_failure_does_not(ran, capsys):
    """Oracle: by hand. A run that fails: the others run, status 1 and a line for it; the table has a gap; the same
    command runs it again. A user's mistake: its line is ours, nothing more is run. A killed worker: likewise."""
    which = "lora2-k1-qv", "cola", 0
    ran.fails[which] = RuntimeError("status 1, the disk is full")
    assert len(ran(FOUR, status=1)) == 4 and capsys.readouterr().err == "error: status 1, the disk is full\n"
    assert page_of(FOUR).count("not run") == 8
    ran.fails.clear()
    assert ran(FOUR) == [which] and "not run" not in page_of(FOUR)
    for error, says in ((ValueError("there is no model x"), "there is no model x"),
                        (BrokenProcessPool("gone"), "fewer --workers")):
        grid_of(FOUR).path.unlink()
        ran.cells.clear()
        ran.fails[which] = error
        refused(FOUR, capsys, says)
        assert len(ran.cells) == 2


def test_what_is_there_is_shown_after_a_stop(ran, capsys):
    """Oracle: by hand: status 130, a page with the runs there are: none if stopped at once, then one."""
    for row, shown in (("lora2-k1-qk", "not run"), ("lora2-k1-qv", "50.00")):
        ran.fails = {(row, "cola", 0): KeyboardInterrupt()}
        ran(FOUR, status=130)
        assert "the same command goes on" in capsys.readouterr().err
        assert f"query, key | {shown} |" in page_of(FOUR) and "query, value | not run" in page_of(FOUR)


@pytest.mark.parametrize("words", [f"{STUDY} --rows head", "table1 --preset small --tasks stsb --rows head"])
def test_a_diverged_seed_is_shown(words, ran):
    """Oracle: by hand: it is in no mean, the count says so, and the page names it; it is not run again."""
    ran.fails["head", "stsb", 1] = "loss or gradient was not finite at step 9"
    assert ran(f"{words} --seeds 0,1,2") and ran(f"{words} --seeds 0,1,2") == []
    assert "(n = 2)" in page_of(words) and "Diverged, and in no mean: head on stsb, seed 1." in page_of(words)


@pytest.mark.parametrize("words, says", [
    ("table9", "table9"), ("table1 --preset huge", "huge"), ("table1 --preset fair", "no preset of table1 'fair': there are paper, small"),
    ("table1 --tasks cola,wnli", "wnli"), ("table1 --tasks=", "no task ''"), ("table1 --rows lora", "no row 'lora'"),
    ("table1 --more=--epochs=none", "--epochs"), ("table1 --seeds 0,1000", "1000"), ("table1 --seeds a", "--seeds a"),
    ("table1 --device abacus", "abacus"), ("table1 --no-run", "runs.json cannot be read"),
    ("table1 --workers 0", "--workers 0"), ("table1 --task cola", "--task"), ("", "table")])
def test_mistakes_end_in_one_line(words, says, ran, capsys):
    """Oracle: status 2 and one line "error: ..." that names the mistake; nothing runs."""
    refused(words, capsys, says)
    assert ran.cells == [] and not Path("experiments").exists()


@pytest.mark.parametrize("spoil, says", [("edge", "(of 4) unfinished"), ("better", "0.003, 32 (of 5) unfinished")])
def test_a_choice_on_an_edge_is_not_shown(spoil, says, ran):
    """Oracle: by hand. Without a run at one side of the choice, or with a better one beside it, which is now at an
    edge, the row is not run and its choice unfinished; the same command runs what is missing of it alone."""
    words = f"{STUDY} --seeds 0,1 --rows head,lora-r1"
    ran(words)
    grid = grid_of(words)
    beside, = [run for run in grid.file["runs"] if run["part"] == "tune" and run["row"] == "lora-r1"
               and run["tuned"] == {"lr": 0.003, "scale": 32}]
    if spoil == "edge":
        grid.file["runs"].remove(beside)
    else:
        beside["last"]["score"] = 0.9
    summary.write(grid.path, grid.file)
    assert ran(f"{words} --no-run") == [] and "\nNot run: LoRA r=1.\n" in page_of(words)
    assert re.search(rf"\| LoRA r=1 \| .*unfinished", page_of(words)) and "head alone | 50." in page_of(words)
    assert {call[0] for call in ran(words)} == {"lora-r1"} and "not run" not in page_of(words)


# --- what is trusted ----------------------------------------------------------------------------------------

def test_what_is_finished_is_not_run(ran, capsys):
    """Oracle: the list of runs, and the bytes. The second call runs nothing and writes the same; nothing that the
    file lists is run for another table; one more seed runs alone; a narrower table loses nothing. A damaged file is
    named."""
    words = "--tasks cola,mrpc --seeds"
    assert len(ran(f"table4 {words} 0,1")) == 4 * 2 * 2
    folder = grid_of("table4").path.parent
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert ran(f"table4 {words} 0,1") == [] and before == {path: path.read_bytes() for path in folder.iterdir()}
    assert {call[2] for call in ran(f"table4 {words} 0,1,2")} == {2}
    assert ran(FOUR) == [] and len(content_of(FOUR)["runs"]) == 4
    assert ran(f"table4 {words} 0,1") == [] and page_of("table4").encode() in before.values()
    assert {call[0] for call in ran(f"pruning {words} 0,1,2")} == {"lora2-k1-unpruned"}
    assert {call[0] for call in ran(f"overlap {words} 0")} == {"lora2-k1-eq8"}
    assert len(content_of(f"overlap {words} 0")["runs"]) == 4
    assert all(run["kept"] == {"f2": [[0, 1], [run["seed"] % 3]]} for run in grid_of(FOUR).file["runs"])
    assert "| 68.66 |" in page_of("table4")                # the paper's
    grid_of("table4").path.write_text("{")
    refused(f"table4 {words} 0", capsys, "runs.json is damaged", "remove it")


def test_another_choice_leaves_the_runs_of_before(ran):
    """Oracle: by hand. A tuning that proves better later has runs of its own; those of before stay in the file and
    are shown again should theirs be the best once more."""
    words = f"{FOUR} --preset small"
    ran(words)
    first = content_of(words)["runs"]
    assert len(first) == 4 and first[0]["tuned"]["lr"] == 0.01
    for score, called, lr in ((0.99, [0] * 4, 0.001), (0.0, [], 0.01)):
        def praise(one):
            if one["part"] == "tune" and one["tuned"] == {"lr": 0.001, "scale": 2}:
                one["last"]["score"] = score
        change(words, praise)
        assert [call[2] for call in ran(words)] == called
        assert {run["tuned"]["lr"] for run in content_of(words)["runs"]} == {lr}
    assert content_of(words)["runs"] == first


@pytest.mark.parametrize("name, value, is_other", [
    ("lr", 0.5, True), ("model", "other", True), ("reg_terms", ["uv"], True), ("unheard_of", 1, True),
    ("alpha", 32.0, False)])
def test_runs_with_other_settings_are_others(name, value, is_other, ran):
    """Oracle: by hand: it is run anew, and stays in the file beside the new one, in no table; 32.0 is 32."""
    ran(FOUR)
    grid = grid_of(FOUR)
    grid.file["runs"][1]["settings"][name] = value
    summary.write(grid.path, grid.file)
    assert ran(FOUR) == ([("lora2-k1-qv", "cola", 0)] if is_other else [])
    after = grid_of(FOUR).file["runs"]
    assert len(content_of(FOUR)["runs"]) == 4 and after[:4] == grid.file["runs"] and len(after) == 4 + is_other


@pytest.mark.parametrize("what, says", [
    ("device", "another device (other, not cpu)"), ("rows", "other cola data (cola, not other)")])
def test_runs_that_belong_to_no_one_table(what, says, ran, capsys):
    """Oracle: status 2 and one line, before anything runs, or where nothing does, with the names of two runs; another
    task has other data, older runs do not tell."""
    words = "table4 --preset small --tasks cola,stsb --seeds"
    ran(f"{words} 0")
    change(words[:-8], lambda one: one.update(base="a", rows=one["task"]))
    ran(f"{words} 0,1")
    tuned = [one for one in grid_of(words[:-8]).file["runs"] if one["task"] == "cola"][0]
    change(words[:-8], lambda one: one.update({what: "other"} if one == tuned else {}))
    ran.cells.clear()
    refused(f"{words} 0,1,2", capsys, says)
    assert ran.cells == []


def test_a_page_mixes_no_models(ran, capsys):
    """Oracle: status 2 and one line that names a run and both models; without a page, all runs are kept."""
    ran(FOUR)
    names = iter("abcd")
    change(FOUR, lambda one: one.update(base=next(names)))
    refused(f"{FOUR} --no-run", capsys, "lora2-k1-qv on cola, seed 0", "another model (b, not a)")
    assert len(content_of(FOUR)["runs"]) == 4


def test_a_dry_run_leaves_no_trace(ran, capsys):
    """Oracle: the folder, as before; a line with the state and the whole command of each run."""
    ran("table4 --tasks cola --seeds 1")
    begin(reported(grid_of(FOUR))[0])
    before = sorted(Path().rglob("*"))
    assert ran("table4 --tasks cola --seeds 0,1 --dry-run") == []
    lines = capsys.readouterr().out.splitlines()[-8:]
    states = [line.split(" python")[0].strip() for line in lines]
    assert states == ["resume", *["to run"] * 3, *["done"] * 4]
    assert all(" python train.py --task cola --model " in line and " --out " in line for line in lines)
    ran("table1 --preset small --tasks stsb --dry-run")
    later = [line for line in capsys.readouterr().out.splitlines() if line.startswith("later ")]
    assert len(later) == len(grids.TABLES["table1"]["rows"]["small"].split()) and sorted(Path().rglob("*")) == before


def test_a_folder_is_known_by_its_own_name(tmp_path, monkeypatch):
    """Oracle: the file system: the folder that "." is."""
    (tmp_path / "tuned").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path / "tuned")
    for model, name in ((".", "tuned"), ("FacebookAI/tuned", "tuned"), (f"{tmp_path}/link/", "link")):
        assert grid_of(f"table1 --model {model}").path.parent.name == f"paper-{name}"


@pytest.mark.parametrize("table", grids.TABLES)
def test_a_table_of_nothing(table, ran):
    """Oracle: there are no runs: status 0, a table that says so, and no file but that."""
    if table == "figure3":
        pytest.importorskip("matplotlib")
    assert ran(f"{table} --seconds 0") == []
    assert {path.name for path in grid_of(table).path.parent.iterdir()} == {f"{table}.md"}
    assert "\n0 runs, " in page_of(table) and ("not run" in page_of(table).lower() or table == "tune")


def test_one_at_a_time_in_a_folder(ran, capsys):
    """Oracle: status 2 and one line; nothing runs. The page may be written meanwhile; later all is well."""
    pytest.importorskip("fcntl")
    with disk.alone(grid_of(FOUR).path.parent, "reproduce.py"):
        refused(FOUR, capsys, "another reproduce.py is running", "--out")
        assert ran.cells == []
    assert len(ran(FOUR)) == 4
    with disk.alone(grid_of(FOUR).path.parent, "reproduce.py"):
        ran(f"{FOUR} --no-run")


def test_why_is_run_by_name_too(monkeypatch):
    """Oracle: by hand: the words behind it are why.py's."""
    monkeypatch.setattr(why, "main", lambda words: words)
    assert reproduce.main(["why", "--no-run"]) == ["--no-run"]


# --- workers ------------------------------------------------------------------------------------------------

@pytest.fixture
def cell():
    return reported(grid_of(FOUR))[1]


@pytest.fixture
def told(monkeypatch):
    """Instead of train.main: told.says is a list of (status, its last line); told.words what it was called with."""
    asked = SimpleNamespace(words=[], says=[])

    def main(words):
        asked.words.append(words)
        status, said = asked.says.pop(0) if asked.says else (0, "")
        print("chatter")
        print(said, file=sys.stderr)
        return status

    monkeypatch.setattr(train, "main", main)
    return asked


def test_train_is_called_as_its_command_line_wants(cell, told, capfd):
    """Oracle: options.parse, which reads what was passed; --resume for a begun run, with all its options,
    which train.py holds against what is stored; if its files do not fit it begins anew; a timed one always does;
    its chatter is not shown; its folder is removed."""
    leave_run(cell)
    record = workers.work(cell, False)
    assert record["last"]["score"] == 0.75 and "step_seconds" not in record and not cell.folder.exists()
    assert vars(options.resolve(options.parse(told.words[0]))) == grids.settings_of(cell.flags) | {
        "out": str(cell.folder), "overwrite": True}
    leave_run(cell)
    begin(cell)
    told.says = [(2, "error: adapter.safetensors is missing")]
    workers.work(cell, False)
    given = options.parse(told.words[1])
    assert given.pop("resume") == str(cell.folder)
    assert vars(options.resolve(given)) == grids.settings_of(cell.flags)
    assert told.words[2] == told.words[0]
    leave_run(cell)
    begin(cell)
    assert workers.work(cell, True)["step_seconds"] == 0.4
    assert told.words[3] == told.words[0] and "chatter" not in capfd.readouterr().out


@pytest.mark.parametrize("status, said, error", [
    (2, "error: there is no model x", ValueError), (1, "error: disk full", RuntimeError), (143, "stopped", RuntimeError)])
def test_the_statuses_of_train(status, said, error, cell, told):
    """Oracle: train.py's statuses: 2 is a mistake, 1 a failure, unless the run diverged: a record that says so."""
    told.says = [(status, f"warning: first\n{said}")]
    with pytest.raises(error, match=said.removeprefix("error: ")):
        workers.work(cell, False)
    begin(cell)
    told.says = [(1, "error: loss or gradient was not finite at step 3; the last good state is in x")]
    found = workers.work(cell, False)
    assert found["failed"] == "loss or gradient was not finite at step 3" and "best" not in found
    assert found["settings"] == summary.comparable(grids.settings_of(cell.flags)) and not cell.folder.exists()


def test_the_record_of_a_run():
    """Oracle: by hand, from the files that train.py leaves: Λ that is not 0 at 1 and 3 keeps those; what is not
    asked is not there."""
    cell = reported(grid_of("overlap --tasks cola --seeds 0"))[0]
    leave_run(cell, kept={"deberta.encoder.layer.0.output.dense": [1, 3]}, base="x", task="cola", peak_memory_gb=3)
    run = grids.about(cell) | summary.record(cell.folder)
    assert not run["settings"].keys() & options.PLACES and "dtype" not in run["settings"]
    assert run["kept"] == {"f2": [[1, 3]]} and run["ranks"] == {"f2": [2]}
    assert [run[name] for name in list(run)[:5]] == ["lora2-k1", "cola", 0, "reported", {}]
    assert run["last"]["scores"] == scores_of(0.75) and run["peak_memory_gb"] is None
    assert (run["base"], run["rows"], run["seconds"], run["device"]) == ("x", None, 36.0, "cpu")
    assert run["settings"] == summary.comparable(grids.settings_of(cell.flags))


LINE = '{"step": 3, "loss": 1.0, "seconds": 1.0}\n'


@pytest.mark.parametrize("name, damage", [
    ("result.json", "{"), ("ranks.json", '{"classifier": 1}'), ("last.pt", ""), ("log.jsonl", ""),
    ("log.jsonl", "{"), ("log.jsonl", "7\n" * 3), ("log.jsonl", '{"loss": 1.0}\n' * 3), ("log.jsonl", LINE),
    ("log.jsonl", LINE * 2), ("log.jsonl", LINE.replace(', "seconds": 1.0', "") * 2)])
def test_damaged_files_of_a_run_are_named(name, damage, cell, told):
    """Oracle: ValueError with the folder and what to do: there is a whole record or none. Of a whole log ten steps
    take 4 seconds."""
    leave_run(cell, kept={"layer.0.output.dense": [0]})
    assert summary.step_seconds(cell.folder) == 0.4
    (cell.folder / name).write_text(damage)
    with pytest.raises(ValueError, match=f"{cell.folder} is damaged .* remove it and run it again"):
        workers.work(cell, name == "log.jsonl")


@pytest.mark.parametrize("named, count, expected", [
    (None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("3,5", 1, ["3"]), ("", 0, []), (None, 0, [])])
def test_visible_gpus(named, count, expected, monkeypatch):
    """Oracle: CUDA's rule: of the devices that are named, those that torch counts are ours."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert workers.visible_gpus() == expected


@pytest.mark.ci
def test_workers_share_cores_and_gpus(monkeypatch):
    """Oracle: by hand: of 4 workers two are on each of GPUs 3 and 5; threads are cores over workers, at least 1."""
    monkeypatch.setattr(workers, "visible_gpus", lambda: ["3", "5"])
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "77")
    found = set()
    with workers.make_pool(4) as pool:
        while len({pid for pid, _, _ in found}) < 4:       # until each has answered
            found |= {future.result() for future in [pool.submit(environment) for _ in range(8)]}
    assert sorted(gpu for _, gpu, _ in found) == ["3", "3", "5", "5"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert {threads for _, _, threads in found} == {str(max(1, cores // 4))}


def environment():
    """What a worker finds around it."""
    time.sleep(0.05)
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]


# --- the real thing -----------------------------------------------------------------------------------------

def real(cli, table, *words):
    """A command line on a BERT of two layers and STS-B; {(part, seed, tuning): record} of what it found."""
    argv = [table, "--model", str(cli.models["bert"]), "--device", "cpu", "--seeds", "0,1", *words]
    assert reproduce.main(argv) == 0
    grid = reproduce.parse(argv).grid
    return grid, {(run["part"], run["seed"], str(run["tuned"])): run for run in grid.file["runs"]}


def test_a_tiny_study_through_train(cli, here):
    """Oracle: train.py itself, on a BERT of two layers: what it found is in the file, no folder is left; a run with
    a rate at which it diverges is recorded as that."""
    write_task("stsb")
    grid, found = real(cli, "study", "--tasks", "stsb", "--rows", "head", *TINY)
    shown = [run for (part, *_), run in found.items() if part == "reported"]
    assert len(shown) == 2 and {run["settings"]["method"] for run in found.values()} == {"head"}
    assert shown[0]["last"]["scores"]["dev"].keys() == {"pearson", "spearman"}
    assert [path for path in grid.runs.rglob("*") if path.is_file()] == []
    cell = grids.make_cell(grid, "lora2-k1-rates", "stsb", 0, POINT | {"outer": 0.3})
    record = workers.work(cell, False)
    assert record["settings"]["outer_lr"] == 0.0003 and record["settings"]["init"] == "orthonormal"
    counts = {short: [len(indices) for indices in layers] for short, layers in record["kept"].items()}
    assert counts == record["ranks"] and sum(map(sum, counts.values())) == 12 * 1          # STS-B's target rank
    record = workers.work(grids.make_cell(grid, "lora-r1", "stsb", 0, {"lr": 1e30, "scale": 8192}), False)
    assert "not finite" in record["failed"] and "best" not in record


@pytest.mark.ci
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped(number, cli):
    """Oracle: a real run of many steps. It is told to save; no other begins; the status is 130; the next call would
    go on with it."""
    write_task("cola")
    words = [sys.executable, str(ROOT / "experiments" / "reproduce.py"), *FOUR.split(), "--model",
             str(cli.models["bert"]), "--device", "cpu", "--out", "t4.json", TINY[0],
             f"{TINY[1]} --epochs 3000 --save-steps 5"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 90
    saved = "reproduce/*/*/*/last.pt"                    # no rglob(): folders go while the run writes
    while not list(Path("runs").glob(saved)) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)                         # as a terminal does: to all of its group
    _, said = process.communicate(timeout=60)
    said = [line for line in said.splitlines() if "resource_tracker" not in line]      # SIGHUP ends Python's own
    assert process.returncode == 130 and "stopped: the same command goes on" in said and "error" not in str(said)
    state, = Path("runs").glob(saved)
    listed = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split(" python")[0].strip() for line in listed] == ["resume", *["to run"] * 3]
    assert str(state.parent) in listed[0]
