"""From the summary of study.py to Markdown: scores, worst seeds, paired differences, choices.

`content` is what the JSON file holds (study.py). Reads no file.
"""
import math
import statistics

from experiments import search, tables

# Student's t: 95 % of its values are within ± this, by degrees of freedom from 1 on.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


# --- numbers ---------------------------------------------------------------------------------

def interval(values):
    """{"mean", "half", "n"} of the 95 % interval mean ± half; half is None for one value.

    None without any. ValueError for more than 20 values.
    """
    part, n = tables.summary(values), len(values)
    if n > len(T95) + 1:
        raise ValueError(f"{n} seeds: T95 knows {len(T95) + 1} at most: give fewer")
    if part is not None:
        part["half"] = None if n == 1 else T95[n - 2] * part["std"] / math.sqrt(n)
    return part


def finished(content):
    """The runs that did not diverge."""
    return [run for run in content["runs"] if "failed" not in run]


def diverged(content, part):
    """The others of a part, "tune" or "reported"."""
    return [run for run in content["runs"] if run["part"] == part and "failed" in run]


def tried(content, row, task):
    """[(point, score)] of a row's tuning, in order; −inf for a run that diverged."""
    found = []
    for run in tables.runs_of(content, row, task):
        if run["part"] == "tune":
            score = -math.inf if "failed" in run else run["last"]["score"]
            found.append((run["tuned"], score))
    return found


def check_choices(content):
    """ValueError if a reported run has another tuning than the best, or one on an edge."""
    for run in content["runs"]:
        if run["part"] != "reported" or run["row"] not in content["rows"]:
            continue
        points = tried(content, run["tuned_as"], run["task"])
        name = f"{tables.name_of(run)} has {point_text(run['tuned'])}"
        if run["tuned"] != search.best(points):
            raise ValueError(f"{name}, which is not the best that was tried: give another --out")
        if not search.is_inside(points):
            raise ValueError(f"{name}, which is on the edge of what was tried: run the study again "
                             "to widen its grid, or leave that row out with --rows")


# --- Markdown --------------------------------------------------------------------------------

def point_text(point):
    """A point of the grid as text: "0.003, 32" or, with a rate of v and V, "0.003, 32, × 0.3"."""
    text = ", ".join(f"{point[axis]:g}" for axis in ("lr", "scale") if axis in point)
    return text + (f", × {point['outer']:g}" if "outer" in point else "")


def show_interval(part, seeds):
    """An interval as text, after ≈ if it holds 0."""
    if part is None:
        return "not run"
    text = f"{part['mean']:+.2f}"
    if part["half"] is not None:
        low, high = part["mean"] - part["half"], part["mean"] + part["half"]
        text = f"{'≈' if low <= 0 <= high else ''}{text} [{low:+.2f}, {high:+.2f}]"
    if part["n"] != seeds:
        text += f" (n = {part['n']})"
    return text.replace("-", "−")


def difference_table(content):
    """Pairs of rows, seed by seed, with an interval; the last column is of the mean over tasks."""
    tasks, names, seeds = tables.layout(content)
    lines = []
    for a, b in content["pairs"]:
        if not {a, b} <= content["rows"].keys():
            continue
        by_task = [tables.differences(content, a, b, task) for task in tasks]
        of_all = []
        for seed in set.intersection(*map(set, by_task)):
            of_all.append(statistics.mean(found[seed] for found in by_task))
        columns = [list(found.values()) for found in by_task] + [of_all]
        shown = [show_interval(interval(values), seeds) for values in columns]
        lines.append([f"{content['rows'][a]} − {content['rows'][b]}", *shown])
    return tables.markdown(["difference, its 95 % interval", *names, "average"], lines)


def worst_table(content):
    """The worst seed of each row: whether it is steady."""
    def cell(row, task):
        runs = tables.runs_of(content, row, task)
        scores = [tables.mean_of(tables.score(run, "last", task)) for run in runs]
        return f"{min(scores):.2f}".replace("-", "−") if scores else "not run"

    return tables.table_of(content, "the worst seed", cell)


def choice_table(content, all_runs):
    """What each row chose, on how many points, of which so many diverged."""
    def cell(row, task):
        points = tried(all_runs, row, task)
        chosen = search.best(points)
        if chosen is None:
            return "–"
        lost = sum(score == -math.inf for _, score in points)
        text = f"{point_text(chosen)} (of {len(points)}"
        text += f", {lost} diverged)" if lost else ")"
        return text if search.is_inside(points) else f"{text} unfinished"

    return tables.table_of(content, "learning rate, scale (of how many)", cell)


def page(content):
    """The Markdown of a study. ValueError if a choice is on an edge of its grid."""
    check_choices(content)
    begun = {run["row"] for run in content["runs"]}
    waiting = [label for row, label in content["rows"].items() if row not in begun]
    rows = {row: label for row, label in content["rows"].items() if row in begun}
    runs = [run for run in content["runs"] if run["part"] == "tune" or run["row"] in rows]
    content = content | {"runs": runs, "rows": rows}
    done = content | {"runs": finished(content)}
    reported = content | {"runs": [run for run in done["runs"] if run["part"] == "reported"]}
    parts = [tables.score_table(reported), difference_table(reported), worst_table(reported),
             choice_table(reported, content), tables.parameter_table(reported | {"paper": {}})]
    if waiting:
        parts.append(f"Not run: {'; '.join(waiting)}.\n")
    lost = diverged(content, "reported")
    if lost:
        names = ", ".join(map(tables.name_of, lost))
        parts.append(f"Diverged, and in no mean: {names}.\n")
    return tables.page_of(content, [*parts, f"{tables.facts_of(done)}\n"])
