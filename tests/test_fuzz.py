"""Spoilt files of every kind, made at random: each is used rightly or refused with a sentence, none hangs."""
import csv
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from tests.cli import sentences, soon, write_task
from tests.conftest import opened
from tests.test_train import logits

import data
from data import TASKS
from formats import checkpoint, glue
from running.errors import Refused

pytestmark = pytest.mark.ci                                # half a minute: in CI only


# --- ways to spoil ------------------------------------------------------------------------------------------

JUNK = [b"\0", b'"', b'"a\tb"', b"\t", b"\n", b"\r", b"\r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8",
        b"\x85", b"\x1a", b"-", b"x" * 100_000, b"\t" * 3000, b"\xc3", b"nan", b"1e999", b"{", b"]",
        b"\\u0000", b" ", b""]
VALUES = [None, True, -1, 0, 1, 2, 3, 7, 10**9, 10**30, 0.5, 1e-30, 1e30, "", "x", "gelu", [], {}, [[1]]]


def insert(rng, content):
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(JUNK) + content[at:]


def flip(rng, content):
    """Other bytes anywhere, or near the beginning, where formats say what follows."""
    content, reach = bytearray(content), rng.choice((64, 2000, len(content)))
    for _ in range(rng.choice((1, 1, 3, 20))):
        content[rng.randrange(min(len(content), reach))] ^= rng.choice((1 << rng.randrange(8), rng.randrange(1, 256)))
    return bytes(content)


def cut(rng, content):
    """Too little, nothing, or more than there was."""
    return rng.choice([content[:rng.randrange(len(content))]] * 8 + [b"", b"PK", content + b"x" * 10])


def move(rng, content):
    """A piece twice, or at another place."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[a:b] + content[at:] if rng.random() < 0.5 else content[:a] + content[b:]


def columns(rng, content):
    """One column fewer or twice, in all rows or in few."""
    at, share, drop = rng.randrange(4), rng.choice([0.05, 1]), rng.random() < 0.5
    rows = [row.split(b"\t") for row in content.split(b"\n")]
    spoilt = [row[:at] + row[at + 1:] if drop else row[:at + 1] + row[at:] for row in rows]
    return b"\n".join(b"\t".join(new if rng.random() < share else row) for row, new in zip(rows, spoilt))


def relabel(rng, content):
    """A label that there is not, or the same in another way, in few rows."""
    old, new = rng.choice([
        (rng.choice([b"entailment", b"neutral", b"0", b"1", b"2.0"]),
         rng.choice([b"", b"Entailment", b"2", b" 1", b"nan", b"1_0", b"-1", b"7"])),
        (b"\t0\n", rng.choice([b"\t 0\n", b"\t00\n", b"\t+0\n", b"\t\xc2\xa00\n"])), (b"\tyes\t", b"\t yes\t")])
    return content.replace(old, new, rng.randint(1, 30))


def quotes(rng, content):
    """Quotes as csv writes them around some fields, and others."""
    rows = [row.split(b"\t") for row in content.split(b"\n")]
    for row in rows:
        at = rng.randrange(len(row))
        if rng.random() < 0.2:
            as_csv = b'"' + row[at].replace(b'"', b'""') + b'"'
            row[at] = rng.choice([as_csv, b'"' + row[at], b'"a ""' + row[at] + b'"""'])
    return b"\n".join(b"\t".join(row) for row in rows)


def line_ends(rng, content):
    return content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\x85", b"\xe2\x80\xa9"]))


def encoding(rng, content):
    kind = rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7", "cp037"])
    return content.decode(errors="replace").encode(kind, errors="replace")


def value(rng, content):
    """Another value, or none, at a random place of a JSON file."""
    tree = json.loads(content)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])
    walk(tree)
    node, key = rng.choice(rng.choice([places, [place for place in places if place[0] is tree]]))
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(tree).encode()


# --- 2,000 task files ---------------------------------------------------------------------------------------

def reading(content, task=None):
    """(header, rows) of a file, read in the plainest way, or None where it is not in order."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if "\r" in text and "\n" not in text:
        return None
    lines = [line[:-1] if line.endswith("\r") else line for line in text.split("\n")]
    while lines and lines[-1] == "":
        lines.pop()
    if "\0" in text or not lines:
        return None
    header = lines[0].split("\t")
    if task and task.header and len(header) == 4 and header[1] in ("0", "1"):  # CoLA: already a row
        header = list(task.header)
    else:
        lines.pop(0)
    rows = [line.split("\t") for line in lines]
    if not rows or any(len(row) != len(header) for row in rows):
        return None
    return header, rows


def columns_of(table, names):
    """The fields of these columns, row by row, or None where one of them is not there once."""
    header, rows = table
    if any(header.count(name) != 1 for name in names):
        return None
    return [tuple(row[header.index(name)] for name in names) for row in rows]


def number(text):
    """A score, or None: a decimal number as C's strtod reads it."""
    space = r"[ \x09-\x0d\x1c-\x1f]*"
    decimal = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
    if re.fullmatch(space + decimal + space, text) is None or abs(float(text)) == float("inf"):
        return None
    return float(text)


