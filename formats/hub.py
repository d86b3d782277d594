"""The files of a checkpoint: from a folder, the cache or the Hugging Face Hub, in that order."""
import contextlib
import os
from pathlib import Path

from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub import try_to_load_from_cache

from formats.disk import MEGABYTE, one_line, warn
from formats.fetch import MINUTES, within
from formats.tokenizer import BESIDE, DEFINING

WAYS_OUT = ("download its files by hand and give --model FOLDER, or run once where the Hub can be "
            "reached (a proxy or HF_ENDPOINT may help); a complete cached copy works without it, "
            "also under HF_HUB_OFFLINE=1")
HINTS = {                                           # the client's error → what to do; first counts
    errors.GatedRepoError: "it is gated: accept its terms on the Hub and run `hf auth login`",
    errors.RepositoryNotFoundError: "there is neither a folder here nor a repository of this name "
                                    "that this account can read: look at the spelling; `hf auth "
                                    "login` if it is private",
    errors.HFValidationError: "it is neither a folder nor a Hub name like "
                              "microsoft/deberta-v3-base"}
MINUTES_TO_ANSWER = 1                               # for the Hub to say what a file is
POINTER = b"version https://git-lfs.github.com"     # what Git LFS has in place of a large file


def find(name_or_dir, filename, network=True, most=64 * MEGABYTE):
    """Path of `filename` in a folder or Hub repository; None if that exists but has no such file.

    A Hub name may end in @revision: a branch, a tag or a commit. The cache is asked before the
    network, so a second run contacts nobody; network=False never does. most: bytes that such a file
    may have, to be fetched. OSError with one sentence where folder, repository or network are not
    to be had; ValueError for a Git LFS pointer.
    """
    name = str(name_or_dir)
    folder = Path(os.path.expanduser(name_or_dir))
    if folder.is_dir():
        path = folder / filename
        return checked(path) if path.is_file() else None
    if folder.exists():
        raise NotADirectoryError(f"{name} is a file: give the folder that holds config.json and "
                                 "the weights")
    repository, revision = split_revision(name)
    if folder.is_absolute() or name.startswith((".", "~")) or repository.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {name}: give a checkpoint folder or a Hub "
                                "name like microsoft/deberta-v3-base")
    try:
        cached = try_to_load_from_cache(repository, filename, revision=revision)
        if cached is None and network:
            cached = download(repository, filename, revision, most)
    except Exception as e:                         # no network, a server error, a full disk ...
        hints = [hint for kind, hint in HINTS.items() if isinstance(e, kind)]
        if constants.HF_HUB_OFFLINE:
            hints.append("HF_HUB_OFFLINE is set")
        raise OSError(f"{name}/{filename} is not in the cache and did not arrive from "
                      f"{one_line(constants.ENDPOINT)} ({[*hints, one_line(e)][0]}): "
                      f"{cached_commits(repository)}{WAYS_OUT}") from e
    return checked(Path(cached)) if isinstance(cached, str) else None   # or "known not to be there"


def split_revision(name):
    """owner/name@revision → (owner/name, revision), which is None where the name has none."""
    repository, _, revision = name.partition("@")
    return (repository, revision) if revision else (name, None)


def cached_commits(repository):
    """What to give as --model where the cache has a repository, but not its branch main."""
    snapshots = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}/snapshots")
    names = [f"{repository}@{path.name}" for path in sorted(snapshots.glob("*"))]
    return f"give --model {' or '.join(names[:2])}, which is in {snapshots}; or " if names else ""


def checked(path):
    """The path; ValueError if there is a Git LFS pointer in place of the file."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs "
                             "pull` in its repository, or download the file by hand")
    return path


def download(repository, filename, revision, most):
    """Path of a file that is in the cache from now on; None, also from now on, if there is none."""
    # Asked once first: hf_hub_download repeats a question without an answer for 23 seconds.
    with contextlib.suppress(errors.EntryNotFoundError):
        url = hf_hub_url(repository, filename, revision=revision)
        size = within(MINUTES_TO_ANSWER, get_hf_file_metadata, url).size or 0
        if size > most:
            raise ValueError(f"it has {size:,} bytes, where {most:,} are the most it can need")
    try:
        return within(MINUTES, hf_hub_download, repository, filename, revision=revision)
    except errors.LocalEntryNotFoundError:         # an EntryNotFoundError that means no answer
        raise
    except errors.EntryNotFoundError:
        return None


def find_config(name_or_dir):
    """Path of config.json; ValueError if folder or repository has none."""
    return find_first(name_or_dir, ["config.json"], "config.json")


def advice(name_or_dir):
    """What to give instead of a folder or repository that is no whole checkpoint."""
    folder = Path(os.path.expanduser(name_or_dir))
    whole = "give a whole checkpoint, a folder or a Hub name"
    if not folder.is_dir():
        return whole
    names = sorted(path.name for path in folder.iterdir())
    inner = sorted(str(path.relative_to(folder)) for path in folder.glob("*/config.json"))
    if {"adapter.safetensors", "last.pt"} & set(names):
        return (f"it is the folder of a run: give --resume {folder}, or --eval "
                f"{folder / 'adapter.safetensors'}, or as --model the one that the run began with")
    there = ", ".join((inner or names)[:5]) or "nothing, and the Hub is not asked while it is there"
    return f"{whole}; in this folder there is {there}"


def find_first(name_or_dir, names, what, network=True, most=64 * MEGABYTE):
    """Path of the first of these files that find() finds; ValueError if there is no `what`.

    Without network it is None if none is at hand.
    """
    # All in the cache first: one that was filled at once does not know which files the Hub has not.
    for place in (False, True) if network else (False,):
        for name in names:
            path = find(name_or_dir, name, place, most)
            if path is not None:
                return path
    if network:
        raise ValueError(f"{name_or_dir} has no {what}: {advice(name_or_dir)}")
    return None


def tokenizer_files(name_or_dir, network=True):
    """{file name: path} of the file that defines a checkpoint's tokenizer and those beside it.

    Without network those at hand; else ValueError where there is none.
    """
    what = f"tokenizer, none of {', '.join(DEFINING)}"
    path = find_first(name_or_dir, DEFINING, what, network)
    files = {path.name: path} if path else {}
    beside = [*BESIDE, "merges.txt"] if "vocab.json" in files else BESIDE
    for name in beside:
        try:
            path = find(name_or_dir, name, network)
            if path is not None:
                files[name] = path
        except OSError as e:                       # a cache need not say what the Hub has not
            if not constants.HF_HUB_OFFLINE:
                warn(f"{one_line(e)}: going on without it")
    for path in files.values():
        check_link(path)
    return files


def check_link(path):
    """ValueError if a file is a link out of its folder, but in the Hub's cache, which is links."""
    home = path.parent.resolve()
    homes = [home, Path(constants.HF_HUB_CACHE).resolve()]
    if home.parent.name == "snapshots":            # of a cache that was copied to another place
        homes.append(home.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise ValueError(f"{path} is a link out of its folder: put the file itself there")
