"""A checkpoint's tokenizer, with the ids that transformers gives for the same files.

One file defines it, tokenizer.json, spm.model (DeBERTa), vocab.txt (BERT) or vocab.json with
merges.txt (RoBERTa). tokenizer_config.json, special_tokens_map.json and added_tokens.json may
change it: an option that changes ids is obeyed, or is an error that names the file and the option.
"""
import contextlib
import json
from typing import NamedTuple

from tokenizers import AddedToken, processors

from formats.disk import one_line, read_object
from formats.vocabulary import DEFINING, read_definition

CONFIG = "tokenizer_config.json"
BESIDE = (CONFIG, "special_tokens_map.json", "added_tokens.json", "config.json")
LISTS = ("additional_special_tokens", "extra_special_tokens")    # of further tokens


class Kind(NamedTuple):
    """What a class of transformers makes of its options."""
    options: dict             # option → (its place in a Tokenizer, *its values), as in COMMON
    parts: dict = {}          # part of a Tokenizer → the class that it has to be of
    tokens: dict = {}         # special token → its text where the option is absent
    pair: str = ""            # template of two texts with type ids; its begin is that of one text


# Of an option's values the first is that of an absent one; a type stands for all of its values.
COMMON = {
    "do_basic_tokenize": (None, True, None), "never_split": (None, None, []),
    "split_by_punct": (None, False, None), "split_special_tokens": (None, False, True),
    "truncation_side": (None, "right", None), "vocab_type": (None, "spm", None),
    "sp_model_kwargs": (None, {}, None), "auto_map": (None, None, {}),
    "fast_tokenizer_files": (None, None, [], ["tokenizer.json"])}
BERT_TOKENS = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]",
               "cls_token": "[CLS]", "mask_token": "[MASK]"}
BERT_PAIR = "{cls_token} $A {sep_token} $B:1 {sep_token}:1"
AS_IT_IS = Kind(COMMON)       # takes a tokenizer.json as it is, whatever the options say
KINDS = {                     # names without "Fast"
    "BertTokenizer": Kind(
        {**COMMON, "do_lower_case": ("normalizer.lowercase", True, False),
         "tokenize_chinese_chars": ("normalizer.handle_chinese_chars", True, False),
         "strip_accents": ("normalizer.strip_accents", None, True, False),
         "clean_text": ("normalizer.clean_text", True),
         "unk_token": ("model.unk_token", "[UNK]", str),
         "wordpieces_prefix": ("model.continuing_subword_prefix", "##"),
         "max_input_chars_per_word": ("model.max_input_chars_per_word", 100)},
        {"model": "WordPiece", "normalizer": "BertNormalizer",
         "pre_tokenizer": "BertPreTokenizer"},
        BERT_TOKENS, BERT_PAIR),
    "RobertaTokenizer": Kind(
        {**COMMON, "add_prefix_space": ("pre_tokenizer.add_prefix_space", False, True),
         "use_regex": ("pre_tokenizer.use_regex", True)},
        {"model": "BPE", "normalizer": "NoneType", "pre_tokenizer": "ByteLevel"},
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
         "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"},
        "{cls_token} $A {sep_token} {sep_token} $B {sep_token}"),
    "DebertaV2Tokenizer": Kind(
        {**COMMON, "do_lower_case": (None, False, None), "add_prefix_space": (None, True, None),
         **{name: (None, text) for name, text in BERT_TOKENS.items()}},
        {"model": "Unigram"},
        {"bos_token": "[CLS]", "eos_token": "[SEP]"} | BERT_TOKENS, BERT_PAIR),
    "PreTrainedTokenizer": AS_IT_IS,
    "TokenizersBackend": AS_IT_IS}


