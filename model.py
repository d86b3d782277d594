"""DeBERTaV2/V3, RoBERTa and BERT encoders with a classification head, written out, loading the Hub's checkpoints.

    model = from_pretrained("microsoft/deberta-v3-base", num_labels=2)      # a Hub name or a folder
    logits = model(input_ids, attention_mask, token_type_ids)               # (B, num_labels)

Shapes:  B rows · T tokens · d hidden size · H heads of size e = d / H.
Module names are the checkpoint's own, so that loading is one strict load_state_dict and state_dict() has the keys of
transformers' ...ForSequenceClassification. The three families share everything but embeddings, attention and head:

    tokens ── embeddings ──┬─ attention ── + ── LayerNorm ──┬─ intermediate ── output ── + ── LayerNorm ── × layers
                           └───────────────┘                └────────────────────────────┘
"""
import functools
import json
import math
import os
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import hub

# What config.json may leave out, as transformers' config classes fill it in.
DEFAULTS = {
    "deberta-v2": {"type_vocab_size": 0, "layer_norm_eps": 1e-7, "pad_token_id": 0, "relative_attention": False,
                   "position_biased_input": True, "position_buckets": -1, "max_relative_positions": -1,
                   "share_att_key": False, "norm_rel_ebd": "none", "pos_att_type": None, "conv_kernel_size": 0,
                   "pooler_dropout": 0.0, "pooler_hidden_act": "gelu"},
    "roberta": {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 1},
    "bert": {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0},
}
COMMON = {"hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
          "max_position_embeddings": 512, "initializer_range": 0.02, "position_embedding_type": "absolute",
          "is_decoder": False}
PREFIX = {"deberta-v2": "deberta", "roberta": "roberta", "bert": "bert"}
HEAD = {"deberta-v2": ("pooler", "classifier"), "roberta": ("classifier",), "bert": ("pooler", "classifier")}
# Weights of the pretraining task and of unused parts that real files carry; everything else must be used.
LEFTOVERS = {"deberta-v2": r"lm_predictions\.|mask_predictions\.|cls\.|deberta\.embeddings\.position_(ids|embeddings)",
             "roberta": r"lm_head\.|roberta\.pooler\.|roberta\.embeddings\.position_ids",
             "bert": r"cls\.|bert\.embeddings\.position_ids"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spm.model",
                   "vocab.txt", "vocab.json", "merges.txt")
# The six matrices of a layer by the paper's short names (Table 4), as ends of module names; where two match
# ("attention.output.dense" also ends in "output.dense"), the longer one counts: see target_modules().
TARGETS = {kind: {"q": f"attention.self.{q}", "k": f"attention.self.{k}", "v": f"attention.self.{v}",
                  "o": "attention.output.dense", "f1": "intermediate.dense", "f2": "output.dense"}
           for kind, q, k, v in (("deberta-v2", "query_proj", "key_proj", "value_proj"),
                                 ("roberta", "query", "key", "value"), ("bert", "query", "key", "value"))}


# --- the blocks, bottom up -----------------------------------------------------------------------------------------

