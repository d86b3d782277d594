"""GLUE's tasks and their files: the table of tasks, reading, fetching, files of predictions.

A task is one row of TASKS, and no code below asks for its name: whatever sets one apart (CoLA has no header
line, MNLI two dev sets, MRPC its originals, STS-B is a regression) is an entry of that row. User errors raise
ValueError or OSError with one finished sentence.
"""
import http.client
import math
import os
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Optional

import torch
from tqdm import tqdm

from formats.disk import write_file, writing

BASE_URL = "https://dl.fbaipublicfiles.com"  # the GLUE authors' downloads


class Task(NamedTuple):
    """One task: where its files are, what their columns mean, how predictions are scored and handed in."""
    folder: str                      # below the data folder, as in the official archives
    rows: dict                       # split → official row count; the split "dev" is the file dev.tsv
    texts: tuple                     # header names of the one or two text columns
    label: str                       # header name of the label column
    labels: tuple = ()               # label names as in the files, in order of class ids; empty: regression
    metrics: tuple = ("accuracy",)   # names in METRICS; the first one selects the best
    header: tuple = ()               # stands for the header line where *labelled* files have none (CoLA)
    score_range: tuple = ()          # of a regression: lowest and highest score
    damaged: bool = False            # the official files have bad rows: up to 0.1 % of them may be skipped
    downloads: dict = {}             # address below BASE_URL → name to keep it under, "" for a zip of TSVs
    submissions: dict = {}           # test split → file name that gluebenchmark.com asks for
    originals: dict = {}             # split → (stand-in for an absent TSV, its rows listed in DEV_IDS?)
    make: str = ""                   # question of the demo's language that gives the rows; no files needed


class Split(NamedTuple):
    """One file's rows: tuples of one or two strings; class ids (int), scores (float) or None (unlabelled)."""
    texts: list
    labels: Optional[list]

    def part(self, start, stop):
        """Rows start .. stop − 1; all from start on if stop is None."""
        return Split(self.texts[start:stop], self.labels[start:stop] if self.labels is not None else None)


# ---- the tasks ---------------------------------------------------------------------------------------------

BINARY, PAIR = ("0", "1"), ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
MSR_TRAIN, MSR_TEST, DEV_IDS = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv"
ID_COLUMNS = ("#1 ID", "#2 ID")  # of the MSR files; a line of DEV_IDS holds such a pair

