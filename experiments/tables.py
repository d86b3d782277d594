"""From the records of runs to Markdown: mean ± standard deviation, averages, differences.

`content` is what TABLE.json holds (summary.py). Scores are in percent; a score is a list with one
number for each of the task's columns (MNLI and QQP have two). Reads no file.
"""
import itertools
import statistics

# Task → its name, its metrics as (dev split, metric): the columns of Table 1, in the paper's order.
COLUMNS = {
    "cola": ("CoLA", [("dev", "matthews")]), "sst2": ("SST-2", [("dev", "accuracy")]),
    "mrpc": ("MRPC", [("dev", "accuracy")]), "qqp": ("QQP", [("dev", "accuracy"), ("dev", "f1")]),
    "stsb": ("STS-B", [("dev", "pearson")]),
    "mnli": ("MNLI", [("dev_matched", "accuracy"), ("dev_mismatched", "accuracy")]),
    "qnli": ("QNLI", [("dev", "accuracy")]), "rte": ("RTE", [("dev", "accuracy")])}
MATRICES = {"q": "query", "k": "key", "v": "value", "o": "attention output", "f1": "feed-forward 1",
            "f2": "feed-forward 2"}                        # in Figure 3's order
WHICH = {"last": "after the last step", "best": "at the best evaluation"}
SPREAD = ("Mean ± standard deviation over the seeds; (n = ...) where it is of another number of "
          "values. ≈: a difference, of a ratio that from 1, not larger than its own spread over "
          "the seeds.")
LEGEND = ("The best evaluation is chosen on the dev set itself. An average is over tasks, seed by "
          "seed; MNLI and QQP count as the mean of their columns.")


# --- numbers ---------------------------------------------------------------------------------

def score(record, which, task):
    """The score of a run, in percent: a list with a number for each column of the task."""
    return [100 * record[which]["scores"][split][metric] for split, metric in COLUMNS[task][1]]


def mean_of(columns):
    """The one number that a task contributes to an average; unknown columns (None) do not count."""
    return statistics.mean(value for value in columns if value is not None)


def average(scores):
    """{task: score} → the mean over tasks: the paper's rule, but for its row LoRA² k=8."""
    return statistics.mean(mean_of(columns) for columns in scores.values())


def summary(values):
    """Mean, sample standard deviation (None for one value), number of values; None without any."""
    values = list(values)
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": spread, "n": len(values)}


def near(part, to=0):
    """Whether a summary's mean is not further from a number than its own standard deviation."""
    return part is not None and part["std"] is not None and abs(part["mean"] - to) <= part["std"]


def runs_of(content, row, task):
    """[record] of a cell of the table."""
    return [run for run in content["runs"] if (run["row"], run["task"]) == (row, task)]


def by_seed(content, row, task):
    """{seed: record} of a cell of the table."""
    return {run["seed"]: run for run in runs_of(content, row, task)}


def in_both(content, a, b, task):
    """[(record of row a, record of row b)] of the seeds that both have."""
    ours, theirs = by_seed(content, a, task), by_seed(content, b, task)
    return [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]


def score_of(content, row, task, which):
    """The score of a row on a task: a list with a summary for each column."""
    scores = [score(run, which, task) for run in by_seed(content, row, task).values()]
    if not scores:
        return [None] * len(COLUMNS[task][1])
    return [summary(column) for column in zip(*scores)]


def average_of(content, row, which):
    """The average of a row over the tasks, of the seeds that have all of them."""
    runs = {task: by_seed(content, row, task) for task in content["tasks"]}
    averages = []
    for seed in set.intersection(*map(set, runs.values())):
        averages.append(average({task: score(runs[task][seed], which, task) for task in runs}))
    return summary(averages)


def differences(content, a, b, task, which="last"):
    """{seed: row a − row b} on a task."""
    found = {}
    for ours, theirs in in_both(content, a, b, task):
        right = mean_of(score(theirs, which, task))
        found[ours["seed"]] = mean_of(score(ours, which, task)) - right
    return found


