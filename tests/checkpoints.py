"""What the tests of the model and its adapters share: published configurations, random weights, rows of text."""
import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as M
from methods import fast
from tests import make_golden

V3 = {  # as the released config.json files of DeBERTaV3 have it
    "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "max_position_embeddings": 512,
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1,
    "position_biased_input": False, "type_vocab_size": 0, "pooler_dropout": 0, "pooler_hidden_act": "gelu"}
ROBERTA = {
    "model_type": "roberta", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-5,
    "max_position_embeddings": 514, "pad_token_id": 1, "type_vocab_size": 1}
BERT = {"model_type": "bert", "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 0}
STILL = dict.fromkeys(make_golden.DROPOUT, 0.0)


def sized(config, d, heads, f, layers=2, vocab=300):
    return config | {"hidden_size": d, "num_attention_heads": heads, "intermediate_size": f,
                     "num_hidden_layers": layers, "vocab_size": vocab}


V3_BASE = sized(V3, 768, 12, 3072, layers=12, vocab=128100)
ROBERTA_LARGE = sized(ROBERTA, 1024, 16, 4096, layers=24, vocab=50265)
NARROW = {  # everything as published but the widths
    "deberta": sized(V3, 24, 3, 40), "roberta": sized(ROBERTA, 24, 3, 40), "bert": sized(BERT, 24, 3, 40)}
SIX = ["q", "k", "v", "o", "f1", "f2"]
HEAD = {  # family → the two layers of its head, from the encoder to the output
    "deberta": ["pooler.dense", "classifier"], "bert": ["bert.pooler.dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"]}
FAMILIES = pytest.mark.parametrize("family", list(NARROW))
FORMS = pytest.mark.parametrize("form", ["plain", "fast"])


def skeleton(config, device="cpu"):
    """A model of real shapes whose memory is reserved but never touched, or, on "meta", not even that."""
    with torch.device("meta"):
        model = M.SequenceClassifier(M.check_config(dict(config), "config.json"), 2)
    return model.to_empty(device=device)


def fill(model, seed=0):
    """Random weights for which every term matters: scores near 1, LayerNorms and biases not 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            size = 0.2 if p.dim() == 1 else 1 if "embeddings" in name else p.shape[1] ** -0.5
            p.normal_(generator=generator).mul_(size).add_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
    return model


def build(config, labels=2, seed=0):
    """A model of ours with random weights, without files."""
    return fill(M.SequenceClassifier(M.check_config(config, "config.json"), labels), seed).eval()


def formed(model, form):
    """The model itself, or a fast copy of it."""
    return fast.speed_up(copy.deepcopy(model)) if form == "fast" else model


def keys_of(*layers):
    """The keys of some layers' weights and biases."""
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def write(folder, config, weights, file="model.safetensors"):
    """A checkpoint folder with config.json and one weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file({key: t.contiguous() for key, t in weights.items()}, folder / file, metadata={"format": "pt"})
    return folder


def rows(config, lengths, seed=0, left=False):
    """Ids, mask, token types (B, max length) for rows of these lengths, padded at the end (or in front)."""
    generator = torch.Generator().manual_seed(seed)
    pad, T = config.get("pad_token_id", 0), max(lengths)
    mask = torch.stack([torch.arange(T) < n for n in lengths])
    mask = mask.flip(1) if left else mask
    ids = torch.randint(5, config["vocab_size"], mask.shape, generator=generator).masked_fill(~mask, pad)
    types = torch.randint(0, max(config["type_vocab_size"], 1), mask.shape, generator=generator)
    return ids, mask.long(), types


def mixed(T):
    """Lengths of rows for T tokens: full, a single token, and something between."""
    return [T, 1, (2 * T + 2) // 3]


def states(model, batch):
    """Hidden states after the embeddings and after each layer, and the logits."""
    found = []
    hooks = [module.register_forward_hook(lambda m, i, out: found.append(out))
             for module in (model.backbone.embeddings, *model.backbone.encoder.layer)]
    logits = model(*batch)
    for hook in hooks:
        hook.remove()
    return found, logits


def pair(hf, folder, config, labels=2):
    """The same random model twice: transformers' own, and ours loaded from the folder that it wrote."""
    config = hf.AutoConfig.for_model(**config, num_labels=labels)
    theirs = hf.AutoModelForSequenceClassification.from_config(config)
    fill(theirs).eval().save_pretrained(folder)
    ours = M.from_pretrained(folder, labels).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys() and ours.new_weights == []
    return theirs, ours


@torch.no_grad()
def differences(theirs, ours, batch):
    """Largest difference of the logits and of every hidden state at tokens, no padding, of either form."""
    ids, mask, types = batch
    real, pooled = mask.bool(), mask[:, 0].bool()          # with padding in front, the pooled first token is none
    expected = theirs(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
    found = []
    for form in ("plain", "fast"):
        hidden, logits = states(formed(ours, form), batch)
        assert len(hidden) == len(expected.hidden_states) and logits.shape == expected.logits.shape
        assert logits.isfinite().all() and all(h.isfinite().all() for h in hidden)
        found.append((logits - expected.logits).abs()[pooled].max().item())
        for a, b in zip(hidden, expected.hidden_states):
            found.append((a - b).abs()[real].max().item())
    return max(found)


class Operations(TorchDispatchMode):
    """All operations that reach torch's kernels, in `seen`: of each the function, and its result as a tensor on
    "meta" (or what else it is): to keep the result itself would make autograd copy it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        is_tensor = isinstance(out, torch.Tensor)
        self.seen.append((function, torch.empty_like(out, device="meta") if is_tensor else out))
        return out

    def casts(self):
        """The copies in another dtype."""
        return [out for function, out in self.seen if function is torch.ops.aten._to_copy.default]
