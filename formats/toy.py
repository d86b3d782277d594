"""The demo's made-up language and its tokenizer, so that the demo needs no file from elsewhere.

A sentence is a cue word, one word for each of six roles and one to four fillers, shuffled:

    role3word13 filler7 role0word2 cue0 role5word9 role1word1 role4word15 role2word8

A role has 16 words, four in each of 4 hidden classes: role3word13 is of class 3, but a model sees
only an id. There are two questions to ask of a sentence:

    "pretrain"  Of which class is the word of the role that the cue names?  (4 labels)
    "adapt"     Is the word of role 3 of class 2 or 3? The cue is always cue0.  (2 labels)

A model that has learnt to answer the first has to unlearn for the second what cue0 meant.
"""
import random

import tokenizers

from formats.glue import Split

ROLES = 6
WORDS = 16                                          # of each role
CLASSES = 4
FILLERS = 20
ADAPT_CUE = 0
ADAPT_ROLE = 3
# tokenizer_config.json: what transformers goes by. Ids are in this order.
SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
BESIDE = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
PRETRAINING_ROWS = {"train": 20000, "dev": 1000}    # of the demo's base model


def language(question, n, seed=0):
    """n different sentences and the answers to "pretrain" or "adapt", as a Split."""
    if question not in ("pretrain", "adapt"):
        raise ValueError(f"the demo's questions are 'pretrain' and 'adapt', not {question!r}")
    rng = random.Random(seed)
    split = Split([], [])
    seen = set()
    while len(split.texts) < n:
        cue = rng.randrange(ROLES) if question == "pretrain" else ADAPT_CUE
        words = [rng.randrange(WORDS) for _ in range(ROLES)]
        content = (cue, *words)
        if content in seen:                         # order and fillers make no other sentence
            continue
        seen.add(content)
        sentence = [f"cue{cue}"]
        sentence += [f"role{role}word{word}" for role, word in enumerate(words)]
        sentence += [f"filler{rng.randrange(FILLERS)}" for _ in range(rng.randint(1, 4))]
        rng.shuffle(sentence)
        split.texts.append((" ".join(sentence),))
        classes = [word * CLASSES // WORDS for word in words]
        if question == "pretrain":
            split.labels.append(classes[cue])
        else:
            split.labels.append(1 if classes[ADAPT_ROLE] >= 2 else 0)
    return split


def splits(question, rows, seed=0):
    """{name: Split} with as many rows as rows[name] says; no sentence is in two of them."""
    everything = language(question, sum(rows.values()), seed)
    found = {}
    start = 0
    for name, n in rows.items():
        found[name] = everything.part(start, start + n)
        start += n
    return found


def tokenizer():
    """A tokenizers.Tokenizer with one id a word: 0 is [PAD], and [CLS] A [SEP] is a sentence."""
    special = list(SPECIAL.values())
    words = special + [f"cue{role}" for role in range(ROLES)]
    words += [f"filler{filler}" for filler in range(FILLERS)]
    for role in range(ROLES):
        words += [f"role{role}word{word}" for word in range(WORDS)]
    ids = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])])
    made.add_special_tokens(special)
    return made
