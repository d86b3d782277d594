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

import pytest
import tokenizers
import torch

import data
import model as models
import train
from data import TASKS
from formats import disk, fetch, glue, hub, spm
from running import folder, machine, options, saving
from tests.cli import child, refused, sentences, soon, write_task
from tests.conftest import SMALL, outcome
from tests.test_fetch import ZIP, answer, server
from tests.test_folder import BUSY, at_step, contents, ctrl_c
from tests.test_spm import A, HAS_LEAF, KEY_A, LEAF, charsmap, field, model

pytestmark = pytest.mark.ci                                # half a minute: in CI only

on_unix = pytest.mark.skipif(os.name == "nt", reason="links, signals and locks as Unix has them")


@pytest.fixture
def little_memory():
    """From now on the system gives this process 500 MB more, and no byte after that."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 500_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def stopped(cli):
    """cli, with a run in the folder "run" that was stopped after 4 of 8 steps, and one evaluation."""
    with at_step(4, ctrl_c):
        assert cli.tiny(BUSY).status == 130
    return cli


# --- last.pt ------------------------------------------------------------------------------------------------

def moment(change):
    """A change of one of AdamW's moments."""
    def spoil(state):
        moments = state["optimizer"]["state"][0]
        moments["exp_avg"] = change(moments["exp_avg"])
    return spoil


