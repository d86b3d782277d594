"""From what TABLE.json holds to Markdown: each page has the tables that its name needs.

`content` is that of TABLE.json (summary.py). Reads no file.
"""
import math
import statistics

from experiments import search, tables

WHICH = {"last": "after the last step", "best": "at the best evaluation"}
SPREAD = ("Mean ± standard deviation over the seeds; (n = ...) where it is of another number of "
          "values. ≈: a difference, of a ratio that from 1, not larger than its own spread over "
          "the seeds.")
LEGEND = ("The best evaluation is chosen on the dev set itself. An average is over tasks, seed by "
          "seed; MNLI and QQP count as the mean of their columns.")


# --- numbers as text -------------------------------------------------------------------------

def markdown(head, rows):
    """A Markdown table; cells are text."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def show(part, seeds, digits=2, sign=""):
    """A summary as text."""
    if part is None:
        return "not run"
    text = f"{part['mean']:{sign}.{digits}f}"
    if part["std"] is not None:
        text += f"±{part['std']:.{digits}f}"
    return with_count(text, part, seeds)


def with_count(text, part, seeds):
    """A text with the number of a summary's values if that is not `seeds`, and a real minus."""
    if part["n"] != seeds:
        text += f" (n = {part['n']})"
    return text.replace("-", "−")


def show_change(part, seeds, digits=2, sign="", to=0):
    """The same, after ≈ if it is not further from a number than its own spread."""
    mark = "≈" if tables.near(part, to) else ""
    return mark + show(part, seeds, digits, sign)


def show_interval(part, seeds):
    """A summary's mean and its 95 % interval as text, after ≈ if that holds 0."""
    if part is None:
        return "not run"
    text, half = f"{part['mean']:+.2f}", tables.half_of(part)
    if half is not None:
        low, high = part["mean"] - half, part["mean"] + half
        text = f"{'≈' if low <= 0 <= high else ''}{text} [{low:+.2f}, {high:+.2f}]"
    return with_count(text, part, seeds)


def span(values):
    """Counts, which may differ between tasks, as text: "1,560–1,640"; "–" for none."""
    values = sorted(value for value in set(values) if value is not None)
    ends = dict.fromkeys(values[:1] + values[-1:])
    return "–".join(f"{value:,}" for value in ends) or "–"


# --- tables ----------------------------------------------------------------------------------

def layout(content):
    """(tasks in the order of the paper's columns, their names, number of seeds) of a table."""
    tasks = [task for task in tables.COLUMNS if task in content["tasks"]]
    return tasks, [tables.COLUMNS[task][0] for task in tasks], len(content["seeds"])


def table_of(content, title, cell, **last):
    """A line for each row, of cell(row, task) for each task. last: {name: function of a row}."""
    tasks, names, _ = layout(content)
    lines = []
    for row, label in content["rows"].items():
        line = [label, *(cell(row, task) for task in tasks)]
        lines.append([*line, *(column(row) for column in last.values())])
    return markdown([title, *names, *last], lines)


def score_table(content, which="last"):
    """The scores of all rows on all tasks."""
    seeds = len(content["seeds"])

    def cell(row, task):
        return "/".join(show(part, seeds) for part in tables.score_of(content, row, task, which))

    def average_cell(row):
        return show(tables.average_of(content, row, which), seeds)

    return table_of(content, WHICH[which], cell, average=average_cell)


def pairs_of(content):
    """[(label, row a, row b)] of the pairs whose rows are both shown."""
    found = []
    for a, b in content["pairs"]:
        if {a, b} <= content["rows"].keys():
            found.append((f"{content['rows'][a]} − {content['rows'][b]}", a, b))
    return found


def difference_table(content, which="last"):
    """Pairs of rows, seed by seed."""
    tasks, names, seeds = layout(content)
    lines = []
    for label, a, b in pairs_of(content):
        parts = [tables.difference(content, a, b, task, which) for task in tasks]
        lines.append([label, *(show_change(part, seeds, sign="+") for part in parts)])
    return markdown([f"difference {WHICH[which]}", *names], lines)


