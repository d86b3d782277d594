"""DeBERTaV2/V3, RoBERTa and BERT with a classification head, written out; they load the Hub's checkpoints.

    model = from_pretrained("microsoft/deberta-v3-base", num_labels=2)      # a Hub name or a folder
    logits = model(input_ids, attention_mask, token_type_ids)               # (B, num_labels)

Shapes:  B rows · T tokens · d hidden size · H heads of size e = d / H.
Module names are the checkpoint's own: loading is one strict load_state_dict, and state_dict() has the keys of
transformers' ...ForSequenceClassification. The three families share all but embeddings, attention and head:

    tokens ─ embeddings ─┬─ attention ─ + ─ LayerNorm ─┬─ intermediate ─ output ─ + ─ LayerNorm ─ × layers
                         └──────────────┘              └──────────────────────────┘
"""
import functools
import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from formats import hub
from formats.config import HEAD_DROPOUT, check_config

ARCHITECTURE = {"deberta-v2": "DebertaV2", "roberta": "Roberta", "bert": "Bert"}
PREFIX = {"deberta-v2": "deberta", "roberta": "roberta", "bert": "bert"}
HEAD = r"(bert\.)?(pooler|classifier)\."    # keys that a pretraining checkpoint need not have
# Weights of the pretraining task and of unused parts that real files carry; every other key must be used.
LEFTOVERS = {
    "deberta-v2": r"(lm_predictions|mask_predictions|cls)\.|(deberta\.)?embeddings\.position_",
    "roberta": r"(lm_head|(roberta\.)?pooler)\.|(roberta\.)?embeddings\.position_ids",
    "bert": r"cls\.|(bert\.)?embeddings\.position_ids"}
# The six matrices of a layer: the paper's short names (Table 4) → the ends of their module names.
TARGETS = {kind: {"q": f"attention.self.{q}", "k": f"attention.self.{k}", "v": f"attention.self.{v}",
                  "o": "attention.output.dense", "f1": "intermediate.dense", "f2": "output.dense"}
           for kind, q, k, v in (("deberta-v2", "query_proj", "key_proj", "value_proj"),
                                 ("roberta", "query", "key", "value"), ("bert", "query", "key", "value"))}


# --- the blocks, bottom up ---------------------------------------------------------------------------------

class Dropout(nn.Dropout):
    """nn.Dropout, with cheaper randomness on a CPU: there most of its time goes into a Bernoulli number for
    each element, 6 % of a training step. 16 random bits take a quarter of that; p is rounded to 1 / 65,536.
    """

    def forward(self, x):
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (self.training and on_cpu and 0 < self.p < 1):
            return F.dropout(x, self.p, self.training)
        dropped = min(round(self.p * 2**16), 2**16 - 1)    # of the 65,536 numbers
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)      # 4 × 16 in each
        keep = bits.view(torch.int16)[:x.numel()].view(x.shape) >= dropped - 2**15
        keep = keep.view(torch.int8)                       # which becomes x's dtype twice as fast as a bool
        return (x * keep).mul_(2**16 / (2**16 - dropped))  # backward needs `keep` alone: a byte each


