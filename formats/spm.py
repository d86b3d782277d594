"""DeBERTaV3's `spm.model`, read into a `tokenizers` tokenizer without sentencepiece or protobuf.

An spm.model is one protocol-buffer message, and on the wire a message is fields in a row:

    key    varint: field number << 3 | wire type  (7 bits a byte, lowest first, bit 7 = "goes on")
    value  wire type 0: varint (int, bool, enum)     1: 8 bytes     5: 4 bytes (float)
                     2: varint n, then n bytes (str, bytes or another message)

The file holds no names: the schemas below name the fields of sentencepiece_model.proto that we
need. A text becomes ids in SentencePiece's two steps (normalizer.cc, unigram_model.cc):

    " ﬁne  day" ── SpmNormalizer: charsmap, spaces ──> "▁fine▁day" ── Unigram: best score ──> ids

The ids are SentencePiece's (0.2.3) but for two corners, both pinned down in tests/test_spm.py:
  * It adds scores in float32, `tokenizers` in float64: where two segmentations score the same up to
    float32 rounding ("9" + "99" and "99" + "9"), the two may choose differently.
  * In a model with byte_fallback (not DeBERTaV3's), text that spells "<0x41>" may get its piece.
"""
import math
import re
import struct
from collections import defaultdict

from tokenizers import Regex, Tokenizer, models, normalizers, processors

from formats.disk import read_bytes

# Schema of a message: field number -> (name, wire type, kind); a dict is an inner message's.
PIECE = {1: ("piece", 2, str), 2: ("score", 5, float), 3: ("type", 0, int)}
TRAINER = {3: ("model_type", 0, int), 24: ("treat_whitespace_as_suffix", 0, bool),
           35: ("byte_fallback", 0, bool)}
NORMALIZER = {2: ("precompiled_charsmap", 2, bytes), 3: ("add_dummy_prefix", 0, bool),
              4: ("remove_extra_whitespaces", 0, bool), 5: ("escape_whitespaces", 0, bool)}
MODEL = {1: ("pieces", 2, PIECE), 2: ("trainer_spec", 2, TRAINER),
         3: ("normalizer_spec", 2, NORMALIZER)}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)   # a piece's type
MODEL_TYPES = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}
LONGEST_PIECE = 1000                         # letters; `tokenizers` frees a tree by a call a letter
LARGEST_CHARSMAP = 32_000_000                # NFKC's has 5 million; its longest rule 33 bytes
SPACE = "▁"                                  # U+2581 is a space inside pieces


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


def read_fields(data, at, end, schema):
    """Yields (name, value) of the fields in data[at:end] that the schema names, in file order."""
    while at < end:
        start = at
        key, at = read_varint(data, at, end)
        number = key >> 3
        wire_type = key & 7
        if number == 0 or wire_type not in (0, 1, 2, 5):
            raise ValueError(f"no field at byte {start}")
        value = 0
        if wire_type in (0, 2):
            value, at = read_varint(data, at, end)
        begin = at
        at += {0: 0, 1: 8, 2: value, 5: 4}[wire_type]
        if at > end:
            raise ValueError(f"truncated at byte {end}")
        if number not in schema:
            continue
        name, expected, kind = schema[number]
        if wire_type != expected:
            raise ValueError(f"{name} with wire type {wire_type} at byte {start}")
        if kind is float:
            (value,) = struct.unpack("<f", data[begin:at])
        elif kind is bytes:
            value = data[begin:at]
        elif kind is str:
            value = data[begin:at].decode()
        elif isinstance(kind, dict):         # of a field that comes twice the last one counts
            value = dict(read_fields(data, begin, at, kind))
        yield name, value


