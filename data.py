"""Data: GLUE files, the demo's small language, tokenizers, batches, metrics, submission files.

    file.tsv ── read_split ──> Split ── encode ──> Examples ── batches ──> Batch
                          texts, labels         flat token ids          (B, T) padded

A task is one row of TASKS, and no code below asks for its name: whatever sets one apart (CoLA has no header
line, MNLI two dev sets, MRPC its originals, STS-B is a regression) is an entry of that row. B is the batch,
T its padded length, N the rows. User errors raise ValueError or OSError with one finished sentence.
"""
import functools
import http.client
import math
import os
import random
import shutil
import sys
import urllib.request
import zipfile
from array import array
from pathlib import Path, PurePosixPath
from typing import Callable, NamedTuple, Optional

import tokenizers
import torch
from tqdm import tqdm

import hub
import spm

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
    make: Optional[Callable] = None  # makes n rows from a seed; such a task needs no files


class Split(NamedTuple):
    """One file's rows: tuples of one or two strings; class ids (int), scores (float) or None (unlabelled)."""
    texts: list
    labels: Optional[list]

    def part(self, start, stop):
        return Split(self.texts[start:stop], self.labels[start:stop] if self.labels is not None else None)

    def first(self, limit):
        """The first `limit` rows; all of them if limit is None."""
        if limit is not None and limit < 1:
            raise ValueError(f"a limit of {limit} rows leaves no data: give at least 1")
        return self.part(0, limit)


# ---- the demo's language -----------------------------------------------------------------------------------

ROLES, WORDS, CLASSES, FILLERS = 6, 16, 4, 20
ADAPT_CUE, ADAPT_ROLE = 0, 3


