"""A checkpoint's tokenizer, with the ids that transformers gives for the same files.

One file defines it, tokenizer.json, spm.model (DeBERTa), vocab.txt (BERT) or vocab.json with
merges.txt (RoBERTa). tokenizer_config.json, special_tokens_map.json and added_tokens.json may
change it: an option that changes ids is obeyed, or is an error that names the file and the option.

In this file: files, {file name: path} · path, of the defining file · options, {name: value} of the
files beside it · where, {name: path} of the file that gives an option, else the defining one.
"""
import base64
import json
from collections import defaultdict
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from formats import spm
from formats.disk import MEGABYTE, one_line, read_bytes, read_object
from formats.spm import LONGEST_PIECE

DEFINING = ("tokenizer.json", "spm.model", "vocab.txt", "vocab.json")   # the first one counts
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


class Kind(NamedTuple):
    """What a class of transformers makes of its options."""
    parts: dict               # part of a Tokenizer → the class that it has to be of
    options: dict             # option → (part, its attribute, the value where it is absent)
    only: dict                # option → the values that are implemented, first of an absent one
    tokens: dict              # special token → its text where the option is absent
    pair: tuple               # (what, type id) of a pair's tokens; the first three are one text's


BERT_TOKENS = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]",
               "cls_token": "[CLS]", "mask_token": "[MASK]"}
BERT_PAIR = (("cls_token", 0), ("A", 0), ("sep_token", 0), ("B", 1), ("sep_token", 1))
KINDS = {
    "BertTokenizer": Kind(
        parts={"model": "WordPiece", "normalizer": "BertNormalizer",
               "pre_tokenizer": "BertPreTokenizer"},
        options={"do_lower_case": ("normalizer", "lowercase", True),
                 "tokenize_chinese_chars": ("normalizer", "handle_chinese_chars", True),
                 "strip_accents": ("normalizer", "strip_accents", None),
                 "clean_text": ("normalizer", "clean_text", True),
                 "unk_token": ("model", "unk_token", "[UNK]"),
                 "wordpieces_prefix": ("model", "continuing_subword_prefix", "##"),
                 "max_input_chars_per_word": ("model", "max_input_chars_per_word", 100)},
        only={"clean_text": [True, None], "wordpieces_prefix": ["##"],
              "max_input_chars_per_word": [100]},
        tokens=BERT_TOKENS, pair=BERT_PAIR),
    "RobertaTokenizer": Kind(
        parts={"model": "BPE", "normalizer": "NoneType", "pre_tokenizer": "ByteLevel"},
        options={"add_prefix_space": ("pre_tokenizer", "add_prefix_space", False),
                 "use_regex": ("pre_tokenizer", "use_regex", True)},
        only={"use_regex": [True]},
        tokens={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "sep_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>",
                "mask_token": "<mask>"},
        pair=(("cls_token", 0), ("A", 0), ("sep_token", 0), ("sep_token", 0), ("B", 0),
              ("sep_token", 0))),
    "DebertaV2Tokenizer": Kind(
        parts={"model": "Unigram"}, options={},
        only={"do_lower_case": [False, None], "add_prefix_space": [True, None]}
        | {name: [text] for name, text in BERT_TOKENS.items()},
        tokens={"bos_token": "[CLS]", "eos_token": "[SEP]"} | BERT_TOKENS, pair=BERT_PAIR)}
# Classes that take a tokenizer.json as it is, whatever their options say; without "Fast".
AS_IT_IS = ["PreTrainedTokenizer", "TokenizersBackend"]
ONLY = {  # of any class
    "do_basic_tokenize": [True, None], "never_split": [None, []], "split_by_punct": [False, None],
    "truncation_side": ["right", None], "vocab_type": ["spm", None],
    "sp_model_kwargs": [{}, None], "auto_map": [None, {}],
    "fast_tokenizer_files": [None, [], ["tokenizer.json"]]}


def refusal(where, option, value, why):
    """The ValueError that names file, option and value."""
    return ValueError(f"{where[option]}: {option} = {value!r} {why}")


# --- reading ------------------------------------------------------------------------------------

