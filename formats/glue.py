"""GLUE's files as they are: reading TSV, fetching and unpacking, files of predictions.

A `task` here is a row of the table in data.py: it names the folder, the columns, the labels and
the addresses, and no code below asks which task it is. What a user can have wrong raises
ValueError or OSError with one finished sentence.
"""
import contextlib
import http.client
import math
import os
import re
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Optional

import torch
from tqdm import tqdm

from formats.disk import one_line, write_file, writing

BASE_URL = "https://dl.fbaipublicfiles.com"  # the GLUE authors' downloads
DEV_IDS = "dev_ids.tsv"                      # MRPC: the ids of the original file's dev rows
ID_COLUMNS = ("#1 ID", "#2 ID")              # a line of DEV_IDS is such a pair


class Split(NamedTuple):
    """The rows of one file."""
    texts: list               # a tuple of one or two strings for each row
    labels: Optional[list]    # a class id (int) or a score (float) for each; None: unlabelled

    def part(self, start, stop):
        """Rows start .. stop − 1; all from start on if stop is None."""
        labels = None
        if self.labels is not None:
            labels = self.labels[start:stop]
        return Split(self.texts[start:stop], labels)


# ---- reading a table ---------------------------------------------------------------------------

def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def short(values):
    """Values for an error message: quoted, and cut where a file holds nonsense."""
    text = ", ".join(repr(value[:60]) for value in values[:30])
    if len(text) > 200 or len(values) > 30:
        return text[:200] + " ..."
    return text


def read_lines(path):
    """The lines of a UTF-8 file. Only \\n and \\r\\n end one; str.splitlines cuts at U+2028 too."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}): a tab-separated file is "
                      "expected") from None
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


def read_header(path):
    """The names of a TSV file's columns."""
    return read_lines(path)[0].split("\t")


def read_table(path, names, take, header=(), damaged=False):
    """Call take(fields) with the named columns' fields of every row of a TSV file.

    Only tabs separate. A quotation mark is a character like any other: csv's quoting swallows rows
    of MRPC, STS-B and QNLI.

    names: of the columns. header: stands for the header line where the file has none.
    take: raises ValueError for a row that is wrong, which becomes one with file:line, as does a row
        with another number of columns than the header.
    damaged: the official file has bad rows: up to 0.1 % of them are skipped, and counted aloud.
    """
    lines = read_lines(path)
    first = 0                                # index of the first row
    if not header:
        header = lines[0].split("\t")
        first = 1
    places = find_columns(path, header, names)
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


def find_columns(path, header, names):
    """The index of each named column; ValueError unless there is one of that name."""
    for name in names:
        if header.count(name) != 1:
            problem = "more than one column" if name in header else "no column"
            raise ValueError(f"{path}:1: there is {problem} named {name!r}: the tab-separated "
                             f"columns are {short(header)}")
    return [header.index(name) for name in names]


# ---- reading a split ---------------------------------------------------------------------------

def read_split(path, task, labelled=True, keep=None):
    """One TSV file as a Split.

    labelled: if False, a label column is neither needed nor read.
    keep: a function of a row's two ID_COLUMNS; rows for which it is false are left out.
    Raises ValueError with file:line for what is wrong in the file, OSError if it cannot be read.
    """
    split = Split([], [] if labelled else None)
    n = len(task.texts)
    names = list(task.texts)
    if labelled:
        names.append(task.label)
    if keep:
        names.extend(ID_COLUMNS)

    def take(fields):
        if keep and not keep(fields[-2], fields[-1]):
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
    score = parse_number(text)
    if not math.isfinite(score) or not low <= score <= high:
        expected = "a finite number"
        if task.score_range:
            expected = f"a number from {low:g} to {high:g}"
        raise ValueError(f"the score is {text[:60]!r} where {expected} is expected")
    return score


def parse_number(text):
    """A decimal number; NaN for any other text, also for "1_0" and the digits of other scripts."""
    if "_" in text or not text.isascii():
        return math.nan
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_labels(path, texts):
    """The different values of the column `label` beside the columns `texts`, as a tuple.

    In numerical order if all are whole numbers, else in alphabetical order. ValueError with
    file:line for an empty label, and for one that stands in a row before in another spelling.
    """
    spelt = {}                               # what a label means → its spelling

    def take(fields):
        label = fields[-1]
        if not label.strip():
            raise ValueError("the label is empty")
        before = spelt.setdefault(meaning(label), label)
        if before != label:
            raise ValueError(f"the label is {label[:60]!r} where a row before has {before[:60]!r}: "
                             "spell each label in one way")

    read_table(path, (*texts, "label"), take)
    if all(isinstance(number, int) for number in spelt):
        return tuple(spelt[number] for number in sorted(spelt))
    return tuple(sorted(spelt.values()))


def meaning(label):
    """What is equal for two spellings of a label: "1", " 1" and "01" are 1, "no" and "no " "no"."""
    text = label.strip()
    if re.fullmatch("[+-]?[0-9]{1,18}", text):
        return int(text)
    return text


