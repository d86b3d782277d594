"""Tests of experiments/: tables by hand, the paper's own averages, what is committed, pictures."""
import json
import math
import re
import shlex
import shutil
import xml.etree.ElementTree
from pathlib import Path

import pytest

import model as models
from experiments import grid as grids
from experiments import moving, pages, plot, reproduce, summary, tables
from experiments.speed import growth
from experiments.speed import table as bench_table
from tests.test_reproduce import PAPER, refused

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"


# --- numbers ------------------------------------------------------------------------------------------------

def test_the_papers_averages_are_over_eight_tasks():
    """Oracle: the averages that the paper prints, to its two digits, by one rule for all rows; by that rule LoRA² k=8
    has 89.43, its printed 89.68 is the mean over the ten columns. Tables 3 and 4 end in LoRA² k=1 of Table 1; Table
    2's mean ratio is 1.148."""
    rows = PAPER["table1"]["rows"]
    for row, entry in rows.items():
        assert entry["scores"].keys() == tables.COLUMNS.keys()
        mean = tables.average(entry["scores"].values())
        assert round(mean, 2) == pytest.approx(89.43 if row == "lora2-k8" else entry["average"], abs=0.005)
    columns = [x for columns in rows["lora2-k8"]["scores"].values() for x in columns]
    assert len(columns) == 10 and round(sum(columns) / 10, 2) == 89.68
    for name in ("table3", "table4"):
        for task, columns in PAPER[name]["rows"]["base"]["scores"].items():
            assert all(a in (b, None) for a, b in zip(columns, rows["lora2-k1"]["scores"][task]))
    (adalora, lora2) = (entry["scores"] for entry in PAPER["table2"]["rows"].values())
    assert sum(lora2[task][0] / adalora[task][0] for task in adalora) / 7 == pytest.approx(1.148, abs=5e-4)


@pytest.mark.parametrize("values, how, expected", [
    ([40, 50, 60], {}, "50.00±10.00"), ([7], {"seeds": 1}, "7.00"), ([], {}, "not run"),
    ([-40, -50, -60], {"seeds": 4, "digits": 1}, "−50.0±10.0 (n = 3)"), ([0.1], {}, "0.10 (n = 1)")])
def test_a_summary_as_text(values, how, expected):
    """Oracle: by hand: the sample standard deviation (with n − 1), of which one value has none."""
    assert pages.show(tables.summary(values), **{"seeds": 3} | how) == expected


def test_numbers_as_text():
    """Oracle: by hand."""
    assert tables.mean_of([0.0, 50.0]) == 25 and tables.mean_of([None, 50.0]) == 50
    assert pages.span([1640, 1560, 1600]) == "1,560–1,640"
    assert pages.span([5, 5]) == "5" and pages.span([]) == "–" == pages.span([None])


def run_of(row, task, seed, best, last, adapter=1560, survive=None):
    """A record; best, last: a score for each column of the task."""
    found = {"row": row, "task": task, "seed": seed, "adapter_parameters": adapter, "surviving_parameters": survive}
    for which, columns in (("best", best), ("last", last)):
        found[which] = {"scores": {}}
        for (split, metric), value in zip(tables.COLUMNS[task][1], columns, strict=True):
            found[which]["scores"][split] = {metric: value}
    return found


@pytest.fixture
def content():
    """Two rows on CoLA and MNLI: a with three and two seeds, b with one seed of CoLA alone."""
    paper = {"a": {"parameters": "2k", "scores": {"cola": [70.0], "mnli": [90.0, 80.0]}},
             "b": {"scores": {"cola": [60.0]}}}
    runs = [run_of("a", "cola", 0, [0.4], [0.3]), run_of("a", "cola", 1, [0.5], [0.5]),
            run_of("a", "cola", 2, [0.6], [0.4]), run_of("a", "mnli", 0, [0.8, 0.7], [0.7, 0.7], 1640),
            run_of("a", "mnli", 2, [0.6, 0.5], [0.5, 0.4], 1640), run_of("b", "cola", 1, [0.2], [0.1], survive=20)]
    return {"name": "table1", "tasks": ["mnli", "cola"], "seeds": 3, "pairs": [["a", "b"]],
            "rows": {"a": "method a", "b": "method b"}, "paper": paper, "runs": runs}


