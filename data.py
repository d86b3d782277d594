"""GLUE's tasks, and the way from their texts to batches and scores.

    train.tsv ── load_task ──> Split ── encode ──> Examples ── batches ──> Batch
                          texts, labels       flat token ids          (B, T) padded

A Split has one or two texts for each row, and perhaps a label (formats/glue.py). N is the number of
rows, B those of a batch, T its padded length. A user's mistake is a ValueError.
"""
from array import array
from typing import NamedTuple, Optional

import torch

from formats import glue, hub, toy
from formats.tokenizer import check_words, read_tokenizer


class Task(NamedTuple):
    """What the columns of a task's files mean, how predictions are scored and handed in.

    No code below asks for a task's name: whatever sets one apart is an entry of its row in TASKS.
    """
    folder: str                     # below the data folder; "": a user's own files
    rows: dict                      # split → official number of rows; split "dev" is dev.tsv
    texts: tuple                    # header names of the one or two text columns
    label: str = "label"            # header name of the label column
    labels: tuple = ()              # names of the classes, in order of their ids; (): a regression
    header: tuple = ()              # column names where files have no header line
    damaged: bool = False           # official files have bad rows: up to 0.1 % may be skipped

    metrics: tuple = ("accuracy",)  # names in METRICS; the first one selects the best
    score_range: tuple = ()         # of a regression: lowest and highest score
    unit: tuple = (0.0, 1.0)        # (mean, deviation): the model learns (score - mean) / deviation

    downloads: dict = {}            # address → name to keep it under, "" for a zip of TSV files
    submissions: dict = {}          # test split → file name that gluebenchmark.com asks for
    make: str = ""                  # what formats.toy makes the rows of; "": they are in files


def of_glue(folder, rows, *, archive=None, **fields):
    """A Task of GLUE: its files are one archive, its predictions are handed in as one file.

    archive: the name of the zip, by default that of the folder. fields: other entries of Task.
    """
    usual = {"downloads": {f"glue/data/{archive or folder}.zip": ""},
             "submissions": {"test": f"{folder}.tsv"}}
    return Task(folder, rows, **usual | fields)


