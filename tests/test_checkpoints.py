"""Tests of loading and saving: checkpoints as the Hub has them, and their heads.

Offline. Those that ask transformers are skipped without it. More damages: tests/test_fuzz.py.
    pytest tests/test_checkpoints.py        pytest -m slow tests/test_checkpoints.py      (memory)
"""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import model as M
from lora2 import add_lora2
from tests.checkpoints import (FAMILIES, HEAD, NARROW, ROBERTA_LARGE, V3_BASE, build, fill, keys_of, mixed,
                               rows, sized, skeleton, write)

pytestmark = pytest.mark.usefixtures("one_thread")
SAFE, BIN = "model.safetensors", "pytorch_model.bin"


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


# --- files -------------------------------------------------------------------------------------------------

@FAMILIES
def test_files_as_they_are(tmp_path, family):
    """Oracle: the weights that were written, in every file layout that the Hub has and with what wrappers put before
    each key, of a classifier and of an encoder alone; all end in fp32; numbers are drawn for a head alone."""
    weights, config = build(NARROW[family]).state_dict(), NARROW[family]
    body, half = pretraining(family, weights), cast(weights, torch.float16)
    strided = {key: t.mT.contiguous().mT if t.dim() == 2 else t for key, t in weights.items()}
    parameters = {key: nn.Parameter(t.clone()) for key, t in weights.items()}
    layouts = [("", *layout) for layout in [
        (weights, SAFE), (half, SAFE), (half, "legacy"), (old_names(weights), BIN), (body, BIN),
        (cast(weights, torch.bfloat16), SAFE), (cast(weights, torch.float64), BIN), (without_prefix(weights), SAFE),
        (without_prefix(body), SAFE), (old_names(pretraining(family, half)), BIN), (strided, BIN), (parameters, BIN)]]
    layouts += [(wrapper, content, SAFE) for wrapper in ("module.", "module._orig_mod.", "0.auto_model.")
                for content in (weights, without_prefix(old_names(weights)))]
    for i, (wrapper, content, file) in enumerate(layouts):
        wrapped = {f"{wrapper}{key}": t for key, t in content.items()}
        folder = write(tmp_path / str(i), config, wrapped, BIN if file == "legacy" else file)
        if file == "legacy":
            torch.save(wrapped, folder / BIN, _use_new_zipfile_serialization=False)
        before = torch.get_rng_state()
        loaded = M.from_pretrained(folder, 2)
        headless = not any(key.startswith("classifier") for key in content)
        new = [key for key in weights if headless and key.startswith(("classifier", "pooler"))]
        assert loaded.new_weights == new, i
        assert torch.equal(torch.get_rng_state(), before) == (not new), i
        stored = next(t.dtype for t in content.values() if t.dim() == 2)
        for key, t in loaded.state_dict().items():
            assert t.dtype == torch.float32 and not t.is_meta and t.is_contiguous(), (i, key)
            assert key in new or torch.equal(t, weights[key].to(stored).float()), (i, key)
        assert all(p.requires_grad for p in loaded.parameters()) and loaded.dropout.p == 0.1