class Embeddings(nn.Module):
    """Sum of word, token-type and absolute position embeddings → LayerNorm → dropout: (B, T) → (B, T, d).

    DeBERTaV3 has only the word embeddings: order enters through its attention.
    """

    def __init__(self, c):
        super().__init__()
        self.pad = c["pad_token_id"]
        self.roberta = c["model_type"] == "roberta"
        self.word_embeddings = nn.Embedding(c["vocab_size"], c["hidden_size"], padding_idx=self.pad)
        self.position_embeddings = self.token_type_embeddings = None
        if c["model_type"] != "deberta-v2":
            self.position_embeddings = nn.Embedding(c["max_position_embeddings"], c["hidden_size"])
        if c["type_vocab_size"] > 0:
            self.token_type_embeddings = nn.Embedding(c["type_vocab_size"], c["hidden_size"])
        self.LayerNorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.dropout = nn.Dropout(c["hidden_dropout_prob"])

    def forward(self, input_ids, token_type_ids):
        x = self.word_embeddings(input_ids)                                        # (B, T, d)
        if self.token_type_embeddings is not None:
            if token_type_ids is None or self.roberta:     # RoBERTa was trained with a single type, 0
                token_type_ids = torch.zeros_like(input_ids)
            x = x + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            if self.roberta:                               # real tokens count from pad + 1, padding stays at pad
                real = (input_ids != self.pad).long()
                positions = real.cumsum(1) * real + self.pad                       # (B, T)
            else:
                positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            x = x + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    """Softmax attention of BERT and RoBERTa: (B, T, d) → (B, T, d)."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.dropout = c["num_attention_heads"], c["attention_probs_dropout_prob"]
        self.query, self.key, self.value = (nn.Linear(c["hidden_size"], c["hidden_size"]) for _ in range(3))

    def forward(self, x, mask, positions):
        B, T, d = x.shape
        q, k, v = (proj(x).view(B, T, self.heads, -1).transpose(1, 2)              # each (B, H, T, e)
                   for proj in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return y.transpose(1, 2).reshape(B, T, d)


class DisentangledSelfAttention(nn.Module):
    """DeBERTa's attention: content and relative position are kept apart and meet in three terms. (B, T, d) → same.

        score[i, j] = ( q_i · k_j  +  q_i · K_δ  +  k_j · Q_δ ) / sqrt(3e)           δ = bucket(i − j)
                       content      content→pos.   pos.→content

    K and Q are the key and query projections (the very same matrices, so an adapter on them acts here too) of row δ
    of a learned table of relative positions.

    A gather q_i · K_δ[i,j] over all i, j would need a (T, T) index per head and row. Instead both position products
    are made against the table in order of distance, (.., T, W) with W = 2T − 1, and read along diagonals: step one
    row down and the wanted column moves by one, which is a *view* with other strides. See along_diagonals().
    """

    def __init__(self, c):
        super().__init__()
        self.heads = c["num_attention_heads"]
        self.query_proj, self.key_proj, self.value_proj = (nn.Linear(c["hidden_size"], c["hidden_size"])
                                                           for _ in range(3))
        self.pos_dropout = nn.Dropout(c["hidden_dropout_prob"])
        self.dropout = nn.Dropout(c["attention_probs_dropout_prob"])

    def split(self, x):
        """(..., d) → (H, ..., e): heads first, so that one product per head can serve all rows of the batch."""
        return x.unflatten(-1, (self.heads, -1)).movedim(-2, 0)

    def forward(self, x, mask, positions):
        (B, T, d), H = x.shape, self.heads
        table, order = positions                                                   # (R, d) distinct rows; (W,) or None
        scale = 1 / math.sqrt(3 * d / H)
        q, k, v = (self.split(proj(x)).contiguous()                                # each (H, B, T, e)
                   for proj in (self.query_proj, self.key_proj, self.value_proj))
        table = self.pos_dropout(table)
        K, Q = (self.split(proj(table)) * scale for proj in (self.key_proj, self.query_proj))     # (H, R, e)
        if order is not None:                              # T > 129: several distances share a bucket
            K, Q = K.index_select(1, order), Q.index_select(1, order)              # (H, W, e), distance −(T−1) .. T−1
        c2p = torch.bmm(q.view(H, B * T, -1), K.flip(1).mT)                        # (H, B·T, W), distance T−1 .. −(T−1)
        p2c = torch.bmm(k.view(H, B * T, -1), Q.mT)                                # (H, B·T, W), distance −(T−1) .. T−1
        bias = along_diagonals(c2p, B, T) + mask.transpose(0, 1)                   # (H, B, T, T) + (1, B, 1, T)
        bias.add_(along_diagonals(p2c, B, T).mT)
        q, k, v = (t.view(H * B, T, -1) for t in (q, k, v))
        scores = torch.baddbmm(bias.view(H * B, T, T), q, k.mT, alpha=scale)       # scaled inside: safe in fp16
        y = torch.bmm(self.dropout(scores.softmax(-1)), v)                         # (H·B, T, e)
        return y.view(H, B, T, -1).permute(1, 2, 0, 3).reshape(B, T, d)


def along_diagonals(S, B, T):
    """View of S (H, B·T, 2T−1) as (H, B, T, T) with [h, b, i, j] = S[h, b·T + i, T − 1 − i + j].

    Row i begins one column further left than row i − 1: in memory that is a step of 2T − 2 instead of 2T − 1.
    No index tensor, no copy; the backward pass is a strided copy, deterministic where a scatter is not.
    """
    W = 2 * T - 1
    return S.as_strided((len(S), B, T, T), (B * T * W, T * W, W - 1, 1), T - 1)


@functools.lru_cache(maxsize=256)
def relative_rows(T, buckets, max_position, device):
    """Which rows of the relative-position table a sequence of T tokens needs: (first, last + 1, order or None).

    Distances up to buckets/2 have a row each; longer ones share rows in log-sized buckets up to max_position, which
    gives far words a coarser ruler. With the usual 256 buckets and 512 positions the middle row is 256 and
        distance   0 →   0     1 → 1     128 → 128     129 → 129     140 → 137     300 → 207     511 → 255
    and −distance the mirror image. `order` (2T − 1,) lists, for distances −(T−1) .. T−1, the row within the slice;
    None while each distance has a row of its own. Formula and float32 rounding are those of the DeBERTa release.
    """
    distance = torch.arange(-(T - 1), T)                                           # (W,)
    mid = buckets // 2
    magnitude = distance.abs().clamp(min=mid).float()
    log_bucket = torch.ceil(torch.log(magnitude / mid) / torch.log(torch.tensor((max_position - 1) / mid)) * (mid - 1))
    bucket = torch.where(distance.abs() <= mid, distance, ((log_bucket + mid) * distance.sign()).long())
    rows = (bucket + buckets).clamp(0, 2 * buckets - 1)
    first, last = rows[0].item(), rows[-1].item()
    order = None if last - first == 2 * T - 2 else (rows - first).to(device)
    return first, last + 1, order


class Output(nn.Module):
    """dense → dropout → add the residual → LayerNorm: ends both halves of a layer."""

    def __init__(self, d_in, c):
        super().__init__()
        self.dense = nn.Linear(d_in, c["hidden_size"])
        self.LayerNorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.dropout = nn.Dropout(c["hidden_dropout_prob"])

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    """One transformer layer, post-norm; the nesting of names is the checkpoints'."""

    def __init__(self, c):
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = (DisentangledSelfAttention if c["model_type"] == "deberta-v2" else SelfAttention)(c)
        self.attention.output = Output(c["hidden_size"], c)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(c["hidden_size"], c["intermediate_size"])
        self.output = Output(c["intermediate_size"], c)

    def forward(self, x, mask, positions):
        x = self.attention.output(self.attention.self(x, mask, positions), x)      # (B, T, d)
        return self.output(F.gelu(self.intermediate.dense(x)), x)                  # (B, T, d), inside (B, T, f)


