"""From a task's texts to batches and scores: tokenizers, encoding, batches, metrics, the demo's language.

    file.tsv ── tasks.py ──> Split ── encode ──> Examples ── batches ──> Batch
                         texts, labels        flat token ids         (B, T) padded

B is the batch, T its padded length, N the rows. User errors raise ValueError or OSError with one finished
sentence.
"""
import contextlib
import itertools
import random
from array import array
from typing import NamedTuple, Optional

import tokenizers
import torch

from formats import hub
from formats import spm
from formats.disk import one_line
from formats.glue import TASKS, Split, get_task, load_split


def load_task(task, data_dir="glue", seed=0):
    """{"train": Split, then each dev split: "dev", or for MNLI "dev_matched" and "dev_mismatched"}.

    task: a name in TASKS or a Task. data_dir: the folder that holds CoLA/, RTE/ and so on; the demo needs
    none and makes its rows from the seed. Raises what load_split raises.
    """
    task = get_task(task)
    rows = {name: n for name, n in task.rows.items() if not name.startswith("test")}
    if not task.make:
        return {name: load_split(task, data_dir, name) for name in rows}
    everything = demo_language(task.make, sum(rows.values()), seed)
    stops = itertools.accumulate(rows.values(), initial=0)
    # One sequence of different rows, cut up: what is in one split is in no other.
    return {name: everything.part(*ends) for name, ends in zip(rows, itertools.pairwise(stops))}


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
    names = "tokenizer.json", "spm.model"
    path = next(filter(None, (hub.find(name_or_dir, name, network=False) for name in names)), None)
    if path is None:
        with contextlib.suppress(OSError):  # for a merged model: it may say that case counts
            hub.find(name_or_dir, "tokenizer_config.json")
        path = next(filter(None, (hub.find(name_or_dir, name) for name in names)), None)
    if path is None:
        raise ValueError(f"{name_or_dir} has neither tokenizer.json nor spm.model: put one of them there")
    if path.name == "spm.model":
        tokenizer = spm.read_spm(path)
    else:
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's Rust side raises PanicException, which is no Exception
            raise ValueError(f"{path} is not a tokenizer file ({one_line(error)}): get it again") from None
    tokenizer.no_padding()  # either can be baked into a tokenizer.json
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer, split, max_len, name="the data"):
    """A Split as Examples. A pair above max_len loses tokens of its longer text first, as in transformers.

    max_len counts special tokens. name: of the split, for messages. ValueError where max_len leaves no room
    for text, for a row without a token, and where most tokens are unknown: no training would help.
    """
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
                    raise ValueError(f"row {len(starts) - 1} of {name} has no tokens: give it a text")
    finally:
        tokenizer.no_truncation()
    names = map(tokenizer.token_to_id, ("[UNK]", "<unk>"))
    unknown = sum(ids.count(i) for i in names if i is not None)
    share = unknown / max(1, len(ids) - special * len(split.texts))
    if share > 0.5:
        raise ValueError(f"{share:.0%} of the tokens of {name} are unknown to the tokenizer: give a model of "
                         "the language that they are in")
    labels = split.labels
    if labels is not None:
        labels = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)
    return Examples(torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(types, dtype=torch.uint8),
                    torch.frombuffer(starts, dtype=torch.int64), labels, max_len, truncated)


POOL = 80  # batches that are sorted by length together: more of them waste less padding, fewer mix rows more


def batches(examples, batch_size, pad_id=0, generator=None, skip=0, multiple=8):
    """Iterate over ceil(N / batch_size) Batches that hold every row once, rows of similar length together.

    With a torch.Generator (drawn from at once) the rows are shuffled, cut into pools, sorted by length in
    their pool and cut into batches, and the batches are shuffled; without one they are sorted by length. T is
    the longest row, rounded up to a multiple of `multiple` (8: what tensor cores are fast with) but never
    beyond max_len. skip: how many to leave out. ValueError for a batch_size below 1, a skip below 0, at once.
    """
    if batch_size < 1 or skip < 0:
        raise ValueError(f"batch size {batch_size} with skip {skip}: give at least 1 and at least 0")
    # Sorting by a length that is rounded up leaves rows of one such width in random order: more mixing, for
    # hardly more padding. The plan is the same whatever `multiple` is: a run may go on on another device.
    length = examples.starts.diff()  # (N,)
    step = torch.where(length < 32, 2, 8)
    width = (length + step - 1) // step * step
    if generator is None:
        plan = width.argsort(stable=True).split(batch_size)
    else:
        pools = torch.randperm(len(width), generator=generator).split(batch_size * POOL)
        plan = [rows for pool in pools for rows in pool[width[pool].argsort(stable=True)].split(batch_size)]
        plan = [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]
    padded = ((length + multiple - 1) // multiple * multiple).clamp(max=examples.max_len)
    return (_collate(examples, rows, int(padded[rows].max()), pad_id) for rows in plan[skip:])


def _collate(examples, rows, T, pad_id):
    starts, stops = examples.starts[rows], examples.starts[rows + 1]  # (B,)
    at = starts[:, None] + torch.arange(T)                            # (B, T) positions in the flat tensors
    mask = at < stops[:, None]                                        # (B, T)
    at = at.clamp(max=len(examples.ids) - 1)
    return Batch(torch.where(mask, examples.ids[at].long(), pad_id), mask,
                 torch.where(mask, examples.types[at].long(), 0),
                 examples.labels[rows] if examples.labels is not None else None, rows)


# ---- metrics -----------------------------------------------------------------------------------------------
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
    return torch.corrcoef(torch.stack([p, t]))[0, 1].nan_to_num()  # 0 where squares are inf or 0


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
    (N, 1) against (N,) would broadcast to (N, N) and give a plausible, wrong number. Computed in float64.
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


DEMO_PRETRAIN = TASKS["demo"]._replace(rows=dict(train=20000, dev=1000), labels=("0", "1", "2", "3"),
                                       make="pretrain")

