"""DeBERTaV3's `spm.model`, read into a `tokenizers` tokenizer without sentencepiece or protobuf.

An spm.model is one protocol-buffer message, and on the wire a message is nothing but fields in a row:

    key    varint: field number << 3 | wire type     (varint: 7 bits a byte, lowest first, bit 7 = "goes on")
    value  wire type 0: varint (int, bool, enum)     1: 8 bytes     5: 4 bytes, little-endian (float)
                     2: varint n, then n bytes (str, bytes or another message)

The file holds no names: the schemas below name the fields of sentencepiece_model.proto that we need.
A text becomes ids in SentencePiece's two steps (normalizer.cc, unigram_model.cc):

    " ﬁne  day" ── SpmNormalizer: charsmap, spaces ──> "▁fine▁day" ── Unigram: best sum of scores ──> ids

The ids are SentencePiece's (0.2.3) but for two corners, both pinned down in tests/test_spm.py:
  * It adds scores in float32, `tokenizers` in float64: where two segmentations score the same up to float32
    rounding ("9" + "99" and "99" + "9"), the two may choose differently.
  * In a model with byte_fallback (DeBERTaV3's has none), text that spells "<0x41>" may get that byte's piece.
"""
import math
import re
import struct
from collections import defaultdict
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, processors

# Schema of a message: field number -> (name, kind). A kind that is a dict is the schema of an inner message.
PIECE = {1: ("piece", str), 2: ("score", float), 3: ("type", int)}  # score: log-probability
TRAINER = {3: ("model_type", int), 24: ("treat_whitespace_as_suffix", bool), 35: ("byte_fallback", bool)}
NORMALIZER = {2: ("precompiled_charsmap", bytes), 3: ("add_dummy_prefix", bool),
              4: ("remove_extra_whitespaces", bool), 5: ("escape_whitespaces", bool)}
MODEL = {1: ("pieces", PIECE), 2: ("trainer_spec", TRAINER), 3: ("normalizer_spec", NORMALIZER)}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # a piece's type
UNIGRAM, MODEL_TYPES = 1, {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}
SPACE = "▁"  # U+2581 is a space inside pieces


def read_varint(data, at, end):
    """-> (the varint at byte `at`, the position after it)"""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError(f"truncated at byte {end}")
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"endless varint at byte {at - 10}")


def read_fields(data, at, end, schema):
    """Yields (name, value) of the fields of the message data[at:end] that the schema names, in file order."""
    while at < end:
        start = at
        key, at = read_varint(data, at, end)
        number, wire_type = key >> 3, key & 7
        if number == 0 or wire_type not in (0, 1, 2, 5):
            raise ValueError(f"no field at byte {start}")
        value, at = read_varint(data, at, end) if wire_type in (0, 2) else (0, at)
        begin, at = at, at + {0: 0, 1: 8, 2: value, 5: 4}[wire_type]
        if at > end:
            raise ValueError(f"truncated at byte {end}")
        name, kind = schema.get(number, (None, None))
        if name is None:
            continue
        if wire_type != (0 if kind in (int, bool) else 5 if kind is float else 2):
            raise ValueError(f"{name} with wire type {wire_type} at byte {start}")
        if kind is float:
            value, = struct.unpack("<f", data[begin:at])
        elif kind in (str, bytes):
            value = data[begin:at] if kind is bytes else data[begin:at].decode()
        elif isinstance(kind, dict):
            value = dict(read_fields(data, begin, at, kind))  # of a field that comes twice the last counts
        yield name, value