class Encoder(nn.Module):
    """The layers and, for DeBERTa, the table of relative positions they share."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.layer = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        if c["model_type"] == "deberta-v2":
            self.rel_embeddings = nn.Embedding(2 * c["position_buckets"], c["hidden_size"])
            self.LayerNorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])

    def forward(self, x, attention_mask):
        positions = None
        if hasattr(self, "rel_embeddings"):                # the same plan and the same normalised rows for all layers
            first, end, order = relative_rows(x.shape[1], self.c["position_buckets"],
                                              self.c["max_position_embeddings"], x.device)
            positions = self.LayerNorm(self.rel_embeddings.weight[first:end]), order
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        mask = torch.zeros(attention_mask.shape, dtype=dtype, device=x.device)
        mask = mask.masked_fill(~attention_mask.bool(), torch.finfo(dtype).min)[:, None, None]     # (B, 1, 1, T)
        for layer in self.layer:
            x = layer(x, mask, positions)
        return x


class Pooler(nn.Module):
    """First token → dropout → dense → activation: (B, T, d) → (B, d)."""

    def __init__(self, c):
        super().__init__()
        self.dense = nn.Linear(c["hidden_size"], c["hidden_size"])
        self.dropout = nn.Dropout(c.get("pooler_dropout", 0.0))
        self.activation = F.gelu if c["model_type"] == "deberta-v2" else torch.tanh

    def forward(self, x):
        return self.activation(self.dense(self.dropout(x[:, 0])))


class RobertaHead(nn.Module):
    """RoBERTa keeps both matrices of its head, and a dropout before each, under one name."""

    def __init__(self, c, num_labels, dropout):
        super().__init__()
        self.dense = nn.Linear(c["hidden_size"], c["hidden_size"])
        self.out_proj = nn.Linear(c["hidden_size"], num_labels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x[:, 0])))))


class SequenceClassifier(nn.Module):
    """Encoder and head. `config` is the checkpoint's config.json with the defaults filled in, a plain dict."""

    def __init__(self, config, num_labels):
        super().__init__()
        c = self.config = config
        kind, self.num_labels = c["model_type"], num_labels
        dropout = c["cls_dropout" if kind == "deberta-v2" else "classifier_dropout"]
        backbone = nn.Module()
        backbone.embeddings, backbone.encoder = Embeddings(c), Encoder(c)
        setattr(self, PREFIX[kind], backbone)
        if kind == "roberta":
            self.classifier = RobertaHead(c, num_labels, dropout)
        else:
            (self if kind == "deberta-v2" else backbone).pooler = Pooler(c)
            self.dropout = nn.Dropout(dropout)
            self.classifier = nn.Linear(c["hidden_size"], num_labels)

    @property
    def backbone(self):
        return getattr(self, PREFIX[self.config["model_type"]])

    @property
    def max_len(self):
        """Longest input in tokens. RoBERTa's first position is pad + 1, so its 514 rows are 512 tokens."""
        c = self.config
        return c["max_position_embeddings"] - (c["pad_token_id"] + 1 if c["model_type"] == "roberta" else 0)

    def encode(self, input_ids, attention_mask, token_type_ids=None):
        """Token ids (B, T) and mask (B, T; 0 or False = padding) → hidden states (B, T, d)."""
        if input_ids.shape[1] > self.max_len:
            raise ValueError(f"{input_ids.shape[1]} tokens, but the model has positions for {self.max_len}: "
                             "shorten the input")
        return self.backbone.encoder(self.backbone.embeddings(input_ids, token_type_ids), attention_mask)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """→ logits (B, num_labels)."""
        x = self.encode(input_ids, attention_mask, token_type_ids)
        if self.config["model_type"] == "roberta":
            return self.classifier(x)
        pooler = self.pooler if self.config["model_type"] == "deberta-v2" else self.backbone.pooler
        return self.classifier(self.dropout(pooler(x)))


