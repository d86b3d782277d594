"""Tests of experiments/: tables by hand, the paper's own averages; what is run, resumed, refused.

Offline. Most run no train.py: results are handmade or a stand-in's. The real one runs in the slow test:
    pytest -m slow tests/test_experiments.py
"""
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent

from data import TASKS
from experiments import grid as grids
from experiments import moving, plot, reproduce, summary, tables
from experiments.speed import table as bench_table
import model as models
from formats import disk, toy
from running import folder as runs
from running import options, progress

PAPER = reproduce.PAPER
SCORES = {"dev": {"matthews": 0.5, "pearson": 0.8, "spearman": 0.7, "accuracy": 0.75, "f1": 0.6},
          "dev_matched": {"accuracy": 0.7}, "dev_mismatched": {"accuracy": 0.6}}


def make_result(settings=None, best=SCORES, last=SCORES, **more):
    """The content of a result.json."""
    first = lambda scores: next(iter(next(iter(scores.values())).values()))
    return {"settings": {"r": 8, "lr": 1e-3} if settings is None else settings, "steps": 10,
            "adapter_parameters": 1560, "head_parameters": 10, "seconds": 36.0, "device": "cpu",
            "dtype": "fp32", "threads": 1, "torch": "2", "python": "3", "date": "2026-01-01",
            "best": {"step": 5, "scores": best, "score": first(best)},
            "last": {"step": 10, "scores": last, "score": first(last)}} | more


def cola(value):
    return {"dev": {"matthews": value}}


def result_of(cell, best=SCORES, last=SCORES, **settings):
    """A result that fits its cell, but for other `settings`."""
    return make_result(grids.settings_of(cell.flags) | settings, best, last)


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


def write_run(cell, result=None, kept=None, speed=100):
    """The folder of a finished run, with its record."""
    leave_run(cell, result, kept, speed)
    reproduce.tidy(cell, keep=False)


def where(tmp_path):
    """Options that give folders for tables and runs."""
    return ["--out", str(tmp_path), "--runs", str(tmp_path / "runs")]


def parse(tmp_path, *argv):
    return reproduce.parse([*argv, *where(tmp_path)])


def grid_of(tmp_path, *argv):
    return parse(tmp_path, *argv).grid


def refused(argv, capsys, *says, main=reproduce.main):
    """Status 2 and one line "error: ..." that has all of `says`; the line."""
    capsys.readouterr()
    assert main(argv) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in says), line
    return line


def all_cells(grid):
    """Each once: two tasks may share their tuning."""
    return list(dict.fromkeys(cell for task in grid.tasks for cell in (
        grids.tuning_cells(grid, task) + grids.reported_cells(grid, task))))


@pytest.fixture
def four(tmp_path):
    """Table 4 on CoLA with seed 0, four runs: its command, its grid, its cells."""
    argv = ["table4", "--tasks", "cola", "--seeds", "0", *where(tmp_path / "out")]
    grid = reproduce.parse(argv).grid
    return SimpleNamespace(argv=argv, grid=grid, cells=grids.reported_cells(grid, "cola"),
                           page=grid.folder / "table4.md", json=grid.folder / "table4.json")


@pytest.fixture
def ran(monkeypatch):
    """Instead of train.py: a result that depends on the cell. A list of (row, task, seed, resumed)."""
    calls = []

    def execute(cell, resume, device, processes, stop):
        flags = dict(cell.flags)
        calls.append((cell.row, cell.task, cell.seed, resume))
        good = 0.5 + 0.01 * cell.seed % 1 if cell.seed < 1000 else 0.1 + 10 * flags.get("lr", 0)
        kept = {"layer.0.output.dense": [0, 1], "layer.1.output.dense": [cell.seed % 3]}
        best, last = ({"dev": {"matthews": value, "accuracy": value}} for value in (good, good - 0.1))
        leave_run(cell, result_of(cell, best, last), kept)
        return 0, "no message"

    monkeypatch.setattr(reproduce, "execute", execute)
    return calls


# --- numbers ------------------------------------------------------------------------------------------------

def test_the_papers_averages_are_over_eight_tasks():
    """Oracle: the averages that the paper prints, to its two digits, by one rule for all rows; by that rule
    LoRA² k=8 has 89.43. Its printed 89.68 is the mean over the ten columns."""
    for row, entry in PAPER["table1"]["rows"].items():
        assert entry["scores"].keys() == tables.COLUMNS.keys()
        mean = tables.average(entry["scores"])
        assert round(mean, 2) == pytest.approx(89.43 if row == "lora2-k8" else entry["average"], abs=0.005)
    columns = [x for columns in PAPER["table1"]["rows"]["lora2-k8"]["scores"].values() for x in columns]
    assert len(columns) == 10 and round(sum(columns) / 10, 2) == 89.68


def test_the_papers_tables_agree_with_each_other():
    """Oracle: the paper. Tables 3 and 4 end in LoRA² k=1 of Table 1; Table 2's mean ratio is 1.148."""
    table1 = PAPER["table1"]["rows"]["lora2-k1"]["scores"]
    for name in ("table3", "table4"):
        for task, columns in PAPER[name]["rows"]["lora2-k1"]["scores"].items():
            assert [a for a, b in zip(columns, table1[task]) if a is not None and a != b] == []
    ratios = [b / a for a, b in PAPER["table2"]["rows"].values()]
    assert sum(ratios) / 7 == pytest.approx(1.148, abs=5e-4)


def test_summary():
    """Oracle: by hand. 40, 50, 60: mean 50, sample standard deviation 10 (with n − 1, not 8.16)."""
    assert tables.summary([40, 50, 60]) == {"mean": 50, "std": 10, "n": 3}
    assert tables.summary([7]) == {"mean": 7, "std": None, "n": 1} and tables.summary([]) is None
    assert tables.mean_of([0.0, 50.0]) == 25 and tables.mean_of([None, 50.0]) == 50
    assert tables.show(tables.summary([40, 50, 60]), 3) == "50.00±10.00"
    assert tables.show(tables.summary([-40, -50, -60]), 4, 1, "+") == "−50.0±10.0 (n = 3)"
    assert tables.show(tables.summary([7]), 1) == "7.00" and tables.show(None, 3) == "not run"
    assert tables.span([1640, 1560, 1600]) == "1,560–1,640"
    assert tables.span([5, 5]) == "5" and tables.span([]) == "–" == tables.span([None])


def content_by_hand():
    """Two rows on CoLA and MNLI: a with three and two seeds, b with one seed of CoLA alone."""
    def run(row, task, seed, best, last, adapter=1560, survive=None):
        scores = {"cola": lambda x: {"dev": {"matthews": x}},
                  "mnli": lambda x: {"dev_matched": {"accuracy": x[0]}, "dev_mismatched": {"accuracy": x[1]}}}
        return {"row": row, "task": task, "seed": seed, "adapter_parameters": adapter,
                "surviving_parameters": survive, "best": {"scores": scores[task](best)},
                "last": {"scores": scores[task](last)}}

    paper = {"a": {"parameters": "2k", "scores": {"cola": [70.0], "mnli": [90.0, 80.0]}},
             "b": {"scores": {"cola": [60.0]}}}
    return {"name": "table1", "tasks": ["mnli", "cola"], "seeds": [0, 1, 2], "pairs": [["a", "b"]],
            "rows": {"a": "method a", "b": "method b"}, "paper": paper, "runs": [
                run("a", "cola", 0, 0.4, 0.3), run("a", "cola", 1, 0.5, 0.5), run("a", "cola", 2, 0.6, 0.4),
                run("a", "mnli", 0, (0.8, 0.7), (0.7, 0.7), 1640),
                run("a", "mnli", 2, (0.6, 0.5), (0.5, 0.4), 1640), run("b", "cola", 1, 0.2, 0.1, survive=20)]}


