"""Files and servers that mean harm, and machines that fail half-way. Docstrings name oracles.

What is only mangled: test_fuzz.py. A run that is killed or stopped: test_folder.py.
"""
import base64
import contextlib
import copy
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import tokenizers
import torch

import data
import model as models
import train
from data import TASKS
from formats import checkpoint, disk, fetch, glue, hub, spm
from methods import fast
from running import folder, machine, options
from running.errors import Refused
from tests.cli import (BUSY, at_rename, at_step, child, contents, ctrl_c, on_unix, refused, soon, stopped, write_task)
from tests.conftest import SMALL, frozen, outcome
from tests.test_fetch import ZIP, answer, server
from tests.test_spm import HAS_LEAF, KEY_A, LEAF, charsmap, field, model

pytestmark = pytest.mark.ci                                # half a minute: in CI only


@pytest.fixture
def little_memory():
    """From now on the system gives this process 500 MB more, and no byte after that."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 500_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# --- last.pt ------------------------------------------------------------------------------------------------

def put(value, *path):
    """A change: this value there, or what a function makes of the one that is there."""
    def spoil(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value
    return spoil


def without(*path):
    """A change: nothing there."""
    def spoil(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]
    return spoil


MOMENTS = ("optimizer", "state", 0)
STEPS = {"step": 3, "score": 0.5, "scores": {"dev": {"accuracy": 0.5}}, "kept": 96}
TOP = ["format", "settings", "base", "rows", "adapter", "step", "tokens", "seconds", "evaluations", "rng", "log_bytes",
       "weights", "optimizer", "pruner"]
CHANGES = [
    lambda t: t[:1], lambda t: t.flatten(), lambda t: torch.zeros(1).expand(t.shape),
    lambda t: torch.zeros(*t.shape, 9)[..., 0], lambda t: t.double(), lambda t: t.tolist()]
SPOILT = [
    *(put(change, *MOMENTS, "exp_avg") for change in CHANGES), put(torch.zeros(3), *MOMENTS, "step"),
    without(*MOMENTS, "exp_avg_sq"), put(torch.zeros(()), *MOMENTS, "max_exp_avg_sq"),
    put({}, "optimizer", "state", 999), put([], "optimizer", "state"), put({}, "optimizer"),
    put(9, "step"), put(-1, "step"), put(4.0, "step"), put(True, "step"),
    put(-1, "tokens"), put(-1, "log_bytes"), put(float("nan"), "seconds"), put("x", "seconds"),
    put([{}], "evaluations"), put([STEPS | {"step": "3"}], "evaluations"), put([STEPS | {"scores": []}], "evaluations"),
    put([], "rng"), put([None], "rng"), put([{"cpu": torch.zeros(5056, dtype=torch.uint8)}], "rng"), put({}, "pruner"),
    put(torch.tensor([99, 0]), "pruner", "_extra_state"), put(torch.zeros(1).expand(12, 8), "pruner", "keep"),
    put({}, "weights"), put(torch.zeros(1), "weights", "x"), put("x", "settings"), put("x", "settings", "batch_size"),
    put("x", "settings", "anything"), *(without(name) for name in TOP), put(1, "anything"), put(1, "kept")]


def test_states_that_this_run_cannot_have_written(stopped):
    """Oracle: the files before: each is refused with one sentence, although its checksums fit; nothing is written. What it
    says of AdamW's settings and of places counts for nothing: the unbroken run, and nothing new beside it."""
    whole = folder.load_state("run")
    del whole["written"]
    for i, spoil in enumerate(SPOILT):
        state = copy.deepcopy(whole)                       # of which no part may be the file that changes
        spoil(state)
        torch.save(state, "run/last.pt")                   # write_state() would put a format back
        before = contents("run")
        refused(stopped("--resume run"))
        assert contents("run") == before, i
    whole["optimizer"]["param_groups"] = [{"lr": "x", "fused": False, "amsgrad": True, "params": [7]}]
    whole["settings"] |= {"merge": "m", "export_peft": "p", "predict": "t.tsv", "out": "o", "overwrite": True,
                          "eval": "run/adapter.safetensors", "resume": "r"}
    folder.write_state("run", whole)
    done = stopped("--resume run")
    assert done.status == 0 and "began with --merge m" in done.err and "--export-peft p" in done.err
    assert {path.name for path in Path().iterdir()} == {"run"} and outcome("run") == stopped.whole(BUSY)


