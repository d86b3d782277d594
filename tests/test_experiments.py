"""Tests of experiments/: tables by hand, the paper's own averages; what is run, resumed, refused.

Offline. Most run no train.py: results are handmade or a stand-in's. The real one runs in the slow test:
    pytest -m slow tests/test_experiments.py
"""
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

from formats import disk
from experiments import grid as grids
from running import options
from experiments import plot
from experiments import readme
from experiments import reproduce
from running import folder as runs
from experiments import tables
from formats import toy
from data import TASKS

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


def write_run(cell, result=None, kept=None, speed=100):
    """A finished run in the folder of a cell."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "result.json").write_text(json.dumps(result or result_of(cell)))
    points = (1, 5, 9.0), (10, 30, 20.0), (20, 30 + 4 * speed, 24.0)           # slow up to step 10
    lines = [{"step": step, "loss": 1.0, "tokens": n, "seconds": at} for step, n, at in points]
    lines.append({"step": 20, "score": 0.5})
    (cell.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if kept is not None:
        (cell.folder / "kept.json").write_text(json.dumps(kept))
        (cell.folder / "ranks.json").write_text(json.dumps({name: len(some) for name, some in kept.items()}))


def parse(tmp_path, *argv):
    return reproduce.parse([*argv, "--out", str(tmp_path)])


def grid_of(tmp_path, *argv):
    return parse(tmp_path, *argv).grid


def all_cells(grid):
    """Each once: two tasks may share their tuning."""
    return list(dict.fromkeys(cell for task in grid.tasks for cell in (
        grids.tuning_cells(grid, task) + grids.reported_cells(grid, task))))


@pytest.fixture
def ran(monkeypatch):
    """Instead of train.py: writes a result that depends on the cell. A list of (row, task, seed, resumed)."""
    calls = []

    def execute(cell, resume, device, processes, stop):
        flags = dict(cell.flags)
        calls.append((cell.row, cell.task, cell.seed, resume))
        good = 0.5 + 0.01 * cell.seed % 1 if cell.seed < 1000 else 0.1 + 10 * flags.get("lr", 0)
        kept = {"layer.0.output.dense": [0, 1], "layer.1.output.dense": [cell.seed % 3]}
        best, last = ({"dev": {"matthews": value, "accuracy": value}} for value in (good, good - 0.1))
        write_run(cell, result_of(cell, best, last), kept)
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
    assert tables.show(tables.summary([40, 50, 60])) == "50.00 ± 10.00 (3)"
    assert tables.show(tables.summary([7])) == "7.00 (1)" and tables.show(None) == "not run"
    assert tables.span([1640, 1560, 1600]) == "1,560–1,640"
    assert tables.span([5, 5]) == "5" and tables.span([]) == "–"


def found_by_hand():
    """Two rows on CoLA and MNLI: a with three and two seeds, b with one seed of CoLA alone."""
    def on_cola(best, last, **more):
        return Path("."), make_result(None, cola(best), cola(last), **more)

    def on_mnli(*values):
        splits = ("dev_matched", "dev_mismatched")
        best, last = ({s: {"accuracy": v} for s, v in zip(splits, pair)} for pair in values)
        return Path("."), make_result(None, best, last, adapter_parameters=1640)

    return {("a", "cola"): {0: on_cola(0.4, 0.3), 1: on_cola(0.5, 0.5), 2: on_cola(0.6, 0.4)},
            ("a", "mnli"): {0: on_mnli((0.8, 0.7), (0.7, 0.7)), 2: on_mnli((0.6, 0.5), (0.5, 0.4))},
            ("b", "cola"): {1: on_cola(0.2, 0.1, surviving_parameters=20)}, ("b", "mnli"): {}}


def test_score_table():
    """Oracle: by hand, from eight scores."""
    paper = {"rows": {"A": {"parameters": "2k", "scores": {"cola": [70.0], "mnli": [90.0, 80.0]}},
                      "B": {"scores": {"cola": [60.0]}}}}
    labels = {"a": "method a", "b": "method b"}
    rows = tables.score_rows(found_by_hand(), {"a": "A", "b": "B"}, labels, ["cola", "mnli"], paper)
    assert rows[0]["tasks"]["cola"]["best"] == [pytest.approx({"mean": 50, "std": 10, "n": 3})]
    assert [part["mean"] for part in rows[0]["tasks"]["mnli"]["last"]] == pytest.approx([60, 55])
    # seeds 0 and 2 have both tasks: (40 + (80 + 70) / 2) / 2 = 57.5 and (60 + 55) / 2 = 57.5
    assert rows[0]["average"]["best"] == pytest.approx({"mean": 57.5, "std": 0, "n": 2})
    assert rows[1]["average"] == {"best": None, "last": None}
    assert rows[1]["tasks"]["mnli"]["best"] == [None, None]
    text = tables.score_markdown(rows, ["cola", "mnli"]).splitlines()
    assert text[0] == "|  | adapter parameters |  | CoLA | MNLI | average of 2 |"
    assert text[2] == ("| **method a** | 1,560–1,640 | best | 50.00 ± 10.00 (3) | "
                       "70.00 ± 14.14 (2) / 60.00 ± 14.14 (2) | 57.50 ± 0.00 (2) |")
    assert text[3].startswith("|  |  | last | 40.00 ± 10.00 (3) | 60.00 ± 14.14 (2) / 55.00 ± 21.21 (2) |")
    assert text[4] == "|  | 2k | paper | 70.00 | 90.00 / 80.00 | 77.50 |"
    assert text[5] == ("| **method b** | 1,560, of which 20 survive | best | 20.00 (1) | not run / not run | "
                       "not run |")
    assert text[7] == "|  |  | paper | 60.00 | – | – |"
    json.dumps(rows)


def test_differences():
    """Oracle: by hand. Over common seeds alone; ≈ where the mean is not above the standard deviation."""
    found = found_by_hand()
    found["b", "cola"] |= {0: (Path("."), make_result(None, cola(0.3), cola(0.4)))}
    labels = {"a": "method a", "b": "method b"}
    rows = tables.score_rows(found, {"a": "A", "b": "B"}, labels, ["cola"], {"rows": {}})
    (pair,) = tables.differences(rows, [("a", "b")], ["cola"])
    assert pair["cola"]["best"] == pytest.approx({"mean": 20, "std": math.sqrt(200), "n": 2})  # 10 and 30
    assert pair["cola"]["last"] == pytest.approx({"mean": 15, "std": math.sqrt(1250), "n": 2})  # −10 and 40
    text = tables.differences_markdown([pair], ["cola"]).splitlines()
    assert text[2:] == ["| method a − method b | best | +20.00 ± 14.14 (2) |",
                        "| method a − method b | last | ≈ +15.00 ± 35.36 (2) |"]


def test_time_table(tmp_path):
    """Oracle: by hand. Half the tokens per second is twice the time; the paper's 1.01 → 1.14 is 1.129."""
    grid = grid_of(tmp_path, "table2", "--tasks", "cola", "--seeds", "0,1")
    speeds = {"adalora-r8": (100, 120), "lora2-k1": (50, 40), "lora2-k8": (100,)}
    for cell in grids.reported_cells(grid, "cola"):
        if cell.seed < len(speeds[cell.row]):
            write_run(cell, speed=speeds[cell.row][cell.seed])
    labels = {row: row for row in grid.rows}
    table, text = tables.time_table(grids.finished(grid), list(grid.rows), labels, ["cola"], PAPER["table2"])
    ratio = table["cola"]["time_ratio"]
    assert ratio["lora2-k1"] == pytest.approx({"mean": 2.5, "std": math.sqrt(0.5), "n": 2})
    assert text.splitlines()[2] == ("| CoLA | 110 ± 14 (2) | 45 ± 7 (2) | 100 (1) | 2.500 ± 0.707 (2) | "
                                    "1.000 (1) | 1.01 → 1.14, 1.129 |")


