"""From the file of why.py to Markdown and a figure: scores, differences, what was seen in the runs.

`content` is what the JSON file holds, with what experiments/why.json says.
"""
from pathlib import Path

from experiments import pages, plot, tables

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "why"
STEPS = (1, 42, 84, 126, 168, 252)                         # those that the tables show
# What is looked at: its label, digits, and what it is multiplied by.
SEEN = {"size": ("size of ΔW over that of W0, %, mean over the matrices", 2, 100),
        "to the last": ("cosine of ΔW to the last ΔW", 2, 1),
        "turned A": ("A turned by, degrees", 1, 1),
        "turned v": ("v turned by, degrees", 1, 1), "turned V": ("V turned by, degrees", 1, 1),
        "lam": ("the largest Λ of a matrix, without sign", 3, 1),
        "kept": ("kept singular values", 0, 1), "returned": ("taken back so far", 0, 1),
        "emptied": ("matrices that keep nothing", 1, 1),
        "of-task": ("kept too by the task's gradient alone, %", 1, 100),
        "by-mean": ("kept too by Ī alone, %", 1, 100)}


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
                line.append(pages.show(tables.summary(values), len(seen), digits))
            lines.append(line)
    title = f"{content['rows'][row]}, {tables.COLUMNS[task][0]}, after step"
    return pages.markdown([title, *map(str, STEPS)], lines)


def cosine_table(content, task):
    """Cosines between the last ΔW of two runs with one seed, and of two with different seeds."""
    found = {}
    for run in content["runs"]:
        for name, value in run.get("cosines", {}).items():
            row, where, seed = name.split(".")
            if where == task and {row, run["row"]} <= set(content["alike"]):
                pair = tuple(sorted((row, run["row"])))
                found.setdefault(pair, {}).setdefault(int(seed) == run["seed"], []).append(value)
    lines = []
    for (a, b), values in found.items():
        line = [f"{content['rows'][a]} and {content['rows'][b]}"]
        for is_same in (True, False):
            part = tables.summary(values.get(is_same, []))
            line.append(pages.show(part, 0) if part else "–")
        lines.append(line)
    title = f"cosine of the last ΔW, {tables.COLUMNS[task][0]}"
    return pages.markdown([title, "of one seed", "of two seeds"], lines)


def draw(content):
    """docs/why.svg: the size and direction of ΔW over training, and what pruners agree on."""
    content, task = reported(content), content["tasks"][0]
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
        for (label, values), style in zip(lines.items(), ("C8", "C9", "0.6")):
            shared.plot(film["t"], values, style, label=None if i else label)
    size.set_ylabel("|ΔW| / |W0|, %")
    direction.set_ylabel("cosine to the last ΔW")
    shared.set_ylabel("share kept by both")
    shared.set_xlabel("optimizer step")
    for axes in (size, direction, shared):
        axes.grid(alpha=0.3)
    for axes in (size, shared):
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    plot.save(figure, FIGURE, [".svg"])


def reported(content):
    """The content without the runs of a search, those that diverged, and the rows without a run."""
    ended = [run for run in content["runs"] if run["part"] == "reported"]
    runs = [run for run in ended if "failed" not in run]
    there = {run["row"] for run in runs}
    rows = {row: label for row, (label, *_) in content["rows"].items() if row in there}
    return content | {"runs": runs, "rows": rows, "seeds": tables.usual_count(ended)}


def page(content):
    """The Markdown of the file."""
    done, task = reported(content), content["tasks"][0]
    done["rows"] = {row: label for row, label in done["rows"].items()
                    if row not in content["only_fair"]}
    parts = [pages.score_table(done), pages.interval_table(done),
             "## What was seen\n", cosine_table(done, task)]
    for row in content["alike"]:
        if row in done["rows"]:
            parts.append(film_table(done, row, task))
    searched = {row: label for row, label in done["rows"].items() if row in content["starts"]}
    parts.append(pages.choice_table(content | {"rows": searched}))
    parts += pages.lost_of(content["runs"])
    parts.append(pages.facts_of(content["runs"], ("device", "dtype", "torch")))
    return pages.whole(content, parts, [])


def fair_page(content):
    """The Markdown of the rows whose learning rate and scale were searched for."""
    done = reported(content)
    done["rows"] = {row: label for row, label in content["fair"].items() if row in done["rows"]}
    runs = [run for run in content["runs"] if run["row"] in done["rows"]]
    parts = [pages.score_table(done), pages.interval_table(done), pages.worst_table(done),
             pages.choice_table(content | {"rows": done["rows"]}), *pages.lost_of(runs),
             pages.facts_of(runs, ("device", "dtype", "torch"))]
    return pages.whole(content | {"title": "A fair comparison, on a CPU",
                                  "notes": content["fair_notes"]}, parts, pages.LEGEND)