def test_a_billion_parts_of_a_batch_take_no_time(monkeypatch):
    """Oracle: the rows: a batch of 3 has 3 parts, whatever --accum a file gives."""
    rows, weight = [], torch.zeros((), requires_grad=True)

    def loss_of(*part):
        rows.append(part[-1].tolist())
        return weight

    with soon("gradients"):
        train.forward_backward(loss_of, data.Batch(*[torch.arange(3)] * 5), machine.join(), 10**9, fast.Eager([weight]))
    assert rows == [[0], [1], [2]]


# --- where a file would have us write -----------------------------------------------------------------------

def retold(path, change):
    """An adapter that says something else of itself; its hash fits."""
    tensors, facts = folder.load_adapter(path)
    del facts["digest"]
    change(facts)
    facts = json.dumps(facts)
    disk.write_tensors(path, tensors, {"lora2": json.dumps([facts, disk.digest(tensors, facts)])})


TOLD = [
    *(put("x", "settings", name) for name in ("merge", "out", "overwrite", "predict", "data_dir")),
    put("x", "merge"), put({}, "settings"), put(None, "settings", "batch_size"), put(10**9, "settings", "k"),
    put(10**9, "settings", "max_len"), put(None, "columns"), put("x", "columns", "downloads"),
    put([], "columns", "texts"), put([1, 2], "columns", "labels"), put(["x"], "columns", "metrics"),
    put([], "columns", "metrics"), put([0.0, 0.0], "columns", "unit"), put([1.0], "columns", "unit"),
    put({}, "best"), put("../x", "best"), without("columns")]


def test_an_adapter_chooses_no_place_and_no_size(cli):
    """Oracle: one sentence, nothing new in the folder; what an adapter of ours cannot say is refused. It is of a user's
    own scores, of which no table knows the columns."""
    Path("own.tsv").write_text("sentence\tscore\n" + "cue0 filler1\t1\ncue1 filler2\t5\n" * 9)
    words = f"--dev-file own.tsv --model {cli.models['bert']}"
    assert cli(words, "--train-file own.tsv --out run --max-steps 2 --max-len 16").status == 0
    whole = Path("run/adapter.safetensors").read_bytes()
    for i, change in enumerate(TOLD):
        Path("run/adapter.safetensors").write_bytes(whole)
        retold("run/adapter.safetensors", change)
        before = contents("run")
        done = cli(words, "--eval run/adapter.safetensors")
        assert done.status == 2 and len(done.errors) == 1, (i, done.err)
        assert {path.name for path in Path().iterdir()} == {"run", "own.tsv"} and contents("run") == before


def test_an_adapter_does_not_choose_the_batch():
    """Oracle: by hand: its own batch size up to 256 rows, more only if it is given."""
    stored = vars(options.resolve({"task": "rte"}))
    stored = {name: stored[name] for name in options.STORED}
    for size, given, expected in ((32, {}, 32), (10**8, {}, 256), (10**8, {"batch_size": 999}, 999)):
        o = options.evaluating(stored | {"batch_size": size}, {"eval": "x"} | given)
        assert o.batch_size == expected


def test_data_are_not_fetched_to_where_a_result_says(cli, monkeypatch):
    """Oracle: a fetch that fails the test. result.json knows where the data were; a fetch needs --data-dir."""
    write_task("rte", Path("there"))
    words = f"--task rte --max-steps 2 --max-len 32 --data-dir there --out run --model {cli.models['bert']}"
    with at_step(1, ctrl_c):
        assert cli(words).status == 130
    monkeypatch.setattr(fetch, "fetch_task", lambda *_: pytest.fail("fetched"))
    shutil.move("there", "away")
    refused(cli("--resume run"), "there/RTE")
    shutil.move("away", "there")
    assert cli("--resume run").status == 0
    shutil.rmtree("there")
    refused(cli("--resume run --merge m"), "--data-dir")


# --- links --------------------------------------------------------------------------------------------------

@on_unix
def test_planted_links_are_not_followed(stopped):
    """Oracle: the outside file. A link in place of whatever is written is replaced."""
    outside = Path("outside").absolute()
    outside.write_text("mine")
    for name in ("ranks.json", "predictions_dev.tsv", ".last.pt.tmp", "last.pt.tmp"):
        Path("run", name).unlink(missing_ok=True)
        Path("run", name).symlink_to(outside)
    assert stopped("--resume run").status == 0 and outside.read_text() == "mine"
    assert outcome("run")["ranks.json"] == stopped.whole(BUSY)["ranks.json"]