@pytest.mark.parametrize("mean, std, to, expected", [
    (1.1, 0.2, 1, True), (0.9, 0.1, 1, True), (0.8, 0.1, 1, False), (0.1, 0.2, 0, True),
    (0.1, None, 0, False)])
def test_near(mean, std, to, expected):
    """Oracle: by hand: no further from the number than its spread; one run has none. Ratios count from 1."""
    assert tables.near({"mean": mean, "std": std, "n": 3}, to) is expected and not tables.near(None)
    table = {"cola": {"time_ratio": {"lora2-k1": {"mean": mean, "std": std, "n": 3}}, "paper": None}}
    assert readme.time_table(table).count("≈") == tables.near({"mean": mean, "std": std, "n": 3}, 1)


def test_overlap():
    """Oracle: by hand. Of 4 kept singular values 2 are the same ones, and 3 lie in the same matrices."""
    a, b = {"x": [0, 1, 2], "y": [5]}, {"x": [0, 3], "y": [5, 6]}
    assert tables.shared(a, b) == 50 and tables.shared(a, a) == 100
    counts = lambda kept: {name: range(len(indices)) for name, indices in kept.items()}
    assert tables.shared(counts(a), counts(b)) == 75 and tables.shared({"x": []}, {"x": []}) == 0


def test_overlap_table(tmp_path):
    """Oracle: by hand, from the files of four runs."""
    kept = {("a", 0): {"x": [0, 1, 2], "y": [5]}, ("b", 0): {"x": [0, 3], "y": [5, 6]},
            ("a", 1): {"x": [7], "y": [1, 2, 3]}}
    for (row, seed), what in kept.items():
        folder = tmp_path / f"{row}{seed}"
        folder.mkdir()
        (folder / "kept.json").write_text(json.dumps(what))
    found = {(row, "cola"): {seed: (tmp_path / f"{row}{seed}", {"settings": {"r": 3}})
                             for r, seed in kept if r == row} for row in "ab"}
    table, text = tables.overlap_table(found, ["a", "b"], ["cola"])
    # Shuffled: 3 and 1 of one seed against 1 and 3 of the other share 2 as they are, 4 the other way round.
    assert [line["cola"]["mean"] for line in table] == [50, 75, 50, 75, 0, 50, 0, 0]
    assert text.splitlines()[2].endswith("| 50.0 (1) |")


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


