"""DeBERTaV3's `spm.model`, read into a `tokenizers` tokenizer without sentencepiece or protobuf.

An spm.model is one protocol-buffer message, and on the wire a message is fields in a row:

    key    varint: field number << 3 | wire type
           (a varint is 7 bits a byte, lowest first; bit 7 = "goes on")
    value  wire type 0: varint (int, bool, enum)
           wire type 1: 8 bytes
           wire type 2: varint n, then n bytes (str, bytes or another message)
           wire type 5: 4 bytes, little-endian (float)

The file holds no names: the schemas below name those fields of sentencepiece_model.proto that we
need. A text becomes ids in SentencePiece's two steps (normalizer.cc, unigram_model.cc):

    " ﬁne  day"  ── SpmNormalizer: charsmap, spaces ──>
    "▁fine▁day"  ── Unigram: the pieces with the best sum of scores ──>  ids

The ids are SentencePiece's (0.2.3) but for two corners, both pinned down in tests/test_spm.py:
  * It adds scores in float32, `tokenizers` in float64: where two segmentations score the same up to
    float32 rounding ("9" + "99" and "99" + "9"), the two may choose differently.
  * In a model with byte_fallback (DeBERTaV3's has none), text that spells "<0x41>" may get that
    byte's piece.
"""
import math
import re
import struct
from collections import defaultdict
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, processors

# Schema of a message: field number -> (name, kind). A dict as kind is an inner message's schema.
PIECE = {
    1: ("piece", str),
    2: ("score", float),                     # log-probability
    3: ("type", int),
}
TRAINER = {
    3: ("model_type", int),
    24: ("treat_whitespace_as_suffix", bool),
    35: ("byte_fallback", bool),
}
NORMALIZER = {
    2: ("precompiled_charsmap", bytes),
    3: ("add_dummy_prefix", bool),
    4: ("remove_extra_whitespaces", bool),
    5: ("escape_whitespaces", bool),
}
MODEL = {
    1: ("pieces", PIECE),
    2: ("trainer_spec", TRAINER),
    3: ("normalizer_spec", NORMALIZER),
}
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5                     # wire types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)       # types of pieces
UNIGRAM = 1
MODEL_TYPES = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}
SPACE = "▁"                                  # U+2581 is a space inside pieces


# ---- the file ----------------------------------------------------------------------------------

def read_varint(data, at, end):
    """-> (the varint at byte `at`, the position after it)"""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError(f"truncated at byte {end}")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"endless varint at byte {at - 10}")


def read_value(data, at, end, wire_type):
    """-> (the value at byte `at`, an int for a varint and else bytes; the position after it)"""
    if wire_type == VARINT:
        return read_varint(data, at, end)
    if wire_type == LENGTH:
        size, at = read_varint(data, at, end)
    else:
        size = 4 if wire_type == FOUR_BYTES else 8
    if at + size > end:
        raise ValueError(f"truncated at byte {end}")
    return data[at:at + size], at + size


def read_fields(data, at, end, schema):
    """Yields (name, value) of the fields in data[at:end] that the schema names, in file order."""
    while at < end:
        start = at
        key, at = read_varint(data, at, end)
        number = key >> 3
        wire_type = key & 7
        if number == 0 or wire_type not in (VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES):
            raise ValueError(f"no field at byte {start}")
        value, at = read_value(data, at, end, wire_type)
        if number not in schema:
            continue
        name, kind = schema[number]
        if wire_type != wire_type_of(kind):
            raise ValueError(f"{name} with wire type {wire_type} at byte {start}")
        if kind is float:
            (value,) = struct.unpack("<f", value)
        elif kind is str:
            value = value.decode()
        elif isinstance(kind, dict):         # of a field that comes twice the last one counts
            value = dict(read_fields(data, at - len(value), at, kind))
        yield name, value


def wire_type_of(kind):
    """How a value of this kind is written."""
    if kind is int or kind is bool:
        return VARINT
    if kind is float:
        return FOUR_BYTES
    return LENGTH


