"""The parts of README.md that follow from other files: line numbers, costs, results.

    python experiments/readme.py                               # rewrite them
    python experiments/readme.py --check                       # only say whether that would change anything

    `code` [lora2.py:1](lora2.py#L1)        the number becomes that of the one line that holds `code`
    <!-- cost --> ... <!-- /cost -->        what is between becomes what the function of that name returns

Costs are counted on the code itself. Scores and times come from files that reproduce.py and bench.py wrote below
experiments/results, and from nowhere else; what has no file is "not run".
"""
import argparse
import json
import os
import re
import sys
import textwrap
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import grid as grids
from methods import baselines
from formats import disk
from running import options
from experiments import tables
from lora2 import LoRA2Linear, RankPruner

ROOT, RESULTS, WIDTH = grids.ROOT, grids.ROOT / "experiments" / "results", 100
LINK = re.compile(r"`([^`\n]+)`(\s+)\[([\w./]+):\d+\]\(\3#L\d+\)")
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
    std = " (1 run)" if part["std"] is None else std       # whether that is much nobody can say
    return f"{part['mean']:{sign}.{digits}f}{std}".replace("-", "−")


def in_order(tasks):
    """Tasks in the order of the paper's columns, which JSON files do not keep."""
    return [task for task in tables.COLUMNS if task in tasks]


def fitting(candidates):
    """The first of several Markdown tables that is not too wide; without one a line that says so."""
    fits = (text for text in candidates if max(map(len, text.splitlines())) <= WIDTH)
    return next(fits, "The table is too wide for this page.\n")


def run_of(rows):
    """The tasks of a table of scores of which there are runs."""
    return in_order([task for task in rows[0]["tasks"] if any(row["tasks"][task]["last"][0] for row in rows)])


def score_tables(rows):
    """A table of scores as Markdown, after the last step: in full, then ever narrower."""
    tasks, averages = run_of(rows), ["average"] * any(row["average"]["last"] for row in rows)
    for spread, counted in ((True, True), (True, False), (False, True), (False, False)):
        head = ["after the last step", *["trained"] * counted, *(tables.COLUMNS[task][0] for task in tasks)]
        lines = []
        for row in rows:
            numbers = tables.span(n for cell in row["tasks"].values() for n in cell["adapter_parameters"])
            cells = ["/".join(number(part, 1, spread) for part in row["tasks"][task]["last"])
                     for task in tasks]
            lines.append([row["label"].replace(" init", ""), *[numbers] * counted, *cells,
                          *(number(row["average"]["last"], 1, spread) for _ in averages)])
        yield tables.markdown(head + averages, lines)


def difference_tables(pairs, tasks):
    """Pairs of rows, as Markdown: seed by seed, so that ≈ marks what is not larger than its own spread."""
    for spread in (True, False):
        lines = []
        for pair in pairs:
            parts = [pair[task]["last"] for task in tasks]
            lines.append([pair["difference"].replace(" init", ""),
                          *("≈" * tables.near(part) + number(part, 1, spread, "+") for part in parts)])
        yield tables.markdown(["difference", *(tables.COLUMNS[task][0] for task in tasks)], lines)


def time_table(table):
    """Ratios of times per step, as Markdown."""
    tasks = in_order(table)
    rows = list(table[tasks[0]]["time_ratio"])
    shown = lambda ratio: "≈" * tables.near(ratio, 1) + number(ratio, 3)
    lines = [[tables.COLUMNS[task][0], *(shown(table[task]["time_ratio"][row]) for row in rows),
              f"{table[task]['paper'][1] / table[task]['paper'][0]:.3f}" if table[task]["paper"] else "–"]
             for task in tasks]
    return tables.markdown(["time of a step over AdaLoRA's", *(grids.row_of(row)[0] for row in rows),
                            "the paper's"], lines)


def overlap_table(table):
    """How alike the selections by Eq. 8 and Eq. 9 are, as Markdown."""
    tasks = in_order(table[0])
    return tables.markdown(["%", *(tables.COLUMNS[task][0] for task in tasks)],
                           [[line["measure"], *(number(line[task], 1) for task in tasks)] for line in table])