class Embeddings(nn.Module):
    """Sum of word, token-type and absolute position embeddings → LayerNorm → dropout: (B, T) → (B, T, d).

    DeBERTaV3 has only the word embeddings: order enters through its attention.
    """

    def __init__(self, c):
        super().__init__()
        self.pad, self.roberta = c["pad_token_id"], c["model_type"] == "roberta"
        self.word_embeddings = nn.Embedding(c["vocab_size"], c["hidden_size"], padding_idx=self.pad)
        self.position_embeddings = self.token_type_embeddings = None
        if c["model_type"] != "deberta-v2":
            unused = self.pad if self.roberta else None
            self.position_embeddings = nn.Embedding(c["max_position_embeddings"], c["hidden_size"], unused)
        if c["type_vocab_size"] > 0:
            self.token_type_embeddings = nn.Embedding(c["type_vocab_size"], c["hidden_size"])
        self.LayerNorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.dropout = Dropout(c["hidden_dropout_prob"])

    def forward(self, input_ids, token_type_ids):
        x = self.word_embeddings(input_ids)                                     # (B, T, d)
        if self.token_type_embeddings is not None:
            if token_type_ids is None or self.token_type_embeddings.num_embeddings == 1:
                token_type_ids = torch.zeros_like(input_ids)                    # RoBERTa has a single type
            x = x + self.token_type_embeddings(token_type_ids)
        if self.roberta:                           # real tokens count from pad + 1, padding stays at pad
            real = (input_ids != self.pad).long()
            x = x + self.position_embeddings(real.cumsum(1) * real + self.pad)
        elif self.position_embeddings is not None:
            x = x + self.position_embeddings.weight[:x.shape[1]]                # (T, d) for every row
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    """Softmax attention of BERT and RoBERTa: (B, T, d) → (B, T, d).

    mask (B, 1, 1, T) is added to the scores: 0 at tokens, the least number of its dtype at padding.
    positions: None; it is there for DeBERTa's sake.
    """

    def __init__(self, c):
        super().__init__()
        self.heads, self.dropout = c["num_attention_heads"], Dropout(c["attention_probs_dropout_prob"])
        self.query, self.key, self.value = (nn.Linear(c["hidden_size"], c["hidden_size"]) for _ in range(3))

    def forward(self, x, mask, positions):
        B, T, d = x.shape
        x = x.to(mask.dtype)                       # under autocast: one copy for all three, not one each
        q, k, v = (proj(x).view(B, T, self.heads, -1).transpose(1, 2)           # each (B, H, T, e)
                   for proj in (self.query, self.key, self.value))
        if self.training and x.device.type == "cpu":       # a bf16 step of 128 tokens is 1.2 times as fast so
            scores = ((q / math.sqrt(d // self.heads)) @ k.mT).add_(mask)       # (B, H, T, T)
            y = self.dropout(scores.softmax(-1, scores.dtype)) @ v              # (B, H, T, e)
        else:                                              # all in one: a GPU keeps no scores
            p = self.dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, mask, p)
        return y.transpose(1, 2).reshape(B, T, d)


class DisentangledSelfAttention(nn.Module):
    """DeBERTa's attention: content and relative position are kept apart and meet in three terms.

        score[i, j] = ( q_i · k_j  +  q_i · K_δ  +  k_j · Q_δ ) / sqrt(3e)           δ = bucket(i − j)
                        content    content→position  position→content

    K_δ and Q_δ are the key and query projections of row δ of a learned table of relative positions, by the
    very same matrices that project tokens (so that an adapter on them acts here too).

    x (B, T, d) → (B, T, d); mask (B, 1, 1, T) is added to the scores. positions: the table's rows that can
    occur, (R, d) after LayerNorm, and which of them the distances −(T−1) .. T−1 have, (2T−1,), or None if
    row w is distance w − (T−1): see relative_rows().

    A gather of q_i · K_δ over all i, j would need a (T, T) index per head and row. Instead both position
    products are made against the table in order of distance, (.., T, W) with W ≥ 2T − 1, and read along
    diagonals: one row down, the wanted column moves by one, a *view* with other strides: along_diagonals().
    """

    def __init__(self, c):
        super().__init__()
        self.heads, d = c["num_attention_heads"], c["hidden_size"]
        self.query_proj, self.key_proj, self.value_proj = (nn.Linear(d, d) for _ in range(3))
        self.pos_dropout = Dropout(c["hidden_dropout_prob"])
        self.dropout = Dropout(c["attention_probs_dropout_prob"])

    def split(self, x):
        """(..., d) → (H, ..., e): heads first, so that one product per head serves all rows of the batch."""
        return x.unflatten(-1, (self.heads, -1)).movedim(-2, 0)

    def forward(self, x, mask, positions):
        (B, T, d), H = x.shape, self.heads
        table, order = positions                                                # (R, d); (2T − 1,) or None
        x = x.to(mask.dtype)                       # under autocast: one copy for all three, not one each
        q, k, v = (self.split(proj(x)).contiguous()                             # each (H, B, T, e)
                   for proj in (self.query_proj, self.key_proj, self.value_proj))
        table = self.pos_dropout(table).to(mask.dtype)
        K, Q = (self.split(proj(table)) for proj in (self.key_proj, self.query_proj))        # each (H, R, e)
        scale = 1 / math.sqrt(3 * d / H)           # of all three terms, where it costs least; safe in fp16
        q, Q = q.mul_(scale), Q * scale
        if order is not None:                      # T > 132: several distances share a bucket
            K, Q = K.index_select(1, order), Q.index_select(1, order)       # (H, 2T−1, e): −(T−1) .. T−1
        K, Q = F.pad(K, (0, 0, 1, 0)), F.pad(Q, (0, 0, 0, 1))      # to W = 2T, which products are faster with
        c2p = torch.bmm(q.view(H, B * T, -1), K.flip(1).mT)                     # (H, B·T, W): T−1 .. −(T−1)
        p2c = torch.bmm(k.view(H, B * T, -1), Q.mT)                             # (H, B·T, W): −(T−1) .. T−1
        q, k, v = (t.view(H * B, T, -1) for t in (q, k, v))
        scores = along_diagonals(c2p, T) + mask.expand(B, H, 1, T).transpose(0, 1).reshape(H * B, 1, T)
        scores.add_(along_diagonals(p2c, T).mT).baddbmm_(q, k.mT)               # (H·B, T, T), in place
        y = torch.bmm(self.dropout(scores.softmax(-1, scores.dtype)), v)        # (H·B, T, e)
        return y.view(H, B, T, -1).permute(1, 2, 0, 3).reshape(B, T, d)


def along_diagonals(S, T):
    """View of S (H, B·T, W), W ≥ 2T−1, as (H·B, T, T) with [h·B + b, i, j] = S[h, b·T + i, T − 1 − i + j].

    Row i begins one column further left than row i − 1: in memory that is a step of W − 1 instead of W.
    No index tensor, no copy; the backward pass is a strided copy, deterministic where a scatter is not.
    """
    n, W = S.shape[0] * S.shape[1] // T, S.shape[2]
    return S.as_strided((n, T, T), (T * W, W - 1, 1), T - 1)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)                       # a plan first made while evaluating serves training too
def relative_rows(T, buckets, max_position, device):
    """Which rows of the relative-position table T tokens need: (first, last + 1, order or None).

    Distances up to buckets/2 have a row each; longer ones share rows in log-sized buckets up to max_position,
    which gives far words a coarser ruler. With the usual 256 buckets and 512 positions
        bucket(140) = 128 + ceil( ln(140 / 128) / ln(511 / 128) · 127 ) = 128 + ceil(8.2) = 137
        0 → 0     1 → 1     128 → 128     129 → 129     300 → 207     511 → 255     −300 → −207
    and bucket b is row 256 + b. `order` (2T − 1,) lists the row within the slice for distances −(T−1) .. T−1;
    None while each distance has a row of its own. Formula and float32 rounding are the DeBERTa release's.
    """
    distance = torch.arange(-(T - 1), T, device="cpu")                          # (W,)
    mid = buckets // 2
    magnitude = distance.abs().clamp(min=mid).float()
    log_size = torch.log(magnitude / mid) / torch.log(torch.tensor((max_position - 1) / mid))  # 0 .. 1
    far = (torch.ceil(log_size * (mid - 1)) + mid) * distance.sign()
    bucket = torch.where(distance.abs() <= mid, distance, far.long())
    rows = bucket + buckets                                                     # 1 .. 2·buckets − 1
    first, last = rows[0].item(), rows[-1].item()
    order = None if last - first == 2 * T - 2 else (rows - first).to(device)
    return first, last + 1, order


class Output(nn.Module):
    """dense → dropout → add residual → LayerNorm: ends both halves of a layer. (B, T, d_in) → (B, T, d)."""

    def __init__(self, d_in, c):
        super().__init__()
        self.dense = nn.Linear(d_in, c["hidden_size"])
        self.LayerNorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.dropout = Dropout(c["hidden_dropout_prob"])

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    """One transformer layer, post-norm: (B, T, d) → (B, T, d). The nesting of names is the checkpoints'."""

    def __init__(self, c):
        super().__init__()
        self.attention = nn.Module()
        disentangled = c["model_type"] == "deberta-v2"
        self.attention.self = DisentangledSelfAttention(c) if disentangled else SelfAttention(c)
        self.attention.output = Output(c["hidden_size"], c)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(c["hidden_size"], c["intermediate_size"])
        self.output = Output(c["intermediate_size"], c)

    def forward(self, x, mask, positions):
        x = self.attention.output(self.attention.self(x, mask, positions), x)   # (B, T, d)
        return self.output(F.gelu(self.intermediate.dense(x)), x)               # (B, T, d), inside (B, T, f)


class Encoder(nn.Module):
    """The layers and, for DeBERTa, the table of relative positions they share: (B, T, d) → (B, T, d)."""

    def __init__(self, c):
        super().__init__()
        self.layer = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.rel_embeddings = None
        if c["model_type"] == "deberta-v2":
            self.buckets, self.max_position = c["position_buckets"], c["max_position_embeddings"]
            self.rel_embeddings = nn.Embedding(2 * self.buckets, c["hidden_size"])
            self.LayerNorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])

    def forward(self, x, attention_mask):
        positions = None
        if self.rel_embeddings is not None:        # one plan and the same normalised rows for all layers
            first, end, order = relative_rows(x.shape[1], self.buckets, self.max_position, x.device)
            positions = self.LayerNorm(self.rel_embeddings.weight[first:end]), order
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        mask = torch.zeros(attention_mask.shape, dtype=dtype, device=x.device)  # added to the scores
        mask = mask.masked_fill(~attention_mask.bool(), torch.finfo(dtype).min)[:, None, None]
        for layer in self.layer:
            x = layer(x, mask, positions)
        return x


