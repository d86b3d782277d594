"""Tests of reproduce.py: which runs a table has, what runs when, what is recorded, trusted, refused.

Offline. Most run no train.py: records are a stand-in's. The real one runs in the last tests:
    pytest -m "slow or ci" tests/test_reproduce.py
"""
import itertools
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
from experiments import reproduce, search, summary, workers
from formats import disk
from running import folder as runs
from running import options
from tests.cli import write_task

ROOT = Path(__file__).parent.parent
PAPER = reproduce.PAPER
POINT = {"lr": 0.001, "scale": 8}
TINY = "--limit-train 32 --limit-dev 16 --epochs 1 --max-len 16"


def scores_of(value):
    """The scores of a run that has the same value everywhere."""
    names = ("matthews", "pearson", "spearman", "accuracy", "f1")
    return {split: dict.fromkeys(names, value) for split in ("dev", "dev_matched", "dev_mismatched")}


def result_of(cell, last=0.75, **settings):
    """The content of a result.json that fits a cell, but for other `settings`."""
    best = last + 0.1
    return {"settings": grids.settings_of(cell.flags) | settings, "steps": 10, "adapter_parameters": 1560,
            "head_parameters": 10, "seconds": 36.0, "device": "cpu", "dtype": "fp32", "threads": 1,
            "torch": "2", "python": "3", "date": "2026-01-01",
            "best": {"step": 5, "scores": scores_of(best), "score": best},
            "last": {"step": 10, "scores": scores_of(last), "score": last}}


def leave_run(cell, result=None, kept=None, speed=100):
    """The folder of a cell as train.py leaves it. kept: {module name: indices} of a method that prunes."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "result.json").write_text(json.dumps(result or result_of(cell)))
    points = (1, 5, 9.0), (10, 30, 20.0), (20, 30 + 4 * speed, 24.0)           # slow up to step 10
    lines = [{"step": step, "loss": 1.0, "tokens": n, "seconds": at} for step, n, at in points]
    lines.append({"step": 20, "score": 0.5})
    (cell.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if kept is not None:
        (cell.folder / "ranks.json").write_text(json.dumps({name: len(some) for name, some in kept.items()}))
        weights = {f"{name}.lam": torch.zeros(12).index_fill(0, torch.tensor(some, dtype=torch.long), -2.0)
                   for name, some in kept.items()}
        runs.write_state(cell.folder, {"weights": weights | {"layer.0.u": torch.ones(2)}})


def begin(cell):
    """A last.pt as a stopped run leaves it."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    runs.write_state(cell.folder, {"settings": grids.settings_of(cell.flags), "weights": {}})


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
    """Instead of train.py: the record of a run that scored height(). ran.calls: (row, task, seed);
    ran.fails: {the same: what it raises, or how it diverged}; a learning rate of 0.03 diverges in a study."""
    told = SimpleNamespace(calls=[], fails={}, cells=[])

    def work(cell, is_timed, keep):
        which = cell.row, cell.task, cell.seed
        told.calls.append(which)
        told.cells.append(cell)
        fails = told.fails.get(which)
        if isinstance(fails, BaseException):
            raise fails
        if fails or dict(cell.tuned).get("lr") == 0.03:
            return summary.start_of(cell, grids.settings_of(cell.flags)) | {"failed": fails or "not finite"}
        leave_run(cell, result_of(cell, height(cell)),
                  {"layer.0.output.dense": [0, 1], "layer.1.output.dense": [cell.seed % 3]})
        record = summary.record(cell)
        if is_timed:
            record["tokens_per_second"] = summary.speed(cell.folder)
        shutil.rmtree(cell.folder)
        return record

    monkeypatch.setattr(workers, "work", work)
    return told


def where(tmp_path):
    """Options that give folders for tables and runs."""
    return ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]


def grid_of(tmp_path, *argv):
    return reproduce.parse([*argv, *where(tmp_path)]).grid


def refused(argv, capsys, *says, main=reproduce.main):
    """Status 2 and one line "error: ..." that has all of `says`; the line."""
    capsys.readouterr()
    assert main(argv) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in says), line
    return line


def reported(grid, tuned=None):
    """The runs that a table shows; of one that is tuned as if it had chosen that."""
    if tuned is None:
        return list(grids.cells_of(grid)[1])
    return [grids.make_cell(grid, row, task, seed, tuned) for task in grid.tasks for row in grid.rows
            for rows, seeds in grid.stages for seed in seeds if row in rows]


def change(path, change_one):
    """Write TABLE.json anew, with change_one(record) done to each of its records."""
    content = summary.load(path)
    for one in content["runs"] + content["left_out"]:
        change_one(one)
    summary.write(path, content)


@pytest.fixture
def four(tmp_path):
    """Table 4 on CoLA with seed 0, four runs: its command, its cells, its files."""
    argv = ["table4", "--tasks", "cola", "--seeds", "0", *where(tmp_path)]
    grid = reproduce.parse(argv).grid
    return SimpleNamespace(argv=argv, grid=grid, cells=reported(grid), json=grid.path,
                           page=grid.path.with_suffix(".md"))


STUDY = ["study", "--model", "tiny", "--device", "cpu"]


@pytest.fixture
def study(tmp_path):
    """study(words) is a study's command line; study.json and .page are its files, of that name."""
    path = tmp_path / "study.json"

    def words(more):
        return [*STUDY, "--out", str(path), "--runs", str(tmp_path / "runs"), *more.split()]

    words.json, words.page = path, path.with_suffix(".md")
    return words


# --- the search ---------------------------------------------------------------------------------------------

def test_neighbours():
    """Oracle: by hand: a rung up and down on each axis; the end of a ladder has one side."""
    assert search.neighbours(POINT) == [POINT | {"lr": 0.0003}, POINT | {"lr": 0.003},
                                        POINT | {"scale": 2}, POINT | {"scale": 32}]
    assert search.neighbours({"lr": 1e-5}) == [{"lr": 3e-5}] and search.neighbours({"lr": 0.3}) == [{"lr": 0.1}]
    for ladder in search.LADDERS.values():
        assert list(ladder) == sorted(set(ladder))