def test_score_table():
    """Oracle: by hand, from eight scores; columns stand in the paper's order."""
    content = content_by_hand()
    assert tables.score_of(content, "a", "cola", "best") == [pytest.approx({"mean": 50, "std": 10, "n": 3})]
    assert [part["mean"] for part in tables.score_of(content, "a", "mnli", "last")] == pytest.approx([60, 55])
    # seeds 0 and 2 have both tasks: (40 + (80 + 70) / 2) / 2 = 57.5 and (60 + 55) / 2 = 57.5
    assert tables.average_of(content, "a", "best") == pytest.approx({"mean": 57.5, "std": 0, "n": 2})
    assert tables.average_of(content, "b", "best") is None
    assert tables.score_table(content, "best").splitlines() == [
        "| at the best evaluation | CoLA | MNLI | average |", "| --- | --- | --- | --- |",
        "| method a | 50.00±10.00 | 70.00±14.14 (n = 2)/60.00±14.14 (n = 2) | 57.50±0.00 (n = 2) |",
        "| method b | 20.00 (n = 1) | not run/not run | not run |"]
    assert tables.score_table(content).splitlines()[2].startswith(
        "| method a | 40.00±10.00 | 60.00±14.14 (n = 2)/55.00±21.21 (n = 2) |")
    assert tables.paper_table(content).splitlines()[2:] == [
        "| method a | 70.00 | 90.00/80.00 | 77.50 |", "| method b | 60.00 | – | – |"]
    assert tables.parameter_table(content).splitlines()[2:] == [
        "| method a | 1,560–1,640 | – | 2k |", "| method b | 1,560 | 20 | – |"]


def test_differences():
    """Oracle: by hand. Over common seeds alone; ≈ where the mean is not above the standard deviation."""
    content = content_by_hand()
    extra = {"best": {"scores": cola(0.3)}, "last": {"scores": cola(0.4)}, "seed": 0}
    content["runs"].append(content["runs"][-1] | extra)
    pair = tables.difference(content, "a", "b", "cola", "best")
    assert pair == pytest.approx({"mean": 20, "std": math.sqrt(200), "n": 2})              # 10 and 30
    pair = tables.difference(content, "a", "b", "cola", "last")
    assert pair == pytest.approx({"mean": 15, "std": math.sqrt(1250), "n": 2})             # −10 and 40
    line = "| method a − method b | {} | not run |"
    assert tables.difference_table(content, "best").splitlines()[2] == line.format("+20.00±14.14 (n = 2)")
    assert tables.difference_table(content).splitlines()[2] == line.format("≈+15.00±35.36 (n = 2)")


def test_time_tables():
    """Oracle: by hand. Half the tokens per second is twice the time; the paper's 1.01 → 1.14 is 1.129."""
    speeds = {"adalora-r8": (100, 120), "lora2-k1": (50, 40), "lora2-k8": (100,)}
    content = {"tasks": ["cola"], "seeds": [0, 1], "rows": {row: row for row in speeds}, "runs": [
        {"row": row, "task": "cola", "seed": seed, "tokens_per_second": speed}
        for row, some in speeds.items() for seed, speed in enumerate(some)], "paper": PAPER["table2"]["rows"]}
    assert tables.time_ratio(content, "lora2-k1", "adalora-r8", "cola") == pytest.approx(
        {"mean": 2.5, "std": math.sqrt(0.5), "n": 2})
    ratios, speeds = tables.ratio_table(content), tables.speed_table(content)
    assert ratios.splitlines()[2] == "| CoLA | 2.500±0.707 | 1.000 (n = 1) | 1.129 |"
    assert speeds.splitlines()[2] == "| CoLA | 110±14 | 45±7 | 100 (n = 1) | 1.01 → 1.14 |"


@pytest.mark.parametrize("mean, std, to, expected", [
    (1.1, 0.2, 1, True), (0.9, 0.1, 1, True), (0.8, 0.1, 1, False), (0.1, 0.2, 0, True),
    (0.1, None, 0, False)])
def test_near(mean, std, to, expected):
    """Oracle: by hand: no further from the number than its spread; one run has none. Ratios count from 1."""
    part = {"mean": mean, "std": std, "n": 3}
    assert tables.near(part, to) is expected and not tables.near(None)
    assert tables.show_change(part, 3, to=to).startswith("≈") is expected


def test_overlap():
    """Oracle: by hand. Of 4 kept singular values 2 are the same ones, and 3 lie in the same matrices."""
    a, b = [{0, 1, 2}, {5}], [{0, 3}, {5, 6}]
    assert tables.shared(a, b) == 50 and tables.shared(a, a) == 100
    assert tables.shared_counts(a, b) == 75
    assert tables.shared([set()], [set()]) == 0


def test_overlap_table():
    """Oracle: by hand, from four runs."""
    kept = {("a", 0): {"q": [[0, 1, 2], [5]]}, ("b", 0): {"q": [[0, 3], [5, 6]]},
            ("a", 1): {"q": [[7], [1, 2, 3]]}}
    content = {"tasks": ["cola"], "seeds": [0, 1], "rows": {"a": "Eq. 9", "b": "Eq. 8"}, "runs": [
        {"row": row, "task": "cola", "seed": seed, "settings": {"r": 3}, "kept": what}
        for (row, seed), what in kept.items()]}
    # Shuffled: 3 and 1 of one seed against 1 and 3 of the other share 2 as they are, 4 the other way round.
    means = [tables.summary(values)["mean"] for values in tables.overlap(content, "cola").values()]
    assert means == [50, 75, 50, 75, 0, 50, 0, 0]
    assert tables.overlap_table(content).splitlines()[2].endswith("| 50.0 (n = 1) |")


# --- which runs ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("table, preset", list(itertools.product(grids.TABLES, grids.PRESETS)))
def test_every_run_is_legal(table, preset, tmp_path):
    """Oracle: train.py's own reading of options. Every run of every table is accepted and has a folder of its
    own; in the paper's preset every row of Tables 1, 3 and 4 has its numbers in paper.json."""
    grid = grid_of(tmp_path, table, "--preset", preset)
    if preset == "small" and table != "table2":
        waiting = [grids.reported_cells(grid, task) for task in grid.tasks]
        assert waiting == [[]] * len(grid.tasks)           # until the tuning has run
        cells = all_cells(grid) + [grids.make_cell(grid, row, task, 0, {"lr": 1e-3, "scale": 2})
                                   for row in grid.rows for task in grid.tasks
                                   if grids.row_of(row)[1].get("method") not in ("full", "head", "bitfit")]
    else:
        cells = all_cells(grid)
    assert len({cell.folder for cell in cells}) == len(cells)
    assert cells or (table, preset) == ("tune", "paper")
    for cell in cells:
        settings = grids.settings_of(cell.flags)
        assert (settings["task"], settings["seed"], settings["model"]) == (cell.task, cell.seed, grid.model)
        epochs = 3 if cell.seed == grids.TUNE_SEED and cell.task == "stsb" else 6
        assert (settings["epochs"], settings["limit_train"]) == (epochs, 2000) or preset == "paper"
    if preset == "paper" and table in ("table1", "table3", "table4"):
        assert set(grid.rows.values()) - {"lora2-k1-noreg"} == PAPER[table]["rows"].keys()