def target_modules(model, names):
    """Dotted names of the layers meant by the paper's short names, e.g. ["q", "f2"]; ValueError for another one."""
    ends = TARGETS[model.config["model_type"]]
    unknown = [name for name in names if name not in ends]
    if unknown or not names:
        raise ValueError(f"unknown target {', '.join(unknown) or 'list (empty)'}: give some of {','.join(ends)}")
    longest_match = lambda module: max((end for end in ends.values() if module.endswith("." + end)), key=len, default="")
    wanted = {ends[name] for name in names}
    return [module for module, _ in model.named_modules() if longest_match(module) in wanted]


# --- loading and saving --------------------------------------------------------------------------------------------

def from_pretrained(name_or_dir, num_labels, head_dropout=None):
    """Build the model that a checkpoint (Hub name or folder) describes and load its weights, in fp32.

    Every weight of the backbone must be there, and every weight in the file must be used or be a known leftover of
    pretraining. Head weights come from the file if it has them; else they are drawn from N(0, initializer_range²)
    with torch's global generator and listed in `model.new_weights`. head_dropout: None for the checkpoint's.
    Raises OSError if files cannot be had, ValueError if they cannot be used; each says what to do.
    """
    path = hub.find(name_or_dir, "config.json")
    if path is None:
        raise ValueError(f"{name_or_dir} has no config.json: give a folder or Hub name with a whole checkpoint")
    config = check_config(hub.read_json(path), path)
    config["cls_dropout" if config["model_type"] == "deberta-v2" else "classifier_dropout"] = (
        next(p for p in (head_dropout, config.get("cls_dropout"), config.get("classifier_dropout"),
                         config["hidden_dropout_prob"]) if p is not None))
    with torch.device("meta"):                             # shapes only; the tensors of the file become the weights
        model = SequenceClassifier(config, num_labels)
    weights = rename(read_weights(name_or_dir), model)
    state, problems, model.new_weights = {}, [], []
    head = HEAD[config["model_type"]]
    for key, empty in model.state_dict().items():
        if key in weights:
            tensor = weights.pop(key)
            if tensor.shape != empty.shape:
                problems.append(f"{key} is {tuple(tensor.shape)} in the file and {tuple(empty.shape)} by config.json"
                                + (f" and {num_labels} label(s): use a checkpoint without a head" if key.startswith("classifier") else ""))
            state[key] = tensor.float()
        elif any(part in head for part in key.split(".")):
            state[key] = torch.zeros(empty.shape)
            if key.endswith("weight"):
                state[key].normal_(std=config["initializer_range"])
            model.new_weights.append(key)
        else:
            problems.append(f"{key} is missing")
    problems += [f"{key} is not known" for key in weights if not re.match(LEFTOVERS[config["model_type"]], key)]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{name_or_dir} does not fit its config.json: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state, strict=True, assign=True)
    model.source = str(name_or_dir)
    return model