TASKS = {
    "cola": Task("CoLA", dict(train=8551, dev=1043, test=1063), ("sentence",), "label", BINARY, ("matthews",),
                 header=("source", "label", "author's mark", "sentence"),
                 downloads={"glue/data/CoLA.zip": ""}, submissions={"test": "CoLA.tsv"}),
    "sst2": Task("SST-2", dict(train=67349, dev=872, test=1821), ("sentence",), "label", BINARY,
                 downloads={"glue/data/SST-2.zip": ""}, submissions={"test": "SST-2.tsv"}),
    "mrpc": Task("MRPC", dict(train=3668, dev=408, test=1725), ("#1 String", "#2 String"), "Quality", BINARY,
                 ("accuracy", "f1"), submissions={"test": "MRPC.tsv"},
                 downloads={f"senteval/senteval_data/{MSR_TRAIN}": MSR_TRAIN,
                            f"senteval/senteval_data/{MSR_TEST}": "test.tsv",
                            "glue/data/mrpc_dev_ids.tsv": DEV_IDS},
                 originals={"train": (MSR_TRAIN, False), "dev": (MSR_TRAIN, True), "test": (MSR_TEST, None)}),
    "qqp": Task("QQP", dict(train=363846, dev=40430, test=390965), ("question1", "question2"), "is_duplicate",
                BINARY, ("accuracy", "f1"), damaged=True,
                downloads={"glue/data/QQP-clean.zip": ""}, submissions={"test": "QQP.tsv"}),
    "stsb": Task("STS-B", dict(train=5749, dev=1500, test=1379), PAIR, "score", (), ("pearson", "spearman"),
                 score_range=(0.0, 5.0),
                 downloads={"glue/data/STS-B.zip": ""}, submissions={"test": "STS-B.tsv"}),
    "mnli": Task("MNLI", dict(train=392702, dev_matched=9815, dev_mismatched=9832, test_matched=9796,
                              test_mismatched=9847),
                 PAIR, "gold_label", ("entailment", "neutral", "contradiction"),
                 downloads={"glue/data/MNLI.zip": ""},
                 submissions={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"}),
    "qnli": Task("QNLI", dict(train=104743, dev=5463, test=5463), ("question", "sentence"), "label",
                 ENTAILMENT, downloads={"glue/data/QNLIv2.zip": ""}, submissions={"test": "QNLI.tsv"}),
    "rte": Task("RTE", dict(train=2490, dev=277, test=3000), PAIR, "label", ENTAILMENT,
                downloads={"glue/data/RTE.zip": ""}, submissions={"test": "RTE.tsv"}),
    "demo": Task("demo", dict(train=2000, dev=1000), ("sentence",), "label", BINARY,
                 make="adapt"),
}


def get_task(task):
    """The row of TASKS with that name; a Task is returned as it is."""
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}: the tasks are {', '.join(TASKS)}")
    return TASKS[task]


# ---- reading files -----------------------------------------------------------------------------------------

def _warn(text):
    print(f"warning: {text}", file=sys.stderr)


def _short(values):
    """Values for an error message: quoted, control characters escaped, cut where a file holds nonsense."""
    text = ", ".join(repr(value[:60]) for value in values[:30])
    return text if len(text) <= 200 and len(values) <= 30 else text[:200] + " ..."


def _read_lines(path):
    """The lines of a UTF-8 file. Only \\n and \\r\\n end a line: str.splitlines also cuts at U+2028 etc."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}): a tab-separated file is expected") from None
    try:
        text = data.decode("utf-8-sig")  # MRPC's files start with a byte order mark
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{number}: this line is not UTF-8 text: save the file as UTF-8") from None
    if "\0" in text:
        number = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}:{number}: this line holds a NUL byte: the file is damaged, get it again")
    lines = [line[:-1] if line.endswith("\r") else line for line in text.split("\n")]
    while lines and not lines[-1]:  # the piece after the last line end, and empty lines there
        lines.pop()
    if not lines:
        raise ValueError(f"{path}:1: the file is empty: a tab-separated file with one example a line is due")
    return lines


def _read_table(path, names, convert, header=(), damaged=False):
    """convert(fields of the named columns) for every row of a TSV file; `header` where the file has none.

    Only tabs separate. A quotation mark is a character like any other: csv's quoting swallows rows of MRPC,
    STS-B and QNLI. A row with other than the header's number of columns, or one that convert refuses, is a
    ValueError with file:line. Of a damaged file up to 0.1 % of the rows are skipped, and counted aloud.
    """
    lines = _read_lines(path)
    first = 0 if header else 1
    header = list(header) or lines[0].split("\t")
    for name in names:
        if header.count(name) != 1:
            problem = "more than one column" if name in header else "no column"
            raise ValueError(f"{path}:1: there is {problem} named {name!r}: the tab-separated columns are "
                             f"{_short(header)}")
    if len(lines) == first:
        raise ValueError(f"{path}:1: there is a header line but no row below it")
    columns = [header.index(name) for name in names]
    rows, skipped = [], 0
    for number, line in enumerate(lines[first:], first + 1):
        fields = line.split("\t")
        try:
            if len(fields) != len(header):
                raise ValueError(f"this row has {len(fields)} tab-separated columns where {len(header)} are "
                                 f"expected ({_short(header)})")
            rows.append(convert([fields[column] for column in columns]))
        except ValueError as error:
            skipped += 1
            if not damaged or skipped > 0.001 * (len(lines) - first):
                more = f", and {skipped - 1} rows before it are bad too" if damaged else ""
                raise ValueError(f"{path}:{number}: {error}{more}") from None
    if skipped:
        _warn(f"{path}: skipped {skipped} damaged rows of {len(lines) - first}")
    return rows


def _parse_label(task, text):
    """The class id or score that a label field says."""
    if task.labels:
        if text not in task.labels:
            raise ValueError(f"the label is {text[:60]!r} where one of {_short(task.labels)} is expected")
        return task.labels.index(text)
    low, high = task.score_range or (-math.inf, math.inf)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score) or not low <= score <= high:
        expected = f"a number from {low:g} to {high:g}" if task.score_range else "a finite number"
        raise ValueError(f"the score is {text[:60]!r} where {expected} is expected")
    return score


def read_split(path, task, labelled=True, keep=None):
    """One TSV file as a Split; with labelled=False a label column is neither needed nor read.

    keep: a function of the two ID_COLUMNS of a row; rows for which it is false are left out.
    Raises ValueError with file:line for whatever is wrong in the file, OSError if it cannot be read.
    """
    task = get_task(task)
    names = task.texts + ((task.label,) if labelled else ()) + (ID_COLUMNS if keep else ())
    n = len(task.texts)

    def convert(fields):
        if keep and not keep(tuple(fields[-2:])):
            return None
        return tuple(fields[:n]), _parse_label(task, fields[n]) if labelled else None

    # An unlabelled file must keep all its rows: a submission counts them.
    rows = _read_table(path, names, convert, task.header if labelled else (), task.damaged and labelled)
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError(f"{path}: no row is left after the choice by {DEV_IDS}: the two files do not fit")
    return Split([row[0] for row in rows], [row[1] for row in rows] if labelled else None)


def _by_hand(task, folder):
    """How to get a task's files without us, for error messages."""
    urls = " and ".join(f"{BASE_URL}/{address}" for address in task.downloads)
    files = [name or ", ".join(f"{split}.tsv" for split in task.rows) for name in task.downloads.values()]
    return f"download {urls} by hand so that the folder {folder} holds {', '.join(files)}"


def load_split(task, data_dir, name, labelled=True):
    """One split as a Split, from <data_dir>/<folder>/<name>.tsv or, where that is absent, from its originals.

    Warns if its number of rows is not the official one. Raises FileNotFoundError that shows the expected
    layout, and what read_split raises.
    """
    task = get_task(task)
    folder = Path(data_dir) / task.folder
    path, keep = folder / f"{name}.tsv", None
    original, listed = task.originals.get(name, ("", None))
    needed = [original] if listed is None else [original, DEV_IDS]
    if not path.exists() and all((folder / file).is_file() for file in needed):
        path = folder / original
        if listed is not None:
            ids = {tuple(line.split("\t")) for line in _read_lines(folder / DEV_IDS)}
            keep = lambda pair: (pair in ids) == listed
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: {_by_hand(task, folder)}")
    split = read_split(path, task, labelled, keep)
    n, official = len(split.texts), task.rows[name]
    # Copies of a damaged file differ by a few rows, by who repaired them: only a larger gap says anything.
    if abs(n - official) > (0.001 * official if task.damaged else 0):
        _warn(f"{path} gives {n} rows where the official split has {official}; going on")
    return split


def own_task(train_file):
    """A Task for a user's own TSV files, read off the training file; read_split then reads all of them.

    The header line decides. Texts: `sentence1` and `sentence2` if both are there, else `sentence`. A column
    `score` makes it a regression; a column `label` a classification, whose labels are the different values in
    the training file, in numerical order if all are whole numbers, else in alphabetical order.
    """
    header = _read_lines(train_file)[0].split("\t")
    texts = PAIR if set(PAIR) <= set(header) else ("sentence",)
    if ("score" in header) == ("label" in header):
        raise ValueError(f"{train_file}:1: one column named label (classes) or score (a number) is expected "
                         "beside sentence, or sentence1 and sentence2: the tab-separated columns are "
                         f"{_short(header)}")
    if "score" in header:
        return Task("", {}, texts, "score", (), ("pearson", "spearman"))

    def convert(fields):
        if not fields[-1].strip():
            raise ValueError("the label is empty")
        return fields[-1]

    labels = sorted(set(_read_table(train_file, texts + ("label",), convert)))
    try:
        labels.sort(key=int)
    except ValueError:
        pass  # not whole numbers: alphabetical
    if not 2 <= len(labels) <= 1000:
        raise ValueError(f"{train_file}: the column label has {len(labels)} different values where 2 to 1000 "
                         "are expected: a number to predict belongs in a column named score")
    return Task("", {}, texts, "label", tuple(labels), ("accuracy", "f1")[:2 if len(labels) == 2 else 1])


# ---- fetching ----------------------------------------------------------------------------------------------

def fetch_task(task, data_dir="glue", base_url=BASE_URL):
    """Fetch a task's files into <data_dir>/<folder>, with a progress bar; files that are there already stay.

    Everything is written to a temporary folder beside and moved when complete: a cut download leaves nothing.
    Raises OSError or ValueError that names the address and says what to do instead.
    """
    task = get_task(task)
    folder = Path(data_dir) / task.folder
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{task.folder}.", dir=data_dir,
                                                ignore_cleanup_errors=True)
    except OSError as error:
        raise OSError(f"cannot write to the folder {data_dir} ({error.strerror}): give another one") from None
    with temporary:
        beside = Path(temporary.name)
        for address, name in task.downloads.items():
            url, advice = f"{base_url}/{address}", f"try again, or {_by_hand(task, folder)}"
            _download(url, beside / (name or "archive"), advice)
            if not name:
                _extract(url, beside / "archive", [f"{split}.tsv" for split in task.rows], advice)
                (beside / "archive").unlink()
        folder.mkdir(exist_ok=True)
        for path in beside.iterdir():
            if not (folder / path.name).exists():
                os.replace(path, folder / path.name)