def test_the_grid_grows_until_the_best_is_inside():
    """Oracle: by hand: first the start and around it, then around the best, until both sides of it are there."""
    start, tried = {"lr": 0.001}, []
    assert search.missing(tried, start) == [{"lr": 0.001}, {"lr": 0.0003}, {"lr": 0.003}]
    tried += [({"lr": 0.001}, 0.5), ({"lr": 0.0003}, 0.4), ({"lr": 0.003}, 0.6)]
    assert search.best(tried) == {"lr": 0.003} and not search.is_inside(tried)
    assert search.missing(tried, start) == [{"lr": 0.01}]
    tried.append(({"lr": 0.01}, -math.inf))                # diverged: tried, and worse
    assert search.missing(tried, start) == [] and search.is_inside(tried)
    assert not search.is_inside([({"lr": 1e-5}, 1), ({"lr": 3e-5}, 0)])        # the ladder's end
    assert search.best([({"lr": 0.1}, -math.inf)]) is None and search.missing([], start)


# --- which runs ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("table, preset", [(table, preset) for table in grids.TABLES
                                           for preset in grids.TABLES[table]["tasks"]])
def test_every_run_is_legal(table, preset, tmp_path):
    """Oracle: train.py's own reading of options. Every run of every table is accepted and has a folder of its
    own; where a row is tuned, none is reported before that; each pair's rows are there; in the paper's preset
    every row of Tables 1, 3 and 4 has its numbers in paper.json."""
    grid = grid_of(tmp_path, table, "--preset", preset)
    tuning, shown, later = grids.cells_of(grid)
    if grid.preset["lrs"] and not grid.is_timed or grid.starts:
        assert shown == {} and len(later) == len(grid.tasks) * len(grid.rows) * (table != "tune")
        adapted = [row for row in grid.rows if grids.row_of(row)[1].get("method") not in ("full", "head", "bitfit")]
        shown = reported(grid._replace(rows=adapted), POINT)
    cells = [*tuning, *shown]
    assert len({cell.folder for cell in cells}) == len(cells) and (cells or (table, preset) == ("tune", "paper"))
    for cell in cells:
        settings = grids.settings_of(cell.flags)
        assert (settings["task"], settings["seed"], settings["model"]) == (cell.task, cell.seed, grid.model)
        if preset == "small":
            epochs = 3 if cell.seed == grids.TUNE_SEED and cell.task == "stsb" else 6
            assert (settings["epochs"], settings["limit_train"]) == (epochs, 2000)
    if preset == "paper" and table in ("table1", "table3", "table4"):
        named = reproduce.paper_of(grid, preset)
        assert len(named) == len(PAPER[table]["rows"]) and set(grid.rows) - set(named) <= {"lora2-k1-noreg"}
    if table == "study":
        assert {row for pair in grids.TABLES[table]["pairs"] for row in pair} <= set(grid.rows)


def test_rows_are_what_they_are_called(tmp_path):
    """Oracle: the paper's names and the authors' scales, on the task whose preset has r = 4."""
    grid = grid_of(tmp_path, "table1", "--tasks", "cola", "--seeds", "0")
    settings = {cell.row: grids.settings_of(cell.flags) for cell in reported(grid)}
    pick = lambda row, *names: tuple(settings[row][name] for name in names)
    assert pick("lora-r1", "method", "r", "alpha") == ("lora", 1, 2)
    assert pick("lora-r8", "r", "alpha") == pick("sora-r8", "r", "alpha") == (8, 16)
    assert pick("lora2-k8", "method", "k", "r", "target_rank", "alpha") == ("lora2", 8, 4, 3, 32)
    assert pick("adalora-r2", "r", "target_rank") == (3, 2)
    assert pick("adalora-r8", "r", "target_rank") == (12, 8)
    for variant, name, value in (("unpruned", "target_rank", 4), ("eq8", "importance", "full"), ("small", "r", 3),
                                 ("noreg", "reg", 0), ("qk", "targets", ["q", "k"]),
                                 ("factors", "reg_terms", ["uv", "UV"])):
        cell = grids.make_cell(grid, f"lora2-k1-{variant}", "cola", 0, {})
        assert grids.settings_of(cell.flags)[name] == value
    scaled = grids.make_cell(grid, "lora2-k1", "cola", 0, {"lr": 0.5, "scale": 8, "outer": 0.1})
    found = grids.settings_of(scaled.flags)
    assert (found["alpha"], found["lr"], found["outer_lr"]) == (8 * 4, 0.5, 0.05)


def test_one_grid_for_all_methods(tmp_path):
    """Oracle: the preset's two or three values each; full fine-tuning has a tenth of the rates, no scale."""
    grid = grid_of(tmp_path, "tune", "--preset", "small", "--tasks", "stsb")
    rates, scales = grid.preset["lrs"], grid.preset["scales"]
    assert 2 <= len(rates) <= 3 and 2 <= len(scales) <= 3
    both = [{"lr": lr, "scale": scale} for lr in rates for scale in scales]
    for row in grid.rows:
        method = grids.row_of(row)[1].get("method", "lora2")
        assert grids.fixed_points(grid, row) == (
            [{"lr": pytest.approx(lr / 10)} for lr in rates] if method == "full" else
            [{"lr": lr} for lr in rates] if method in ("head", "bitfit") else both)
    assert {cell.seed for cell in grids.cells_of(grid)[0]} == {grids.TUNE_SEED}


