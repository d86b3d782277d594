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
  * In a model with byte_fallback in which a character of "<0x41>" is no piece (in DeBERTaV3's all
    are), text that spells a byte may get its piece.
"""
import math
import re
import struct
from functools import partial

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from formats.disk import read_bytes, reading

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)   # a piece's type
# Schema of a message: field number -> (name, its value where it is absent). A dict is the schema of
# an inner message; in a list: of many.
PIECE = {1: ("piece", ""), 2: ("score", 0.0), 3: ("type", NORMAL)}
TRAINER = {3: ("model_type", 1), 24: ("treat_whitespace_as_suffix", False),
           35: ("byte_fallback", False)}
NORMALIZER = {2: ("precompiled_charsmap", b""), 3: ("add_dummy_prefix", True),
              4: ("remove_extra_whitespaces", True), 5: ("escape_whitespaces", True)}
MODEL = {1: ("pieces", [PIECE]), 2: ("trainer_spec", TRAINER), 3: ("normalizer_spec", NORMALIZER)}
WIRE_TYPES = {int: 0, bool: 0, float: 5}     # all others: 2
LONGEST_PIECE = 1000                         # letters; `tokenizers` frees a tree by a call a letter
LONGEST_RULE = 255                           # bytes of a replacement; NFKC's longest has 33
SPACE = "▁"                                  # U+2581 is a space inside pieces


def read_varint(data, at, end):
    """-> (the varint at byte `at`, the position after it)"""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        if byte < 128:
            return value | byte << shift, at
        value |= (byte & 127) << shift
        shift += 7
        if shift == 70:
            raise ValueError(f"endless varint at byte {at - 10}")
    raise ValueError(f"truncated at byte {end}")


def read_message(data, at, end, schema):
    """The message in data[at:end] -> {name: value} of the schema's fields, inner ones if there."""
    found = {name: absent for name, absent in schema.values() if type(absent) not in (dict, list)}
    while at < end:
        start = at
        key, at = read_varint(data, at, end)
        number = key >> 3
        wire_type = key & 7
        if number == 0 or wire_type not in (0, 1, 2, 5):
            raise ValueError(f"no field at byte {start}")
        value = 4 if wire_type == 5 else 8   # how many bytes follow
        if wire_type in (0, 2):
            value, at = read_varint(data, at, end)
        begin = at
        if wire_type != 0:
            at += value
        if at > end:
            raise ValueError(f"truncated at byte {end}")
        if number not in schema:
            continue
        name, absent = schema[number]
        kind = type(absent)
        if wire_type != WIRE_TYPES.get(kind, 2):
            raise ValueError(f"{name} with wire type {wire_type} at byte {start}")
        if kind is str:
            value = data[begin:at].decode()
        elif kind is float:
            (value,) = struct.unpack_from("<f", data, begin)
        elif kind is bytes:
            value = data[begin:at]
        elif kind is list:
            value = found.get(name, [])
            value.append(read_message(data, begin, at, absent[0]))
        elif kind is dict:
            value = read_message(data, begin, at, absent)
        found[name] = value                  # of a field that comes twice the last one counts
    return found


def read_model(data):
    """Bytes of a file -> (pieces [(text, score, type)], trainer_spec, normalizer_spec, charsmap)

    ValueError where the SentencePiece library refuses the file too, and where a spec is missing.
    """
    specs = read_message(data, 0, len(data), MODEL)
    if len(specs) < len(MODEL):
        raise ValueError(f"truncated at byte {len(data)}")
    pieces = [(piece["piece"], piece["score"], piece["type"]) for piece in specs["pieces"]]
    trainer = specs["trainer_spec"]
    normalizer = specs["normalizer_spec"]
    texts, scores, types = zip(*pieces)
    if max(map(len, texts)) > LONGEST_PIECE:
        raise ValueError(f"a piece longer than {LONGEST_PIECE} letters")
    if not all(texts) or len(set(texts)) < len(texts) or not all(map(math.isfinite, scores)):
        raise ValueError("a piece without text, without score or twice")
    found = {text for text, _, kind in pieces if kind == BYTE}
    expected = {f"<0x{byte:02X}>" for byte in range(256)} if trainer["byte_fallback"] else set()
    are_known = set(types).issubset(range(NORMAL, BYTE + 1))
    if not are_known or types.count(UNKNOWN) != 1 or NORMAL not in types or found != expected:
        raise ValueError("pieces of wrong type")
    return pieces, trainer, normalizer, read_charsmap(normalizer["precompiled_charsmap"])