def read_model(data):
    """Bytes of a file -> (pieces [(text, score, type)], trainer_spec, normalizer_spec, rules)

    rules: of the charsmap. ValueError where the SentencePiece library refuses the file too, and
    where a spec is missing.
    """
    pieces = []
    specs = {}
    for name, value in read_fields(data, 0, len(data), MODEL):
        if name == "pieces":
            text = value.get("piece", "")
            pieces.append((text, value.get("score", 0.0), value.get("type", NORMAL)))
        else:
            specs[name] = value
    if not pieces or "trainer_spec" not in specs or "normalizer_spec" not in specs:
        raise ValueError(f"truncated at byte {len(data)}")
    trainer = specs["trainer_spec"]
    normalizer = specs["normalizer_spec"]
    check_pieces(pieces, trainer.get("byte_fallback", False))
    rules = read_charsmap(normalizer.get("precompiled_charsmap", b""))
    return pieces, trainer, normalizer, rules


def check_pieces(pieces, byte_fallback):
    """ValueError unless the library would take these pieces [(text, score, type)]."""
    texts, scores, types = zip(*pieces)
    if not all(texts) or len(set(texts)) < len(texts) or not all(map(math.isfinite, scores)):
        raise ValueError("a piece without text, without score or twice")
    expected = set()
    if byte_fallback:
        expected = {f"<0x{byte:02X}>" for byte in range(256)}
    byte_pieces = {text for text, _, kind in pieces if kind == BYTE}
    known = set(types) <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}
    if not known or types.count(UNKNOWN) != 1 or NORMAL not in types or byte_pieces != expected:
        raise ValueError("pieces of wrong type")


# ---- the charsmap ------------------------------------------------------------------------------

def is_leaf(unit):
    return unit >> 31 == 1


def has_leaf(unit):
    return unit >> 8 & 1 == 1


def label_of(unit):
    return unit & 255


def offregex_set(unit):
    offset = unit >> 10
    if unit >> 9 & 1:
        offset *= 256
    return offset


def position_of(leaf):
    return leaf & 0x7FFFFFFF


def read_charsmap(blob):
    """precompiled_charsmap -> {text: its replacement}; where several match, the longest counts.

    The blob: uint32 n; n bytes of a trie over UTF-8 bytes; the replacements, a NUL after each. The
    trie is a double array (darts-clone): uint32 units, unit 0 the root, each with base = its own
    index ^ its offset. Its child along byte c is unit base ^ c, if that one's label is c. The bits
    of a unit:
        bit 31 clear: 0-7 label, 8 "has a leaf", 10-30 offset (bit 9: times 256)
        bit 31 set:   the leaf, at its parent's base; 0-30 position of the replacement
    """
    if not blob:
        return {}
    size = int.from_bytes(blob[:4], "little")
    if size % 4 or not 0 < size < len(blob) - 4 or blob[-1] != 0:
        raise ValueError("charsmap of wrong size")
    units = struct.unpack(f"<{size // 4}I", blob[4:4 + size])
    replacements = blob[4 + size:]
    children = read_units(units, len(replacements))
    rules = {}
    stack = [(b"", 0)]                       # (the bytes that lead to a unit, its index)
    steps = 0
    while stack:
        key, index = stack.pop()
        steps += 1
        if len(key) > 255 or steps > 32 * len(units):   # NFKC's needs 6 steps a unit
            raise ValueError("charsmap with a loop")
        base = index ^ offregex_set(units[index])
        if has_leaf(units[index]) and is_leaf(units[base]):
            begin = position_of(units[base])
            end = replacements.index(0, begin)
            rules[key.decode()] = replacements[begin:end].decode()
        for byte, child in children.get(base, []):
            stack.append((key + byte, child))
    return rules


