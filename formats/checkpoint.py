"""A checkpoint's weights: read from its files as they are, fitted to a model's keys, written."""
import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from formats.config import SLACK, count_weights
from formats.disk import MEGABYTE, digest, load_pickle, read_object, reading, replacing, warn
from formats.hub import find, find_first, tokenizer_files
from formats.tokenizer import to_write


def read_weights(name_or_dir, config=None):
    """{key: tensor} of a checkpoint's weights, whole or in shards; safetensors before .bin.

    config: a checked one; no file is fetched that is far larger than the model that it describes.
    """
    names = ("model.safetensors", "model.safetensors.index.json",
             "pytorch_model.bin", "pytorch_model.bin.index.json")
    most = 4 * SLACK * count_weights(config) + MEGABYTE if config else math.inf
    what = "model.safetensors and no pytorch_model.bin"
    path = find_first(name_or_dir, names, what, most=most)
    read = read_safetensors if path.name.startswith("model.safetensors") else read_bin
    files = [path]
    if path.suffix == ".json":
        files = find_shards(name_or_dir, path, most)
    weights = {}
    for file in files:
        with reading(file, "get it again"):
            weights.update(read(file))
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
        names = list(file.keys())
        metadata = file.metadata() or {}
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
    for name, tensor in unwrapped(weights, prefix).items():
        key = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        key = key.replace("LayerNorm.beta", "LayerNorm.bias")
        if f"{prefix}.{key}" in keys:
            key = f"{prefix}.{key}"
        if key not in keys and re.match(LEFTOVERS[prefix], key):
            continue
        if key not in keys and re.match(OTHER_HEADS, key):
            if key.endswith("weight"):             # once for both
                warn(f"{source}: {key} is of a head for another kind of task and is left out")
            continue
        if key in converted:
            raise ValueError(f"{key} of {source} is there twice: use a plain checkpoint")
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{key} of {source} is not a floating-point tensor: use a plain "
                             "checkpoint")
        converted[key] = tensor.contiguous()
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
    wrong = {"Missing key": [f'"{key}"' for key in expected if key not in found],
             "Unexpected key": [f'"{key}"' for key in found if key not in expected],
             "size mismatch for": [f"{key}, {found[key]} in place of {shape}"
                                   for key, shape in expected.items()
                                   if found.get(key, shape) != shape]}
    problems = []
    for what, keys in wrong.items():
        more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
        if keys:
            problems.append(f"{what} {', '.join(keys[:2])}{more}")
    if problems:
        raise ValueError(f"{source} does not fit its config.json, give a checkpoint that does: "
                         f"{'; '.join(problems)}")


def write(folder, config, weights, tokenizer_of, prefix=""):
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
