"""From finished runs to tables: mean ± standard deviation, averages, Markdown. Runs nothing.

found[row, task] is {seed: (run folder, content of its result.json)}. Scores are in percent; a score is a list
with one number for each of the task's columns (MNLI and QQP have two).
"""
import contextlib
import itertools
import json
import statistics

COLUMNS = {                      # task → its name, its metrics as (dev split, metric): those of Table 1
    "cola": ("CoLA", [("dev", "matthews")]), "sst2": ("SST-2", [("dev", "accuracy")]),
    "mrpc": ("MRPC", [("dev", "accuracy")]), "qqp": ("QQP", [("dev", "accuracy"), ("dev", "f1")]),
    "stsb": ("STS-B", [("dev", "pearson")]),
    "mnli": ("MNLI", [("dev_matched", "accuracy"), ("dev_mismatched", "accuracy")]),
    "qnli": ("QNLI", [("dev", "accuracy")]), "rte": ("RTE", [("dev", "accuracy")])}
WHICH = ("best", "last")                                   # the best evaluation on the dev set; the last step
SPREAD = ("Mean ± standard deviation over seeds (number of runs). ≈: a difference, of a ratio that from 1, "
          "not larger than its own spread over seeds.")
LEGEND = (f"{SPREAD} *best*: the best evaluation, chosen on the dev set itself; *last*: after the last step. "
          "An average is over tasks, seed by seed; MNLI and QQP count as the mean of their columns.")


def score(result, which, task):
    """The score of a run, in percent: a list with a number for each column of the task."""
    return [100 * result[which]["scores"][split][metric] for split, metric in COLUMNS[task][1]]


def mean_of(columns):
    """The one number that a task contributes to an average; unknown columns (None) do not count."""
    return statistics.mean(value for value in columns if value is not None)


def average(scores):
    """{task: score} → the mean over tasks: the rule of all rows of the paper's Table 1 but LoRA² k=8's."""
    return statistics.mean(mean_of(columns) for columns in scores.values())


def summary(values):
    """Mean, sample standard deviation (None for one value) and number of values; None without any."""
    values = list(values)
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values)} if values else None


def show(part, digits=2, sign=""):
    """A summary as text; "not run" for None."""
    if part is None:
        return "not run"
    spread = f" ± {part['std']:.{digits}f}" if part["std"] is not None else ""
    return f"{part['mean']:{sign}.{digits}f}{spread} ({part['n']})"


def near(part, to=0):
    """Whether a summary's mean is not further from a number than its own standard deviation."""
    return part is not None and part["std"] is not None and abs(part["mean"] - to) <= part["std"]


def span(values):
    """Counts, which may differ between tasks, as text: "1,560–1,640"."""
    values = sorted(set(values))
    return "–".join(f"{value:,}" for value in dict.fromkeys(values[:1] + values[-1:])) or "–"


def markdown(head, rows):
    """A Markdown table; cells are text."""
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, ["---"] * len(head), *rows])


def load(folder, name):
    """A JSON or JSON-lines file of a finished run; ValueError if it is not there or damaged."""
    with whole(folder, name):
        text = (folder / name).read_text(encoding="utf-8")
        content = list(map(json.loads, text.splitlines())) if name.endswith("l") else dict(json.loads(text))
        if not content:
            raise ValueError("it is empty")
        return content