TASKS = {
    "cola": of_glue("CoLA", {"train": 8551, "dev": 1043, "test": 1063},
                    texts=("sentence",), labels=("0", "1"), metrics=("matthews",),
                    header=("source", "label", "author's mark", "sentence")),
    "sst2": of_glue("SST-2", {"train": 67349, "dev": 872, "test": 1821},
                    texts=("sentence",), labels=("0", "1")),
    "mrpc": of_glue("MRPC", {"train": 3668, "dev": 408, "test": 1725},
                    texts=("#1 String", "#2 String"), label="Quality", labels=("0", "1"),
                    metrics=("accuracy", "f1"), downloads=glue.MRPC_DOWNLOADS),
    "qqp": of_glue("QQP", {"train": 363846, "dev": 40430, "test": 390965},
                   archive="QQP-clean", texts=("question1", "question2"), label="is_duplicate",
                   labels=("0", "1"), metrics=("accuracy", "f1"), damaged=True),
    "stsb": of_glue("STS-B", {"train": 5749, "dev": 1500, "test": 1379},
                    texts=("sentence1", "sentence2"), label="score", score_range=(0.0, 5.0),
                    metrics=("pearson", "spearman")),
    "mnli": of_glue("MNLI", {"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832,
                             "test_matched": 9796, "test_mismatched": 9847},
                    texts=("sentence1", "sentence2"), label="gold_label",
                    labels=("entailment", "neutral", "contradiction"),
                    submissions={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"}),
    "qnli": of_glue("QNLI", {"train": 104743, "dev": 5463, "test": 5463},
                    archive="QNLIv2", texts=("question", "sentence"),
                    labels=("entailment", "not_entailment")),
    "rte": of_glue("RTE", {"train": 2490, "dev": 277, "test": 3000},
                   texts=("sentence1", "sentence2"), labels=("entailment", "not_entailment")),
    "demo": Task("demo", {"train": 2000, "dev": 1000}, make="adapt",
                 texts=("sentence",), labels=("0", "1")),
}


def get_task(task):
    """The row of TASKS with that name; a Task is returned as it is."""
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}: the tasks are {', '.join(TASKS)}")
    return TASKS[task]


def load_task(task, data_dir="glue", seed=0, train=True):
    """{"train": Split, "dev": Split}; MNLI has "dev_matched" and "dev_mismatched" for "dev".

    task: a name in TASKS or a Task. data_dir: the folder that holds CoLA/, RTE/ and so on.
    seed: of the demo's rows, which are made. train: False leaves "train" out, to evaluate.
    """
    task = get_task(task)
    names = glue.labelled_splits(task, train)
    if task.make:
        made = toy.splits(task.make, task.rows, seed)
        return {name: made[name] for name in names}
    return {name: glue.load_split(task, data_dir, name) for name in names}


def load_own(train_file, dev_file):
    """({"train": Split, "dev": Split}, Task) of a user's files; train_file's columns define it.

    Scores may have any unit: the model learns (score - mean) / deviation, of the training scores.
    """
    task = Task("", {}, **glue.read_columns(train_file))
    train = glue.read_split(train_file, task)
    if not task.labels:
        scores = torch.tensor(train.labels, dtype=torch.float64)
        deviation = float(scores.std(correction=0)) or 1.0      # 0: all are alike
        task = task._replace(unit=(float(scores.mean()), deviation))
    train = glue.in_unit(train, task, train_file)
    return {"train": train, "dev": load_file(dev_file, task)}, task


def load_file(path, task):
    """The Split of one file with the columns of a Task."""
    return glue.in_unit(glue.read_split(path, task), task, path)


# ---- tokens ------------------------------------------------------------------------------------

class Examples(NamedTuple):
    """An encoded split, flat so that MNLI's stays small: row i is ids[starts[i]:starts[i + 1]]."""
    ids: torch.Tensor               # (tokens,) int32
    types: torch.Tensor             # (tokens,) uint8, 1 at the tokens of a pair's second text
    starts: torch.Tensor            # (N + 1,) int64
    labels: Optional[torch.Tensor]  # (N,) int64 class ids or float32 scores in the task's unit
    max_len: int
    truncated: int                  # how many rows were cut to max_len


def load_tokenizer(name_or_dir):
    """A checkpoint's tokenizers.Tokenizer, with the ids that transformers' would give."""
    return read_tokenizer(hub.tokenizer_files(name_or_dir))


def encode(tokenizer, split, max_len, name="the data"):
    """A Split as Examples. Rows longer than max_len lose their end; of a pair the longer text does.

    max_len: counts special tokens. name: of the split, for messages. ValueError where max_len
    leaves no room for text, for a row without a token, and where most tokens are unknown.
    """
    special = tokenizer.num_special_tokens_to_add(len(split.texts[0]) == 2)
    if max_len <= special:
        raise ValueError(f"a maximum length of {max_len} leaves no room for text: the tokenizer "
                         f"adds {special} special tokens to a row, so give at least {special + 1}")
    ids = array("i")
    types = array("B")
    starts = array("q", [0])
    truncated = 0
    tokenizer.enable_truncation(max_len, strategy="longest_first")
    for row, encoding in enumerate(encodings(tokenizer, split.texts), start=1):
        if not encoding.ids:
            raise ValueError(f"row {row} of {name} has no tokens: give it a text")
        ids.extend(encoding.ids)
        types.extend(encoding.type_ids)
        starts.append(len(ids))
        if encoding.overflowing:
            truncated += 1
    tokenizer.no_truncation()

    examples = Examples(ids=torch.frombuffer(ids, dtype=torch.int32),
                        types=torch.frombuffer(types, dtype=torch.uint8),
                        starts=torch.frombuffer(starts, dtype=torch.int64),
                        labels=None if split.labels is None else torch.tensor(split.labels),
                        max_len=max_len, truncated=truncated)
    check_words(tokenizer, examples.ids, len(ids) - special * len(split.texts), name)
    return examples


def encodings(tokenizer, texts):
    """Each row's Encoding, made 4,096 rows or two million letters at a time, as they are large."""
    rows = texts if len(texts[0]) == 2 else [text for (text,) in texts]
    longest = max(sum(map(len, row)) for row in texts)
    at_once = max(1, min(4096, 2_000_000 // (longest + 1)))
    for first in range(0, len(rows), at_once):
        yield from tokenizer.encode_batch_fast(rows[first:first + at_once])


# ---- batches -----------------------------------------------------------------------------------
POOL = 80  # batches whose rows are sorted by length together. Larger: less padding, less random


class Batch(NamedTuple):
    """What a model is given, and which rows of the split these are."""
    input_ids: torch.Tensor         # (B, T) int64
    attention_mask: torch.Tensor    # (B, T) bool, True at tokens
    token_type_ids: torch.Tensor    # (B, T) int64
    labels: Optional[torch.Tensor]  # (B,)
    rows: torch.Tensor              # (B,) int64


def batches(examples, batch_size, pad_id=0, generator=None, skip=0, multiple=8):
    """Iterate over Batches that hold every row once, similar lengths together.

    generator: a torch.Generator to shuffle the rows, when this is called; None: in order of length.
    skip: how many batches to leave out. multiple: T is the longest row, rounded up to a multiple of
    this but never beyond max_len; 8 is what tensor cores are fast with.
    """
    plan = plan_batches(examples.starts.diff(), batch_size, generator)
    return (collate(examples, rows, multiple, pad_id) for rows in plan[skip:])


def plan_batches(length, batch_size, generator):
    """The row numbers of each batch, a list of tensors (B,); length: of each row, (N,)."""
    # Widths are sorted, not lengths, so that rows of one width stay in random order. `multiple` is
    # not used: it depends on the device, and --resume on another must give the same batches.
    width = round_up(length, torch.where(length < 32, 2, 8))        # (N,)
    if generator is None:
        return list(width.argsort(stable=True).split(batch_size))
    plan = []
    shuffled = torch.randperm(len(width), generator=generator)      # (N,)
    for pool in shuffled.split(batch_size * POOL):
        in_order = width[pool].argsort(stable=True)
        plan.extend(pool[in_order].split(batch_size))
    order = torch.randperm(len(plan), generator=generator).tolist()  # of the batches
    return [plan[i] for i in order]


def round_up(length, multiple):
    return (length + multiple - 1) // multiple * multiple


def collate(examples, rows, multiple, pad_id):
    """The Batch of the rows with these numbers, (B,)."""
    start = examples.starts[rows]                       # (B,)
    length = examples.starts[rows + 1] - start          # (B,)
    T = min(round_up(int(length.max()), multiple), examples.max_len)
    column = torch.arange(T)                            # (T,)
    mask = column < length[:, None]                     # (B, T)
    place = start[:, None] + column                     # (B, T): in examples.ids
    place = place.clamp(max=len(examples.ids) - 1)      # the last row's padding would be beyond
    ids = torch.where(mask, examples.ids[place].long(), pad_id)
    types = torch.where(mask, examples.types[place].long(), 0)
    labels = None if examples.labels is None else examples.labels[rows]
    return Batch(ids, mask, types, labels, rows)


# ---- scores ------------------------------------------------------------------------------------
# p: predictions (N,), t: targets (N,). Where all are equal, a metric may have no value: it is 0.

def accuracy(p, t):
    """The share of predictions that are right."""
    return (p == t).double().mean()


def f1(p, t):
    """Of class 1: 2 true positives / (predicted + actual positives)."""
    right = ((p == 1) & (t == 1)).sum()
    marked = (p == 1).sum() + (t == 1).sum()
    return 2 * right.double() / marked.clamp(min=1)


def matthews(p, t):
    """Matthews' correlation, of one-hot rows: cov(P, Y) / sqrt(cov(P, P) cov(Y, Y))."""
    P, Y = torch.nn.functional.one_hot(torch.stack([p, t])).double()  # (N, classes) each
    n = len(p)
    of_p, of_y = P.sum(0), Y.sum(0)                                   # (classes,): rows of each
    covariance = n * (P * Y).sum() - of_p @ of_y                      # n² cov(P, Y)
    spread = (n * n - of_p @ of_p) * (n * n - of_y @ of_y)            # n⁴ cov(P, P) cov(Y, Y)
    return covariance / spread.sqrt() if spread > 0 else 0.0


def pearson(p, t):
    """The linear correlation."""
    if p.min() == p.max() or t.min() == t.max():
        return 0.0
    return torch.corrcoef(torch.stack([p, t]))[0, 1]


def spearman(p, t):
    """The linear correlation of the ranks."""
    return pearson(ranks(p), ranks(t))


def ranks(x):
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()                    # the rank of the last of its equals
    return (last - (counts - 1) / 2)[which]


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews,
           "pearson": pearson, "spearman": spearman}


def metrics(task, predictions, labels):
    """{name: value} of the task's metrics, in its order; 1.0 is perfect. Computed in float64.

    predictions, labels: (N,) class ids, or scores of a regression. ValueError for other shapes and
    for numbers that are not finite: either would give plausible wrong values.
    """
    task = get_task(task)
    p = torch.as_tensor(predictions)
    t = torch.as_tensor(labels)
    fits = p.dim() == 1 and p.shape == t.shape and len(p) > 0
    if not (fits and p.isfinite().all() and t.isfinite().all()):
        raise ValueError(f"predictions {[*p.shape]} and labels {[*t.shape]} must both be (N,) and "
                         "finite")
    if not task.labels:
        p, t = p.double(), t.double()
    return {name: float(METRICS[name](p, t)) for name in task.metrics}