def read_charsmap(blob):
    """precompiled_charsmap -> {text: its replacement}; where several match, the longest one counts.

    The blob: uint32 n; n bytes of a trie over UTF-8 bytes; the replacements, a NUL after each. The trie is a
    double array (darts-clone): uint32 units, unit 0 the root, each with base = its own index ^ its offset.
    Its child along byte c is unit base ^ c, if that one's label is c. The bits of a unit:
        bit 31 clear: 0-7 label, 8 "has a leaf", 10-30 offset (bit 9: times 256)
        bit 31 set:   the leaf, at its parent's base; 0-30 position of the replacement
    """
    size = int.from_bytes(blob[:4], "little")
    if blob and (size % 4 or not 0 < size < len(blob) - 4 or blob[-1] != 0):
        raise ValueError("charsmap of wrong size")
    units, replacements = struct.unpack(f"<{size // 4}I", blob[4:4 + size]), blob[4 + size:]
    bases, children = [], defaultdict(list)  # children: base -> [(byte, index of the child)]
    for index, unit in enumerate(units):
        is_leaf, label = unit >> 31, unit & 255
        bases.append(index ^ (unit >> 10 << 8 * (unit >> 9 & 1)))
        if unit & 0x7FFFFFFF >= len(replacements) if is_leaf else bases[index] >= len(units):
            raise ValueError("charsmap that points outside itself")
        if label and not is_leaf:
            children[index ^ label].append((bytes([label]), index))
    rules, stack, steps = {}, [(b"", 0)] * bool(blob), 0
    while stack:
        key, index = stack.pop()
        steps += 1
        if len(key) > 255 or steps > 32 * len(units):  # NFKC's needs 6 steps a unit
            raise ValueError("charsmap with a loop")
        base = bases[index]
        if units[index] >> 8 & 1 and units[base] >> 31:
            position = units[base] & 0x7FFFFFFF
            rules[key.decode()] = replacements[position:replacements.index(0, position)].decode()
        stack += [(key + byte, child) for byte, child in children.get(base, ())]
    return rules


class SpmNormalizer:
    """SentencePiece's normalizer.cc as a custom normaliser for `tokenizers`, with equal results for any text.

    `tokenizers` has its own for charsmaps, Precompiled, but that goes grapheme by grapheme and takes the
    shortest match: "ệ" written as e and two accents loses one, decomposed Hangul and kana stay decomposed.
    rules: {text: replacement} of the charsmap; symbols: the user-defined pieces, which no rule may touch.
    """

    def __init__(self, rules, symbols=(), add_dummy_prefix=True, remove_extra_whitespaces=True):
        self.add_dummy_prefix, self.remove_extra_whitespaces = add_dummy_prefix, remove_extra_whitespaces
        self.symbols, self.table = set(symbols), {**rules, **{symbol: symbol for symbol in symbols}}
        self.longest = max(map(len, self.table), default=0)
        # A key can match only where there is a character that is a key, or any followed by one that continues
        # a key. All characters above U+FFFF count as both, since `re` is slow in sets with many of them.
        single = {key for key in self.table if len(key) == 1 and key <= "\uffff"}
        inner = {char for key in self.table for char in key[1:] if char <= "\uffff"}
        single, inner = (f"[{re.escape(''.join(chars))}\U00010000-\U0010ffff]" for chars in (single, inner))
        self.places = re.compile(f".{inner}+|{single}", re.DOTALL)
        self.whole = Regex(r"(?m:.++)")

    def normalize(self, normalized):
        """Called by `tokenizers` with its NormalizedString; it would swallow an exception raised in here."""
        normalized.replace(self.whole, self.apply(normalized.normalized))

    def apply(self, text):
        """Raw text -> the text that the model sees, e.g. " ﬁne  day" -> "▁fine▁day"."""
        if not text:
            return ""
        text = self.places.sub(lambda match: self.replace(match[0]), text) if self.table else text
        if self.remove_extra_whitespaces:  # U+0020 alone: rules have made it of tabs and the like
            text = re.sub("  +", " ", text).strip(" ")
        text = SPACE * bool(self.add_dummy_prefix) + text.replace(" ", SPACE)
        return text.rstrip(SPACE) if self.remove_extra_whitespaces else text

    def replace(self, text):
        """Replaces, from left to right, the longest key that matches; symbols come before rules."""
        done, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self.longest), at, -1)
            keys = [text[at:end] for end in ends if text[at:end] in self.table] or [text[at]]
            key = next((key for key in keys if key in self.symbols), keys[0])
            done.append(self.table.get(key, key))
            at += len(key)
        return "".join(done)