def test_timings_are_interleaved(tmp_path):
    """Oracle: the order by hand: each seed runs all methods before the next seed does; one run at a time."""
    args = parse(tmp_path, "table2", "--tasks", "cola", "--seeds", "0,1", "--jobs", "4")
    cells = grids.reported_cells(args.grid, "cola")
    assert [(cell.seed, cell.row) for cell in cells] == [(s, row) for s in (0, 1) for row in args.grid.rows]
    steps = grids.PRESETS["paper"]["timed_steps"]
    assert args.jobs == 1 and {dict(cell.flags)["max-steps"] for cell in cells} == {steps}


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
    argv = ["table1", "--preset", "small", "--tasks", "rte", "--seeds", "0", "--out", str(tmp_path)]
    assert reproduce.main(argv) == 0
    grid = grid_of(tmp_path, *argv[:-2])
    chosen, count = grids.choose(grid, "lora2-k1", "mrpc"), len(grids.tuning_cells(grid, "mrpc"))
    assert [call[1] for call in ran] == ["mrpc"] * count + ["rte"] * len(grid.rows)
    cell = next(cell for cell in grids.reported_cells(grid, "rte") if cell.row == "lora2-k1")
    settings = grids.settings_of(cell.flags)
    assert (settings["task"], settings["r"], settings["lr"]) == ("rte", 4, chosen["lr"])
    assert settings["alpha"] == 4 * chosen["scale"]
    ran.clear()
    assert reproduce.main(["tune", *argv[1:4], "mrpc,rte", *argv[5:]]) == 0 and ran == []
    tune = json.loads((grid.folder / "tune.json").read_text(encoding="utf-8"))
    assert tune["table"]["lora2-k1"].keys() == {"mrpc"} and tune["runs"] == count
    capsys.readouterr()
    reproduce.main(["table1", *argv[1:4], "mrpc,rte", *argv[5:], "--dry-run"])
    assert capsys.readouterr().out.count("--seed 1000 ") == count


# --- what is trusted ----------------------------------------------------------------------------------------

def test_another_choice_leaves_the_runs_of_before(tmp_path, ran):
    """Oracle: the folders. A tuning that proves better later has runs of its own; those of before stay, and
    are read again should theirs be the best once more."""
    argv = ["table4", "--preset", "small", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path)]
    grid, base = grid_of(tmp_path, *argv[:-2]), grids.PRESETS["small"]["base"]
    assert reproduce.main(argv) == 0
    before = {cell.folder: (cell.folder / "result.json").read_bytes()
              for cell in grids.reported_cells(grid, "cola")}
    tuned, cell = grids.tunings(grid, base, "cola")[0]
    worst = (cell.folder / "result.json").read_text()
    assert grids.choose(grid, base, "cola") != tuned
    write_run(cell, result_of(cell, cola(0.99), cola(0.99)))
    ran.clear()
    assert reproduce.main(argv) == 0 and [call[2] for call in ran] == [0] * 4
    assert not before.keys() & {cell.folder for cell in grids.reported_cells(grid, "cola")}
    (cell.folder / "result.json").write_text(worst)
    ran.clear()
    assert reproduce.main(argv) == 0 and ran == []
    assert before == {folder: (folder / "result.json").read_bytes() for folder in before}


DAMAGED = ["", "{", "[]", "null", '{"settings": {}}', '"text"',
           lambda r: r.pop("last"), lambda r: r["best"].pop("scores"),
           lambda r: r["best"]["scores"].pop("dev"),
           lambda r: r["last"]["scores"]["dev"].update(matthews="0.5"), lambda r: r.update(settings=[1]),
           lambda r: r["last"]["scores"]["dev"].update(matthews=float("nan")),
           lambda r: r["best"].update(score=None), lambda r: r.update(adapter_parameters=None),
           lambda r: r.pop("steps"), lambda r: r.update(seconds="long"),
           lambda r: r.update(surviving_parameters="some")]


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_result_is_run_again(damage, tmp_path, ran, capsys):
    """Oracle: the run itself: of two finished runs only the damaged one is run, and the table has both."""
    argv = ["table4", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path)]
    assert reproduce.main(argv) == 0 and len(ran) == 4
    cell = grids.reported_cells(grid_of(tmp_path, *argv[:-2]), "cola")[1]
    path = cell.folder / "result.json"
    if isinstance(damage, str):
        path.write_text(damage)
    else:
        result = json.loads(path.read_text())
        damage(result)
        path.write_text(json.dumps(result))
    assert grids.read(cell) is None
    ran.clear()
    assert reproduce.main(argv) == 0 and ran == [(cell.row, "cola", 0, False)]
    assert "not run" not in (tmp_path / "paper-deberta-v3-base" / "table4.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name, value", [
    ("lr", 0.5), ("epochs", 1), ("model", "other"), ("limit_train", 7), ("seed", 4), ("method", "lora"),
    ("reg_terms", ["uv"]), ("unheard_of", 1)])