def read_tokenizer(files):
    """A checkpoint's files → tokenizers.Tokenizer without padding or truncation.

    ValueError that names file and option for what is damaged, contradictory or not implemented.
    """
    path = next(files[name] for name in DEFINING if name in files)
    options, where, added = read_options(files, path)
    tokenizer = read_definition(files, path)
    tokenizer.no_padding()                         # either can be baked into a tokenizer.json
    tokenizer.no_truncation()
    kind = kind_of(tokenizer, options, where, path)
    obey(tokenizer, kind, options, where)
    check_model(tokenizer, options, where, path)
    new = add_tokens(tokenizer, kind, options, where, added, path)
    if new or "split_special_tokens" in options:   # else spm.model's, where their text stays text
        split = options.get("split_special_tokens", False)
        set_or_refuse(tokenizer, "encode_special_tokens", split, where, "split_special_tokens")
        if path.name == "spm.model":
            spm.normalize_between(tokenizer)
    set_template(tokenizer, kind, options, where, path)
    return tokenizer


def read_options(files, path):
    """(options, where, {id: AddedToken}) of the files beside the one at path.

    As transformers: tokenizer_config.json alone if it lists the added tokens, else all three.
    """
    options = {}
    where = defaultdict(lambda: path)
    content = {name: read_object(files[name]) for name in BESIDE if name in files}

    def take(name, wanted):
        options.update(wanted)
        where.update(dict.fromkeys(wanted, files.get(name)))

    config = content.get("config.json", {})
    wanted = ("tokenizer_class", "vocab_size")
    take("config.json", {name: config[name] for name in wanted if config.get(name)})
    take("tokenizer_config.json", content.get("tokenizer_config.json", {}))
    listed = options.get("added_tokens_decoder")
    if listed is None:
        # Of this list transformers 5 forgets in this place that its tokens are special.
        forgotten = {"additional_special_tokens": options.get("additional_special_tokens")}
        take("special_tokens_map.json", content.get("special_tokens_map.json", {}))
        special = {token.content for token in named_tokens(None, options | forgotten, where)}
        listed = {}
        for text, number in content.get("added_tokens.json", {}).items():
            listed[str(number)] = {"content": text, "special": text in special,
                                   "normalized": text not in special}
        where["added_tokens_decoder"] = files.get("added_tokens.json")
    if not isinstance(listed, dict) or not all(map(str.isdecimal, listed)):
        raise refusal(where, "added_tokens_decoder", listed, "does not give ids and tokens")
    added = {int(number): as_token(token, where, "added_tokens_decoder")
             for number, token in listed.items()}
    return options, where, added