def test_a_search_begins_at_its_start_and_around_it(tmp_path):
    """Oracle: study.json, and train.py's own reading of options, for each row that is tuned on each task."""
    grid = grid_of(tmp_path, "study")
    tuning, begun, _ = grids.cells_of(grid)
    assert begun == {} and {cell.row for cell in tuning} == set(grid.starts)
    for row, task in itertools.product(grid.starts, grid.tasks):
        wanted = [cell for cell in tuning if cell[:2] == (row, task)]
        assert len(wanted) == 1 + 2 * len(grid.starts[row])
        for cell in wanted:
            settings, point = grids.settings_of(cell.flags), dict(cell.tuned)
            assert settings["lr"] == point["lr"] and settings["seed"] == 1000 and settings["limit_train"] == 2000
            assert "scale" not in point or settings["alpha"] / settings["r"] == point["scale"]
            assert "outer" not in point or settings["outer_lr"] == pytest.approx(point["lr"] * point["outer"])
    shown = {(cell.row, cell.seed) for cell in reported(grid, {})}
    assert {("lora2-k1", 9), ("lora-r8", 9), ("sora-r1", 2), ("lora2-k1-rates-unpruned", 4)} <= shown


@pytest.mark.parametrize("preset", ["paper", "small"])
def test_no_evaluation_is_timed(preset, tmp_path):
    """Oracle: the official numbers of rows: a timed run ends before its first epoch does."""
    for cell in reported(grid_of(tmp_path, "table2", "--preset", preset)):
        settings = grids.settings_of(cell.flags)
        rows = min(TASKS[settings["task"]].rows["train"], settings["limit_train"] or math.inf)
        assert settings["max_steps"] < rows / settings["batch_size"]


def test_choice(tmp_path):
    """Oracle: by hand: the best last score, the first of equals, None before all have run; variants as their base;
    one that diverged is the worst."""
    grid = grid_of(tmp_path, "table3", "--preset", "small", "--tasks", "cola", "--seeds", "0")
    base = grid.preset["base"]
    cells, chosen = grids.tuning_of(grid, base, "cola")
    assert chosen is None and len(cells) == 6 and len(grids.cells_of(grid)[2]) == len(grid.rows)
    for cell, value in zip(cells, (0.1, 0.3, 0.3, 0.2, None, 0.0)):
        record = summary.start_of(cell, grids.settings_of(cell.flags)) | {"last": {"score": value}}
        grid.remember(record if value is not None else record | {"failed": "at step 3"})
    assert grids.tuning_of(grid, base, "cola")[1] == dict(cells[1].tuned)
    assert {dict(cell.flags)["lr"] for cell in reported(grid)} == {dict(cells[1].tuned)["lr"]}
    paper = grid_of(tmp_path, "table3", "--tasks", "cola")
    assert grids.tuning_of(paper, "lora2-k1", "cola") == ([], {})


def test_a_task_may_have_the_tuning_of_another(tmp_path, ran, capsys):
    """Oracle: by hand. On RTE nothing is chosen: its runs have what MRPC chose, and a scale is alpha over
    RTE's own r = 4; MRPC's runs are made once, for both tasks, and tune.json shows them under MRPC."""
    argv = ["--preset", "small", "--tasks", "mrpc,rte", "--seeds", "0", *where(tmp_path)]
    assert reproduce.main(["table1", *argv]) == 0
    rows = len(grids.TABLES["table1"]["rows"]["small"].split())
    tuning = [cell for cell in ran.cells if cell.seed == 1000]
    assert {cell.task for cell in tuning} == {"mrpc"} and len(set(tuning)) == len(tuning)
    assert [call[1] for call in ran.calls].count("rte") == rows
    cell = next(cell for cell in ran.cells if (cell.row, cell.task) == ("lora2-k1", "rte"))
    settings = grids.settings_of(cell.flags)
    assert cell.tuned == (("lr", 0.01), ("scale", 8))
    assert (settings["task"], settings["r"], settings["lr"], settings["alpha"]) == ("rte", 4, 0.01, 4 * 8)
    ran.calls.clear()
    assert reproduce.main(["tune", *argv]) == 0 and ran.calls == []
    tune = summary.load(tmp_path / "out" / "small-all-MiniLM-L6-v2" / "tune.json")
    assert tune["tasks"] == ["mrpc"] and len(tune["runs"]) == len(tuning)


# --- in which order -----------------------------------------------------------------------------------------

def test_tuning_comes_first_then_seed_by_seed(tmp_path, ran):
    """Oracle: the list of runs: the whole grid on seed 1000, then the reported seeds with the best of it (here the
    highest rate and scale, by height()); tune.json says so; no reported number is of that seed."""
    argv = ["--preset", "small", "--tasks", "cola", "--seeds", "0,1", *where(tmp_path)]
    assert reproduce.main(["table4", *argv]) == 0
    assert [call[2] for call in ran.calls] == [1000] * 3 * 2 + [0] * 4 + [1] * 4
    ran.calls.clear()
    assert reproduce.main(["tune", *argv]) == 0
    folder, base = tmp_path / "out" / "small-all-MiniLM-L6-v2", grids.PRESETS["small"]["base"]
    tuned = {line.split(" | ")[0]: line for line in (folder / "tune.md").read_text().splitlines()}
    assert "| 0.01, 8 (" in tuned[f"| {grids.row_of(base)[0]}"] and ", of 6) |" in tuned[f"| {grids.row_of(base)[0]}"]
    assert "| 0.001 (" in tuned["| full fine-tuning"] and ", of 3) |" in tuned["| full fine-tuning"]
    assert {call[2] for call in ran.calls} == {1000} and base not in {call[0] for call in ran.calls}
    assert {run["seed"] for run in summary.load(folder / "table4.json")["runs"]} == {0, 1}


def test_timings_are_interleaved(tmp_path, ran):
    """Oracle: the order by hand: each seed runs all methods before the next seed does; one run at a time."""
    args = reproduce.parse(["table2", "--tasks", "cola,mrpc", "--seeds", "0,1", "--workers", "4", *where(tmp_path)])
    assert args.workers == 1 and reproduce.main(["table2", "--tasks", "cola", "--seeds", "0,1", *where(tmp_path)]) == 0
    assert ran.calls == [(row, "cola", seed) for seed in (0, 1) for row in args.grid.rows]
    assert {dict(cell.flags)["max-steps"] for cell in ran.cells} == {grids.PRESETS["paper"]["timed_steps"]}
    assert "| CoLA | 100±0 | 100±0 | 100±0 |" in args.grid.path.with_suffix(".md").read_text(encoding="utf-8")