def interval_table(content):
    """The same with an interval; the last column is of the mean over tasks."""
    tasks, names, seeds = layout(content)
    lines = []
    for label, a, b in pairs_of(content):
        by_task = [tables.differences(content, a, b, task) for task in tasks]
        of_all = []
        for seed in set.intersection(*map(set, by_task)):
            of_all.append(statistics.mean(found[seed] for found in by_task))
        columns = [list(found.values()) for found in by_task] + [of_all]
        shown = [show_interval(tables.summary(values), seeds) for values in columns]
        lines.append([label, *shown])
    return markdown(["difference, its 95 % interval", *names, "average"], lines)


def worst_table(content):
    """The worst seed of each row: whether it is steady."""
    def cell(row, task):
        runs = tables.runs_of(content, row, task)
        scores = [tables.mean_of(tables.score(run, "last", task)) for run in runs]
        return f"{min(scores):.2f}".replace("-", "−") if scores else "not run"

    return table_of(content, "the worst seed", cell)


def choice_table(content):
    """What a search chose for each row, on how many points, of which so many diverged."""
    def cell(row, task):
        points = search.tried(content, row, task)
        chosen = search.best(points)
        if chosen is None:
            return "–"
        lost = sum(score == -math.inf for _, score in points)
        text = f"{search.point_text(chosen)} (of {len(points)}"
        text += f", {lost} diverged)" if lost else ")"
        return text if search.is_inside(points) else f"{text} unfinished"

    return table_of(content, "learning rate, scale (of how many)", cell)


def tuning_table(content):
    """Of each row the learning rate and scale with the best score, the first of equals."""
    def cell(row, task):
        runs = tables.runs_of(content, row, task)
        if not runs:
            return "not run"
        best = max(runs, key=tables.final_score)
        settings, score = best["settings"], 100 * tables.final_score(best)
        scale = f", {settings['alpha'] / settings['r']:g}" if "alpha" in settings else ""
        return f"{settings['lr']:g}{scale} ({score:.2f}, of {len(runs)})"

    return table_of(content, "learning rate, scale (score, of how many runs)", cell)


def parameter_table(content):
    """How many parameters a row trains, how many survive its pruning, and what the paper says."""
    lines = []
    for row, label in content["rows"].items():
        runs = [run for run in content["runs"] if run["row"] == row]
        paper = content.get("paper", {}).get(row, {})
        trained = span(run["adapter_parameters"] for run in runs)
        surviving = span(run["surviving_parameters"] for run in runs)
        lines.append([label, trained, surviving, paper.get("parameters", "–")])
    return markdown(["parameters", "trained", "surviving", "the paper's"], lines)


def paper_table(content):
    """The scores that the paper reports of the same rows and tasks."""
    tasks, names, _ = layout(content)
    lines = []
    for row, paper in content["paper"].items():
        scores = {task: paper["scores"].get(task, [None]) for task in tasks}
        line = [content["rows"][row]]
        for task in tasks:
            line.append("/".join("–" if x is None else f"{x:.2f}" for x in scores[task]))
        unknown = any(None in columns for columns in scores.values())
        lines.append([*line, "–" if unknown else f"{tables.average(scores):.2f}"])
    if not lines:
        return "The paper reports nothing of these rows.\n"
    return markdown(["the paper", *names, "average"], lines)


def overlap_table(content):
    """How alike the selections by Eq. 8 and Eq. 9 are."""
    tasks, names, seeds = layout(content)
    found = {task: tables.overlap(content, task) for task in tasks}
    lines = []
    for measure in found[tasks[0]]:
        parts = [tables.summary(found[task][measure]) for task in tasks]
        lines.append([measure, *(show(part, seeds, 1) for part in parts)])
    return markdown(["%", *names], lines)


def ratio_table(content):
    """Times of a step over those of the first row, ours and the paper's."""
    tasks, names, seeds = layout(content)
    base, *others = content["rows"]
    lines = []
    for task, name in zip(tasks, names):
        parts = [tables.time_ratio(content, row, base, task) for row in others]
        paper = content["paper"].get(task)
        lines.append([name, *(show_change(part, seeds, 3, to=1) for part in parts),
                      f"{paper[1] / paper[0]:.3f}" if paper else "–"])
    labels = list(content["rows"].values())
    return markdown([f"time of a step over {labels[0]}'s", *labels[1:], "the paper's"], lines)