def prose(text):
    """A paragraph, broken into lines."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def facts_of(contents):
    """Where numbers come from: the entries of result files that are not their tables, in a line."""
    listed = lambda value: value if isinstance(value, list) else [value]
    facts = {name: sorted({str(item) for content in contents for item in listed(content.get(name, []))})
             for name in ("device", "dtype", "threads", "torch", "python", "date")}
    return "; ".join(f"{name} {', '.join(values)}" for name, values in facts.items() if values)


def named(some):
    """Tasks as text."""
    return ", ".join(tables.COLUMNS[task][0] for task in in_order(some))


def tuning_table(rows, preset, tasks):
    """The learning rate and the scale that each row of Table 1 has, as Markdown; "" if nothing was tuned."""
    path = folder_of(preset) / "tune.json"
    if not path.exists():
        return ""
    tuned, listed = read(path)["table"], lambda values: ", ".join(f"{value:g}" for value in values)
    source = {task: grids.tuned_on(grids.PRESETS[preset], task) for task in tasks}
    tasks = [task for task in tasks if source[task] == task]
    lines = [[row["label"].replace(" init", ""),
              *(listed(tuned[row["row"]][task]["chosen"].values()) for task in tasks)] for row in rows]
    tried = lambda name: listed(sorted({one[name] for row in tuned if row != "full" for task in tasks
                                        for one in tuned[row][task]["tried"] if name in one}))
    shared = "".join(f"{named([task])} has what was chosen on {named([other])}. "
                     for task, other in source.items() if task != other)
    base = grids.row_of(grids.PRESETS[preset]["base"])[0]
    about = (f"The best of learning rates {tried('lr')} (full fine-tuning: a tenth) and scales "
             f"{tried('scale')}. {shared}All scores: [tune.json]({from_root(path)}). From Table 3 on, every "
             f"row uses what was chosen for {base}; the variants were not tuned separately.")
    return f"{tables.markdown(['learning rate, scale', *map(named, zip(tasks))], lines)}\n{prose(about)}\n"


def about_table1(rows):
    """Sentences on Table 1: what is not run, what LoRA² keeps."""
    done = run_of(rows)
    missing = [task for task in rows[0]["tasks"] if task not in done]
    text = [f"Not run: {named(missing)}."] if missing else []
    kept = [(task, cell["settings"]) for row in rows if row["row"] == "lora2-k1"
            for task, cell in row["tasks"].items() if cell["settings"]["r"]]
    text += ["LoRA² k=1 keeps " + ", ".join(
        f"{'/'.join(settings['target_rank'])} of {'/'.join(settings['r'])} on {named([task])}"
        for task, settings in kept) + " of a matrix's singular values."] if kept else []
    return prose(" ".join(text)) if text else ""


def section(name, content, preset):
    """One table of reproduce.py, in short: Table 1's scores, of the others the differences."""
    table, path = content["table"], folder_of(preset) / f"{name}.md"
    title = f"**{grids.TABLES[name][0]}** ({content['runs']} runs, in full: [{name}.md]({from_root(path)}))"
    text = prose(title) + "\n"
    if name == "table2":
        return text + time_table(table)
    if name == "figure3":
        return text + f"![kept singular values, layer by layer]({from_root(path.with_suffix('.png'))})\n"
    tasks, rows = run_of(table["rows"]), table["rows"]
    if name == "table1":
        text += f"{fitting(score_tables(rows))}\n{about_table1(rows)}\n{tuning_table(rows, preset, tasks)}"
    text += fitting(difference_tables(table["differences"], tasks))
    return text + ("\n" + overlap_table(table["overlap"]) if name == "overlap" else "")


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
        text += [section(name, found[name], preset) for name in shown]
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
    head = ["DeBERTaV3-base", "steps", "most tokens", "score", "paper", "here"]
    took = []
    for preset in grids.PRESETS:
        content = read(folder_of(preset) / "table1.json") or {"runs": 0}
        tuned = read(folder_of(preset) / "tune.json") or {"runs": 0, "hours": 0}
        peak = max(one.get("peak_memory_gb") or 0 for one in (content, tuned))
        memory = f"at most {peak} GB of memory where it was measured" if peak else "memory not measured"
        more = f" after {tuned['runs']} in {tuned['hours']} to choose rates and scales" * bool(tuned["runs"])
        took.append(f"{content['runs']} runs in {content['hours']} hours{more}, {memory}, "
                    f"{facts_of([content])}" if content["runs"] else "not run")
    return tables.markdown(head, lines) + "\n" + prose(
        f"Table 1, `reproduce.py table1`: {took[0]}. With `--preset small`: {took[1]}.")


def performance(old=None):
    """What bench.py measured: the first table of its Markdown files, without ranges where it is too wide.

    Of another shape than DeBERTaV3-base, for which the goals are, and of another machine there is a link.
    """
    text, found = [], [path for path in (RESULTS / f"bench-{device}.json" for device in ("cpu", "cuda"))
                       if path.exists()]
    for path in found:
        content, beside = read(path), path.with_suffix(".md")
        if not beside.exists():
            raise ValueError(f"{beside} is missing: measure again")
        first = beside.read_text(encoding="utf-8").partition("\n## ")[0]
        table = "".join(f"{line}\n" for line in first.splitlines() if line.startswith("|"))
        text.append(fitting([table, re.sub(r" \([^|)]*\) \|", " |", table)]))
        text.append(prose(f"{facts_of([content])}. In full: [{beside.name}]({from_root(beside)})."))
    others = [f"[{path.stem}]({from_root(path)})" for path in sorted(RESULTS.glob("bench-*-*.md"))
              if not path.stem.endswith("quick")]
    text += [prose(f"Of other shapes and machines: {', '.join(others)}.")] if others else []
    missing = [name for name, word in (("a CPU", "cpu"), ("a GPU", "cuda"))
               if not any(word in path.name for path in found)]
    text += [f"Not run on {' nor on '.join(missing)}.\n"] if missing else []
    return "\n".join(text)


BLOCKS = (cost, glue, results, performance)


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
