"""From records to Markdown: each page has the tables that its name needs.

`content` is what reproduce.py gives, and "seeds", how many most cells have. Reads no file.
"""
import math

from experiments import search, tables

WHICH = {"last": "after the last step", "best": "at the best evaluation",
         "time": "seconds of a step"}
DIGITS = {"last": 2, "best": 2, "time": 3}                 # behind the point
AVERAGE = {"average": "average"}                           # a column
LEGEND = ("Mean ± standard deviation over the seeds; (n = ...) where they are more or fewer than "
          "in most cells. An average is over tasks, seed by seed; MNLI and QQP count as the mean "
          "of their columns.",
          "Differences are paired by seed. The interval is Student's, of 95 %: ≈ marks one that "
          "holds 0. Of 20 such intervals of equal methods one lacks the mark by chance.")


# --- numbers as text -------------------------------------------------------------------------

def markdown(head, rows):
    """A Markdown table; cells are text."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def show(part, seeds, digits=2):
    """A summary as text."""
    if part is None:
        return "not run"
    text = f"{part['mean']:.{digits}f}"
    if part["std"] is not None:
        text += f"±{part['std']:.{digits}f}"
    return with_count(text, part, seeds)


def show_interval(part, seeds, digits=2):
    """A summary's mean and its 95 % interval as text, after ≈ if that holds 0."""
    if part is None:
        return "not run"
    text, half = f"{part['mean']:+.{digits}f}", tables.half_of(part)
    if half is not None:
        low, high = part["mean"] - half, part["mean"] + half
        text = f"{'≈' if low <= 0 <= high else ''}{text} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return with_count(text, part, seeds)


def with_count(text, part, seeds):
    """A text with the number of a summary's values if that is not `seeds`, and a real minus."""
    if part["n"] != seeds:
        text += f" (n = {part['n']})"
    return text.replace("-", "−")


def span(values):
    """Counts, which may differ between tasks, as text: "1,560–1,640"; "–" for none."""
    values = sorted(value for value in set(values) if value is not None)
    ends = dict.fromkeys(values[:1] + values[-1:])
    return "–".join(f"{value:,}" for value in ends) or "–"


# --- tables ----------------------------------------------------------------------------------

def table(title, lines, columns, cell):
    """A line for each of {key: label} `lines`: cell(key, column) for each of {column: label}."""
    rows = []
    for key, label in lines.items():
        rows.append([label, *(cell(key, column) for column in columns)])
    return markdown([title, *columns.values()], rows)


def tasks_of(content):
    """{task: its name} of a table, in the order of the paper's columns."""
    return {task: name for task, (name, _) in tables.COLUMNS.items() if task in content["tasks"]}


def score_table(content, which="last"):
    """The scores of all rows on all tasks."""
    def cell(row, task):
        parts = tables.summaries(content, row, task, which)
        return "/".join(show(part, content["seeds"], DIGITS[which]) for part in parts)

    return table(WHICH[which], content["rows"], tasks_of(content) | AVERAGE, cell)


def interval_table(content, which="last"):
    """Differences of the pairs whose rows are both shown, seed by seed."""
    rows, pairs = content["rows"], {}
    for a, b in content["pairs"]:
        if {a, b} <= rows.keys():
            pairs[a, b] = f"{rows[a]} − {rows[b]}"

    def cell(pair, task):
        part = tables.summary(tables.differences(content, *pair, task, which).values())
        return show_interval(part, content["seeds"], DIGITS[which])

    columns = tasks_of(content) | AVERAGE
    return table("difference, its 95 % interval", pairs, columns, cell)


def worst_table(content):
    """The worst seed of each row: whether it is steady."""
    def cell(row, task):
        scores = list(map(tables.mean_of, tables.scores_of(content, row, task).values()))
        return f"{min(scores):.2f}".replace("-", "−") if scores else "not run"

    return table("the worst seed", content["rows"], tasks_of(content), cell)


def choice_table(content, is_search=True):
    """What was chosen for each row, of how many points, of which so many diverged.

    A search is said to be unfinished where it is; a fixed grid ends where it ends.
    """
    def cell(row, task):
        points = search.tried(content, row, task)
        chosen = search.best(points)
        if chosen is None:
            return "–"
        lost = sum(score == -math.inf for _, score in points)
        text = f"{search.point_text(chosen)} (of {len(points)}"
        text += f", {lost} diverged)" if lost else ")"
        return f"{text} unfinished" if is_search and not search.is_inside(points) else text

    return table("learning rate, scale (of how many)", content["rows"], tasks_of(content), cell)


def parameter_table(content):
    """How many parameters a row trains, how many survive its pruning, and what the paper says."""
    columns = {"adapter_parameters": "trained", "surviving_parameters": "surviving",
               "paper": "the paper's"}

    def cell(row, column):
        if column == "paper":
            return content.get("paper", {}).get(row, {}).get("parameters", "–")
        return span(run[column] for run in content["runs"] if run["row"] == row)

    return table("parameters", content["rows"], columns, cell)