class Pooler(nn.Module):
    """First token → dropout → dense → activation: (B, T, d) → (B, d)."""

    def __init__(self, c, dropout, activation):
        super().__init__()
        self.dense = nn.Linear(c["hidden_size"], c["hidden_size"])
        self.dropout, self.activation = Dropout(dropout), activation

    def forward(self, x):
        return self.activation(self.dense(self.dropout(x[:, 0])))


class RobertaHead(Pooler):
    """RoBERTa's pooler and the matrix after it, the same dropout before both: (B, T, d) → (B, num_labels)."""

    def __init__(self, c, num_labels):
        super().__init__(c, c["classifier_dropout"], torch.tanh)
        self.out_proj = nn.Linear(c["hidden_size"], num_labels)

    def forward(self, x):
        return self.out_proj(self.dropout(super().forward(x)))                  # (B, num_labels)


class SequenceClassifier(nn.Module):
    """Encoder and head, with random weights, in torch's default dtype; from_pretrained() has a checkpoint's.

    config: a dict as check_config() returns it, a checkpoint's config.json with absent options filled in.
    num_labels: classes, or 1 for a score.
    """

    def __init__(self, config, num_labels):
        super().__init__()
        self.config, self.num_labels = config, num_labels
        kind, backbone = config["model_type"], nn.Module()
        backbone.embeddings, backbone.encoder = Embeddings(config), Encoder(config)
        setattr(self, PREFIX[kind], backbone)
        if kind == "roberta":
            self.classifier = RobertaHead(config, num_labels)
            return
        if kind == "deberta-v2":
            self.pooler = Pooler(config, config["pooler_dropout"], F.gelu)
        else:
            backbone.pooler = Pooler(config, 0.0, torch.tanh)
        self.dropout = Dropout(config[HEAD_DROPOUT[kind]])
        self.classifier = nn.Linear(config["hidden_size"], num_labels)

    @property
    def backbone(self):
        """All but the head: embeddings and encoder (BERT: and pooler), under the checkpoint's own name."""
        return getattr(self, PREFIX[self.config["model_type"]])

    @property
    def max_len(self):
        """Longest input in tokens. RoBERTa's first position is pad + 1, so its 514 rows are 512 tokens."""
        c = self.config
        return c["max_position_embeddings"] - (c["pad_token_id"] + 1 if c["model_type"] == "roberta" else 0)

    def encode(self, input_ids, attention_mask, token_type_ids=None):
        """Token ids (B, T), mask (B, T; 0 or False = padding), types (B, T; None: all 0) → states (B, T, d).

        ValueError if T is more than the model has positions for.
        """
        if input_ids.shape[1] > self.max_len:
            raise ValueError(f"{input_ids.shape[1]} tokens, but the model has positions for {self.max_len}: "
                             "shorten the input")
        return self.backbone.encoder(self.backbone.embeddings(input_ids, token_type_ids), attention_mask)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """The arguments of encode() → logits (B, num_labels), in the weights' dtype or autocast's."""
        x = self.encode(input_ids, attention_mask, token_type_ids)
        if self.config["model_type"] == "roberta":
            return self.classifier(x)
        pooler = self.pooler if self.config["model_type"] == "deberta-v2" else self.backbone.pooler
        return self.classifier(self.dropout(pooler(x)))


