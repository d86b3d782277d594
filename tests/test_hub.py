"""Tests of hub.py through the real huggingface_hub client, against a small Hub on 127.0.0.1.

The client reads its settings when it is imported, so each situation is a fresh interpreter that calls
from_pretrained() and load_tokenizer() as a user does. Nothing leaves this machine.
"""
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import data
from formats import hub, toy
from model import from_pretrained
from tests.checkpoints import NARROW, build, write
from tests.test_fetch import answer, server

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DEBERTA = "microsoft/deberta-v3-base"
SPM = ROOT / "tests" / "data" / "spm_small.model"

# --- a Hub -------------------------------------------------------------------------------------------------

PAGES = {  # repository: what it answers to all questions
    "no/such": answer(b"", 401, X_Error_Code="RepoNotFound"), "no/such-404": answer(b"", 404, X_Error_Code="RepoNotFound"),
    "gated/asked": answer(b"", 403, X_Error_Code="GatedRepo"), "broken/500": answer(b"", 500),
    "gated/anonymous": answer(b"", 401, X_Error_Code="GatedRepo"), "private/bare401": answer(b"", 401),
    "busy/429": answer(b"", 429, Retry_After="300"), "hangs/forever": lambda _: time.sleep(15),
    "no/revision": answer(b"", 404, X_Error_Code="RevisionNotFound"),
    "portal/login": answer(b"<html>Please log in</html>")}   # as a hotel's page