def demo_language(question, n, seed=0):
    """n different sentences of a made-up language, as a Split.

    A sentence is a cue word, one word for each of 6 roles and 1 to 4 fillers, shuffled. A role has 16 words,
    four in each of 4 hidden classes (role3word13 is of class 3; a model sees only an id). The question
    "pretrain" asks for the class of the role that the cue names (4 labels). "adapt" always has cue 0 and asks
    whether the word of role 3 is of class 2 or 3 (2 labels): a model has to unlearn what cue 0 meant.
    """
    if question not in ("pretrain", "adapt"):
        raise ValueError(f"the demo's questions are 'pretrain' and 'adapt', not {question!r}")
    rng, seen, split = random.Random(seed), set(), Split([], [])
    while len(split.texts) < n:
        cue = rng.randrange(ROLES) if question == "pretrain" else ADAPT_CUE
        words = [rng.randrange(WORDS) for _ in range(ROLES)]
        if (cue, *words) in seen:  # neither order nor fillers make a sentence a different one
            continue
        seen.add((cue, *words))
        sentence = [f"cue{cue}"] + [f"role{role}word{word}" for role, word in enumerate(words)]
        sentence += [f"filler{rng.randrange(FILLERS)}" for _ in range(rng.randint(1, 4))]
        rng.shuffle(sentence)
        classes = [word * CLASSES // WORDS for word in words]
        split.texts.append((" ".join(sentence),))
        split.labels.append(classes[cue] if question == "pretrain" else int(classes[ADAPT_ROLE] >= 2))
    return split


def demo_tokenizer():
    """The demo's tokenizer: one id a word, 0 is [PAD], [CLS] A [SEP] around a sentence."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    words = special + [f"cue{r}" for r in range(ROLES)] + [f"filler{f}" for f in range(FILLERS)]
    words += [f"role{r}word{w}" for r in range(ROLES) for w in range(WORDS)]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, ids[word]) for word in ("[CLS]", "[SEP]")])
    tokenizer.add_special_tokens(special)
    return tokenizer


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
                            f"senteval/senteval_data/{MSR_TEST}": MSR_TEST,
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
                 make=functools.partial(demo_language, "adapt")),
}
DEMO_PRETRAIN = TASKS["demo"]._replace(rows=dict(train=20000, dev=1000), labels=("0", "1", "2", "3"),
                                       make=functools.partial(demo_language, "pretrain"))


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
            raise ValueError(f"{path}:1: there is {problem} named {name!r}: the columns are {_short(header)}")
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
        return (tuple(fields[:n]), _parse_label(task, fields[n]) if labelled else None,
                keep is None or keep(tuple(fields[-2:])))

    # An unlabelled file must keep all its rows: a submission counts them.
    rows = _read_table(path, names, convert, task.header if labelled else (), task.damaged and labelled)
    rows = [row for row in rows if row[2]]
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

            def keep(pair):
                return (pair in ids) == listed
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: {_by_hand(task, folder)}")
    split = read_split(path, task, labelled, keep)
    n, official = len(split.texts), task.rows[name]
    # Copies of a damaged file differ by a few rows, by who repaired them: only a larger gap says anything.
    if abs(n - official) > (0.001 * official if task.damaged else 0):
        _warn(f"{path} gives {n} rows where the official split has {official}; going on")
    return split


def load_task(task, data_dir="glue", limit_train=None, limit_dev=None, seed=0):
    """{"train": Split, then each dev split: "dev", or for MNLI "dev_matched" and "dev_mismatched"}.

    task: a name in TASKS or a Task. data_dir: the folder that holds CoLA/, RTE/ and so on; the demo needs
    none and makes its rows from the seed. The limits keep the first rows. Raises what load_split raises.
    """
    task = get_task(task)
    names = [name for name in task.rows if not name.startswith("test")]
    if task.make:  # one sequence of different rows, cut up: what is in one split is in no other
        stops = torch.tensor([0] + [task.rows[name] for name in names]).cumsum(0).tolist()
        everything = task.make(stops[-1], seed)
        splits = {name: everything.part(*stops[i:i + 2]) for i, name in enumerate(names)}
    else:
        splits = {name: load_split(task, data_dir, name) for name in names}
    return {name: splits[name].first(limit_train if name == "train" else limit_dev) for name in names}


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
                         f"beside sentence, or sentence1 and sentence2: the columns are {_short(header)}")
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
    beside = Path(data_dir) / f".{task.folder}.{os.getpid()}.part"
    try:
        beside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to the folder {data_dir} ({error.strerror}): give another one") from None
    try:
        for address, name in task.downloads.items():
            url, advice = f"{base_url}/{address}", f"try again, or {_by_hand(task, folder)}"
            _download(url, beside / (name or "archive"), advice)
            if not name:
                _extract(url, beside / "archive", [f"{split}.tsv" for split in task.rows], advice)
                (beside / "archive").unlink()
        try:
            os.rename(beside, folder)  # all at once
        except OSError:  # the folder is there with some files: add the missing ones
            folder.mkdir(exist_ok=True)
            for path in beside.iterdir():
                if not (folder / path.name).exists():
                    os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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


# ---- tokens and batches ------------------------------------------------------------------------------------

class Examples(NamedTuple):
    """An encoded split, flat so that MNLI's 393k rows stay small: row i is ids[starts[i]:starts[i + 1]]."""
    ids: torch.Tensor               # (tokens,) int32
    types: torch.Tensor             # (tokens,) uint8, 1 at the tokens of a pair's second text
    starts: torch.Tensor            # (N + 1,) int64
    labels: Optional[torch.Tensor]  # (N,) int64 class ids or float32 scores
    max_len: int
    truncated: int                  # how many rows were cut to max_len


class Batch(NamedTuple):
    """What a model is given, and which rows of the split these are."""
    input_ids: torch.Tensor         # (B, T) int64
    attention_mask: torch.Tensor    # (B, T) bool, True at tokens
    token_type_ids: torch.Tensor    # (B, T) int64
    labels: Optional[torch.Tensor]  # (B,)
    rows: torch.Tensor              # (B,) int64


def load_tokenizer(name_or_dir):
    """A checkpoint's tokenizers.Tokenizer, from tokenizer.json, else spm.model; no padding, no truncation.

    Raises ValueError that names the file or the files looked for, and what hub.find raises.
    """
    path = hub.find(name_or_dir, "tokenizer.json")
    if path is not None:
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's Rust side raises PanicException, which is no Exception
            cause = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is not a tokenizer file ({cause}): get it again") from None
    else:
        path = hub.find(name_or_dir, "spm.model")
        if path is None:
            raise ValueError(f"{name_or_dir} has neither tokenizer.json nor spm.model: put one of them there")
        tokenizer = spm.read_spm(path)
    tokenizer.no_padding()  # either can be baked into a tokenizer.json
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer, split, max_len):
    """A Split as Examples. A pair above max_len loses tokens of its longer text first, as in transformers."""
    special = tokenizer.num_special_tokens_to_add(len(split.texts[0]) == 2)
    if max_len <= special:
        raise ValueError(f"a maximum length of {max_len} leaves no room for text: the tokenizer adds "
                         f"{special} special tokens to a row, so give at least {special + 1}")
    ids, types, starts, truncated = array("i"), array("B"), array("q", [0]), 0
    tokenizer.enable_truncation(max_len, strategy="longest_first")
    try:
        for start in range(0, len(split.texts), 4096):  # in pieces, because the library's results are large
            piece = [texts if len(texts) == 2 else texts[0] for texts in split.texts[start:start + 4096]]
            for encoding in tokenizer.encode_batch_fast(piece):
                ids.extend(encoding.ids)
                types.extend(encoding.type_ids)
                starts.append(len(ids))
                truncated += bool(encoding.overflowing)
                if starts[-1] == starts[-2]:
                    raise ValueError(f"row {len(starts) - 1} of the data has no tokens: give it a text")
    finally:
        tokenizer.no_truncation()
    labels = split.labels
    if labels is not None:
        labels = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)
    return Examples(torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(types, dtype=torch.uint8),
                    torch.frombuffer(starts, dtype=torch.int64), labels, max_len, truncated)


POOL = 80  # batches that are sorted by length together: more of them waste less padding, fewer mix rows more