def split_of(content, task, labelled):
    """What a file of this task says: a Split's two lists, or None."""
    table = reading(content, task)
    texts = table and columns_of(table, task.texts)
    if texts is None or not labelled:
        return texts and (texts, None)
    fields = columns_of(table, [task.label])
    if fields is None:
        return None
    if task.labels:
        labels = [task.labels.index(field) if field in task.labels else None for field, in fields]
    else:
        labels = [number(field) for field, in fields]
        labels = [label if label is not None and 0 <= label <= 5 else None for label in labels]
    return None if None in labels else (texts, labels)


def is_quoted(field):
    """Whether csv, where it is strict, reads a field in quotes as one with quotes in it."""
    try:
        [[value]] = csv.reader([field], delimiter="\t", strict=True)
    except (csv.Error, ValueError):
        return False
    return field[0] == '"' and '"' in value


def own_split_of(content, labelled, task):
    """What a user's own file says: (texts, names of labels or scores), or None; without labels by the columns
    of a task that was trained."""
    table = reading(content)
    if not labelled:
        texts = table and columns_of(table, task.texts)
        if texts is None or any(is_quoted(text) for row in texts for text in row):
            return None
        return texts, None
    if table is None or ("label" in table[0]) == ("score" in table[0]):
        return None
    pair = {"sentence1", "sentence2"} <= set(table[0])
    texts = columns_of(table, ["sentence1", "sentence2"] if pair else ["sentence"])
    fields = columns_of(table, ["score" if "score" in table[0] else "label"])
    if texts is None or fields is None:
        return None
    labels = [field for field, in fields]
    if any(is_quoted(field) for row in [*texts, *fields] for field in row):
        return None
    if "score" in table[0]:
        scores = [number(label) for label in labels]
        return None if None in scores else (texts, scores)
    different = set(labels)
    stripped = {label.strip().strip('"').strip() for label in different} - {""}
    whole = [float(label) for label in stripped if re.fullmatch(r"[+-]?[0-9]+(\.0*)?", label)]
    if len(stripped) < len(different) or len(set(whole)) < len(whole):
        return None
    return (texts, labels) if 2 <= len(different) <= 1000 else None


def read(path, name, task, labelled):
    """The same by data.py and glue.py."""
    if name not in OWN_FILES or not labelled:
        split = glue.read_split(path, task, labelled)
        return split.texts, split.labels
    task = data.Task("", {}, **glue.read_columns(path))
    split = glue.read_split(path, task)
    if task.labels:
        bare = [label.strip().strip('"').strip() for label in task.labels]
        whole = all(re.fullmatch(r"[+-]?[0-9]+(\.0*)?", label) for label in bare)
        numbers = {label: float(text) for label, text in zip(task.labels, bare) if whole}
        assert task.labels == tuple(sorted(task.labels, key=lambda label: numbers.get(label, label)))
    return split.texts, [task.labels[i] for i in split.labels] if task.labels else split.labels


OWN_FILES = {
    "own label": ["n\tsentence\tlabel"] + [f"{i}\tA man, \"{i}\"\t{i % 3}" for i in range(12)],
    "own pair": ["sentence2\tlabel\tsentence1"] + [f"B é {i}\tyes\tA\nC\tno\t{i}" for i in range(6)],
    "own score": ["score\tsentence"] + [f"{i / 4 - 1}\ttext {i}" for i in range(12)]}


def test_spoilt_task_files(tmp_path):
    """Oracle: an independent reading of the same bytes. Equal to it, or a ValueError with the file's name."""
    rng, path, outcomes = random.Random(1), tmp_path / "train.tsv", Counter()
    spoil = [insert, flip, cut, move, columns, relabel, relabel, quotes, line_ends, encoding]
    names = [name for name in TASKS if name != "demo"]
    whole = {name: write_task(name, tmp_path / "glue", n=12)["train"].read_bytes() for name in names}
    whole |= {name: "\n".join(lines).encode() + b"\n" for name, lines in OWN_FILES.items()}
    tasks = {}                                             # of whole files, trained on before
    for name in OWN_FILES:
        path.write_bytes(whole[name])
        tasks[name] = data.Task("", {}, **glue.read_columns(path))
    with soon("reading", 60):
        for _ in range(2000):
            name = rng.choice(list(whole))
            content = whole[name]
            for _ in range(rng.randint(1, 3)):
                content = rng.choice(spoil)(rng, content or b"\n")
            path.write_bytes(content)
            other = name if rng.random() < 0.9 or name in OWN_FILES else rng.choice(names)
            labelled = rng.random() < 0.8
            task = tasks.get(name) or TASKS[other]
            split = own_split_of if name in OWN_FILES else split_of
            expected = split(content, labelled=labelled, task=task)
            kind = ("own " if name in OWN_FILES else "") + ("labelled" if labelled else "unlabelled")
            try:
                assert read(path, name, task, labelled) == expected, content
                outcomes[kind, "read"] += 1
            except ValueError as error:
                assert expected is None, (error, content)
                assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 900
                outcomes[kind, "refused"] += 1
    assert len(outcomes) == 8 and min(outcomes.values()) > 25, outcomes