def read_units(units, size):
    """The trie's edges: {base: [(byte, index of the child)]}; size: bytes of the replacements.

    ValueError for a unit that points outside of units or replacements.
    """
    children = defaultdict(list)
    for index, unit in enumerate(units):
        if is_leaf(unit):
            is_inside = index > 0 and position_of(unit) < size
        else:
            is_inside = index ^ offregex_set(unit) < len(units)
            label = label_of(unit)
            if label:
                children[index ^ label].append((bytes([label]), index))
        if not is_inside:
            raise ValueError("charsmap that points outside itself")
    return children


class SpmNormalizer:
    """SentencePiece's normalizer.cc as a custom normaliser for `tokenizers`: equal for any text.

    `tokenizers` has its own for charsmaps, Precompiled, but that goes grapheme by grapheme and
    takes the shortest match: "ệ" written as e and two accents loses one, decomposed Hangul and kana
    stay decomposed.

    rules: {text: replacement} of the charsmap. symbols: the user-defined pieces, which no rule may
    touch.
    """

    def __init__(self, rules, symbols=(), add_dummy_prefix=True, remove_extra_whitespaces=True):
        self.add_dummy_prefix = add_dummy_prefix
        self.remove_extra_whitespaces = remove_extra_whitespaces
        self.symbols = set(symbols)
        self.table = dict(rules)
        for symbol in symbols:
            self.table[symbol] = symbol
        self.longest = max(map(len, self.table), default=0)
        self.places = self.find_places()
        self.whole = Regex(r"(?m:.++)")

    def find_places(self):
        """A regular expression for every piece of a text in which a key can match.

        That is a character that is a key, or any character before those that continue a key. All
        characters above U+FFFF count as both, since `re` is slow in sets with many of them.
        """
        single = set()
        inner = set()
        for key in self.table:
            if len(key) == 1:
                single.add(key)
            inner.update(key[1:])
        return re.compile(f".{regex_set(inner)}+|{regex_set(single)}", re.DOTALL)

    def normalize(self, normalized):
        """Called by `tokenizers` with its NormalizedString; it would swallow an exception here."""
        normalized.replace(self.whole, self.apply(normalized.normalized))

    def apply(self, text):
        """Raw text -> the text that the model sees, e.g. " ﬁne  day" -> "▁fine▁day"."""
        if not text:
            return ""
        if self.table:
            text = self.places.sub(self.replace, text)
        if self.remove_extra_whitespaces:    # U+0020 alone: rules have made it of tabs and the like
            text = re.sub("  +", " ", text).strip(" ")
        text = text.replace(" ", SPACE)
        if self.add_dummy_prefix:
            text = SPACE + text
        if self.remove_extra_whitespaces:
            text = text.rstrip(SPACE)
        return text

    def replace(self, match):
        """A match of find_places() with its keys replaced, from left to right."""
        text = match[0]
        done = []
        at = 0
        while at < len(text):
            key = self.find_key(text, at)
            done.append(self.table.get(key, key))
            at += len(key)
        return "".join(done)

    def find_key(self, text, at):
        """What is replaced at a place: the longest symbol, else longest key, else a character."""
        longest = None
        for end in range(min(len(text), at + self.longest), at, -1):
            part = text[at:end]
            if part in self.symbols:
                return part
            if longest is None and part in self.table:
                longest = part
        if longest is None:
            return text[at]
        return longest


def regex_set(chars):
    """Characters as a set for a regular expression, with all those above U+FFFF."""
    chars = "".join(sorted(char for char in chars if char <= "\uffff"))
    return f"[{re.escape(chars)}\U00010000-\U0010ffff]"


# ---- the tokenizer -----------------------------------------------------------------------------