@pytest.mark.parametrize("stem, kind", [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards(tmp_path, stem, kind):
    """Oracle: the unsharded weights; a shard that is missing, or named outside the folder, is an error."""
    weights = build(NARROW["bert"]).state_dict()
    names = [f"{stem}-0000{i + 1}-of-00003.{kind}" for i in range(3)]
    weight_map = {}
    for i, name in enumerate(names):
        part = dict(list(weights.items())[i::3])
        write(tmp_path, NARROW["bert"], part, name)
        weight_map |= dict.fromkeys(part, name)
    index = tmp_path / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = M.from_pretrained(tmp_path, 2).state_dict()
    assert all(torch.equal(loaded[key], t) for key, t in weights.items())
    outside = weight_map | {"bert.embeddings.LayerNorm.bias": f"../{tmp_path.name}/{names[0]}"}
    for content in ({"weight_map": outside}, {"weight_map": {}}, {"weight_map": [1]},
                    {"weight_map": weight_map | {"a": "gone"}}, {}, []):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="index.json (names weight files that are not there|does not hold)"):
            M.from_pretrained(tmp_path, 2)


@FAMILIES
def test_every_key_is_accounted_for(tmp_path, family):
    """Oracle: the key in the message. Missing, strange and misshapen weights, each of them alone."""
    weights, config = build(NARROW[family]).state_dict(), NARROW[family]
    bias, output = f"{family}.embeddings.LayerNorm.bias", f"{HEAD[family][1]}.weight"

    def refused(match, content, labels=2, config=config, file=SAFE):
        with pytest.raises(ValueError, match=match):
            M.from_pretrained(write(tmp_path / file, config, content, file), labels)

    for key in [*list(weights)[::6], *keys_of(*HEAD[family])]:
        others = {k: t for k, t in weights.items() if k != key}
        refused(f'does not fit .*Missing key.*"{key}"', others)
        refused(f"does not fit .*size mismatch for {key}", others | {key: torch.ones(2, 3, 5)})
    for key in ("foo.bar", f"{family}.encoder.layer.2.output.dense.weight", f"{family}.embeddings.extra",
                f"{family}.cls.weight", "lm_headless.weight", "classifier.x"):
        refused(f'does not fit .*Unexpected key.*"{key}"', weights | {key: torch.ones(2)})
    for damaged in (torch.ones(2, 25), torch.ones(2)):     # another number of labels is no damage
        refused(f"does not fit .*size mismatch for {output}", weights | {output: damaged}, labels=3)
    many = {f"module.strange.{i}": torch.ones(2) for i in range(9)}
    refused('Missing key.* and [0-9]+ more; Unexpected key "module.strange.0", "module.strange.1" and 7 more$',
            dict(list(weights.items())[:5]) | many)
    vast = sized(config, 10**6, 1, 40)                     # a new head for it would take 4 TB
    refused("does not fit .*size mismatch", pretraining(family, weights), config=vast)
    twice = weights | {"embeddings.LayerNorm.bias": torch.ones(24)}
    refused("embeddings.LayerNorm.bias of .* is there twice", twice)
    for strange in (torch.ones(24, dtype=torch.int8), "text", None):
        refused("LayerNorm.bias of .* is not a floating-point tensor", weights | {bias: strange}, file=BIN)


@pytest.mark.parametrize("file", [SAFE, BIN])
def test_a_loaded_model_and_its_file_are_apart(tmp_path, file):
    """Oracles: the system: no part of the file is mapped, so that neither changes with the other. And the weights: a
    model is saved over its own source."""
    folder = write(tmp_path, NARROW["bert"], build(NARROW["bert"]).state_dict(), file)
    model = fill(M.from_pretrained(folder, 2), seed=1)
    if Path("/proc/self/maps").exists():
        assert str(folder / file) not in Path("/proc/self/maps").read_text()
    M.save_pretrained(model, folder)
    saved = M.from_pretrained(folder, 2).state_dict()
    assert all(torch.equal(saved[key], t) for key, t in model.state_dict().items())


class Malice:
    def __reduce__(self):
        return os.system, (f"touch {Malice.victim}",)


def test_code_in_a_pickle_does_not_run(tmp_path):
    """Oracle: the file that the code would make. As a bare pickle and inside torch's own zip format."""
    Malice.victim = tmp_path / "ran"
    bare = pickle.dumps({"x": Malice()})
    write(tmp_path, NARROW["bert"], {"x": Malice()}, BIN)
    for content in ((tmp_path / BIN).read_bytes(), bare):
        (tmp_path / BIN).write_bytes(content)
        with pytest.raises(ValueError, match="pytorch_model.bin is damaged or .* can run code") as error:
            M.from_pretrained(tmp_path, 2)
        assert "\n" not in str(error.value) and not Malice.victim.exists()
    pickle.loads(bare)                                     # it is armed
    assert Malice.victim.exists()


def test_damaged_files_are_named(tmp_path):
    """Oracle: the message names, in one line, what is missing or damaged."""
    def refused(match):
        with pytest.raises(ValueError, match=match) as error:
            M.from_pretrained(tmp_path, 2)
        assert "\n" not in str(error.value)

    (tmp_path / "config.json").write_text(json.dumps(NARROW["bert"]))
    refused("has no model.safetensors and no pytorch_model.bin")
    for file in (BIN, SAFE):                               # the latter is read if both are there
        for content in (b"", b"PK\3\4", b"\x80\2}", b"\xff" * 99, b"\2" + b"\0" * 7 + b"{}\n" * 9):
            (tmp_path / file).write_bytes(content)
            refused(f"{file} is damaged or another kind of file")
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 10**5, b'{"a": ' + b"1" * 10**5 + b"}"):
        (tmp_path / "config.json").write_bytes(content)
        refused("config.json (is damaged|does not hold a JSON object)")