@on_unix
@pytest.mark.parametrize("kind, status", [("link", 2), ("dead link", 2), ("hard link", 0), ("pipe", 2)])
def test_a_log_elsewhere_is_left_alone(stopped, kind, status):
    """Oracle: the outside file: neither cut to log_bytes nor added to, behind a link of either kind; and soon, where
    an ordinary open() of a pipe would wait for ever for a reader."""
    log, outside = Path("run/log.jsonl"), Path("outside").absolute()
    whole = log.read_bytes() + b"more\n"
    log.unlink()
    if kind == "pipe":
        os.mkfifo(log)
    else:
        outside.write_bytes(whole)
        (os.link if kind == "hard link" else os.symlink)(outside, log)
    if kind == "dead link":
        outside.unlink()
    with soon("--resume"):
        done = stopped("--resume run")
    assert done.status == status and (done.status == 0 or "log.jsonl" in done.errors[0])
    assert outside.exists() == (kind in ("link", "hard link"))
    assert not outside.exists() or outside.read_bytes() == whole


@on_unix
def test_what_a_tokenizer_links_to_is_not_copied(cli, tmp_path):
    """Oracle: the outside file's content, which no merged folder may hold; links within the Hub's cache are its
    way of keeping files."""
    assert cli.tiny("--max-steps 2").status == 0
    words = "--eval run/adapter.safetensors --merge merged --model"
    snapshot, blobs = Path("models--a--b/snapshots/0123"), Path("models--a--b/blobs")
    shutil.copytree(cli.models["deberta"], blobs)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (tmp_path / "secret").write_text("{}")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (snapshot / name).symlink_to(tmp_path / "secret")
        refused(cli(words, snapshot), f"{name} is a link")
        (snapshot / name).unlink()
    assert cli(words, snapshot).status == 0


@on_unix
def test_new_files_have_the_rights_of_others(tmp_path):
    """Oracle: open(): a private folder to write in must not make the file in it private."""
    disk.write_file(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# --- what hashes are for ------------------------------------------------------------------------------------

def test_the_fingerprint_sees_every_part_of_a_base(tiny, tmp_path):
    """Oracle: the model's function: one option, two merges in another order, a rule of the normaliser, a score of a
    piece, one rule of a charsmap; none changes the weights, the vocabulary or the ids of most texts."""
    net = models.from_pretrained(tiny["bert"], 2)
    merges, vocabulary = [("a", "b"), ("b", "c")], {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    made = [tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, order)) for order in (merges, merges, merges[::-1])]
    made[0].normalizer = tokenizers.normalizers.Lowercase()
    prints = {folder.fingerprint(net, tokenizer) for tokenizer in made}
    net.config["layer_norm_eps"] = 0.07
    prints.add(folder.fingerprint(net, made[1]))
    net.source = tmp_path
    for score, new in ((-1.0, b"x\0"), (-1.5, b"x\0"), (-1.0, b"y\0"), (-1.0, b"x\0")):
        content = model([("a", score), ("x", -3.0)], normalizer=field(2, charsmap(KEY_A, new)))
        (tmp_path / "spm.model").write_bytes(content)
        prints.add(folder.fingerprint(net, spm.read_spm(tmp_path / "spm.model")))
    assert len(prints) == 4 + 3


def test_adapters_that_were_swapped(cli):
    """Oracle: result.json's own hash of its adapter: another run's, with a hash that fits, is refused."""
    for seed in (1, 2):
        assert cli.tiny(f"--max-steps 2 --seed {seed} --out run{seed}").status == 0
    shutil.copy("run2/adapter.safetensors", "run1/adapter.safetensors")
    refused(cli("--resume run1 --merge merged"), "run1/adapter.safetensors is not of this run")
    Path("run1/adapter.safetensors").unlink()
    assert cli("--resume run1").status == 0 and not Path("merged").exists()


def test_an_adapter_of_a_twin_is_not_taken(stopped):
    """Oracle: last.pt's hash of the best so far: settings, base and step of the other are the same."""
    path = "run/adapter.safetensors"
    retold(path, put(0.99, "best", "score"))
    refused(stopped("--resume run"), f"{path} is not of this run")


