"""GLUE's files as they are: reading TSV, fetching and unpacking, files of predictions.

A `task` is a row of the table in data.py: no code below asks which one it is. What a user can have
wrong raises ValueError or OSError with one finished sentence.
"""
import http.client
import math
import os
import re
import shutil
import tempfile
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Optional

import torch
from tqdm import tqdm

from formats.disk import one_line, reading, warn, write_file, writing

BASE_URL = "https://dl.fbaipublicfiles.com"  # the GLUE authors' downloads
DEV_IDS = "dev_ids.tsv"                      # MRPC: the ids of the original file's dev rows
ID_COLUMNS = ("#1 ID", "#2 ID")              # a line of DEV_IDS is such a pair


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


def read_lines(path):
    """The lines of a UTF-8 file. Only \\n and \\r\\n end one; str.splitlines cuts at U+2028 too."""
    with reading(path, "a tab-separated file is expected"):
        data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")      # MRPC's files start with a byte order mark
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{number}: this line is not UTF-8 text: save the file as "
                         "UTF-8") from None
    if "\0" in text:
        number = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}:{number}: this line holds a NUL byte: the file is damaged, get "
                         "it again")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:           # the piece after the last line end, and empty lines
        lines.pop()
    if not lines:
        raise ValueError(f"{path}:1: the file is empty: a tab-separated file with one example a "
                         "line is due")
    return lines


def read_table(path, names, take, header=(), damaged=False):
    """Call take(fields) with the named columns' fields of every row of a TSV file.

    Only tabs separate: csv's quoting swallows rows of MRPC, STS-B and QNLI. A ValueError of take,
    and a row with another number of columns than the header, become a ValueError with file:line.

    header: stands for the header line where the file has none.
    damaged: the official file has bad rows: up to 0.1 % of them are skipped, and counted aloud.
    """
    lines = read_lines(path)
    first = 0 if header else 1               # index of the first row
    header = header or lines[0].split("\t")
    for name in names:
        if header.count(name) != 1:
            problem = "more than one column" if name in header else "no column"
            raise ValueError(f"{path}:1: there is {problem} named {name!r}: the tab-separated "
                             f"columns are {short(header)}")
    places = [header.index(name) for name in names]
    total = len(lines) - first
    if total == 0:
        raise ValueError(f"{path}:1: there is a header line but no row below it")
    skipped = 0
    for number, line in enumerate(lines[first:], start=first + 1):
        fields = line.split("\t")
        try:
            if len(fields) != len(header):
                raise ValueError(f"this row has {len(fields)} tab-separated columns where "
                                 f"{len(header)} are expected ({short(header)})")
            take([fields[place] for place in places])
        except ValueError as error:
            skipped += 1
            if not damaged:
                raise ValueError(f"{path}:{number}: {error}") from None
            if skipped > 0.001 * total:
                raise ValueError(f"{path}:{number}: {error}, and {skipped - 1} rows before it are "
                                 "bad too") from None
    if skipped:
        warn(f"{path}: skipped {skipped} damaged rows of {total}")


def read_split(path, task, labelled=True, ids=None, listed=True):
    """One TSV file as a Split.

    labelled: if False, a label column is neither needed nor read.
    ids: pairs of a row's ID_COLUMNS, of the only rows to keep or, with listed=False, to leave out.
    Raises ValueError with file:line for what is wrong in the file, OSError if it cannot be read.
    """
    split = Split([], [] if labelled else None)
    n = len(task.texts)
    names = list(task.texts)
    if labelled:
        names.append(task.label)
    if ids is not None:
        names.extend(ID_COLUMNS)

    def take(fields):
        if ids is not None and (tuple(fields[-2:]) in ids) != listed:
            return
        if labelled:
            split.labels.append(parse_label(task, fields[n]))
        split.texts.append(tuple(fields[:n]))

    if labelled:
        read_table(path, names, take, task.header, task.damaged)
    else:                                    # all rows have to stay: a submission counts them
        read_table(path, names, take)
    if not split.texts:
        raise ValueError(f"{path}: no row is left after the choice by {DEV_IDS}: the two files do "
                         "not fit")
    return split