def as_token(value, where, option):
    """What JSON says of a token, its text or an object, as an AddedToken; a text is special."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    fields = {"content", "lstrip", "rstrip", "single_word", "normalized", "special", "__type"}
    try:
        if value.keys() <= fields:                 # "__type" is Python's, not the token's
            flags = {name: value[name] for name in value if name not in ("content", "__type")}
            return AddedToken(value["content"], **flags)
    except (AttributeError, KeyError, TypeError):
        pass
    raise refusal(where, option, value, "does not describe a token")


def read_definition(files, path):
    """The Tokenizer of the defining file; of a vocabulary without a template."""
    if path.name == "spm.model":
        return spm.read_spm(path)
    if path.name == "vocab.json" and "merges.txt" not in files:
        raise ValueError(f"{path} has no merges.txt beside it: put it there")
    try:
        if path.name == "tokenizer.json":
            tokenizer = read_json_tokenizer(path)
        elif path.name == "vocab.txt":
            tokenizer = Tokenizer(models.WordPiece.from_file(str(path), unk_token="[UNK]"))
            tokenizer.normalizer = normalizers.BertNormalizer()
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = decoders.WordPiece()
        else:
            tokenizer = Tokenizer(models.BPE.from_file(str(path), str(files["merges.txt"])))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:                     # Rust's PanicException, which is no Exception
        both = " (with merges.txt)" if path.name == "vocab.json" else ""
        raise ValueError(f"{path}{both} is not a tokenizer file ({one_line(e)}): get it "
                         "again") from None


def read_json_tokenizer(path):
    """tokenizer.json; an error of any kind where it is damaged, or takes more than it may."""
    content = read_bytes(path, 64 * MEGABYTE)
    parts = json.loads(content)
    if growth([parts.get("normalizer"), parts.get("pre_tokenizer")]) > 1000:
        raise ValueError("its replacements make a text more than 1000 times as long")
    pieces = parts["model"]["vocab"]
    if isinstance(pieces, list) and max(len(piece) for piece, _ in pieces) > LONGEST_PIECE:
        raise ValueError(f"a piece is longer than {LONGEST_PIECE} letters")
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_padding()                         # which may be to a billion tokens
    if tokenizer.num_special_tokens_to_add(True) > 100:
        raise ValueError("it adds more than 100 special tokens to a text")
    # A template may name a token that is not there, or repeat the text.
    if len(tokenizer.encode("a", "b").ids + tokenizer.encode("a").ids) > 100:
        raise ValueError("it makes more than 100 tokens of three letters")
    return tokenizer


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


# --- options ------------------------------------------------------------------------------------

def kind_of(tokenizer, options, where, path):
    """The Kind by whose options transformers goes, None if it takes the file as it is."""
    model = type(tokenizer.model).__name__
    fitting = {name: kind for name, kind in KINDS.items() if kind.parts["model"] == model}
    given = options.get("tokenizer_class")
    if given is None:                              # the demo's WordLevel is of none of them
        return next(iter(fitting.values()), None)
    as_it_is = AS_IT_IS if path.name == "tokenizer.json" else []
    name = str(given).removesuffix("Fast")
    if name not in fitting and name not in as_it_is:
        raise refusal(where, "tokenizer_class", given, f"is not implemented for {path.name}, only "
                      f"{', '.join([*fitting, *as_it_is])}")
    return fitting.get(name)


def obey(tokenizer, kind, options, where):
    """Set what the options say; ValueError for what is not implemented, or only the file has."""
    for option, allowed in (ONLY | (kind.only if kind else {})).items():
        value = text_of(options.get(option, allowed[0]))
        if value not in allowed:
            raise refusal(where, option, value, f"is not implemented, only {allowed[0]!r}")
    for part, expected in (kind.parts if kind else {}).items():
        found = type(getattr(tokenizer, part)).__name__
        if found != expected:
            raise refusal(where, part, found, f"where its tokenizer_class has {expected}: to have "
                          "it as it is give PreTrainedTokenizerFast in tokenizer_config.json")
    for option, (part, attribute, absent) in (kind.options if kind else {}).items():
        there = getattr(getattr(tokenizer, part), attribute)
        wanted = text_of(options.get(option, absent))
        if there != wanted and option not in options:
            raise refusal(where, attribute, there, f"without {option} in tokenizer_config.json, "
                          f"which means {absent!r} there: write one or the other into it")
        if there != wanted:
            set_or_refuse(getattr(tokenizer, part), attribute, wanted, where, option)


def text_of(value):
    """The text of a token that may be an object; what is none stays."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def set_or_refuse(thing, attribute, value, where, option):
    """Set an attribute; ValueError that names the option if it does not take the value."""
    try:
        setattr(thing, attribute, value)
    except TypeError:
        raise refusal(where, option, value, "is none of its values") from None


