"""From the file of why.py to Markdown and a figure: scores, differences, what was seen in the runs.

`content` is what the JSON file holds, with what experiments/why.json says.
"""
import statistics
from pathlib import Path

from experiments import plot, study_page, summary, tables

RESULTS = Path(__file__).resolve().parent / "results"
FIGURE = Path(__file__).resolve().parents[1] / "docs" / "why"
STEPS = (1, 42, 84, 126, 168, 252)                         # those that the tables show
# What is looked at: its label, digits, and what it is multiplied by.
SEEN = {"size": ("size of ΔW over that of W0, %, mean over the matrices", 2, 100),
        "to the last": ("cosine of ΔW to the last ΔW", 2, 1),
        "turned A": ("A turned by, degrees", 1, 1),
        "turned v": ("v turned by, degrees", 1, 1), "turned V": ("V turned by, degrees", 1, 1),
        "kept": ("kept singular values", 0, 1), "returned": ("taken back so far", 0, 1),
        "emptied": ("matrices that keep nothing", 1, 1),
        "of-task": ("kept too by the task's gradient alone, %", 1, 100),
        "by-mean": ("kept too by Ī alone, %", 1, 100)}


# --- the paper's claims ----------------------------------------------------------------------

def measured(content, kind, *rows):
    """{task: interval} of what is above 0 where the claim holds, a number for each seed."""
    runs = [run for run in study_page.finished(content) if run.get("part") != "tune"]
    found = {}
    for task in content["tasks"]:
        if kind == "layers":
            values = map(lower_less_upper, tables.runs_of(content, rows[0], task))
        elif kind == "times":
            values = [theirs["tokens_per_second"] / ours["tokens_per_second"] - 1
                      for ours, theirs in tables.in_both(content, *rows, task)]
        else:
            values = tables.differences(content | {"runs": runs}, *rows, task).values()
        part = study_page.interval(list(values))
        if part is not None:
            found[task] = part
    return found


def lower_less_upper(run):
    """Singular values that a matrix of the lower half of the layers keeps more than one above."""
    layers = [statistics.mean(layer) for layer in zip(*run["ranks"].values())]
    half = len(layers) // 2
    return statistics.mean(layers[:half]) - statistics.mean(layers[half:])


def verdict(parts):
    """Of intervals of several tasks: whether they are above 0 where they do not hold it."""
    above = any(part["mean"] - part["half"] > 0 for part in parts)
    below = any(part["mean"] + part["half"] < 0 for part in parts)
    if above == below:
        return "inconclusive here"
    return "supported" if above else "not supported"


def claims_table(content):
    """The claims of the paper, a line each: the verdict, what it rests on, command and file."""
    lines = []
    for claim, found, command, name in content["claims"]:
        shown = []
        if isinstance(found, list):
            parts = measured(summary.load(RESULTS / name), *found)
            found = verdict(parts.values())
            for task, part in parts.items():
                text = study_page.show_interval(part, part["n"])
                shown.append(f"{tables.COLUMNS[task][0]} {text}")
            name = f"[{Path(name).name}]({name})"
        lines.append([claim, found, ", ".join(shown) or "–", f"`{command}`", name])
    return tables.markdown(["the paper says", "verdict", "95 % intervals", "command", "file"], lines)


# --- what was seen ---------------------------------------------------------------------------

def films(content, row, task):
    """What was seen in a row's runs on a task."""
    return [run["film"] for run in tables.runs_of(content, row, task)]


def film_table(content, row, task):
    """A line for each quantity, mean ± standard deviation over the seeds."""
    seen, lines = films(content, row, task), []
    for name, (label, digits, times) in SEEN.items():
        if name in seen[0]:
            line = [label]
            for t in STEPS:
                values = [times * film[name][film["t"].index(t)] for film in seen]
                line.append(tables.show(tables.summary(values), len(seen), digits))
            lines.append(line)
    title = f"{content['rows'][row]}, {tables.COLUMNS[task][0]}, after step"
    return tables.markdown([title, *map(str, STEPS)], lines)


def cosine_table(content, task):
    """Cosines between the last ΔW of two runs with one seed, and of two with different seeds."""
    found = {}
    for run in content["runs"]:
        for name, value in run["cosines"].items():
            row, where, seed = name.split(".")
            if where == task and {row, run["row"]} <= set(content["alike"]):
                pair = tuple(sorted((row, run["row"])))
                found.setdefault(pair, {}).setdefault(int(seed) == run["seed"], []).append(value)
    lines = []
    for (a, b), values in found.items():
        line = [f"{content['rows'][a]} and {content['rows'][b]}"]
        for is_same in (True, False):
            part = tables.summary(values.get(is_same, []))
            line.append(tables.show(part, 0) if part else "–")
        lines.append(line)
    title = f"cosine of the last ΔW, {tables.COLUMNS[task][0]}"
    return tables.markdown([title, "of one seed", "of two seeds"], lines)


def draw(content, task):
    """docs/why.svg: the size and direction of ΔW over training, and what pruners agree on."""
    figure, (size, direction, shared) = plot.new_figure(3, 2.2)
    for i, row in enumerate(content["alike"]):
        label = content["rows"].get(row)
        for film in films(content, row, task):
            size.plot(film["t"], [100 * value for value in film["size"]], f"C{i}", label=label)
            direction.plot(film["t"], film["to the last"], f"C{i}")
            label = None                                   # in the legend once
    for i, film in enumerate(films(content, "unpruned", task)):
        chance = [kept / film["kept"][0] for kept in film["kept"]]
        lines = {"the task's gradient alone": film["of-task"], "Ī alone": film["by-mean"],
                 "chance": chance}
        for (label, values), style in zip(lines.items(), ("C3", "C4", "0.6")):
            shared.plot(film["t"], values, style, label=None if i else label)
    size.set_ylabel("|ΔW| / |W0|, %")
    direction.set_ylabel("cosine to the last ΔW")
    shared.set_ylabel("share kept by both")
    shared.set_xlabel("optimizer step")
    for axes in (size, direction, shared):
        axes.grid(alpha=0.3)
    size.legend(fontsize=8)
    shared.legend(fontsize=8)
    plot.save(figure, FIGURE, [".svg"])


def page(content):
    """The Markdown of the file; it draws the figure too."""
    runs = study_page.finished(content)
    reported = content | {"runs": [run for run in runs if run["part"] == "reported"]}
    begun = {run["row"] for run in reported["runs"]}
    reported["rows"] = {row: told[0] for row, told in content["rows"].items() if row in begun}
    task = content["tasks"][0]
    draw(reported, task)
    parts = [claims_table(content), "## Runs that look inside\n", tables.score_table(reported),
             study_page.difference_table(reported), cosine_table(reported, task)]
    for row in content["alike"]:
        if row in begun:
            parts.append(film_table(reported, row, task))
    searched = {row: label for row, label in reported["rows"].items() if row in content["starts"]}
    parts.append(study_page.choice_table(reported | {"rows": searched}, content))
    lost = [tables.name_of(run) for run in study_page.diverged(content, "reported")]
    if lost:
        parts.append(f"Diverged, and in no mean: {', '.join(lost)}.\n")
    hours = sum(run["seconds"] for run in runs) / 3600
    kinds = ("device", "dtype", "torch")
    facts = [f"{name} {', '.join(sorted({run[name] for run in runs}))}" for name in kinds]
    parts.append(f"{len(content['runs'])} runs, {hours:.2f} hours; {'; '.join(facts)}.\n")
    return tables.page_of(content, parts)