def test_score_tables(content):
    """Oracle: by hand, from eight scores; columns stand in the paper's order. Seeds 0 and 2 have both tasks: their
    averages are (40 + (80 + 70) / 2) / 2 = 57.5 and (60 + 55) / 2 = 57.5."""
    assert pages.score_table(content, "best").splitlines() == [
        "| at the best evaluation | CoLA | MNLI | average |", "| --- | --- | --- | --- |",
        "| method a | 50.00±10.00 | 70.00±14.14 (n = 2)/60.00±14.14 (n = 2) | 57.50±0.00 (n = 2) |",
        "| method b | 20.00 (n = 1) | not run/not run | not run |"]
    assert pages.score_table(content).splitlines()[2].startswith(
        "| method a | 40.00±10.00 | 60.00±14.14 (n = 2)/55.00±21.21 (n = 2) |")
    assert pages.paper_table(content).splitlines()[2:] == [
        "| method a | 70.00 | 90.00/80.00 | 77.50 |", "| method b | 60.00 | – | – |"]
    assert pages.parameter_table(content).splitlines()[2:] == [
        "| method a | 1,560–1,640 | – | 2k |", "| method b | 1,560 | 20 | – |"]


def test_differences(content):
    """Oracle: by hand. Over common seeds alone: 10 and 30 at the best evaluation, −10 and 40 after the last step;
    t = 12.706 times s/√2 = 10 and 25."""
    content["runs"].append(run_of("b", "cola", 0, [0.3], [0.4]))
    for which, expected in (("best", "≈+20.00 [−107.06, +147.06] (n = 2)"),
                            ("last", "≈+15.00 [−302.65, +332.65] (n = 2)")):
        text = pages.interval_table(content, which)
        assert text.splitlines()[2] == f"| method a − method b | {expected} | not run | not run |"


def test_times():
    """Oracle: by hand: 10 and 30 ms more, mean 20, t s/√2 = 127; the paper's mean of 1.01 and 1.45 is 1.23."""
    runs = [run_of(row, "cola", seed, [0.5], [0.5]) | {"step_seconds": seconds} for row, seed, seconds in (
        ("adalora-r8", 0, 0.1), ("adalora-r8", 1, 0.14), ("lora2-k1", 0, 0.11), ("lora2-k1", 1, 0.17))]
    content = {"name": "table2", "tasks": ["cola", "mrpc"], "seeds": 2, "pairs": [["lora2-k1", "adalora-r8"]],
               "rows": {"adalora-r8": "AdaLoRA r=8", "lora2-k1": "LoRA²"}, "runs": runs, "paper": PAPER["table2"]["rows"]}
    (times, more), (_, paper) = pages.parts_of(content, content)
    assert "| LoRA² | 0.140±0.042 | not run | not run |" in times
    assert "| LoRA² − AdaLoRA r=8 | ≈+0.020 [−0.107, +0.147] | not run | not run |" in more
    assert "| AdaLoRA | 1.01 | 1.45 | 1.23 |" in paper


def test_interval():
    """Oracle: by hand: of 1, 2, 3 the mean is 2, s/√3 = 0.577, t = 4.303; one value has none. The t table by
    numerical integration of Student's density."""
    assert tables.half_of(tables.summary([2])) is None and pages.show_interval(None, 3) == "not run"
    assert pages.show_interval(tables.summary([1, 2, 3]), 3) == "≈+2.00 [−0.48, +4.48]"
    assert pages.show_interval(tables.summary([4, 4]), 3) == "+4.00 [+4.00, +4.00] (n = 2)"
    for df, t in enumerate(tables.T95, 1):
        c = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
        xs = [t * (i + 0.5) / 20000 for i in range(20000)]
        inside = 2 * t / 20000 * sum(c * (1 + x * x / df) ** (-(df + 1) / 2) for x in xs)
        assert inside == pytest.approx(0.95, abs=5e-5), df
    with pytest.raises(ValueError, match="21 seeds"):
        tables.half_of(tables.summary(range(21)))


def test_overlap():
    """Oracle: by hand, from four runs. Of 4 kept singular values 2 are the same ones, 3 lie in the same matrices.
    Shuffled: 3 and 1 of one seed against 1 and 3 of the other share 2 as they are, 4 the other way round."""
    kept = {("a", 0): {"q": [[0, 1, 2], [5]]}, ("b", 0): {"q": [[0, 3], [5, 6]]}, ("a", 1): {"q": [[7], [1, 2, 3]]}}
    content = {"tasks": ["cola"], "seeds": 2, "rows": {"a": "Eq. 9", "b": "Eq. 8"}, "runs": [
        {"row": row, "task": "cola", "seed": seed, "settings": {"r": 3}, "kept": what}
        for (row, seed), what in kept.items()]}
    means = [tables.summary(values)["mean"] for values in tables.overlap(content, "cola").values()]
    assert means == [50, 75, 50, 75, 0, 50, 0, 0] and tables.shared([set()], [set()]) == 0
    assert pages.overlap_table(content).splitlines()[2].endswith("| 50.0 (n = 1) |")