def put(value, *path):
    """A change: this value there."""
    def spoil(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value
    return spoil


def without(*path):
    """A change: nothing there."""
    def spoil(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]
    return spoil


STEPS = {"step": 3, "score": 0.5, "scores": {"dev": {"accuracy": 0.5}}, "kept": 96}
TOP = list(folder.STATE)
SPOILT = [
    moment(lambda t: t[:1]), moment(lambda t: torch.zeros(())), moment(lambda t: t.flatten()),
    moment(lambda t: torch.zeros(1).expand(t.shape)), moment(lambda t: torch.zeros(*t.shape, 9)[..., 0]),
    moment(lambda t: t.double()), moment(lambda t: t.long()), moment(lambda t: t.tolist()), moment(lambda t: None),
    put(torch.zeros(3), "optimizer", "state", 0, "step"), put(0, "optimizer", "state", 0, "step"),
    put({}, "optimizer", "state", 0), put({}, "optimizer", "state", 999), put({}, "optimizer", "state", "0"),
    put([], "optimizer", "state"), put({}, "optimizer"), without("optimizer", "state", 0, "exp_avg_sq"),
    put(torch.zeros(()), "optimizer", "state", 0, "max_exp_avg_sq"),
    put(9, "step"), put(10**12, "step"), put(-1, "step"), put(4.0, "step"), put(True, "step"),
    put(-1, "tokens"), put(-1, "log_bytes"), put(10**30, "step"), put(float("nan"), "seconds"), put("x", "seconds"),
    put([1], "evaluations"), put([{}], "evaluations"), put([STEPS | {"step": "3"}], "evaluations"),
    put([STEPS | {"scores": {"dev": 0.5}}], "evaluations"), put([STEPS | {"scores": []}], "evaluations"),
    put([], "rng"), put([{}], "rng"), put([None], "rng"), put([{"cpu": torch.zeros(5)}], "rng"),
    put([{"cpu": torch.zeros(5056, dtype=torch.uint8)}], "rng"), put({}, "pruner"), put(None, "pruner"),
    put(torch.tensor([99, 0]), "pruner", "_extra_state"), put(3, "pruner", "_extra_state"),
    without("pruner", "keep"), put(torch.zeros(1).expand(12, 8), "pruner", "keep"),
    put({}, "weights"), put(torch.zeros(1), "weights", "x"),
    put("x", "settings"), put("x", "settings", "batch_size"), put(None, "settings", "lr"), put([[]], "settings", "targets"),
    put("x", "settings", "anything"), put("nothing", "settings", "method"), put(-0.5, "settings", "warmup"),
    *(without(name) for name in TOP), put(1, "anything")]


def test_states_that_this_run_cannot_have_written(stopped):
    """Oracle: the files before: each is refused with one sentence, although its hash fits; nothing is written."""
    whole = folder.load_state("run")
    for i, spoil in enumerate(SPOILT):
        state = copy.deepcopy(whole)                       # of which no part may be the file that changes
        spoil(state)
        torch.save(state, "spoilt.pt")                     # write_state() would put a format back
        hash_ = folder.hash_of_file(Path("spoilt.pt"))
        Path("run/last.pt").write_bytes(Path("spoilt.pt").read_bytes() + hash_)
        before = contents("run")
        done = stopped("--resume run")
        assert done.status == 2 and len(done.errors) == 1 and "run" in done.errors[0], (i, done.err)
        assert contents("run") == before and "<" not in done.errors[0], i
    folder.write_state("run", whole)
    assert stopped("--resume run").status == 0 and outcome("run") == stopped.whole(BUSY)


def test_a_billion_parts_of_a_batch_take_no_time(monkeypatch):
    """Oracle: the rows: a batch of 3 has 3 parts, whatever --accum a file gives."""
    rows, weight = [], torch.zeros((), requires_grad=True)
    monkeypatch.setattr(train, "part_loss", lambda net, here, part, share: rows.append(part.rows.tolist()) or weight)
    with soon("gradients"):
        train.gradients(torch.nn.Module(), data.Batch(*[torch.arange(3)] * 5), machine.join(), 10**9)
    assert rows == [[0], [1], [2]]


def test_options_of_adamw_are_not_the_files(stopped):
    """Oracle: the unbroken run: what last.pt says of AdamW's settings beside its moments counts for nothing."""
    state = folder.load_state("run")
    state["optimizer"]["param_groups"] = [{"lr": "x", "fused": False, "amsgrad": True, "params": [7]}]
    folder.write_state("run", state)
    assert stopped("--resume run").status == 0 and outcome("run") == stopped.whole(BUSY)


def rezipped(source, target, edit=lambda name, content: content, kind=zipfile.ZIP_DEFLATED):
    """A zip with other contents, compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))


def test_a_state_that_swells(stopped, little_memory):
    """Oracle: what it holds, 600 MB in 3 MB: refused before torch makes it."""
    with zipfile.ZipFile("run/last.pt") as old, zipfile.ZipFile("big.pt", "w", 8, compresslevel=1) as new:
        for name in old.namelist():
            with new.open(name, "w") as member:
                member.write(old.read(name))
                for _ in range(600 * name.endswith("data/0")):
                    member.write(bytes(1_000_000))
    whole = Path("big.pt").read_bytes()
    Path("run/last.pt").write_bytes(whole + folder.hash_of_file(Path("big.pt")))
    refused(stopped("--resume run"), "run/last.pt", "unpacks to more")


# --- where a file would have us write -----------------------------------------------------------------------

def test_a_state_chooses_no_place(stopped):
    """Oracle: the folder: nothing new beside the run. What the run began with is said, and done if given again."""
    state = folder.load_state("run")
    state["settings"] |= {"merge": "m", "export_peft": "p", "predict": "t.tsv", "out": "o", "overwrite": True,
                          "eval": "run/adapter.safetensors", "resume": "r"}
    folder.write_state("run", state)
    done = stopped("--resume run")
    assert done.status == 0 and "began with --merge m" in done.err and "--export-peft p" in done.err
    assert [path.name for path in Path().iterdir()] == ["run"] and outcome("run") == stopped.whole(BUSY)


def retold(path, change):
    """An adapter that says something else of itself; its hash fits."""
    tensors, _ = folder.load_adapter(path)
    with hub.safe_open(path, "pt") as file:
        facts = json.loads(json.loads(file.metadata()["lora2"])[0])
    change(facts)
    facts = json.dumps(facts)
    disk.write_tensors(path, tensors, {"lora2": json.dumps([facts, disk.digest(tensors, facts)])})


@pytest.mark.parametrize("change", [
    *(put("x", "settings", name) for name in ("merge", "out", "overwrite", "predict", "export_peft", "data_dir")),
    put("x", "merge"), put({}, "settings"), put([], "settings"), put(None, "settings", "batch_size"),
    put(10**9, "settings", "k"), put(10**9, "settings", "max_len"), put("x", "settings", "r"), put(None, "columns"),
    put("x", "columns", "downloads"), put([], "columns", "texts"), put([1, 2], "columns", "labels"),
    put(["x"], "columns", "metrics"), put({}, "best"), put(None, "best"), put("../x", "best"), without("columns")])
def test_an_adapter_chooses_no_place_and_no_size(cli, change):
    """Oracle: one sentence, nothing new in the folder; what an adapter of ours cannot say is refused."""
    assert cli.tiny("--max-steps 2").status == 0
    retold("run/adapter.safetensors", change)
    before = contents("run")
    refused(cli("--eval run/adapter.safetensors --model", cli.models["deberta"]))
    assert [path.name for path in Path().iterdir()] == ["run"] and contents("run") == before


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
    """Oracle: the outside file. A link in place of whatever is written is replaced or refused."""
    outside = Path("outside")
    outside.write_text("mine")
    names = ["last.pt", "adapter.safetensors", "log.jsonl", "ranks.json", "result.json", "predictions_dev.tsv"]
    for name in names:
        for planted in (f".{name}.tmp", f"{name}.tmp"):
            Path("run", planted).symlink_to(outside.absolute())
    for name in ("ranks.json", "result.json.new", "predictions_dev.tsv"):
        Path("run", name).unlink(missing_ok=True)
        Path("run", name).symlink_to(outside.absolute())
    assert stopped("--resume run").status == 0 and outside.read_text() == "mine"
    assert outcome("run")["ranks.json"] == stopped.whole(BUSY)["ranks.json"]


@on_unix
@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("there", [True, False])
def test_a_log_elsewhere_is_left_alone(stopped, link, there):
    """Oracle: the outside file: neither cut to log_bytes nor added to, behind a link of either kind."""
    outside = Path("outside").absolute()
    shutil.copy("run/log.jsonl", outside)
    with open(outside, "a") as file:
        file.write("more\n")
    before = outside.read_bytes()
    if not there:
        outside.unlink()
    os.unlink("run/log.jsonl")
    if there or link is os.symlink:
        link(outside, "run/log.jsonl")
    done = stopped("--resume run")
    assert done.status == (0 if link is os.link else 2 if there else 1) and (outside.exists() == there)
    assert not there or outside.read_bytes() == before
    assert link is os.link or "log.jsonl" in done.errors[0]


@on_unix
def test_a_pipe_in_place_of_the_log(stopped):
    """Oracle: the promise: an error soon, where an ordinary open() would wait for ever for a reader."""
    os.unlink("run/log.jsonl")
    os.mkfifo("run/log.jsonl")
    with soon("--resume"):
        assert stopped("--resume run").status in (0, 1)


@on_unix
def test_what_a_tokenizer_links_to_is_not_copied(cli, tmp_path, monkeypatch):
    """Oracle: the outside file's content, which no merged folder may hold; links within the Hub's cache are its
    way of keeping files."""
    assert cli.tiny("--max-steps 2").status == 0
    shutil.copytree(cli.models["deberta"], "base")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        Path("base", name).symlink_to(secret)
        refused(cli("--eval run/adapter.safetensors --model base --merge merged"), f"base/{name} is a link")
        Path("base", name).unlink()
    cache = Path("copied/models--a--b")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (cache / "snapshots" / "0123").mkdir(parents=True, exist_ok=True)
        (cache / "blobs").mkdir(exist_ok=True)
        shutil.copy(Path("base", name), cache / "blobs" / f"blob-{name}")
        (cache / "snapshots" / "0123" / name).symlink_to(f"../../blobs/blob-{name}")
    assert cli("--eval run/adapter.safetensors --merge merged --model", cache / "snapshots" / "0123").status == 0


@on_unix
def test_links_in_a_data_folder_are_not_written_through(tmp_path):
    """Oracle: the outside file, when a fetched file takes the place of a link that leads nowhere."""
    place, beside, outside = tmp_path / "RTE", tmp_path / "beside", tmp_path / "outside"
    for made in (place, beside):
        made.mkdir()
    (beside / "train.tsv").write_text("new")
    (place / "train.tsv").symlink_to(outside)
    fetch.move_files(beside, place)
    assert not outside.exists() and (place / "train.tsv").read_text() == "new"


@on_unix
def test_new_files_have_the_rights_of_others(tmp_path):
    """Oracle: open(): a private folder to write in must not make the file in it private."""
    disk.write_file(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# --- what hashes are for ------------------------------------------------------------------------------------

def bpe(merges):
    letters = {letter: i for i, letter in enumerate("[abcdefgh]")}
    words = {a + b for a, b in merges}
    vocabulary = letters | {word: len(letters) + i for i, word in enumerate(sorted(words))}
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))


def test_the_fingerprint_sees_every_part_of_a_tokenizer(tiny, tmp_path):
    """Oracle: the tokenizer: two merges in another order, a score of a piece, a replacement, one rule of a
    charsmap; none of them changes the vocabulary or the ids of any text that we would think of."""
    net = models.from_pretrained(tiny["bert"], 2)
    merges = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("e", "f")]
    made = [bpe(merges), bpe(merges[:3] + merges[:2:-1])]
    for score in (-1.0, -1.5):
        made.append(tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0), ("b", score)], 0)))
    for content in ("x", "y"):
        made.append(tokenizers.Tokenizer(tokenizers.models.BPE()))
        made[-1].normalizer = tokenizers.normalizers.Replace("\u2603", content)
    assert len({folder.fingerprint(net, tokenizer) for tokenizer in made}) == 6
    assert folder.fingerprint(net, bpe(merges)) == folder.fingerprint(net, bpe(merges))
    prints, net.source = set(), tmp_path
    for score, new in ((-1.0, b"x\0"), (-1.5, b"x\0"), (-1.0, b"y\0")):
        content = model([("a", score), ("x", -3.0)], normalizer=field(2, charsmap(KEY_A, new)))
        (tmp_path / "spm.model").write_bytes(content)
        prints.add(folder.fingerprint(net, spm.read_spm(tmp_path / "spm.model")))
    assert len(prints) == 3


def test_adapters_that_were_swapped(cli):
    """Oracle: result.json's own hash of its adapter: another run's, with a hash that fits, is refused."""
    for seed in (1, 2):
        assert cli.tiny(f"--max-steps 2 --seed {seed} --out run{seed}").status == 0
    shutil.copy("run2/adapter.safetensors", "run1/adapter.safetensors")
    for words in ("", "--merge merged"):
        refused(cli("--resume run1", words), "run1/adapter.safetensors is not of this run")
    Path("run1/adapter.safetensors").unlink()
    assert cli("--resume run1").status == 0 and not Path("merged").exists()


def test_an_adapter_of_a_twin_is_not_taken(stopped):
    """Oracle: last.pt's hash of the best so far: settings, base and step of the other are the same."""
    path = "run/adapter.safetensors"
    retold(path, put(0.99, "best", "score"))
    refused(stopped("--resume run"), f"{path} is not of this run")


@pytest.mark.parametrize("change", [
    without("settings"), without("adapter"), without("best"), put([], "settings"), put({}, "settings"), put(None, "best"),
    put("x", "settings", "merge_to"), put(1, "settings", "model"), put(["x"], "task"), put("x", "adapter"),
    put({}, "settings", "data_dir"), put("x", "seconds"), without("seconds")])
def test_a_result_that_no_run_writes(cli, change):
    """Oracle: one sentence that names folder or file, although its hash fits."""
    assert cli.tiny("--max-steps 2").status == 0
    result = json.loads(Path("run/result.json").read_text())
    del result["hash"]
    change(result)
    disk.write_json("run/result.json", result | {"hash": disk.digest(json.dumps(result, sort_keys=True))})
    refused(cli("--resume run --merge m"), "run")
    assert not Path("m").exists()


def test_any_flipped_bit_of_a_result_is_noticed(cli):
    """Oracle: the bits: each of 300 flips is refused with the file's name."""
    assert cli.tiny("--max-steps 2").status == 0
    path, rng = Path("run/result.json"), random.Random(0)
    whole = path.read_bytes()
    for _ in range(300):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        if json.loads(whole) != tried(content):            # white space may be another
            refused(cli("--resume run"), "run")


def tried(content):
    """What JSON holds, or None."""
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_any_flipped_bit_of_merged_weights_is_noticed(cli):
    """Oracle: the weights: each of 60 flips among them is refused by name; without one they load."""
    assert cli.tiny("--max-steps 2 --merge merged").status == 0
    path, rng = Path("merged/model.safetensors"), random.Random(0)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(60):
        content = bytearray(whole)
        content[rng.randrange(begin, len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors cannot be read .*hash"):
            hub.read_weights("merged")
    path.write_bytes(whole)
    assert models.from_pretrained("merged", 2).new_weights == []


def test_a_base_that_changes_meanwhile(cli, tmp_path):
    """Oracle: the run whose base stayed as it was: other weights in the same file, then none at all."""
    shutil.copytree(cli.models["deberta"], "base")
    other = Path("base/model.safetensors")

    def change():
        with open(other, "r+b") as file:
            file.seek(4000)
            file.write(bytes(3000))
            file.truncate(5000)

    words = f"--task demo --model base {SMALL} --out run"
    with at_step(3, change):
        assert cli(words).status == 0
    mine, whole = outcome("run"), cli.whole()
    assert mine["adapter.safetensors"] == whole["adapter.safetensors"]


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


BINS = {"bytes": Made(bytearray, 10**10), "a tensor": Made(torch.Tensor, 10**9), "sizes": Made(torch.Size, [9]),
        "expanded": torch.zeros(1).expand(10**5, 10**5), "expanded rows": torch.zeros(1, 300).expand(10**7, 300),
        "same": {str(i): torch.zeros(1000) for i in range(3)}}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", BINS)
def test_weights_that_swell(tiny, tmp_path, little_memory, name, old):
    """Oracle: the file's size: 41 GB are in no 18 kB. Refused by name, in a zip and in the format before."""
    content = BINS[name] if name == "same" else {"x": BINS[name]}
    if name == "same":
        content = {f"{i}": content["0"] for i in range(10**4)}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read .*(take|more than tensors)"):
        hub.read_weights(tmp_path)


def test_a_compressed_bin(tmp_path, little_memory):
    """Oracle: the same for a zip that torch did not write: it would read compressed members, and other sizes."""
    torch.save({"x": torch.zeros(1000, 1000)}, tmp_path / "a.bin")
    for name, edit, kind in (("compressed", lambda name, content: content * 9, zipfile.ZIP_DEFLATED),
                             ("sizes", lambda name, content: content.replace(b"M\xe8\x03", b"M\xff\xff"),
                              zipfile.ZIP_STORED)):
        rezipped(tmp_path / "a.bin", tmp_path / "pytorch_model.bin", edit, kind)
        with pytest.raises(ValueError, match="pytorch_model.bin cannot be read"):
            hub.read_weights(tmp_path)


def steps(*parts):
    return {"type": "Sequence", "normalizers": list(parts), "pretokenizers": list(parts)}


TWICE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BLOB = base64.b64encode(charsmap(KEY_A, b"a" * 5000 + b"\0")).decode()
PADDING = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
           "pad_type_id": 0, "pad_token": "x"}
TOKENIZERS = [
    {"normalizer": steps(*[TWICE] * 33)}, {"normalizer": steps(steps(*[TWICE] * 20), steps(*[TWICE] * 20))},
    {"normalizer": TWICE | {"content": "a" * 5000}}, {"normalizer": {"type": "Prepend", "prepend": "a" * 10**5}},
    {"normalizer": TWICE | {"pattern": {"Regex": "(?=.)"}, "content": "a" * 5000}},
    {"normalizer": steps(*[{"type": "ByteLevel"}] * 33)},
    {"pre_tokenizer": steps(*[{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                               "use_regex": False}] * 33)},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": BLOB}},
    *({"normalizer": TWICE | {"pattern": {"Regex": pattern}}} for pattern in (
        "(a+)+b", "a*a*b", "(a|aa)+$", "(.*)*", "a?a?aa", "a{99999}", r"(\\w+\\s?)*$", r"\\1", "[[a]-b]+c", "a+(?!b)")),
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a+b"}, "behavior": "Isolated", "invert": False}},
    {"normalizer": steps(*[{"type": "NFC"}] * 200)}, {"normalizer": TWICE | {"pattern": {"String": "a" * 10**6}}},
    {"post_processor": {"type": "TemplateProcessing", "special_tokens": {}, "single": [{"Sequence": {
        "id": "A", "type_id": 0}}] * 5000, "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]}},
    {"post_processor": {"type": "TemplateProcessing", "pair": [], "single": [],
                        "special_tokens": {"x": {"id": "x", "ids": [0] * 5000, "tokens": ["x"] * 5000}}}}]


@pytest.mark.parametrize("i", range(len(TOKENIZERS)))
def test_tokenizers_that_swell(tiny, tmp_path, little_memory, i):
    """Oracle: the promise: refused by name before a letter becomes gigabytes."""
    whole = json.loads((tiny["bert"] / "tokenizer.json").read_text())
    changes = copy.deepcopy(TOKENIZERS[i])
    if changes.get("post_processor", {}).get("special_tokens"):
        part = {"SpecialToken": {"id": "x", "type_id": 0}}
        changes["post_processor"]["pair"] = [part] * 5000
        changes["post_processor"]["single"] = [part]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | changes))
    with soon("reading", 20), pytest.raises(ValueError, match="tokenizer.json is not a tokenizer file"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["spm.model", "tokenizer.json"])
def test_a_piece_of_a_megabyte(tiny, tmp_path, kind):
    """Oracle: this process, which lives: `tokenizers` frees the tree of a Unigram model by recursion."""
    pieces = [("a" * 10**6, -1.0), ("[UNK]", -2.0)]
    whole = json.loads((tiny["bert"] / "tokenizer.json").read_text())
    unigram = json.dumps(whole | {"model": {"type": "Unigram", "vocab": pieces, "unk_id": 1}})
    (tmp_path / kind).write_bytes(model(pieces[:1]) if kind == "spm.model" else unigram.encode())
    with pytest.raises(ValueError, match=f"{kind} is not a .*piece (is )?longer than 1000"):
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
    with soon("reading", 60), pytest.raises(ValueError, match="spm.model is not a readable .*charsmap"):
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
    split = glue.Split([("cue0 " * 180_000,)] * 6, None)
    assert data.encode(tokenizer, split, 16).truncated == 6


def test_sizes_of_a_config(cli, little_memory):
    """Oracle: the weights that are there: sizes of ten millions are refused before a model is made."""
    shutil.copytree(cli.models["bert"], "base")
    path = Path("base/config.json")
    whole = json.loads(path.read_text())
    for change in ({"hidden_size": 10**7}, {"intermediate_size": 10**7}, {"vocab_size": 10**7},
                   {"max_position_embeddings": 10**7}, {"num_hidden_layers": 1000, "intermediate_size": 10**5}):
        path.write_text(json.dumps(whole | change))
        refused(cli("--task demo --out run --model base"), "base", "size mismatch")


@pytest.mark.parametrize("kind", ["config.json", "tokenizer.json", "spm.model", "model.safetensors"])
def test_files_of_terabytes(cli, little_memory, kind):
    """Oracle: one sentence with the name: a file with a hole takes no disk, but would take memory."""
    shutil.copytree(cli.models["deberta"], "base")
    if kind == "spm.model":
        Path("base/tokenizer.json").unlink()
    with open(Path("base", kind), "wb") as file:
        file.truncate(1 << 40)
    refused(cli("--task demo --out run --model base"), f"base/{kind}")


def test_deep_json(cli):
    """Oracle: one sentence with the name, for each JSON file that is read."""
    assert cli.tiny("--max-steps 2").status == 0
    Path("run/result.json").write_text("[" * 10**6)
    refused(cli("--resume run"), "run/result.json")


# --- what others shall not see ------------------------------------------------------------------------------

def test_secrets_are_not_said():
    """Oracle: by hand: of an address its password, and a token of the Hub, wherever they stand."""
    said = disk.one_line("GET https://me:secret@host/x?a=1 and http://proxy:8 failed for hf_" + "a" * 30 + " a@b")
    assert said == "GET https://host/x?a=1 and http://proxy:8 failed for  a@b"


def test_an_endpoint_with_a_password(monkeypatch):
    """Oracle: the sentence that from_pretrained() raises."""
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://me:secret@127.0.0.1:9")
    with pytest.raises(OSError) as info:
        hub.find("no/such", "config.json")
    assert "secret" not in str(info.value) and "127.0.0.1:9" in str(info.value)


def test_no_place_and_no_code_is_handed_on(cli, tmp_path):
    """Oracle: the bytes of what is handed out: no folder of this machine, no auto_map that runs others' code."""
    shutil.copytree(cli.models["bert"], "base")
    path = Path("base/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "auto_map": {"AutoModel": "evil.Model"}, "_name_or_path": "/home/me/x", "custom_pipelines": {"a": "b"}}))
    Path("base/tokenizer_config.json").write_text(json.dumps({"name_or_path": "/home/me"}))
    assert cli("--task demo --model", tmp_path / "base", SMALL,
               "--max-steps 2 --out run --merge m --export-peft p").status == 0
    for name in ("m", "p"):
        for content in contents(name).values():
            assert not any(word in content for word in (str(tmp_path).encode(), b"evil", b"/home/me"))
    assert json.loads(Path("p/adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert "auto_map" not in json.loads(Path("m/config.json").read_text())


# --- faults of the machine ----------------------------------------------------------------------------------

def test_without_locks_it_is_said(tmp_path, monkeypatch, capsys):
    """Oracle: the warning, on a file system without locks and on a system that has none."""
    if disk.fcntl is not None:
        def none(*_):
            raise OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(disk.fcntl, "flock", none)
        with disk.alone(tmp_path, "train.py"):
            assert "cannot be locked" in capsys.readouterr().err
        disk.write_file(tmp_path / "a", "x")
    monkeypatch.setattr(disk, "fcntl", None)
    with disk.alone(tmp_path, "train.py"):
        assert f"warning: {tmp_path} cannot be locked" in capsys.readouterr().err


def test_two_that_resume_at_once(stopped, monkeypatch):
    """Oracle: the run that was whole first: the slower one finds another last.pt than it began with."""
    turns, real = [], saving.RunFolder.__enter__

    def late(files):
        if not turns:
            turns.append(1)
            assert stopped("--resume run").status == 0     # from beginning to end, in between
        return real(files)

    monkeypatch.setattr(saving.RunFolder, "__enter__", late)
    done = stopped("--resume run")
    refused(done, "another train.py has gone on")
    assert outcome("run") == stopped.whole(BUSY)


def test_read_errors_name_the_file(tmp_path, monkeypatch):
    """Oracle: the path in what is said, for an error that comes from reading and not from opening."""
    for name in ("config.json", "spm.model", "result.json"):
        (tmp_path / name).write_text("{}")

    class Failing(io.FileIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk, "open", Failing, raising=False)
    for read, name in ((disk.read_object, "config.json"), (spm.read_spm, "spm.model"),
                       (lambda path: disk.read_json(path, "advice"), "result.json")):
        with pytest.raises(OSError, match=name):
            read(tmp_path / name)


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_folder_that_can_no_more_be_written(cli, monkeypatch, error):
    """Oracle: the promise: one line with the cause and the file; what was there is as before, and goes on."""
    def fails(*_):
        raise OSError(error, os.strerror(error))

    def from_now_on():
        monkeypatch.setattr(disk.tempfile, "mkdtemp", fails)

    mkdtemp = disk.tempfile.mkdtemp
    with at_step(5, from_now_on):
        done = cli.tiny(BUSY)
    assert done.status == 1 and len(done.errors) == 1 and os.strerror(error) in done.errors[0]
    monkeypatch.setattr(disk.tempfile, "mkdtemp", mkdtemp)
    assert cli("--resume run").status == 0 and outcome("run") == cli.whole(BUSY)


@pytest.fixture
def disk_of_a_megabyte(tmp_path):
    """A folder that is a disk of its own, and mount(options) for it. Skips where nobody may mount one."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        return subprocess.run(words, capture_output=True).returncode == 0

    if shutil.which("mount") is None or not mount("size=1m"):
        pytest.skip("no disk can be mounted here")
    yield place, mount
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("fault, says", [("full", "No space left"), ("read-only", "Read-only file system")])
def test_a_disk_that_fails_half_way(cli, server, disk_of_a_megabyte, fault, says):
    """Oracle: the unbroken run, on a real disk of 1 MB that is full, or becomes read-only, after some steps: one
    line with the cause; what was there is as before and goes on later. So for what is handed out and fetched."""
    place, mount = disk_of_a_megabyte
    address, pages = server
    filler = place / "filler"

    def fail():
        if fault == "read-only":
            assert mount("remount,ro")
        else:
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    def mend():
        mount("remount,rw")
        filler.unlink(missing_ok=True)

    with at_step(5, fail):
        done = cli.tiny(BUSY, out=place / "run")
    assert done.status == 1 and len(done.errors) == 1 and says in done.errors[0], done.err
    before = contents(place / "run")
    for words in (f"--resume {place}/run", f"--eval {place}/run/adapter.safetensors --merge {place}/m --model "
                  + str(cli.models["deberta"])):
        done = cli(words)
        assert done.status in (1, 2) and len(done.errors) == 1, done.err
        assert says in done.errors[0] or "no folder to write to" in done.errors[0], done.err
        assert contents(place / "run") == before and {path.name for path in place.iterdir()} <= {"run", "filler", "m"}
    pages[ZIP] = answer(bytes(10**6))
    with pytest.raises(OSError, match=says):
        fetch.fetch_task(TASKS["rte"], place / "glue", address)
    mend()
    assert cli(f"--resume {place}/run").status == 0 and outcome(place / "run") == cli.whole(BUSY)


@on_unix
@pytest.mark.parametrize("last", range(1, 5))
@pytest.mark.parametrize("option", ["--merge", "--export-peft"])
def test_killed_between_two_renames_of_a_model(cli, option, last):
    """Oracle: the folder that was never killed, after the same command once more. Until then no config.json
    stands there, without which nothing opens the rest."""
    assert cli.tiny("--max-steps 2").status == 0
    words = f"--eval run/adapter.safetensors --model {cli.models['deberta']} {option} "
    assert cli(words + "whole").status == 0
    pid = os.fork()
    if pid == 0:
        renames, rename = [], os.replace

        def dying(source, target):
            renames.append(target)
            if len(renames) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
        os.replace = dying
        cli(words + "half")
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    n = len(contents("whole"))
    assert killed == (last <= n)
    if killed:
        assert {path.name for path in Path("half").glob("*config.json")} <= {"tokenizer_config.json"}
        assert cli(words + "half").status == 0
    assert contents("half") == contents("whole")


@on_unix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("n", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_it_hands_out(cli, number, n):
    """Oracle: the folders that were never killed: after a kill at any moment the same command makes them."""
    assert cli.tiny("--max-steps 2").status == 0
    before = contents("run")
    words = f"--eval run/adapter.safetensors --model {cli.models['deberta']} --merge m --export-peft p"
    began = time.monotonic()
    assert os.waitpid(child(words), 0)[1] == 0
    longest = time.monotonic() - began
    whole = {name: contents(name) for name in ("m", "p")}
    for _ in range(n):
        shutil.rmtree("m", ignore_errors=True)
        shutil.rmtree("p", ignore_errors=True)
        pid = child(words)
        time.sleep(random.uniform(longest / 3, longest))
        os.kill(pid, number)
        ended = os.waitpid(pid, 0)[1]
        for name in ("m", "p"):                            # one that is whole would be refused now
            if Path(name).exists() and contents_of_files(name) == whole[name]:
                shutil.rmtree(name)
        again = cli(words)
        assert again.status == 0, (ended, again.err)
        assert {name: contents(name) for name in ("m", "p")} == whole and contents("run") == before


def contents_of_files(place):
    return {path.name: path.read_bytes() for path in Path(place).iterdir() if path.is_file()}


def test_a_clock_that_jumps(stopped, monkeypatch):
    """Oracle: the seconds of log and result: they never go back, and a year is not among them."""
    jump = iter([10**9, 0, 2 * 10**9] * 10**5)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jump))
    assert stopped("--resume run").status == 0
    assert json.loads(Path("run/result.json").read_text())["seconds"] < 1000
    assert outcome("run") == stopped.whole(BUSY)
