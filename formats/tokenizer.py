"""A checkpoint's tokenizer, with the ids that transformers gives for the same files.

One file defines it, tokenizer.json, spm.model (DeBERTa), vocab.txt (BERT) or vocab.json with
merges.txt (RoBERTa); tokenizer_config.json, special_tokens_map.json and added_tokens.json may change
it. An option that changes ids is obeyed, or is an error that names the file and the option.
"""
import json
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from formats import spm
from formats.disk import one_line, read_object

DEFINING = ("tokenizer.json", "spm.model", "vocab.txt", "vocab.json")   # the first one counts
BESIDE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "config.json")


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


def refusal(path, option, value, why):
    """The ValueError that names file, option and value."""
    return ValueError(f"{path}: {option} = {value!r} {why}")


# --- reading ------------------------------------------------------------------------------------

def read_tokenizer(files):
    """{file name: path} of a checkpoint's files → tokenizers.Tokenizer without padding or truncation.

    ValueError that names file and option for what is damaged, contradictory or not implemented.
    """
    path = next(files[name] for name in DEFINING if name in files)
    options, where, added = read_options(files)
    tokenizer = READERS[path.name](files)
    tokenizer.no_padding()                         # either can be baked into a tokenizer.json
    tokenizer.no_truncation()
    kind = kind_of(tokenizer, options, where, path)
    check_only(tokenizer, kind, options, where, path)
    if kind:
        obey(tokenizer, kind, options, where, path)
    new = add_tokens(tokenizer, kind, options, where, added, path)
    if new or "split_special_tokens" in options:   # else spm.model's, where their text stays text
        split = options.get("split_special_tokens", False)
        set_or_refuse(tokenizer, "encode_special_tokens", split, where, "split_special_tokens")
    set_template(tokenizer, kind, options, path)
    return tokenizer


def read_options(files):
    """({option: value}, {option: path of its file}, {id: AddedToken}) of the files beside.

    As transformers: tokenizer_config.json alone if it lists the added tokens, else all three.
    """
    options = {}
    where = {}

    def take(name, content):
        options.update(content)
        where.update(dict.fromkeys(content, files.get(name, name)))

    content = {name: read_object(files[name]) for name in BESIDE[1:] if name in files}
    if model_class := content.get("config.json", {}).get("tokenizer_class"):
        take("config.json", {"tokenizer_class": model_class})
    take("tokenizer_config.json", content.get("tokenizer_config.json", {}))
    added = {}
    if "added_tokens_decoder" in options:
        listed = options["added_tokens_decoder"]
        path = where["added_tokens_decoder"]
        pairs = listed.items() if isinstance(listed, dict) else [("", None)]
    else:
        take("special_tokens_map.json", content.get("special_tokens_map.json", {}))
        path = files.get("added_tokens.json")
        stated = dict(options)                     # of that list transformers 5 forgets this here
        if where.get("additional_special_tokens") == files.get("special_tokens_map.json"):
            stated.pop("additional_special_tokens", None)
        special = {token.content for token in named_tokens(None, stated, where)}
        pairs = []
        for text, number in content.get("added_tokens.json", {}).items():
            token = {"content": text, "special": text in special, "normalized": text not in special}
            pairs.append((str(number), token))
    for number, token in pairs:
        if not number.isdecimal() or not isinstance(token, dict):
            raise refusal(path, "an added token", {number: token}, "is not an id and a token")
        added[int(number)] = as_token(token, path, number)
    return options, where, added


def as_token(value, path, option):
    """What JSON says of a token, its text or an object, as an AddedToken; a text is special."""
    fields = {"content": value, "special": True} if isinstance(value, str) else value
    fields = {name: fields[name] for name in fields if name != "__type"}
    try:
        return AddedToken(**fields)
    except TypeError:
        raise refusal(path, option, value, "does not describe a token") from None


def read_json(files):
    """tokenizer.json as a Tokenizer; ValueError that names the file if it is not one."""
    path = files["tokenizer.json"]
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode("a", "b")                 # a template may name a token that is not there
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:                     # Rust's PanicException, which is no Exception
        raise ValueError(f"{path} is not a tokenizer file ({one_line(e)}): get it again") from None


def read_spm(files):
    """spm.model as a Tokenizer."""
    return spm.read_spm(files["spm.model"])