def test_rows_are_what_they_are_called(tmp_path):
    """Oracle: the paper's names and the authors' scales, on the task whose preset has r = 4."""
    grid = grid_of(tmp_path, "table1", "--tasks", "cola", "--seeds", "0")
    settings = {cell.row: grids.settings_of(cell.flags) for cell in grids.reported_cells(grid, "cola")}
    pick = lambda row, *names: tuple(settings[row][name] for name in names)
    assert pick("lora-r1", "method", "r", "alpha") == ("lora", 1, 2)
    assert pick("lora-r8", "r", "alpha") == pick("sora-r8", "r", "alpha") == (8, 16)
    assert pick("lora2-k8", "method", "k", "r", "target_rank", "alpha") == ("lora2", 8, 4, 3, 32)
    assert pick("adalora-r2", "r", "target_rank") == (3, 2)
    assert pick("adalora-r8", "r", "target_rank") == (12, 8)
    for variant, name, value in (("unpruned", "target_rank", 4), ("eq8", "importance", "full"),
                                 ("noreg", "reg", 0), ("qk", "targets", ["q", "k"]),
                                 ("factors", "reg_terms", ["uv", "UV"])):
        cell = grids.make_cell(grid, f"lora2-k1-{variant}", "cola", 0, {})
        assert grids.settings_of(cell.flags)[name] == value
    scaled = grids.make_cell(grid, "lora2-k1", "cola", 0, {"lr": 0.5, "scale": 8})
    assert grids.settings_of(scaled.flags)["alpha"] == 8 * 4 and grids.settings_of(scaled.flags)["lr"] == 0.5


def test_one_grid_for_all_methods(tmp_path):
    """Oracle: the preset's two or three values each; full fine-tuning has a tenth of the rates, no scale."""
    grid = grid_of(tmp_path, "tune", "--preset", "small", "--tasks", "stsb")
    tried = {row: [tuned for tuned, _ in grids.tunings(grid, row, "stsb")] for row in grid.rows}
    rates, scales = grids.PRESETS["small"]["lrs"], grids.PRESETS["small"]["scales"]
    assert 2 <= len(rates) <= 3 and 2 <= len(scales) <= 3
    both = [{"lr": lr, "scale": scale} for lr in rates for scale in scales]
    for row in grid.rows:
        method = grids.row_of(row)[1].get("method", "lora2")
        assert tried[row] == ([{"lr": pytest.approx(lr / 10)} for lr in rates] if method == "full" else
                              [{"lr": lr} for lr in rates] if method in ("head", "bitfit") else both)
    assert {cell.seed for cell in grids.tuning_cells(grid, "stsb")} == {grids.TUNE_SEED}


def test_timings_are_interleaved_and_never_resumed(tmp_path, ran):
    """Oracle: the order by hand: each seed runs all methods before the next seed does; one run at a time.
    After a stop a log counts tokens and seconds anew: a speed across that would be of no run."""
    args = parse(tmp_path, "table2", "--tasks", "cola", "--seeds", "0,1", "--jobs", "4")
    cells = grids.reported_cells(args.grid, "cola")
    assert [(cell.seed, cell.row) for cell in cells] == [(s, row) for s in (0, 1) for row in args.grid.rows]
    steps = grids.PRESETS["paper"]["timed_steps"]
    assert args.jobs == 1 and {dict(cell.flags)["max-steps"] for cell in cells} == {steps}
    for cell in cells:
        begin(cell)
    assert reproduce.run_grid(args) == [] and [call[3] for call in ran] == [False] * 6


@pytest.mark.parametrize("preset", grids.PRESETS)
def test_no_evaluation_is_timed(preset, tmp_path):
    """Oracle: the official numbers of rows: a timed run ends before its first epoch does."""
    grid = grid_of(tmp_path, "table2", "--preset", preset)
    cells = [cell for task in grid.tasks for cell in grids.reported_cells(grid, task)]
    for settings in [grids.settings_of(cell.flags) for cell in cells]:
        rows = min(TASKS[settings["task"]].rows["train"], settings["limit_train"] or math.inf)
        assert settings["max_steps"] < rows / settings["batch_size"]


def test_choice(tmp_path):
    """Oracle: by hand: the best last score, the first of equals, None before any run; variants as their base.
    """
    grid = grid_of(tmp_path, "table3", "--preset", "small", "--tasks", "cola")
    base = grids.PRESETS["small"]["base"]
    assert grids.choose(grid, base, "cola") is None and grids.reported_cells(grid, "cola") == []
    cells = grids.tunings(grid, base, "cola")
    for (_, cell), value in zip(cells, (0.1, 0.3, 0.3, 0.2)):
        write_run(cell, result_of(cell, cola(0.9 - value), cola(value)))
    assert grids.choose(grid, base, "cola") == grids.choose(grid, f"{base}-left", "cola") == cells[1][0]
    assert {dict(cell.flags)["lr"] for cell in grids.reported_cells(grid, "cola")} == {cells[1][0]["lr"]}
    paper = grid_of(tmp_path, "table3", "--tasks", "cola")
    assert grids.choose(paper, "lora2-k1", "cola") == {}


def test_a_task_may_have_the_tuning_of_another(tmp_path, ran, capsys):
    """Oracle: by hand. On RTE nothing is chosen: its runs have what MRPC chose, and a scale is alpha over
    RTE's own r = 4; MRPC's runs are made once, for both tasks, and tune.json shows them under MRPC."""
    argv = ["table1", "--preset", "small", "--tasks", "rte", "--seeds", "0", *where(tmp_path)]
    assert reproduce.main(argv) == 0
    grid = grid_of(tmp_path, *argv[:-4])
    chosen, count = grids.choose(grid, "lora2-k1", "mrpc"), len(grids.tuning_cells(grid, "mrpc"))
    assert [call[1] for call in ran] == ["mrpc"] * count + ["rte"] * len(grid.rows)
    cell = next(cell for cell in grids.reported_cells(grid, "rte") if cell.row == "lora2-k1")
    settings = grids.settings_of(cell.flags)
    assert (settings["task"], settings["r"], settings["lr"]) == ("rte", 4, chosen["lr"])
    assert settings["alpha"] == 4 * chosen["scale"]
    ran.clear()
    assert reproduce.main(["tune", *argv[1:4], "mrpc,rte", *argv[5:]]) == 0 and ran == []
    tune = summary.load(grid.folder / "tune.json")
    assert tune["tasks"] == ["mrpc"] and len(tune["runs"]) == count
    capsys.readouterr()
    reproduce.main(["table1", *argv[1:4], "mrpc,rte", *argv[5:], "--dry-run"])
    assert capsys.readouterr().out.count("--seed 1000 ") == count


# --- what is trusted ----------------------------------------------------------------------------------------

def test_another_choice_leaves_the_runs_of_before(tmp_path, ran):
    """Oracle: the folders. A tuning that proves better later has runs of its own; those of before stay, in
    the table's file too, and are read again should theirs be the best once more."""
    argv = ["table4", "--preset", "small", "--tasks", "cola", "--seeds", "0", *where(tmp_path)]
    grid, base = grid_of(tmp_path, *argv[:-4]), grids.PRESETS["small"]["base"]
    assert reproduce.main(argv) == 0
    before = {cell.folder: (cell.folder / "record.json").read_bytes()
              for cell in grids.reported_cells(grid, "cola")}
    tuned, cell = grids.tunings(grid, base, "cola")[0]
    worst = (cell.folder / "record.json").read_text()
    assert grids.choose(grid, base, "cola") != tuned
    write_run(cell, result_of(cell, cola(0.99), cola(0.99)), kept={"layer.0.output.dense": [0]})
    ran.clear()
    assert reproduce.main(argv) == 0 and [call[2] for call in ran] == [0] * 4
    assert not before.keys() & {cell.folder for cell in grids.reported_cells(grid, "cola")}
    content = summary.load(grid.folder / "table4.json")
    assert len(content["runs"]) == len(content["left_out"]) == 4
    (cell.folder / "record.json").write_text(worst)
    ran.clear()
    assert reproduce.main(argv) == 0 and ran == []
    assert before == {folder: (folder / "record.json").read_bytes() for folder in before}