def batches(examples, batch_size, pad_id=0, generator=None, skip=0):
    """Iterate over ceil(N / batch_size) Batches that hold every row once, rows of similar length together.

    With a torch.Generator (drawn from at once) the rows are shuffled, cut into pools, sorted by length in
    their pool and cut into batches, and the batches are shuffled; without one they are sorted by length. T is
    the longest row, rounded up to a multiple of 8 but never beyond max_len. skip: how many to leave out.
    """
    if batch_size < 1 or skip < 0:
        raise ValueError(f"batch size {batch_size} with skip {skip}: give at least 1 and at least 0")
    # Sorting by the padded width leaves rows of equal width in random order: as little padding, more mixing.
    width = ((examples.starts.diff() + 7) // 8 * 8).clamp(max=examples.max_len)  # (N,)
    if generator is None:
        plan = width.argsort(stable=True).split(batch_size)
    else:
        pools = torch.randperm(len(width), generator=generator).split(batch_size * POOL)
        plan = [rows for pool in pools for rows in pool[width[pool].argsort(stable=True)].split(batch_size)]
        plan = [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]
    return (_collate(examples, rows, int(width[rows].max()), pad_id) for rows in plan[skip:])


def _collate(examples, rows, T, pad_id):
    starts, stops = examples.starts[rows], examples.starts[rows + 1]  # (B,)
    at = starts[:, None] + torch.arange(T)                            # (B, T) positions in the flat tensors
    mask = at < stops[:, None]                                        # (B, T)
    at = at.clamp(max=len(examples.ids) - 1)
    return Batch(torch.where(mask, examples.ids[at].long(), pad_id), mask,
                 torch.where(mask, examples.types[at].long(), 0),
                 examples.labels[rows] if examples.labels is not None else None, rows)


# ---- metrics and submissions -------------------------------------------------------------------------------
# p: predictions (N,), t: targets (N,). A metric whose denominator is zero is 0.

def _accuracy(p, t):
    return (p == t).double().mean()


def _f1(p, t):
    """Of class 1: 2 true positives / (predicted + actual positives)."""
    both, either = ((p == 1) & (t == 1)).sum(), (p == 1).sum() + (t == 1).sum()
    return 2 * both.double() / either.clamp(min=1)


def _matthews(p, t):
    """The correlation of two classifications: their one-hot rows' covariance over the two deviations."""
    p, t = torch.nn.functional.one_hot(torch.stack([p, t])).double()  # (N, classes) each
    n, of_p, of_t = len(p), p.sum(0), t.sum(0)
    spread = (n * n - of_p @ of_p) * (n * n - of_t @ of_t)
    return (n * (p * t).sum() - of_p @ of_t) / spread.sqrt() if spread > 0 else 0.0


def _pearson(p, t):
    if p.min() == p.max() or t.min() == t.max():
        return 0.0
    p, t = p - p.mean(), t - t.mean()
    return ((p / p.norm()) @ (t / t.norm())).clamp(-1, 1)


def _spearman(p, t):
    return _pearson(_ranks(p), _ranks(t))


def _ranks(x):
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[which]


METRICS = dict(accuracy=_accuracy, f1=_f1, matthews=_matthews, pearson=_pearson, spearman=_spearman)


def metrics(task, predictions, labels):
    """{name: value} of the task's metrics, in its order; 1.0 is perfect, the correlation of a constant is 0.

    predictions and labels are both (N,): class ids, or scores of a regression. Anything else is a ValueError:
    (N, 1) against (N,) would broadcast to (N, N) and give a plausible, wrong number.
    """
    task = get_task(task)
    p, t = torch.as_tensor(predictions).detach().cpu(), torch.as_tensor(labels).detach().cpu()
    if p.dim() != 1 or p.shape != t.shape or not len(p):
        raise ValueError(f"predictions {tuple(p.shape)} and labels {tuple(t.shape)} must have one shape (N,)")
    if not task.labels:
        p, t = p.double(), t.double()
        if not (p.isfinite().all() and t.isfinite().all()):
            raise ValueError("a prediction or a label is not a finite number")
    elif p.is_floating_point() or t.is_floating_point() or min(p.min(), t.min()) < 0 \
            or max(p.max(), t.max()) >= len(task.labels):
        raise ValueError(f"class ids must be whole numbers from 0 to {len(task.labels) - 1}")
    return {name: float(METRICS[name](p, t)) for name in task.metrics}


def write_submission(folder, task, predictions, name="test"):
    """Write a test split's predictions (N,) as gluebenchmark.com wants them; returns the file's path.

    Columns index and prediction: names of labels, or scores clipped to the task's range. A split without an
    official file name goes to <name>_predictions.tsv.
    """
    task, values = get_task(task), torch.as_tensor(predictions).tolist()
    if len(values) != task.rows.get(name, len(values)):
        _warn(f"{len(values)} predictions where the official split {name} has {task.rows[name]} rows")
    if task.labels:
        values = [task.labels[value] for value in values]
    elif task.score_range:
        low, high = task.score_range
        values = [f"{min(max(value, low), high):.3f}" for value in values]
    path = Path(folder) / task.submissions.get(name, f"{name}_predictions.tsv")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    lines = ["index\tprediction"] + [f"{i}\t{value}" for i, value in enumerate(values)]
    try:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path
