"""Tests of formats/fetch.py: what honest, broken and hostile servers send, and a kill at any rename.

Each docstring names its oracle.
"""
import contextlib
import http.server
import io
import os
import threading
import time
import zipfile

import pytest

import data
import model as models
from data import TASKS
from formats import checkpoint, fetch, glue, hub
from formats.glue import Split
from tests.cli import at_rename, child, on_unix, sigkill, soon

RTE_ROW = b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n"
RTE = {"train.tsv": RTE_ROW, "dev.tsv": RTE_ROW + RTE_ROW[-18:], "test.tsv": RTE_ROW}
PAIRS = b"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t5\t6\ta\tb\r\n0\t7\t8\tc\td\r\n"
MRPC = {"msr_paraphrase_train.txt": PAIRS, "test.tsv": PAIRS[:-11], "dev_ids.tsv": b"7\t8\n"}
ZIP = "/glue/data/RTE.zip"


# --- a server -----------------------------------------------------------------------------------------------

@pytest.fixture
def server():
    """(address, {path, or "else": page}) of a web server on this machine; a page is a function that answers a request."""
    pages = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                pages.get(self.path, pages.get("else", answer(b"", 404)))(self)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", pages
    web.shutdown()
    web.server_close()


def answer(body, status=200, **headers):
    """A page: these bytes, or those of an endless generator."""
    def page(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        for part in [body] if isinstance(body, bytes) else body:
            handler.wfile.write(part)
    return page


def endless():
    while True:
        yield bytes(1 << 16)


def dripping(begin):
    """A page that begins so, raw, and goes on with a byte now and then."""
    def page(handler):
        handler.wfile.write(begin)
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)
    return page


def zipped(members, kind=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def rte_zip(folder="RTE", **more):
    return zipped({f"{folder}/": "", **{f"{folder}/{name}": RTE[name] for name in RTE},
                   f"{folder}/original/train.tsv": "something else", f"__MACOSX/{folder}/._train.tsv": "x", **more})


def spoilt_zip():
    """A compressed member whose checksum does not fit."""
    body = bytearray(rte_zip(**{"RTE/dev.tsv": "".join(f"row {i}\n" for i in range(3000))}))
    at = body.index(b"RTE/dev.tsv") + 500
    body[at:at + 40] = bytes(40)
    return bytes(body)


def files_below(place):
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


# --- what is honest -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("tells_length", [True, False])
def test_fetch(server, tmp_path, tells_length):
    """Oracle: the files that the server's archive holds; nothing else, and what is there stays."""
    address, pages = server
    for task, file, inside in (("rte", "RTE.zip", "RTE"), ("qnli", "QNLIv2.zip", "QNLI"), ("sst2", "SST-2.zip", "SST")):
        body = rte_zip(inside)
        pages[f"/glue/data/{file}"] = answer(body, **{"Content_Length": len(body)} if tells_length else {})
        fetch.fetch_task(TASKS[task], tmp_path, address)
        assert files_below(tmp_path / TASKS[task].folder) == RTE
    (tmp_path / "RTE" / "dev.tsv").write_text("mine")
    (tmp_path / "RTE" / "train.tsv").unlink()
    (tmp_path / "RTE" / "test.tsv").unlink()
    pages[ZIP] = answer(zipped({"train.tsv": "x", "dev.tsv": ""}))             # it need not hold the test split
    fetch.fetch_task(TASKS["rte"], tmp_path, address)
    assert files_below(tmp_path / "RTE") == {"dev.tsv": b"mine", "train.tsv": b"x"}
    assert {path.name for path in tmp_path.iterdir()} == {"RTE", "QNLI", "SST-2"}


FILES = {"rte": RTE, "mrpc": MRPC}


@pytest.fixture
def honest(server):
    """The address of a server that has FILES: a zip, and MRPC's single files."""
    address, pages = server
    pages[ZIP] = answer(rte_zip())
    for place, name in TASKS["mrpc"].downloads.items():
        pages[f"/{place}"] = answer(MRPC[name])
    return address


def test_fetch_mrpc(honest, tmp_path, monkeypatch):
    """Oracle: the rows of three plain files, from two places, the test file under its official name. What is there
    is not asked for; nothing is where all is there that training needs."""
    task = TASKS["mrpc"]
    fetch.fetch_task(task, tmp_path, honest)
    assert data.load_task("mrpc", tmp_path) == {"train": Split([("a", "b")], [1]), "dev": Split([("c", "d")], [0])}
    test = glue.read_split(tmp_path / "MRPC" / "test.tsv", task, labelled=False)
    assert test == Split([("a", "b")], None)
    (tmp_path / "MRPC" / "test.tsv").unlink()              # is optional
    assert not glue.is_missing(task, tmp_path) and not glue.is_missing(TASKS["demo"], tmp_path)
    (tmp_path / "MRPC" / "dev_ids.tsv").unlink()
    asked, download = [], fetch.download
    monkeypatch.setattr(fetch, "download", lambda url, *rest: (asked.append(url.rsplit("/")[-1]), download(url, *rest)))
    assert glue.is_missing(task, tmp_path)
    fetch.fetch_task(task, tmp_path, honest)
    assert sorted(asked) == ["mrpc_dev_ids.tsv", "msr_paraphrase_test.txt"]
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "dev.tsv").write_bytes(RTE_ROW)    # enough to evaluate
    assert not glue.is_missing(TASKS["rte"], tmp_path, train=False) and glue.is_missing(TASKS["rte"], tmp_path)


