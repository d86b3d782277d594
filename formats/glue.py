"""GLUE's files as they are: tables of texts and labels, and files of predictions.

A `task` is a row of the table in data.py: no code below asks which one it is. What a user can have
wrong raises ValueError or OSError with one finished sentence.
"""
import re
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from formats.disk import reading, warn, write_file, writing

BASE_URL = "https://dl.fbaipublicfiles.com"  # the GLUE authors' downloads
DEV_IDS = "dev_ids.tsv"                      # MRPC: the ids of the original file's dev rows
MRPC_DOWNLOADS = {                           # address → name to keep it under
    "senteval/senteval_data/msr_paraphrase_train.txt": "msr_paraphrase_train.txt",
    "senteval/senteval_data/msr_paraphrase_test.txt": "test.tsv",
    "glue/data/mrpc_dev_ids.tsv": DEV_IDS}
# What the splits of MRPC were made of: dev has the rows that DEV_IDS lists, train the others.
ORIGINALS = {"train": "msr_paraphrase_train.txt", "dev": "msr_paraphrase_train.txt",
             "test": "msr_paraphrase_test.txt"}
ID_COLUMNS = ("#1 ID", "#2 ID")              # a line of DEV_IDS is such a pair
NO_LABEL = ("-", "-1", "nan", "null", "n/a", "?")  # as SNLI, the Hub, pandas and others write it
LONGEST = 1_000_000                          # bytes of a line; a tokenizer takes 150 times as much


class Split(NamedTuple):
    """The rows of one file."""
    texts: list               # a tuple of one or two strings for each row
    labels: Optional[list]    # a class id (int) or a score (float) for each; None: unlabelled

    def part(self, start, stop):
        """Rows start .. stop − 1; all from start on if stop is None."""
        labels = None if self.labels is None else self.labels[start:stop]
        return Split(self.texts[start:stop], labels)


def short(values):
    """Values for an error message: quoted, and cut where a file holds nonsense."""
    text = ", ".join(repr(value[:60]) for value in values[:30])
    return text[:200] + " ..." if len(text) > 200 or len(values) > 30 else text


# ---- tables ------------------------------------------------------------------------------------
def read_lines(path):
    """The lines of a UTF-8 file. Only \\n and \\r\\n end one: str.splitlines cuts at U+2028 too."""
    lines = []
    with reading(path, "a tab-separated file is expected"), open(path, "rb") as file:
        while not lines or 0 < len(lines[-1]) <= LONGEST:
            lines.append(file.readline(LONGEST + 1))
    total = len(lines) - 1                                 # the last one read is the file's end
    while lines and lines[-1] in (b"", b"\n", b"\r\n"):
        lines.pop()
    if not lines:
        raise ValueError(f"{path}:1: the file is empty: a tab-separated file with one example a "
                         "line is due")
    if b"\t" not in lines[0] and len(lines) < total:       # an empty text could be meant
        warn(f"{path}: {total - len(lines)} empty line(s) at its end are no rows")
    if b"\r" in lines[0] and b"\n" not in lines[0]:
        raise ValueError(f"{path}:1: its lines end as on old Macs, in \\r alone: save it with the "
                         "line ends of Unix or Windows")
    for number, line in enumerate(lines, start=1):
        if len(line) > LONGEST:
            raise ValueError(f"{path}:{number}: this line is longer than {LONGEST:,} bytes: "
                             "shorten its text")
        try:
            lines[number - 1] = line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            line = b"\0"
        if b"\0" in line:
            raise ValueError(f"{path}:{number}: this line is not UTF-8: it is damaged, or UTF-16 "
                             "as Excel and Notepad write it: save the file as UTF-8")
    lines[0] = lines[0].removeprefix("\ufeff")             # a byte order mark, as MRPC's files have
    return lines


