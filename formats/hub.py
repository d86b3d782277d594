"""The files of a checkpoint: from a folder, the cache or the Hugging Face Hub, in that order."""
import base64
import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from formats.disk import MEGABYTE, digest, load_pickle, one_line, read_bytes, replacing

WAYS_OUT = ("download its files by hand and give --model FOLDER, or run once where the Hub can be "
            "reached (a proxy or HF_ENDPOINT may help); a complete cached copy works without it, "
            "also under HF_HUB_OFFLINE=1")
LONGEST_PIECE = 1000         # letters; the library frees a tree of pieces by one call a letter
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "spm.model", "vocab.txt", "vocab.json", "merges.txt")


def find(name_or_dir, filename, network=True):
    """Path of `filename` in a folder or Hub repository; None if that exists but has no such file.

    The cache is asked before the network, so a second run contacts nobody; network=False never
    does. OSError with one sentence where folder, repository or network are not to be had.
    """
    name = str(name_or_dir)
    folder = Path(os.path.expanduser(name_or_dir))
    if folder.is_dir():
        path = folder / filename
        return path if path.is_file() else None
    if folder.exists():
        raise NotADirectoryError(f"{name} is a file: give the folder that holds config.json and "
                                 "the weights")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {name}: give a checkpoint folder or a Hub "
                                "name like microsoft/deberta-v3-base")
    try:
        cached = try_to_load_from_cache(name, filename)
        if cached is None and network:
            return download(name, filename)
        return Path(cached) if isinstance(cached, str) else None   # or "known not to be there"
    except errors.GatedRepoError as e:
        raise OSError(f"{name} is gated: accept its terms on the Hub and run `hf auth login`; or "
                      f"{WAYS_OUT}") from e
    except errors.RepositoryNotFoundError as e:
        raise OSError(f"{name} is neither a folder here nor a repository on the Hub that this "
                      "account can read (look at the spelling; `hf auth login` if it is private); "
                      f"or {WAYS_OUT}") from e
    except errors.HFValidationError as e:
        raise OSError(f"{name!r} is neither a folder nor a Hub name like "
                      f"microsoft/deberta-v3-base; correct it, or {WAYS_OUT}") from e
    except Exception as e:                         # no network, a server error, a full disk ...
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else one_line(e)
        raise OSError(f"{name}/{filename} is not in the cache and did not arrive from "
                      f"{one_line(constants.ENDPOINT)} ({cause}): {WAYS_OUT}") from e


def download(repository, filename):
    """Path of a file that is in the cache from now on; None, also from now on, if there is none."""
    # Asked once first: hf_hub_download repeats a question without an answer for 23 seconds.
    with contextlib.suppress(errors.EntryNotFoundError):
        get_hf_file_metadata(hf_hub_url(repository, filename))
    try:
        return Path(hf_hub_download(repository, filename))
    except errors.LocalEntryNotFoundError:         # an EntryNotFoundError that means no answer
        raise
    except errors.EntryNotFoundError:
        return None


def find_config(name_or_dir):
    """Path of config.json; ValueError if folder or repository has none."""
    path = find(name_or_dir, "config.json")
    if path is None:
        raise ValueError(f"{name_or_dir} has no config.json: give a whole checkpoint, a folder or "
                         "a Hub name")
    return path


def find_first(name_or_dir, names, network=True):
    """Path of the first of these files that find() finds, or None."""
    for name in names:
        path = find(name_or_dir, name, network)
        if path is not None:
            return path
    return None


def find_tokenizer(name_or_dir):
    """Path of a checkpoint's tokenizer.json, else spm.model; ValueError if it has neither."""
    names = ("tokenizer.json", "spm.model")
    path = find_first(name_or_dir, names, network=False)
    if path is None:
        with contextlib.suppress(OSError):         # for a merged model: it may say that case counts
            find(name_or_dir, "tokenizer_config.json")
        path = find_first(name_or_dir, names)
    if path is None:
        raise ValueError(f"{name_or_dir} has neither {' nor '.join(names)}: put one of them there")
    tokenizer_files(name_or_dir)                   # may refuse one of those that a merge copies
    return path


def tokenizer_files(name_or_dir):
    """Paths of the tokenizer's files that are at hand; the network is not asked.

    ValueError for a link out of the checkpoint: what it leads to would be copied into others.
    """
    found = []
    for name in TOKENIZER_FILES:
        path = find(name_or_dir, name, network=False)
        if path is not None:
            check_link(path)
            found.append(path)
    return found


def check_link(path):
    """ValueError if a file is a link out of its folder, but in the Hub's cache, which is links."""
    home, target = path.parent.resolve(), path.resolve()
    homes = [home, Path(constants.HF_HUB_CACHE).resolve()]
    if home.parent.name == "snapshots":            # of a cache that was copied to another place
        homes.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise ValueError(f"{path} is a link out of its folder: put the file itself there")


def read_json(path):
    """The object in a JSON file; ValueError that names the file if it is not one."""
    try:
        content = json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as e:      # no UTF-8, no JSON, a million digits, [[[[[...
        raise ValueError(f"{path} is not valid JSON ({one_line(e)}): download it again") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: download it again")
    return content