# --- what is not --------------------------------------------------------------------------------------------

BOMB = {"RTE/dev.tsv": "x", "RTE/train.tsv": bytes(100 << 20)}
REFUSED = {
    "missing": (answer(b"", 404), "404"), "cut": (answer(rte_zip(), Content_Length=10_000), r"ended after \d+ of 10000"),
    "length": (answer(rte_zip(), Content_Length="many"), "many"), "negative": (answer(b"x", Content_Length=-1), "bytes"),
    "a page": (answer(b"<html>moved</html>"), "something else"), "half": (answer(rte_zip()[:-30]), "something else"),
    "a wrong sum": (answer(spoilt_zip()), "CRC|invalid"), "a bomb": (answer(zipped(BOMB)), "unpacks to more"),
    "another packing": (answer(zipped(BOMB, zipfile.ZIP_LZMA)), "packed in a way"),
    "no dev": (answer(zipped({"RTE/train.tsv": "x"})), "does not hold dev.tsv"),
    **{name: (answer(rte_zip(**{name: "x"})), "more than one train.tsv")
       for name in ("train.tsv", "../train.tsv", "\\train.tsv")},
    "to ftp": (answer(b"", 302, Location="ftp://127.0.0.1/x"), "is not https"),
    "to http": (answer(b"", 302, Location="http://example.org/x"), "is not https"),
    "to itself": (answer(b"", 302, Location=ZIP), "loop|redirect"),
    "endless": (answer(endless()), "larger than the 23,"), "announced": (answer(b"", Content_Length=10**12), "larger")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(server, tmp_path, name):
    """Oracle: the promise: one sentence with address, cause and way out, soon, and nothing on the disk."""
    address, pages = server
    pages[ZIP], says = REFUSED[name]
    with soon(name, 20), pytest.raises((OSError, ValueError), match=says) as info:
        fetch.fetch_task(TASKS["rte"], tmp_path / "glue", address)
    message = str(info.value)
    assert f"{address}{ZIP}" in message and "\n" not in message and len(message) < 900
    assert f"by hand so that the folder {tmp_path / 'glue' / 'RTE'} holds" in message
    assert files_below(tmp_path) == {} and list(tmp_path.iterdir()) == [tmp_path / "glue"]


def test_nobody_answers(tmp_path):
    """Oracle: the same sentence for a closed port and for an address that is none; one for a place that is a file."""
    for base in ("http://127.0.0.1:9", "http://", "nonsense"):
        with pytest.raises(OSError, match=f"could not fetch {base}/glue"):
            fetch.fetch_task(TASKS["rte"], tmp_path, base)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"{tmp_path / 'file'}"):
        fetch.fetch_task(TASKS["rte"], tmp_path / "file", base)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_no_member_leads_out_of_the_folder(server, tmp_path):
    """Oracle: the files of the archive: only its tables are unpacked, to their names; a link is a text there."""
    address, pages = server
    link = zipfile.ZipInfo("RTE/test.tsv")
    link.external_attr = 0o120777 << 16
    for i, name in enumerate(["../x.tsv", "/tmp/train.tsv", "RTE/../../dev.tsv", "..\\..\\dev.tsv", "C:\\x.tsv", link]):
        buffer = io.BytesIO(rte_zip() if name != link else zipped({"train.tsv": "x", "dev.tsv": "x"}))
        with zipfile.ZipFile(buffer, "a") as file:
            file.writestr(name, "../../outside")
        pages[ZIP] = answer(buffer.getvalue())
        place = tmp_path / str(i) / "below"
        fetch.fetch_task(TASKS["rte"], place, address)
        files = [path for path in place.parent.rglob("*") if not path.is_dir() or path.is_symlink()]
        assert sorted(files) == [place / "RTE" / f"{split}.tsv" for split in ("dev", "test", "train")]
        assert not any(path.is_symlink() for path in files)


