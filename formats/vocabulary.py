"""The file that defines a tokenizer, as it is: what it may take of memory and time, and no more.

tokenizer.json says all; spm.model is read by spm.py; a vocabulary alone lacks the template around
texts, and what a text becomes before it is looked up is that of its first models, BERT or RoBERTa.
"""
import base64
import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from formats import spm
from formats.disk import MEGABYTE, read_bytes, reading
from formats.spm import LONGEST_PIECE

DEFINING = ("tokenizer.json", "spm.model", "vocab.txt", "vocab.json")   # the first one counts

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LINEAR = (GPT2, " {2,}", r"\s+", r"\s{2,}|[\n\r\t]")   # no more time than a text is long


def read_definition(path, files):
    """The Tokenizer of the file of DEFINING at path, one of {name: path}; ValueError if damaged."""
    if path.name == "spm.model":
        return spm.read_spm(path)
    if path.name == "vocab.json" and "merges.txt" not in files:
        raise ValueError(f"{path} has no merges.txt beside it: put it there")
    both = f"{path} with merges.txt" if path.name == "vocab.json" else path
    with reading(both, "get it again"):
        if path.name == "tokenizer.json":
            return read_json(path)
        if path.name == "vocab.txt":               # BERT's
            tokenizer = Tokenizer(models.WordPiece.from_file(str(path), unk_token="[UNK]"))
            tokenizer.normalizer = normalizers.BertNormalizer()
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = decoders.WordPiece()
        else:                                      # RoBERTa's
            tokenizer = Tokenizer(models.BPE.from_file(str(path), str(files["merges.txt"])))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_json(path):
    """tokenizer.json; an error of any kind where it is damaged, or takes more than it may."""
    content = read_bytes(path, 64 * MEGABYTE)
    parts = json.loads(content)
    steps = [parts.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor")]
    if growth(steps) > 1000:
        raise ValueError("its replacements make a text more than 1000 times as long")
    if json.dumps(steps).count('"type": ') > 100:
        raise ValueError("it has more than 100 steps for a text")
    model = parts["model"]
    pieces = [piece for piece, _ in model["vocab"]] if isinstance(model["vocab"], list) else [""]
    if max(map(len, pieces)) > LONGEST_PIECE:
        raise ValueError(f"a piece is longer than {LONGEST_PIECE} letters")
    if model.get("max_input_chars_per_word", 0) > LONGEST_PIECE:       # takes its square of time
        raise ValueError(f"max_input_chars_per_word is more than {LONGEST_PIECE}")
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_padding()                         # either can be baked into the file: padding
    tokenizer.no_truncation()                      # to a billion tokens
    special = tokenizer.num_special_tokens_to_add(True)
    # A template may name a token that is not there, or repeat the text.
    if special > 100 or len(tokenizer.encode("a", "b").ids + tokenizer.encode("a").ids) > 100:
        raise ValueError("it makes more than 100 tokens of a few letters")
    return tokenizer


def growth(part):
    """How many times as long a part of tokenizer.json can make a text: each step multiplies.

    ValueError for a pattern that may take any time.
    """
    if isinstance(part, list):
        part = dict(enumerate(part))
    if not isinstance(part, dict):
        return 1
    if part.get("Regex", GPT2) not in LINEAR:
        raise ValueError(f"its pattern {part['Regex'][:60]!r} is none of those whose time is known")
    if len(part.get("String", "")) > 1000:
        raise ValueError("a text to replace is longer than 1000 letters")
    times = 1
    kind = part.get("type")
    if kind in ("Replace", "Prepend"):             # a pattern can match before each letter
        times += len(str(part.get("content", part.get("prepend"))))
    if kind == "ByteLevel":                        # a letter for each byte
        times = 2
    if kind == "Precompiled":                      # as in spm.model
        blob = base64.b64decode(part.get("precompiled_charsmap") or "")
        times = max(map(len, spm.read_charsmap(blob)[2].split(b"\0"))) or 1
    for inner in part.values():
        times = min(times * growth(inner), 10**9)
    return times