ADAPTER = Path("run/adapter.safetensors")
WRONG = [without("settings"), without("adapter"), without("best"), put([], "settings"), put({}, "settings"),
         put(None, "best"), put("x", "settings", "merge_to"), put(1, "settings", "model"), put(["x"], "task"),
         put("x", "adapter"), put({}, "settings", "data_dir"), put("x", "seconds")]


def test_a_result_that_no_run_writes(cli):
    """Oracle: one sentence that names the folder, although its hash fits."""
    assert cli.tiny("--max-steps 2").status == 0
    whole = json.loads(Path("run/result.json").read_text())
    del whole["hash"]
    for change in WRONG:
        result = copy.deepcopy(whole)
        change(result)
        disk.write_json("run/result.json", result | {"hash": disk.digest(json.dumps(result, sort_keys=True))})
        refused(cli("--resume run --merge m"), "run")
    assert not Path("m").exists()


def test_any_flipped_bit_is_noticed(cli):
    """Oracle: what the files held: each of 100 flips in each is refused by name, or changes white space, or what no reader
    of a zip looks at."""
    assert cli.tiny("--max-steps 2 --merge merged").status == 0
    rng, begin = random.Random(0), 8 + int.from_bytes(Path("merged/model.safetensors").read_bytes()[:8], "little")
    for path, first, read in ((Path("run/result.json"), 0, lambda: folder.load_result("run")),
                              (Path("run/last.pt"), 0, lambda: folder.load_state("run") | {"written": 0}),
                              (ADAPTER, 0, lambda: folder.load_adapter(ADAPTER)),
                              (Path("merged/model.safetensors"), begin, lambda: checkpoint.read_weights("merged"))):
        right, whole = frozen(read()), path.read_bytes()
        for _ in range(100):
            content = bytearray(whole)
            content[rng.randrange(first, len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            try:
                found = frozen(read())
            except (ValueError, Refused) as error:
                assert path.name in str(error) or path.parent.name in str(error)
            else:
                assert found == right and path.suffix != ".safetensors"
        path.write_bytes(whole)
        assert frozen(read()) == right


def test_a_base_that_changes_meanwhile(cli):
    """Oracle: the run whose base stayed as it was: other weights in the same file, and then none."""
    shutil.copytree(cli.models["deberta"], "base")
    with at_step(3, lambda: Path("base/model.safetensors").write_bytes(bytes(5000))):
        assert cli(f"--task demo --model base {SMALL} --out run").status == 0
    assert outcome("run")["adapter.safetensors"] == cli.whole()["adapter.safetensors"]


@on_unix
def test_what_killed_processes_left_is_removed(tmp_path):
    """Oracle: the folder: left folders go, but not one that a process that lives is writing in."""
    with disk.private_folder(tmp_path) as mine:
        (mine / "x").write_text("x")
        left = tmp_path / f".dead{disk.LEFT}"
        left.mkdir()
        (left / "x").write_text("x")
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "x").write_text("x")
        (tmp_path / f".link{disk.LEFT}").symlink_to(outside)
        disk.write_file(tmp_path / "a", "x")
        assert not left.exists() and (mine / "x").exists() and (outside / "x").exists()
    (tmp_path / f".link{disk.LEFT}").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "outside"]


# --- bombs --------------------------------------------------------------------------------------------------

class Made:
    """Pickled as a call: function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


BINS = {"code": Made(bytearray, 10**10), "a tensor": Made(torch.Tensor, 10**9),
        "expanded": torch.zeros(1).expand(10**5, 10**5), "expanded rows": torch.zeros(1, 300).expand(10**7, 300)}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", [*BINS, "same"])
def test_weights_that_swell(tiny, tmp_path, little_memory, name, old):
    """Oracle: the file's size: 41 GB are in no 18 kB. Refused by name, in a zip and in the format before."""
    content = {"x": BINS.get(name)}
    if name == "same":
        content = dict.fromkeys(map(str, range(10**4)), torch.zeros(1000))
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged or .*(take|more than tensors)"):
        checkpoint.read_weights(tmp_path)