def parse_label(task, text):
    """The class id or the score that a label field says."""
    if task.labels:
        if text not in task.labels:
            raise ValueError(f"the label is {text[:60]!r} where one of {short(task.labels)} is "
                             "expected")
        return task.labels.index(text)
    low, high = task.score_range or (-math.inf, math.inf)
    is_decimal = text.isascii() and "_" not in text   # float() takes "1_0" and Arabic digits too
    try:
        score = float(text) if is_decimal else math.nan
    except ValueError:
        score = math.nan
    if not math.isfinite(score) or not low <= score <= high:
        expected = f"a number from {low:g} to {high:g}" if task.score_range else "a finite number"
        raise ValueError(f"the score is {text[:60]!r} where {expected} is expected")
    return score


def read_columns(path):
    """What a user's own training file says of its task: a dict of fields of data.Task.

    Texts: `sentence1` and `sentence2` if both are there, else `sentence`. A column `score` makes it
    a regression; a column `label` a classification, with the labels that read_labels() finds.
    """
    header = read_lines(path)[0].split("\t")
    pair = ("sentence1", "sentence2")
    texts = pair if set(pair) <= set(header) else ("sentence",)
    if ("score" in header) == ("label" in header):
        raise ValueError(f"{path}:1: one column named label (classes) or score (a number) is "
                         "expected beside sentence, or sentence1 and sentence2: the tab-separated "
                         f"columns are {short(header)}")
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
    before spells in another way: "1", " 1" and "01" are 1, "no" and "no " are "no".
    """
    spelt = {}                               # what a label means → its spelling

    def take(fields):
        label = fields[-1]
        meaning = label.strip()
        if not meaning:
            raise ValueError("the label is empty")
        if re.fullmatch("[+-]?[0-9]{1,18}", meaning):
            meaning = int(meaning)
        before = spelt.setdefault(meaning, label)
        if before != label:
            raise ValueError(f"the label is {label[:60]!r} where a row before has {before[:60]!r}: "
                             "spell each label in one way")

    read_table(path, (*texts, "label"), take)
    if all(isinstance(number, int) for number in spelt):
        return tuple(spelt[number] for number in sorted(spelt))
    return tuple(sorted(spelt.values()))


def load_split(task, data_dir, name, labelled=True):
    """One split as a Split, from the file that find_split() finds; warns of rows lost or added.

    Raises FileNotFoundError that shows the expected layout, and what read_split() raises.
    """
    path = find_split(task, data_dir, name)
    folder = Path(data_dir) / task.folder
    if path is None:
        raise FileNotFoundError(f"there is no {folder / name}.tsv: {by_hand(task, folder)}")
    ids = None
    _, listed = task.originals.get(name, (path.name, None))
    if path.name != f"{name}.tsv" and listed is not None:
        ids = {tuple(line.split("\t")) for line in read_lines(folder / DEV_IDS)}
    split = read_split(path, task, labelled, ids, listed)
    n = len(split.texts)
    official = task.rows[name]
    # Copies of a damaged file differ by a few rows, by who repaired them: only a larger gap counts.
    allowed = 0.001 * official if task.damaged else 0
    if abs(n - official) > allowed:
        warn(f"{path} gives {n} rows where the official split has {official}; going on")
    return split


def find_split(task, data_dir, name):
    """Path of a split: <data_dir>/<folder>/<name>.tsv, else the file it was made of, else None."""
    folder = Path(data_dir) / task.folder
    path = folder / f"{name}.tsv"
    if path.exists():
        return path
    if name not in task.originals:
        return None
    file, listed = task.originals[name]
    needed = [folder / file]
    if listed is not None:
        needed.append(folder / DEV_IDS)
    return needed[0] if all(path.is_file() for path in needed) else None


def by_hand(task, folder):
    """How to get a task's files without us, for error messages."""
    urls = " and ".join(f"{BASE_URL}/{address}" for address in task.downloads)
    files = []
    for name in task.downloads.values():
        files.extend([name] if name else table_names(task))
    return f"download {urls} by hand so that the folder {folder} holds {', '.join(files)}"


def table_names(task):
    """The files of a task's official archive."""
    return [f"{split}.tsv" for split in task.rows]


def write_predictions(path, task, values):
    """Write predictions (N,) with columns index and prediction; class ids become label names."""
    if task.labels:
        values = [task.labels[value] for value in values]
    rows = [f"{i}\t{value}\n" for i, value in enumerate(values)]
    write_file(path, "index\tprediction\n", *rows)