def read_charsmap(blob):
    """precompiled_charsmap -> (units, their bases, replacements): a trie of rules

    The blob: uint32 n; n bytes of a trie over UTF-8 bytes; the replacements, a NUL after each. The
    trie is a double array (darts-clone): uint32 units, unit 0 the root, each with base = its own
    index ^ its offset. Its child along byte c is unit base ^ c, if that one's label is c. Bits:
        bit 31 clear: 0-7 label, 8 "has a leaf", 10-30 offset (bit 9: times 256)
        bit 31 set:   the leaf, at its parent's base; 0-30 position of the replacement
    """
    size = int.from_bytes(blob[:4], "little")
    if blob and (size % 1024 or not 0 < size < len(blob) - 4 or blob[-1] != 0):
        raise ValueError("charsmap of wrong size")
    units = struct.unpack(f"<{size // 4}I", blob[4:4 + size]) or (0,) * 256
    replacements = blob[4 + size:]
    replacements.decode()                    # a UnicodeDecodeError is a ValueError
    if max(map(len, replacements.split(b"\0"))) > LONGEST_RULE:
        raise ValueError("charsmap with too long replacements")
    bases = []
    for index, unit in enumerate(units):
        offset = unit >> 10 << (8 if unit >> 9 & 1 else 0)
        bases.append(index ^ offset)
        is_inside = bases[index] < len(units)
        if unit >> 31:
            is_inside = index > 0 and unit & 0x7FFFFFFF < len(replacements)
        if not is_inside:
            raise ValueError("charsmap that points outside itself")
    return units, bases, replacements


class SpmNormalizer:
    """SentencePiece's normalizer.cc: equal for any text.

    `tokenizers` has its own for charsmaps, Precompiled, but that goes grapheme by grapheme and
    takes the shortest match: "ệ" written as e and two accents loses one, decomposed kana stay so.
    charsmap: of read_charsmap(). symbols: user-defined pieces, which no rule changes.
    """

    def __init__(self, charsmap, symbols=(), add_dummy_prefix=True, remove_extra_whitespaces=True):
        self.units, self.bases, self.replacements = charsmap
        self.add_dummy_prefix = add_dummy_prefix
        self.remove_extra_whitespaces = remove_extra_whitespaces
        in_order = map(re.escape, sorted(symbols, key=len, reverse=True))
        self.symbols = re.compile("|".join(in_order) or "(?!)")      # the longest; none: no match
        self.keeps_plain = not symbols and self.keeps_plain_text()
        # Where a key can be: "[ -~]" is plain text.
        self.places = re.compile("[ -~]?[^ -~]+" if self.keeps_plain else "(?s:.+)")

    def keeps_plain_text(self):
        """Whether " " to "~" are in no key but as the first of several characters."""
        bases = set(self.bases)              # a unit at none of these is not in use
        for index, unit in enumerate(self.units):
            label = unit & 0x800000FF
            base = index ^ label
            if 32 <= label < 127 and base in bases and (base != self.bases[0] or unit >> 8 & 1):
                return False
        return True

    def apply(self, text):
        """Raw text -> the text that the model sees, e.g. " ﬁne  day" -> "▁fine▁day"."""
        if not text:
            return ""
        if not (self.keeps_plain and text.isascii() and text.isprintable()):
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
            at, new = self.longest(text, at)
            done.append(new)
        return "".join(done)

    def longest(self, text, at):
        """-> (end, replacement) of the symbol, else longest key, else character at text[at]"""
        symbol = self.symbols.match(text, at)
        if symbol:
            return symbol.end(), symbol[0]
        end = at + 1
        new = text[at]
        base = self.bases[0]
        for place in range(at, min(len(text), at + 255)):
            for byte in text[place].encode():
                index = base ^ byte
                if self.units[index] & 0x800000FF != byte:
                    return end, new
                base = self.bases[index]
            if self.units[index] >> 8 & 1 and self.units[base] >> 31:
                begin = self.units[base] & 0x7FFFFFFF
                new = self.replacements[begin:self.replacements.index(0, begin)].decode()
                end = place + 1
        return end, new

    def decode_chain(self, tokens):
        """Called by `tokenizers` to make a text of tokens again."""
        return ["".join(tokens).replace(SPACE, " ").strip(" ")]