def test_stages_come_in_order(study):
    """Oracle: study.json: what is handed out first is of the first stage; no more than there are workers."""
    args = reproduce.parse(study("--tasks stsb,cola --workers 50"))
    args.grid.rows.reverse()
    handed = []

    def submit(function, cell, *more):
        handed.append(cell.row)
        stopped = Future()
        stopped.set_exception(KeyboardInterrupt())
        return stopped

    with pytest.raises(KeyboardInterrupt):
        workers.run_all(args, SimpleNamespace(submit=submit), None)
    first, second = (set(rows.split()) for rows, _ in grids.TABLES["study"]["stages"][:2])
    assert len(handed) == 50 and set(handed[:44]) == first and set(handed[44:]) <= second


def test_a_study(study, ran):
    """Oracle: by hand, from the stand-in's scores. The optimum of height() is chosen though two rungs away, 0.03
    diverged and is recorded; reported runs have the choice, seeds pair; a second call runs nothing."""
    argv = study("--rows lora-r1,lora-r8,lora2-k1-rates,lora2-k1-rates-noreg --tasks stsb,cola --seeds 0,1,2")
    assert reproduce.main(argv) == 0
    content = summary.load(study.json)
    shown = [run for run in content["runs"] if run["part"] == "reported"]
    assert len(shown) == 4 * 2 * 3 and {run["seed"] for run in shown} == {0, 1, 2}
    assert all(run["tuned"] | {"outer": 3} == {"lr": 0.01, "scale": 32, "outer": 3} for run in shown)
    assert [run["tuned_as"] for run in shown if run["row"].endswith("noreg")] == ["lora2-k1-rates"] * 6
    assert {run["tuned"]["lr"] for run in content["runs"] if "failed" in run} == {0.03}
    page = study.page.read_text()
    assert "| LoRA r=1 | 50.10±0.10 | 50.10±0.10 | 50.10±0.10 |" in page
    assert "| LoRA² k=1, orthonormal, two rates | 50.00 | 50.00 |" in page               # the worst seed
    assert "| LoRA² k=1, orthonormal, two rates − LoRA r=1 | ≈+0.00 [+0.00, +0.00] |" in page
    assert re.search(r"0.01, 32 \(of \d+, \d diverged\)", page) and "0.01, 32, × 3 (of" in page
    assert "LoRA² k=1, orthonormal, two rates, no regulariser" in page
    number = len(ran.calls)
    for more in ([], ["--no-run"]):
        assert reproduce.main([*argv, *more]) == 0 and len(ran.calls) == number
        assert study.page.read_text() == page


def test_a_deadline_and_going_on(study, ran, monkeypatch):
    """Oracle: the clock of the stand-in: after the deadline nothing begins; the same command runs the rest."""
    argv = study("--tasks stsb --rows lora-r1,head --seeds 0,1")
    assert reproduce.main([*argv, "--seconds", "0"]) == 0 and ran.calls == []
    clock = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock))
        assert reproduce.main([*argv, "--seconds", "20"]) == 0
    begun = len(ran.cells)
    assert 0 < begun < 20 and len(summary.load(study.json)["runs"]) == begun
    assert reproduce.main(argv) == 0
    assert len(ran.cells) == len(set(ran.cells)) == len(summary.load(study.json)["runs"])


# --- what goes wrong ----------------------------------------------------------------------------------------

def test_a_mistake_ends_it_all_a_failure_does_not(four, ran, capsys):
    """Oracle: by hand. A run that fails: the others run, status 1 and a line for it; the table has a gap; the same
    command runs it again. A user's mistake: its line is ours, nothing more is run. A killed worker: likewise."""
    which = four.cells[1][:3]
    ran.fails[which] = RuntimeError("status 1, the disk is full")
    assert reproduce.main(four.argv) == 1 and capsys.readouterr().err == "error: status 1, the disk is full\n"
    assert len(ran.calls) == 4 and four.page.read_text(encoding="utf-8").count("not run") == 6
    ran.fails.clear()
    assert reproduce.main(four.argv) == 0 and "not run" not in four.page.read_text(encoding="utf-8")
    for error, says in ((ValueError("there is no model x"), "there is no model x"),
                        (BrokenProcessPool("gone"), "fewer --workers")):
        four.json.unlink()
        ran.calls.clear()
        ran.fails[which] = error
        refused(four.argv, capsys, says)
        assert len(ran.calls) == 2


def test_what_is_there_is_shown_after_a_stop(four, ran, capsys):
    """Oracle: by hand: status 130, a page with the one run there is; stopped at once there is nothing to show."""
    for which, shown in ((four.cells[0][:3], False), (four.cells[1][:3], True)):
        ran.fails = {which: KeyboardInterrupt()}
        assert reproduce.main(four.argv) == 130
        assert "the same command goes on" in capsys.readouterr().err and four.page.exists() == shown
    assert four.page.read_text(encoding="utf-8").count("query, key | 50.00") == 1
    ran.fails = {}
    assert reproduce.main(four.argv) == 0 and "not run" not in four.page.read_text(encoding="utf-8")


@pytest.mark.parametrize("table, rows", [("study", "head"), ("table1", "head")])
def test_a_diverged_seed_is_shown(table, rows, tmp_path, ran):
    """Oracle: by hand: it is in no mean, the count says so, and the page names it; it is not run again."""
    argv = [table, "--tasks", "stsb", "--rows", rows, "--seeds", "0,1,2", *where(tmp_path)]
    argv += ["--preset", "small"] if table == "table1" else []
    ran.fails[rows, "stsb", 1] = "loss or gradient was not finite at step 9"
    assert reproduce.main(argv) == 0
    number = len(ran.calls)
    assert reproduce.main(argv) == 0 and len(ran.calls) == number
    page = reproduce.parse(argv).grid.path.with_suffix(".md").read_text()
    assert "(n = 2)" in page and "Diverged, and in no mean: head on stsb, seed 1." in page


