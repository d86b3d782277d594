"""Tests of study.py: its search by hand, what runs in which order, what is recorded, refused, shown.

Offline. Most run no train.py but a stand-in; the real one runs a tiny study in this process.
"""
import json
import math
import re
import statistics
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import grid as grids
from experiments import search, study, study_page, summary
from lora2 import lora2_layers
from tests.cli import write_task
from tests.conftest import opened
from tests.test_experiments import refused, result_of

POINT = {"lr": 0.001, "scale": 8}
TINY = "--limit-train 32 --limit-dev 16 --epochs 1 --max-len 16"


class Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def height(cell):
    """A score that is best at lr 0.01 and scale 32, whatever the row; each seed has its own luck."""
    flags = dict(cell.flags)
    scale = flags["alpha"] / flags["r"] if "r" in flags else 32
    return 0.5 - abs(math.log10(flags["lr"] / 0.01)) / 10 - abs(math.log(scale / 32)) / 100 + cell.seed % 7 / 1000


@pytest.fixture
def fake(monkeypatch):
    """A stand-in for work(): height() as the score, instead of a run. Its cells, and those that shall fail."""
    told = SimpleNamespace(cells=[], fails={})

    def work(cell):
        told.cells.append(cell)
        which = cell.row, cell.task, cell.seed
        if which in told.fails:
            raise told.fails[which]
        scores = {"dev": {"pearson": height(cell), "matthews": height(cell), "accuracy": height(cell)}}
        result = result_of(cell, scores, scores)
        settings = summary.comparable(grids.settings_of(cell.flags))
        record = {"row": cell.row, "task": cell.task, "seed": cell.seed, "settings": settings}
        if dict(cell.flags).get("lr") == 0.03:
            return record | {"failed": "loss or gradient was not finite at step 3"}
        return record | {name: result.get(name) for name in ("best", "last", *summary.FACTS)} | {"peak_memory_gb": None}

    monkeypatch.setattr(study, "work", work)
    monkeypatch.setattr(study, "make_pool", lambda workers: Here())
    return told


def command(folder, *more):
    return ["--model", "tiny", "--data-dir", "glue", "--device", "cpu", "--out", str(folder / "study.json"), *more]


def load(folder):
    return summary.load(folder / "study.json")


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


def test_every_row_has_a_start_and_every_pair_its_rows(tmp_path):
    """Oracle: train.py's own reading of options, for the start of each row on each task and for each seed."""
    args = study.parse(command(tmp_path))
    asked = study.make_study(args, tmp_path)
    assert set(asked.plan) <= set(study.GIVEN["starts"])
    assert {row for pair in study.GIVEN["pairs"] for row in pair} <= set(asked.grid.rows)
    for row, task in ((row, task) for row in asked.plan for task in asked.grid.tasks):
        wanted = study.next_runs(asked, row, task)
        assert len(wanted) == 1 + 2 * len(study.GIVEN["starts"][row])
        for _, *one in wanted:
            settings = grids.settings_of(study.make_cell(asked, *one).flags)
            point = one[-1]
            assert settings["lr"] == point["lr"] and settings["seed"] == 1000 and settings["limit_train"] == 2000
            assert "scale" not in point or settings["alpha"] / settings["r"] == point["scale"]
            assert "outer" not in point or settings["outer_lr"] == pytest.approx(point["lr"] * point["outer"])
    reported = {(row, seed) for rows in asked.plan.values() for _, row, seed in rows}
    assert {("lora2-k1", 9), ("lora-r8", 9), ("sora-r1", 2), ("lora2-k1-rates-unpruned", 4)} <= reported


# --- running ------------------------------------------------------------------------------------------------

def test_a_study(tmp_path, fake, capsys):
    """Oracle: by hand, from the stand-in's scores. The optimum of height() is chosen though two rungs away, 0.03
    diverged and is recorded; reported runs have the choice, seeds pair; a second call runs nothing."""
    argv = command(tmp_path, "--rows", "lora-r1,lora-r8,lora2-k1-rates,lora2-k1-rates-noreg",
                   "--tasks", "stsb,cola", "--seeds", "3")
    assert study.main(argv) == 0
    content = load(tmp_path)
    reported = [run for run in content["runs"] if run["part"] == "reported"]
    assert len(reported) == 4 * 2 * 3 and {run["seed"] for run in reported} == {0, 1, 2}
    assert all(run["tuned"] | {"outer": 3} == {"lr": 0.01, "scale": 32, "outer": 3} for run in reported)
    assert [run["tuned_as"] for run in reported if run["row"].endswith("noreg")] == ["lora2-k1-rates"] * 6
    lost = study_page.diverged(content, "tune")
    assert {run["tuned"]["lr"] for run in lost} == {0.03}
    page = (tmp_path / "study.md").read_text()
    assert "| LoRA r=1 | 50.10±0.10 | 50.10±0.10 | 50.10±0.10 |" in page
    assert "| LoRA² k=1, orthonormal, two rates | 50.00 | 50.00 |" in page               # the worst seed
    assert "| LoRA² k=1, orthonormal, two rates − LoRA r=1 | ≈+0.00 [+0.00, +0.00] |" in page
    assert re.search(r"0.01, 32 \(of \d+, \d diverged\)", page) and "0.01, 32, × 3 (of" in page
    assert "LoRA² k=1, orthonormal, two rates, no regulariser" in page
    number = len(fake.cells)
    assert study.main(argv) == 0 and len(fake.cells) == number and (tmp_path / "study.md").read_text() == page
    assert study.main([*argv, "--no-run"]) == 0 and (tmp_path / "study.md").read_text() == page