def read_model(data):
    """Bytes of a file -> (pieces [(text, score, type)], trainer_spec, normalizer_spec, rules)

    ValueError where the SentencePiece library refuses the file too, and where a spec is missing.
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
    texts, scores, types = zip(*pieces)
    if max(map(len, texts)) > LONGEST_PIECE:
        raise ValueError(f"a piece longer than {LONGEST_PIECE} letters")
    if not all(texts) or len(set(texts)) < len(texts) or not all(map(math.isfinite, scores)):
        raise ValueError("a piece without text, without score or twice")
    known = range(NORMAL, BYTE + 1)
    if types.count(UNKNOWN) != 1 or NORMAL not in types or not set(types).issubset(known):
        raise ValueError("pieces of wrong type")
    all_bytes = [f"<0x{byte:02X}>" for byte in range(256)] if trainer.get("byte_fallback") else []
    if {text for text, _, kind in pieces if kind == BYTE} != set(all_bytes):
        raise ValueError("pieces of wrong type")
    return pieces, trainer, normalizer, read_charsmap(normalizer.get("precompiled_charsmap", b""))


def read_charsmap(blob):
    """precompiled_charsmap -> {text: its replacement}; where several match, the longest counts.

    The blob: uint32 n; n bytes of a trie over UTF-8 bytes; the replacements, a NUL after each. The
    trie is a double array (darts-clone): uint32 units, unit 0 the root, each with base = its own
    index ^ its offset. Its child along byte c is unit base ^ c, if that one's label is c. Bits:
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
    bases, children = read_units(units, len(replacements))
    rules = {}
    stack = [(b"", 0)]                       # (the bytes that lead to a unit, its index)
    steps = 0
    held = 0                                 # about how many bytes the rules take
    while stack:
        key, index = stack.pop()
        steps += 1
        if len(key) > 255 or steps > 32 * len(units):   # NFKC's needs 6 steps a unit
            raise ValueError("charsmap with a loop")
        base = bases[index]
        if units[index] >> 8 & 1 and units[base] >> 31:
            begin = units[base] & 0x7FFFFFFF
            new = replacements[begin:begin + 256].partition(b"\0")
            held += 16 + len(key) + len(new[0])
            if not new[1] or held > LARGEST_CHARSMAP:
                raise ValueError("charsmap with too many or too long replacements")
            rules[key.decode()] = new[0].decode()
        stack += [(key + byte, child) for byte, child in children.get(base, [])]
    return rules


def read_units(units, size):
    """-> (the base of each unit, {base: [(byte, index of a child)]}); size: of the replacements"""
    bases = []
    children = defaultdict(list)
    for index, unit in enumerate(units):
        offset = unit >> 10 << (8 if unit >> 9 & 1 else 0)
        bases.append(index ^ offset)
        is_leaf = unit >> 31
        label = unit & 255
        if is_leaf and (index == 0 or unit & 0x7FFFFFFF >= size):
            raise ValueError("charsmap that points outside itself")
        if not is_leaf and bases[index] >= len(units):
            raise ValueError("charsmap that points outside itself")
        if label and not is_leaf:
            children[index ^ label].append((bytes([label]), index))
    return bases, children


class SpmNormalizer:
    """SentencePiece's normalizer.cc as a custom normaliser for `tokenizers`: equal for any text.

    `tokenizers` has its own for charsmaps, Precompiled, but that goes grapheme by grapheme and
    takes the shortest match: "ệ" written as e and two accents loses one, decomposed kana stay so.
    rules: {text: replacement} of the charsmap. symbols: user-defined pieces, which no rule changes.
    """

    def __init__(self, rules, symbols=(), add_dummy_prefix=True, remove_extra_whitespaces=True):
        self.add_dummy_prefix = add_dummy_prefix
        self.remove_extra_whitespaces = remove_extra_whitespaces
        self.symbols = set(symbols)
        self.table = {**rules, **dict(zip(symbols, symbols))}
        self.longest = max(map(len, self.table), default=0)
        # A key can match only at a character that is one, or before one that continues a key.
        single = regex_set(key for key in self.table if len(key) == 1)
        inner = regex_set("".join(key[1:] for key in self.table))
        self.places = re.compile(f".{inner}+|{single}", re.DOTALL)
        self.whole = Regex(r"(?m:.++)")

    def normalize(self, normalized):
        """Called by `tokenizers` with its NormalizedString; it would swallow an exception here."""
        normalized.replace(self.whole, self.apply(normalized.normalized))

    def apply(self, text):
        """Raw text -> the text that the model sees, e.g. " ﬁne  day" -> "▁fine▁day"."""
        if not text:
            return ""
        text = self.places.sub(self.replace, text)
        if self.remove_extra_whitespaces:    # U+0020 alone: rules have made it of tabs and the like
            text = re.sub("  +", " ", text).strip(" ")
        text = text.replace(" ", SPACE)
        if self.add_dummy_prefix:
            text = SPACE + text
        return text.rstrip(SPACE) if self.remove_extra_whitespaces else text

    def replace(self, match):
        """A match of self.places with its keys replaced, from left to right."""
        text = match[0]
        done = []
        at = 0
        while at < len(text):
            ends = range(min(len(text), at + self.longest), at, -1)
            keys = [text[at:end] for end in ends if text[at:end] in self.table]
            symbols = [key for key in keys if key in self.symbols]
            key = (symbols + keys + [text[at]])[0]      # the longest; symbols come before rules
            done.append(self.table.get(key, key))
            at += len(key)
        return "".join(done)