def read_wordpiece(files):
    """BERT's vocab.txt, a word a line, as a Tokenizer without a template."""
    path = files["vocab.txt"]
    model = from_file(models.WordPiece, path, str(path), unk_token="[UNK]")
    size = model_size(files)
    if len(path.read_bytes().splitlines()) < size - 1024:        # a model's rows may be padded
        raise ValueError(f"{path} has fewer than the {size} words of vocab_size in config.json: "
                         "it is cut, or of another checkpoint: get it again")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def model_size(files):
    """vocab_size of config.json, 0 if it does not say."""
    size = read_object(files["config.json"]).get("vocab_size") if "config.json" in files else 0
    return size if isinstance(size, int) else 0


def read_bpe(files):
    """RoBERTa's vocab.json and merges.txt as a Tokenizer without a template."""
    path = files["vocab.json"]
    if "merges.txt" not in files:
        raise ValueError(f"{path} has no merges.txt beside it: put it there")
    merges = files["merges.txt"]
    tokenizer = Tokenizer(from_file(models.BPE, merges, str(path), str(merges)))
    lines = merges.read_bytes().splitlines()
    if len(lines) < tokenizer.get_vocab_size() - 256 - 128:      # bytes and special tokens have none
        raise ValueError(f"{merges} has {len(lines)} lines for the {tokenizer.get_vocab_size()} "
                         "entries of vocab.json: one of them is cut: get both again")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def from_file(model, path, *arguments, **options):
    """A model of the library from its files; ValueError that names one if they are damaged."""
    try:
        return model.from_file(*arguments, **options)
    except Exception as e:                         # the library raises bare Exceptions
        raise ValueError(f"{path} cannot be read as a vocabulary ({one_line(e)}): get it "
                         "again") from None


READERS = {"tokenizer.json": read_json, "spm.model": read_spm, "vocab.txt": read_wordpiece,
           "vocab.json": read_bpe}


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
        raise refusal(where["tokenizer_class"], "tokenizer_class", given, "is not implemented for "
                      f"{path.name}, only {', '.join([*fitting, *as_it_is])}")
    return fitting.get(name)


def check_only(tokenizer, kind, options, where, path):
    """ValueError for the value of an option that is not implemented."""
    for option, allowed in (ONLY | (kind.only if kind else {})).items():
        value = text_of(options.get(option, allowed[0]))
        if value not in allowed:
            raise refusal(where[option], option, value, f"is not implemented, only {allowed[0]!r}")
    if getattr(tokenizer.model, "dropout", None):
        raise refusal(path, "dropout", tokenizer.model.dropout, "makes the ids random: remove it")