# --- heads -------------------------------------------------------------------------------------------------

NLI = ["entailment", "neutral", "contradiction"]


def named(names):
    """What config.json says of a head with these names."""
    return {"id2label": {str(i): name for i, name in enumerate(names)}} if names else {}


@pytest.mark.parametrize("says, order", [
    (named(["contradiction", "neutral", "entailment"]) | {"label2id": {"neutral": 1}}, [2, 1, 0]),
    (named(["ENTAILMENT", "Contradiction", "neutral"]), [0, 2, 1]),
    ({"label2id": {"neutral": 0, "entailment": 1, "contradiction": 2}}, [1, 0, 2]),
    ({}, None), (named(["LABEL_0", "LABEL_1", "LABEL_2"]), None), (named([0, 1, 2]), None)])
@FAMILIES
def test_labels_are_found_by_name(tmp_path, family, says, order, capsys):
    """Oracle: the head's rows, picked by hand: row i is of the label that the task calls i. Where the file does not
    name them (None), the head is taken as it is, aloud."""
    weights = build(NARROW[family], 3).state_dict()
    loaded = M.from_pretrained(write(tmp_path, NARROW[family] | says, weights), 3, labels=NLI)
    for key in keys_of(HEAD[family][1]):
        assert torch.equal(loaded.state_dict()[key], weights[key][order or [0, 1, 2]])
    assert loaded.new_weights == [] and loaded.config["id2label"] == {"0": NLI[0], "1": NLI[1], "2": NLI[2]}
    aloud = "does not say what its labels mean, they are taken to be entailment, neutral, contradiction"
    err = capsys.readouterr().err
    assert aloud in err if order is None else err == ""


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
    new = HEAD[family][1:] if rows or family == "bert" else HEAD[family]       # BERT pretrains its pooler
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
    if kind == "TokenClassification":                      # the missing pooler has to tell it
        (tmp_path / "config.json").write_text(json.dumps(NARROW[family]))
    ours = M.from_pretrained(tmp_path, labels, labels=["no", "yes"][:labels] if labels > 1 else ())
    assert set(ours.new_weights) >= set(keys_of(HEAD[family][1]))
    assert "left out" in capsys.readouterr().err
    expected = theirs.state_dict()
    for key, tensor in ours.state_dict().items():
        assert key in ours.new_weights or torch.equal(tensor, expected[key]), key


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


# --- saving ------------------------------------------------------------------------------------------------

# What a config.json says of another head, of other code, of another place.
OTHER = {"problem_type": "multi_label_classification", "id2label": {"0": "x"}, "label2id": {"x": 0}, "num_labels": 1,
         "auto_map": {"AutoModel": "x.Y"}, "_name_or_path": "/gone", "function_to_apply": "sigmoid",
         "sbert_ce_default_activation_function": "x", "finetuning_task": "sst2", "task_specific_params": {},
         "architectures": ["BertForMaskedLM"], "quantization_config": {}, "tokenizer_class": "BertTokenizer",
         "dtype": "float16", "torch_dtype": "float16"}