def check_config(raw, path):
    """config.json with the defaults filled in; ValueError that names every option this file does not implement."""
    kind = raw.get("model_type")
    if kind not in DEFAULTS:
        raise ValueError(f"{path}: model_type {kind!r} is not implemented, only {', '.join(DEFAULTS)}")
    c = COMMON | DEFAULTS[kind] | raw
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "max_position_embeddings")
    wrong = [f"{name} = {c.get(name)!r} (a size is needed)" for name in sizes
             if type(c.get(name)) is not int or c[name] < 1]
    if not wrong and c["hidden_size"] % c["num_attention_heads"]:
        wrong = ["hidden_size is no multiple of num_attention_heads"]
    need = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "is_decoder": (False,),
            "embedding_size": (None, c.get("hidden_size"))}
    if kind == "deberta-v2":
        if isinstance(c["pos_att_type"], str):             # "p2c|c2p" in the released files, a list in newer ones
            c["pos_att_type"] = [part.strip() for part in c["pos_att_type"].lower().split("|")]
        c["pos_att_type"] = sorted(c["pos_att_type"] or [])
        need |= {"relative_attention": (True,), "position_biased_input": (False,), "share_att_key": (True,),
                 "norm_rel_ebd": ("layer_norm",), "pos_att_type": (["c2p", "p2c"],), "conv_kernel_size": (0, None),
                 "max_relative_positions": (-1, 0, None, c["max_position_embeddings"]), "pooler_hidden_act": ("gelu",),
                 "pooler_hidden_size": (None, c.get("hidden_size"))}
        if type(c["position_buckets"]) is not int or not 2 <= c["position_buckets"] < 2 * c["max_position_embeddings"] - 2:
            wrong.append(f"position_buckets = {c['position_buckets']!r}")
    wrong += [f"{name} = {c.get(name)!r}" for name, allowed in need.items() if c.get(name) not in allowed]
    if wrong:
        raise ValueError(f"{path} asks for what is not implemented here: {'; '.join(wrong)}")
    return c


