"""The parts of README.md that follow from other files: line numbers, line counts, costs, results.

    python experiments/readme.py                               # rewrite them
    python experiments/readme.py --check                       # only say whether that would change anything

    `code` [lora2.py:1](lora2.py#L1)        the number becomes that of the one line that holds `code`
    <!-- cost --> ... <!-- /cost -->        what is between becomes what the function of that name returns

The table of files keeps its words; a module that is new gets those of its docstring. Costs are counted on
the code itself. Scores and times come from files that reproduce.py and bench.py wrote below
experiments/results, and from nowhere else; what has no file is "not run".
"""
import argparse
import ast
import json
import os
import re
import sys
import textwrap
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))

import grid as grids                                       # it puts the project's folder on the path
import baselines
import disk
import options
import tables
from lora2 import LoRA2Linear, RankPruner

ROOT, RESULTS, WIDTH = grids.ROOT, grids.ROOT / "experiments" / "results", 100
LINK = re.compile(r"`([^`\n]+)`(\s+)\[([\w./]+):\d+\]\(\3#L\d+\)")
FILE = re.compile(r"^\| \[([\w./]+)\]\(\1\) \| \d+ \| (.*) \|$", re.MULTILINE)
MEASURES = {"cola": "Matthews", "stsb": "Pearson", "mnli": "accuracy m/mm", "qqp": "accuracy/F1"}


# --- links and counts ---------------------------------------------------------------------------------------

