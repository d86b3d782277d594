"""DeBERTaV2/V3, RoBERTa and BERT with a classification head; they load the Hub's checkpoints.

    model = from_pretrained("microsoft/deberta-v3-base", num_labels=2)  # in train mode
    logits = model(input_ids, attention_mask, token_type_ids)           # (B, num_labels)

A config is a dict, the content of config.json. What is read of DeBERTaV3-base's:

    {"model_type": "deberta-v2", "vocab_size": 128100, "num_hidden_layers": 12,
     "hidden_size": 768,              # d
     "num_attention_heads": 12,       # H, each of size e = d / H = 64
     "intermediate_size": 3072,       # f
     "max_position_embeddings": 512,  # the longest input, in tokens
     "position_buckets": 256,         # the table of positions has R = 2 · 256 rows
     "type_vocab_size": 0, "pad_token_id": 0, "layer_norm_eps": 1e-7, "initializer_range": 0.02,
     "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
     "pooler_dropout": 0, "cls_dropout": 0.1}

Modules have the names of the checkpoints' keys, which are those of transformers, so that loading is
one load_state_dict. Families differ in embeddings, attention and head. B rows, T tokens, in all:

    tokens ─ embeddings ─┬─ attention ─ + ─ LayerNorm ─┬─ dense ─ GELU ─ dense ─ + ─ LayerNorm ─
                         └──────────────┘              └─────────────────────────┘   × layers
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from formats import checkpoint, hub
from formats.config import HEAD_DROPOUT, check_config, config_to_write
from formats.disk import read_object
from formats.head import fit_head, missing_layers

PREFIX = {"deberta-v2": "deberta", "roberta": "roberta", "bert": "bert"}


class Embeddings(nn.Module):
    """Sum of word, token-type and position embeddings → LayerNorm → dropout: (B, T) → (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        d = config["hidden_size"]
        self.kind = config["model_type"]
        self.pad = config["pad_token_id"]
        self.types = config["type_vocab_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], d, self.pad)
        if self.kind != "deberta-v2":  # there attention has them, as relative ones
            padding = self.pad if self.kind == "roberta" else None
            self.position_embeddings = nn.Embedding(config["max_position_embeddings"], d, padding)
        if self.types > 0:
            self.token_type_embeddings = nn.Embedding(self.types, d)
        self.LayerNorm = nn.LayerNorm(d, config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])

    def forward(self, input_ids, token_type_ids):
        x = self.word_embeddings(input_ids)  # (B, T, d)
        if self.types > 0:
            if token_type_ids is None or self.types == 1:  # RoBERTa has a single type
                token_type_ids = torch.zeros_like(input_ids)
            x = x + self.token_type_embeddings(token_type_ids)
        if self.kind == "bert":
            x = x + self.position_embeddings.weight[:x.shape[1]]  # (T, d), for every row
        if self.kind == "roberta":
            # Tokens count from pad + 1, padding is at pad: [5, 5, pad] is at [2, 3, 1] if pad = 1.
            real = (input_ids != self.pad).long()
            positions = real.cumsum(1) * real + self.pad
            x = x + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))


def split_heads(x, H):
    """(..., T, d) → (..., H, T, e): head h has columns h·e to (h + 1)·e."""
    x = x.unflatten(-1, (H, -1))  # (..., T, H, e)
    return x.transpose(-3, -2)


def attend(scores, mask, v, dropout):
    """Each token's mean of v, (B, H, T, e), by the softmax of its scores: → (B, T, d)."""
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # −inf could give NaN
    weights = dropout(scores.softmax(-1))            # (B, H, T, T)
    return (weights @ v).transpose(1, 2).flatten(2)  # (B, H, T, e) → (B, T, d)


