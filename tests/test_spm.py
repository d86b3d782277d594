"""spm.py against the SentencePiece library, against ids it gave (make_spm.py), and on damaged files."""
import asyncio
import copy
import json
import pickle
import random
import re
import struct
import time
from pathlib import Path

import pytest
import tokenizers

import data as tasks
from formats import glue
from tests.make_spm import AROUND, DATA, HARD, RULES, SYMBOLS, TEXT, train  # noqa: E402
from formats.spm import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED  # noqa: E402
from formats.spm import SpmNormalizer, read_charsmap, read_model, read_spm  # noqa: E402

SMALL = DATA / "spm_small.model"
GLUE = Path(__file__).parents[2] / "shared" / "glue"
REAL = GLUE.parent / "deberta-v3" / "spm.model"  # of microsoft/deberta-v3-*
BYTE_TEXT = re.compile("<0x[0-9A-F]{2}>")
MODELS = {  # every option that changes what a text becomes
    "nmt_nfkc": {"vocab_size": 500, "normalization_rule_name": "nmt_nfkc"},
    "nmt_nfkc_cf": {"vocab_size": 500, "normalization_rule_name": "nmt_nfkc_cf"},
    "identity": {"vocab_size": 1000, "normalization_rule_name": "identity"},
    "symbols": {"vocab_size": 500, "normalization_rule_name": "nmt_nfkc", "user_defined_symbols": [
        *SYMBOLS, "[MASK]", "1\ufe0f\u20e3", "\u1112\u1161", "\uff41", "\u00e9"]},
    "byte_fallback": {"vocab_size": 700, "normalization_rule_name": "nmt_nfkc", "byte_fallback": True},
    "spaces kept": {"vocab_size": 500, "normalization_rule_name": "nfkc", "remove_extra_whitespaces": False},
    "no prefix": {"vocab_size": 500, "normalization_rule_name": "identity", "add_dummy_prefix": False},
    "across words": {"vocab_size": 500, "normalization_rule_name": "nfkc_cf", "split_by_whitespace": False},
}


# ---- a protobuf writer, for models that no trainer makes -----------------------------------------

def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number, value):
    """One field on the wire; int, float, str or bytes (which may be a message)."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


SPECIAL = [("[PAD]", 0.0, CONTROL), ("[CLS]", 0.0, CONTROL), ("[SEP]", 0.0, CONTROL), ("[UNK]", 0.0, UNKNOWN)]


def model(pieces, trainer=b"", normalizer=b""):
    """Bytes of a model: SPECIAL, then pieces (text, score) or (text, score, type)."""
    pieces = SPECIAL + [(*piece, NORMAL)[:3] for piece in pieces]
    pieces = [field(1, text) + field(2, score) + field(3, kind) for text, score, kind in pieces]
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer)


def charsmap(units, replacements=b"x\0"):
    """units {index: unit} of the double array, the others 0 -> precompiled_charsmap"""
    size = 256 * (max(units) // 256 + 1)
    return struct.pack(f"<I{size}I", 4 * size, *(units.get(index, 0) for index in range(size))) + replacements


# The trie with the one key "a": root (base 256) -> unit 256 ^ ord("a") (base 512) -> leaf
LEAF, HAS_LEAF, A = 1 << 31, 1 << 8, 256 ^ 97
KEY_A = {0: 256 << 10, A: 97 | HAS_LEAF | (A ^ 512) << 10, 512: LEAF}


def charsmap_of(rules):
    """{text: its replacement} -> precompiled_charsmap; each node of the trie has a block of its own."""
    leaves, replacements = {}, b"\0"
    for key, new in rules.items():
        leaves[key.encode()], replacements = len(replacements), replacements + new.encode() + b"\0"
    nodes = sorted({key[:end] for key in leaves for end in range(len(key) + 1)} | {b""})
    bases, units = {key: 256 * number for number, key in enumerate(nodes, 1)}, {}
    for key, base in bases.items():
        index = bases[key[:-1]] ^ key[-1] if key else 0
        units[index] = (key[-1] if key else 0) | (index ^ base) << 10 | HAS_LEAF * (key in leaves)
        units[base] = LEAF | leaves[key] if key in leaves else 0
    return charsmap(units, replacements)


def rules_of(trie):
    """read_charsmap()'s result -> {text: its replacement}"""
    units, bases, _ = trie
    children = [[] for _ in units]
    for index, unit in enumerate(units):
        if unit & 255 and not unit >> 31:
            children[index ^ unit & 255].append((bytes([unit & 255]), index))
    keys, stack = [], [(b"", 0)]
    while stack:
        key, index = stack.pop()
        if units[index] >> 8 & 1:
            keys.append(key.decode())
        stack += [(key + byte, child) for byte, child in children[bases[index]]]
    normalizer = SpmNormalizer(trie)
    found = {key: normalizer.longest(key, 0) for key in keys}
    assert all(end == len(key) for key, (end, _) in found.items())
    return {key: new for key, (_, new) in found.items()}