def read_tokenizer(path):
    """tokenizer.json as a tokenizers.Tokenizer; ValueError that names the file if it is not one."""
    try:
        content = read_bytes(path, 64 * MEGABYTE)
        parts = json.loads(content)
        if growth([parts.get("normalizer"), parts.get("pre_tokenizer")]) > 1000:
            raise ValueError("its replacements make a text more than 1000 times as long")
        pieces = parts["model"]["vocab"]
        if isinstance(pieces, list) and max(len(piece) for piece, _ in pieces) > LONGEST_PIECE:
            raise ValueError(f"a piece is longer than {LONGEST_PIECE} letters")
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_padding()                     # which may be to a billion tokens
        if tokenizer.num_special_tokens_to_add(True) > 100:
            raise ValueError("it adds more than 100 special tokens to a text")
        # A template may name a token that is not there, or repeat the text.
        if len(tokenizer.encode("a", "b").ids + tokenizer.encode("a").ids) > 100:
            raise ValueError("it makes more than 100 tokens of three letters")
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:                     # Rust's PanicException, which is no Exception
        raise ValueError(f"{path} is not a tokenizer file ({one_line(e)}): get it again") from None


def growth(part):
    """How many times as long a part of tokenizer.json can make a text: each step multiplies."""
    times = 1
    if isinstance(part, (list, dict)):
        for item in part.values() if isinstance(part, dict) else part:
            times = min(times * growth(item), 10**9)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("Replace", "Prepend"):             # a pattern can match before each letter
        times *= 1 + len(str(part.get("content", part.get("prepend"))))
    if kind == "ByteLevel":                        # a letter for each byte
        times *= 2
    if kind == "Precompiled":                      # as in spm.model
        blob = base64.b64decode(part.get("precompiled_charsmap") or "")
        trie = int.from_bytes(blob[:4], "little")
        times *= max(map(len, blob[4 + trie:].split(b"\0"))) or 1
    return times


def read_weights(name_or_dir):
    """{key: tensor} of a checkpoint's weights, whole or in shards; safetensors before .bin."""
    names = ("model.safetensors", "model.safetensors.index.json",
             "pytorch_model.bin", "pytorch_model.bin.index.json")
    # All in the cache first: one that was filled at once does not know which files the Hub has not.
    path = find_first(name_or_dir, names, network=False) or find_first(name_or_dir, names)
    if path is None:
        raise ValueError(f"{name_or_dir} has no model.safetensors and no pytorch_model.bin: give a "
                         "checkpoint with its weights")
    read = read_safetensors if path.name.startswith("model.safetensors") else read_bin
    weights = {}
    for file in find_shards(name_or_dir, path) if path.suffix == ".json" else [path]:
        try:
            weights.update(read(file))
        except Exception as e:                     # whatever a damaged file makes its parser raise
            raise ValueError(f"{file} cannot be read as weights ({one_line(e)}): get it "
                             "again") from e
    return weights


def find_shards(name_or_dir, index):
    """Paths of the weight files that an index names."""
    weight_map = read_json(index).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else []
    names = sorted(set(map(str, shards)))
    paths = [find(name_or_dir, name) for name in names if Path(name).name == name]   # none outside
    if not names or len(paths) < len(names) or None in paths:
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


def convert(weights, prefix, keys, source):
    """{a file's key: tensor} → {the model's key: contiguous tensor}, without known leftovers.

    A file of the encoder alone has no prefix; in the oldest files a LayerNorm has gamma and beta.
    keys: of the model. Other keys stay, for loading to refuse. source: what messages call the file.
    """
    converted = {}
    for name, tensor in weights.items():
        key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", str(name))
        key = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
        if f"{prefix}.{key}" in keys:
            key = f"{prefix}.{key}"
        if key not in keys and re.match(LEFTOVERS[prefix], key):
            continue
        if key in converted:
            raise ValueError(f"{key} of {source} is there twice: use a plain checkpoint")
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{key} of {source} is not a floating-point tensor: use a plain "
                             "checkpoint")
        converted[key] = tensor.contiguous()
    return converted


def write_checkpoint(folder, config, weights, tokenizer_of, prefix=""):
    """Write (prefix)model.safetensors, (prefix)config.json and another one's tokenizer files."""
    tokenizer = tokenizer_files(tokenizer_of) if tokenizer_of else []
    names = [path.name for path in tokenizer]
    names += [f"{prefix}model.safetensors", f"{prefix}config.json"]   # last: nothing opens half
    Path(folder).mkdir(parents=True, exist_ok=True)
    with replacing(*(Path(folder, name) for name in names)) as (*copies, weights_file, config_file):
        save_file(weights, weights_file, metadata={"format": "pt", "digest": digest(weights)})
        sort_metadata(weights_file)
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        for path, copy in zip(tokenizer, copies):
            shutil.copyfile(path, copy)
            if path.name == "tokenizer_config.json":
                write_without(copy, ("auto_map", "name_or_path"))


def write_without(path, names):
    """Take these names out of a JSON object in a file: others' code, places on this machine."""
    content = read_json(path)
    if not content.keys().isdisjoint(names):
        kept = {name: content[name] for name in content if name not in names}
        path.write_text(json.dumps(kept, indent=2), encoding="utf-8")


def sort_metadata(path):
    """Put the metadata of a .safetensors in order, so that equal runs write equal bytes."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.write(text.encode().ljust(size))