def saved(folder, family, labels):
    """A model from an encoder in fp16, whose config.json speaks of another head; and the folder it was saved in."""
    content = cast(pretraining(family, build(NARROW[family]).state_dict()), torch.float16)
    write(folder / "in", NARROW[family] | OTHER | {"hidden_dropout_prob": 0.3}, content)
    model = M.from_pretrained(folder / "in", max(1, len(labels)), head_dropout=0.05, labels=labels).eval()
    M.save_pretrained(model, folder / "out")
    return model, folder / "out"


@pytest.mark.parametrize("labels", [(), ("no", "yes"), ("a", "b", "c")])
@FAMILIES
def test_saved_folder_opens_here(tmp_path, family, labels):
    """Oracle: the same logits, bit for bit, and by hand: what config.json has to say to transformers of this head."""
    ours, out = saved(tmp_path, family, labels)
    again, batch = M.from_pretrained(out, max(1, len(labels))).eval(), rows(NARROW[family], mixed(30))
    assert torch.equal(again(*batch), ours(*batch)) and again.config[M.HEAD_DROPOUT[again.kind]] == 0.05
    assert sorted(path.name for path in out.iterdir()) == ["config.json", SAFE]
    written = json.loads((out / "config.json").read_text())
    names = list(labels or ["LABEL_0"])
    assert written["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert written["label2id"] == {name: i for i, name in enumerate(names)}
    assert written["problem_type"] == ("single_label_classification" if labels else "regression")
    assert written["architectures"] == [{"deberta": "DebertaV2", "roberta": "Roberta", "bert": "Bert"}[family]
                                        + "ForSequenceClassification"]
    assert written["torch_dtype"] == "float32" and written["hidden_dropout_prob"] == 0.3
    assert OTHER.keys() & written.keys() == {"problem_type", "id2label", "label2id", "architectures", "torch_dtype"}


def test_save_refuses_adapters(tmp_path):
    """Oracle: the keys of a plain model; nothing is written."""
    adapted, other, less = (build(NARROW["bert"]) for _ in range(3))
    add_lora2(adapted, M.target_modules(adapted, ["q"]), k=1, r=2)
    other.extra = nn.Parameter(torch.ones(1))
    less.classifier.bias = None
    for refused, key in ((adapted, "bert.encoder.layer.0.attention.self.query.*"), (other, "extra"),
                         (less, "classifier.bias")):
        with pytest.raises(ValueError, match=f"^{key} is no plain weight: merge the adapters before saving"):
            M.save_pretrained(refused, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- memory ------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
loaded = model.from_pretrained(sys.argv[1], 2)
for p in loaded.parameters():
    p.sum()                                  # every page is there
print((peak() - before) / sum(p.numel() * 4 for p in loaded.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("config, dtype, file", [(V3_BASE, torch.float16, BIN), (V3_BASE, torch.float16, SAFE),
                                                 (V3_BASE, torch.float32, SAFE), (ROBERTA_LARGE, torch.float32, SAFE)])
def test_peak_memory_while_loading(tmp_path, config, dtype, file):
    """Oracle: the process's peak resident size in a fresh interpreter, mapped pages of the file included."""
    model = skeleton(config, "meta")
    shapes = {key: t.shape for key, t in model.backbone.state_dict().items()}
    write(tmp_path, config, {key: torch.ones(shape, dtype=dtype) for key, shape in shapes.items()}, file)
    # A shell in between: a process's peak begins with the size of the one that started it, here a large one.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", MEASURE, str(tmp_path)]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, text=True, capture_output=True, check=True)
    assert 0.9 < float(run.stdout) <= 1.7
