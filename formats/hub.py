"""The files of a checkpoint: from a folder, the cache or the Hugging Face Hub, in that order."""
import contextlib
import json
import math
import os
import re
from pathlib import Path

import torch
from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from safetensors.torch import save_file

from formats.config import SLACK, count_weights
from formats.disk import MEGABYTE, digest, load_pickle, one_line, read_object, replacing, warn
from formats.fetch import MINUTES, within
from formats.tokenizer import BESIDE, DEFINING, to_write

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
    path = find(name_or_dir, "config.json")
    if path is None:
        raise ValueError(f"{name_or_dir} has no config.json: {advice(name_or_dir)}")
    return path


def advice(name_or_dir):
    """What to give instead of a folder or repository that is no whole checkpoint."""
    folder = Path(os.path.expanduser(name_or_dir))
    whole = "give a whole checkpoint, a folder or a Hub name"
    if not folder.is_dir():
        return whole
    names = sorted(path.name for path in folder.iterdir())
    inner = sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("*/config.json"))
    if {"adapter.safetensors", "last.pt"} & set(names):
        return (f"it is the folder of a run: give --resume {folder}, or --eval "
                f"{folder / 'adapter.safetensors'}, or as --model the one that the run began with")
    if not names:
        return f"{whole}; this folder is empty, and while it is there the Hub is not asked"
    return f"{whole}; in this folder there is {', '.join((inner or names)[:5])}"


def find_first(name_or_dir, names, network=True, most=64 * MEGABYTE):
    """Path of the first of these files that find() finds, or None."""
    # All in the cache first: one that was filled at once does not know which files the Hub has not.
    for place in (False, True) if network else (False,):
        for name in names:
            path = find(name_or_dir, name, place, most)
            if path is not None:
                return path
    return None


def tokenizer_files(name_or_dir, network=True):
    """{file name: path} of the file that defines a checkpoint's tokenizer and those beside it.

    Without network those at hand; else ValueError where there is none.
    """
    path = find_first(name_or_dir, DEFINING, network)
    if path is None and network:
        raise ValueError(f"{name_or_dir} has no tokenizer, none of {', '.join(DEFINING)}: "
                         f"{advice(name_or_dir)}")
    files = {path.name: path} if path else {}
    for name in (*BESIDE, "merges.txt") if "vocab.json" in files else BESIDE:
        try:
            path = find(name_or_dir, name, network)
        except OSError as e:                       # a cache need not say what the Hub has not
            path = None
            if not constants.HF_HUB_OFFLINE:
                warn(f"{one_line(e)}: going on without it")
        if path is not None:
            files[name] = path
    for path in files.values():
        check_link(path)
    return files


def check_link(path):
    """ValueError if a file is a link out of its folder, but in the Hub's cache, which is links."""
    home, target = path.parent.resolve(), path.resolve()
    homes = [home, Path(constants.HF_HUB_CACHE).resolve()]
    if home.parent.name == "snapshots":            # of a cache that was copied to another place
        homes.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise ValueError(f"{path} is a link out of its folder: put the file itself there")


def read_weights(name_or_dir, config=None):
    """{key: tensor} of a checkpoint's weights, whole or in shards; safetensors before .bin.

    config: a checked one; no file is fetched that is far larger than the model that it describes.
    """
    names = ("model.safetensors", "model.safetensors.index.json",
             "pytorch_model.bin", "pytorch_model.bin.index.json")
    most = 4 * SLACK * count_weights(config) + MEGABYTE if config else math.inf
    path = find_first(name_or_dir, names, most=most)
    if path is None:
        raise ValueError(f"{name_or_dir} has no model.safetensors and no pytorch_model.bin: "
                         f"{advice(name_or_dir)}")
    read = read_safetensors if path.name.startswith("model.safetensors") else read_bin
    weights = {}
    for file in find_shards(name_or_dir, path, most) if path.suffix == ".json" else [path]:
        try:
            weights.update(read(file))
        except Exception as e:                     # whatever a damaged file makes its parser raise
            raise ValueError(f"{file} cannot be read as weights ({one_line(e)}): get it "
                             "again") from e
    return weights