# --- what is committed --------------------------------------------------------------------------------------

def words_of(path):
    """The command of reproduce.py that a committed page says it was made by."""
    command, = re.findall(r"^- `python experiments/reproduce.py (.*)`$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(command.replace("study-gpu", "experiments/results/study-gpu"))


@pytest.mark.parametrize("path", [*RESULTS.glob("small-*/*.md"), RESULTS / "study-gpu.md"], ids=lambda path: path.stem)
def test_the_committed_tables_follow_from_their_runs(path, tmp_path, monkeypatch):
    """Oracle: the committed files. The command that is written in a page, given nothing but the records, makes the
    same page, to the byte; of a small model it runs nothing without --no-run either, and leaves the records."""
    if path.stem == "figure3":
        pytest.importorskip("matplotlib")
    copy = tmp_path / path.relative_to(ROOT)
    records = copy.with_name("study-gpu.json" if path.stem == "study-gpu" else "runs.json")
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / records.relative_to(tmp_path), records)
    monkeypatch.chdir(tmp_path)
    for more in (["--no-run"],) if path.stem == "study-gpu" else (["--no-run"], ["--device", "cpu"]):
        assert reproduce.main(words_of(path) + more) == 0
        text = copy.read_text(encoding="utf-8").replace(" --device cpu", "")
        assert text == path.read_text(encoding="utf-8")
    assert records.read_bytes() == (ROOT / records.relative_to(tmp_path)).read_bytes()


def test_every_record_is_of_a_run_that_a_page_asks_for():
    """Oracle: the committed pages: together they have each record of a file, and each file's bytes are write()'s."""
    for path in (RESULTS / "study-gpu.json", RESULTS / "small-all-MiniLM-L6-v2" / "runs.json"):
        shown = []
        for page in path.parent.glob("*.md" if path.stem == "runs" else "study-gpu.md"):
            words = words_of(page) if path.stem == "runs" else ["study"]
            grid = reproduce.parse([*words, "--out", str(path)]).grid
            shown += [run["settings"] for run in grids.finished(grid)]
        given = [run["settings"] for run in grid.file["runs"]]
        assert all(one in given for one in shown) and all(one in shown for one in given)
        assert all(given.count(one) == 1 for one in given)


@pytest.mark.parametrize("path", [*RESULTS.glob("bench-*.json"), *RESULTS.glob("growth*.json")],
                         ids=lambda path: path.stem)
def test_committed_pages_follow_from_their_json(path):
    """Oracle: the Markdown file beside it, to the byte; a file that takes too long to read is said to."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if "bench" in path.stem:
        text = bench_table.page(content)
    else:
        text = growth.markdown(content)
        content["data"][-1]["seconds"] = 61.0
        assert "OVER" in growth.markdown(content) and "OVER" not in text
    assert text == path.with_suffix(".md").read_text(encoding="utf-8")


# --- pictures -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("q, family", [("query_proj", "deberta"), ("query", "roberta"), ("query", "bert")])
def test_places(q, family):
    """Oracle: the module names of the three families, written out."""
    prefix = f"{family}.encoder.layer"
    values = {f"{prefix}.1.attention.self.{q}": 1, f"{prefix}.0.attention.self.{q}": 5,
              f"{prefix}.0.output.dense": 2, f"{prefix}.0.attention.output.dense": 3,
              f"{prefix}.0.intermediate.dense": 0}
    found = summary.by_place(values)
    assert list(found.items()) == [("q", [5, 1]), ("o", [3]), ("f1", [0]), ("f2", [2])]    # Figure 3's order


def test_heat_map_shows_the_counts():
    """Oracle: the numbers put in: rows are matrices in the paper's order, columns layers."""
    pytest.importorskip("matplotlib")
    figure, (axes,) = plot.new_figure()
    image = plot.heat_map(axes, {"q": [8, 2], "f2": [0, 5.5]}, 8, "CoLA")
    assert image.get_array().tolist() == [[8, 2], [0, 5.5]] and image.get_clim() == (0, 8)
    assert [text.get_text() for text in axes.texts] == ["8", "2", "0", "5.5"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["query", "feed-forward 2"]


def run_folder(folder):
    """The files of a finished run that was pruned."""
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"task": "cola", "method": "lora2", "settings": {"r": 8}}))
    (folder / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "R": 2.0, "kept": 48}))
    kept = {f"bert.encoder.layer.{i}.{end}": i for i in range(6) for end in models.TARGETS["bert"].values()}
    (folder / "ranks.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize("name, text, says", [
    ("result.json", None, "run cannot be read"), ("log.jsonl", None, "run cannot be read"),
    ("log.jsonl", '{"step": 1, "lo', "damaged"), ("log.jsonl", '{"loss": 1}', "damaged"),
    ("result.json", "{}", "damaged"), ("ranks.json", "[]", "damaged"),
    ("log.jsonl", '{"step": 1, "loss": 1.0, "kept": 3, "ranks": [3]}', "run is damaged"),
    ("ranks.json", '{"classifier": 3}', "matrix of an encoder layer")])