def read_table(path, names, parse, task=None, damaged=False):
    """[parse(fields)] of the rows of a TSV file; fields: a row's texts in the named columns.

    Only tabs separate: csv's quoting swallows rows of MRPC, STS-B and QNLI. A ValueError of parse,
    and a row with another number of columns than the header, become a ValueError with file:line.

    task: says which columns there are where the file has no header line.
    damaged: the official file has bad rows: up to 0.1 % of them are skipped, and counted aloud.
    """
    lines = read_lines(path)
    header = lines[0].split("\t")
    first = 1                                # index of the first row
    if task and len(header) == len(task.header):
        label = header[task.header.index(task.label)]
        if label in task.labels:             # it is a row, as in CoLA's own files
            header = task.header
            first = 0
    for name in names:
        if header.count(name) != 1:
            problem = "more than one column" if name in header else "no column"
            raise ValueError(f"{path}:1: the first line has {problem} named {name!r}: its "
                             f"tab-separated columns are {short(header)}")
    places = [header.index(name) for name in names]
    total = len(lines) - first
    if total == 0:
        raise ValueError(f"{path}:1: there is a header line but no row below it")
    allowed = 0.001 * total if damaged else 0
    skipped = 0
    rows = []
    for number, line in enumerate(lines[first:], start=first + 1):
        fields = line.split("\t")
        try:
            if len(fields) != len(header):
                raise ValueError(f"this row has {len(fields)} tab-separated columns where "
                                 f"{len(header)} are expected ({short(header)})")
            rows.append(parse([fields[place] for place in places]))
        except ValueError as error:
            skipped += 1
            if skipped > allowed:
                raise ValueError(f"{path}:{number}: {error}") from None
    if skipped:
        warn(f"{path}: skipped {skipped} damaged rows of {total}")
    return rows


def read_split(path, task, labelled=True):
    """One TSV file as a Split; with labelled=False a label column is neither needed nor read.

    Raises ValueError with file:line for what is wrong in the file, OSError if it cannot be read.
    """
    names = [*task.texts, task.label] if labelled else task.texts
    n = len(task.texts)

    def parse(fields):
        quoted = 0 if task.folder else count_quoted(fields)          # in a user's own file
        label = parse_label(task, fields[n]) if labelled else None
        return tuple(fields[:n]), label, quoted

    damaged = labelled and task.damaged      # to predict all rows stay: a submission counts them
    texts, labels, quoted = zip(*read_table(path, names, parse, task, damaged))
    if any(quoted):
        warn(f"{path}: the quotes around {sum(quoted)} of its fields are read as part of them: if "
             "a program put them there, save the file without")
    return Split(list(texts), list(labels) if labelled else None)


def count_quoted(fields):
    """How many fields stand in quotes, which may be meant.

    ValueError where quotes inside them are doubled, which is how csv says that a field has some.
    """
    quoted = [field for field in fields if re.fullmatch('"(?:[^"]|"")*"', field)]
    for field in quoted:
        if '""' in field[1:-1]:
            raise ValueError(f"the field {field[:60]!r} is quoted as csv does: only tabs separate "
                             "here, save the file without quoting")
    return len(quoted)


def parse_label(task, text):
    """The class id or the score that a label field says."""
    if task.labels:
        if text not in task.labels:
            raise ValueError(f"the label is {text[:60]!r} where one of {short(task.labels)} is "
                             "expected")
        return task.labels.index(text)
    low, high = task.score_range or (-sys.float_info.max, sys.float_info.max)
    try:
        score = float(text)
        if low <= score <= high and text.isascii() and "_" not in text:    # float() takes "1_0"
            return score
    except ValueError:
        pass
    expected = f"a number from {low:g} to {high:g}" if task.score_range else "a finite number"
    raise ValueError(f"the score is {text[:60]!r} where {expected} is expected")