def check_model(tokenizer, options, where, path):
    """ValueError for a vocabulary that is cut, and for a model that gives no ids, or others."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    try:
        tokenizer.encode("a \U00013000")             # a hieroglyph, which no vocabulary has
    except Exception as e:                         # the library raises no other
        raise refusal(where, "unk_token", unknown, f"is not in the vocabulary ({one_line(e)}): get "
                      "it again") from None
    if getattr(tokenizer.model, "dropout", None):
        raise refusal(where, "dropout", tokenizer.model.dropout, "makes ids random: remove it")
    entries = tokenizer.get_vocab_size()
    rows = options.get("vocab_size")
    if path.name == "vocab.txt" and isinstance(rows, int) and entries < rows - 1024:   # padded rows
        raise refusal(where, "vocab_size", rows, f"where {path} has {entries} words: one of them "
                      "is cut or of another checkpoint: get both again")
    if path.name == "vocab.json":
        merges = len(path.with_name("merges.txt").read_bytes().splitlines())
        if merges < entries - 256 - 128:           # bytes and special tokens are made by none
            raise ValueError(f"{path} has {entries} entries and merges.txt {merges} lines: one of "
                             "them is cut or of another checkpoint: get both again")


def add_tokens(tokenizer, kind, options, where, added, path):
    """Add the tokens that the options name; returns how many were not in the file.

    Text that spells one is that token. ValueError if one would not have the id that is listed.
    """
    before = tokenizer.get_added_tokens_decoder()
    if kind and "added_tokens_decoder" in options:
        unlisted = [token.content for number, token in before.items() if number not in added]
        if unlisted:
            raise refusal(where, "added_tokens_decoder", sorted(added),
                          f"lacks {unlisted[0]!r} of {path.name}: complete it")
    named = {token.content: token for token in named_tokens(kind, options, where)}
    known = {token.content for token in before.values()}
    tokens = []
    for number in sorted(added):
        if path.name != "spm.model":               # whose own tokens are as they have to be
            tokens.append(added[number])
            known.add(added[number].content)
    tokens += [token for text, token in named.items() if text not in known]
    tokenizer.add_tokens(tokens)
    for number, token in added.items():
        found = tokenizer.token_to_id(token.content)
        if found != number:
            raise ValueError(f"{where['added_tokens_decoder']}: {token.content} = {number} is the "
                             f"token's id here, and {found} by {path.name}: get the files again, "
                             "or a checkpoint with tokenizer.json")
    return len(tokenizer.get_added_tokens_decoder()) - len(before)


def named_tokens(kind, options, where):
    """The AddedTokens of options like cls_token, and of the lists of further ones."""
    options = (kind.tokens if kind else {}) | options
    named = []
    for option, value in options.items():
        if option.endswith("_token") and isinstance(value, (str, dict)):
            named.append(as_token(value, where, option))
            named[-1].special = True
    for option in ("additional_special_tokens", "extra_special_tokens"):
        listed = options.get(option) or []
        if isinstance(listed, dict):
            listed = list(listed.values())
        if not isinstance(listed, list):
            raise refusal(where, option, listed, "is no list of tokens")
        named += [as_token(value, where, option) for value in listed]
    return named


def set_template(tokenizer, kind, options, where, path):
    """ValueError unless a file puts special tokens around texts, in the way of its kind.

    A vocabulary alone does not say how: its kind does.
    """
    own = around(tokenizer)
    is_file = path.name == "tokenizer.json"
    if is_file and not all(map(tokenizer.num_special_tokens_to_add, (False, True))):
        raise refusal(where, "post_processor", tokenizer.post_processor, "adds no special tokens, "
                      "and a classifier reads the first one: get a complete file")
    if kind is None:
        return
    texts = {}
    for name in ("cls_token", "sep_token"):
        texts[name] = str(text_of(options.get(name, kind.tokens[name])))
        if path.name.startswith("vocab") and tokenizer.model.token_to_id(texts[name]) is None:
            raise refusal(where, name, texts[name], "is not in the vocabulary: get it again")
    pieces = [f"{texts.get(what, f'${what}')}:{type_id}" for what, type_id in kind.pair]
    ids = [(text, tokenizer.token_to_id(text)) for text in set(texts.values())]
    tokenizer.post_processor = processors.TemplateProcessing(pieces[:3], pieces, ids)
    if is_file and around(tokenizer) != own:
        pair = tokenizer.encode("a", "b").tokens
        raise refusal(where, "post_processor", own[1][0], "for two texts a and b is not what its "
                      f"tokenizer_class makes of cls_token and sep_token, {pair} with type ids "
                      f"{[type_id for _, type_id in kind.pair]}: correct one of them")


def around(tokenizer):
    """The tokens and type ids of one text and of a pair."""
    made = (tokenizer.encode("a"), tokenizer.encode("a", "b"))
    return [(encoding.tokens, encoding.type_ids) for encoding in made]


# --- writing ------------------------------------------------------------------------------------

def to_write(files):
    """{file name: bytes} with which transformers gives the ids of read_tokenizer(files).

    {} for a checkpoint without a tokenizer. spm.model has no form in JSON: it is copied.
    """
    if not files.keys() & set(DEFINING):
        return {}
    tokenizer = read_tokenizer(files)
    options, _, _ = read_options(files, None)
    config = {"split_special_tokens": tokenizer.encode_special_tokens}
    if "model_max_length" in options:
        config["model_max_length"] = options["model_max_length"]
    if "tokenizer.json" not in files and "spm.model" in files:
        names = ("spm.model", "special_tokens_map.json", "added_tokens.json")
        written = {name: files[name].read_bytes() for name in names if name in files}
        options.pop("name_or_path", None)          # a place on this machine
        config = options | config | {"tokenizer_class": "DebertaV2Tokenizer"}
    else:
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        written = {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
        config |= token_names(options, special)
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        if hasattr(tokenizer.pre_tokenizer, "add_prefix_space"):   # transformers 4 asks for it
            config["add_prefix_space"] = tokenizer.pre_tokenizer.add_prefix_space
    text = json.dumps(config, indent=2, sort_keys=True)
    return written | {"tokenizer_config.json": text.encode()}


def token_names(options, special):
    """{option: text} of the special tokens that a tokenizer has, by its options or their kind."""
    for kind in KINDS.values():
        texts = {name: text_of(options.get(name, text)) for name, text in kind.tokens.items()}
        if texts["cls_token"] in special:
            return {name: text for name, text in texts.items() if text in special}
    return {}
