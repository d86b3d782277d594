"""GLUE's files as they are: reading TSV, fetching and unpacking, files of predictions.

A `task` is a row of the table in data.py: no code below asks which one it is. What a user can have
wrong raises ValueError or OSError with one finished sentence.
"""
import contextlib
import http.client
import math
import os
import re
import shutil
import time
import urllib.parse
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Optional

import torch
from tqdm import tqdm

from formats.disk import one_line, private_folder, reading, warn, write_file, writing

BASE_URL = "https://dl.fbaipublicfiles.com"  # the GLUE authors' downloads
DEV_IDS = "dev_ids.tsv"                      # MRPC: the ids of the original file's dev rows
ID_COLUMNS = ("#1 ID", "#2 ID")              # a line of DEV_IDS is such a pair
NO_LABEL = ("-", "-1", "nan", "null", "n/a", "?")  # as SNLI, the Hub, pandas and others write it
LONGEST = 1_000_000                          # bytes of a line; a tokenizer takes 150 times as much
ROW_BYTES = 4096                             # of an official row at most, on average; MNLI's: 900
HOURS = 2                                    # for a download at most


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
    lines = []
    with reading(path, "a tab-separated file is expected"), open(path, "rb") as file:
        while (line := file.readline(LONGEST + 1)) and len(line) <= LONGEST:
            lines.append(line)
    first = (lines + [line])[0]
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}:1: this file is UTF-16, as of Excel or Notepad: save it as UTF-8")
    if b"\r" in first and b"\n" not in first:
        raise ValueError(f"{path}:1: its lines end as on old Macs, in \\r alone: save it with the "
                         "line ends of Unix or Windows")
    if line:
        raise ValueError(f"{path}:{len(lines) + 1}: this line is longer than {LONGEST:,} bytes: "
                         "shorten its text")
    for number, line in enumerate(lines, start=1):
        try:                                 # MRPC's files start with a byte order mark
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}:{number}: this line is not UTF-8 text: save the file as "
                             "UTF-8") from None
        if "\0" in text:
            raise ValueError(f"{path}:{number}: this line holds a NUL byte: the file is damaged "
                             "or UTF-16: get it again, or save it as UTF-8")
        lines[number - 1] = text.removesuffix("\n").removesuffix("\r")
    while lines and not lines[-1]:           # empty lines at the end
        lines.pop()
    if not lines:
        raise ValueError(f"{path}:1: the file is empty: a tab-separated file with one example a "
                         "line is due")
    return lines


def is_row(fields, task):
    """Whether a file's first line is a row already, as in CoLA's labelled files.

    CoLA's test file has a header line, and copies of the others may have one: a row is known by its
    number of columns and its label.
    """
    if len(fields) != len(task.header):
        return False
    return fields[task.header.index(task.label)] in task.labels


def read_table(path, names, take, task=None, damaged=False):
    """Call take(fields) with the named columns' fields of every row of a TSV file.

    Only tabs separate: csv's quoting swallows rows of MRPC, STS-B and QNLI. A ValueError of take,
    and a row with another number of columns than the header, become a ValueError with file:line.

    task: says which columns there are where the file has no header line.
    damaged: the official file has bad rows: up to 0.1 % of them are skipped, and counted aloud.
    """
    lines = read_lines(path)
    header = lines[0].split("\t")
    first = 1                                # index of the first row
    if task and is_row(header, task):
        header, first = task.header, 0
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
    quoted = 0

    def take(fields):
        nonlocal quoted
        if not task.folder:                  # a user's own file, of whatever program
            quoted += count_quoted(names, fields)
        if ids is not None and (tuple(fields[-2:]) in ids) != listed:
            return
        if labelled:
            split.labels.append(parse_label(task, fields[n]))
        split.texts.append(tuple(fields[:n]))

    if labelled:
        read_table(path, names, take, task, task.damaged)
    else:                                    # all rows have to stay: a submission counts them
        read_table(path, names, take, task)
    if quoted:
        warn(f"{path}: the quotes around {quoted} of its fields are read as part of them: if a "
             "program put them there, save the file without")
    if not split.texts:
        raise ValueError(f"{path}: no row is left after the choice by {DEV_IDS}: the two files do "
                         "not fit")
    return split