def regex_set(chars):
    """A set for a regular expression, with all above U+FFFF: `re` is slow in sets with many."""
    chars = "".join(sorted(char for char in set(chars) if char <= "\uffff"))
    return f"[{re.escape(chars)}\U00010000-\U0010ffff]"


def read_spm(path):
    """The `spm.model` at path -> tokenizers.Tokenizer with SentencePiece's ids, without padding.

    It encodes to [CLS] A [SEP], and a pair to [CLS] A [SEP] B [SEP] with type ids 0 and 1. [PAD],
    [CLS], [SEP] and [UNK] are pieces of the file, [MASK] gets the id after the last one; text that
    spells them stays text. It gives no offsets into the text and cannot be saved or pickled: keep
    the file. ValueError: the file is damaged, or of a kind that is not read here.
    """
    try:
        pieces, trainer, normalizer, rules = read_model(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a readable SentencePiece model ({error}): download it "
                         "again") from None
    reasons = reasons_against(pieces, trainer, normalizer, rules)
    if reasons:
        raise ValueError(f"{path} is a SentencePiece model of another kind than DeBERTaV3's "
                         f"({', '.join(reasons)}): use a checkpoint that has a tokenizer.json")
    symbols = [text for text, _, kind in pieces if kind == USER_DEFINED]
    made = SpmNormalizer(rules, symbols, normalizer.get("add_dummy_prefix", True),
                         normalizer.get("remove_extra_whitespaces", True))
    return build_tokenizer(pieces, bool(trainer.get("byte_fallback")), made)


def reasons_against(pieces, trainer, normalizer, rules):
    """What in a sound model would lead to other ids than SentencePiece's: a list of texts."""
    reasons = []
    model_type = trainer.get("model_type", 1)
    if model_type != 1:
        reasons.append(f"its model_type is {MODEL_TYPES.get(model_type, model_type)}, not UNIGRAM")
    if trainer.get("treat_whitespace_as_suffix"):
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
    lowest = min(score for _, score, kind in pieces if kind == NORMAL)
    vocab = []
    special = {}
    for number, (text, score, kind) in enumerate(pieces):
        if kind in (UNKNOWN, CONTROL) or text in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"):
            special[text] = number
        if kind == USER_DEFINED:             # SentencePiece's bonus, above any log-probability
            score = 0.1 * (len(text.encode()) - 1)
        elif kind != NORMAL:                 # not less: an unknown character costs lowest - 10
            score = lowest
        if kind in (UNKNOWN, CONTROL, UNUSED):
            text = " " + text                # no text can match: its spaces are "▁" by then
        vocab.append((text, score))
    special.setdefault("[MASK]", len(pieces))
    # A special token gets its id from the model at hand when it is added. Unigram does not know
    # the names (see above), so a WordLevel model that does is there until then.
    tokenizer = Tokenizer(models.WordLevel(special, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(special))
    unk_id = [kind for _, _, kind in pieces].index(UNKNOWN)
    tokenizer.model = models.Unigram(vocab, unk_id, byte_fallback)
    tokenizer.encode_special_tokens = True   # that is, as text
    tokenizer.normalizer = normalizers.Normalizer.custom(normalizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", special["[CLS]"]), ("[SEP]", special["[SEP]"])])
    return tokenizer