def test_what_is_finished_is_not_run(tmp_path, ran):
    """Oracle: the list of runs, and the bytes. The second call runs nothing and writes the same; a lost run
    alone is run. Without run folders, as in a fresh clone, nothing that a table lists is run, by this table
    or by another; one more seed runs alone; a narrower table loses nothing. Only what Eq. 8 and Eq. 9 keep
    is not in Table 4."""
    argv = ["--tasks", "cola,mrpc", *where(tmp_path)]
    assert reproduce.main(["table4", *argv, "--seeds", "0,1"]) == 0 and len(ran) == 4 * 2 * 2
    folder = tmp_path / "paper-deberta-v3-base"
    before = {name: (folder / name).read_bytes() for name in ("table4.md", "table4.json")}
    (folder / "table4.json").unlink()
    lost = grids.reported_cells(grid_of(tmp_path, "table4", *argv[:2], "--seeds", "0"), "cola")[3]
    (lost.folder / "record.json").unlink()
    ran.clear()
    assert reproduce.main(["table4", *argv, "--seeds", "0,1"]) == 0 and ran == [(lost.row, "cola", 0, False)]
    shutil.rmtree(tmp_path / "runs")
    ran.clear()
    assert reproduce.main(["table4", *argv, "--seeds", "0,1"]) == 0 and ran == []
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert reproduce.main(["table4", *argv, "--seeds", "0,1,2"]) == 0 and {call[2] for call in ran} == {2}
    shutil.rmtree(tmp_path / "runs")
    ran.clear()
    assert reproduce.main(["table4", "--tasks", "cola", *argv[2:], "--seeds", "0"]) == 0 and ran == []
    content = summary.load(folder / "table4.json")
    assert len(content["runs"]) == 4 and len(content["left_out"]) == 4 * 2 * 3 - 4
    assert reproduce.main(["table4", *argv, "--seeds", "0,1"]) == 0 and ran == []
    assert before["table4.md"] == (folder / "table4.md").read_bytes()
    assert reproduce.main(["pruning", *argv]) == 0 and {call[0] for call in ran} == {"lora2-k1-unpruned"}
    ran.clear()
    assert reproduce.main(["overlap", *argv, "--seeds", "0"]) == 0
    assert {call[0] for call in ran} == {"lora2-k1", "lora2-k1-eq8"}


def test_a_tables_file_is_whole_and_has_a_line_for_each_run(tmp_path, ran):
    """Oracle: json, and the records themselves: what is read is what was written; shared settings once."""
    assert reproduce.main(["overlap", "--tasks", "cola", "--seeds", "0,1", *where(tmp_path)]) == 0
    path = tmp_path / "paper-deberta-v3-base" / "overlap.json"
    lines = [json.loads(line.strip().rstrip(",")) for line in path.read_text(encoding="utf-8").splitlines()
             if line.startswith('  {"row"')]
    assert [(line["row"], line["seed"]) for line in lines] == [
        ("lora2-k1", 0), ("lora2-k1", 1), ("lora2-k1-eq8", 0), ("lora2-k1-eq8", 1)]
    assert [line["settings"] for line in lines] == [{"importance": which} for which in (
        "reduced", "reduced", "full", "full")]
    runs_read = summary.load(path)["runs"]
    for cell, run in zip(grids.reported_cells(grid_of(tmp_path, "overlap", "--tasks", "cola", "--seeds",
                                                      "0,1"), "cola"), runs_read, strict=True):
        assert run == json.loads((cell.folder / "record.json").read_text())
        assert run["settings"] == summary.comparable(grids.settings_of(cell.flags))
    path.write_text("{")
    with pytest.raises(ValueError, match="overlap.json is damaged"):
        summary.load_all(path.parent)


@pytest.mark.parametrize("name, damage", [("record.json", ""), ("record.json", "["), ("result.json", "{"),
                                          ("ranks.json", '{"classifier": 1}'), ("last.pt", "")])
def test_damaged_files_of_a_run_are_named(name, damage, four, ran, monkeypatch, capsys):
    """Oracle: status 2 and one line with the file and what to do; a record is made whole or not at all."""
    cell = four.cells[1]
    if name == "record.json":
        write_run(cell)
        (cell.folder / name).write_text(damage)
    else:
        real = reproduce.execute
        monkeypatch.setattr(reproduce, "execute", lambda cell, *more: (
            real(cell, *more), (cell.folder / name).write_text(damage))[0])
    refused(four.argv, capsys, name, "" if name == "last.pt" else "run it again")
    assert len(list(four.grid.runs.rglob("record.json"))) == (name == "record.json")


@pytest.mark.parametrize("name, value", [
    ("lr", 0.5), ("epochs", 1), ("model", "other"), ("limit_train", 7), ("seed", 4), ("method", "lora"),
    ("reg_terms", ["uv"]), ("unheard_of", 1), ("lr", None)])
def test_other_settings_are_refused(name, value, four, ran, capsys):
    """Oracle: the one error line, status 2. Nothing runs, nothing is written over, no table is made of it. A
    setting that a record lacks is another one."""
    cell = four.cells[1]
    write_run(cell, result_of(cell, **{name: value}))
    before = (cell.folder / "record.json").read_bytes()
    for more in ([], ["--dry-run"], ["--no-run"]):
        refused(four.argv + more, capsys, str(cell.folder), f"--{name.replace('_', '-')} {value}", "--runs")
    assert ran == [] and (cell.folder / "record.json").read_bytes() == before
    assert not four.page.exists()


def test_what_cannot_change_a_result_may_differ(four):
    """Oracle: options.INCIDENTAL: another folder, data folder or device is the same run."""
    other = {"out": "elsewhere", "data_dir": "there", "device": "cuda", "dtype": "bf16", "resume": "x"}
    write_run(four.cells[0], result_of(four.cells[0], **other))
    assert grids.record_of(four.grid, four.cells[0])["steps"] == 10


@pytest.mark.parametrize("what, words, other", [("base", "different models", "a"),
                                                ("rows", "different cola data", "b")])
def test_models_and_data_of_one_name_are_told_apart(what, words, other, tmp_path, capsys):
    """Oracle: status 2 and one line that names both runs. Another task has other data, but not another model;
    the runs that chose the tuning have to be of the same."""
    argv = ["table4", "--preset", "small", "--tasks", "cola,stsb", "--seeds", "0", *where(tmp_path),
            "--no-run"]
    grid = grid_of(tmp_path, *argv[:-5])
    for task, value in (("cola", "a"), ("stsb", other)):
        for cell in grids.tuning_cells(grid, task):
            write_run(cell, result_of(cell) | {what: value})
    cells = grids.reported_cells(grid, "cola")
    write_run(cells[0], result_of(cells[0]) | {what: "a"})
    write_run(cells[1])                                    # of before: it does not tell
    assert reproduce.main(argv) == 0
    write_run(cells[2], result_of(cells[2]) | {what: "c"})
    refused(argv, capsys, words, "on cola, seed 0 and ", f"{cells[2].row} on cola, seed 0")
    shutil.rmtree(cells[0].folder)
    (grid.folder / "table4.json").unlink()
    refused(argv, capsys, "seed 1000")


@pytest.mark.parametrize("lines", [
    "", '{"step": 3, "loss": 1.0}\n', '{"step": 3, "loss": 1.0, "seconds": 1.0}\n' * 2, "{", "7\n" * 3,
    '{"step": 3, "loss": 1.0, "tokens": 7, "seconds": 1.0}\n' * 2, '{"loss": 1.0}\n' * 3,
    "".join(f'{{"step": {step}, "loss": 1.0, "tokens": {n}, "seconds": {n}}}\n'
            for step, n in ((10, 7), (20, 9), (23, 1), (30, 12)))])                        # went on