@pytest.mark.parametrize("argv, says", [
    (["table9"], "table9"), (["table1", "--preset", "huge"], "huge"),
    (["table1", "--preset", "fair"], "--preset paper or small"), (["study", "--preset", "small"], "--preset fair"),
    (["table1", "--tasks", "cola,wnli"], "wnli"), (["table1", "--tasks", ""], "no task ''"),
    (["table1", "--rows", "lora"], "no row 'lora'"), (["table1", "--more", "--limit-train none"], "--limit-train"),
    (["table1", "--seeds", "0,1000"], "1000"), (["table1", "--seeds", "a"], "--seeds a"),
    (["table1", "--device", "abacus"], "abacus"), (["table1", "--no-run"], "table1.json cannot be read"),
    (["table1", "--workers", "0"], "--workers 0"), (["table1", "--task", "cola"], "--task"), ([], "table")])
def test_mistakes_end_in_one_line(argv, says, tmp_path, ran, capsys):
    """Oracle: status 2 and one line "error: ..." that names the mistake; nothing runs."""
    refused(argv + where(tmp_path), capsys, says)
    assert ran.calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoil, says", [("edge", "on the edge"), ("better", "not the best")])
def test_a_study_whose_choice_is_on_an_edge_is_refused(spoil, says, study, ran, capsys):
    """Oracle: by hand. Without the runs at one side of the choice, or with a better one beside it, status 2 and a
    line that names row, task and point, and no page; without that row there is a page."""
    argv = study("--tasks stsb --rows head,lora-r1 --seeds 0,1")
    assert reproduce.main(argv) == 0
    study.page.unlink()
    content = summary.load(study.json)
    beside = [run for run in content["runs"] if run["part"] == "tune" and run["row"] == "lora-r1"
              and run["tuned"] == {"lr": 0.003, "scale": 32}]
    if spoil == "edge":
        content["runs"].remove(*beside)
    else:
        beside[0]["last"]["score"] = 0.9
    summary.write(study.json, content)
    refused([*argv, "--no-run"], capsys, says, "lora-r1 on stsb", "0.01, 32")
    assert not study.page.exists()
    argv = study("--tasks stsb --rows head --seeds 0,1 --no-run")
    assert reproduce.main(argv) == 0 and "LoRA r=1" not in study.page.read_text()


# --- what is trusted ----------------------------------------------------------------------------------------

def test_what_is_finished_is_not_run(tmp_path, ran):
    """Oracle: the list of runs, and the bytes. The second call runs nothing and writes the same; nothing that a
    table lists is run, by this table or by another; one more seed runs alone; a narrower table loses nothing.
    Only what Eq. 8 and Eq. 9 keep is not in Table 4."""
    argv = ["--tasks", "cola,mrpc", *where(tmp_path)]
    folder = tmp_path / "out" / "paper-deberta-v3-base"

    def calls_of(table, *more):
        ran.calls.clear()
        assert reproduce.main([table, *argv, *more]) == 0
        return list(ran.calls)

    assert len(calls_of("table4", "--seeds", "0,1")) == 4 * 2 * 2
    before = {name: (folder / name).read_bytes() for name in ("table4.md", "table4.json")}
    assert calls_of("table4", "--seeds", "0,1") == []
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert {call[2] for call in calls_of("table4", "--seeds", "0,1,2")} == {2}
    argv[1] = "cola"
    assert calls_of("table4", "--seeds", "0") == []
    content = summary.load(folder / "table4.json")
    assert len(content["runs"]) == 4 and len(content["left_out"]) == 4 * 2 * 3 - 4
    argv[1] = "cola,mrpc"
    assert calls_of("table4", "--seeds", "0,1") == []
    assert before["table4.md"] == (folder / "table4.md").read_bytes()
    assert {call[0] for call in calls_of("pruning")} == {"lora2-k1-unpruned"}
    assert {call[0] for call in calls_of("overlap", "--seeds", "0")} == {"lora2-k1", "lora2-k1-eq8"}
    assert calls_of("overlap", "--seeds", "0") == []


def test_another_choice_leaves_the_runs_of_before(tmp_path, ran):
    """Oracle: by hand. A tuning that proves better later has runs of its own; those of before stay in the
    table's file and are shown again should theirs be the best once more."""
    argv = ["table4", "--preset", "small", "--tasks", "cola", "--seeds", "0", *where(tmp_path)]
    assert reproduce.main(argv) == 0
    path = grid_of(tmp_path, *argv[:-4]).path
    first = summary.load(path)
    assert len(first["runs"]) == 4 and len(first["left_out"]) == 6 and first["runs"][0]["tuned"]["lr"] == 0.01

    def praise(lr, score):
        def one(record):
            if record["part"] == "tune" and record["tuned"] == {"lr": lr, "scale": 2}:
                record["last"]["score"] = score
        change(path, one)
        ran.calls.clear()
        assert reproduce.main(argv) == 0
        return summary.load(path)

    second = praise(0.001, 0.99)
    assert [call[2] for call in ran.calls] == [0] * 4 and {run["tuned"]["lr"] for run in second["runs"]} == {0.001}
    assert all(run in second["left_out"] for run in first["runs"])
    third = praise(0.001, 0.0)
    assert ran.calls == [] and third["runs"] == first["runs"]


@pytest.mark.parametrize("name, value", [("lr", 0.5), ("model", "other"), ("reg_terms", ["uv"]), ("unheard_of", 1)])
def test_runs_with_other_settings_are_others(name, value, four, ran):
    """Oracle: by hand: it is run anew, and stays in the file beside the new one, in no table."""
    assert reproduce.main(four.argv) == 0
    content = summary.load(four.json)
    content["runs"][1]["settings"][name] = value
    summary.write(four.json, content)
    ran.calls.clear()
    assert reproduce.main(four.argv) == 0 and ran.calls == [four.cells[1][:3]]
    after = summary.load(four.json)
    assert len(after["runs"]) == 4 and after["left_out"] == [content["runs"][1]]