# ---- a user's own files ------------------------------------------------------------------------
def read_columns(path):
    """What a user's own training file says of its task: a dict of fields of data.Task.

    Texts: `sentence1` and `sentence2` if both are there, else `sentence`. A column `score` makes it
    a regression; a column `label` a classification, with the labels that read_labels() finds.
    """
    header = read_lines(path)[0].split("\t")
    pair = ("sentence1", "sentence2")
    texts = pair if set(pair) <= set(header) else ("sentence",)
    if ("label" in header) == ("score" in header):
        hint = "" if len(header) > 1 else ", without a tab: CSV and JSON lines are not read"
        raise ValueError(f"{path}:1: the first line has to name the columns, one of label (classes)"
                         " and score (a number) beside sentence, or sentence1 and sentence2: its "
                         f"tab-separated columns are {short(header)}{hint}")
    if "score" in header:
        return {"texts": texts, "label": "score", "metrics": ("pearson", "spearman")}
    labels = read_labels(path, texts)
    if not 2 <= len(labels) <= 1000:
        raise ValueError(f"{path}: the column label has {len(labels)} different values where 2 to "
                         "1000 are expected: a number to predict belongs in a column named score")
    metrics = ("accuracy", "f1") if len(labels) == 2 else ("accuracy",)
    return {"texts": texts, "label": "label", "labels": labels, "metrics": metrics}


def read_labels(path, texts):
    """The different values of the column `label`, in numerical order if all are whole numbers.

    Else in alphabetical order. ValueError with file:line for an empty label, and for one that a row
    before spells in another way: "1", " 1", "01" and "1.0" are 1, "no" and "no " are "no". Warns of
    what may be no label at all.
    """
    spelt = {}                               # what a label means → its spelling

    def parse(fields):
        label = fields[-1]
        meaning = label.strip().strip('"').strip()
        if not meaning:
            raise ValueError("the label is empty")
        if whole := re.fullmatch("([+-]?[0-9]{1,18})([.]0*)?", meaning):
            meaning = int(whole[1])
        before = spelt.setdefault(meaning, label)
        if before != label:
            raise ValueError(f"the label is {label[:60]!r} where a row before has {before[:60]!r}: "
                             "spell each label in one way")
        return label

    labels = sorted(set(read_table(path, (*texts, "label"), parse)))
    doubtful = [label for label in labels if label.strip().lower() in NO_LABEL]
    if doubtful:
        warn(f"{path}: {short(doubtful)} is taken for a label: leave out rows that have none")
    alike = {}                               # how a label looks → all that look so
    for label in labels:
        alike.setdefault(unicodedata.normalize("NFKC", label).casefold(), []).append(label)
    for several in alike.values():
        if len(several) > 1:
            warn(f"{path}: {short(several)} are taken for different labels: spell them in one way "
                 "if they are the same")
    if all(isinstance(number, int) for number in spelt):
        return tuple(spelt[number] for number in sorted(spelt))
    return tuple(labels)


def in_unit(split, task, path):
    """A file's Split as the model sees it: scores in the task's unit, class ids as they are.

    answers() is the inverse. ValueError for scores that float32 cannot hold.
    """
    if task.labels:
        return split
    mean, deviation = task.unit
    scores = (torch.tensor(split.labels, dtype=torch.float64) - mean) / deviation
    if deviation > 1e300 or not scores.abs().max() < 1e30:
        raise ValueError(f"{path}: the scores are too far apart, or too far from those of "
                         "training, to compute with: give both files in one unit")
    return split._replace(labels=scores.tolist())


# ---- GLUE's files ------------------------------------------------------------------------------
def load_split(task, data_dir, name, labelled=True):
    """One split as a Split, from the file that find_split() finds; warns of rows lost or added.

    Raises FileNotFoundError that shows the expected layout, and what read_split() raises.
    """
    folder = Path(data_dir, task.folder)
    path = find_split(task, data_dir, name)
    if path is None:
        raise FileNotFoundError(f"there is no {folder / name}.tsv: {by_hand(task, folder)}")
    split = read_split(path, task, labelled)
    if path.name == ORIGINALS["dev"]:
        split = choose(split, path, folder / DEV_IDS, listed=name == "dev")
    n = len(split.texts)
    official = task.rows[name]
    # Copies of a damaged file differ by a few rows, by who repaired them: only a larger gap counts.
    allowed = 0.001 * official if task.damaged else 0
    if abs(n - official) > allowed:
        warn(f"{path} gives {n} rows where the official split has {official}; going on")
    return split