@contextlib.contextmanager
def whole(folder, name):
    """Around whatever a damaged file of a finished run can break: then ValueError that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as e:
        raise ValueError(f"{folder / name} is missing or damaged: remove {folder} and run it again") from e


def load_alike(runs, name, kind):
    """{key: {matrix: value}} from a file of each of the runs {key: (folder, result)}: ValueError unless all
    are of the same matrices and all values of type `kind`, or a mean would silently be of some."""
    contents = {}
    for key, (folder, _) in runs.items():
        contents[key] = load(folder, name)
        with whole(folder, name):
            if contents[key].keys() != next(iter(contents.values())).keys() or not all(
                    isinstance(value, kind) for value in contents[key].values()):
                raise ValueError("other matrices than in the first run, or no values")
    return contents


# --- Tables 1, 3, 4 and their like: scores ------------------------------------------------------------------

def score_rows(found, rows, labels, tasks, paper):
    """Our numbers and the paper's, for JSON. rows: row → its name in `paper`, a table of paper.json."""
    table = []
    for row, paper_row in rows.items():
        done = {task: {seed: result for seed, (_, result) in found[row, task].items()} for task in tasks}
        entry = {"row": row, "label": labels[row], "paper": paper["rows"].get(paper_row), "tasks": {}}
        for task, results in done.items():
            cell = entry["tasks"][task] = {"seeds": {
                seed: {which: score(one, which, task) for which in WHICH} for seed, one in results.items()}}
            for which in WHICH:
                columns = zip(*(one[which] for one in cell["seeds"].values()))
                cell[which] = [summary(column) for column in columns] or [None] * len(COLUMNS[task][1])
            for name in ("adapter_parameters", "surviving_parameters", "head_parameters"):
                cell[name] = sorted({result[name] for result in results.values() if name in result})
            cell["settings"] = {name: sorted({str(one["settings"].get(name)) for one in results.values()})
                                for name in ("lr", "alpha", "r", "target_rank")}
        complete = sorted(set.intersection(*(set(results) for results in done.values())))
        of_seed = lambda seed, which: average({task: score(done[task][seed], which, task) for task in tasks})
        entry["average"] = {which: summary(of_seed(seed, which) for seed in complete) for which in WHICH}
        table.append(entry)
    return table


def score_markdown(table, tasks):
    """Three lines for each row: ours at the best evaluation, ours after the last step, the paper's."""
    lines = []
    for entry in table:
        counts = [span(n for cell in entry["tasks"].values() for n in cell[f"{kind}_parameters"])
                  for kind in ("adapter", "surviving")]
        counts = counts[0] if counts[1] in ("–", counts[0]) else f"{counts[0]}, of which {counts[1]} survive"
        for which in WHICH:
            start = [f"**{entry['label']}**", counts] if which == "best" else ["", ""]
            cells = [" / ".join(map(show, entry["tasks"][task][which])) for task in tasks]
            lines.append([*start, which, *cells, show(entry["average"][which])])
        if entry["paper"]:
            scores = {task: entry["paper"]["scores"].get(task, [None]) for task in tasks}
            cells = [" / ".join("–" if x is None else f"{x:.2f}" for x in scores[task]) for task in tasks]
            known = all(x is not None for columns in scores.values() for x in columns)     # else another mean
            lines.append(["", entry["paper"].get("parameters", ""), "paper", *cells,
                          f"{average(scores):.2f}" if known else "–"])
    head = ["", "adapter parameters", "", *(COLUMNS[task][0] for task in tasks), f"average of {len(tasks)}"]
    return markdown(head, lines)


def differences(table, pairs, tasks):
    """For each pair (a, b) of rows a − b on each task, over the seeds that both have; for JSON."""
    rows, result = {entry["row"]: entry for entry in table}, []
    for a, b in pairs:
        entry = {"difference": f"{rows[a]['label']} − {rows[b]['label']}"}
        for task in tasks:
            ours, theirs = (rows[row]["tasks"][task]["seeds"] for row in (a, b))
            entry[task] = {which: summary(mean_of(ours[seed][which]) - mean_of(theirs[seed][which])
                                          for seed in ours if seed in theirs) for which in WHICH}
        result.append(entry)
    return result


def differences_markdown(table, tasks):
    """A line for each pair, best and last. ≈ marks what is smaller than its own spread."""
    lines = []
    for entry, which in itertools.product(table, WHICH):
        parts = [entry[task][which] for task in tasks]
        lines.append([entry["difference"], which,
                      *("≈ " * near(part) + show(part, sign="+") for part in parts)])
    return markdown(["difference", "", *(COLUMNS[task][0] for task in tasks)], lines)


# --- Table 2: time ------------------------------------------------------------------------------------------