def test_what_cannot_change_a_result_may_differ(four):
    """Oracle: by hand: another folder, data folder or kind of number is the same run."""
    other = {"out": "elsewhere", "data_dir": "there", "dtype": "bf16", "resume": "x", "alpha": 32.0}
    four.grid.remember(summary.start_of(four.cells[0], grids.settings_of(four.cells[0].flags) | other))
    assert grids.record_of(four.grid, four.cells[0])["task"] == "cola"


@pytest.mark.parametrize("what, says", [("device", "runs on other, this is cpu"), ("base", "different models"),
                                        ("rows", "different cola data")])
def test_runs_that_belong_to_no_one_table(what, says, tmp_path, ran, capsys):
    """Oracle: status 2 and one line, before anything runs; another task has other data, older runs do not tell."""
    argv = ["table4", "--preset", "small", "--tasks", "cola,stsb", "--seeds", "0", *where(tmp_path)]
    assert reproduce.main(argv) == 0
    path = grid_of(tmp_path, *argv[:-4]).path
    change(path, lambda one: one.update(base="a", rows=one["task"]))
    argv[6] = "0,1"
    assert reproduce.main(argv) == 0
    argv[6] = "0,1,2"
    tuned = [one for one in summary.load(path)["left_out"] if one["task"] == "cola"][0]
    change(path, lambda one: one.update({what: "other"} if one == tuned else {}))
    ran.calls.clear()
    refused(argv, capsys, says)
    assert ran.calls == []


def test_a_page_mixes_no_models(four, ran, capsys):
    """Oracle: status 2 and one line that names both runs; without a page, all runs are kept."""
    assert reproduce.main(four.argv) == 0
    names = iter("abcd")
    change(four.json, lambda one: one.update(base=next(names)))
    refused([*four.argv, "--no-run"], capsys, "different models", "lora2-k1-qk on cola, seed 0 and lora2-k1-qv on")
    assert len(summary.load(four.json)["runs"]) == 4


@pytest.mark.parametrize("table, name", [("overlap", "kept"), ("figure3", "ranks")])
@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_matrix_that_one_run_lacks(table, name, spoilt, tmp_path, ran, capsys):
    """Oracle: status 2 and one line, whichever run it is: a mean would be of fewer runs than it says."""
    if table == "figure3":
        pytest.importorskip("matplotlib")
    argv = [table, "--tasks", "cola", "--seeds", "0,1", *where(tmp_path)]
    assert reproduce.main(argv) == 0
    path = grid_of(tmp_path, *argv[:-4]).path
    content = summary.load(path)
    content["runs"][spoilt][name]["f2"] = content["runs"][spoilt][name]["f2"][:1]
    summary.write(path, content)
    refused([*argv, "--no-run"], capsys, f"{name} is of other matrices", "run it again")


def test_a_tables_file_is_whole_and_has_a_line_for_each_run(tmp_path, ran, capsys):
    """Oracle: json: what is read is what was written; shared settings once. A damaged file is named."""
    argv = ["overlap", "--tasks", "cola", "--seeds", "0,1", *where(tmp_path)]
    assert reproduce.main(argv) == 0
    grid = grid_of(tmp_path, *argv[:-4])
    lines = [json.loads(line.strip().rstrip(",")) for line in grid.path.read_text(encoding="utf-8").splitlines()
             if line.startswith('  {"row"')]
    assert [(line["row"], line["seed"]) for line in lines] == [
        ("lora2-k1", 0), ("lora2-k1", 1), ("lora2-k1-eq8", 0), ("lora2-k1-eq8", 1)]
    assert [line["settings"] for line in lines] == [{"importance": which} for which in (
        "reduced", "reduced", "full", "full")]
    for cell, run in zip(reported(grid), summary.load(grid.path)["runs"], strict=True):
        assert run["settings"] == summary.comparable(grids.settings_of(cell.flags))
        assert run["kept"] == {"f2": [[0, 1], [cell.seed % 3]]} and run["part"] == "reported"
    grid.path.write_text("{")
    refused(argv, capsys, "overlap.json is damaged", "remove it")


def test_the_table_says_where_it_comes_from(tmp_path, ran):
    """Oracle: by hand, height() of seeds 0 and 1, the paper's 68.66, the command as given but for its folders."""
    argv = ["table4", "--tasks", "cola", "--seeds", "0,1", *where(tmp_path)]
    assert reproduce.main(argv) == 0
    text = grid_of(tmp_path, *argv[:-4]).path.with_suffix(".md").read_text(encoding="utf-8")
    mean = 100 * (height(ran.cells[0]) + 0.0005)
    assert f"{mean:.2f}±0.07" in text and "| 68.66 |" in text and "not run" not in text
    assert "`python experiments/reproduce.py table4 --tasks cola --seeds 0,1 --out out --runs runs`" in text
    assert ("8 runs, 0.08 hours; seed 0, 1; device cpu; dtype fp32; threads 1; torch 2; python 3; "
            "date 2026-01-01") in text