def test_a_log_without_a_speed(lines, tmp_path):
    """Oracle: ValueError with the file and what to do. The speed of a whole log: 400 tokens in 4 seconds."""
    cell = grids.reported_cells(grid_of(tmp_path, "table2", "--tasks", "cola", "--seeds", "0"), "cola")[0]
    write_run(cell)
    assert json.loads((cell.folder / "record.json").read_text())["tokens_per_second"] == 100
    (cell.folder / "log.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="log.jsonl is damaged .* run it again"):
        summary.speed(cell.folder)


@pytest.mark.parametrize("table, name", [("overlap", "kept"), ("figure3", "ranks")])
@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_matrix_that_one_run_lacks(table, name, spoilt, tmp_path, ran, capsys):
    """Oracle: status 2 and one line, whichever run it is: a mean would be of fewer runs than it says."""
    if table == "figure3":
        pytest.importorskip("matplotlib")
    argv = [table, "--tasks", "cola", "--seeds", "0,1", *where(tmp_path)]
    assert reproduce.main(argv) == 0
    cell = grids.reported_cells(grid_of(tmp_path, *argv[:-4]), "cola")[spoilt]
    write_run(cell, kept={"layer.0.output.dense": [0]})
    refused(argv, capsys, f"{name} is of other matrices", "run it again")


def begin(cell):
    """A last.pt as a stopped run leaves it."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    runs.write_state(cell.folder, {"settings": grids.settings_of(cell.flags), "weights": {}})


def test_begun_runs_are_resumed(four, ran, capsys):
    """Oracle: the list of runs: what left a state goes on, what left a record is done."""
    begin(four.cells[0])
    write_run(four.cells[3])
    reproduce.main([*four.argv, "--dry-run"])
    states = [line.split(" python")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert states == ["resume", "to run", "to run", "done"] and ran == []
    assert reproduce.main(four.argv) == 0
    assert ran == [(cell.row, "cola", 0, i == 0) for i, cell in enumerate(four.cells[:3])]


def test_tuning_comes_first_and_is_kept(tmp_path, ran):
    """Oracle: the list of runs: the whole grid on seed 1000, then the reported seeds with the best of it
    (here the highest rate, by the scores above); tune.json says so; no reported number is of that seed."""
    argv = ["--preset", "small", "--tasks", "cola", "--seeds", "0,1", *where(tmp_path)]
    assert reproduce.main(["table4", *argv]) == 0
    rates, scales, base = (grids.PRESETS["small"][name] for name in ("lrs", "scales", "base"))
    assert [call[2] for call in ran] == [1000] * len(rates) * len(scales) + [0, 1] * 4
    ran.clear()
    assert reproduce.main(["tune", *argv]) == 0
    folder = tmp_path / "small-all-MiniLM-L6-v2"
    tuned = {line.split(" | ")[0]: line for line in (folder / "tune.md").read_text().splitlines()}
    assert f"| {max(rates):g}, {scales[0]:g} (10.00, of 6) |" in tuned[f"| {grids.row_of(base)[0]}"]
    assert f"| {max(rates) / 10:g} (1.00, of 3) |" in tuned["| full fine-tuning"]
    assert {call[2] for call in ran} == {1000} and base not in {call[0] for call in ran}
    assert {run["seed"] for run in summary.load(folder / "table4.json")["runs"]} == {0, 1}


def test_the_table_says_where_it_comes_from(tmp_path, ran):
    """Oracle: results by hand (seeds 0 and 1 scored 50 and 51), the paper's 68.66, the command as given."""
    argv = ["table4", "--tasks", "cola,mrpc", "--seeds", "0,1", *where(tmp_path)]
    grid = grid_of(tmp_path, *argv[:-4])
    for cell in grids.reported_cells(grid, "mrpc")[:1]:
        write_run(cell)
    assert reproduce.main(["table4", "--no-run", *argv[1:]]) == 0 and ran == []
    path = tmp_path / "paper-deberta-v3-base" / "table4.md"
    text = path.read_text(encoding="utf-8")
    assert text.count("75.00 (n = 1)") == 2                # best and last of the one run there is
    argv[2] = "cola"
    reproduce.main(argv)
    text = path.read_text(encoding="utf-8")
    assert "50.50±0.71" in text and "| 68.66 |" in text and "not run" not in text
    assert f"`{shlex.join(['python', 'experiments/reproduce.py', *argv])}`" in text
    assert ("8 runs, 0.08 hours; seed 0, 1; device cpu; dtype fp32; threads 1; torch 2; python 3; "
            "date 2026-01-01") in text


def test_a_dry_run_leaves_no_trace(tmp_path, ran, capsys):
    """Oracle: the folder, empty as before; a line with the whole command for each run."""
    argv = ["table1", "--preset", "small", "--tasks", "stsb", *where(tmp_path), "--dry-run"]
    assert reproduce.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not list(tmp_path.iterdir()) and ran == []
    assert len([line for line in lines if line.startswith("later")]) == len(grids.TABLES["table1"]["rows"]["small"].split())
    assert all(line.startswith(("to run python train.py --task stsb --model ", "later  ")) for line in lines)


@pytest.mark.parametrize("argv, says", [
    (["table9"], "table9"), (["table1", "--preset", "huge"], "huge"),
    (["table1", "--tasks", "cola,wnli"], "wnli"), (["table1", "--tasks", ""], "no task ''"),
    (["table1", "--seeds", "0,1000"], "1000"), (["table1", "--seeds", "a"], "--seeds a"),
    (["table1", "--jobs", "0"], "--jobs 0"), (["table1", "--task", "cola"], "--task"), ([], "table")])
def test_mistakes_end_in_one_line(argv, says, tmp_path, capsys):
    """Oracle: status 2 and one line "error: ..." that names the mistake."""
    refused(argv + where(tmp_path), capsys, says)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_known_by_its_own_name(tmp_path, monkeypatch):
    """Oracle: the file system: the folder that "." is."""
    (tmp_path / "tuned").mkdir()
    monkeypatch.chdir(tmp_path / "tuned")
    assert grid_of(tmp_path, "table1", "--model", ".").folder.name == "paper-tuned"
    assert grid_of(tmp_path, "table1", "--model", "FacebookAI/tuned").folder.name == "paper-tuned"
    (tmp_path / "link").symlink_to(tmp_path / "tuned")
    assert grid_of(tmp_path, "table1", "--model", str(tmp_path / "link/")).folder.name == "paper-link"


@pytest.mark.parametrize("named, count, expected", [
    (None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("3,5", 1, ["3"]), ("", 0, []), (None, 0, [])])
def test_visible_gpus(named, count, expected, monkeypatch):
    """Oracle: CUDA's rule: of the devices that are named, those that torch counts are ours."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert reproduce.visible_gpus() == expected


@pytest.mark.parametrize("table", grids.TABLES)
def test_a_table_of_nothing(table, tmp_path, capsys):
    """Oracle: there are no runs: status 0, a table that says so, and no file but that."""
    if table == "figure3":
        pytest.importorskip("matplotlib")
    argv = [table, "--preset", "small", *where(tmp_path), "--no-run"]
    assert reproduce.main(argv) == 0, capsys.readouterr().err
    folder = tmp_path / "small-all-MiniLM-L6-v2"
    assert {path.name for path in folder.iterdir()} == {f"{table}.md", f"{table}.json"}
    assert "not run" in (folder / f"{table}.md").read_text(encoding="utf-8")


def test_one_at_a_time_in_a_folder(four, ran, capsys):
    """Oracle: status 2 and one line; nothing runs. The table may be written meanwhile; later all is well."""
    pytest.importorskip("fcntl")
    with disk.alone(four.grid.runs, "reproduce.py"):
        refused(four.argv, capsys, "another reproduce.py is running", "--runs")
        assert ran == []
        assert reproduce.main([*four.argv, "--no-run"]) == 0
    assert reproduce.main(four.argv) == 0 and len(ran) == 4


@pytest.mark.parametrize("part, more", [("list_grid", ["--dry-run"]), ("write_table", ["--no-run"])])
def test_interrupted_where_nothing_runs(part, more, tmp_path, monkeypatch, capsys):
    """Oracle: status 130, as for a run that is stopped, and no traceback."""
    def interrupted(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(reproduce, part, interrupted)
    assert reproduce.main(["table4", "--out", str(tmp_path), *more]) == 130 and not capsys.readouterr().err


# --- processes ----------------------------------------------------------------------------------------------

STAND_IN = '''
import json, os, signal, sys, time
argv, here = sys.argv[1:], {here!r}
value = lambda flag: argv[argv.index(flag) + 1]
folder = value("--resume") if "--resume" in argv else value("--out")
with open(here + "/calls", "a") as file:
    file.write(json.dumps([argv, os.environ.get("CUDA_VISIBLE_DEVICES"), time.time()]) + "\\n")
print("chatter")
plan = json.load(open(here + "/plan.json"))
if plan.get("sleep"):
    def stop(number, frame):
        open(here + "/saved", "a").write("x")
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    time.sleep(plan["sleep"])
for part, (status, text) in plan["fail"].items():
    if part in argv + [os.path.basename(folder)]:
        print("warning: first\\nerror: " + text, file=sys.stderr)
        sys.exit(status)
os.makedirs(folder, exist_ok=True)
json.dump(plan["results"][folder], open(folder + "/result.json", "w"))
for name in ("last.pt", "adapter.safetensors", "predictions_dev.tsv", "log.jsonl"):
    open(folder + "/" + name, "w").close()
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program in train.py's place: stand_in(cells, fail, sleep) says what to do, .calls() what was."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "train.py").write_text(STAND_IN.format(here=str(here)))
    monkeypatch.setattr(reproduce, "TRAIN", [sys.executable, "-S", str(here / "train.py")])

    def plan(cells, fail=None, sleep=0):
        results = {str(cell.folder): result_of(cell) for cell in cells}
        (here / "plan.json").write_text(json.dumps({"results": results, "fail": fail or {}, "sleep": sleep}))

    plan.here = here
    plan.calls = lambda: [json.loads(line) for line in (here / "calls").read_text().splitlines()]
    return plan


def test_train_is_called_as_its_command_line_wants(tmp_path, stand_in, capfd):
    """Oracle: options.parse, which reads what was passed; --resume for a begun run, with all its options,
    which train.py holds against what is stored; its chatter is not shown; only small files are left."""
    argv = ["table4", "--tasks", "cola", "--seeds", "0", "--data-dir", "my data", *where(tmp_path)]
    cells = grids.reported_cells(reproduce.parse(argv).grid, "cola")
    begin(cells[0])
    stand_in(cells)
    assert reproduce.main(argv) == 0
    calls = [call[0] for call in stand_in.calls()]
    given = options.parse(calls[0])
    assert given.pop("resume") == str(cells[0].folder) and given["data_dir"] == "my data"
    assert vars(options.resolve(given)) == grids.settings_of(cells[0].flags)
    for call, cell in zip(calls[1:], cells[1:]):
        assert vars(options.resolve(options.parse(call))) == grids.settings_of(cell.flags) | {
            "out": str(cell.folder), "overwrite": True}
    out = capfd.readouterr().out
    assert "chatter" not in out and out.count("done") == 4 and "[4/4, about 0.0 h left]" in out
    left = sorted(path.name for path in cells[1].folder.iterdir())
    assert left == ["log.jsonl", "record.json", "result.json"]
    begin(cells[1])
    (cells[1].folder / "record.json").unlink()             # as if stopped between its end and that
    (tmp_path / "paper-deberta-v3-base" / "table4.json").unlink()
    assert reproduce.main([*argv, "--keep"]) == 0          # its state is good: resumed, all kept
    assert "--resume" in stand_in.calls()[-1][0] and (cells[1].folder / "adapter.safetensors").exists()


def test_a_mistake_ends_the_grid_a_failure_does_not(four, stand_in, capsys):
    """Oracle: train.py's statuses. 1, a run that diverged: the others run, status 1 and a line for it; the
    table has a gap. 2 of a run that went on, whose adapter is missing, say: it begins anew. 2, a user's
    mistake: its line is ours, nothing more is run."""
    folders = [cell.folder for cell in four.cells]
    stand_in(four.cells, fail={folders[1].name: (1, "loss was not finite")})
    assert reproduce.main(four.argv) == 1 and len(stand_in.calls()) == 4
    assert capsys.readouterr().err == f"error: {folders[1]}: status 1, loss was not finite\n"
    assert four.page.read_text(encoding="utf-8").count("not run") == 6     # CoLA, average, difference
    begin(four.cells[1])
    stand_in(four.cells, fail={"--resume": (2, "adapter.safetensors is missing")})
    assert reproduce.main(four.argv) == 0
    calls = [call[0] for call in stand_in.calls()]
    assert len(calls) == 6 and calls[4][-2:] == ["--resume", str(folders[1])]
    assert calls[5][-3:] == ["--out", str(folders[1]), "--overwrite"]
    for path in (four.json, folders[1] / "record.json"):
        path.unlink()
    stand_in(four.cells, fail={"--task": (2, "there is no model x")})
    assert refused(four.argv, capsys) == "error: there is no model x"
    assert len(stand_in.calls()) == 7


def test_runs_share_the_gpus(four, stand_in, monkeypatch):
    """Oracle: CUDA_VISIBLE_DEVICES and the times of the calls: two at once, one on each of GPUs 3 and 5."""
    monkeypatch.setattr(reproduce, "visible_gpus", lambda: ["3", "5"])
    stand_in(four.cells, sleep=0.6)
    assert reproduce.main(four.argv) == 0
    _, devices, times = zip(*stand_in.calls())
    assert sorted(devices[:2]) == sorted(devices[2:]) == ["3", "5"]
    assert times[1] - times[0] < 0.5 < times[2] - times[0]


def test_stopped_while_a_run_begins(four, stand_in):
    """Oracle: the clock: a run that begins after the signal is told to end; it would have slept for long."""
    stop, processes, began = threading.Event(), [], time.monotonic()
    stand_in(four.cells, sleep=60)
    stop.set()
    status, _ = reproduce.execute(four.cells[0], False, None, processes, stop)
    assert status != 0 and len(processes) == 1 and time.monotonic() - began < 30


@pytest.mark.ci
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped(number, four, stand_in):
    """Oracle: the stand-in, which saves on SIGTERM as train.py does. The run is told to save, once; no other
    begins; the table of what there is gets written; the status is 130."""
    write_run(four.cells[3])
    stand_in(four.cells, sleep=60)
    driver = stand_in.here / "driver.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom experiments import reproduce\n"
                      f"reproduce.TRAIN = {reproduce.TRAIN!r}\nsys.exit(reproduce.main({four.argv!r}))\n")
    process = subprocess.Popen([sys.executable, str(driver)], stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    deadline = time.monotonic() + 60
    while not (stand_in.here / "calls").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)                                        # the stand-in has begun to sleep
    os.killpg(process.pid, number)                         # as a terminal does: to all of its group
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "\nstopped: the same command goes on\n"
    assert (stand_in.here / "saved").read_text() == "x" and len(stand_in.calls()) == 1
    assert "| 50.00 |" in four.page.read_text(encoding="utf-8")


def test_the_record_of_a_run(tmp_path):
    """Oracle: by hand, from the files that train.py leaves: Λ = (0, 2, 0, −1) keeps the indices 1 and 3; what
    is not asked is not there; only what was changed by hand stays: the large files go, unless kept."""
    cell = grids.reported_cells(grid_of(tmp_path, "overlap", "--tasks", "cola", "--seeds", "0"), "cola")[0]
    leave_run(cell, result_of(cell) | {"base": "x", "task": "cola", "peak_memory_gb": None})
    name = "deberta.encoder.layer.0.output.dense"
    (cell.folder / "ranks.json").write_text(json.dumps({name: 2}))
    runs.write_state(cell.folder, {"weights": {f"{name}.lam": torch.tensor([0.0, 2.0, 0.0, -1.0]),
                                              f"{name}.u": torch.ones(1, 4)}})
    reproduce.tidy(cell, keep=True)
    assert (cell.folder / "last.pt").exists()
    reproduce.tidy(cell, keep=False)
    assert not (cell.folder / "last.pt").exists()
    run = json.loads((cell.folder / "record.json").read_text())
    assert run["kept"] == {"f2": [[1, 3]]} and run["ranks"] == {"f2": [2]}
    assert (run["row"], run["task"], run["seed"]) == ("lora2-k1", "cola", 0)
    assert run["best"]["scores"] == SCORES
    assert (run["base"], run["rows"], run["seconds"], run["device"]) == ("x", None, 36.0, "cpu")
    assert run["settings"] == summary.comparable(grids.settings_of(cell.flags))
    assert not run["settings"].keys() & {"out", "data_dir", "dtype"} and "tokens_per_second" not in run


# --- what is committed --------------------------------------------------------------------------------------

@pytest.mark.parametrize("table", grids.TABLES)
def test_the_committed_tables_follow_from_their_runs(table, tmp_path, monkeypatch):
    """Oracle: the committed files. The command that is written in them, given nothing but the JSON files,
    makes the same JSON and the same Markdown, to the byte; it runs nothing."""
    if table == "figure3":
        pytest.importorskip("matplotlib")
    name = Path("experiments/results/small-all-MiniLM-L6-v2")
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.md", "*.svg"))
    monkeypatch.chdir(tmp_path)
    command = summary.load(ROOT / name / f"{table}.json")["command"]
    assert reproduce.main(shlex.split(command)[2:]) == 0
    for kind in ("json", "md"):
        path = name / f"{table}.{kind}"
        assert path.read_bytes() == (ROOT / path).read_bytes()


def test_results_are_summaries():
    """Oracle: the file system: at most 60 files, no logs, no folder of a run."""
    folder = ROOT / "experiments" / "results"
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(found) <= 60 and {path.suffix for path in found} == {".json", ".md", ".svg"}
    assert {len(path.parts) for path in found} == {1, 2}


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "results").glob("bench-*.json")),
                         ids=lambda path: path.stem)
def test_the_committed_benches_follow_from_their_json(path):
    """Oracle: the Markdown file beside it, to the byte."""
    content = json.loads(path.read_text(encoding="utf-8"))
    device = "cuda" if "NVIDIA" in content["device"] else "cpu"
    assert bench_table.page(content, device) == path.with_suffix(".md").read_text(encoding="utf-8")


# --- pictures -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("q, family", [("query_proj", "deberta"), ("query", "roberta"), ("query", "bert")])
def test_places(q, family):
    """Oracle: the module names of the three families, written out."""
    prefix = f"{family}.encoder.layer"
    values = {f"{prefix}.1.attention.self.{q}": 1, f"{prefix}.0.attention.self.{q}": 5,
              f"{prefix}.0.output.dense": 2, f"{prefix}.0.attention.output.dense": 3,
              f"{prefix}.0.intermediate.dense": 0}
    found = summary.by_place(values)
    assert found == {"q": [5, 1], "o": [3], "f1": [0], "f2": [2]}
    assert list(found) == ["q", "o", "f1", "f2"]           # Figure 3's order
    for bad in ("classifier", "encoder.output.dense"):
        with pytest.raises(ValueError, match="matrix of an encoder layer"):
            progress.place_of(bad)


def run_folder(folder, method="lora2"):
    """The files of a finished run, of a pruned one or of one that was not."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(make_result(task="cola", method=method)))
    more = lambda s: {"R": 2 / s, "kept": 48 - s} if method == "lora2" else {}
    records = [{"step": s, "loss": 1 / s, "lr": 0.1} | more(s) for s in range(1, 30)]
    records.append({"step": 29, "score": 0.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if method == "lora2":
        ends = models.TARGETS["bert"].values()
        kept = {f"bert.encoder.layer.{i}.{end}": i for i in range(6) for end in ends}
        (folder / "ranks.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize("method, stems", [("lora2", {"ranks", "training"}), ("full", {"training"})])
def test_pictures_of_a_run(method, stems, tmp_path, capsys):
    """Oracle: the file formats' first bytes; drawing twice gives the same bytes."""
    pytest.importorskip("matplotlib")
    folder = run_folder(tmp_path / "run", method)
    assert plot.main([str(folder), "--out", str(tmp_path / "a")]) == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(stems)
    plot.main([str(folder), "--out", str(tmp_path / "b")])
    for path in (tmp_path / "a").iterdir():
        start = path.read_bytes()[:400]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in start
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_heat_map_shows_the_counts():
    """Oracle: the numbers put in: rows are matrices in the paper's order, columns layers."""
    pytest.importorskip("matplotlib")
    figure, (axes,) = plot.new_figure()
    kept = {"q": [8, 2], "f2": [0, 5.5]}
    image = plot.heat_map(axes, kept, 8, "CoLA")
    assert image.get_array().tolist()[0] == [8, 2] and image.get_array().tolist()[1][1] == 5.5
    assert image.get_clim() == (0, 8) and [text.get_text() for text in axes.texts] == ["8", "2", "0", "5.5"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["query", "feed-forward 2"]


@pytest.mark.parametrize("spoil, says", [
    (lambda f: (f / "result.json").unlink(), "result.json cannot be read"),
    (lambda f: (f / "log.jsonl").unlink(), "log.jsonl cannot be read"),
    (lambda f: (f / "log.jsonl").write_text(""), "no line is about a step"),
    (lambda f: (f / "log.jsonl").write_text('{"step": 1, "lo'), "damaged"),
    (lambda f: (f / "result.json").write_text("{}"), "damaged"),
    (lambda f: (f / "log.jsonl").write_text('{"loss": 1}'), "damaged"),
    (lambda f: (f / "ranks.json").write_text("[]"), "damaged"),
    (lambda f: (f / "ranks.json").write_text('{"bert.encoder.layer.0.output.dense": "x"}'), "no counts"),
    (lambda f: (f / "ranks.json").write_text('{"classifier": 3}'), "matrix of an encoder layer")])
def test_a_folder_without_the_files(spoil, says, tmp_path, capsys):
    """Oracle: status 2 and one line "error: ..."."""
    pytest.importorskip("matplotlib")
    spoil(run_folder(tmp_path / "run"))
    refused([str(tmp_path / "run")], capsys, says, main=plot.main)


# --- the picture that moves ---------------------------------------------------------------------------------

def read_picture(text):
    """[({row: [count of each layer]}, its words)] of an SVG's frames. A dash and a gap are one value."""
    svg, frames = "{http://www.w3.org/2000/svg}", []
    root = xml.etree.ElementTree.fromstring(text)
    columns = [float(word.get("x")) for word in root.iter(f"{svg}text")
               if word.text.isdigit() and word.get("y") == str(moving.TOP - 16)]
    for group in root.iter(f"{svg}g"):
        lit, rows = group.find(f"{svg}path[@class='lit']"), {}
        unit = sum(map(float, lit.get("stroke-dasharray").split()))
        for x, y, length in re.findall(r"M([\d.]+) (\d+)h([\d.]+)", lit.get("d")):
            row = (int(y) - moving.TOP) // moving.ROW
            rows.setdefault(row, [0] * len(columns))[columns.index(float(x))] = round(float(length) / unit)
        frames.append((rows, [word.text for word in group.iter(f"{svg}text")]))
    last, = root.findall(f"{svg}g[@class='frame last']")
    assert last is root.findall(f"{svg}g")[-1]
    return frames


def check_picture(story, text):
    """That a picture has all frames of its story, each with its numbers, and where nothing moves the last."""
    frames = read_picture(text)
    for (rows, words), frame in zip(frames, story["frames"], strict=True):
        ranks = dict(enumerate(frame["ranks"].values()))
        assert rows == {row: counts for row, counts in ranks.items() if any(counts)}
        assert sum(map(sum, ranks.values())) == frame["kept"]
        assert words == [f"{frame['loss']:.3f}", f"{frame['kept']} of {story['singular_values']}",
                         f"step {frame['step']} of {story['steps']}"]
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    for name in ("room", "lit", "kept", "loss", "axis", "now", "note", "paper"):
        assert f'class="{name}' in text and f".{name} {{" in light and f".{name} {{" in dark
    still, moves = text.split("@media (prefers-reduced-motion: no-preference)")
    assert "animation:" not in still and ".frame { visibility: hidden }" in still and "animation:" in moves
    assert "<script" not in text and "http" not in text.partition(">")[2]


def test_the_picture_that_moves_is_of_its_story():
    """Oracle: pruning-stsb.json, read back out of the SVG by an XML parser; drawn anew, the same bytes."""
    path = ROOT / "experiments" / "results" / "pruning-stsb.json"
    story, text = json.loads(path.read_text(encoding="utf-8")), (ROOT / "docs" / "pruning.svg").read_bytes()
    assert moving.picture(story).encode() == text and len(text) < 150_000
    check_picture(story, text.decode())
    assert [frame["step"] for frame in story["frames"]] == [1, *range(10, story["steps"] + 1, 10)]
    assert story["frames"][-1]["kept"] == story["last"]["kept"] == story["budget"]
    words = shlex.split(story["command"])[2:]
    assert summary.comparable(vars(options.resolve(options.parse(words)))) == story["settings"]


@pytest.mark.parametrize("method", ["lora2", "adalora", "sora", "lora"])
def test_a_run_leaves_its_picture(method, cli):
    """Oracle: ranks.json and the log of a run of twelve steps; SoRA and LoRA have no budget to show."""
    pytest.importorskip("matplotlib")
    assert cli.tiny("--method", method, "--max-steps 12").status == 0
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    told = [line for line in lines if "ranks" in line]
    assert plot.main(["run", "--out", "out"]) == 0
    assert {path.name for path in Path("out").glob("pruning.*")} == (
        {"pruning.json", "pruning.svg"} if told else set())
    assert [line["step"] for line in told] == ([1, 10, 12] if method in ("lora2", "adalora") else [])
    if told:
        story = json.loads(Path("out/pruning.json").read_text(encoding="utf-8"))
        ranks = json.loads(Path("run/ranks.json").read_text())
        assert told[-1]["ranks"] == [ranks[name] for name in sorted(ranks)]
        assert story["frames"][-1]["ranks"] == summary.by_place(ranks)
        check_picture(story, Path("out/pruning.svg").read_text(encoding="utf-8"))


def test_counts_of_other_matrices(cli, capsys):
    """Oracle: status 2 and one line "error: ..."; the log has a count too many."""
    assert cli.tiny("--max-steps 12").status == 0
    log = Path("run/log.jsonl")
    log.write_text(log.read_text().replace('"ranks": [', '"ranks": [1, ', 1))
    refused(["run"], capsys, "log.jsonl is damaged", main=plot.main)


def test_of_a_long_run_some_frames_are_left_out(monkeypatch):
    """Oracle: by hand: of 7 frames every third, so that the last is among them."""
    monkeypatch.setattr(moving, "FRAMES", 3)
    frames = [{"step": i, "loss": 0.0, "kept": 8 - i, "ranks": {"q": [8 - i, 0]}} for i in range(1, 8)]
    story = {"settings": {"r": 8, "task": "own", "model": '<"a&b">'}, "steps": 7, "singular_values": 16,
             "last": {"scores": {"dev": {"accuracy": 0.5}}}, "frames": frames}
    assert [rows for rows, _ in read_picture(moving.picture(story))] == [{0: [8 - i, 0]} for i in (1, 4, 7)]


def test_figure3(tmp_path, ran):
    """Oracle: by hand: matrix f2 of layer 0 kept 2 with one seed and 1 with another, of layer 1 always 1."""
    pytest.importorskip("matplotlib")
    kept = [{"deberta.layer.0.output.dense": indices, "deberta.layer.1.output.dense": [0]}
            for indices in ([0, 1], [3])]
    grid = grid_of(tmp_path, "figure3", "--tasks", "cola", "--seeds", "0,1")
    for cell, of_cell in zip(grids.reported_cells(grid, "cola"), kept):
        write_run(cell, kept=of_cell)
    argv = ["figure3", "--tasks", "cola,mrpc", "--seeds", "0,1", *where(tmp_path), "--no-run"]
    assert reproduce.main(argv) == 0 and ran == []
    folder = tmp_path / "paper-deberta-v3-base"
    text = (folder / "figure3.md").read_text(encoding="utf-8")
    assert "| layer | 0 | 1 |" in text and "| feed-forward 2 | 1.5 | 1 |" in text
    assert "MRPC, LoRA² k=1: not run" in text
    assert (folder / "figure3.svg").exists() and "](figure3.svg)" in text


# --- the real thing -----------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_tiny_grid_through_train(tiny, tmp_path, monkeypatch, capsys):
    """Oracle: train.py itself, on a BERT of two layers and 60 sentences in CoLA's layout: tuning, Table 4
    with two rows, the overlap and Figure 3 come out of real runs; asked again, nothing runs or changes."""
    import data
    (tmp_path / "glue" / "CoLA").mkdir(parents=True)
    split = toy.language("adapt", 100)
    rows = [f"x\t{label}\t\t{text}\n" for (text,), label in zip(split.texts, split.labels)]
    (tmp_path / "glue" / "CoLA" / "train.tsv").write_text("".join(rows[:60]))
    (tmp_path / "glue" / "CoLA" / "dev.tsv").write_text("".join(rows[60:]))
    monkeypatch.setitem(grids.PRESETS["small"], "flags", {"epochs": 4, "limit-train": 60, "max-len": 32})
    monkeypatch.setitem(grids.PRESETS["small"], "lrs", (1e-2,))
    monkeypatch.setitem(grids.PRESETS["small"], "scales", (2,))
    monkeypatch.setitem(grids.TABLES, "table4", {
        "title": "Table 4", "tasks": {"small": "cola"}, "rows": {"small": "qk base"},
        "pairs": [("base", "qk")]})
    argv = ["--preset", "small", "--model", str(tiny["bert"]), "--data-dir", str(tmp_path / "glue"),
            "--tasks", "cola", "--seeds", "0", *where(tmp_path / "out")]
    for table, count in (("table4", 3), ("overlap", 3), ("figure3", 2)):
        assert reproduce.main([table, *argv]) == 0, capsys.readouterr().err
        assert f"[{count}/{count}" in capsys.readouterr().out or table == "figure3"
    folder = tmp_path / "out" / "small-bert"
    written = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert written.keys() == {"table4.md", "table4.json", "overlap.md", "overlap.json", "figure3.md",
                              "figure3.json", "figure3.svg"}
    assert b"not run" not in written["table4.md"] + written["figure3.md"]
    rows = {run["row"]: run for run in summary.load(folder / "table4.json")["runs"]}
    base = grids.PRESETS["small"]["base"]
    assert rows[base]["adapter_parameters"] == 8 * (64 + 12) + 4 * (80 + 12)     # k = 1, r = 4, two layers
    assert rows[f"{base}-qk"]["adapter_parameters"] == 4 * (64 + 12)
    assert sum(map(sum, rows[base]["ranks"].values())) == 12 * 3                 # CoLA's target rank
    for table in ("table4", "overlap", "figure3"):
        assert reproduce.main([table, *argv]) == 0
    assert written == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
