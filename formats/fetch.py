"""Fetching from servers that nobody vouches for: an end to the time, to the bytes, https alone."""
import concurrent.futures
import http.client
import os
import re
import threading
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from formats.disk import one_line, private_folder, writing
from formats.glue import BASE_URL, DEV_IDS, by_hand, read_lines, read_split

ARCHIVE = "archive.zip"                      # while it is unpacked
ROW_BYTES = 4096                             # of an official row at most, on average; MNLI's: 900
MINUTES = 360                                # for a file at most, from the question to its end


def within(minutes, work, *arguments, **named):
    """What work(...) returns or raises; OSError if that takes longer than so many minutes.

    It runs in a thread that is then left alone: a server that sends a byte now and then, of headers
    or of anything else, never lets a socket's timeout pass.
    """
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(work(*arguments, **named))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    done, _ = concurrent.futures.wait([future], 60 * minutes)
    if not done:
        raise OSError(f"it takes more than {minutes:g} minutes")
    return future.result()


def fetch_task(task, data_dir="glue", base_url=BASE_URL):
    """Fetch a task's files into <data_dir>/<folder>, with a progress bar; what is there stays.

    All is written to a private folder beside and moved when complete: a cut download leaves
    nothing. Raises OSError or ValueError that names the address and says what to do instead.
    """
    folder = Path(data_dir) / task.folder
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with private_folder(folder.parent) as private:
        for address, name in task.downloads.items():
            if not name or not (folder / name).exists():
                advice = f"try again, or {by_hand(task, folder)}"
                fetch_file(task, f"{base_url}/{address}", private / (name or ARCHIVE), advice)
        # The test's files first: if this is ended on the way, a file that find_split() looks for in
        # training is missing, and is fetched again.
        in_order = sorted(private.iterdir(), key=lambda path: not path.name.startswith("test"))
        with writing(folder):
            folder.mkdir(exist_ok=True)
            for path in in_order:
                if not (folder / path.name).exists():
                    os.replace(path, folder / path.name)


def fetch_file(task, url, path, advice):
    """Fetch a table of a task to this path, or its archive, whose tables are put beside it."""
    most = ROW_BYTES * sum(task.rows.values())             # bytes, packed and unpacked
    try:
        within(MINUTES, download, url, path, most)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"could not fetch {url} ({one_line(error)}): {advice}") from None
    try:
        if path.name == ARCHIVE:
            extract(path, task, most)
        elif path.name != DEV_IDS:
            read_split(path, task, labelled=False)
        elif not all(re.fullmatch("[0-9]+\t[0-9]+", line) for line in read_lines(path)):
            raise ValueError("its lines are no pairs of numbers")
    except Exception as error:               # a broken archive makes zlib, struct and others raise
        cause = one_line(error).replace(f"{path.parent}{os.sep}", "")
        raise ValueError(f"{url} gives something else than its data ({cause}): {advice}") from None


class HttpsAlone(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https; on this machine itself, as in tests, to http too."""

    def redirect_request(self, request, file, code, message, headers, url):
        check_address(url, request.full_url)
        return super().redirect_request(request, file, code, message, headers, url)


def check_address(url, before):
    """ValueError for an address that is not https, nor, as the one before it, of this machine."""
    local = "http://(127[.]0[.]0[.]1|localhost)(:[0-9]+)?/"
    is_local = re.match(local, url) and re.match(local, before)
    if not is_local and not url.lower().startswith("https://"):
        raise ValueError(f"{url} is not https")


def download(url, path, most):
    """Fetch one address into a file, of at most so many bytes; OSError or ValueError if cut."""
    check_address(url, url)
    opener = urllib.request.build_opener(HttpsAlone)
    with opener.open(url, timeout=60) as response, open(path, "wb") as file:
        length = int(response.headers.get("Content-Length") or 0)
        # disable=None: silent where stderr is no terminal
        with tqdm(total=length or None, unit="B", unit_scale=True, disable=None,
                  desc=url.rsplit("/", 1)[-1]) as bar:
            while max(length, file.tell()) <= most and (chunk := response.read1(1 << 16)):
                bar.update(file.write(chunk))
        if max(length, file.tell()) > most:
            raise OSError(f"it is larger than the {most:,} bytes that the task can need")
        if length and file.tell() != length:
            raise OSError(f"the connection ended after {file.tell()} of {length} bytes")


def extract(archive, task, most):
    """Replace an archive by its tables, of at most so many bytes; the test splits may be missing.

    What makes an archive unusable raises ValueError, or what zipfile raises. Nothing else in it is
    unpacked, and a table only to its own name: no member and no link leads out of the folder.
    """
    names = [f"{split}.tsv" for split in task.rows]
    with zipfile.ZipFile(archive) as zipped:
        members = {}
        for info in zipped.infolist():       # whatever the archive's top folder is called
            *folders, name = re.split(r"[/\\]", info.filename)
            if name in names and len(folders) < 2:   # QQP-clean.zip has QQP/original/train.tsv too
                if name in members:
                    raise ValueError(f"it holds more than one {name}")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{name} is packed in a way that can take any memory")
                members[name] = info
        missing = [name for name in names if name not in members and not name.startswith("test")]
        if missing:
            raise ValueError(f"it does not hold {missing[0]}")
        if sum(member.file_size for member in members.values()) > most:
            raise ValueError(f"it unpacks to more than the {most:,} bytes that the task can need")
        for name, member in members.items():
            member.filename = name
            zipped.extract(member, archive.parent)
    archive.unlink()