def test_a_dry_run_leaves_no_trace(four, ran, tmp_path, capsys):
    """Oracle: the folder, as before; a line with the state and the whole command of each run."""
    assert reproduce.main([*four.argv[:4], "1", *four.argv[5:]]) == 0
    begin(four.cells[0])
    before = sorted(tmp_path.rglob("*"))
    number = len(ran.calls)
    assert reproduce.main([*four.argv[:4], "0,1", *four.argv[5:], "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()[-8:]
    states = [line.split(" python")[0].strip() for line in lines]
    assert states == ["resume", "done", *["to run", "done"] * 3] and len(ran.calls) == number
    assert all(" python train.py --task cola --model " in line and " --out " in line for line in lines)
    assert reproduce.main(["table1", "--preset", "small", "--tasks", "stsb", *where(tmp_path), "--dry-run"]) == 0
    later = [line for line in capsys.readouterr().out.splitlines() if line.startswith("later ")]
    assert len(later) == len(grids.TABLES["table1"]["rows"]["small"].split())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_is_known_by_its_own_name(tmp_path, monkeypatch):
    """Oracle: the file system: the folder that "." is."""
    (tmp_path / "tuned").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path / "tuned")
    for model, name in ((".", "tuned"), ("FacebookAI/tuned", "tuned"), (str(tmp_path / "link/"), "link")):
        assert grid_of(tmp_path, "table1", "--model", model).path.parent.name == f"paper-{name}"


@pytest.mark.parametrize("table", grids.TABLES)
def test_a_table_of_nothing(table, tmp_path, here, capsys):
    """Oracle: there are no runs: status 0, a table that says so, and no file but that."""
    if table == "figure3":
        pytest.importorskip("matplotlib")
    assert reproduce.main([table, *where(tmp_path), "--seconds", "0"]) == 0, capsys.readouterr().err
    grid = grid_of(tmp_path, table)
    assert {path.name for path in grid.path.parent.iterdir()} == {f"{table}.md", f"{table}.json"}
    assert "not run" in grid.path.with_suffix(".md").read_text(encoding="utf-8").lower()


def test_one_at_a_time_in_a_folder(four, ran, capsys):
    """Oracle: status 2 and one line; nothing runs. The page may be written meanwhile; later all is well."""
    pytest.importorskip("fcntl")
    with disk.alone(four.grid.runs, "reproduce.py"):
        refused(four.argv, capsys, "another reproduce.py is running", "--runs")
        assert ran.calls == []
    assert reproduce.main(four.argv) == 0 and len(ran.calls) == 4
    with disk.alone(four.grid.runs, "reproduce.py"):
        assert reproduce.main([*four.argv, "--no-run"]) == 0


@pytest.mark.parametrize("part, more", [("list_grid", ["--dry-run"]), ("write_page", ["--no-run"])])
def test_interrupted_where_nothing_runs(part, more, tmp_path, monkeypatch, capsys):
    """Oracle: status 130, as for a run that is stopped, and no traceback."""
    def interrupted(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(reproduce, part, interrupted)
    assert reproduce.main(["table4", "--out", str(tmp_path), *more]) == 130 and not capsys.readouterr().err


# --- workers ------------------------------------------------------------------------------------------------

@pytest.fixture
def told(four, monkeypatch):
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


def test_train_is_called_as_its_command_line_wants(four, told, capfd):
    """Oracle: options.parse, which reads what was passed; --resume for a begun run, with all its options,
    which train.py holds against what is stored; if its files do not fit it begins anew; a timed one always does;
    its chatter is not shown; its folder is left if asked."""
    cell = four.cells[1]
    leave_run(cell)
    assert workers.work(cell, False, keep=True)["last"]["score"] == 0.75 and cell.folder.exists()
    assert vars(options.resolve(options.parse(told.words[0]))) == grids.settings_of(cell.flags) | {
        "out": str(cell.folder), "overwrite": True}
    begin(cell)
    told.says = [(2, "error: adapter.safetensors is missing")]
    workers.work(cell, False, keep=True)
    given = options.parse(told.words[1])
    assert given.pop("resume") == str(cell.folder)
    assert vars(options.resolve(given)) == grids.settings_of(cell.flags)
    assert told.words[2] == told.words[0]
    assert workers.work(cell, True, keep=False)["tokens_per_second"] == 100
    assert told.words[3] == told.words[0] and not cell.folder.exists() and "chatter" not in capfd.readouterr().out


def test_the_statuses_of_train(four, told):
    """Oracle: train.py's statuses: 2 is a mistake, 1 a failure, unless the run diverged: a record that says so."""
    cell, found = four.cells[0], None
    for status, said, error in ((2, "error: there is no model x", ValueError), (1, "error: disk full", RuntimeError),
                                (143, "stopped", RuntimeError)):
        told.says = [(status, f"warning: first\n{said}")]
        with pytest.raises(error, match=said.removeprefix("error: ")):
            workers.work(cell, False, False)
    begin(cell)
    told.says = [(1, "error: loss or gradient was not finite at step 3; the last good state is in x")]
    found = workers.work(cell, False, False)
    assert found["failed"] == "loss or gradient was not finite at step 3" and "best" not in found
    assert found["settings"] == summary.comparable(grids.settings_of(cell.flags)) and not cell.folder.exists()


@pytest.mark.parametrize("name, damage", [("result.json", "{"), ("ranks.json", '{"classifier": 1}'), ("last.pt", "")])
def test_damaged_files_of_a_run_are_named(name, damage, four, told):
    """Oracle: ValueError with the file: there is a whole record or none."""
    leave_run(four.cells[0], kept={"layer.0.output.dense": [0]})
    (four.cells[0].folder / name).write_text(damage)
    with pytest.raises(ValueError, match=name):
        workers.work(four.cells[0], False, False)


def test_the_record_of_a_run(tmp_path):
    """Oracle: by hand, from the files that train.py leaves: Λ = (0, 2, 0, −1) keeps the indices 1 and 3; what
    is not asked is not there."""
    cell = reported(grid_of(tmp_path, "overlap", "--tasks", "cola", "--seeds", "0"))[0]
    leave_run(cell, result_of(cell) | {"base": "x", "task": "cola", "peak_memory_gb": 3})
    name = "deberta.encoder.layer.0.output.dense"
    (cell.folder / "ranks.json").write_text(json.dumps({name: 2}))
    runs.write_state(cell.folder, {"weights": {f"{name}.lam": torch.tensor([0.0, 2.0, 0.0, -1.0]),
                                              f"{name}.u": torch.ones(1, 4)}})
    run = summary.record(cell)
    assert run["kept"] == {"f2": [[1, 3]]} and run["ranks"] == {"f2": [2]}
    assert (run["row"], run["task"], run["seed"]) == ("lora2-k1", "cola", 0)
    assert run["last"]["scores"] == scores_of(0.75) and run["peak_memory_gb"] is None
    assert (run["base"], run["rows"], run["seconds"], run["device"]) == ("x", None, 36.0, "cpu")
    assert run["settings"] == summary.comparable(grids.settings_of(cell.flags))
    assert not run["settings"].keys() & {"out", "data_dir", "dtype"} and "tokens_per_second" not in run


@pytest.mark.parametrize("lines", [
    "", '{"step": 3, "loss": 1.0}\n', '{"step": 3, "loss": 1.0, "seconds": 1.0}\n' * 2, "{", "7\n" * 3,
    '{"step": 3, "loss": 1.0, "tokens": 7, "seconds": 1.0}\n' * 2, '{"loss": 1.0}\n' * 3,
    "".join(f'{{"step": {step}, "loss": 1.0, "tokens": {n}, "seconds": {n}}}\n'
            for step, n in ((10, 7), (20, 9), (23, 1), (30, 12)))])                        # went on
def test_a_log_without_a_speed(lines, four):
    """Oracle: ValueError with the file and what to do. The speed of a whole log: 400 tokens in 4 seconds."""
    leave_run(four.cells[0])
    assert summary.speed(four.cells[0].folder) == 100
    (four.cells[0].folder / "log.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="log.jsonl is damaged .* run it again"):
        summary.speed(four.cells[0].folder)


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

def test_a_tiny_study_through_train(cli, here, capsys):
    """Oracle: train.py itself, on a BERT of two layers: what it found is in the file, no folder is left; a run with
    a rate at which it diverges is recorded as that."""
    write_task("stsb")
    argv = ["study", "--model", str(cli.models["bert"]), "--out", "study.json", "--device", "cpu", "--runs", "tmp",
            "--tasks", "stsb", "--rows", "head", "--seeds", "0,1", "--more", TINY]
    assert reproduce.main(argv) == 0, capsys.readouterr().err
    content = summary.load(Path("study.json"))
    shown = [run for run in content["runs"] if run["part"] == "reported"]
    assert len(shown) == 2 and all(run["settings"]["method"] == "head" for run in content["runs"])
    assert shown[0]["last"]["scores"]["dev"].keys() == {"pearson", "spearman"}
    assert [path for path in Path("tmp").rglob("*") if path.is_file()] == []
    grid = reproduce.parse(argv).grid
    cell = grids.make_cell(grid, "lora2-k1-gradient-rates", "stsb", 0, POINT | {"outer": 0.3})
    record = workers.work(cell, False, False)
    assert record["settings"]["outer_lr"] == 0.0003 and record["settings"]["init"] == "gradient"
    record = workers.work(grids.make_cell(grid, "lora-r1", "stsb", 0, {"lr": 1e30, "scale": 8192}), False, False)
    assert "not finite" in record["failed"] and "best" not in record


@pytest.mark.slow
def test_two_workers(cli, capsys):
    """Oracle: the same study in this process: two spawned workers find the same scores."""
    write_task("stsb")
    argv = ["study", "--model", str(cli.models["bert"]), "--device", "cpu", "--tasks", "stsb", "--rows", "head",
            "--seeds", "0,1", "--more", TINY, "--out"]
    scores = []
    for name, number in (("two.json", "2"), ("one.json", "1")):
        assert reproduce.main([*argv, name, "--workers", number]) == 0, capsys.readouterr().err
        scores.append({(run["seed"], run["tuned"]["lr"]): run["last"]["score"]
                       for run in summary.load(Path(name))["runs"]})
    assert scores[0] == scores[1] and len(scores[0]) >= 5


@pytest.mark.ci
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped(number, cli):
    """Oracle: a real run of many steps. It is told to save; no other begins; the status is 130; the next call would
    go on with it."""
    write_task("cola")
    more = f"{TINY} --epochs 3000 --save-steps 5"
    words = [sys.executable, str(ROOT / "experiments" / "reproduce.py"), "table4", "--tasks", "cola", "--seeds", "0",
             "--model", str(cli.models["bert"]), "--device", "cpu", "--out", "t4.json", "--more", more]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 90
    while not list(Path("runs").rglob("last.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)                         # as a terminal does: to all of its group
    _, said = process.communicate(timeout=60)
    said = [line for line in said.splitlines() if "resource_tracker" not in line]      # SIGHUP ends Python's own
    assert process.returncode == 130 and "stopped: the same command goes on" in said and "error" not in str(said)
    state, = Path("runs").rglob("last.pt")
    listed = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split(" python")[0].strip() for line in listed] == ["resume", *["to run"] * 3]
    assert str(state.parent) in listed[0]


@pytest.mark.slow
def test_a_tiny_grid_through_train(cli, here, monkeypatch, capsys):
    """Oracle: train.py itself, on a BERT of two layers and 60 sentences in CoLA's layout: tuning, Table 4
    with two rows, the overlap and Figure 3 come out of real runs; asked again, nothing runs or changes."""
    write_task("cola", n=60)
    monkeypatch.setitem(grids.PRESETS["small"], "flags", {"epochs": 4, "limit-train": 60, "max-len": 32})
    monkeypatch.setitem(grids.PRESETS["small"], "lrs", (1e-2,))
    monkeypatch.setitem(grids.PRESETS["small"], "scales", (2,))
    base = grids.PRESETS["small"]["base"]
    argv = ["--preset", "small", "--model", str(cli.models["bert"]), "--tasks", "cola", "--seeds", "0", "--out", "out"]
    more = {"table4": ["--rows", f"{base}-qk,{base}"], "overlap": [], "figure3": []}
    for table, words in more.items():
        assert reproduce.main([table, *argv, *words]) == 0, capsys.readouterr().err
    folder = Path("out") / "small-bert"
    written = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert written.keys() == {"table4.md", "table4.json", "overlap.md", "overlap.json", "figure3.md",
                              "figure3.json", "figure3.svg"}
    assert b"not run" not in written["table4.md"] + written["figure3.md"]
    rows = {run["row"]: run for run in summary.load(folder / "table4.json")["runs"]}
    assert rows[base]["adapter_parameters"] == 8 * (64 + 12) + 4 * (80 + 12)     # k = 1, r = 4, two layers
    assert rows[f"{base}-qk"]["adapter_parameters"] == 4 * (64 + 12)
    assert sum(map(sum, rows[base]["ranks"].values())) == 12 * 3                 # CoLA's target rank
    for table, words in more.items():
        assert reproduce.main([table, *argv, *words]) == 0
    assert written == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