def find_split(task, data_dir, name):
    """Path of a split's own file, else of the original that it can be made of, else None."""
    folder = Path(data_dir, task.folder)
    path = folder / f"{name}.tsv"
    if path.exists():
        return path
    original = folder / ORIGINALS.get(name, path.name)
    is_whole = original.name != ORIGINALS["dev"] or (folder / DEV_IDS).is_file()
    return original if original.is_file() and is_whole else None


def labelled_splits(task, train):
    """The names of the splits to train and evaluate on, or to evaluate on alone."""
    wanted = ("train", "dev") if train else ("dev",)
    return [name for name in task.rows if name.startswith(wanted)]


def is_missing(task, data_dir, train=True):
    """Whether a file to train on or to evaluate on is not there, and fetch_task() can get it."""
    paths = [find_split(task, data_dir, name) for name in labelled_splits(task, train)]
    return bool(task.downloads) and None in paths           # None: it was not found


def choose(split, path, ids, listed):
    """The rows of a Split of a file whose pairs of ID_COLUMNS are lines of the file ids, or not."""
    wanted = set(read_lines(ids))
    pairs = read_table(path, ID_COLUMNS, "\t".join)
    kept = [i for i, pair in enumerate(pairs) if (pair in wanted) == listed]
    if not kept:
        raise ValueError(f"{path}: no row is left after the choice by {ids}: the two files do not "
                         "fit")
    labels = None if split.labels is None else [split.labels[i] for i in kept]
    return Split([split.texts[i] for i in kept], labels)


def by_hand(task, folder):
    """How to get a task's files without us, for error messages."""
    urls = " and ".join(f"{BASE_URL}/{address}" for address in task.downloads)
    files = [name for name in task.downloads.values() if name]
    tables = [f"{split}.tsv" for split in task.rows]       # of an archive
    return f"download {urls} by hand so that the folder {folder} holds {', '.join(files or tables)}"


# ---- predictions -------------------------------------------------------------------------------
def answers(task, predictions):
    """What predictions (N,) say: names of labels, or scores in the unit of the training file.

    predictions: class ids, or outputs of a regression, which in_unit() prepared.
    """
    values = torch.as_tensor(predictions).tolist()
    if task.labels:
        return [task.labels[value] for value in values]
    mean, deviation = task.unit
    return [value * deviation + mean for value in values]


def write_predictions(path, task, predictions, probabilities=None, clip=False):
    """Write predictions (N,) as columns index and prediction.

    probabilities: (N, classes), for a column each beside them. clip: to the task's range of scores.
    """
    values = answers(task, predictions)
    if clip and task.score_range:
        low, high = task.score_range
        values = [f"{min(max(value, low), high):.3f}" for value in values]
    rows = [["index", "prediction"], *map(list, enumerate(values))]
    if probabilities is not None:
        rows[0] += task.labels
        for row, numbers in zip(rows[1:], probabilities.tolist()):
            row += [f"{number:.6g}" for number in numbers]
    write_file(path, *("\t".join(map(str, row)) + "\n" for row in rows))


def place_of_predictions(folder, task, name):
    """Where write_submission() writes: a split without an official file gets a name of ours."""
    return Path(folder) / task.submissions.get(name, f"{name}_predictions.tsv")


def write_submission(folder, task, predictions, name="test", probabilities=None):
    """Write a test split's predictions (N,) as gluebenchmark.com wants them; returns the path."""
    official = task.rows.get(name, len(predictions))
    if len(predictions) != official:
        warn(f"{len(predictions)} predictions where the official split {name} has {official} rows")
    path = place_of_predictions(folder, task, name)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(path, task, predictions, probabilities, clip=True)
    return path