def test_a_compressed_bin(tmp_path, little_memory):
    """Oracle: the same for a zip that torch did not write: it would read compressed members, and other sizes."""
    torch.save({"x": torch.zeros(1000, 1000)}, tmp_path / "a.bin")
    for edit, kind in ((lambda content: content * 9, zipfile.ZIP_DEFLATED),
                       (lambda content: content.replace(b"M\xe8\x03", b"M\xff\xff"), zipfile.ZIP_STORED)):
        with zipfile.ZipFile(tmp_path / "a.bin") as old, zipfile.ZipFile(tmp_path / "b.bin", "w", kind) as new:
            for name in old.namelist():
                new.writestr(name, edit(old.read(name)))
        shutil.copy(tmp_path / "b.bin", tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="pytorch_model.bin is damaged or"):
            checkpoint.read_weights(tmp_path)


def steps(*parts):
    return {"type": "Sequence", "normalizers": list(parts), "pretokenizers": list(parts)}


TWICE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BLOB = base64.b64encode(charsmap(KEY_A, b"a" * 5000 + b"\0")).decode()
PADDING = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
           "pad_type_id": 0, "pad_token": "x"}
PARTS = [{"SpecialToken": {"id": "x", "type_id": 0}}]
SPECIAL = {"x": {"id": "x", "ids": [0] * 5000, "tokens": ["x"] * 5000}}
TOKENIZERS = [
    *({"normalizer": part} for part in (
        steps(*[TWICE] * 33), steps(steps(*[TWICE] * 20), steps(*[TWICE] * 20)), steps(*[{"type": "ByteLevel"}] * 33),
        TWICE | {"content": "a" * 5000}, {"type": "Prepend", "prepend": "a" * 10**5}, steps(*[{"type": "NFC"}] * 200),
        {"type": "Precompiled", "precompiled_charsmap": BLOB}, TWICE | {"pattern": {"String": "a" * 10**6}})),
    {"normalizer": TWICE | {"pattern": {"Regex": "(a+)+b"}}},
    {"pre_tokenizer": steps(*[{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                               "use_regex": False}] * 33)},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a+b"}, "behavior": "Isolated", "invert": False}},
    *({"post_processor": {"type": "TemplateProcessing", "special_tokens": special, "single": single, "pair": pair}}
      for special, single, pair in (({}, [{"Sequence": {"id": "A", "type_id": 0}}] * 5000, []),
                                    (SPECIAL, PARTS, PARTS * 5000),
                                    ({}, PARTS, PARTS)))]   # names what is not there: `tokenizers` panics


def test_tokenizers_that_swell(tiny, tmp_path, little_memory):
    """Oracle: the promise: refused by name before a letter becomes gigabytes, or `tokenizers` panics."""
    whole = json.loads((tiny["bert"] / "tokenizer.json").read_text())
    for changes in TOKENIZERS:
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole | changes))
        with soon("reading", 20), pytest.raises(ValueError, match="tokenizer.json is damaged or"):
            data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["spm.model", "tokenizer.json"])
def test_a_piece_of_a_megabyte(tiny, tmp_path, kind):
    """Oracle: this process, which lives: `tokenizers` frees the tree of a Unigram model by recursion."""
    pieces = [("a" * 10**6, -1.0), ("[UNK]", -2.0)]
    whole = json.loads((tiny["bert"] / "tokenizer.json").read_text())
    unigram = json.dumps(whole | {"model": {"type": "Unigram", "vocab": pieces, "unk_id": 1}})
    (tmp_path / kind).write_bytes(model(pieces[:1]) if kind == "spm.model" else unigram.encode())
    with pytest.raises(ValueError, match=f"{kind} is damaged or .*piece (is )?longer than 1000"):
        data.load_tokenizer(tmp_path)


def test_a_tokenizer_that_pads(tiny, tmp_path, little_memory):
    """Oracle: the ids without padding; and an honest chain of replacements is none that swells."""
    whole = json.loads((tiny["bert"] / "tokenizer.json").read_text())
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    honest = steps(*[TWICE | {"pattern": {"String": word}, "content": "x"} for word in ("``", "''", "\u2014")],
                   {"type": "Prepend", "prepend": "\u2581"}, {"type": "NFKC"})
    for change in ({"padding": PADDING}, {"normalizer": honest},
                   *({"normalizer": TWICE | {"pattern": {"Regex": word}}} for word in (" {2,}", r"\s{2,}|[\n\r\t]")),
                   {"pre_tokenizer": steps({"type": "Split", "pattern": {"Regex": gpt2}, "behavior": "Isolated",
                                            "invert": False})}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole | change))
        assert len(data.load_tokenizer(tmp_path).encode("cue0").ids) < 9