class Options(dict):
    """{option: value} of the files beside the one that defines a tokenizer, which is at path."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.where = {}                            # option → path of the file that gives it

    def take(self, path, content):
        """Add options that a file gives."""
        self.update(content)
        self.where |= dict.fromkeys(content, path)

    def refusal(self, option, value, why):
        """The ValueError that names file, option and value."""
        return ValueError(f"{self.where.get(option, self.path)}: {option} = {value!r} {why}")


# --- reading ------------------------------------------------------------------------------------

def read_tokenizer(files):
    """A checkpoint's {file name: path} → tokenizers.Tokenizer without padding or truncation.

    ValueError that names file and option for what is damaged, contradictory or not implemented.
    """
    options, listed = read_options(files)
    tokenizer = read_definition(options.path, files)
    kind = KINDS[kind_of(tokenizer, options)]
    obey(tokenizer, kind, options)
    check_model(tokenizer, options)
    add_tokens(tokenizer, kind, options, listed)
    if options.path.name != "spm.model":           # where the text of a special token stays text
        tokenizer.encode_special_tokens = options.get("split_special_tokens", False)
    elif options.get("split_special_tokens", True) is not True:
        raise options.refusal("split_special_tokens", False, "is not implemented for spm.model")
    set_template(tokenizer, kind, options)
    return tokenizer


def read_options(files):
    """The Options, and {id: token} that is listed, of the files beside the defining one.

    As transformers: tokenizer_config.json alone if it lists the added tokens, else all three.
    """
    content = {name: read_object(files[name]) if name in files else {} for name in BESIDE}
    options = Options(next(files[name] for name in DEFINING if name in files))
    for option in ("tokenizer_class", "vocab_size"):
        if content["config.json"].get(option):
            options.take(files["config.json"], {option: content["config.json"][option]})
    options.take(files.get(CONFIG), content[CONFIG])
    listed = options.get("added_tokens_decoder")
    if listed is None:
        options.take(files.get("special_tokens_map.json"), content["special_tokens_map.json"])
        listed = {str(number): text for text, number in content["added_tokens.json"].items()}
        options.where["added_tokens_decoder"] = files.get("added_tokens.json")
    if not isinstance(listed, dict) or not all(map(str.isdecimal, listed)):
        raise options.refusal("added_tokens_decoder", listed, "does not give ids and tokens")
    return options, {int(number): token for number, token in listed.items()}


def named_tokens(kind, options):
    """[(option, token)] of options like cls_token, and of the lists of further tokens."""
    named = [(option, value) for option, value in (kind.tokens | options).items()
             if option.endswith("_token") and isinstance(value, (str, dict))]
    for option in LISTS:
        listed = options.get(option) or []
        if not isinstance(listed, (list, dict)):
            raise options.refusal(option, listed, "is no list of tokens")
        for value in listed.values() if isinstance(listed, dict) else listed:
            named.append((option, value))
    return named


def as_token(value, option, options):
    """What JSON says of a special token, its text or an object, as an AddedToken."""
    token = dict(value) if isinstance(value, dict) else {"content": value}
    token.pop("__type", None)                      # Python's, not the token's
    known = {"content", "lstrip", "rstrip", "single_word", "normalized", "special"}
    if isinstance(token.get("content"), str) and token.keys() <= known:
        with contextlib.suppress(TypeError):       # of a flag that is none
            return AddedToken(**token | {"special": True})
    raise options.refusal(option, value, "does not describe a token")


# --- options ------------------------------------------------------------------------------------

def kind_of(tokenizer, options):
    """The name in KINDS by whose options transformers goes."""
    model = type(tokenizer.model).__name__
    any_model = model if options.path.name == "tokenizer.json" else None
    fitting = {name: kind for name, kind in KINDS.items()
               if kind.parts.get("model", any_model) == model}
    given = options.get("tokenizer_class")
    name = next(iter(fitting)) if given is None else str(given).removesuffix("Fast")
    if name not in fitting:
        raise options.refusal("tokenizer_class", given, "is not implemented for "
                              f"{options.path.name}, only {', '.join(fitting)}")
    return name


def obey(tokenizer, kind, options):
    """Set what the options say; ValueError for what is not implemented, or only the file has."""
    for part, expected in kind.parts.items():
        found = type(getattr(tokenizer, part)).__name__
        if found != expected:
            raise options.refusal(part, found, f"where its tokenizer_class has {expected}: give "
                                  "PreTrainedTokenizerFast there to have it as it is")
    for option, (place, *values) in kind.options.items():
        value = text_of(options.get(option, values[0]))
        if type(value) not in values and repr(value) not in map(repr, values):   # 1 is not True
            raise options.refusal(option, value, f"is not implemented, as {values[0]!r} is")
        if place:
            name, attribute = place.split(".")
            part = getattr(tokenizer, name)
            there = getattr(part, attribute)
            if there != value and option not in options:
                raise options.refusal(attribute, there, f"without {option} in tokenizer_config"
                                      f".json, which means {value!r}: write one into it")
            setattr(part, attribute, value)


def text_of(value):
    """The text of a token that may be an object; what is none stays."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def check_model(tokenizer, options):
    """ValueError for a vocabulary that is cut, and for a model that gives no ids, or others."""
    path = options.path
    model = tokenizer.model
    try:
        tokenizer.encode("a \U00013000")           # a hieroglyph, which no vocabulary has
    except Exception as e:                         # the library raises no other
        raise options.refusal("unk_token", getattr(model, "unk_token", None), "is not in the "
                              f"vocabulary ({one_line(e)}): get it again") from None
    if getattr(model, "dropout", None):
        raise options.refusal("dropout", model.dropout, "makes ids random: remove it")
    entries = tokenizer.get_vocab_size()
    rows = options.get("vocab_size")
    cut = "one of them is cut or of another checkpoint: get both again"
    if path.name == "vocab.txt" and isinstance(rows, int) and entries < rows - 1024:   # padded rows
        raise options.refusal("vocab_size", rows, f"where {path} has {entries} words: {cut}")
    if path.name == "vocab.json":
        merges = len(path.with_name("merges.txt").read_bytes().splitlines())
        if merges < entries - 256 - 128:           # bytes and special tokens are made by none
            raise ValueError(f"{path} has {entries} entries and merges.txt {merges} lines: {cut}")