def paper_table(content):
    """The scores that the paper reports of the same rows and tasks."""
    paper = content["paper"]
    if not paper:
        return "The paper reports nothing of these rows.\n"

    def cell(row, task):
        scores = {each: paper[row]["scores"].get(each, [None]) for each in content["tasks"]}
        if task != "average":
            return "/".join("–" if x is None else f"{x:.2f}" for x in scores[task])
        unknown = any(None in columns for columns in scores.values())
        return "–" if unknown else f"{tables.average(scores.values()):.2f}"

    rows = {row: content["rows"].get(row, row) for row in paper}
    return table("the paper", rows, tasks_of(content) | AVERAGE, cell)


def overlap_table(content):
    """How alike the selections by Eq. 8 and Eq. 9 are."""
    found = {task: tables.overlap(content, task) for task in content["tasks"]}
    measures = {measure: measure for some in found.values() for measure in some}

    def cell(measure, task):
        return show(tables.summary(found[task][measure]), content["seeds"], 1)

    return table("%", measures, tasks_of(content), cell)


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

def study_parts(content, shown):
    """The tables of a study: of the rows that were run or tuned; then which were not run."""
    labels, begun = content["rows"], {run["row"] for run in content["runs"]}
    done = {run["row"] for run in content["runs"] if run["part"] == "reported"}
    waiting = [labels[row] for row in labels if row not in done]
    shown = shown | {"rows": {row: labels[row] for row in labels if row in done}}
    tuned = content | {"rows": {row: labels[row] for row in labels if row in begun}}
    parts = [score_table(shown), interval_table(shown), worst_table(shown), choice_table(tuned),
             parameter_table(shown)]
    if waiting:
        parts.append(f"Not run: {'; '.join(waiting)}.\n")
    return parts


def parts_of(content, shown):
    """(the tables that docs/results.md shows, the others with their headings) of a page.

    shown: content with the runs that did not diverge and are not of a tuning, and "seeds".
    """
    if content["name"] == "tune":
        return [choice_table(content, is_search=False)], []
    if content["name"] == "table2":
        times = [score_table(shown, "time"), interval_table(shown, "time")]
        return times, ["## What the paper reports\n", paper_table(shown)]
    if content["name"] == "study":
        return study_parts(content, shown), []
    if content["name"] == "figure3":
        picture = "![kept singular values, layer by layer](figure3.svg)\n"
        return [picture] if shown["runs"] else [], ["## In numbers\n", *kept_tables(shown)]
    parts = [score_table(shown), interval_table(shown), parameter_table(shown)]
    if content["name"] == "overlap" and len(content["rows"]) == 2:
        parts.append(overlap_table(shown))
    best = ["The best evaluation is chosen on the dev set itself.\n", score_table(shown, "best"),
            interval_table(shown, "best")]
    return parts, ["## At the best evaluation\n", *best,
                   "## What the paper reports\n", paper_table(shown)]


def facts_of(runs, names=("seed", "device", "dtype", "threads", "torch", "python", "date")):
    """What runs took, and on what, with what and when they were made, as text."""
    hours = sum(run.get("seconds", 0) for run in runs) / 3600
    peak = max((run.get("peak_memory_gb") or 0 for run in runs), default=0)    # few runs tell
    memory = f", at most {peak} GB" if peak else ""
    facts = [f"{len(runs)} runs, {hours:.2f} hours{memory}"]
    for name in names:
        values = sorted({str(run[name]) for run in runs if name in run})
        facts.append(f"{name} {', '.join(values) or '–'}")
    return "; ".join(facts) + ".\n"


def lost_of(runs):
    """[a sentence that names those of the runs that diverged]; [] without any."""
    lost = [tables.name_of(run) for run in runs if "failed" in run]
    return [f"Diverged, and in no mean: {', '.join(lost)}.\n"] if lost else []


def whole(content, parts, notes):
    """A page: title, parts, notes and the command."""
    lines = [f"- {note}\n" for note in [*notes, *content["notes"], f"`{content['command']}`"]]
    return "\n".join([f"# {content['title']} ({content['model']})\n", *parts,
                      "## How it was made\n", "".join(lines)])


def page(content):
    """TABLE.md of a content. ValueError for runs that fit no one table."""
    tables.check_sources(content["runs"])
    reported = [run for run in content["runs"] if run["part"] == "reported"]
    shown = content | {"runs": [run for run in reported if "failed" not in run],
                       "seeds": tables.usual_count(reported)}
    parts, others = parts_of(content, shown)
    legend = [] if content["name"] in ("tune", "figure3") else LEGEND
    parts += [*lost_of(reported), facts_of(content["runs"]), *others]
    return whole(content, parts, legend)