def _download(url, path, advice, timeout=60):
    """Fetch one address into a file."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, open(path, "wb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=length or None, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1],
                      disable=None) as bar:  # None: silent where stderr is no terminal
                while chunk := response.read(1 << 16):
                    bar.update(file.write(chunk))
            if length and file.tell() != length:
                raise OSError(f"the connection ended after {file.tell()} of {length} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"could not fetch {url} ({error or type(error).__name__}): {advice}") from None


def _extract(url, archive, names, advice):
    """Write the TSV files of these names beside the archive, whatever its top folder is called."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = {}
            for info in zipped.infolist():
                parts = PurePosixPath(info.filename.replace("\\", "/")).parts
                link = info.external_attr >> 28 == 0o12  # the file type, in the top bits of a Unix mode
                if link or not parts or ".." in parts or parts[0] == "/" or ":" in parts[0]:
                    raise ValueError(f"its member {info.filename[:100]!r} points out of the folder")
                if len(parts) <= 2 and parts[-1] in names:  # QQP-clean.zip: QQP/train.tsv, QQP/original/...
                    if parts[-1] in members:
                        raise ValueError(f"it holds more than one {parts[-1]}")
                    members[parts[-1]] = info
            missing = [name for name in names if name not in members and not name.startswith("test")]
            if missing:
                raise ValueError(f"it does not hold {', '.join(missing)}")
            for name, info in members.items():
                with zipped.open(info) as source, open(archive.parent / name, "wb") as target:
                    shutil.copyfileobj(source, target)
    except Exception as error:  # zipfile lets zlib, struct, EOF and other errors of a broken archive through
        raise ValueError(f"the archive from {url} cannot be used ({error}): {advice}") from None


# ---- predictions -------------------------------------------------------------------------------------------

def write_predictions(path, task, values):
    """Write predictions (N,) with columns index and prediction; class ids become the names of labels."""
    values = [task.labels[value] for value in values] if task.labels else values
    write_file(path, "index\tprediction\n", *(f"{i}\t{value}\n" for i, value in enumerate(values)))


def write_submission(folder, task, predictions, name="test"):
    """Write a test split's predictions (N,) as gluebenchmark.com wants them; returns the file's path.

    Scores are clipped to the task's range. A split without an official file name goes to
    <name>_predictions.tsv.
    """
    task, values = get_task(task), torch.as_tensor(predictions).tolist()
    if len(values) != task.rows.get(name, len(values)):
        _warn(f"{len(values)} predictions where the official split {name} has {task.rows[name]} rows")
    if task.score_range:
        low, high = task.score_range
        values = [f"{min(max(value, low), high):.3f}" for value in values]
    path = Path(folder) / task.submissions.get(name, f"{name}_predictions.tsv")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(path, task, values)
    return path