@pytest.fixture
def read(tmp_path):
    """bytes of a model -> its tokenizer"""
    def read(data):
        (tmp_path / "spm.model").write_bytes(data)
        return read_spm(tmp_path / "spm.model")
    return read


def ids_of(tokenizer, texts):
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


# ---- the oracle ----------------------------------------------------------------------------------

def viterbi(pieces, text, float32):
    """Ids of a normalised text's best segmentation, after unigram_model.cc; sums in float32 or float64."""
    def rounded(number):
        return struct.unpack("f", struct.pack("f", number))[0] if float32 else number

    known = {text: (rounded(0.1 * (len(text.encode()) - 1)) if kind == USER_DEFINED else score, number)
             for number, (text, score, kind) in enumerate(pieces) if kind in (NORMAL, USER_DEFINED)}
    unknown = (rounded(min(score for _, score, kind in pieces if kind == NORMAL) - 10), 3)
    longest = max(map(len, known))
    best = [(0.0, 0, None)] + [None] * len(text)  # at each end: sum of scores, start and id of the last piece
    for start in range(len(text)):
        for end in range(start + 1, min(len(text), start + longest) + 1):
            score, number = known.get(text[start:end], unknown if end == start + 1 else (None, None))
            if number is not None:
                total = rounded(best[start][0] + score)
                if best[end] is None or total > best[end][0]:
                    best[end] = (total, start, number)
    byte_ids = {text: number for number, (text, _, kind) in enumerate(pieces) if kind == BYTE}
    ids, end = [], len(text)
    while end:
        _, start, number = best[end]
        if number == 3 and byte_ids:
            ids += [byte_ids[f"<0x{byte:02X}>"] for byte in reversed(text[start:end].encode())]
        elif not (ids and ids[-1] == number == 3):  # a run of unknown characters is one id
            ids.append(number)
        end = start
    return ids[::-1]


def assert_sentencepiece_ids(data, tokenizer, texts, ties=0):
    """SentencePiece's ids for all but at most `ties` texts, and there only float32 rounding differs.

    Returns the texts that differ.
    """
    sentencepiece = pytest.importorskip("sentencepiece")
    oracle = sentencepiece.SentencePieceProcessor(model_proto=data)
    differing = [(text, ours, theirs) for text, ours, theirs
                 in zip(texts, ids_of(tokenizer, texts), oracle.encode(texts)) if ours != theirs]
    pieces = read_model(data)[0]
    for text, ours, theirs in differing:
        for ids, float32 in ((ours, False), (theirs, True)):
            assert viterbi(pieces, oracle.normalize(text), float32) == ids, text
    assert len(differing) <= ties, [text for text, _, _ in differing]
    return [text for text, _, _ in differing]


def random_texts(data, count):
    """Texts of rules, characters of rules, pieces, hard bits and any characters, in any order."""
    pieces, _, _, rules = read_model(data)
    pick = random.Random(0)
    keys = list(rules_of(rules)) or ["a"]
    sources = [keys, [char for key in keys for char in key], [text for text, _, _ in pieces], HARD[:500],
               [" ", "\u2581", "\t", "\u3000", "  "], [chr(code) for code in range(0x3000)],
               [chr(code) for code in range(0xE000, 0x110000, 97)]]
    return ["".join(pick.choice(pick.choice(sources)) for _ in range(pick.randrange(12)))
            for _ in range(count)]