def speed_table(content):
    """Tokens per second; of the paper's rows seconds per step."""
    tasks, names, seeds = layout(content)
    lines = []
    for task, name in zip(tasks, names):
        line = [name]
        for row in content["rows"]:
            runs = tables.by_seed(content, row, task).values()
            line.append(show(tables.summary(run["tokens_per_second"] for run in runs), seeds, 0))
        paper = content["paper"].get(task)
        lines.append([*line, f"{paper[0]:.2f} → {paper[1]:.2f}" if paper else "–"])
    labels = content["rows"].values()
    return markdown(["tokens per second", *labels, "the paper's seconds"], lines)


def kept_tables(content):
    """Figure 3 as numbers: a title and a table for each panel."""
    texts = []
    for title, runs in tables.panels(content):
        if not runs:
            texts.append(f"{title}: not run\n")
            continue
        texts.append(f"{title}: kept of {runs[0]['settings']['r']}, mean of {len(runs)} runs\n")
        lines = []
        for short, layers in tables.mean_ranks(runs).items():
            lines.append([tables.MATRICES[short], *(f"{count:.3g}" for count in layers)])
        texts.append(markdown(["layer", *map(str, range(len(layers)))], lines))
    return texts


# --- pages -----------------------------------------------------------------------------------

def study_parts(content, reported):
    """The tables of a study of the rows that have begun, and which have not."""
    search.check_choices(content)
    begun = {run["row"] for run in content["runs"]}
    rows = {row: label for row, label in content["rows"].items() if row in begun}
    waiting = [label for row, label in content["rows"].items() if row not in begun]
    reported = reported | {"rows": rows}
    parts = [score_table(reported), interval_table(reported), worst_table(reported),
             choice_table(content | {"rows": rows}), parameter_table(reported)]
    if waiting:
        parts.append(f"Not run: {'; '.join(waiting)}.\n")
    return parts


def parts_of(content, shown):
    """(the tables that docs/results.md shows, the others with their headings) of a page.

    shown: content with the runs that did not diverge and are not of a search alone.
    """
    if content["name"] == "tune":
        return [tuning_table(shown)], []
    if content["name"] == "table2":
        return [ratio_table(shown), speed_table(shown)], []
    if content["name"] == "study":
        return study_parts(content, shown), []
    if content["name"] == "figure3":
        picture = "![kept singular values, layer by layer](figure3.svg)\n"
        return [picture] if shown["runs"] else [], ["## In numbers\n", *kept_tables(shown)]
    parts = [score_table(shown), difference_table(shown), parameter_table(shown)]
    if content["name"] == "overlap" and len(content["rows"]) == 2:
        parts.append(overlap_table(shown))
    best = [score_table(shown, "best"), difference_table(shown, "best")]
    return parts, ["## At the best evaluation\n", *best,
                   "## What the paper reports\n", paper_table(shown)]


def facts_of(runs):
    """What runs took, and on what, with what and when they were made, as text."""
    hours = round(sum(run["seconds"] for run in runs) / 3600, 2)
    peak = max((run["peak_memory_gb"] or 0 for run in runs), default=0)    # few runs tell
    memory = f", at most {peak} GB" if peak else ""
    facts = [f"{len(runs)} runs, {hours} hours{memory}"]
    for name in ("seed", "device", "dtype", "threads", "torch", "python", "date"):
        values = sorted({str(run[name]) for run in runs})
        facts.append(f"{name} {', '.join(values) or '–'}")
    return "; ".join(facts) + "."


def page(content):
    """TABLE.md, from what TABLE.json holds. ValueError for runs that fit no one table."""
    done, lost = [], []
    for run in content["runs"]:
        is_reported = run.get("part") == "reported" or content["name"] != "study"
        if "failed" not in run:
            done.append(run)
        elif is_reported:
            lost.append(tables.name_of(run))
    tables.check_sources(done)
    reported = done
    if content["name"] == "study":
        reported = [run for run in done if run["part"] == "reported"]
    parts, others = parts_of(content, content | {"runs": reported})
    if lost:
        parts.append(f"Diverged, and in no mean: {', '.join(lost)}.\n")
    legend = [SPREAD, LEGEND]
    if content["name"] == "table2":
        legend = [SPREAD]
    if content["name"] in ("tune", "figure3", "study"):
        legend = []
    notes = [*legend, *content["notes"], f"`{content['command']}`"]
    return "\n".join([f"# {content['title']} ({content['model']})\n", *parts,
                      f"{facts_of(done)}\n", *others,
                      "## How it was made\n", "".join(f"- {note}\n" for note in notes)])