def time_table(found, rows, labels, tasks, paper):
    """Speeds, and times per step over those of the first row: (dict for JSON, Markdown).

    Runs of one seed see the same batches, so that the ratio of their times per step is that of their tokens
    per second the other way round. The first log line but that of step 1 ends the warm-up; what is between it
    and the last one counts.
    """
    def speed(folder):
        with whole(folder, "log.jsonl"):
            lines = [line for line in load(folder, "log.jsonl") if "loss" in line and line["step"] > 1]
            for a, b in itertools.pairwise(lines):         # a run that went on after a stop counts anew
                if not (a["tokens"] < b["tokens"] and a["seconds"] < b["seconds"]):
                    raise ValueError("tokens or seconds go back")
            first, *_, last = lines
            return (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])

    base, *others = rows
    table, lines = {}, []
    for task in tasks:
        speeds = {row: {seed: speed(folder) for seed, (folder, _) in found[row, task].items()}
                  for row in rows}
        ratio = {row: summary(speeds[base][seed] / speed for seed, speed in speeds[row].items()
                              if seed in speeds[base]) for row in others}
        of_paper = paper["rows"].get(task)
        table[task] = {"tokens_per_second": {row: summary(speeds[row].values()) for row in rows},
                       "time_ratio": ratio, "paper": of_paper}
        lines.append([COLUMNS[task][0], *(show(table[task]["tokens_per_second"][row], 0) for row in rows),
                      *("≈ " * near(ratio[row], 1) + show(ratio[row], 3) for row in others),
                      "{0:.2f} → {1:.2f}, {2:.3f}".format(*of_paper, of_paper[1] / of_paper[0])
                      if of_paper else "–"])
    head = ["", *(f"{labels[row]}, tokens/s" for row in rows),
            *(f"time of a step, {labels[row]} over {labels[base]}" for row in others), "paper, s and ratio"]
    return table, markdown(head, lines)


# --- Eq. 8 against Eq. 9 ------------------------------------------------------------------------------------

def shared(a, b):
    """The part of the kept singular values that two runs share, from {matrix: indices}, in percent."""
    kept = max(sum(map(len, a.values())), sum(map(len, b.values())), 1)
    return 100 * sum(len(set(a[name]) & set(b[name])) for name in a) / kept


def shared_by_chance(a, b):
    """shared() of as many of each matrix, on average, if b's matrices changed places at random."""
    a, b = ([len(indices) for indices in kept.values()] for kept in (a, b))
    return 100 * sum(map(min, *zip(*itertools.product(a, b)))) / len(a) / max(sum(a), sum(b), 1)


def overlap_table(found, rows, tasks):
    """How alike the selections of two rows are, Eq. 9's and Eq. 8's: (list for JSON, Markdown)."""
    counts = lambda kept: {name: range(len(indices)) for name, indices in kept.items()}
    part = lambda kept, n: 100 * sum(len(indices) == n for indices in kept.values()) / len(kept)
    table = {}
    for task in tasks:
        kept = load_alike({(row, seed): run for row in rows for seed, run in found[row, task].items()},
                          "kept.json", list)
        a, b = ({seed: one for (of, seed), one in kept.items() if of == row} for row in rows)
        r = [result["settings"]["r"] for row in rows for _, result in found[row, task].values()][:1]
        both, two = [seed for seed in a if seed in b], list(itertools.combinations(a.values(), 2))
        lines = {"kept by both: the very same singular values": [shared(a[seed], b[seed]) for seed in both],
                 "kept by both: as many of each matrix": [shared(counts(a[s]), counts(b[s])) for s in both],
                 "for scale: as many, Eq. 9 with two seeds": [shared(*map(counts, pair)) for pair in two],
                 "for scale: the same, matrices shuffled": [shared_by_chance(*pair) for pair in two]}
        for number, kept in ((9, a), (8, b)):
            lines |= {f"matrices that keep {how}, Eq. {number}": [part(one, n) for one in kept.values()]
                      for how, n in [("nothing", 0), ("everything", *r)][:2 * len(r)]}
        for line, values in lines.items():
            table.setdefault(line, {"measure": line})[task] = summary(values)
    return list(table.values()), markdown(["%", *(COLUMNS[task][0] for task in tasks)], [
        [line["measure"], *(show(line.get(task), 1) for task in tasks)] for line in table.values()])