def glue_texts():
    """Every line of every GLUE file, and every column."""
    if not GLUE.is_dir():
        pytest.skip("no GLUE files")
    lines = [line for path in sorted(GLUE.rglob("*")) if path.suffix in (".tsv", ".txt")
             for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    return lines, list(dict.fromkeys(column for line in lines for column in line.split("\t")))


# ---- ids -----------------------------------------------------------------------------------------

def test_golden_ids():
    """Oracle: the ids that SentencePiece gave when make_spm.py made the model."""
    golden, tokenizer = json.loads((DATA / "spm_small.json").read_text()), read_spm(SMALL)
    assert len(HARD) == len(golden["ids"]) > 1000
    for text, ids in zip(HARD, golden["ids"]):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, repr(text)


@pytest.mark.parametrize("name", MODELS)
def test_ids_and_normalised_text_of_every_kind_of_model(read, name):
    """Oracle: SentencePiece's normalize() and encode(), on hard and on random texts."""
    sentencepiece = pytest.importorskip("sentencepiece")
    data = train(TEXT, **MODELS[name])
    tokenizer, oracle = read(data), sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces, _, spec, charsmap = read_model(data)
    normalizer = SpmNormalizer(
        charsmap, [text for text, _, kind in pieces if kind == USER_DEFINED],
        spec.get("add_dummy_prefix", True), spec.get("remove_extra_whitespaces", True))
    texts = HARD + random_texts(data, 4000)
    for text in texts:
        assert normalizer.apply(text) == oracle.normalize(text), ascii(text)
    if name == "byte_fallback":
        texts = [text for text in texts if not BYTE_TEXT.search(text)]
    assert_sentencepiece_ids(data, tokenizer, texts, ties=3 * (name != "byte_fallback"))


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [
    ("identity", 500), ("identity", 8000), ("nmt_nfkc", 2000), ("nmt_nfkc_cf", 8000), ("symbols", 4000),
    ("spaces kept", 2000), ("no prefix", 4000), ("byte_fallback", 8000)])
def test_ids_of_glue_with_every_kind_of_model(read, name, size):
    """Oracle: SentencePiece on the same columns and on the lines as they are, tabs included."""
    pytest.importorskip("sentencepiece")
    lines, columns = glue_texts()
    data = train([text for text in columns if len(text) > 20], **{**MODELS[name], "vocab_size": size})
    assert_sentencepiece_ids(data, read(data), lines + columns, ties=200)


def test_long_texts(read):
    """Oracle: SentencePiece. Up to a million characters are normalised, and in linear time."""
    data, n = SMALL.read_bytes(), 10 ** 5
    texts = ["word" * n, "e\u0301" * n, "\u0301" * n, " " * n * 10, "a\n" * n, "\0" * n, "\U0001f600" * n]
    start = time.perf_counter()
    assert_sentencepiece_ids(data, read(data), texts)
    assert time.perf_counter() - start < 60


def test_equal_sums_may_break_differently(read):
    """The first of the two exceptions, exactly: float32 sums give SentencePiece's ids, float64 sums ours.

    Oracle: viterbi() above. "9" + "99" and "99" + "9" have equal sums: in float64 "99" comes last.
    """
    data = model([("\u2581", -3.7), ("9", -6.1), ("99", -8.3), ("a", -4.7)])
    pieces, tokenizer = read_model(data)[0], read(data)
    texts = ["a" * m + "9" * n for m in range(40) for n in range(12)]
    normalised = ["\u2581" * bool(text) + text for text in texts]
    ours = ids_of(tokenizer, texts)
    assert ours == [viterbi(pieces, text, float32=False) for text in normalised]
    assert tokenizer.encode("999", add_special_tokens=False).ids == [4, 5, 6]
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data).encode(texts)
    assert theirs == [viterbi(pieces, text, float32=True) for text in normalised]
    assert theirs != ours


def test_text_that_spells_a_byte(read):
    """It is text like any other; the second exception, exactly: where one of its characters is no piece.

    Oracle: SentencePiece, which takes it as text in any model.
    """
    pytest.importorskip("sentencepiece")
    bytes_ = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    texts = [*HARD, "<0x4>", "<0xab>", "0x41>", "b\u00e9b", "<0x41"]
    spelt = ["<0x41>", "b<0x41>b", "<0x00>", "<0xFF>", "<0x41><0x42>", "\u4e2d<0xE4>"]
    data = model([("\u2581", -2.0), ("b", -3.0), *bytes_], trainer=field(35, 1))
    tokenizer = read(data)
    assert_sentencepiece_ids(data, tokenizer, texts)
    assert tokenizer.encode("b<0x41>", add_special_tokens=False).ids == [4, 5, 6 + 0x41]
    known = [(char, -20.0) for char in "<0123456789xABCDEF>"]
    data = model([("\u2581", -2.0), ("b", -3.0), *known, *bytes_], trainer=field(35, 1))
    assert_sentencepiece_ids(data, read(data), texts + spelt)
    data = model([("\u2581", -2.0), ("b", -3.0)])
    assert_sentencepiece_ids(data, read(data), spelt)