def read_weights(name_or_dir):
    """{key: tensor} of a checkpoint: safetensors or torch's .bin, whole or in shards, memory-mapped if possible."""
    for filename, read in (("model.safetensors", load_file), ("pytorch_model.bin", load_bin)):
        paths = [hub.find(name_or_dir, filename)]
        if paths == [None]:
            index = hub.find(name_or_dir, filename + ".index.json")
            if index is None:
                continue
            shards = hub.read_json(index).get("weight_map")
            shards = sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []
            paths = [hub.find(name_or_dir, shard) for shard in shards if Path(shard).name == shard]
            if None in paths or not paths or len(paths) < len(shards):
                raise ValueError(f"{index} names weight files that are not there: download them again")
        weights = {}
        for path in paths:
            try:
                weights |= read(path)
            except Exception as e:                         # whatever a damaged file makes its parser raise
                raise ValueError(f"{path} cannot be read as weights ({' '.join(str(e).split())[:150]}): "
                                 "download it again") from e
        if not all(isinstance(t, torch.Tensor) and t.is_floating_point() or k.endswith("position_ids")
                   for k, t in weights.items()):
            raise ValueError(f"{name_or_dir} holds other things than floating-point tensors: use a plain checkpoint")
        return weights
    raise ValueError(f"{name_or_dir} has neither model.safetensors nor pytorch_model.bin: give a whole checkpoint")


def load_bin(path):
    """A .bin is a pickle: read tensors only. Files from before torch 1.6 are no zip and cannot be mapped."""
    return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))


def rename(weights, model):
    """Old names and missing prefixes → the model's keys. {key: tensor}"""
    prefix, keys, renamed = PREFIX[model.config["model_type"]] + ".", set(model.state_dict()), {}
    for key, tensor in weights.items():
        key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key))
        bare = key not in keys and not key.startswith(prefix)
        if bare and (prefix + key in keys or re.match(LEFTOVERS[model.config["model_type"]], prefix + key)):
            key = prefix + key                             # a file of the encoder alone has no prefix
        if key in renamed:
            raise ValueError(f"{key} is in the checkpoint twice, with and without its prefix: use a plain checkpoint")
        renamed[key] = tensor
    return renamed


def save_pretrained(model, folder):
    """Write config.json, model.safetensors and the tokenizer's files, as transformers' Auto classes open them.

    Files are written beside and renamed. ValueError for a model that still has adapters (merge it first: no other
    software knows their keys); OSError if the folder cannot be written.
    """
    with torch.device("meta"):
        plain = SequenceClassifier(model.config, model.num_labels).state_dict().keys()
    state = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    if state.keys() != plain:
        raise ValueError(f"{min(state.keys() ^ plain)} is no plain weight: merge the adapters before saving")
    config = dict(model.config)
    if len(config.get("id2label") or {}) != model.num_labels:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(model.num_labels)}
    config["label2id"] = {label: int(i) for i, label in config["id2label"].items()}
    config["architectures"] = [{"deberta-v2": "DebertaV2", "roberta": "Roberta", "bert": "Bert"}[config["model_type"]]
                               + "ForSequenceClassification"]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "model.safetensors.tmp"
    save_file(state, beside, metadata={"format": "pt"})
    os.replace(beside, folder / "model.safetensors")
    files = {"config.json": json.dumps(config, indent=2, sort_keys=True).encode()}
    for name in TOKENIZER_FILES:
        path = hub.find(model.source, name, network=False)
        if path:
            files[name] = path.read_bytes()
    for name, content in files.items():
        (folder / (name + ".tmp")).write_bytes(content)
        os.replace(folder / (name + ".tmp"), folder / name)