def test_a_folder_without_the_files(name, text, says, tmp_path, capsys):
    """Oracle: status 2 and one line "error: ..."; the counts of a log are those of ranks.json."""
    pytest.importorskip("matplotlib")
    path = run_folder(tmp_path / "run") / name
    path.unlink()
    if text is not None:
        path.write_text(text)
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
    story = json.loads((RESULTS / "pruning-stsb.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "pruning.svg").read_bytes()
    assert moving.picture(story).encode() == text and len(text) < 150_000
    check_picture(story, text.decode())
    assert [frame["step"] for frame in story["frames"]] == [1, *range(10, story["steps"] + 1, 10)]
    assert story["frames"][-1]["kept"] == story["last"]["kept"] == story["budget"]
    assert summary.comparable(story["settings"]) == story["settings"]


@pytest.mark.parametrize("method, steps", [("lora2", [1, 10, 12]), ("adalora", [1, 10, 12]), ("sora", []), ("full", [])])
def test_a_run_leaves_its_pictures(method, steps, cli, capsys):
    """Oracle: ranks.json and the log of a run of twelve steps; the file formats' first bytes; SoRA has no budget to
    show, full fine-tuning has no ranks. Drawing twice gives the same bytes."""
    pytest.importorskip("matplotlib")
    assert cli.tiny("--method", method, "--max-steps 12").status == 0
    told = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines() if "ranks" in line]
    assert [line["step"] for line in told] == steps
    drawn = []
    for _ in range(2 if method == "adalora" else 1):
        assert plot.main(["run", "--out", "out"]) == 0
        drawn.append({path.name: path.read_bytes() for path in Path("out").iterdir()})
    stems = ["training"] + ([] if method == "full" else ["ranks"])
    names = {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert drawn[0].keys() == names | ({"pruning.json", "pruning.svg"} if steps else set()) and drawn[0] == drawn[-1]
    assert len(capsys.readouterr().out.splitlines()) == len(drawn) * len(drawn[0])
    assert all(drawn[0][name].startswith(b"\x89PNG") == name.endswith("png") for name in drawn[0])
    if steps:
        story = json.loads(drawn[0]["pruning.json"])
        ranks = json.loads(Path("run/ranks.json").read_text())
        assert told[-1]["ranks"] == [ranks[name] for name in sorted(ranks)]
        assert story["frames"][-1]["ranks"] == summary.by_place(ranks)
        assert summary.comparable(story["settings"]) == story["settings"]          # names no folder
        check_picture(story, drawn[0]["pruning.svg"].decode())


def test_of_a_long_run_some_frames_are_left_out(monkeypatch):
    """Oracle: by hand: of 8 frames every third, so that the last is among them."""
    monkeypatch.setattr(moving, "FRAMES", 3)
    frames = [{"step": i, "loss": 0.0, "kept": 9 - i, "ranks": {"q": [9 - i, 0]}} for i in range(1, 9)]
    story = {"settings": {"r": 9, "task": "own", "model": '<"a&b">'}, "steps": 8, "singular_values": 16,
             "last": {"scores": {"dev": {"accuracy": 0.5}}}, "frames": frames}
    assert [rows for rows, _ in read_picture(moving.picture(story))] == [{0: [9 - i, 0]} for i in (2, 5, 8)]


def test_figure3(tmp_path):
    """Oracle: by hand: matrix f2 of layer 0 kept 2 with one seed and 1 with another, of layer 1 always 1."""
    pytest.importorskip("matplotlib")
    found = [{"row": "a", "task": "cola", "seed": seed, "settings": {"r": 8}, "ranks": {"f2": [2 - seed, 1]}}
             for seed in (0, 1)]
    content = {"name": "figure3", "tasks": ["cola", "mrpc"], "rows": {"a": "LoRA² k=1"}, "runs": found}
    (picture,), text = pages.parts_of(content, content)
    plot.figure3(content, tmp_path / "figure3")
    assert "| layer | 0 | 1 |" in text[2] and "| feed-forward 2 | 1.5 | 1 |" in text[2]
    assert text[3] == "MRPC, LoRA² k=1: not run\n"
    assert (tmp_path / "figure3.svg").exists() and "](figure3.svg)" in picture