def test_scores_of_unknown_unused_and_special_pieces(read):
    """Oracle: by hand, and the library. An unknown character costs the lowest score of a normal piece - 10,
    -35 here, and a run of them is one id; unused and special pieces match no text."""
    data = model([("\u2581", -1.0), ("xy", -25.0), ("z", -14.0), ("yz", -1.0), ("q", -20.0), ("r", -20.0),
                  ("qr", -1.0, UNUSED), ("y", -5.0)])
    tokenizer = read(data)
    texts = {"xy": [4, 5],  # -25, against -35 for an unknown x and -5 for y
             "xyz": [4, 3, 7],  # -35 for an unknown x and -1 for yz, against -25 for xy and -14 for z
             "xxyz": [4, 3, 7], "axa": [4, 3], "aya": [4, 3, 11, 3], "qr": [4, 8, 9], "[CLS]": [4, 3]}
    for text, ids in texts.items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    assert_sentencepiece_ids(data, tokenizer, list(texts))


def test_scores_of_user_defined_pieces(read):
    """Oracle: SentencePiece's 0.1 * (UTF-8 bytes - 1), by hand and the library's."""
    data = model([("\u2581", -1.0), ("ab", 0.0, USER_DEFINED), ("\u00e9", 0.0, USER_DEFINED), ("abab", 0.15),
                  ("abc", 0.05), ("c", -0.01), ("\u00e9c", 0.1)])
    tokenizer = read(data)
    for text, ids in {"abab": [4, 5, 5], "abc": [4, 5, 9], "\u00e9c": [4, 10], "ab\u00e9": [4, 5, 6]}.items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    assert_sentencepiece_ids(data, tokenizer, ["abab", "abc", "\u00e9c", "ab\u00e9", "ab\u00e9cababc"])


# ---- the tokenizer around them -------------------------------------------------------------------

def test_special_tokens_and_pairs():
    """Oracle: DeBERTaV3's layout, [CLS] A [SEP] and [CLS] A [SEP] B [SEP]; [MASK] follows the 400 pieces."""
    tokenizer = read_spm(SMALL)
    names = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": 400}
    for name, number in names.items():
        assert tokenizer.token_to_id(name) == number and tokenizer.id_to_token(number) == name
    a, b = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("A man", "a dog is running"))
    single, pair = tokenizer.encode("A man"), tokenizer.encode("A man", "a dog is running")
    assert single.ids == [1, *a, 2] and single.type_ids == [0] * len(single)
    assert single.tokens[0] == "[CLS]" and single.tokens[-1] == "[SEP]"
    assert pair.ids == [1, *a, 2, *b, 2]
    assert pair.type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert tokenizer.encode("").ids == [1, 2] and tokenizer.encode("", "").ids == [1, 2, 2]
    assert tokenizer.padding is None and tokenizer.truncation is None


def test_mask_of_the_file_is_used(read):
    """Oracle: by hand; a model that has its own [MASK] piece keeps its id."""
    for kind in (CONTROL, USER_DEFINED):
        tokenizer = read(model([("[MASK]", 0.0, kind), ("\u2581", -1.0)]))
        assert tokenizer.token_to_id("[MASK]") == 4 and tokenizer.id_to_token(4) == "[MASK]"


def test_every_way_to_encode_normalises():
    """Oracle: encode() of one text; and that text's SentencePiece ids in spm_small.json."""
    tokenizer, text = read_spm(SMALL), " \ufb01ne  d\u00e9j\u00e0 \u2026"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode("fine d\u00e9j\u00e0 ...", add_special_tokens=False).ids
    pair = [1, *ids, 2, *ids, 2]
    for found in (tokenizer.encode(text, text), tokenizer.encode(text, pair=text),
                  tokenizer.encode(sequence=text, pair=text), tokenizer.encode_batch([(text, text)])[0],
                  tokenizer.encode_batch(input=[[text, text]])[0],
                  tokenizer.encode_batch_fast(((text, text), text))[0],
                  asyncio.run(in_the_background(tokenizer, [(text, text)]))[0]):
        assert found.ids == pair
    words = ["\ufb01ne", "d\u00e9j\u00e0", "\u2026"]
    for given in (tokenizer.encode(words, is_pretokenized=True, add_special_tokens=False),
                  tokenizer.encode_batch([words], is_pretokenized=True, add_special_tokens=False)[0]):
        assert given.ids == ids
    with pytest.raises(TypeError):
        tokenizer.encode(7)