def test_a_login_page_is_no_data(honest, server, tmp_path):
    """Oracle: the folder: MRPC's files are no archive, but tables; what is none, or is cut, is not installed."""
    task, pages = TASKS["mrpc"], server[1]
    for spoilt in task.downloads:
        whole = pages[f"/{spoilt}"]
        for body in (b"<html>Please log in</html>", b"", b"a\tb\n", b"\0\1\2", PAIRS[:48]):
            pages[f"/{spoilt}"] = answer(body)
            with pytest.raises(ValueError, match=f"{spoilt} gives something else than .*by hand"):
                fetch.fetch_task(task, tmp_path, honest)
            assert list(tmp_path.iterdir()) == []
        pages[f"/{spoilt}"] = whole


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n",
                                   b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"])
def test_a_download_has_an_end(server, tmp_path, monkeypatch, begin):
    """Oracle: the promise: a server that sends a byte now and then, from whatever place on, holds nobody for ever."""
    address, pages = server
    pages[ZIP] = dripping(begin)
    monkeypatch.setattr(fetch, "MINUTES", 0.01)
    with soon("a download", 10), pytest.raises(OSError, match="takes more than"):
        fetch.fetch_task(TASKS["rte"], tmp_path, address)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file, page, says", [
    *((file, answer(b"", Content_Length=10**9, ETag='"x"', X_Repo_Commit="0" * 40), "has 1,000,000,000 bytes, where ")
      for file in ("config.json", "tokenizer.json", "model.safetensors")),
    ("config.json", dripping(b"HTTP/1.1 200 OK\r\nX: "), "takes more than 0.01 minutes")])
def test_a_hub_without_end(server, tiny, tmp_path, monkeypatch, file, page, says):
    """Oracle: the promise: no file is fetched that is announced with more bytes than it can need, by its kind or by
    config.json, and no answer is waited for without end; one sentence names the file, and nothing is on the disk."""
    address, pages = server
    pages[f"/{file}"] = page
    monkeypatch.setattr(hub, "hf_hub_url", lambda _, name, revision: f"{address}/{name}")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "MINUTES_TO_ANSWER", 0.01)
    config = models.from_pretrained(tiny["bert"], 2).config
    with soon("the Hub", 10), pytest.raises(OSError, match=f"some/model/{file} .*{says}"):
        if file == "model.safetensors":
            checkpoint.read_weights("some/model", config)
        hub.find("some/model", file)
    assert not list(tmp_path.rglob(file))


@pytest.mark.parametrize("url, before, fine", [
    ("https://a.org/x", "https://b.org/x", True), ("http://a.org/x", "https://a.org/x", False),
    ("http://127.0.0.1/x", "https://a.org/x", False), ("http://localhost:8/x", "http://127.0.0.1:9/x", True),
    ("http://127.0.0.1@a.org/x", "http://127.0.0.1/x", False), ("ftp://127.0.0.1/x", "ftp://127.0.0.1/x", False),
    ("file:///x", "file:///x", False), ("HTTPS://a.org/x", "https://a.org/x", True), ("//a.org/x", "", False)])
def test_only_https_is_followed(url, before, fine):
    """Oracle: by hand: from https to https alone; http from this machine to itself."""
    with contextlib.nullcontext() if fine else pytest.raises(ValueError, match="is not https"):
        fetch.check_address(url, before)


# --- what ends on the way -----------------------------------------------------------------------------------

def fork_that_fetches(task, data_dir, address, within=contextlib.nullcontext()):
    """Process id of a fork that fetches a task."""
    def run():
        fetch.tqdm.set_lock(threading.RLock())             # tqdm's own is shared with its parent
        fetch.fetch_task(task, data_dir, address)
    return child(run, os.devnull, os.devnull, within)


def check_after_a_kill(task, data_dir, address, files):
    """What train.py does next: fetch what is missing. Then the folder holds these {name: bytes}."""
    if glue.is_missing(task, data_dir):
        fetch.fetch_task(task, data_dir, address)
        assert [path.name for path in data_dir.iterdir()] == [task.folder]     # nor is a private folder left
    assert files_below(data_dir / task.folder) == files
    assert not glue.is_missing(task, data_dir)


@on_unix
@pytest.mark.parametrize("name", FILES)
def test_a_fetch_killed_between_two_renames_goes_on(honest, tmp_path, name):
    """Oracle: the files of the server. Whichever rename is the last, in whichever folder, the next run
    sees what is missing and fetches it."""
    task, files = TASKS[name], FILES[name]
    for there in (None, [], list(files)[:1], list(files)[1:2], list(files)[2:]):
        tried = 3 - len(there or [])                       # renames
        for n in range(tried + 1):
            data_dir = tmp_path / f"{there} {n}"
            if there is not None:
                (data_dir / task.folder).mkdir(parents=True)
                for file in there:
                    (data_dir / task.folder / file).write_bytes(files[file])
            pid = fork_that_fetches(task, data_dir, honest, at_rename(n + 1, sigkill))
            assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]) == (n < tried)
            check_after_a_kill(task, data_dir, honest, files)