def test_stages_come_in_order(tmp_path):
    """Oracle: study.json: however rows are asked for, what is handed out first is of the first stage."""
    asked = study.make_study(study.parse(command(tmp_path, "--tasks", "stsb,cola")), tmp_path)
    handed = []
    pool = SimpleNamespace(submit=lambda function, cell: handed.append(cell.row) or Future())
    scheduler = study.Scheduler(asked, pool, 50, math.inf, None)
    for chain in reversed(list(scheduler.under_way)):
        scheduler.ask(chain)
    scheduler.hand_out()
    first, second = (set(rows.split()) for rows, _ in study.GIVEN["stages"][:2])
    assert len(handed) == 50 and set(handed[:44]) == first and set(handed[44:]) <= second


def test_a_deadline_and_going_on(tmp_path, fake, monkeypatch):
    """Oracle: the clock of the stand-in: after the deadline nothing begins; the same command runs the rest, and the
    file is in the end as if nothing had been."""
    argv = command(tmp_path, "--tasks", "stsb", "--rows", "lora-r1,head", "--seeds", "2")
    assert study.main([*argv, "--seconds", "0"]) == 0 and fake.cells == []
    clock = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock))
        assert study.main([*argv, "--seconds", "20"]) == 0
    begun = len(fake.cells)
    assert 0 < begun < 20 and len(load(tmp_path)["runs"]) == begun
    assert study.main(argv) == 0
    assert len(fake.cells) == len(set(fake.cells)) == len(load(tmp_path)["runs"])


def test_a_failure_is_told_and_not_recorded(tmp_path, fake, capsys):
    """Oracle: status 1 and a line; the row that failed is not run, others are; a second call tries again."""
    fake.fails["lora-r1", "stsb", 1000] = RuntimeError("status 1, the disk is full")
    argv = command(tmp_path, "--tasks", "stsb", "--rows", "lora-r1,head", "--seeds", "2")
    assert study.main(argv) == 1 and "the disk is full" in capsys.readouterr().err
    assert {run["row"] for run in load(tmp_path)["runs"]} == {"head"}
    fake.fails.clear()
    assert study.main(argv) == 0 and len([run for run in load(tmp_path)["runs"] if run["part"] == "reported"]) == 4


def test_mistakes(tmp_path, fake, capsys):
    """Oracle: status 2 and one line that names the mistake; a mistake of train.py's options ends the study."""
    for argv, *says in [(["--workers", "0"], "--workers 0"), (["--rows", "lora"], "--rows lora"),
                        (["--more", "--limit-train none"], "--limit-train"), (["--tasks", "mmlu"], "mmlu"),
                        (["--device", "abacus"], "abacus")]:
        refused(command(tmp_path) + argv, capsys, *says, main=study.main)
    fake.fails["lora-r1", "stsb", 1000] = ValueError("give a folder")
    refused(command(tmp_path), capsys, "give a folder", main=study.main)


def test_other_settings_and_devices_have_a_file_of_their_own(tmp_path, fake, capsys):
    """Oracle: status 2 and one line; the file stays as it is."""
    argv = command(tmp_path, "--tasks", "stsb", "--rows", "head", "--seeds", "1")
    assert study.main(argv) == 0
    before = (tmp_path / "study.json").read_text()
    refused([*argv, "--more", "--epochs 2"], capsys, "other settings", "--out", main=study.main)
    content = load(tmp_path)
    for one in content["runs"]:
        one["device"] = "a GPU"
    summary.write(tmp_path / "study.json", content)
    refused(argv, capsys, "runs on a GPU, this is cpu", "--out", main=study.main)
    assert json.loads(before)["runs"]


@pytest.mark.parametrize("spoil, says", [("edge", "on the edge"), ("better", "not the best")])
def test_a_table_whose_choice_is_on_an_edge_is_refused(spoil, says, tmp_path, fake, capsys):
    """Oracle: by hand. Without the runs at one side of the choice, or with a better one beside it, status 2 and a
    line that names row, task and point, and no page; without that row there is a page."""
    argv = command(tmp_path, "--tasks", "stsb", "--rows", "head,lora-r1", "--seeds", "2")
    assert study.main(argv) == 0
    (tmp_path / "study.md").unlink()
    content = load(tmp_path)
    beside = [run for run in content["runs"] if run["part"] == "tune" and run["row"] == "lora-r1"
              and run["tuned"] == {"lr": 0.003, "scale": 32}]
    if spoil == "edge":
        content["runs"].remove(*beside)
    else:
        beside[0]["last"]["score"] = 0.9
    summary.write(tmp_path / "study.json", content)
    refused([*argv, "--no-run"], capsys, says, "lora-r1 on stsb", "0.01, 32", main=study.main)
    assert not (tmp_path / "study.md").exists()
    assert study.main([*argv, "--no-run", "--rows", "head"]) == 0 and "LoRA r=1" not in (tmp_path / "study.md").read_text()