class SelfAttention(nn.Module):
    """Attention of BERT and RoBERTa (arXiv 1706.03762, Eq. 1): (B, T, d) → (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        d = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.dropout = nn.Dropout(config["attention_probs_dropout_prob"])

    def forward(self, x, mask):
        q = split_heads(self.query(x), self.heads)  # (B, H, T, e)
        k = split_heads(self.key(x), self.heads)    # (B, H, T, e)
        v = split_heads(self.value(x), self.heads)  # (B, H, T, e)
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, T)
        return attend(scores, mask, v, self.dropout)


class DisentangledSelfAttention(nn.Module):
    """DeBERTa's attention (arXiv 2006.03654, Eq. 4): content and relative position in three terms.

        score[i, j] = ( q_i · k_j  +  q_i · K_δ  +  k_j · Q_δ ) / sqrt(3e),    δ = bucket(i − j)
                        content    content→position  position→content

    A table holds a learned vector for each relative position. The layer's own matrices make keys K
    and queries Q of it, so that an adapter on these matrices changes K and Q too. In the last term
    the paper prints δ(j, i), but its code, with which the released weights were trained, has
    δ(i, j). So has this.

    x: (B, T, d) → (B, T, d). mask: (B, 1, 1, T), True at tokens, False at padding.
    table: of positions, (R, d). index: (T, T), at [i, j] the table's row for i − j, δ + R / 2.
    """

    def __init__(self, config):
        super().__init__()
        d = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.query_proj = nn.Linear(d, d)
        self.key_proj = nn.Linear(d, d)
        self.value_proj = nn.Linear(d, d)
        self.pos_dropout = nn.Dropout(config["hidden_dropout_prob"])
        self.dropout = nn.Dropout(config["attention_probs_dropout_prob"])

    def forward(self, x, mask, table, index):
        table = self.pos_dropout(table)
        q = split_heads(self.query_proj(x), self.heads)      # (B, H, T, e)
        k = split_heads(self.key_proj(x), self.heads)        # (B, H, T, e)
        v = split_heads(self.value_proj(x), self.heads)      # (B, H, T, e)
        Q = split_heads(self.query_proj(table), self.heads)  # (H, R, e)
        K = split_heads(self.key_proj(table), self.heads)    # (H, R, e)
        c2c = q @ k.mT                            # [i, j] = q_i · k_j
        index = index.expand_as(c2c)              # (B, H, T, T), without a copy
        # q @ K.mT and k @ Q.mT are (B, H, T, R), a row for each token. gather() puts the column
        # index[i, j] of row i at [i, j]. p2c is gathered at [j, i], then turned.
        c2p = (q @ K.mT).gather(-1, index)        # [i, j] = q_i · K_δ
        p2c = (k @ Q.mT).gather(-1, index.mT).mT  # [i, j] = k_j · Q_δ
        scores = (c2c + c2p + p2c) / math.sqrt(3 * q.shape[-1])
        return attend(scores, mask, v, self.dropout)


def bucket(distance, buckets, max_position):
    """The bucket δ of each distance i − j: integers of any shape → integers of that shape.

    Up to buckets / 2 each distance has a bucket of its own. Beyond, the bucket grows with the
    logarithm of the distance, which is at most max_position − 1, so that far words share one. With
    DeBERTaV3's 256 and 512, bucket(140) is 128 + ceil(127 · ln(140 / 128) / ln(511 / 128)) = 137:

        distance    0    1    128    129    140    300    511    −300
        bucket      0    1    128    129    137    207    255    −207
    """
    mid = buckets // 2
    size = distance.abs()
    ratio = size.clamp(min=mid).float() / mid         # near ones have the ratio 1: log 1 = 0
    highest = torch.tensor((max_position - 1) / mid)  # in float32, to round as transformers does
    share = ratio.log() / highest.log()               # 0 at mid, 1 at the longest distance
    far = mid + torch.ceil(share * (mid - 1)).long()
    return torch.where(size <= mid, size, far) * distance.sign()


class Output(nn.Module):
    """dense → dropout → + residual → LayerNorm, the end of both halves of a layer: → (B, T, d)."""

    def __init__(self, d_in, config):
        super().__init__()
        self.dense = nn.Linear(d_in, config["hidden_size"])
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    """One transformer layer: (B, T, d) → (B, T, d). ModuleDicts spell the checkpoint's names."""

    def __init__(self, config):
        super().__init__()
        d = config["hidden_size"]
        f = config["intermediate_size"]
        is_deberta = config["model_type"] == "deberta-v2"
        attention = DisentangledSelfAttention if is_deberta else SelfAttention
        self.attention = nn.ModuleDict({"self": attention(config), "output": Output(d, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(d, f)})
        self.output = Output(f, config)

    def forward(self, x, mask, *relative):           # (table, index) in DeBERTa, else nothing
        y = self.attention.self(x, mask, *relative)  # (B, T, d)
        x = self.attention.output(y, x)              # (B, T, d)
        y = F.gelu(self.intermediate.dense(x))       # (B, T, f)
        return self.output(y, x)                     # (B, T, d)


class Encoder(nn.Module):
    """The layers and, in DeBERTa, the table of positions that they share: (B, T, d) → (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        self.kind = config["model_type"]
        self.layer = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        if self.kind == "deberta-v2":
            d = config["hidden_size"]
            self.buckets = config["position_buckets"]
            self.max_position = config["max_position_embeddings"]
            self.rel_embeddings = nn.Embedding(2 * self.buckets, d)  # row δ + buckets is δ's
            self.LayerNorm = nn.LayerNorm(d, config["layer_norm_eps"])

    def forward(self, x, attention_mask):
        mask = attention_mask.bool()[:, None, None]  # (B, 1, 1, T)
        relative = ()  # BERT and RoBERTa have positions in the embeddings
        if self.kind == "deberta-v2":
            i = torch.arange(x.shape[1], device="cpu")  # a GPU's log may round to another bucket
            distance = i[:, None] - i  # (T, T): i − j
            index = bucket(distance, self.buckets, self.max_position) + self.buckets
            table = self.LayerNorm(self.rel_embeddings.weight)  # (R, d)
            relative = table, index.to(x.device)
        for layer in self.layer:
            x = layer(x, mask, *relative)
        return x


class SequenceClassifier(nn.Module):
    """Encoder and head with random weights; from_pretrained() returns one with a checkpoint's.

    config: a dict as check_config() returns it, config.json with absent options filled in.
    num_labels: number of classes, or 1 for a score.
    """

    def __init__(self, config, num_labels):
        super().__init__()
        self.config = config
        self.num_labels = num_labels
        self.source = None  # from_pretrained(): the name or folder that it read
        self.new_weights = []  # from_pretrained(): the keys that it drew at random
        self.kind = config["model_type"]
        self.max_len = config["max_position_embeddings"]  # the longest input, in tokens
        backbone = nn.ModuleDict({"embeddings": Embeddings(config), "encoder": Encoder(config)})
        self.add_module(PREFIX[self.kind], backbone)

        # The head: dropout → dense → activation → dropout → output, under the checkpoint's names.
        d = config["hidden_size"]
        dense = nn.Linear(d, d)
        output = nn.Linear(d, num_labels)
        self.head_parts = ["pooler", "classifier"]  # what names of its parameters contain
        self.activation = torch.tanh  # unless it is set below, as the first dropout's rate
        rate = 0.0
        if self.kind == "bert":
            backbone["pooler"] = nn.ModuleDict({"dense": dense})
            self.classifier = output
            self.head_names = ["bert.pooler.dense", "classifier"]
        elif self.kind == "roberta":
            self.max_len -= config["pad_token_id"] + 1  # where positions begin
            self.classifier = nn.ModuleDict({"dense": dense, "out_proj": output})
            self.head_parts = ["classifier"]
            self.head_names = ["classifier.dense", "classifier.out_proj"]
            rate = config["classifier_dropout"]
        else:
            self.pooler = nn.ModuleDict({"dense": dense})
            self.classifier = output
            self.head_names = ["pooler.dense", "classifier"]
            self.activation = F.gelu
            rate = config["pooler_dropout"]
        self.first_dropout = nn.Dropout(rate)
        self.dropout = nn.Dropout(config[HEAD_DROPOUT[self.kind]])

    @property
    def backbone(self):
        """All but the head (with BERT's pooler), under the checkpoint's own name."""
        return getattr(self, PREFIX[self.kind])

    def head_layers(self):
        """{name: layer} of the head's dense and output, which a method may have replaced."""
        return {name: self.get_submodule(name) for name in self.head_names}

    def encode(self, input_ids, attention_mask, token_type_ids=None):
        """(B, T) → the last hidden states, (B, T, d). ValueError if T is more than max_len.

        The mask is 0 or False at padding, the types may be None for zeros.
        """
        T = input_ids.shape[1]
        if T > self.max_len:
            raise ValueError(f"{T} tokens for {self.max_len} positions: shorten the input")
        x = self.backbone.embeddings(input_ids, token_type_ids)
        return self.backbone.encoder(x, attention_mask)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """The arguments of encode() → logits, (B, num_labels)."""
        dense, output = self.head_layers().values()
        x = self.encode(input_ids, attention_mask, token_type_ids)
        x = self.activation(dense(self.first_dropout(x[:, 0])))  # (B, d): of the first token
        return output(self.dropout(x))


def from_pretrained(name_or_dir, num_labels, head_dropout=None, labels=None):
    """The model that a checkpoint describes, with its weights, in fp32 and in train mode.

    A weight in the file that is not used must be a known leftover of pretraining. Only layers of
    the head may be missing, or be for other labels: these are drawn with torch's global generator
    from N(0, initializer_range²), and `new_weights` of the model lists their keys.

    name_or_dir: a Hub name, or a folder with config.json and the weights; `source` of the model.
    num_labels: number of classes, or 1 for a score.
    head_dropout: rate of the dropout before the classifier, None for the checkpoint's.
    labels: names of the classes, in their order, to find them in the checkpoint's head by name.
    OSError if files cannot be had, ValueError if they cannot be used.
    """
    path = hub.find_config(name_or_dir)
    config = check_config(read_object(path), path)
    if head_dropout is not None:
        config[HEAD_DROPOUT[config["model_type"]]] = head_dropout
    with torch.device("meta"):  # no numbers: they come from the file
        model = SequenceClassifier(config, num_labels)
    model.source = str(name_or_dir)
    wanted = model.state_dict()
    weights = checkpoint.read_weights(name_or_dir, config)
    weights = checkpoint.convert(weights, PREFIX[model.kind], wanted, name_or_dir)
    fit_head(weights, model.head_layers(), config, labels, name_or_dir)
    new = missing_layers(weights, model.head_layers())
    checkpoint.check_weights(weights | new, wanted, name_or_dir)
    for key, meta in new.items():  # on the meta device: a shape, no numbers
        weights[key] = torch.zeros(meta.shape)
        if key.endswith("weight"):
            weights[key].normal_(std=config["initializer_range"])
    model.new_weights = list(new)
    model.load_state_dict(weights, assign=True)  # no copy, if the file is in fp32
    if labels or new:  # the file's names no longer fit; given none, they are LABEL_0, ...
        model.config["id2label"] = {str(i): label for i, label in enumerate(labels or ())}
    return model.float()


def save_pretrained(model, folder):
    """Write config.json, model.safetensors and the tokenizer's files, for transformers to open.

    ValueError for a model with adapters: merge them first, no other software knows their keys.
    OSError if the folder cannot be written.
    """
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    with torch.device("meta"):
        without_adapters = SequenceClassifier(model.config, model.num_labels)
    strange = without_adapters.state_dict().keys() ^ state.keys()
    if strange:
        raise ValueError(f"{min(strange)} is no plain weight: merge the adapters before saving")
    config = config_to_write(model.config, model.num_labels, next(model.parameters()).dtype)
    checkpoint.write(folder, config, state, tokenizer_of=model.source)


# The six matrices of a layer: LoRA²'s short names (arXiv 2408.06854, Table 4) → their places.
OF_BERT = {"q": "attention.self.query",
           "k": "attention.self.key",
           "v": "attention.self.value",
           "o": "attention.output.dense",
           "f1": "intermediate.dense",
           "f2": "output.dense"}
OF_DEBERTA = OF_BERT | {"q": "attention.self.query_proj",
                        "k": "attention.self.key_proj",
                        "v": "attention.self.value_proj"}
TARGETS = {"bert": OF_BERT, "roberta": OF_BERT, "deberta-v2": OF_DEBERTA}


def target_modules(model, names):
    """Full names of the chosen of TARGETS in every layer; ValueError for none or another."""
    places = TARGETS[model.kind]
    unknown = [name for name in names if name not in places]
    if unknown or not names:
        raise ValueError(f"unknown target {unknown}: give some of {','.join(places)}")
    found = []
    for i in range(model.config["num_hidden_layers"]):
        for name, place in places.items():
            if name in names:
                found.append(f"{PREFIX[model.kind]}.encoder.layer.{i}.{place}")
    return found


def in_head(name, head_parts):
    """Whether a dotted name has one of these parts, such as "classifier"."""
    return any(part in head_parts for part in name.split("."))