@pytest.fixture
def a_hub(server):
    """(address, questions asked) of a Hub with DeBERTaV3-base's files as they are (no safetensors, fp16, spm.model), and
    others: HEAD and GET of /{repository}/resolve/{revision}/{file}."""
    deberta, bert = (build(NARROW[family]).state_dict() for family in ("deberta", "bert"))
    pretrained = {key: t.half() for key, t in deberta.items() if key.startswith("deberta.")}
    pretrained["lm_predictions.lm_head.bias"] = torch.ones(3).half()
    pickled = io.BytesIO()
    torch.save(pretrained, pickled)
    config, weights = json.dumps(NARROW["bert"]).encode(), save(bert)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [dict(list(bert.items())[i::2]) for i in range(2)]
    index = {"weight_map": {key: name for name, part in zip(names, parts) for key in part}}
    files = {
        DEBERTA: {"config.json": json.dumps(NARROW["deberta"]).encode(), "spm.model": SPM.read_bytes(),
                  "pytorch_model.bin": pickled.getvalue()},
        "some/model": {"config.json": config, "model.safetensors": weights,
                       "tokenizer.json": toy.tokenizer().to_str().encode()},
        "some/sharded": {"config.json": config, "model.safetensors.index.json": json.dumps(index).encode(),
                         **{name: save(part) for name, part in zip(names, parts)}},
        "no/weights": {"config.json": config}, "no/config": {"model.safetensors": weights},
        "onename": {"config.json": config, "model.safetensors": weights}}
    asked = []

    def page(handler):
        found = re.fullmatch(rf"/(.+)/resolve/(?:main|{COMMIT}|refs%2Fpr%2F1)/([^/]+)", handler.path)
        repository, file = found.groups() if found else ("no/revision", None)
        asked.append((handler.command, repository, file))
        content = files.get("some/model" if repository.startswith("cut/") else repository, {}).get(file)
        if repository in PAGES:
            return PAGES[repository](handler)
        if content is None:
            return answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)(handler)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": COMMIT,
                   "Content_Length": len(content)}
        if handler.command == "HEAD":
            content = b""
        elif file == "model.safetensors" and repository == "cut/short":    # a whole answer, not the whole file
            content, headers["Content_Length"] = content[:10], 10
        elif file == "model.safetensors" and (repository == "cut/always" or repository == "cut/once"
                                              and asked.count(asked[-1]) == 1):
            content = content[:len(content) // 2]            # the connection ends before the announced length
        answer(content, **headers)(handler)

    address, pages = server
    pages["else"] = page
    return address, asked


# --- a user ------------------------------------------------------------------------------------------------

USER = """
import json, sys, time
import model
for name in sys.argv[1:]:
    start, told = time.time(), {}
    try:
        if name.startswith("tokenizer of "):
            import data
            told["ids"] = data.load_tokenizer(name[13:]).encode("low").ids
        else:
            weights = model.from_pretrained(name, num_labels=2).state_dict()
            told["sum"] = sum(t.double().abs().sum().item() for k, t in weights.items() if "embeddings" in k)
    except Exception as e:
        told = {"type": type(e).__name__, "error": str(e), "caught": isinstance(e, (OSError, ValueError))}
    print(json.dumps(told | {"seconds": time.time() - start}))
"""


def user(home, endpoint, *names, **settings):
    """Loads the checkpoints one after the other in a fresh interpreter; what it was told, one dict a name."""
    environment = {key: value for key, value in os.environ.items()
                   if not key.startswith(("HF_", "HUGGING")) and not key.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1",
                    "OMP_NUM_THREADS": "1"} | settings
    run = subprocess.run([sys.executable, "-c", USER, *names], cwd=ROOT, env=environment, text=True,
                         capture_output=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


GONE = "http://127.0.0.1:9"                                        # nobody listens on the discard port


def check_failure(told, *words):
    """One line of a kind that the command line prints, soon, with the three ways out."""
    assert told.get("caught"), told
    assert "\n" not in told["error"] and len(told["error"]) < 700, told
    assert told["seconds"] < 10, told
    for word in (*words, "--model FOLDER", "HF_HUB_OFFLINE", "HF_ENDPOINT", "Hub"):
        assert word in told["error"], (word, told)


@pytest.mark.ci
def test_first_time_second_time_and_offline(a_hub, tmp_path):
    """Oracle: the sum of the server's weights; later runs need no server, not even for absent files."""
    names = [DEBERTA, "some/model", "some/sharded", "onename", "tokenizer of some/model",
             "tokenizer of " + DEBERTA]
    first = user(tmp_path, a_hub[0], *names)
    expected = [sum(t.double().abs().sum().item() for key, t in build(NARROW[family]).state_dict().items()
                    if "embeddings" in key) for family in ("deberta", "bert", "bert", "bert")]
    for told, value in zip(first, expected):
        assert told["sum"] == pytest.approx(value, rel=1e-3), told
    assert first[4]["ids"] == [1, 3, 2] and len(first[5]["ids"]) >= 3, first      # the latter is [CLS] low [SEP]
    asked = [file for method, name, file in a_hub[1] if name == DEBERTA]
    assert set(asked) == {"config.json", "model.safetensors", "model.safetensors.index.json",
                          "pytorch_model.bin", "tokenizer.json", "spm.model", "tokenizer_config.json",
                          "special_tokens_map.json", "added_tokens.json"}
    assert [file for method, name, file in a_hub[1] if (method, name) == ("GET", DEBERTA)] == [
        "config.json", "pytorch_model.bin", "spm.model"]
    gone = user(tmp_path, GONE, *names)
    # As `hf download` leaves a cache: the same files, and nothing known of those that the Hub has not.
    for known in tmp_path.glob("hub/models--*/.no_exist"):
        shutil.rmtree(known)
    offline = user(tmp_path, GONE, *names, "other/model", HF_HUB_OFFLINE="1")
    check_failure(offline[-1], "other/model/config.json is not in the cache", "HF_HUB_OFFLINE is set")
    alone = user(tmp_path, GONE, *names)                       # with a warning of what cannot be asked for
    for later in (gone, offline, alone):
        for told, before in zip(later, first):
            assert told.get("sum") == before.get("sum") and told.get("ids") == before.get("ids"), told


@pytest.mark.ci
def test_failures_are_one_line_and_prompt(a_hub, tmp_path):
    """Oracle: the sentence. Missing, gated, private; a broken, busy or wrong server; a download cut."""
    says = {"no/such": "there is neither a folder here nor a repository", "no/such-404": "neither a folder here nor a",
            "gated/asked": "it is gated", "gated/anonymous": "it is gated", "private/bare401": "401",
            "broken/500": "500", "busy/429": "429", "no/revision": "Revision", "portal/login": "X-Repo-Commit",
            "bad name!": "neither a folder nor a Hub name", "hangs/forever": "timed out"}
    names = [*says, "cut/always", "cut/short", "cut/once", "tokenizer of broken/500", "no/weights", "no/config"]
    told = dict(zip(names, user(tmp_path, a_hub[0], *names, HF_HUB_ETAG_TIMEOUT="1")))
    for name, word in says.items():
        check_failure(told[name], f"{name}/config.json is not in the cache and did not arrive from "
                                  f"{a_hub[0]}", word)
    for name in ("cut/always", "cut/short"):
        check_failure(told[name], f"{name}/model.safetensors is not in the cache and did not arrive")
    assert told["cut/once"]["sum"] > 0
    check_failure(told["tokenizer of broken/500"], "broken/500/tokenizer.json is not in the cache", "500")
    assert "no/weights has no model.safetensors and no pytorch_model.bin" in told["no/weights"]["error"]
    assert "no/config has no config.json" in told["no/config"]["error"]
    # Now nobody listens. What was cut is not taken for a file, what was resumed is whole.
    names = ["cut/always", "cut/once", DEBERTA, "tokenizer of " + DEBERTA]
    always, once, never, tokenizer = user(tmp_path, GONE, *names)
    check_failure(always, "cut/always/model.safetensors is not in the cache")
    assert once["sum"] == told["cut/once"]["sum"]
    check_failure(never, f"{DEBERTA}/config.json is not in the cache and did not arrive", GONE, "refused")
    check_failure(tokenizer, f"{DEBERTA}/tokenizer.json is not in the cache")


@pytest.mark.ci
def test_revisions(a_hub, tmp_path):
    """Oracle: the same weights by branch, by reference and by commit. A cache filled by commit knows no branch:
    it is used under owner/name@commit, and the plain name says so, with the cache's path."""
    at_commit, at_reference = f"some/model@{COMMIT}", "some/model@refs/pr/1"
    first = user(tmp_path / "cache", a_hub[0], at_commit, "tokenizer of " + at_commit)
    later = user(tmp_path / "cache", GONE, at_commit, "tokenizer of " + at_commit, "some/model", HF_HUB_OFFLINE="1")
    told, plain, wrong, empty = user(tmp_path / "other", a_hub[0], at_reference, "some/model",
                                     "some/model@nowhere", "some/model@")
    assert first[0]["sum"] == later[0]["sum"] == plain["sum"] == told["sum"]
    assert first[1]["ids"] == later[1]["ids"] == [1, 3, 2]
    place = tmp_path / "cache" / "hub" / "models--some--model" / "snapshots"
    assert f"--model {at_commit}, which is in {place}" in later[2]["error"]
    assert "some/model@nowhere/config.json is not in the cache" in wrong["error"], wrong
    assert "neither a folder nor a Hub name" in empty["error"], empty


# --- folders -----------------------------------------------------------------------------------------------

def test_find_in_folders(tmp_path, monkeypatch):
    """Oracle: the path. A folder is never mistaken for a Hub name nor the other way round."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.find("a", "config.json") == Path("a/config.json")
    assert hub.find(tmp_path / "a", "config.json") == tmp_path / "a" / "config.json"
    assert hub.find("~/a", "config.json") == tmp_path / "a" / "config.json"
    assert hub.find("a", "pytorch_model.bin") is None
    for name in ("./b", "~/b", "~nobody/b", "../b/c", str(tmp_path / "b"), "a/b/c", tmp_path / "b"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {name}: give a checkpoint"):
            hub.find(name, "config.json")
    with pytest.raises(OSError, match="is a file: give the folder"):
        hub.find("a/config.json", "config.json")


def test_network_is_not_asked_for_extra_files(tmp_path, monkeypatch):
    """Oracle: a client that fails when called."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("the network was asked"))
    assert hub.find("some/model", "vocab.txt", network=False) is None
    assert hub.tokenizer_files("some/model", network=False) == {}
    (tmp_path / "folder").mkdir()
    for name in ("vocab.txt", "tokenizer.json", "model.safetensors"):
        (tmp_path / "folder" / name).write_text("")
    assert hub.tokenizer_files(tmp_path / "folder") == {"tokenizer.json": tmp_path / "folder/tokenizer.json"}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
                                  "tokenizer_config.json", "spm.model"])