def test_a_diverged_seed_is_shown(tmp_path, fake):
    """Oracle: by hand: it is in no mean, the count says so, and the page names it."""
    argv = command(tmp_path, "--tasks", "stsb", "--rows", "head", "--seeds", "3")
    assert study.main(argv) == 0
    content = load(tmp_path)
    one = next(run for run in content["runs"] if run["seed"] == 1)
    for name in ("best", "last"):
        del one[name]
    one["failed"] = "loss or gradient was not finite at step 9"
    summary.write(tmp_path / "study.json", content)
    assert study.main([*argv, "--no-run"]) == 0
    page = (tmp_path / "study.md").read_text()
    assert "(n = 2)" in page and "Diverged, and in no mean: head on stsb, seed 1." in page


# --- numbers ------------------------------------------------------------------------------------------------

def test_interval():
    """Oracle: by hand: of 1, 2, 3 the mean is 2, s/√3 = 0.577, t = 4.303; one value has none. The t table by
    numerical integration of Student's density."""
    assert study_page.interval([]) is None and study_page.interval([2])["half"] is None
    found = study_page.interval([1, 2, 3])
    assert found["mean"] == 2 and found["half"] == pytest.approx(4.303 / math.sqrt(3))
    assert study_page.show_interval(found, 3) == "≈+2.00 [−0.48, +4.48]" or found["half"] < 2
    for df, t in enumerate(study_page.T95, 1):
        c = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
        xs = [t * (i + 0.5) / 20000 for i in range(20000)]
        inside = 2 * t / 20000 * sum(c * (1 + x * x / df) ** (-(df + 1) / 2) for x in xs)
        assert inside == pytest.approx(0.95, abs=5e-5), df
    with pytest.raises(ValueError, match="21 seeds"):
        study_page.interval(list(range(21)))


def test_the_committed_study_follows_from_its_json():
    """Oracle: the Markdown file beside it, to the byte."""
    for path in (grids.ROOT / "experiments" / "results").glob("study*.json"):
        assert study_page.page(summary.load(path)) == path.with_suffix(".md").read_text(encoding="utf-8")


# --- the real one -------------------------------------------------------------------------------------------

def test_a_tiny_study_through_train(cli, monkeypatch, capsys):
    """Oracle: train.py itself, on a BERT of two layers: what it found is in the file, no folder is left; a run with
    a rate at which it diverges is recorded as that."""
    write_task("stsb")
    monkeypatch.setattr(study, "make_pool", lambda workers: Here())
    Path("tmp").mkdir()
    argv = ["--model", str(cli.models["bert"]), "--out", "study.json", "--device", "cpu", "--runs", "tmp",
            "--tasks", "stsb", "--rows", "head", "--seeds", "2", "--more", TINY]
    assert study.main(argv) == 0, capsys.readouterr().err
    content = summary.load(Path("study.json"))
    reported = [run for run in content["runs"] if run["part"] == "reported"]
    assert len(reported) == 2 and all(run["settings"]["method"] == "head" for run in content["runs"])
    assert reported[0]["last"]["scores"]["dev"].keys() == {"pearson", "spearman"} and list(Path("tmp").iterdir()) == []
    asked = study.make_study(study.parse(argv), "tmp")
    record = study.work(study.make_cell(asked, "lora2-k1-gradient-rates", "stsb", 0, POINT | {"outer": 0.3}))
    assert record["settings"]["outer_lr"] == 0.0003 and record["settings"]["init"] == "gradient"
    record = study.work(study.make_cell(asked, "lora-r1", "stsb", 0, {"lr": 1e30, "scale": 8192}))
    assert "not finite" in record["failed"] and "best" not in record


@pytest.mark.slow
def test_two_workers(cli, capsys):
    """Oracle: the same study in this process: two spawned workers find the same scores."""
    write_task("stsb")
    argv = ["--model", str(cli.models["bert"]), "--device", "cpu", "--tasks", "stsb", "--rows", "head", "--seeds", "2",
            "--more", TINY, "--out"]
    assert study.main([*argv, "two.json", "--workers", "2"]) == 0, capsys.readouterr().err
    assert study.main([*argv, "one.json"]) == 0
    scores = [{(run["seed"], run["tuned"]["lr"]): run["last"]["score"] for run in summary.load(Path(name))["runs"]}
              for name in ("one.json", "two.json")]
    assert scores[0] == scores[1] and len(scores[0]) >= 5