# ---- the files of a task -----------------------------------------------------------------------

def load_split(task, data_dir, name, labelled=True):
    """One split as a Split, from the file that find_split() finds.

    Warns if its number of rows is not the official one. Raises FileNotFoundError that shows the
    expected layout, and what read_split() raises.
    """
    path = find_split(task, data_dir, name)
    folder = Path(data_dir) / task.folder
    if path is None:
        raise FileNotFoundError(f"there is no {folder / name}.tsv: {by_hand(task, folder)}")
    keep = None
    if path.name != f"{name}.tsv":
        _, listed = task.originals[name]
        if listed is not None:
            keep = choice_by_ids(folder / DEV_IDS, listed)
    split = read_split(path, task, labelled, keep)
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
    if all(path.is_file() for path in needed):
        return folder / file
    return None


def choice_by_ids(path, listed):
    """A function of a row's two ids: whether they are in a file, or with listed=False are not."""
    ids = {tuple(line.split("\t")) for line in read_lines(path)}

    def is_chosen(*pair):
        return (pair in ids) == listed

    return is_chosen


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


# ---- fetching ----------------------------------------------------------------------------------

def fetch_task(task, data_dir="glue", base_url=BASE_URL):
    """Fetch a task's files into <data_dir>/<folder>, with a progress bar; what is there stays.

    Everything is written to a temporary folder beside and moved when complete: a cut download
    leaves nothing. Raises OSError or ValueError that names the address and says what to do instead.
    """
    folder = Path(data_dir) / task.folder
    advice = f"try again, or {by_hand(task, folder)}"
    with folder_beside(folder) as beside:
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
    files = list(beside.iterdir())
    files.sort(key=is_for_training)
    for path in files:
        if not (folder / path.name).exists():
            os.replace(path, folder / path.name)


def is_for_training(path):
    return not path.name.startswith("test")


@contextlib.contextmanager
def folder_beside(folder):
    """A new folder of the same name on the same disk, which is gone after the block."""
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent,
                                                ignore_cleanup_errors=True)
    except OSError as error:
        raise OSError(f"cannot write to the folder {parent} ({error.strerror}): give another "
                      "one") from None
    with temporary:
        beside = Path(temporary.name) / folder.name
        beside.mkdir()
        yield beside


def download(url, path, advice, timeout=60):
    """Fetch one address into a file."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, open(path, "wb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            name = url.rsplit("/", 1)[-1]
            # disable=None: silent where stderr is no terminal
            with tqdm(total=length or None, unit="B", unit_scale=True, desc=name,
                      disable=None) as bar:
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
            missing = [name for name in names
                       if name not in members and not name.startswith("test")]
            if missing:
                raise ValueError(f"it does not hold {', '.join(missing)}")
            for name, member in members.items():
                with zipped.open(member) as source, open(archive.parent / name, "wb") as target:
                    shutil.copyfileobj(source, target)
    except Exception as error:               # a broken archive makes zlib, struct and others raise
        raise ValueError(f"the archive from {url} cannot be used ({error}): {advice}") from None


def find_members(zipped, names):
    """{name: its member of an open zip file}, whatever the archive's top folder is called.

    ValueError for a member that points out of the folder, and for two of one name.
    """
    members = {}
    for info in zipped.infolist():
        parts = PurePosixPath(info.filename.replace("\\", "/")).parts
        is_link = info.external_attr >> 28 == 0o12   # the file type, in the top bits of a Unix mode
        if is_link or not parts or ".." in parts or parts[0] == "/" or ":" in parts[0]:
            raise ValueError(f"its member {info.filename[:100]!r} points out of the folder")
        if len(parts) > 2:                   # QQP-clean.zip holds QQP/original/train.tsv too
            continue
        if parts[-1] in names:
            if parts[-1] in members:
                raise ValueError(f"it holds more than one {parts[-1]}")
            members[parts[-1]] = info
    return members


# ---- predictions -------------------------------------------------------------------------------

def write_predictions(path, task, values):
    """Write predictions (N,) with columns index and prediction; class ids become label names."""
    lines = ["index\tprediction\n"]
    for i, value in enumerate(values):
        if task.labels:
            value = task.labels[value]
        lines.append(f"{i}\t{value}\n")
    write_file(path, "".join(lines))


def write_submission(folder, task, predictions, name="test"):
    """Write a test split's predictions (N,) as gluebenchmark.com wants them.

    Scores are clipped to the task's range. Returns the path: the official file name or, for a
    split without one, <name>_predictions.tsv.
    """
    values = torch.as_tensor(predictions).tolist()
    official = task.rows.get(name)
    if official is not None and len(values) != official:
        warn(f"{len(values)} predictions where the official split {name} has {official} rows")
    if task.score_range:
        low, high = task.score_range
        values = [f"{min(max(value, low), high):.3f}" for value in values]
    path = Path(folder) / task.submissions.get(name, f"{name}_predictions.tsv")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(path, task, values)
    return path