# --- 600 checkpoints, tokenizers, adapters ----------------------------------------------------------

KINDS = ("deberta", "bert", "roberta")
OWN = "--train-file train.tsv --dev-file dev.tsv --max-len 32 --batch-size 8"


@pytest.fixture
def finished(cli):
    """Finished runs on copies of checkpoints, and small data: all that can be spoilt, and what is right."""
    for name, seed in (("train", 0), ("dev", 1)):
        rows = [f"{text}\t{label}\n" for text, label in sentences(24, seed)]
        Path(f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    for kind in KINDS:
        shutil.copytree(cli.models[kind], kind)
        if kind == "deberta":                              # as the Hub ships DeBERTaV3
            torch.save(checkpoint.read_weights(kind), Path(kind, "pytorch_model.bin"))
            Path(kind, "model.safetensors").unlink()
        words = f"--model {kind} --out run-{kind} --lr 0.02 --max-steps 6 --init orthonormal"
        assert cli(OWN, words).status == 0
    return cli


WEIGHTS = {"deberta": "pytorch_model.bin", "bert": "model.safetensors", "roberta": "model.safetensors"}
FILES = [("{kind}/config.json", [value, value, value, flip, flip, cut, insert, encoding]),
         ("{kind}/tokenizer.json", [value, value, value, flip, flip, flip, cut, insert, move]),
         ("{kind}/{weights}", [flip, flip, flip, flip, cut, insert, move]),
         ("run-{kind}/adapter.safetensors", [flip, flip, cut, insert, move])]


def spoilt(rng, path, ways, n):
    """n times this file is spoilt in one of these ways; then it is whole again."""
    whole = path.read_bytes()
    for _ in range(n):
        path.write_bytes(rng.choice(ways)(rng, whole))
        yield path
    path.write_bytes(whole)


def test_spoilt_checkpoints_and_adapters(finished):
    """Oracle: the logits of the whole files, bit for bit; or one sentence. Nothing in between may pass."""
    rng, outcomes = random.Random(2), Counter()
    with soon("loading", 200):
        for kind in KINDS:
            given = {"eval": f"run-{kind}/adapter.safetensors", "model": kind, "dev_file": "dev.tsv"}
            right = logits(opened(**given))
            for pattern, ways in FILES:
                for path in spoilt(rng, Path(pattern.format(kind=kind, weights=WEIGHTS[kind])), ways, 45):
                    try:
                        assert torch.equal(logits(opened(**given)), right), path
                        outcomes[path.name, "used"] += 1
                    except Refused as error:
                        assert 20 < len(str(error)) < 2000 and "\n" not in str(error), error
                        assert kind in str(error) or "unknown to the tokenizer" in str(error), error
                        outcomes[path.name, "refused"] += 1
    assert all(outcomes[name, "refused"] > 20 for name in ("config.json", "tokenizer.json", *WEIGHTS.values(),
                                                          "adapter.safetensors")), outcomes
    assert sum(outcomes["adapter.safetensors", how] for how in ("used", "refused")) == 45 * len(KINDS)


def test_spoilt_checkpoints_in_training(finished):
    """Oracle: the promise. A base model is the user's own: what loads must train, or be refused before."""
    rng, outcomes = random.Random(3), Counter()
    with soon("training", 120):
        for kind in KINDS:
            for pattern, ways in FILES[:3]:
                for _ in spoilt(rng, Path(pattern.format(kind=kind, weights=WEIGHTS[kind])), ways, 12):
                    done = finished(OWN, f"--out new --overwrite --max-steps 1 --model {kind}")
                    assert done.status in (0, 1, 2) and len(done.errors) == (done.status > 0), done.err
                    assert done.status != 1 or "not finite" in done.err
                    outcomes[done.status] += 1
    assert outcomes[0] > 4 and outcomes[2] > 16, outcomes