def target_modules(model, names):
    """Dotted names of the modules behind the paper's short names, in all layers, e.g. for ["q", "f2"].

    names: some of q, k, v, o (attention), f1 and f2 (feed-forward); ValueError for others, and for none.
    """
    kind = model.config["model_type"]
    unknown = [name for name in names if name not in TARGETS[kind]]
    if unknown or not names:
        raise ValueError(f"unknown target {', '.join(unknown) or 'list (empty)'}: "
                         f"give some of {','.join(TARGETS[kind])}")
    return [f"{PREFIX[kind]}.encoder.layer.{i}.{end}" for i in range(model.config["num_hidden_layers"])
            for name, end in TARGETS[kind].items() if name in names]


# --- loading and saving ------------------------------------------------------------------------------------

def from_pretrained(name_or_dir, num_labels, head_dropout=None):
    """Build the model that a checkpoint (Hub name or folder) describes and load its weights, in fp32.

    Every weight of the backbone must be there, and every weight in the file must be used or be a known
    leftover of pretraining. Head weights come from the file if it has them; else they are drawn from
    N(0, initializer_range²) with torch's global generator and listed in `model.new_weights`. head_dropout:
    None for the checkpoint's. Raises OSError if files cannot be had, ValueError if they cannot be used.
    Also of the model: .config (dict), .source (name_or_dir), .max_len (in tokens).
    """
    path = hub.find(name_or_dir, "config.json")
    if path is None:
        raise ValueError(f"{name_or_dir} has no config.json: give a whole checkpoint, a folder or a Hub name")
    config = check_config(hub.read_json(path), path)
    if head_dropout is not None:
        config[HEAD_DROPOUT[config["model_type"]]] = head_dropout
    model = skeleton(config, num_labels)           # the tensors of the file become its weights
    model.source, shapes = str(name_or_dir), model.state_dict()
    weights = convert(hub.read_weights(name_or_dir), model)
    loaded = {key.rpartition(".")[0] for key in weights}   # modules
    new = {key: shapes[key] for key in shapes if re.match(HEAD, key) and key.rpartition(".")[0] not in loaded}
    try:
        model.load_state_dict(weights | new, strict=True, assign=True)
    except RuntimeError as e:                      # lists all that is missing, unexpected or of another shape
        raise ValueError(f"{name_or_dir} does not fit its config.json and {num_labels} label(s), give a "
                         f"checkpoint that does: {hub.one_line(e, 600)}") from e
    for module in dict.fromkeys(key.rpartition(".")[0] for key in new):
        linear = model.get_submodule(module).to_empty(device="cpu")
        nn.init.normal_(linear.weight, std=config["initializer_range"])
        nn.init.zeros_(linear.bias)
    model.new_weights = list(new)
    return model