def test_other_settings_are_refused(name, value, tmp_path, ran, capsys):
    """Oracle: the one error line, status 2. Nothing runs, nothing is written over, no table is made of it."""
    grid = grid_of(tmp_path, "table4", "--tasks", "cola", "--seeds", "0")
    cell = grids.reported_cells(grid, "cola")[1]
    write_run(cell, result_of(cell, **{name: value}))
    before = (cell.folder / "result.json").read_bytes()
    for more in ([], ["--dry-run"], ["--no-run"]):
        argv = ["table4", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path)]
        assert reproduce.main(argv + more) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and str(cell.folder) in lines[0]
        assert f"--{name.replace('_', '-')} {value}" in lines[0] and "--out" in lines[0]
    assert ran == [] and (cell.folder / "result.json").read_bytes() == before
    assert not list(tmp_path.rglob("*.md"))


def test_a_missing_setting_is_another_setting(tmp_path):
    """Oracle: ValueError that names it: a result that does not say its learning rate is not trusted."""
    cell = grids.reported_cells(grid_of(tmp_path, "table4", "--tasks", "cola", "--seeds", "0"), "cola")[0]
    result = result_of(cell)
    del result["settings"]["lr"]
    write_run(cell, result)
    with pytest.raises(ValueError, match="--lr None, not 0.0008"):
        grids.read(cell)


def test_what_cannot_change_a_result_may_differ(tmp_path):
    """Oracle: options.INCIDENTAL: another folder, data folder or device is the same run."""
    cell = grids.reported_cells(grid_of(tmp_path, "table4", "--tasks", "cola", "--seeds", "0"), "cola")[0]
    other = {"out": "elsewhere", "data_dir": "there", "device": "cuda", "dtype": "bf16", "resume": "x"}
    write_run(cell, result_of(cell, **other))
    assert grids.read(cell)["steps"] == 10


@pytest.mark.parametrize("what, words", [("base", "different models"), ("rows", "different data")])
def test_models_and_data_of_one_name_are_told_apart(what, words, tmp_path, capsys):
    """Oracle: status 2 and one line that names both folders; fingerprints of another task do not matter."""
    argv = ["table4", "--tasks", "cola,rte", "--seeds", "0", "--out", str(tmp_path), "--no-run"]
    grid = grid_of(tmp_path, *argv[:-3])
    cells = grids.reported_cells(grid, "cola")
    for cell, value in [(cells[0], "a"), (cells[1], "a"), (grids.reported_cells(grid, "rte")[0], "b")]:
        write_run(cell, result_of(cell) | {what: value})
    write_run(cells[2])                                    # of before: it does not tell
    assert reproduce.main(argv) == 0
    write_run(cells[3], result_of(cells[3]) | {what: "b"})
    capsys.readouterr()
    assert reproduce.main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said and all(str(cells[i].folder) in said for i in (1, 3))