def difference(content, a, b, task, which):
    """Row a − row b on a task, seed by seed."""
    return summary(differences(content, a, b, task, which).values())


def time_ratio(content, a, b, task):
    """Time per step of row a over row b's, seed by seed.

    Runs of one seed see the same batches, so that the ratio of their times per step is that of
    their tokens per second the other way round.
    """
    return summary(theirs["tokens_per_second"] / ours["tokens_per_second"]
                   for ours, theirs in in_both(content, a, b, task))


# --- kept singular values --------------------------------------------------------------------

def name_of(record):
    """Which run it is, for messages."""
    return f"{record['row']} on {record['task']}, seed {record['seed']}"


def check_alike(runs, name):
    """ValueError unless the entry `name`, "ranks" or "kept", of all runs is of the same matrices.

    A mean would silently be of some.
    """
    first = None
    for run in runs:
        shape = {short: len(layers) for short, layers in run.get(name, {}).items()}
        first = first or shape
        if not shape or shape != first:
            raise ValueError(f"{name_of(run)}: {name} is of other matrices than in the first run: "
                             "remove its folder and run it again")


def kept_of(record):
    """[the indices of the kept singular values] of each matrix of a run."""
    return [set(indices) for layers in record["kept"].values() for indices in layers]


def shared(a, b):
    """Percentage of the kept singular values, [the indices of each matrix], that two runs share."""
    kept = max(sum(map(len, a)), sum(map(len, b)), 1)
    return 100 * sum(len(one & other) for one, other in zip(a, b, strict=True)) / kept


def shared_counts(a, b):
    """The same if each matrix kept as many, but always its first ones."""
    return shared([set(range(len(one))) for one in a], [set(range(len(one))) for one in b])


def shared_by_chance(a, b):
    """shared() of as many of each matrix, on average, if b's matrices changed places at random."""
    pairs = itertools.product(map(len, a), map(len, b))
    kept = max(sum(map(len, a)), sum(map(len, b)), 1)
    return 100 * sum(map(min, pairs)) / len(a) / kept


def part_with(kept, n):
    """The part of the matrices that keep n singular values, in percent."""
    return 100 * sum(len(one) == n for one in kept) / len(kept)


def overlap(content, task):
    """{measure: values}: how alike the selections of the two rows are, Eq. 9's and Eq. 8's."""
    runs = [list(by_seed(content, row, task).values()) for row in content["rows"]]
    check_alike(runs[0] + runs[1], "kept")
    nine, eight = ([kept_of(run) for run in some] for some in runs)
    same_seed = [(kept_of(a), kept_of(b)) for a, b in in_both(content, *content["rows"], task)]
    two_seeds = list(itertools.combinations(nine, 2))
    found = {
        "kept by both: the very same singular values": [shared(a, b) for a, b in same_seed],
        "kept by both: as many of each matrix": [shared_counts(a, b) for a, b in same_seed],
        "for scale: as many, Eq. 9 with two seeds": [shared_counts(a, b) for a, b in two_seeds],
        "for scale: the same, matrices shuffled": [shared_by_chance(a, b) for a, b in two_seeds]}
    r = [run["settings"]["r"] for run in runs[0] + runs[1]]
    for name, kept in (("Eq. 9", nine), ("Eq. 8", eight)):
        found[f"matrices that keep nothing, {name}"] = [part_with(one, 0) for one in kept]
        found[f"matrices that keep everything, {name}"] = [part_with(one, r[0]) for one in kept]
    return found


def mean_ranks(runs):
    """{matrix: [how many singular values each layer kept, on average over the runs]}."""
    check_alike(runs, "ranks")
    mean = {}
    for short in runs[0]["ranks"]:
        mean[short] = list(map(statistics.mean, zip(*(run["ranks"][short] for run in runs))))
    return mean


# --- Markdown --------------------------------------------------------------------------------