def text_of(value):
    """The text of a token that may be an object; what is none stays."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def obey(tokenizer, kind, options, where, path):
    """Set what the options say; ValueError where the file has what no option says."""
    for part, expected in kind.parts.items():
        found = type(getattr(tokenizer, part)).__name__
        if found != expected:
            raise refusal(path, part, found, f"where its tokenizer_class has {expected}: to have it"
                          " as it is give PreTrainedTokenizerFast in tokenizer_config.json")
    for option, (part, attribute, absent) in kind.options.items():
        there = getattr(getattr(tokenizer, part), attribute)
        wanted = text_of(options.get(option, absent))
        if there == wanted:
            continue
        if option not in options:
            raise refusal(path, attribute, there, f"without {option} in tokenizer_config.json, "
                          f"which means {absent!r} there: write one or the other into it")
        set_or_refuse(getattr(tokenizer, part), attribute, wanted, where, option)


def set_or_refuse(thing, attribute, value, where, option):
    """Set an attribute; ValueError that names the option if it does not take the value."""
    try:
        setattr(thing, attribute, value)
    except TypeError:
        raise refusal(where[option], option, value, "is none of its values") from None


def add_tokens(tokenizer, kind, options, where, added, path):
    """Add the tokens that the options name; returns how many were not in the file.

    Text that spells one is that token. ValueError if one would not have the id that is listed.
    """
    before = tokenizer.get_added_tokens_decoder()
    listing = where.get("added_tokens_decoder", path.with_name("added_tokens.json"))
    if kind and "added_tokens_decoder" in options:
        unlisted = [token.content for number, token in before.items() if number not in added]
        if unlisted:
            raise refusal(listing, "added_tokens_decoder", sorted(added),
                          f"lacks {unlisted[0]!r} of {path.name}: complete it")
    named = {token.content: token for token in named_tokens(kind, options, where)}
    known = {token.content for token in before.values()}
    tokens = []
    for number in sorted(added):
        token = added[number]
        token.special = token.special or token.content in named
        if path.name != "spm.model":               # whose own tokens are as they have to be
            tokens.append(token)
            known.add(token.content)
    tokens += [token for text, token in named.items() if text not in known]
    tokenizer.add_tokens(tokens)
    for number, token in added.items():
        found = tokenizer.token_to_id(token.content)
        if found != number:
            raise refusal(listing, token.content, number, f"is the token's id here, and {found} by "
                          f"{path.name}: get the files again, or a checkpoint with tokenizer.json")
    return len(tokenizer.get_added_tokens_decoder()) - len(before)


def named_tokens(kind, options, where):
    """The AddedTokens of options like cls_token, and of the lists of further ones."""
    options = (kind.tokens if kind else {}) | options
    tokens = []
    for option in ("additional_special_tokens", "extra_special_tokens"):
        listed = options.get(option) or []
        if isinstance(listed, dict):
            listed = list(listed.values())
        if not isinstance(listed, list):
            raise refusal(where[option], option, listed, "is no list of tokens")
        tokens += [as_token(value, where[option], option) for value in listed]
    named = []
    for option, value in options.items():
        if option.endswith("_token") and isinstance(value, (str, dict)):
            token = as_token(value, where.get(option), option)
            token.special = True
            named.append(token)
    return named + tokens


# --- templates ----------------------------------------------------------------------------------

def template_of(tokenizer, kind, options):
    """The post-processor that puts a kind's special tokens around one text or two."""
    texts = {}
    for name in ("cls_token", "sep_token"):
        texts[name] = str(text_of(options.get(name, kind.tokens[name])))
    pieces = [f"{texts.get(what, f'${what}')}:{type_id}" for what, type_id in kind.pair]
    return processors.TemplateProcessing(
        single=pieces[:3], pair=pieces,
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in set(texts.values())])


def set_template(tokenizer, kind, options, path):
    """ValueError unless a file puts special tokens around texts, in the way of its kind.

    A vocabulary alone does not say how: its kind does.
    """
    own = around(tokenizer)
    is_file = path.name == "tokenizer.json"
    if is_file and not all(map(tokenizer.num_special_tokens_to_add, (False, True))):
        raise refusal(path, "post_processor", tokenizer.post_processor, "adds no special tokens, "
                      "and a classifier reads the first one: get a complete file")
    if kind:
        tokenizer.post_processor = template_of(tokenizer, kind, options)
        if is_file and around(tokenizer) != own:
            pair = tokenizer.encode("a", "b").tokens
            raise refusal(path, "post_processor", own[1][0], "for two texts a and b is not what its "
                          f"tokenizer_class makes of cls_token and sep_token, {pair} with type ids "
                          f"{[type_id for _, type_id in kind.pair]}: correct one of them")


def around(tokenizer):
    """The tokens and type ids of one text and of a pair."""
    made = (tokenizer.encode("a"), tokenizer.encode("a", "b"))
    return [(encoding.tokens, encoding.type_ids) for encoding in made]


# --- writing ------------------------------------------------------------------------------------

def to_write(files):
    """{file name: bytes} with which transformers gives the ids of read_tokenizer(files); {} without files."""
    if not files.keys() & set(DEFINING):
        return {}
    tokenizer = read_tokenizer(files)
    options, _, _ = read_options(files)
    config = {"split_special_tokens": tokenizer.encode_special_tokens}
    if "model_max_length" in options:
        config["model_max_length"] = options["model_max_length"]
    if "tokenizer.json" not in files and "spm.model" in files:   # which has no form in JSON
        names = ("spm.model", "special_tokens_map.json", "added_tokens.json")
        written = {name: files[name].read_bytes() for name in names if name in files}
        config = options | config | {"tokenizer_class": "DebertaV2Tokenizer"}
    else:
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        written = {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
        config |= token_names(options, special)
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        if hasattr(tokenizer.pre_tokenizer, "add_prefix_space"):
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