def line_of(name, code):
    """Number of the one line of a file that holds some code; ValueError if there is none, or several."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines, 1) if code in line]
    if len(found) != 1:
        raise ValueError(f"README.md: `{code}` is on {len(found)} lines of {name}: name code that is on one")
    return found[0]


def link(match):
    """A reference `code` [file:line](file#Lline) with the line where the code is now."""
    code, space, name = match.groups()
    number = line_of(name, code)
    return f"`{code}`{space}[{name}:{number}]({name}#L{number})"


def files(old):
    """A line per file: those of the table as it is that are still there, then modules that are not in it."""
    said = {name: words for name, words in FILE.findall(old) if (ROOT / name).exists()}
    for path in sorted(ROOT.glob("*.py")):
        words = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        words = textwrap.shorten(words, WIDTH - 20 - 2 * len(path.name), placeholder=" ...")
        said.setdefault(path.name, words)
    count = lambda name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
    return tables.markdown(["file", "lines", "what it holds"],
                           [[f"[{name}]({name})", str(count(name)), words] for name, words in said.items()])


# --- what the method costs ----------------------------------------------------------------------------------

def flops(layer, N, train):
    """FLOPs of the matrix products that torch runs for N tokens: of the forward pass, or of both passes."""
    x = torch.randn(N, layer.in_features, requires_grad=train)
    product = lambda a, m1, m2, out_shape=None, **_: 2 * m1[0] * m1[1] * m2[1]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
        y = layer(x)
        if train:
            y.sum().backward()
    return counter.get_total_flops()


def cost(old=None, d=768, r=8, N=128):
    """Trained and scored numbers and FLOPs of one d × d matrix, by counting."""
    frozen = lambda: torch.nn.Linear(d, d).requires_grad_(False)
    kinds = [("LoRA r=1", baselines.LoRALinear, 1, 1), ("LoRA r=8", baselines.LoRALinear, r, r),
             ("AdaLoRA r=8", baselines.AdaLoRALinear, r, r), ("LoRA² k=1, r=8", LoRA2Linear, 1, r),
             ("LoRA² k=8, r=8", LoRA2Linear, r, r)]
    alone = [flops(frozen(), N, train) for train in (False, True)]
    lines = [["frozen layer", f"{d * d + d:,} frozen", "", *(f"{n / 1e6:,.1f}M" for n in alone)]]
    for label, kind, k, rank in kinds:
        layer = kind(frozen(), k, rank)
        pruner = {LoRA2Linear: RankPruner, baselines.AdaLoRALinear: baselines.AdaLoRAPruner}.get(kind)
        scored = pruner(torch.nn.Sequential(layer), 1, 9, 1, 1, 1).sensitivity.numel() if pruner else None
        trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        more = [flops(layer, N, train) - n for train, n in zip((False, True), alone)]
        lines.append([label, f"{trained:,}", "–" if scored is None else f"{scored:,}",
                      *(f"+{n / 1e6:.2f}M, +{100 * n / all:.2f} %" for n, all in zip(more, alone))])
    return tables.markdown([f"{d} × {d}, {N} tokens", "trained numbers", "scored", "FLOPs, forward",
                            "FLOPs, forward and backward"], lines)


# --- results ------------------------------------------------------------------------------------------------

def read(path):
    """The content of a JSON file of results, or None without one; ValueError for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ValueError(f"{path} is damaged: write it again") from e


def from_root(path):
    """A path as the README links to it."""
    return Path(os.path.relpath(path, ROOT)).as_posix()


def folder_of(preset):
    """Where reproduce.py puts what a preset gives with its own model."""
    return RESULTS / f"{preset}-{Path(grids.PRESETS[preset]['model']).name}"


def number(part, digits, spread=True, sign=""):
    """A summary of tables.py as text."""
    if part is None:
        return "not run"
    std = f"±{part['std']:.{digits}f}" if spread and part["std"] is not None else ""
    return f"{part['mean']:{sign}.{digits}f}{std}".replace("-", "−")


def in_order(tasks):
    """Tasks in the order of the paper's columns, which JSON files do not keep."""
    return [task for task in tables.COLUMNS if task in tasks]


def fitting(candidates):
    """The first of several Markdown tables that is not too wide; without one a line that says so."""
    fits = (text for text in candidates if max(map(len, text.splitlines())) <= WIDTH)
    return next(fits, "The table is too wide for this page.\n")


def score_tables(rows):
    """A table of scores as Markdown, after the last step: in full, then ever narrower."""
    tasks = in_order(rows[0]["tasks"])
    for spread, counted in ((True, True), (True, False), (False, True), (False, False)):
        head = ["after the last step", *["numbers"] * counted, *(tables.COLUMNS[task][0] for task in tasks)]
        lines = []
        for row in rows:
            numbers = tables.span(n for cell in row["tasks"].values() for n in cell["adapter_parameters"])
            cells = ["/".join(number(part, 1, spread) for part in row["tasks"][task]["last"])
                     for task in tasks]
            lines.append([row["label"].replace(" init", ""), *[numbers] * counted, *cells,
                          number(row["average"]["last"], 1, spread)])
        yield tables.markdown([*head, "average"], lines)


def difference_tables(pairs):
    """Pairs of rows, as Markdown: seed by seed, so that ≈ marks what is not larger than its own spread."""
    tasks = in_order(pairs[0])
    for spread in (True, False):
        lines = []
        for pair in pairs:
            parts = [pair[task]["last"] for task in tasks]
            near = ["≈" * bool(p and p["std"] is not None and abs(p["mean"]) <= p["std"]) for p in parts]
            lines.append([pair["difference"].replace(" init", ""),
                          *(mark + number(part, 1, spread, "+") for mark, part in zip(near, parts))])
        yield tables.markdown(["difference", *(tables.COLUMNS[task][0] for task in tasks)], lines)


def time_table(table):
    """Ratios of times per step, as Markdown."""
    tasks = in_order(table)
    rows = list(table[tasks[0]]["time_ratio"])
    lines = [[tables.COLUMNS[task][0], *(number(table[task]["time_ratio"][row], 3) for row in rows),
              f"{table[task]['paper'][1] / table[task]['paper'][0]:.3f}" if table[task]["paper"] else "–"]
             for task in tasks]
    return tables.markdown(["time of a step over AdaLoRA's", *(grids.row_of(row)[0] for row in rows),
                            "the paper's"], lines)


def overlap_table(table):
    """How much of what Eq. 9 keeps Eq. 8 keeps too, as Markdown."""
    tasks = in_order(next(iter(table.values())))
    return tables.markdown(["kept by both, %", *(tables.COLUMNS[task][0] for task in tasks)],
                           [[name, *(number(line[task], 1) for task in tasks)]
                            for name, line in table.items()])


def prose(text):
    """A paragraph, broken into lines."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def facts_of(contents):
    """Where numbers come from: the entries of result files that are not their tables, in a line."""
    listed = lambda value: value if isinstance(value, list) else [value]
    facts = {name: sorted({str(item) for content in contents for item in listed(content.get(name, []))})
             for name in ("device", "dtype", "threads", "torch", "python", "date")}
    return "; ".join(f"{name} {', '.join(values)}" for name, values in facts.items() if values)


def section(name, content, path):
    """One table of reproduce.py, in short; differences only of the first, for the sake of brevity."""
    table, where = content["table"], from_root(path.with_suffix(".md"))
    title = f"**{grids.TABLES[name][0]}** ({content['runs']} runs, in full: [{name}.md]({where}))"
    text = prose(title) + "\n"
    if name == "table2":
        return text + time_table(table)
    if name == "figure3":
        return text + f"![kept singular values, layer by layer]({from_root(path.with_suffix('.png'))})\n"
    if name == "overlap":
        return text + overlap_table(table["overlap"])
    text += fitting(score_tables(table["rows"]))
    if name == "table1" and table["differences"]:
        text += "\n" + fitting(difference_tables(table["differences"]))
    return text


def results(old=None):
    """All tables of reproduce.py: those that there are, and the names of those that there are not."""
    text = []
    for preset, facts in grids.PRESETS.items():
        found = {name: read(folder_of(preset) / f"{name}.json") for name in grids.TABLES if name != "tune"}
        shown = [name for name, content in found.items() if content and content["runs"]]
        missing = [grids.TABLES[name][0].partition(":")[0] for name in found if name not in shown]
        about = f"{Path(facts['model']).name}, `--preset {preset}`"
        if shown:
            text += [f"### {about}\n", prose(facts_of([found[name] for name in shown]) + ".")]
        text += [section(name, found[name], folder_of(preset) / f"{name}.json") for name in shown]
        text += [prose(f"Not run on {about}: {'; '.join(missing)}.")] if missing else []
    return "\n".join(text)


def glue(old=None):
    """A line per task: the command, the length of the run, the paper's score and ours."""
    paper = json.loads((ROOT / "experiments" / "paper.json").read_text(encoding="utf-8"))["table1"]["rows"]
    table = read(folder_of("paper") / "table1.json") or {"table": {"rows": []}}
    ours = {row["row"]: row["tasks"] for row in table["table"]["rows"]}.get("lora2-k1", {})
    lines = []
    for task in tables.COLUMNS:
        preset = options.PRESETS[task]
        printed = "/".join(f"{x:.2f}" for x in paper["lora2-k1"]["scores"][task])
        mine = "/".join(number(part, 2) for part in ours.get(task, {"last": [None]})["last"])
        lines.append([f"`train.py --task {task} --k 1`", f"{preset['T']:,}", str(preset["max_len"]),
                      MEASURES.get(task, "accuracy"), printed, mine])
    head = ["DeBERTaV3-base", "steps", "tokens", "score", "paper", "here"]
    took = []
    for preset in grids.PRESETS:
        content = read(folder_of(preset) / "table1.json") or {"runs": 0}
        peak = content.get("peak_memory_gb")
        memory = f"at most {peak} GB of memory" if peak else "memory not measured"
        took.append(f"{content['runs']} runs in {content['hours']} hours, {memory}, {facts_of([content])}"
                    if content["runs"] else "not run")
    return tables.markdown(head, lines) + "\n" + prose(
        f"All of Table 1, `reproduce.py table1`: {took[0]}. With `--preset small`, on a laptop: {took[1]}.")


def performance(old=None):
    """What bench.py measured: the first table of its Markdown file, or else the rows in its JSON file."""
    text, found = [], sorted(RESULTS.glob("bench*.json"))
    for path in found:
        content, beside = read(path), path.with_suffix(".md")
        where = from_root(beside if beside.exists() else path)
        if beside.exists():
            lines = beside.read_text(encoding="utf-8").splitlines()
            written = "".join(f"{line}\n" for line in lines if line.startswith("|"))
            # The table as it is, or without ranges, if that fits.
            candidates = [written, re.sub(r" \([^|)]*\) \|", " |", written)] if written else []
        else:
            candidates = bench_tables(content)
        text.append(fitting(candidates))
        text.append(prose(f"{facts_of([content])} In full: [{Path(where).name}]({where}).".strip()))
    missing = [name for name, word in (("a CPU", "cpu"), ("a GPU", "cuda"))
               if not any(word in path.name for path in found)]
    text += [f"Not run on {' nor on '.join(missing)}.\n"] if missing else []
    return "\n".join(text)


def bench_tables(content):
    """The rows of a bench's JSON file as Markdown, then with ever fewer columns."""
    rows = []
    for value in content.values():
        if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
            value = [{"row": name} | row for name, row in value.items()]
        if not rows and isinstance(value, list) and all(isinstance(row, dict) for row in value):
            rows = value
    names = [name for row in rows[:1] for name in row
             if not any(isinstance(row.get(name), (dict, list)) for row in rows)]
    plain = lambda x: f"{x:.4g}" if isinstance(x, float) else "–" if x is None else str(x)
    for n in range(len(names), 1, -1):
        yield tables.markdown(names[:n], [[plain(row.get(name)) for name in names[:n]] for row in rows])


BLOCKS = (files, cost, glue, results, performance)


def update(text):
    """README.md with everything that follows from other files as it should be."""
    for make in BLOCKS:
        name = make.__name__
        pattern = re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md: there is no <!-- {name} --> ... <!-- /{name} -->, or several")
        text = pattern.sub(lambda match: f"{match[1]}{make(match[2]).strip()}\n{match[3]}", text)
    return LINK.sub(link, text)


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if README.md is stale")
    args, path = parser.parse_args(argv), ROOT / "README.md"
    try:
        before = path.read_text(encoding="utf-8")
        after = update(before)
        if args.check:
            print("README.md is stale: python experiments/readme.py" if before != after else "up to date")
            return int(before != after)
        disk.write_file(path, after)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