def test_nothing_is_chosen_by_runs_on_another_model(tmp_path, capsys):
    """Oracle: status 2 and one line that names a folder of the tuning and one of the reported runs."""
    argv = ["table4", "--preset", "small", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path)]
    grid = grid_of(tmp_path, *argv[:-2])
    for cell in grids.tuning_cells(grid, "cola"):
        write_run(cell, result_of(cell) | {"base": "a"})
    cell = grids.reported_cells(grid, "cola")[0]
    write_run(cell, result_of(cell) | {"base": "b"})
    assert reproduce.main([*argv, "--no-run"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "different models" in said
    assert str(cell.folder) in said and "tune" in said


@pytest.mark.parametrize("table, name, content", [
    ("table2", "log.jsonl", ""), ("table2", "log.jsonl", '{"step": 3, "loss": 1.0}\n'),
    ("table2", "log.jsonl", '{"step": 3, "loss": 1.0, "seconds": 1.0}\n' * 2), ("table2", "log.jsonl", "{"),
    ("table2", "log.jsonl", '{"step": 3, "loss": 1.0, "tokens": 7, "seconds": 1.0}\n' * 2),
    ("table2", "log.jsonl", "7\n" * 3), ("table2", "log.jsonl", '{"loss": 1.0}\n' * 3),
    ("table2", "log.jsonl", "".join(f'{{"step": {step}, "loss": 1.0, "tokens": {n}, "seconds": {n}}}\n'
                                    for step, n in ((10, 7), (20, 9), (23, 1), (30, 12)))),      # went on
    ("overlap", "kept.json", "[]"), ("overlap", "kept.json", "{}"), ("overlap", "kept.json", "{"),
    ("overlap", "kept.json", '{"layer.0.output.dense": 1, "layer.1.output.dense": []}'),
    ("figure3", "ranks.json", "[]"), ("figure3", "ranks.json", "{}"),
    ("figure3", "ranks.json", '{"layer.0.output.dense": "2", "layer.1.output.dense": 1}')])
def test_damaged_files_beside_a_result(table, name, content, tmp_path, ran, capsys):
    """Oracle: status 2 and one line with the file and what to do."""
    if table == "figure3":
        pytest.importorskip("matplotlib")
    argv = [table, "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path)]
    assert reproduce.main(argv) == 0
    path = grids.reported_cells(grid_of(tmp_path, *argv[:-2]), "cola")[0].folder / name
    path.write_text(content)
    capsys.readouterr()
    assert reproduce.main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and "run it again" in said


@pytest.mark.parametrize("table, name", [("overlap", "kept.json"), ("figure3", "ranks.json")])
@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_matrix_that_one_run_lacks(table, name, spoilt, tmp_path, ran, capsys):
    """Oracle: status 2 and one line, whichever run it is: a mean would be of fewer runs than it says."""
    if table == "figure3":
        pytest.importorskip("matplotlib")
    argv = [table, "--tasks", "cola", "--seeds", "0,1", "--out", str(tmp_path)]
    assert reproduce.main(argv) == 0
    path = grids.reported_cells(grid_of(tmp_path, *argv[:-2]), "cola")[spoilt].folder / name
    path.write_text(json.dumps({"layer.0.output.dense": [0] if table == "overlap" else 1}))
    capsys.readouterr()
    assert reproduce.main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and name in said and "run it again" in said


def test_what_is_timed_is_never_resumed(tmp_path, ran):
    """Oracle: the list of runs. After a stop a log counts tokens and seconds anew; a speed across that would
    be of no run."""
    argv = ["table2", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path)]
    for cell in grids.reported_cells(grid_of(tmp_path, *argv[:-2]), "cola"):
        begin(cell)
    assert reproduce.main(argv) == 0 and [call[3] for call in ran] == [False] * 3


def begin(cell, **settings):
    """A last.pt as a stopped run leaves it."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    save_state(cell, {"settings": grids.settings_of(cell.flags) | settings, "weights": {}})


def save_state(cell, state):
    runs.write_state(cell.folder, state)


def test_begun_runs_are_resumed(tmp_path, ran, capsys):
    """Oracle: the list of runs. A good state is resumed, a damaged one begins anew, another's is refused."""
    argv = ["table4", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path)]
    cells = grids.reported_cells(grid_of(tmp_path, *argv[:-2]), "cola")
    begin(cells[0])
    begin(cells[1])
    (cells[1].folder / "last.pt").write_bytes((cells[1].folder / "last.pt").read_bytes()[:100])
    begin(cells[2], lr=0.5)
    assert reproduce.main(argv) == 2 and ran == [] and "--lr 0.5, not" in capsys.readouterr().err
    (cells[2].folder / "last.pt").unlink()
    write_run(cells[3])
    reproduce.main([*argv, "--dry-run"])
    states = [line.split(" python")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert states == ["resume", "to run", "to run", "done"] and ran == []
    assert reproduce.main(argv) == 0
    assert ran == [(cell.row, "cola", 0, i == 0) for i, cell in enumerate(cells[:3])]


def test_what_is_finished_is_not_run(tmp_path, ran, capsys):
    """Oracle: the list of runs. The second call runs nothing and writes the same bytes; a lost run alone is
    run; two tables share the runs they have in common."""
    argv = ["--tasks", "cola", "--seeds", "0,1", "--out", str(tmp_path)]
    assert reproduce.main(["table4", *argv]) == 0 and len(ran) == 4 * 2
    folder = tmp_path / "paper-deberta-v3-base"
    before = {name: (folder / name).read_bytes() for name in ("table4.md", "table4.json")}
    ran.clear()
    assert reproduce.main(["table4", *argv]) == 0 and ran == []
    assert before == {name: (folder / name).read_bytes() for name in before}
    cells = grids.reported_cells(grid_of(tmp_path, "table4", *argv[:-2]), "cola")
    (cells[3].folder / "result.json").unlink()
    assert reproduce.main(["table4", *argv]) == 0 and ran == [(cells[3].row, "cola", cells[3].seed, False)]
    ran.clear()
    assert reproduce.main(["pruning", *argv]) == 0 and {call[0] for call in ran} == {"lora2-k1-unpruned"}


def test_tuning_comes_first_and_is_kept(tmp_path, ran):
    """Oracle: the list of runs: the whole grid on seed 1000, then the reported seeds with the best of it
    (here the highest rate, by the scores above); tune.json says so; no reported number is of that seed."""
    argv = ["--preset", "small", "--tasks", "cola", "--seeds", "0,1", "--out", str(tmp_path)]
    assert reproduce.main(["table4", *argv]) == 0
    rates, scales, base = (grids.PRESETS["small"][name] for name in ("lrs", "scales", "base"))
    assert [call[2] for call in ran] == [1000] * len(rates) * len(scales) + [0, 1] * 4
    ran.clear()
    assert reproduce.main(["tune", *argv]) == 0
    folder = tmp_path / "small-all-MiniLM-L6-v2"
    table = json.loads((folder / "tune.json").read_text(encoding="utf-8"))["table"]
    assert table[base]["cola"]["chosen"] == {"lr": max(rates), "scale": scales[0]}
    assert table["full"]["cola"]["chosen"] == {"lr": pytest.approx(max(rates) / 10)}
    assert {call[2] for call in ran} == {1000} and base not in {call[0] for call in ran}
    rows = json.loads((folder / "table4.json").read_text(encoding="utf-8"))["table"]["rows"]
    assert {seed for row in rows for seed in row["tasks"]["cola"]["seeds"]} == {"0", "1"}


def test_the_table_says_where_it_comes_from(tmp_path, ran):
    """Oracle: results by hand (seeds 0 and 1 scored 50 and 51), the paper's 68.66, the command as given."""
    argv = ["table4", "--tasks", "cola,mrpc", "--seeds", "0,1", "--out", str(tmp_path)]
    grid = grid_of(tmp_path, *argv[:-2])
    for cell in grids.reported_cells(grid, "mrpc")[:1]:
        write_run(cell)
    assert reproduce.main(["table4", "--no-run", *argv[1:]]) == 0 and ran == []
    path = tmp_path / "paper-deberta-v3-base" / "table4.md"
    assert path.read_text(encoding="utf-8").count("75.00 (1)") == 2    # best and last of the one run there is
    reproduce.main(["table4", "--tasks", "cola", *argv[3:]])
    text = path.read_text(encoding="utf-8")
    assert "50.50 ± 0.71 (2)" in text and "| 68.66 |" in text and "not run" not in text
    assert f"`python experiments/reproduce.py table4 --tasks cola --seeds 0,1 --out {tmp_path}`" in text
    assert "8 runs, 0.08 hours; device cpu; dtype fp32; threads 1; torch 2; python 3; date 2026-01-01" in text


def test_a_dry_run_leaves_no_trace(tmp_path, ran, capsys):
    """Oracle: the folder, empty as before; a line with the whole command for each run."""
    argv = ["table1", "--preset", "small", "--tasks", "stsb", "--out", str(tmp_path), "--dry-run"]
    assert reproduce.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not list(tmp_path.iterdir()) and ran == []
    assert len([line for line in lines if line.startswith("later")]) == len(grids.METHODS["small"][1].split())
    assert all(line.startswith(("to run python train.py --task stsb --model ", "later  ")) for line in lines)


@pytest.mark.parametrize("argv, says", [
    (["table9"], "table9"), (["table1", "--preset", "huge"], "huge"),
    (["table1", "--tasks", "cola,wnli"], "wnli"), (["table1", "--tasks", ""], "no task ''"),
    (["table1", "--seeds", "0,1000"], "1000"), (["table1", "--seeds", "a"], "--seeds a"),
    (["table1", "--jobs", "0"], "--jobs 0"), (["table1", "--task", "cola"], "--task"), ([], "table")])
def test_mistakes_end_in_one_line(argv, says, tmp_path, capsys):
    """Oracle: status 2 and one line "error: ..." that names the mistake."""
    assert reproduce.main(argv + ["--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]
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
    argv = [table, "--preset", "small", "--out", str(tmp_path), "--no-run"]
    assert reproduce.main(argv) == 0, capsys.readouterr().err
    folder = tmp_path / "small-all-MiniLM-L6-v2"
    assert {path.name for path in folder.iterdir()} == {f"{table}.md", f"{table}.json"}
    assert "not run" in (folder / f"{table}.md").read_text(encoding="utf-8")


def test_one_at_a_time_in_a_folder(tmp_path, ran, capsys):
    """Oracle: status 2 and one line; nothing runs. The table may be written meanwhile; later all is well."""
    pytest.importorskip("fcntl")
    argv = ["table4", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path)]
    with disk.alone(grid_of(tmp_path, *argv[:-2]).folder, "reproduce.py"):
        assert reproduce.main(argv) == 2 and ran == []
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "another reproduce.py is running" in said and "--out" in said
        assert reproduce.main([*argv, "--no-run"]) == 0
    assert reproduce.main(argv) == 0 and len(ran) == 4


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
    """Oracle: options.parse, which reads what was passed; --resume for a begun run; its chatter is not shown;
    only result.json and the log are left behind."""
    argv = ["table4", "--tasks", "cola", "--seeds", "0", "--data-dir", "my data", "--out", str(tmp_path)]
    cells = grids.reported_cells(reproduce.parse(argv).grid, "cola")
    begin(cells[0])
    stand_in(cells)
    assert reproduce.main(argv) == 0
    calls = [call[0] for call in stand_in.calls()]
    assert calls[0] == ["--resume", str(cells[0].folder), "--model", "microsoft/deberta-v3-base",
                        "--data-dir", "my data"]
    for call, cell in zip(calls[1:], cells[1:]):
        assert options.resolve(options.parse(call)) == grids.settings_of(cell.flags) | {
            "out": str(cell.folder), "overwrite": True}
    out = capfd.readouterr().out
    assert "chatter" not in out and out.count("done") == 4 and "[4/4, about 0.0 h left]" in out
    assert sorted(path.name for path in cells[1].folder.iterdir()) == ["log.jsonl", "result.json"]
    begin(cells[1])
    (cells[1].folder / "result.json").write_text("{")
    assert reproduce.main([*argv, "--keep"]) == 0          # damaged, but its state is good: resumed, all kept
    assert stand_in.calls()[-1][0][0] == "--resume" and (cells[1].folder / "adapter.safetensors").exists()


def test_a_mistake_ends_the_grid_a_failure_does_not(tmp_path, stand_in, capsys):
    """Oracle: train.py's statuses. 1, a run that diverged: the others run, status 1 and a line for it; the
    table has a gap. 2, a user's mistake: its line is ours, nothing more is run."""
    argv = ["table4", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path / "out")]
    cells = grids.reported_cells(reproduce.parse(argv).grid, "cola")
    stand_in(cells, fail={cells[1].folder.name: (1, "loss was not finite")})
    assert reproduce.main(argv) == 1 and len(stand_in.calls()) == 4
    captured = capsys.readouterr()
    assert captured.err == f"error: {cells[1].folder}: status 1, loss was not finite\n"
    text = (tmp_path / "out/paper-deberta-v3-base/table4.md").read_text(encoding="utf-8")
    assert text.count("not run") == 6                      # best and last, of CoLA, the average, a difference
    stand_in(cells, fail={"--task": (2, "there is no model x")})
    (cells[3].folder / "result.json").unlink()
    assert reproduce.main(argv) == 2 and capsys.readouterr().err == "error: there is no model x\n"
    assert len(stand_in.calls()) == 5


def test_what_cannot_be_resumed_begins_anew(tmp_path, stand_in):
    """Oracle: the calls. train.py refuses to resume (an adapter is missing, say): the run begins anew."""
    argv = ["table4", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path / "out")]
    cells = grids.reported_cells(reproduce.parse(argv).grid, "cola")
    begin(cells[3])
    stand_in(cells, fail={"--resume": (2, "adapter.safetensors is missing")})
    assert reproduce.main(argv) == 0
    calls = [call[0] for call in stand_in.calls()]
    assert len(calls) == 5 and calls[3][0] == "--resume" and calls[4][-2] == str(cells[3].folder)


def test_runs_share_the_gpus(tmp_path, stand_in, monkeypatch):
    """Oracle: CUDA_VISIBLE_DEVICES and the times of the calls: two at once, one on each of GPUs 3 and 5."""
    monkeypatch.setattr(reproduce, "visible_gpus", lambda: ["3", "5"])
    argv = ["table4", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path / "out")]
    stand_in(grids.reported_cells(reproduce.parse(argv).grid, "cola"), sleep=0.6)
    assert reproduce.main(argv) == 0
    _, devices, times = zip(*stand_in.calls())
    assert sorted(devices[:2]) == sorted(devices[2:]) == ["3", "5"]
    assert times[1] - times[0] < 0.5 < times[2] - times[0]