def read_spm(path):
    """The `spm.model` at path -> tokenizers.Tokenizer with SentencePiece's ids, without padding.

    It puts no special tokens around texts. [PAD], [CLS], [SEP] and [UNK] are pieces of the file,
    [MASK] gets the id after the last one; text that spells them stays text. It gives no offsets
    into the text and cannot be saved or pickled: keep the file. ValueError: the file is damaged, or
    of a kind that is not read here.
    """
    with reading(path, "download it again"):
        pieces, trainer, normalizer, charsmap = read_model(read_bytes(path))
    missing = {"[PAD]", "[CLS]", "[SEP]"} - {text for text, _, _ in pieces}
    squeezes = normalizer["remove_extra_whitespaces"]
    # What would lead to other ids than SentencePiece's.
    unlike = {
        f"its model_type is {trainer['model_type']}, not UNIGRAM": trainer["model_type"] != 1,
        "treat_whitespace_as_suffix is on": trainer["treat_whitespace_as_suffix"],
        "escape_whitespaces is off": not normalizer["escape_whitespaces"],
        f"it has no {' '.join(sorted(missing))}": missing,
        "a replacement has two spaces in a row": squeezes and b"  " in charsmap[2]}
    reasons = [reason for reason, holds in unlike.items() if holds]
    if reasons:
        raise ValueError(f"{path} is a SentencePiece model of another kind than DeBERTaV3's "
                         f"({', '.join(reasons)}): use a checkpoint that has a tokenizer.json")
    symbols = [text for text, _, kind in pieces if kind == USER_DEFINED]
    made = SpmNormalizer(charsmap, symbols, normalizer["add_dummy_prefix"], squeezes)
    return build_tokenizer(pieces, bool(trainer["byte_fallback"]), made)


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
        elif kind == BYTE:                   # less than the pieces of text that spells "<0x41>"
            score = 7 * (lowest - 10)
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
    if hasattr(tokenizer.model, "_resize_cache"):            # of 10,000 entries; tokenizers >= 0.21
        tokenizer.model._resize_cache(100_000)
    tokenizer.encode_special_tokens = True   # that is, as text
    texts = [text for text, _, kind in pieces if kind in (NORMAL, USER_DEFINED)]
    if SPACE in texts and not any(SPACE in text[1:] for text in texts):
        # No piece goes on beyond a word: word by word the library finds most in its cache.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never")
    # A custom decoder makes saving and copying an error: what they give would not normalise.
    tokenizer.decoder = decoders.Decoder.custom(normalizer)
    normalize_first(tokenizer, normalizer.apply)
    return tokenizer


def normalize_first(tokenizer, apply):
    """Replace a tokenizer's encode methods by ones that pass each text through `apply` before.

    The library has a place for that, a custom Normalizer, and calls it from threads of its own.
    Python prepares itself for such a thread at every call: half of all the time to encode. Here all
    texts of a call are normalised first, in the thread that calls.
    """
    def normalized(given):
        if isinstance(given, str):
            return apply(given)
        if isinstance(given, (list, tuple)):                     # a pair, a batch, words
            return [normalized(inner) for inner in given]
        return given                                             # an option

    def normalize_and(encode, *texts, **named):
        named = {name: normalized(value) for name, value in named.items()}
        return encode(*normalized(texts), **named)

    for name in dir(tokenizer):
        if re.fullmatch("(async_)?encode(_batch)?(_fast)?", name):
            setattr(tokenizer, name, partial(normalize_and, getattr(tokenizer, name)))