def levels(n, end):
    """A trie of n levels in which every letter leads from each to the next: 127 ** n keys in 1 kB a level."""
    units = {0: 256 << 10}
    for level in range(1, n + 1):
        for byte in range(1, 128):
            index = 256 * level ^ byte
            units[index] = byte | HAS_LEAF | (index ^ 256 * (level % n + 1)) << 10
        units[256 * level] = end
    return units


def test_a_charsmap_that_swells(tmp_path, little_memory):
    """Oracle: the promise: a long replacement is refused by name. Keys without end are no list to be made: the
    trie is walked along a text, in which no key is longer than 255 characters."""
    def write(new):
        content = model([("a", -1.0)], normalizer=field(2, charsmap(levels(600, LEAF), new)))
        (tmp_path / "spm.model").write_bytes(content)

    write(b"x" * 10**6 + b"\0")
    with soon("reading", 60), pytest.raises(ValueError, match="spm.model is damaged or .*charsmap"):
        data.load_tokenizer(tmp_path)
    write(b"x" * 250 + b"\0")
    with soon("reading", 60):
        data.load_tokenizer(tmp_path).encode("abc " * 1000)


def test_long_lines(cli, tmp_path, little_memory):
    """Oracle: file and line: no row of GLUE has a megabyte. Many that are just short enough are read in turn."""
    path = tmp_path / "long.tsv"
    with open(path, "wb") as file:
        file.write(b"sentence\tlabel\na\t1\n" + b"x " * (10 << 20) + b"\t1\n")
    refused(cli(f"--train-file {path} --dev-file {path} --out run --model {cli.models['bert']}"),
            f"{path}:3: this line is longer")
    tokenizer = data.load_tokenizer(cli.models["bert"])
    split = glue.Split([("cue0 " * 180_000,)] * 12, None)
    assert data.encode(tokenizer, split, 16).truncated == 12


@pytest.mark.parametrize("kind", ["config.json", "tokenizer.json", "spm.model", "model.safetensors"])
def test_files_of_terabytes(cli, little_memory, kind):
    """Oracle: one sentence with the name: a file with a hole takes no disk, but would take memory."""
    shutil.copytree(cli.models["deberta"], "base")
    if kind == "spm.model":
        Path("base/tokenizer.json").unlink()
    with open(Path("base", kind), "wb") as file:
        file.truncate(1 << 40)
    refused(cli("--task demo --out run --model base"), f"base/{kind}")


# --- what others shall not see ------------------------------------------------------------------------------

def test_an_endpoint_with_a_password(monkeypatch):
    """Oracle: the sentence that from_pretrained() raises."""
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://me:secret@127.0.0.1:9")
    with pytest.raises(OSError) as info:
        hub.find("no/such", "config.json")
    assert "secret" not in str(info.value) and "127.0.0.1:9" in str(info.value)