def read_model(data):
    """Bytes of an spm.model -> (pieces [(text, score, type)], trainer_spec, normalizer_spec, charsmap rules)

    ValueError where the SentencePiece library refuses the file too, and where a spec is missing.
    """
    fields = list(read_fields(data, 0, len(data), MODEL))
    specs = dict(fields)
    pieces = [(piece.get("piece", ""), piece.get("score", 0.0), piece.get("type", NORMAL))
              for name, piece in fields if name == "pieces"]
    if not pieces or "trainer_spec" not in specs or "normalizer_spec" not in specs:
        raise ValueError(f"truncated at byte {len(data)}")
    trainer, normalizer = specs["trainer_spec"], specs["normalizer_spec"]
    texts, scores, types = zip(*pieces)
    byte_pieces = {f"<0x{byte:02X}>" for byte in range(256)} if trainer.get("byte_fallback") else set()
    if not all(texts) or len(set(texts)) < len(texts) or not all(map(math.isfinite, scores)):
        raise ValueError("a piece without text, without score or twice")
    if types.count(UNKNOWN) != 1 or NORMAL not in types or not set(types) <= set(range(NORMAL, BYTE + 1)) or (
            byte_pieces != {text for text, _, kind in pieces if kind == BYTE}):
        raise ValueError("pieces of wrong type")
    return pieces, trainer, normalizer, read_charsmap(normalizer.get("precompiled_charsmap", b""))


def read_spm(path):
    """The `spm.model` at path -> tokenizers.Tokenizer with SentencePiece's ids, no padding, no truncation.

    It encodes to [CLS] A [SEP], and a pair to [CLS] A [SEP] B [SEP] with type ids 0 and 1. [PAD], [CLS],
    [SEP] and [UNK] are pieces of the file, [MASK] gets the id after the last one; text that spells them stays
    text. It gives no offsets into the text and cannot be saved or pickled (Python normaliser): keep the file.
    OSError: the file cannot be read. ValueError: it is damaged, or of a kind that is not read here.
    """
    data = Path(path).read_bytes()
    try:
        pieces, trainer, normalizer, rules = read_model(data)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a readable SentencePiece model ({error}): download it again") from None
    model_type = trainer.get("model_type", UNIGRAM)
    squeeze = normalizer.get("remove_extra_whitespaces", True)
    missing = {"[PAD]", "[CLS]", "[SEP]"} - {text for text, _, _ in pieces}
    reasons = [reason for reason, holds in {
        f"its model_type is {MODEL_TYPES.get(model_type, model_type)}, not UNIGRAM": model_type != UNIGRAM,
        "treat_whitespace_as_suffix is on": trainer.get("treat_whitespace_as_suffix", False),
        "escape_whitespaces is off": not normalizer.get("escape_whitespaces", True),
        f"it has no {' '.join(sorted(missing))}": missing,
        "a replacement has two spaces in a row": squeeze and any("  " in new for new in rules.values()),
    }.items() if holds]
    if reasons:
        raise ValueError(f"{path} is a SentencePiece model of another kind than DeBERTaV3's "
                         f"({', '.join(reasons)}): use a checkpoint that has a tokenizer.json")
    symbols = [text for text, _, kind in pieces if kind == USER_DEFINED]
    return build_tokenizer(pieces, bool(trainer.get("byte_fallback")), SpmNormalizer(
        rules, symbols, normalizer.get("add_dummy_prefix", True), squeeze))


def build_tokenizer(pieces, byte_fallback, normalizer):
    """pieces [(text, score, type)] in order of their ids -> tokenizers.Tokenizer"""
    lowest = min(score for _, score, kind in pieces if kind == NORMAL)
    vocab = []
    for text, score, kind in pieces:
        if kind == USER_DEFINED:
            score = 0.1 * (len(text.encode()) - 1)  # SentencePiece's bonus, above any log-probability
        elif kind != NORMAL:
            score = lowest  # not less: an unknown character costs the vocabulary's lowest score - 10
        if kind in (UNKNOWN, CONTROL, UNUSED):
            text = " " + text  # no text can match this: its spaces are "▁" when it gets to the model
        vocab.append((text, score))
    special = {text: index for index, (text, _, kind) in enumerate(pieces)
               if kind in (UNKNOWN, CONTROL) or text in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    special.setdefault("[MASK]", len(pieces))
    # A special token gets its id from the model at hand when it is added. Unigram does not know the names
    # (see above), so a WordLevel model that does is there until then.
    tokenizer = Tokenizer(models.WordLevel(special, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(special))
    unk_id = next(index for index, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN)
    tokenizer.model = models.Unigram(vocab, unk_id, byte_fallback)
    tokenizer.encode_special_tokens = True  # that is, as text
    tokenizer.normalizer = normalizers.Normalizer.custom(normalizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, special[name]) for name in ("[CLS]", "[SEP]")])
    return tokenizer