def read_spm(path):
    """The `spm.model` at path -> tokenizers.Tokenizer with SentencePiece's ids.

    It encodes to [CLS] A [SEP], and a pair to [CLS] A [SEP] B [SEP] with type ids 0 and 1, without
    padding or truncation. [PAD], [CLS], [SEP] and [UNK] are pieces of the file, [MASK] gets the id
    after the last one; text that spells them stays text. It gives no offsets into the text and
    cannot be saved or pickled (Python normaliser): keep the file.
    OSError: the file cannot be read. ValueError: it is damaged, or of a kind that is not read here.
    """
    data = Path(path).read_bytes()
    try:
        pieces, trainer, normalizer, rules = read_model(data)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable SentencePiece model ({error}): download it "
                         "again") from None
    reasons = reasons_against(pieces, trainer, normalizer, rules)
    if reasons:
        raise ValueError(f"{path} is a SentencePiece model of another kind than DeBERTaV3's "
                         f"({', '.join(reasons)}): use a checkpoint that has a tokenizer.json")
    symbols = [text for text, _, kind in pieces if kind == USER_DEFINED]
    add_dummy_prefix = normalizer.get("add_dummy_prefix", True)
    squeeze = normalizer.get("remove_extra_whitespaces", True)
    byte_fallback = bool(trainer.get("byte_fallback", False))
    made = SpmNormalizer(rules, symbols, add_dummy_prefix, squeeze)
    return build_tokenizer(pieces, byte_fallback, made)


def reasons_against(pieces, trainer, normalizer, rules):
    """What in a sound model would lead to other ids than SentencePiece's: a list of texts."""
    reasons = []
    model_type = trainer.get("model_type", UNIGRAM)
    if model_type != UNIGRAM:
        reasons.append(f"its model_type is {MODEL_TYPES.get(model_type, model_type)}, not UNIGRAM")
    if trainer.get("treat_whitespace_as_suffix", False):
        reasons.append("treat_whitespace_as_suffix is on")
    if not normalizer.get("escape_whitespaces", True):
        reasons.append("escape_whitespaces is off")
    missing = {"[PAD]", "[CLS]", "[SEP]"} - {text for text, _, _ in pieces}
    if missing:
        reasons.append(f"it has no {' '.join(sorted(missing))}")
    squeeze = normalizer.get("remove_extra_whitespaces", True)
    if squeeze and any("  " in new for new in rules.values()):
        reasons.append("a replacement has two spaces in a row")
    return reasons


def build_tokenizer(pieces, byte_fallback, normalizer):
    """pieces [(text, score, type)] in order of their ids -> tokenizers.Tokenizer"""
    special = special_ids(pieces)
    # A special token gets its id from the model at hand when it is added. Unigram does not know
    # their names (see vocabulary()), so a WordLevel model that does is there until then.
    tokenizer = Tokenizer(models.WordLevel(special, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(special))
    types = [kind for _, _, kind in pieces]
    tokenizer.model = models.Unigram(vocabulary(pieces), types.index(UNKNOWN), byte_fallback)
    tokenizer.encode_special_tokens = True   # that is, as text
    tokenizer.normalizer = normalizers.Normalizer.custom(normalizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", special["[CLS]"]), ("[SEP]", special["[SEP]"])])
    return tokenizer


def special_ids(pieces):
    """{text: id} of the pieces that no text may become."""
    special = {}
    for number, (text, _, kind) in enumerate(pieces):
        if kind in (UNKNOWN, CONTROL) or text in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"):
            special[text] = number
    special.setdefault("[MASK]", len(pieces))
    return special


def vocabulary(pieces):
    """The pieces as [(text, score)] for `tokenizers`' Unigram, in order of their ids."""
    lowest = min(score for _, score, kind in pieces if kind == NORMAL)
    vocab = []
    for text, score, kind in pieces:
        if kind == USER_DEFINED:             # SentencePiece's bonus, above any log-probability
            score = 0.1 * (len(text.encode()) - 1)
        elif kind != NORMAL:                 # not less: an unknown character costs lowest - 10
            score = lowest
        if kind in (UNKNOWN, CONTROL, UNUSED):
            text = " " + text                # no text can match: its spaces are "▁" by then
        vocab.append((text, score))
    return vocab