def test_no_copy_that_would_not_normalise(tmp_path):
    """Oracle: the docstring of read_spm(): it cannot be saved or pickled."""
    tokenizer = read_spm(SMALL)
    for copy_of in (copy.copy, copy.deepcopy, pickle.dumps, tokenizers.Tokenizer.to_str,
                    lambda one: one.save(str(tmp_path / "tokenizer.json"))):
        with pytest.raises(Exception, match="cannot be serialized"):
            copy_of(tokenizer)
    assert not list(tmp_path.iterdir())
    assert tokenizer.decode(tokenizer.encode(" The \ufb01rst  language model").ids) == "The first language model"


async def in_the_background(tokenizer, texts):
    return await tokenizer.async_encode_batch(texts)


# ---- the real file of DeBERTaV3 ------------------------------------------------------------------

@pytest.fixture(scope="module")
def real():
    """(the file's bytes, its tokenizer)"""
    if not REAL.is_file():
        pytest.skip("no spm.model of DeBERTaV3")
    return REAL.read_bytes(), read_spm(REAL)


@pytest.mark.ci
def test_ids_of_glue_with_the_real_file(real):
    """Oracle: SentencePiece, on every line and every column of the GLUE files. One tie of sums remains."""
    lines, columns = glue_texts()
    texts = list(dict.fromkeys(lines + columns))
    assert len(texts) > 98000
    assert assert_sentencepiece_ids(*real, texts, ties=1) == ["2.33333333333333"]


@pytest.mark.ci
def test_hard_strings_with_the_real_file(real):
    """Oracle: SentencePiece. The ties that remain are in 50 times the letter a."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "<0x41>", "<0xE2>", "\u2581", "<unk>", "<s>"]
    spelt = [around.replace("*", name) for name in names for around in AROUND]
    ties = assert_sentencepiece_ids(*real, HARD + spelt + random_texts(real[0], 4000), ties=30)
    assert all("a" * 50 in text for text in ties), ties


def test_special_tokens_of_the_real_file(real):
    """Oracle: transformers' ids of them; config.json's 128,100 rows hold all of them."""
    tokenizer = real[1]
    special = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": 128000}
    assert {name: tokenizer.token_to_id(name) for name in special} == special
    assert len(read_model(real[0])[0]) == 128000 == max(tokenizer.get_vocab().values()) <= 128100 - 1
    for name in special:  # in a text they are text
        assert not {*special.values()} & {*tokenizer.encode(f"a {name} b{name}").ids[1:-1]}
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DebertaV2Tokenizer.from_pretrained(REAL.parent)
    assert dict(zip(special, theirs.convert_tokens_to_ids(list(special)))) == special
    text = "She said: it is a test of 1,000 words."
    assert tokenizer.encode(text, text).ids == theirs(text, text)["input_ids"]
    assert tokenizer.encode(text, text).type_ids == theirs(text, text)["token_type_ids"]


@pytest.mark.slow
def test_speed(real):
    """As many pairs as MNLI has, of GLUE's sentences, are encoded in a minute of two cores."""
    texts = [text for text in glue_texts()[1] if 20 < len(text) < 200]
    pairs = [(texts[n % len(texts)], texts[n * 7 % len(texts)][:60]) for n in range(392702)]
    start = time.process_time()  # of all threads: what else runs there does not count
    tasks.encode(real[1], glue.Split(pairs, None), 128)
    assert time.process_time() - start < 2 * 60


# ---- the charsmap --------------------------------------------------------------------------------

def test_charsmap_holds_the_rules_it_was_made_of():
    """Oracle: the table that make_spm.py gave to SentencePiece's trainer, which leaves out a rule only where
    others do the same."""
    charsmap = read_model(SMALL.read_bytes())[3]
    rules = rules_of(charsmap)
    assert rules.items() <= RULES.items() and len(rules) >= len(RULES) - 3
    normalizer = SpmNormalizer(charsmap, add_dummy_prefix=False, remove_extra_whitespaces=False)
    for text, replacement in RULES.items():
        assert normalizer.apply(text) == replacement.replace(" ", "\u2581"), ascii(text)