class SkipInit(TorchFunctionMode):
    """Within it modules are made without random numbers, which on the meta device cost 2 s of imports."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_init = getattr(function, "__module__", None) == "torch.nn.init"
        return None if is_init else function(*args, **(kwargs or {}))


def skeleton(config, num_labels):
    """The model without numbers: only its shapes, on the meta device."""
    with torch.device("meta"), SkipInit():
        return SequenceClassifier(config, num_labels)


def convert(weights, model):
    """{a file's key: tensor} → {the model's key: fp32 tensor}, without the leftovers of pretraining.

    A file of the encoder alone has no prefix; in the oldest files a LayerNorm has gamma and beta.
    """
    kind, known, converted = model.config["model_type"], model.state_dict().keys(), {}
    for name, tensor in weights.items():
        key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", str(name))
        key = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
        key = f"{PREFIX[kind]}.{key}" if f"{PREFIX[kind]}.{key}" in known else key
        if key not in known and re.match(LEFTOVERS[kind], key):
            continue
        if key in converted or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            fault = "there twice" if key in converted else "not a floating-point tensor"
            raise ValueError(f"{key} of {model.source} is {fault}: use a plain checkpoint")
        converted[key] = tensor.float().contiguous()
    return converted


def save_pretrained(model, folder):
    """Write config.json, model.safetensors and the tokenizer's files for transformers' Auto classes to open.

    ValueError for a model that still has adapters (merge it first: no other software knows their keys);
    OSError if the folder cannot be written.
    """
    plain = skeleton(model.config, model.num_labels).state_dict().keys()
    state = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    if state.keys() != plain:
        raise ValueError(f"{min(state.keys() ^ plain)} is no plain weight: merge the adapters before saving")
    labels = model.config.get("id2label")
    if not isinstance(labels, dict) or labels.keys() != {str(i) for i in range(model.num_labels)}:
        labels = {str(i): f"LABEL_{i}" for i in range(model.num_labels)}       # not this head's
    config = {name: value for name, value in model.config.items() if name not in ("num_labels", "dtype")} | {
        "id2label": labels, "label2id": {str(label): int(i) for i, label in labels.items()},
        "architectures": [ARCHITECTURE[model.config["model_type"]] + "ForSequenceClassification"],
        "torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch.")}
    hub.write_checkpoint(folder, config, state, tokenizer_of=model.source)


# STUBS
def in_head(name, head):
    return not set(head).isdisjoint(name.split("."))
def _head(self):
    parts = {part for name, _ in self.named_parameters() for part in name.split(".")}
    return [part for part in ("pooler", "classifier") if part in parts]
SequenceClassifier.head = property(_head)
def place_of(name):
    layer = int(next(part for part in name.split(".") if part.isdigit()))
    ends = {s: e for t in TARGETS.values() for s, e in t.items() if name.endswith("." + e)}
    return max(ends, key=lambda s: len(ends[s])), layer