def test_a_git_lfs_pointer_is_named(tmp_path, file):
    """Oracle: the file's name and what it is, in one line, whichever file a clone without Git LFS left so."""
    folder = write(tmp_path / "model", NARROW["bert"], build(NARROW["bert"]).state_dict())
    toy.tokenizer().save(str(folder / "tokenizer.json"))
    stands_for = {"model.safetensors.index.json": "model.safetensors", "spm.model": "tokenizer.json"}
    (folder / stands_for.get(file, file)).unlink(missing_ok=True)
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 438007537\n")
    with pytest.raises(ValueError, match=f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        data.load_tokenizer(folder)
        from_pretrained(folder, 2)


@pytest.mark.parametrize("files, says", [
    ((), "in this folder there is nothing, and the Hub is not asked while it is there"),
    (("last.pt", "log.jsonl"), "is the folder of a run: give --resume base, or --eval base.adapter.safetensors"),
    (("adapter.safetensors", "result.json"), "is the folder of a run: give --resume base"),
    (("adapter_config.json", "adapter_model.safetensors"), "in this folder there is adapter_config.json, adapter_model"),
    (("first/config.json", "second/config.json"), "in this folder there is first.config.json, second.config.json"),
    (("train.tsv", "dev.tsv"), "in this folder there is dev.tsv, train.tsv")])
def test_a_wrong_folder_gets_a_message_that_fits(tmp_path, monkeypatch, files, says):
    """Oracle: the sentence: what the folder is, and what to give instead; model and tokenizer say the same."""
    monkeypatch.chdir(tmp_path)
    for file in ("base/", *(f"base/{file}" for file in files)):
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if file.endswith("/") else path.write_text("")
    for load in (data.load_tokenizer, lambda name: from_pretrained(name, 2)):
        with pytest.raises(ValueError, match=f"base has no (tokenizer|config.json).*{says}") as error:
            load("base")
        assert "\n" not in str(error.value) and "put one of them there" not in str(error.value)