def test_stopped_while_a_run_begins(tmp_path, stand_in):
    """Oracle: the clock: a run that begins after the signal is told to end; it would have slept for long."""
    stop, processes, began = threading.Event(), [], time.monotonic()
    cell = grids.reported_cells(grid_of(tmp_path / "out", "table4", "--tasks", "cola"), "cola")[0]
    stand_in([cell], sleep=60)
    stop.set()
    status, _ = reproduce.execute(cell, False, None, processes, stop)
    assert status != 0 and len(processes) == 1 and time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped(number, tmp_path, stand_in):
    """Oracle: the stand-in, which saves on SIGTERM as train.py does. The run is told to save, once; no other
    begins; the table of what there is gets written; the status is 130."""
    argv = ["table4", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path / "out")]
    cells = grids.reported_cells(reproduce.parse(argv).grid, "cola")
    write_run(cells[3])
    stand_in(cells, sleep=60)
    driver = stand_in.here / "driver.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom experiments import reproduce\n"
                      f"reproduce.TRAIN = {reproduce.TRAIN!r}\nsys.exit(reproduce.main({argv!r}))\n")
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
    assert "50.00 (1)" in (tmp_path / "out/paper-deberta-v3-base/table4.md").read_text(encoding="utf-8")


def test_tidying_notes_what_was_kept(tmp_path, ran, monkeypatch):
    """Oracle: by hand: Λ = (0, 2, 0, −1) keeps the indices 1 and 3."""
    monkeypatch.setattr(tables, "overlap_table", lambda *of_other_matrices: ({}, ""))
    cell = grids.reported_cells(grid_of(tmp_path, "overlap", "--tasks", "cola", "--seeds", "0"), "cola")[0]
    write_run(cell)
    (cell.folder / "ranks.json").write_text('{"a": 2}')
    save_state(cell, {"weights": {"a.lam": torch.tensor([0.0, 2.0, 0.0, -1.0]), "a.u": torch.ones(1, 4)}})
    assert reproduce.main(["overlap", "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert len(ran) == 1                                   # the other row: this run was only not tidied
    assert json.loads((cell.folder / "kept.json").read_text()) == {"a": [1, 3]}
    assert not (cell.folder / "last.pt").exists()


# --- pictures -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("q, family", [("query_proj", "deberta"), ("query", "roberta"), ("query", "bert")])
def test_kept_grid(q, family):
    """Oracle: the module names of the three families, written out."""
    prefix = f"{family}.encoder.layer"
    kept = {f"{prefix}.0.attention.self.{q}": 1, f"{prefix}.11.output.dense": 2,
            f"{prefix}.2.attention.output.dense": 3, f"{prefix}.2.intermediate.dense": 0}
    grid = {"q": {0: 1}, "f2": {11: 2}, "o": {2: 3}, "f1": {2: 0}}
    assert plot.kept_grid(kept) == (["q", "o", "f1", "f2"], grid)
    for bad in ({"classifier": 1}, {f"{prefix}.0.output.dense": "3"}, {"encoder.output.dense": 3}):
        with pytest.raises(ValueError, match="is no count"):
            plot.kept_grid(bad)


def run_folder(folder, method="lora2"):
    """The files of a finished run, of a pruned one or of one that was not."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(make_result(task="cola", method=method)))
    more = lambda s: {"R": 2 / s, "kept": 48 - s} if method == "lora2" else {}
    records = [{"step": s, "loss": 1 / s, "lr": 0.1} | more(s) for s in range(1, 30)]
    records.append({"step": 29, "score": 0.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if method == "lora2":
        ends = plot.model.TARGETS["bert"].values()
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
    kept = {"bert.encoder.layer.0.attention.self.query": 8, "bert.encoder.layer.1.attention.self.query": 2,
            "bert.encoder.layer.1.output.dense": 5.5}
    image = plot.heat_map(axes, kept, 8, "CoLA")
    assert image.get_array().tolist()[0] == [8, 2] and image.get_array().tolist()[1][1] == 5.5
    assert image.get_clim() == (0, 8) and [text.get_text() for text in axes.texts] == ["8", "2", "5.5"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["query", "feed-forward 2"]


@pytest.mark.parametrize("spoil, says", [
    (lambda f: (f / "result.json").unlink(), "result.json is missing"),
    (lambda f: (f / "log.jsonl").unlink(), "log.jsonl is missing"),
    (lambda f: (f / "log.jsonl").write_text(""), "has no line about a step"),
    (lambda f: (f / "log.jsonl").write_text('{"step": 1, "lo'), "damaged"),
    (lambda f: (f / "result.json").write_text("{}"), "damaged"),
    (lambda f: (f / "log.jsonl").write_text('{"loss": 1}'), "damaged"),
    (lambda f: (f / "ranks.json").write_text("[]"), "damaged"),
    (lambda f: (f / "ranks.json").write_text('{"classifier": "x"}'), "damaged"),
    (lambda f: (f / "ranks.json").write_text('{"classifier": 3}'), "is no count")])
def test_a_folder_without_the_files(spoil, says, tmp_path, capsys):
    """Oracle: status 2 and one line "error: ..."."""
    pytest.importorskip("matplotlib")
    spoil(run_folder(tmp_path / "run"))
    assert plot.main([str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


def test_figure3(tmp_path, ran):
    """Oracle: by hand: matrix f2 of layer 0 kept 2 with one seed and 1 with another, of layer 1 always 1."""
    pytest.importorskip("matplotlib")
    kept = [{"deberta.layer.0.output.dense": indices, "deberta.layer.1.output.dense": [0]}
            for indices in ([0, 1], [3])]
    grid = grid_of(tmp_path, "figure3", "--tasks", "cola", "--seeds", "0,1")
    for cell, of_cell in zip(grids.reported_cells(grid, "cola"), kept):
        write_run(cell, kept=of_cell)
    argv = ["figure3", "--tasks", "cola,mrpc", "--seeds", "0,1", "--out", str(tmp_path), "--no-run"]
    assert reproduce.main(argv) == 0 and ran == []
    folder = tmp_path / "paper-deberta-v3-base"
    text = (folder / "figure3.md").read_text(encoding="utf-8")
    assert "| layer | 0 | 1 |" in text and "| feed-forward 2 | 1.5 | 1 |" in text
    assert "MRPC, LoRA² k=1: not run" in text
    assert (folder / "figure3.png").exists() and (folder / "figure3.svg").exists()
    table = json.loads((folder / "figure3.json").read_text(encoding="utf-8"))["table"]
    assert table["cola"]["runs"] == 2 and table["cola"]["kept"]["deberta.layer.0.output.dense"] == 1.5


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
    monkeypatch.setitem(grids.TABLES, "table4", ("Table 4", {"small": ("cola", "*-qk *")}, ["* *-qk"]))
    argv = ["--preset", "small", "--model", str(tiny["bert"]), "--data-dir", str(tmp_path / "glue"),
            "--tasks", "cola", "--seeds", "0", "--out", str(tmp_path / "out")]
    for table, count in (("table4", 3), ("overlap", 3), ("figure3", 2)):
        assert reproduce.main([table, *argv]) == 0, capsys.readouterr().err
        assert f"[{count}/{count}" in capsys.readouterr().out or table == "figure3"
    folder = tmp_path / "out" / "small-bert"
    written = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert written.keys() == {"table4.md", "table4.json", "overlap.md", "overlap.json", "figure3.md",
                              "figure3.json", "figure3.png", "figure3.svg"}
    assert b"not run" not in written["table4.md"] + written["figure3.md"]
    rows = json.loads(written["table4.json"])["table"]["rows"]
    rows = {entry["row"]: entry["tasks"]["cola"] for entry in rows}
    base = grids.PRESETS["small"]["base"]
    assert rows[base]["adapter_parameters"] == [8 * (64 + 12) + 4 * (80 + 12)]   # k = 1, r = 4, two layers
    assert rows[f"{base}-qk"]["adapter_parameters"] == [4 * (64 + 12)]
    ranks = json.loads((folder / "runs" / "cola" / f"{base}-lr0.01-scale2-s0" / "ranks.json").read_text())
    assert sum(ranks.values()) == 12 * 3                                         # CoLA's target rank
    for table in ("table4", "overlap", "figure3"):
        assert reproduce.main([table, *argv]) == 0
    assert written == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
