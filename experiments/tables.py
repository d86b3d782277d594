"""From the records of runs to numbers: mean ± standard deviation, averages, differences, overlap.

`content` is what a page is made of (reproduce.py). Scores are in percent; a score is a list with
one number for each of the task's columns (MNLI and QQP have two). Reads no file.
"""
import itertools
import math
import statistics
from collections import Counter

# Task → its name, its metrics as (dev split, metric): the columns of Table 1, in the paper's order.
COLUMNS = {
    "cola": ("CoLA", [("dev", "matthews")]), "sst2": ("SST-2", [("dev", "accuracy")]),
    "mrpc": ("MRPC", [("dev", "accuracy")]), "qqp": ("QQP", [("dev", "accuracy"), ("dev", "f1")]),
    "stsb": ("STS-B", [("dev", "pearson")]),
    "mnli": ("MNLI", [("dev_matched", "accuracy"), ("dev_mismatched", "accuracy")]),
    "qnli": ("QNLI", [("dev", "accuracy")]), "rte": ("RTE", [("dev", "accuracy")])}
MATRICES = {"q": "query", "k": "key", "v": "value", "o": "attention output", "f1": "feed-forward 1",
            "f2": "feed-forward 2"}                        # in Figure 3's order
# Student's t: 95 % of its values are within ± this, by degrees of freedom from 1 on.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


# --- numbers ---------------------------------------------------------------------------------

def score(record, which, task):
    """The score of a run, in percent: a list with a number for each column of the task.

    which: "last" or "best"; or "time", the seconds of a step, which stand in its place in Table 2.
    """
    if which == "time":
        return [record["step_seconds"]]
    return [100 * record[which]["scores"][split][metric] for split, metric in COLUMNS[task][1]]


def final_score(record):
    """That after the last step, by which a tuning is chosen; −inf of a run that diverged.

    The best of many evaluations near chance would be luck.
    """
    return -math.inf if "failed" in record else record["last"]["score"]


def mean_of(columns):
    """The one number that a task contributes to an average; unknown columns (None) do not count."""
    return statistics.mean(value for value in columns if value is not None)


def average(scores):
    """The mean over tasks of their scores: the paper's rule, but for its row LoRA² k=8."""
    return statistics.mean(map(mean_of, scores))


def summary(values):
    """Mean, sample standard deviation (None for one value), number of values; None without any."""
    values = list(values)
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": spread, "n": len(values)}


def half_of(part):
    """h of a summary's 95 % interval, mean ± h; None for one value. ValueError for more than 20."""
    n = part["n"]
    if n > len(T95) + 1:
        raise ValueError(f"{n} seeds: T95 knows {len(T95) + 1} at most: give fewer")
    return None if n == 1 else T95[n - 2] * part["std"] / math.sqrt(n)


def runs_of(content, row, task):
    """[record] of a cell of the table."""
    return [run for run in content["runs"] if (run["row"], run["task"]) == (row, task)]


def usual_count(runs):
    """How many of these runs most cells of a table have; 0 without runs."""
    cells = Counter((run["row"], run["task"]) for run in runs)
    return max(statistics.multimode(cells.values()), default=0)


def scores_of(content, row, task, which="last"):
    """{seed: score} of a row on a task; on "average" it is one number, if all tasks were run."""
    if task != "average":
        return {run["seed"]: score(run, which, task) for run in runs_of(content, row, task)}
    by_task = [scores_of(content, row, each, which) for each in content["tasks"]]
    seeds = set.intersection(*map(set, by_task))
    return {seed: [average(scores[seed] for scores in by_task)] for seed in seeds}


def summaries(content, row, task, which):
    """A summary() for each column of a row on a task, or one of the average."""
    scores = scores_of(content, row, task, which).values()
    width = 1 if task == "average" else len(COLUMNS[task][1])
    return [summary(column) for column in zip(*scores)] or [None] * width


def differences(content, a, b, task, which="last"):
    """{seed: row a − row b} on a task, or of their averages, of the seeds that both have."""
    ours, theirs = (scores_of(content, row, task, which) for row in (a, b))
    return {seed: mean_of(ours[seed]) - mean_of(theirs[seed]) for seed in ours if seed in theirs}


# --- do runs belong together? -----------------------------------------------------------------

def name_of(record):
    """Which run it is, for messages."""
    return f"{record['row']} on {record['task']}, seed {record['seed']}"


def check_sources(runs, device=None):
    """ValueError unless all runs are of one model, on one device, those of a task of the same data.

    device: of the runs to come. Runs without an entry do not tell.
    """
    first = {"another device": device} if device else {}
    for run in runs:
        for name, what in (("base", "another model"), ("rows", f"other {run['task']} data"),
                           ("device", "another device")):
            value = run.get(name)
            if value is not None and value != first.setdefault(what, value):
                raise ValueError(f"{name_of(run)} was made with {what} ({value}, not "
                                 f"{first[what]}): give another --runs and --out")


# --- kept singular values --------------------------------------------------------------------

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


def overlap(content, task):
    """{measure: values}: how alike the selections of the two rows are, Eq. 9's and Eq. 8's."""
    nine, eight = (kept_of(content, row, task) for row in content["rows"])
    same_seed = [(nine[seed], eight[seed]) for seed in nine if seed in eight]
    two_seeds = list(itertools.combinations(nine.values(), 2))
    found = {
        "kept by both: the very same singular values": [shared(a, b) for a, b in same_seed],
        "kept by both: as many of each matrix": [shared_counts(a, b) for a, b in same_seed],
        "for scale: as many, Eq. 9 with two seeds": [shared_counts(a, b) for a, b in two_seeds],
        "for scale: the same, matrices shuffled": [shared_by_chance(a, b) for a, b in two_seeds]}
    r = max((run["settings"]["r"] for run in content["runs"] if run["task"] == task), default=0)
    for name, some in (("Eq. 9", nine), ("Eq. 8", eight)):
        for what, n in (("nothing", 0), ("everything", r)):
            parts = [100 * statistics.mean(len(one) == n for one in kept) for kept in some.values()]
            found[f"matrices that keep {what}, {name}"] = parts
    return found


def kept_of(content, row, task):
    """{seed: the kept singular values of each matrix, [set of indices]} of a row on a task."""
    found = {}
    for run in runs_of(content, row, task):
        layers = itertools.chain.from_iterable(run["kept"].values())
        found[run["seed"]] = list(map(set, layers))
    return found


def mean_ranks(runs):
    """{matrix: [how many singular values each layer kept, on average over the runs]}."""
    mean = {}
    for short in runs[0]["ranks"]:
        by_layer = zip(*(run["ranks"][short] for run in runs), strict=True)
        mean[short] = list(map(statistics.mean, by_layer))
    return mean


def panels(content):
    """[(title, records)] of Figure 3, of its only row, for each task."""
    ((row, label),) = content["rows"].items()
    return [(f"{COLUMNS[task][0]}, {label}", runs_of(content, row, task))
            for task in content["tasks"]]