def count_quoted(names, fields):
    """How many fields stand in quotes, which may be meant.

    ValueError where quotes inside them are doubled, which is how csv says that a field has some.
    """
    count = 0
    for name, field in zip(names, fields):
        inside = field[1:-1]
        if field == f'"{inside}"' and '"' not in inside.replace('""', ""):
            count += 1
            if '""' in inside:
                raise ValueError(f"the column {name} is {field[:60]!r}, quoted as csv does: only "
                                 "tabs separate here, save the file without quoting")
    return count


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
    if "score" in header and "label" in header:
        raise ValueError(f"{path}:1: there are both a column label (classes) and a column score (a "
                         "number to predict): give the one that is not meant another name")
    if "score" not in header and "label" not in header:
        hint = "" if len(header) > 1 else ", without a tab: CSV and JSON lines are not read"
        raise ValueError(f"{path}:1: one column named label (classes) or score (a number) is "
                         "expected beside sentence, or sentence1 and sentence2: the tab-separated "
                         f"columns are {short(header)}{hint}")
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
    what may be no label at all, and of classes with hardly a row.
    """
    spelt = {}                               # what a label means → its spelling
    counts = Counter()                       # spelling → rows

    def take(fields):
        label = fields[-1]
        counts[label] += 1
        meaning = label.strip().strip('"').strip()
        if not meaning:
            raise ValueError("the label is empty")
        if whole := re.fullmatch("([+-]?[0-9]{1,18})([.]0*)?", meaning):
            meaning = int(whole[1])
        before = spelt.setdefault(meaning, label)
        if before != label:
            raise ValueError(f"the label is {label[:60]!r} where a row before has {before[:60]!r}: "
                             "spell each label in one way")

    read_table(path, (*texts, "label"), take)
    total = counts.total()
    doubtful = [label for label in counts if label.strip().lower() in NO_LABEL]
    rare = [label for label in counts if counts[label] < 0.01 * total]
    if doubtful:
        warn(f"{path}: {short(doubtful)} is taken for a label: leave out rows that have none")
    if rare:
        warn(f"{path}: fewer than 1 % of the {total} rows have the label {short(rare)}")
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
    columns = ["index", "prediction"]
    values = answers(task, predictions)
    if clip and task.score_range:
        low, high = task.score_range
        values = [f"{min(max(value, low), high):.3f}" for value in values]
    rows = [[str(i), str(value)] for i, value in enumerate(values)]
    if probabilities is not None:
        columns.extend(task.labels)
        for row, numbers in zip(rows, probabilities.tolist()):
            row.extend(f"{number:.6g}" for number in numbers)
    write_file(path, *("\t".join(row) + "\n" for row in [columns, *rows]))


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


# ---- fetching ----------------------------------------------------------------------------------

def fetch_task(task, data_dir="glue", base_url=BASE_URL):
    """Fetch a task's files into <data_dir>/<folder>, with a progress bar; what is there stays.

    All is written to a private folder beside and moved when complete: a cut download leaves
    nothing. Raises OSError or ValueError that names the address and says what to do instead.
    """
    folder = Path(data_dir) / task.folder
    advice = f"try again, or {by_hand(task, folder)}"
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = stack.enter_context(private_folder(folder.parent)) / folder.name
            beside.mkdir()
        except OSError as error:
            raise OSError(f"cannot write to the folder {folder.parent} ({error.strerror}): give "
                          "another one") from None
        most = ROW_BYTES * sum(task.rows.values())         # bytes, packed and unpacked
        for address, name in task.downloads.items():
            url = f"{base_url}/{address}"
            if name and not (folder / name).exists():
                download(url, beside / name, advice, most)
                check_table(url, beside / name, task, advice)
            if not name:
                download(url, beside / "archive", advice, most)
                extract(url, beside / "archive", table_names(task), advice, most)
                (beside / "archive").unlink()
        with writing(folder):
            move_files(beside, folder)


def check_table(url, path, task, advice):
    """ValueError for a fetched file that is no whole table of the task: a login page, say."""
    try:
        if path.name == DEV_IDS:
            is_whole = all(re.fullmatch("[0-9]+\t[0-9]+", line) for line in read_lines(path))
        else:
            is_whole = bool(read_split(path, task, labelled=False).texts)
    except ValueError:
        is_whole = False
    if not is_whole:
        raise ValueError(f"{url} gives something else than {path.name}: {advice}")


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


class HttpsAlone(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https; on this machine itself, as in tests, to http too."""

    def redirect_request(self, request, file, code, message, headers, url):
        check_address(url, request.full_url)
        return super().redirect_request(request, file, code, message, headers, url)


def check_address(url, before):
    """ValueError for an address that is not https, nor, as the one before it, of this machine."""
    hosts = ("127.0.0.1", "localhost")
    parts = [urllib.parse.urlsplit(address) for address in (url, before)]
    is_local = all(part.scheme == "http" and part.hostname in hosts for part in parts)
    if parts[0].scheme != "https" and not is_local:
        raise ValueError(f"{url} is not https")


def download(url, path, advice, most, timeout=60):
    """Fetch one address into a file, of at most so many bytes."""
    end = time.monotonic() + HOURS * 3600
    try:
        check_address(url, url)
        opener = urllib.request.build_opener(HttpsAlone)
        with opener.open(url, timeout=timeout) as response, open(path, "wb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            # disable=None: silent where stderr is no terminal
            with tqdm(total=length or None, unit="B", unit_scale=True, disable=None,
                      desc=url.rsplit("/", 1)[-1]) as bar:
                while max(length, file.tell()) <= most and (chunk := response.read1(1 << 16)):
                    bar.update(file.write(chunk))
                    if time.monotonic() > end:
                        raise OSError(f"it takes more than {HOURS} hours")
            if max(length, file.tell()) > most:
                raise OSError(f"it is larger than the {most:,} bytes that the task can need")
            if length and file.tell() != length:
                raise OSError(f"the connection ended after {file.tell()} of {length} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"could not fetch {url} ({one_line(error)}): {advice}") from None


def extract(url, archive, names, advice, most):
    """Write the TSV files of these names beside the archive, of at most so many bytes."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = find_members(zipped, names)
            needed = [name for name in names if not name.startswith("test")]
            missing = [name for name in needed if name not in members]
            if missing:
                raise ValueError(f"it does not hold {', '.join(missing)}")
            if sum(member.file_size for member in members.values()) > most:
                raise ValueError(f"it unpacks to more than the {most:,} bytes that the task can "
                                 "need")
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
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{parts[-1]} is packed in a way that can take any memory")
            members[parts[-1]] = info
    return members