def test_no_place_and_no_code_is_handed_on(cli, tmp_path):
    """Oracle: the bytes of what is handed out: no folder, host or day, no auto_map that runs others' code."""
    shutil.copytree(cli.models["bert"], "base")
    path = Path("base/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "auto_map": {"AutoModel": "evil.Model"}, "_name_or_path": "/home/me/x", "custom_pipelines": {"a": "b"}}))
    Path("base/tokenizer_config.json").write_text(json.dumps({"name_or_path": "/home/me"}))
    assert cli("--task demo --model", tmp_path / "base", SMALL,
               "--max-steps 2 --out run --merge m --export-peft p").status == 0
    handed = [Path("run/adapter.safetensors").read_bytes(), *contents("m").values(), *contents("p").values()]
    for word in (str(tmp_path), "evil", "/home/me", "auto_map", f'"{os.uname().nodename}', time.strftime("%Y-%m-%d")):
        assert not any(word.encode() in content for content in handed), word
    assert json.loads(Path("p/adapter_config.json").read_text())["base_model_name_or_path"] is None


# --- faults of the machine ----------------------------------------------------------------------------------

def test_without_locks_it_is_said(tmp_path, monkeypatch, capsys):
    """Oracle: the warning, on a file system without locks and on a system that has none."""
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    for fcntl in (disk.fcntl and mock.Mock(flock=none, LOCK_EX=2, LOCK_NB=4), None):
        monkeypatch.setattr(disk, "fcntl", fcntl)
        with disk.alone(tmp_path, "train.py"):
            assert f"warning: {tmp_path} cannot be locked" in capsys.readouterr().err
        disk.write_file(tmp_path / "a", "x")


def test_two_that_resume_at_once(stopped, monkeypatch):
    """Oracle: the run that was whole first: the slower one finds another last.pt than it began with."""
    read = folder.load_state("run")
    assert stopped("--resume run").status == 0             # from beginning to end, in between
    before = contents("run")
    Path("run/result.json").unlink()
    monkeypatch.setattr(folder, "load_state", lambda _: read)
    refused(stopped("--resume run"), "another train.py has gone on")
    assert contents("run").items() < before.items()


def test_read_errors_name_the_file(tmp_path, monkeypatch):
    """Oracle: the path in what is said, for an error that comes from reading and not from opening."""
    class Failing(io.FileIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "some.json").write_text("{}")
    monkeypatch.setattr(disk, "open", Failing, raising=False)
    for read in (disk.read_object, spm.read_spm):
        with pytest.raises(OSError, match="some.json"):
            read(tmp_path / "some.json")


@pytest.fixture
def mount(tmp_path):
    """mount(options): the folder "disk" is a disk of its own, of these options. Skips where nobody may mount one."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        return shutil.which("mount") and subprocess.run(words, capture_output=True).returncode == 0

    if not mount("size=1m"):
        pytest.skip("no disk can be mounted here")
    yield mount
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("fault, says", [("full", "No space left"), ("read-only", "Read-only file system")])
def test_a_disk_that_fails_half_way(cli, server, mount, fault, says):
    """Oracle: the unbroken run, on a real disk of 1 MB that is full, or becomes read-only, after some steps: one
    line with the cause; what was there is as before and goes on later. So for what is handed out and fetched."""
    def fail():
        if fault == "read-only":
            assert mount("remount,ro")
        else:
            with contextlib.suppress(OSError), open("disk/filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with at_step(5, fail):
        done = cli.tiny(BUSY, out="disk/run")
    assert done.status == 1 and len(done.errors) == 1 and says in done.errors[0], done.err
    before = contents("disk/run")
    for words in ("--resume disk/run", "--eval disk/run/adapter.safetensors --merge disk/m --model"):
        done = cli(words, *[cli.models["deberta"]] * words.endswith("model"))
        assert done.status in (1, 2) and len(done.errors) == 1, done.err
        assert says in done.errors[0] or "no folder to write to" in done.errors[0], done.err
        assert contents("disk/run") == before and not any(Path("disk").glob("m/*"))
    address, pages = server
    pages[ZIP] = answer(bytes(10**6))
    with pytest.raises(OSError, match=says):
        fetch.fetch_task(TASKS["rte"], Path("disk/glue"), address)
    mount("remount,rw")
    Path("disk/filler").unlink(missing_ok=True)
    assert cli("--resume disk/run").status == 0 and outcome("disk/run") == cli.whole(BUSY)


@on_unix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_while_it_hands_out(cli, number):
    """Oracle: the folders that were never killed: after a signal before each rename the same command makes them. Until
    then no config.json stands there, without which nothing opens the rest."""
    assert cli.tiny("--max-steps 2").status == 0
    before = contents("run")
    words = f"--eval run/adapter.safetensors --model {cli.models['deberta']} --merge m --export-peft p"
    assert cli(words).status == 0
    whole = {name: contents(name) for name in ("m", "p")}
    for end in range(1, len(whole["m"]) + len(whole["p"]) + 1):
        shutil.rmtree("m", ignore_errors=True)
        shutil.rmtree("p", ignore_errors=True)
        ended = os.waitpid(child(words, within=at_rename(end, lambda: signal.raise_signal(number))), 0)[1]
        for name in ("m", "p"):                            # one that is whole would be refused now
            if Path(name).exists() and contents(name) == whole[name]:
                shutil.rmtree(name)
        assert not [*Path().glob("m/config.json"), *Path().glob("p/adapter_config.json")], end
        again = cli(words)
        assert again.status == 0, (ended, again.err)
        assert {name: contents(name) for name in ("m", "p")} == whole and contents("run") == before


def test_a_clock_that_jumps(stopped, monkeypatch):
    """Oracle: the seconds of log and result: they never go back, and a year is not among them."""
    jump = iter([10**9, 0, 2 * 10**9] * 10**5)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jump))
    assert stopped("--resume run").status == 0
    assert json.loads(Path("run/result.json").read_text())["seconds"] < 1000
    assert outcome("run") == stopped.whole(BUSY)
