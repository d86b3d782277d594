"""config.json of a checkpoint: what is implemented of DeBERTaV2/V3, RoBERTa and BERT.

Options that a file leaves out get the value that the released models mean. A variant that is not
implemented is an error that names the option: a model is computed rightly or not at all.
"""
SLACK = 10                  # how many times its honest size a thing may have, to be looked at


def whole(low, high=10**7):
    """A test for integers from low to high."""
    return lambda value: type(value) is int and low <= value <= high


def fraction(value):
    """Whether a value is a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1


# {option: (its value where it is absent, which values are implemented: a list or a test)}.
# The values for absent options are those of transformers; a size with None has to be there.
COMMON = {
    "vocab_size": (None, whole(1)), "hidden_size": (None, whole(1)),
    "intermediate_size": (None, whole(1)), "num_attention_heads": (None, whole(1)),
    "num_hidden_layers": (None, whole(1, 1000)), "max_position_embeddings": (512, whole(1)),
    "hidden_act": ("gelu", ["gelu"]),
    "hidden_dropout_prob": (0.1, fraction), "attention_probs_dropout_prob": (0.1, fraction),
    "initializer_range": (0.02, fraction),
    "position_embedding_type": ("absolute", ["absolute"]), "is_decoder": (False, [False]),
}
DEBERTA = {
    **COMMON,
    "type_vocab_size": (0, whole(0)), "layer_norm_eps": (1e-7, fraction),
    "pad_token_id": (0, whole(0)), "relative_attention": (False, [True]),
    "pos_att_type": (None, [["p2c", "c2p"], ["c2p", "p2c"]]),
    "position_biased_input": (True, [False]), "position_buckets": (-1, whole(2)),
    "share_att_key": (False, [True]), "norm_rel_ebd": ("none", ["layer_norm"]),
    "conv_kernel_size": (0, [0]),
    "pooler_dropout": (0, fraction), "pooler_hidden_act": ("gelu", ["gelu"]),
}
BERT = {
    **COMMON,
    "type_vocab_size": (2, whole(1)), "layer_norm_eps": (1e-12, fraction),
    "pad_token_id": (0, whole(0)),
}
ROBERTA = {**BERT, "pad_token_id": (1, whole(0))}
OPTIONS = {"deberta-v2": DEBERTA, "roberta": ROBERTA, "bert": BERT}
# The head's dropout has another name in each family.
HEAD_DROPOUT = {"deberta-v2": "cls_dropout", "roberta": "classifier_dropout",
                "bert": "classifier_dropout"}


def check_config(raw, path):
    """A dict read from config.json, completed; ValueError names what is not implemented in it."""
    kind = raw.get("model_type")
    if kind not in list(OPTIONS):                # a list: what a file says need not be hashable
        raise ValueError(f"{path}: model_type {kind!r} is not implemented, only "
                         f"{', '.join(OPTIONS)}")
    head_dropout = HEAD_DROPOUT[kind]
    options = {**OPTIONS[kind], head_dropout: (None, fraction)}
    c = {name: absent for name, (absent, _) in options.items()}
    c.update(raw)
    if isinstance(c.get("pos_att_type"), str):   # "p2c|c2p" in released files, a list in newer ones
        c["pos_att_type"] = [part.strip() for part in c["pos_att_type"].lower().split("|")]
    if c[head_dropout] is None:
        c[head_dropout] = c["hidden_dropout_prob"]
    wrong = [name for name, (_, allowed) in options.items() if not fits(c[name], allowed)]
    if not wrong:                                # each is right by itself; now they have to agree
        rules = rules_of_agreement(c)
        wrong = [name for name in rules if name in c and not fits(c[name], rules[name])]
    if wrong:
        asked = "; ".join(f"{name} = {c[name]!r}" for name in wrong)
        raise ValueError(f"{path} asks for what is not implemented here: {asked}")
    return c


def rules_of_agreement(c):
    """{option: its allowed values} of those that depend on the sizes of a config."""
    d = c["hidden_size"]
    heads = c["num_attention_heads"]
    longest = c["max_position_embeddings"]
    return {
        "num_attention_heads": [heads] if d % heads == 0 else [],
        "attention_head_size": [None, d // heads],
        "embedding_size": [None, d],
        "pooler_hidden_size": [None, d],
        "pad_token_id": range(min(c["vocab_size"], longest)),
        "max_relative_positions": [None, -1, 0, longest],
        "position_buckets": range(2, 2 * longest - 2),
    }


def fits(value, allowed):
    """Whether a value is among those of a list, or passes a test."""
    return allowed(value) if callable(allowed) else value in allowed


def count_weights(config):
    """How many weights a checked config describes, but for biases and a few small layers."""
    d = config["hidden_size"]
    rows = config["vocab_size"] + config["max_position_embeddings"] + config["type_vocab_size"]
    layer = 4 * d * d + 2 * d * config["intermediate_size"]
    return rows * d + config["num_hidden_layers"] * layer


def config_to_write(config, num_labels, dtype):
    """The content of config.json for transformers: what this model is, nothing of another head.

    The names of labels stay if they fit num_labels.
    """
    kind = config["model_type"]
    known = {"model_type", "id2label", HEAD_DROPOUT[kind]}
    known |= OPTIONS[kind].keys() | rules_of_agreement(config).keys()
    config = {name: config[name] for name in config if name in known}
    ids = [str(i) for i in range(num_labels)]
    labels = config.get("id2label")
    if not isinstance(labels, dict) or labels.keys() != set(ids):
        labels = {i: f"LABEL_{i}" for i in ids}
    config["id2label"] = labels
    config["label2id"] = {str(label): int(i) for i, label in labels.items()}
    config["problem_type"] = "regression" if num_labels == 1 else "single_label_classification"
    family = {"deberta-v2": "DebertaV2", "roberta": "Roberta", "bert": "Bert"}[kind]
    config["architectures"] = [f"{family}ForSequenceClassification"]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    return config