def find_shards(name_or_dir, index, most):
    """Paths of the weight files that an index names."""
    weight_map = read_object(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    is_plain = all(Path(name).name == name for name in names)            # none leads outside
    paths = [find(name_or_dir, name, most=most) for name in names if is_plain]
    if not paths or None in paths:
        raise ValueError(f"{index} names weight files that are not there: download them again")
    return paths


def read_safetensors(path):
    """{key: tensor} of a .safetensors, copied: what becomes of the file later cannot matter.

    ValueError if it holds a hash, as those that we write do, that does not fit.
    """
    with safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata() or {}
    tensors = {}
    for name in names:
        with safe_open(path, "pt") as file:        # anew: memory is mapped for one tensor at a time
            tensors[name] = file.get_tensor(name).clone()
    if "digest" in metadata and metadata["digest"] != digest(tensors):
        raise ValueError("its hash does not fit")
    return tensors


def read_bin(path):
    """{key: tensor} of a .bin, a pickle.

    ValueError for tensors that, each for itself, take far more memory than the file: views.
    """
    content = load_pickle(path)
    tensors = [item for item in content.values() if isinstance(item, torch.Tensor)]
    size = sum(tensor.nbytes for tensor in tensors)
    if size > 3 * os.path.getsize(path):
        raise ValueError(f"its tensors take {size:,} bytes, more than it has")
    return content


# Weights of the pretraining task and of unused parts that real files carry: they may be left over.
LEFTOVERS = {
    "deberta": r"(lm_predictions|mask_predictions|cls)\.|(deberta\.)?embeddings\.position_",
    "roberta": r"(lm_head|(roberta\.)?pooler)\.|(roberta\.)?embeddings\.position_ids",
    "bert": r"cls\.|(bert\.)?embeddings\.position_ids",
}
# Heads of other tasks, which are left out aloud: question answering; of tokens, of choices.
OTHER_HEADS = r"(qa_outputs|classifier)\.(weight|bias)$"


def convert(weights, prefix, keys, source):
    """{a file's key: tensor} → {the model's key: contiguous tensor}, without known leftovers.

    A file of the encoder alone has no prefix; in the oldest files a LayerNorm has gamma and beta.
    keys: of the model. Other keys stay, for loading to refuse. source: what messages call the file.
    """
    converted = {}
    other_head = []
    for name, tensor in unwrapped(weights, prefix).items():
        key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        key = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
        if f"{prefix}.{key}" in keys:
            key = f"{prefix}.{key}"
        if key not in keys and re.match(LEFTOVERS[prefix], key):
            continue
        if key not in keys and re.match(OTHER_HEADS, key):
            other_head.append(key)
            continue
        if key in converted:
            raise ValueError(f"{key} of {source} is there twice: use a plain checkpoint")
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{key} of {source} is not a floating-point tensor: use a plain "
                             "checkpoint")
        converted[key] = tensor.contiguous()
    if other_head:
        warn(f"{source}: {other_head[0]} is of a head for another kind of task and is left out")
    return converted


def unwrapped(weights, prefix):
    """Weights without what a wrapper has put before all their keys, as module. or _orig_mod. is."""
    weights = {str(name): tensor for name, tensor in weights.items()}
    words = "embeddings.word_embeddings.weight"    # which every model has
    fronts = [name.removesuffix(words) for name in weights if name.endswith(words)]
    wrapper = fronts[0].removesuffix(f"{prefix}.") if fronts else ""
    if not all(name.startswith(wrapper) for name in weights):
        return weights
    return {name.removeprefix(wrapper): tensor for name, tensor in weights.items()}


def check_weights(weights, model_weights, source):
    """ValueError that tells which keys of a file do not fit the model's: two, and how many."""
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    expected = {key: tuple(tensor.shape) for key, tensor in model_weights.items()}
    missing = [f'"{key}"' for key in expected if key not in found]
    strange = [f'"{key}"' for key in found if key not in expected]
    sizes = [f"{key}, {found[key]} in place of {shape}" for key, shape in expected.items()
             if found.get(key, shape) != shape]
    problems = []
    for what, those in (("Missing key", missing), ("Unexpected key", strange),
                        ("size mismatch for", sizes)):
        if those:
            more = f" and {len(those) - 2} more" if len(those) > 2 else ""
            problems.append(f"{what} {', '.join(those[:2])}{more}")
    if problems:
        raise ValueError(f"{source} does not fit its config.json, give a checkpoint that does: "
                         f"{'; '.join(problems)}")


def write_checkpoint(folder, config, weights, tokenizer_of, prefix=""):
    """Write another one's tokenizer, (prefix)model.safetensors and (prefix)config.json."""
    files = tokenizer_files(tokenizer_of, network=False) if tokenizer_of else {}
    beside = to_write(files)
    names = [*beside, f"{prefix}model.safetensors", f"{prefix}config.json"]    # none opens half
    Path(folder).mkdir(parents=True, exist_ok=True)
    with replacing(*(Path(folder, name) for name in names)) as (*others, weights_file, config_file):
        save_file(weights, weights_file, metadata={"format": "pt", "digest": digest(weights)})
        sort_metadata(weights_file)
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        for content, other in zip(beside.values(), others):
            other.write_bytes(content)


def sort_metadata(path):
    """Put the metadata of a .safetensors in order, so that equal runs write equal bytes."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.write(text.encode().ljust(size))