def write_submission(folder, task, predictions, name="test"):
    """Write a test split's predictions (N,) as gluebenchmark.com wants them; returns the path.

    Scores are clipped to the task's range. A split without an official file gets a name of ours.
    """
    values = torch.as_tensor(predictions).tolist()
    official = task.rows.get(name, len(values))
    if len(values) != official:
        warn(f"{len(values)} predictions where the official split {name} has {official} rows")
    if task.score_range:
        low, high = task.score_range
        values = [f"{min(max(value, low), high):.3f}" for value in values]
    path = Path(folder) / task.submissions.get(name, f"{name}_predictions.tsv")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(path, task, values)
    return path


# ---- fetching ----------------------------------------------------------------------------------

def fetch_task(task, data_dir="glue", base_url=BASE_URL):
    """Fetch a task's files into <data_dir>/<folder>, with a progress bar; what is there stays.

    All is written to a temporary folder beside and moved when complete: a cut download leaves
    nothing. Raises OSError or ValueError that names the address and says what to do instead.
    """
    folder = Path(data_dir) / task.folder
    advice = f"try again, or {by_hand(task, folder)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent,
                                                ignore_cleanup_errors=True)
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder.parent} ({error.strerror}): give "
                      "another one") from None
    with temporary:
        beside = Path(temporary.name) / folder.name
        beside.mkdir()
        for address, name in task.downloads.items():
            url = f"{base_url}/{address}"
            if name and not (folder / name).exists():
                download(url, beside / name, advice)
            if not name:
                download(url, beside / "archive", advice)
                extract(url, beside / "archive", table_names(task), advice)
                (beside / "archive").unlink()
        with writing(folder):
            move_files(beside, folder)


def move_files(beside, folder):
    """Move a folder's files to where `folder` is, or to where it has none of that name.

    A new folder appears whole. In one that is there the test files come first: if this is ended
    on the way, a file that find_split() looks for in training is missing, and is fetched again.
    """
    if not folder.exists():
        try:
            os.rename(beside, folder)
            return
        except OSError:                      # another process was faster
            if not folder.exists():
                raise
    for path in sorted(beside.iterdir(), key=lambda path: not path.name.startswith("test")):
        if not (folder / path.name).exists():
            os.replace(path, folder / path.name)


def download(url, path, advice, timeout=60):
    """Fetch one address into a file."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, open(path, "wb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            # disable=None: silent where stderr is no terminal
            with tqdm(total=length or None, unit="B", unit_scale=True, disable=None,
                      desc=url.rsplit("/", 1)[-1]) as bar:
                while chunk := response.read(1 << 16):
                    bar.update(file.write(chunk))
            if length and file.tell() != length:
                raise OSError(f"the connection ended after {file.tell()} of {length} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"could not fetch {url} ({one_line(error)}): {advice}") from None


def extract(url, archive, names, advice):
    """Write the TSV files of these names beside the archive."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = find_members(zipped, names)
            needed = [name for name in names if not name.startswith("test")]
            missing = [name for name in needed if name not in members]
            if missing:
                raise ValueError(f"it does not hold {', '.join(missing)}")
            for name, member in members.items():
                with zipped.open(member) as source, open(archive.parent / name, "wb") as target:
                    shutil.copyfileobj(source, target)
    except Exception as error:               # a broken archive makes zlib, struct and others raise
        raise ValueError(f"the archive from {url} cannot be used ({error}): {advice}") from None


def find_members(zipped, names):
    """{name: its member of an open zip file}, whatever the archive's top folder is called."""
    members = {}
    for info in zipped.infolist():
        parts = PurePosixPath(info.filename.replace("\\", "/")).parts
        is_link = info.external_attr >> 28 == 0o12   # the file type, in the top bits of a Unix mode
        if is_link or not parts or ".." in parts or parts[0] == "/" or ":" in parts[0]:
            raise ValueError(f"its member {info.filename[:100]!r} points out of the folder")
        if parts[-1] in names and len(parts) < 3:    # QQP-clean.zip has QQP/original/train.tsv too
            if parts[-1] in members:
                raise ValueError(f"it holds more than one {parts[-1]}")
            members[parts[-1]] = info
    return members
