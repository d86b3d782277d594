"""Makes tests/data/golden_model.json: what transformers computes for tiny models whose weights are a formula.

    python tests/make_golden.py

With it, plain pytest compares model.py with transformers where transformers is not installed. Weights need no
file: formula_weights() gives the same numbers everywhere. All values are computed in float64.
"""
import contextlib
import json
import math
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

GOLDEN = Path(__file__).parent / "data" / "golden_model.json"
DROPOUT = {"hidden_dropout_prob": 0.11, "attention_probs_dropout_prob": 0.23, "pooler_dropout": 0.07,
           "cls_dropout": 0.31, "classifier_dropout": 0.31}
TINY = DROPOUT | {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "intermediate_size": 24}
DEBERTA = TINY | {"model_type": "deberta-v2", "type_vocab_size": 0, "relative_attention": True,
                  "position_buckets": 8, "max_position_embeddings": 64, "norm_rel_ebd": "layer_norm",
                  "share_att_key": True, "pos_att_type": "p2c|c2p", "max_relative_positions": -1,
                  "position_biased_input": False}
# name: (config.json, labels, lengths of the rows)
CASES = {
    "deberta short": (DEBERTA, 2, [5, 3, 1]),                      # every distance has a row of its own
    "deberta long": (DEBERTA, 3, [64, 17, 40]),                    # log-sized buckets up to the last one
    "deberta token types": (DEBERTA | {"type_vocab_size": 2, "layer_norm_eps": 1e-5}, 1, [9, 6]),
    "roberta": (TINY | {"model_type": "roberta", "type_vocab_size": 1, "max_position_embeddings": 34,
                        "layer_norm_eps": 1e-5}, 2, [32, 2, 11]),
    "bert": (TINY | {"model_type": "bert"}, 1, [13, 8, 1]),
}


def formula_weights(shapes):
    """{key: shape} → {key: float64 tensor} of sines, as large as trained weights, no two rows alike."""
    weights = {}
    for key, shape in sorted(shapes.items()):
        n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
        wave = torch.sin(n * 1.7 + n * n * 0.013 + zlib.crc32(key.encode()) % 1000)
        size = 0.4 if len(shape) == 2 else 0.2
        weights[key] = wave * size + (1.0 if key.endswith("LayerNorm.weight") else 0.0)
    return weights


def inputs(config, lengths):
    """Ids, mask and token types (B, T); rows are padded at the end."""
    pad, n = 1 if config["model_type"] == "roberta" else 0, max(lengths)
    ids, mask = torch.full((len(lengths), n), pad), torch.zeros(len(lengths), n, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = 2 + (torch.arange(length) ** 2 * 7 + 5 * row) % 61
        mask[row, :length] = 1
    ids[0, 3] = pad                              # attended to: its embedding gets no gradient all the same
    types = mask * (torch.arange(n) >= 4) if config.get("type_vocab_size", 2) > 1 else torch.zeros_like(ids)
    return ids, mask, types


@contextlib.contextmanager
def visible_dropout():
    """Dropout that can be compared: instead of noise a fixed factor for each column, which depends on p.

    Yields the list of its places, (p, number of columns). Attention gets it where the documentation of
    F.scaled_dot_product_attention puts it.
    """
    places, dropout, attention = [], F.dropout, F.scaled_dot_product_attention

    def visible(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        places.append((p, x.shape[-1]))
        return x * (1 + p * torch.cos(torch.arange(x.shape[-1], dtype=x.dtype) * 3 + p))

    def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, **_):
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + (0 if attn_mask is None else attn_mask)
        return visible(scores.softmax(-1), dropout_p, dropout_p > 0) @ v

    F.dropout, F.scaled_dot_product_attention = visible, plain_attention
    try:
        yield places
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attention


def sample(states):
    """Of hidden states [(B, T, d), ...]: four numbers of every seventh token."""
    return [state[:, ::7, :4].tolist() for state in states]


def main():
    import transformers
    from transformers.models.deberta_v2 import modeling_deberta_v2
    # transformers rounds this square root to float32, the one thing in its float64 models that is not float64
    modeling_deberta_v2.scaled_size_sqrt = lambda q, factor: torch.tensor(q.size(-1) * factor).double().sqrt()
    golden = {"transformers": transformers.__version__, "cases": {}}
    for name, (config, labels, lengths) in CASES.items():
        made = transformers.AutoConfig.for_model(**config, num_labels=labels)
        model = transformers.AutoModelForSequenceClassification.from_config(made).double().eval()
        model.load_state_dict(formula_weights({key: t.shape for key, t in model.state_dict().items()}))
        ids, mask, types = inputs(config, lengths)
        with visible_dropout():
            row = [t[:1, :lengths[0]] for t in (ids, mask, types)]
            trained = model.train()(row[0], attention_mask=row[1].double(), token_type_ids=row[2]).logits
        out = model.eval()(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
        out.logits.square().sum().backward()
        real = mask[..., None].bool()
        golden["cases"][name] = {
            "logits": out.logits.tolist(), "training logits": trained.tolist(),
            "hidden": sample([state.masked_fill(~real, 0) for state in out.hidden_states]),
            "gradients": {key: p.grad.norm().item() for key, p in model.named_parameters()},
        }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