def test_normaliser_is_longest_match_for_any_rules():
    """Oracle: normalizer.cc's loop, character by character, on random rules, symbols and texts."""
    pick = random.Random(0)

    def some(longest):
        return "".join(pick.choices("ab \n\u0301\u2581\U0001f600", k=pick.randint(1, longest)))

    def by_the_book(text, rules, symbols, prefix, squeeze):
        parts, before = [], squeeze  # before: did the text end with a space that swallows the next?
        while text:
            keys = [key for key in symbols if text.startswith(key)] or [
                key for key in rules if text.startswith(key)] or [text[0]]
            key = max(keys, key=len)
            part = key if key in symbols else rules.get(key, key)
            part = part.lstrip(" ") if before else part
            before = squeeze and (part.endswith(" ") if part else before)
            parts, text = parts + [part], text[len(key):]
        out = ("\u2581" if prefix else "") + "".join(parts).replace(" ", "\u2581")
        return out.rstrip("\u2581") if squeeze else out

    for _ in range(1000):
        rules = {some(3): pick.choice(["", " ", "x", " y", "z ", "\u2581"]) for _ in range(pick.randrange(5))}
        symbols = {some(3).replace(" ", "a") for _ in range(pick.randrange(3))}
        prefix, squeeze = pick.random() < 0.5, pick.random() < 0.5
        normalizer = SpmNormalizer(read_charsmap(charsmap_of(rules)), symbols, prefix, squeeze)
        assert normalizer.apply("") == ""
        for text in (some(15) for _ in range(5)):
            assert normalizer.apply(text) == by_the_book(text, rules, symbols, prefix, squeeze), (text, rules)


# ---- files that cannot be read -------------------------------------------------------------------

def refuses(read, data, *words):
    """read(data) is one ValueError with the file's name, these words, and advice."""
    with pytest.raises(ValueError) as caught:
        read(data)
    assert type(caught.value) is ValueError
    folder, name, message = str(caught.value).partition("spm.model")
    assert name and all(word in message for word in words), message
    assert "download it again" in message or "tokenizer.json" in message


def test_truncated_files(read):
    """A file cut anywhere is refused, and the message says where it ends."""
    data = SMALL.read_bytes()
    for size in {*range(0, 200), *range(0, len(data), 11), *range(len(data) - 300, len(data))}:
        refuses(read, data[:size], f"truncated at byte {size})", "download it again")


def test_files_of_another_format(read):
    """Oracle: by hand; what a failed download leaves behind, and random bytes."""
    for data in (b"<!DOCTYPE html><html><body>Not found</body></html>", b"version https://git-lfs", b"{}",
                 b"PK\3\4" + bytes(100), b"\x1f\x8b\x08" + bytes(100), bytes(999), b"\xff" * 999, b"\n" * 99,
                 *(random.Random(n).randbytes(n % 100) for n in range(1000))):
        refuses(read, data, "download it again")


@pytest.mark.ci
def test_damaged_bytes(read):
    """Flipped bytes give a ValueError, or a tokenizer that works (no format notices a changed letter)."""
    data, pick, refused = SMALL.read_bytes(), random.Random(0), 0
    begin = data.index(read_model(data)[2]["precompiled_charsmap"])
    for n in range(1500):
        damaged = bytearray(data)
        for _ in range(pick.choice([1, 1, 3, 30])):  # every second time in the charsmap
            damaged[pick.randrange(begin * (n % 2), len(data))] = pick.randrange(256)
        try:
            read(bytes(damaged)).encode("The caf\u00e9 a\u0302\u0301 \ufb01 \0 99999 [CLS]")
        except ValueError as error:
            refused += 1
            assert "spm.model" in str(error)
    assert refused > 500


@pytest.mark.parametrize("blob", [
    b"\0", charsmap(KEY_A)[:-1], charsmap(KEY_A, b""), charsmap(KEY_A, b"x"), charsmap(KEY_A)[:99],
    *(struct.pack("<I", size) + bytes(100) for size in (0, 6, 100, 104, 2 ** 31, 2 ** 32 - 1)),
    charsmap({**KEY_A, 512: LEAF | 2}), charsmap({**KEY_A, 512: LEAF | 7}),  # a leaf beyond the replacements
    charsmap({**KEY_A, A: 97 | HAS_LEAF | 1024 << 10}),  # a base beyond the units
    charsmap({**KEY_A, 0: HAS_LEAF | 512 << 10, 7: 1 << 9 | 4 << 10}),  # the same with the shifted offset
    charsmap({0: LEAF | HAS_LEAF}, bytes(400))])  # the root is a leaf, whose base would be out of range