def add_tokens(tokenizer, kind, options, listed):
    """Add the special tokens of a kind, where they are missing: text that spells one is that token.

    ValueError unless all others that the options name, or list by id, are the definition's own.
    """
    name = options.path.name
    own = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    if name != "spm.model":
        for option, text in kind.tokens.items():
            value = options.get(option, text)
            if value is not None and text_of(value) not in own:
                tokenizer.add_tokens([as_token(value, option, options)])
    there = tokenizer.get_added_tokens_decoder()
    texts = [token.content for token in there.values()]
    advice = f"is not so in {name}: get a checkpoint with a tokenizer.json that has it"
    for option, value in named_tokens(kind, options):
        if text_of(value) not in texts:
            raise options.refusal(option, value, advice)
    for number, value in listed.items():
        found = there[number].__getstate__() if number in there else {}
        if not isinstance(value, dict) or name == "spm.model":     # text is none of its tokens
            value = {"content": text_of(value)}
        if not value.items() <= found.items():
            where = options.where["added_tokens_decoder"]
            raise ValueError(f"{where}: {text_of(value)} = {number} {advice}")
    lost = [text for text in own if text not in map(text_of, listed.values())]
    if lost and kind is not AS_IT_IS and "added_tokens_decoder" in options:
        raise options.refusal("added_tokens_decoder", listed,
                              f"lacks {lost[0]!r} of {name}: complete it")


def set_template(tokenizer, kind, options):
    """ValueError unless a file puts special tokens around texts, in the way of its kind.

    A vocabulary alone does not say how: its kind does.
    """
    is_file = options.path.name == "tokenizer.json"
    if is_file and not all(map(tokenizer.num_special_tokens_to_add, (False, True))):
        raise options.refusal("post_processor", tokenizer.post_processor, "adds no special tokens, "
                              "and a classifier reads the first one: get a complete file")
    if kind is AS_IT_IS:
        return
    texts = {name: text_of(options.get(name, kind.tokens[name]))
             for name in ("cls_token", "sep_token")}
    vocabulary = tokenizer.model if options.path.name.startswith("vocab") else tokenizer
    for name, text in texts.items():
        if not isinstance(text, str) or vocabulary.token_to_id(text) is None:
            raise options.refusal(name, text, "is not in the vocabulary: get it again")
    pieces = [piece.format(**texts) for piece in kind.pair.split()]
    ids = [(text, tokenizer.token_to_id(text)) for text in set(texts.values())]
    found = around(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(pieces[:3], pieces, ids)
    expected = around(tokenizer)
    if is_file and found != expected:
        raise options.refusal("post_processor", found, "for a text a, and a and b, where its "
                              f"tokenizer_class has {expected}: correct one of them")


def around(tokenizer):
    """The tokens and type ids of one text and of a pair."""
    made = tokenizer.encode_batch(["a", ("a", "b")])
    return [(encoding.tokens, encoding.type_ids) for encoding in made]


# --- writing ------------------------------------------------------------------------------------

def check_words(tokenizer, ids, not_special, name):
    """ValueError if over half of the tokens are unknown; not_special: how many to count."""
    unknown = 0
    for token in ("[UNK]", "<unk>"):
        if tokenizer.token_to_id(token) is not None:
            unknown += int((ids == tokenizer.token_to_id(token)).sum())
    share = unknown / max(1, not_special)
    if share > 0.5:
        raise ValueError(f"{share:.0%} of the tokens of {name} are unknown to the tokenizer: give "
                         "a model of the language that they are in")


def to_write(files):
    """{file name: bytes} with which transformers gives the ids of read_tokenizer(files).

    {} for a checkpoint without a tokenizer. The files are copied as they are; but of
    tokenizer_config.json there is what ids depend on, without places of a machine.
    """
    if not files.keys() & set(DEFINING):
        return {}
    tokenizer = read_tokenizer(files)
    options, _ = read_options(files)
    kind = kind_of(tokenizer, options)
    kept = [*KINDS[kind].options, *LISTS, "added_tokens_decoder", "model_max_length"]
    given = read_object(files[CONFIG]) if CONFIG in files else {}
    config = {option: value for option, value in given.items()
              if option in kept or option.endswith("_token")}
    config["tokenizer_class"] = options.get("tokenizer_class") or kind
    config["split_special_tokens"] = tokenizer.encode_special_tokens
    written = {name: path.read_bytes() for name, path in files.items() if name != "config.json"}
    return written | {CONFIG: json.dumps(config, indent=2, sort_keys=True).encode()}