def markdown(head, rows):
    """A Markdown table; cells are text."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def show(part, seeds, digits=2, sign=""):
    """A summary as text, with the number of its values if that is not `seeds`."""
    if part is None:
        return "not run"
    text = f"{part['mean']:{sign}.{digits}f}"
    if part["std"] is not None:
        text += f"±{part['std']:.{digits}f}"
    if part["n"] != seeds:
        text += f" (n = {part['n']})"
    return text.replace("-", "−")


def show_change(part, seeds, digits=2, sign="", to=0):
    """The same, after ≈ if it is not further from a number than its own spread."""
    mark = "≈" if near(part, to) else ""
    return mark + show(part, seeds, digits, sign)


def span(values):
    """Counts, which may differ between tasks, as text: "1,560–1,640"; "–" for none."""
    values = sorted(value for value in set(values) if value is not None)
    ends = dict.fromkeys(values[:1] + values[-1:])
    return "–".join(f"{value:,}" for value in ends) or "–"


def layout(content):
    """(tasks in the order of the paper's columns, their names, number of seeds) of a table."""
    tasks = [task for task in COLUMNS if task in content["tasks"]]
    return tasks, [COLUMNS[task][0] for task in tasks], len(content["seeds"])


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
        return "/".join(show(part, seeds) for part in score_of(content, row, task, which))

    def average_cell(row):
        return show(average_of(content, row, which), seeds)

    return table_of(content, WHICH[which], cell, average=average_cell)


def difference_table(content, which="last"):
    """Pairs of rows, seed by seed."""
    tasks, names, seeds = layout(content)
    lines = []
    for a, b in content["pairs"]:
        parts = [difference(content, a, b, task, which) for task in tasks]
        lines.append([f"{content['rows'][a]} − {content['rows'][b]}",
                      *(show_change(part, seeds, sign="+") for part in parts)])
    return markdown([f"difference {WHICH[which]}", *names], lines)


def parameter_table(content):
    """How many parameters a row trains, how many survive its pruning, and what the paper says."""
    lines = []
    for row, label in content["rows"].items():
        runs = [run for run in content["runs"] if run["row"] == row]
        paper = content["paper"].get(row, {})
        trained = span(run["adapter_parameters"] for run in runs)
        surviving = span(run["surviving_parameters"] for run in runs)
        lines.append([label, trained, surviving, paper.get("parameters", "–")])
    return markdown(["parameters", "trained", "surviving", "the paper's"], lines)


def paper_table(content):
    """The scores that the paper reports of the same rows and tasks; "" if there are none."""
    tasks, names, _ = layout(content)
    lines = []
    for row, paper in content["paper"].items():
        scores = {task: paper["scores"].get(task, [None]) for task in tasks}
        line = [content["rows"][row]]
        for task in tasks:
            line.append("/".join("–" if x is None else f"{x:.2f}" for x in scores[task]))
        unknown = any(None in columns for columns in scores.values())
        lines.append([*line, "–" if unknown else f"{average(scores):.2f}"])
    if not lines:
        return "The paper reports nothing of these rows.\n"
    return markdown(["the paper", *names, "average"], lines)


def overlap_table(content):
    """How alike the selections by Eq. 8 and Eq. 9 are."""
    tasks, names, seeds = layout(content)
    found = {task: overlap(content, task) for task in tasks}
    lines = []
    for measure in found[tasks[0]]:
        lines.append([measure, *(show(summary(found[task][measure]), seeds, 1) for task in tasks)])
    return markdown(["%", *names], lines)


def tuning_table(content):
    """Of each row the learning rate and scale with the best score, the first of equals."""
    def cell(row, task):
        runs = runs_of(content, row, task)
        if not runs:
            return "not run"
        best = max(runs, key=lambda one: one["last"]["score"])
        settings = best["settings"]
        scale = f", {settings['alpha'] / settings['r']:g}" if "alpha" in settings else ""
        return f"{settings['lr']:g}{scale} ({100 * best['last']['score']:.2f}, of {len(runs)})"

    return table_of(content, "learning rate, scale (score, of how many runs)", cell)


def ratio_table(content):
    """Times of a step over those of the first row, ours and the paper's."""
    tasks, names, seeds = layout(content)
    base, *others = content["rows"]
    lines = []
    for task, name in zip(tasks, names):
        parts = [time_ratio(content, row, base, task) for row in others]
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
            runs = by_seed(content, row, task).values()
            line.append(show(summary(run["tokens_per_second"] for run in runs), seeds, 0))
        paper = content["paper"].get(task)
        lines.append([*line, f"{paper[0]:.2f} → {paper[1]:.2f}" if paper else "–"])
    labels = content["rows"].values()
    return markdown(["tokens per second", *labels, "the paper's seconds"], lines)


def panels(content):
    """[(title, records)] of Figure 3, of its only row, for each task."""
    ((row, label),) = content["rows"].items()
    return [(f"{COLUMNS[task][0]}, {label}", runs_of(content, row, task))
            for task in content["tasks"]]


def kept_tables(content):
    """Figure 3 as numbers: a title and a table for each panel."""
    texts = []
    for title, runs in panels(content):
        if not runs:
            texts.append(f"{title}: not run\n")
            continue
        texts.append(f"{title}: kept of {runs[0]['settings']['r']}, mean of {len(runs)} runs\n")
        lines = []
        for short, layers in mean_ranks(runs).items():
            lines.append([MATRICES[short], *(f"{count:.3g}" for count in layers)])
        texts.append(markdown(["layer", *map(str, range(len(layers)))], lines))
    return texts


def parts_of(content):
    """(the tables that docs/results.md shows, the others with their headings) of TABLE.md."""
    if content["name"] == "tune":
        return [tuning_table(content)], []
    if content["name"] == "table2":
        return [ratio_table(content), speed_table(content)], []
    if content["name"] == "figure3":
        picture = "![kept singular values, layer by layer](figure3.svg)\n"
        shown = [picture] if content["runs"] else []
        return shown, ["## In numbers\n", *kept_tables(content)]
    parts = [score_table(content), difference_table(content), parameter_table(content)]
    if content["name"] == "overlap":
        parts.append(overlap_table(content))
    best = [score_table(content, "best"), difference_table(content, "best")]
    return parts, ["## At the best evaluation\n", *best,
                   "## What the paper reports\n", paper_table(content)]


def facts_of(content):
    """What a table's runs took, and on what, with what and when they were made, as text."""
    runs = content["runs"]
    hours = round(sum(run["seconds"] for run in runs) / 3600, 2)
    peak = max((run["peak_memory_gb"] or 0 for run in runs), default=0)    # older runs do not tell
    memory = f", at most {peak} GB" if peak else ""
    facts = [f"{len(runs)} runs, {hours} hours{memory}"]
    for name in ("seed", "device", "dtype", "threads", "torch", "python", "date"):
        values = sorted({str(run[name]) for run in runs})
        facts.append(f"{name} {', '.join(values) or '–'}")
    return "; ".join(facts) + "."


def page_of(content, shown, others=(), legend=()):
    """A page: what docs/results.md shows of it, the other tables, and how it was made."""
    notes = [*legend, *content["notes"], f"`{content['command']}`"]
    model = content["model"].rpartition("/")[2]
    return "\n".join([f"# {content['title']} ({model})\n", *shown, *others,
                      "## How it was made\n", "".join(f"- {note}\n" for note in notes)])


def page(content):
    """TABLE.md, from what TABLE.json holds."""
    shown, others = parts_of(content)
    legend = [SPREAD, LEGEND]
    if content["name"] == "table2":
        legend = [SPREAD]
    if content["name"] in ("tune", "figure3"):
        legend = []
    return page_of(content, [*shown, f"{facts_of(content)}\n"], others, legend)