def test_damaged_charsmaps(read, blob):
    """Sizes that do not fit, leaves and bases out of range: refused."""
    refuses(read, model([("a", -1.0)], normalizer=field(2, blob)), "charsmap", "download it again")


@pytest.mark.parametrize("blob", [
    charsmap({**KEY_A, A: 97 | 97 << 10}),  # "a" is its own child
    charsmap({0: 256 << 10, **{256 ^ byte: byte | byte << 10 for byte in range(1, 256)}}),  # all of all
    charsmap({0: 256 << 10, **{256 * level ^ byte: byte | (256 * level ^ byte ^ 256 * (level + 1)) << 10
                               for level in range(1, 9) for byte in range(1, 256)}, 2559: 0})])  # 255^8 paths
def test_tries_that_no_builder_makes(read, blob):
    """Oracle: SentencePiece, which walks along loops as long as the text goes; no file takes for ever."""
    start, data = time.perf_counter(), model([("a", -1.0), ("\u2581", -2.0)], normalizer=field(2, blob))
    tokenizer = read(data)
    assert_sentencepiece_ids(data, tokenizer, [*HARD, "a" * 300])
    tokenizer.encode("a" * 20000)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("data, words", [
    (model([("a", float("nan"))]), "without score"), (model([("a", float("inf"))]), "without score"),
    (model([("", -1.0)]), "without text"), (model([("a", -1.0), ("a", -2.0)]), "twice"),
    (model([]), "wrong type"), (model([("a", -1.0), ("b", -1.0, UNKNOWN)]), "wrong type"),
    (model([("a", -1.0, 9)]), "wrong type"), (model([("a", -1.0), ("<0x00>", 0.0, BYTE)]), "wrong type"),
    (model([("a", -1.0), ("<0x00>", 0.0, BYTE)], trainer=field(35, 1)), "wrong type"),
    (field(1, 7), "pieces with wire type 0"), (field(1, field(2, "x")), "score with wire type 2"),
    (field(1, field(1, b"\xff")), "utf-8"), (b"\x0b" + model([("a", -1.0)]), "no field at byte 0"),
    (b"\x80" * 20, "endless varint"),
    (model([("a", -1.0)], normalizer=field(2, charsmap(KEY_A, b"\xff\0"))), "utf-8"),
    (model([("a", -1.0)])[:-4], "truncated"), (model([("a", -1.0)])[:-2], "truncated"),
    (model([("a", -1.0)])[:-4] + field(3, b""), "truncated")])
def test_models_with_damaged_pieces(read, data, words):
    """Oracle: by hand, after model_interface.cc and unigram_model.cc."""
    refuses(read, data, words, "download it again")


@pytest.mark.parametrize("data, words", [
    *((model([("a", -1.0)], trainer=field(3, kind)), f"{kind}, not UNIGRAM") for kind in (2, 3, 4, 77)),
    (model([("a", -1.0)], trainer=field(24, 1)), "treat_whitespace_as_suffix"),
    (model([("a", -1.0)], normalizer=field(5, 0)), "escape_whitespaces"),
    (model([("a", -1.0)]).replace(b"[CLS]", b"<cls>").replace(b"[SEP]", b"</s>!"), "no [CLS] [SEP]"),
    (model([("a", -1.0)], normalizer=field(2, charsmap(KEY_A, b"x  y\0"))), "two spaces")])
def test_models_of_another_kind(read, data, words):
    """Sound models that would get other ids than SentencePiece's are refused by name."""
    refuses(read, data, words, "tokenizer.json")


def test_fields_we_do_not_know_are_skipped(read):
    """Oracle: the protobuf rule that unknown fields of any wire type are skipped."""
    unknown = field(5, b"") + field(9, 1) + field(300, "x") + field(8, 1.0) + varint(301 << 3 | 1) + bytes(8)
    data = SMALL.read_bytes()
    assert ids_of(read(unknown + data + unknown), HARD) == ids_of(read(data), HARD)
