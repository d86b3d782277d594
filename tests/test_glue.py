"""Tests of formats/glue.py and of the table of tasks. Each docstring names its oracle.

Real GLUE files are used where shared/glue is there.
"""
import csv
import io
from collections import Counter
from pathlib import Path

import pytest
import torch

import data
from data import TASKS
from formats import glue
from formats.glue import Split

GLUE = Path(__file__).parents[2] / "shared" / "glue"
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason="the real GLUE files are not here")

# The header lines of the official files, written down from the GLUE archives (not taken from data.py).
HEADERS = {"sst2": "sentence label", "qqp": "id qid1 qid2 question1 question2 is_duplicate",
           "qnli": "index question sentence label", "rte": "index sentence1 sentence2 label",
           "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
           "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
                   "sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label"}


def write(path, rows, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(row) + end for row in rows).encode())
    return path


def own_task(path):
    return data.Task("", {}, **glue.read_columns(path))


def refusal(kind, call, *args, **kwargs):
    """The one-line message of the error that a call must raise."""
    with pytest.raises(kind) as info:
        call(*args, **kwargs)
    message = str(info.value)
    assert message and "\n" not in message and len(message) < 900, message
    return message


# ---- the table and real files ------------------------------------------------------------------------------

@needs_glue
@pytest.mark.parametrize("name, train, dev, test", [("cola", 8551, 1043, 1063), ("mrpc", 3667, 408, 1725),
                                                    ("rte", 2490, 277, 3000), ("stsb", 5749, 1500, 1379)])
def test_real_files(name, train, dev, test, capsys):
    """Oracle: the official row counts; csv without quoting, columns counted by hand, for the contents.

    The MRPC train.tsv here is one that the old script made, with 3,667 rows: it must load with a warning.
    """
    splits = data.load_task(name, GLUE)
    splits["test"] = glue.load_split(TASKS[name], GLUE, "test", labelled=False)
    assert {key: len(s.texts) for key, s in splits.items()} == {"train": train, "dev": dev, "test": test}
    assert splits["test"].labels is None
    warned, lost = capsys.readouterr().err, "3667 rows where the official split has 3668"
    assert warned.count("warning") == (lost in warned) == (name == "mrpc")
    texts, label = {"cola": ([3], 1), "mrpc": ([3, 4], 0), "rte": ([1, 2], 3), "stsb": ([7, 8], 9)}[name]
    says = {"cola": int, "mrpc": int, "stsb": float, "rte": ["entailment", "not_entailment"].index}[name]
    for split in ("train", "dev"):
        with open(GLUE / TASKS[name].folder / f"{split}.tsv", encoding="utf-8-sig", newline="\n") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[name != "cola":]
        assert splits[split].texts == [tuple(row[i] for i in texts) for row in rows]
        assert splits[split].labels == [says(row[label]) for row in rows]


@needs_glue
def test_mrpc_from_its_originals(tmp_path, capsys):
    """Oracle: the official dev.tsv and test.tsv, row for row; train.tsv but for the row its script lost."""
    folder = tmp_path / "MRPC"
    folder.mkdir()
    for file in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv"):
        (folder / file).symlink_to(GLUE / "MRPC" / file)
    made, official = data.load_task("mrpc", tmp_path), data.load_task("mrpc", GLUE)
    assert "msr_paraphrase" not in capsys.readouterr().err and len(made["train"].texts) == 3668
    assert made["dev"] == official["dev"]
    rows, fewer = (list(zip(*split)) for split in (made["train"], official["train"]))
    (lost,) = Counter(rows) - Counter(fewer)
    rows.remove(lost)
    assert rows == fewer
    tests = [glue.load_split(TASKS["mrpc"], place, "test", labelled=False) for place in (tmp_path, GLUE)]
    assert tests[0] == tests[1]
    # with both there, train.tsv wins
    write(folder / "train.tsv", [("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("1", "7", "8", "x", "y")])
    assert data.load_task("mrpc", tmp_path)["train"] == Split([("x", "y")], [1])
    (folder / "dev_ids.tsv").unlink()
    assert "dev_ids.tsv" in refusal(FileNotFoundError, data.load_task, "mrpc", tmp_path)
    write(folder / "dev_ids.tsv", [("no", "such")])
    assert "dev_ids.tsv" in refusal(ValueError, glue.load_split, TASKS["mrpc"], tmp_path, "dev")


@pytest.mark.parametrize("name", HEADERS)
def test_official_columns(name, tmp_path):
    """Oracle: files with the official header lines, whose fields say which column they are."""
    header = HEADERS[name].split()
    for i, label in enumerate(TASKS[name].labels or ["0.000", "2.5", "5"]):
        row = [f"<{column}>" for column in header[:-1]] + [label]  # the label is the last column everywhere
        split = glue.read_split(write(tmp_path / "x.tsv", [header, row]), TASKS[name])
        texts = {"sst2": ["sentence"], "qqp": ["question1", "question2"], "qnli": ["question", "sentence"]}
        assert split.texts == [tuple(f"<{t}>" for t in texts.get(name, ["sentence1", "sentence2"]))]
        assert split.labels == [i if TASKS[name].labels else float(label)]
        unlabelled = write(tmp_path / "x.tsv", [header[:-1], row[:-1]])
        assert glue.read_split(unlabelled, TASKS[name], labelled=False) == Split(split.texts, None)
        assert f"{unlabelled}:1" in refusal(ValueError, glue.read_split, unlabelled, TASKS[name])
    names = {"mnli": ("entailment", "neutral", "contradiction"), "stsb": ()}
    names["qnli"] = names["rte"] = ("entailment", "not_entailment")
    assert TASKS[name].labels == names.get(name, ("0", "1"))


def test_task_table():
    """Oracle: the counts, metrics and file names of the GLUE paper and site, as one line a task."""
    facts = {name: (t.folder, list(t.rows.values()), t.metrics, list(t.submissions.values()), t.damaged)
             for name, t in TASKS.items()}
    a = ("accuracy",)
    assert facts == {
        "cola": ("CoLA", [8551, 1043, 1063], ("matthews",), ["CoLA.tsv"], False),
        "sst2": ("SST-2", [67349, 872, 1821], a, ["SST-2.tsv"], False),
        "mrpc": ("MRPC", [3668, 408, 1725], ("accuracy", "f1"), ["MRPC.tsv"], False),
        "qqp": ("QQP", [363846, 40430, 390965], ("accuracy", "f1"), ["QQP.tsv"], True),
        "stsb": ("STS-B", [5749, 1500, 1379], ("pearson", "spearman"), ["STS-B.tsv"], False),
        "mnli": ("MNLI", [392702, 9815, 9832, 9796, 9847], a, ["MNLI-m.tsv", "MNLI-mm.tsv"], False),
        "qnli": ("QNLI", [104743, 5463, 5463], a, ["QNLI.tsv"], False),
        "rte": ("RTE", [2490, 277, 3000], a, ["RTE.tsv"], False),
        "demo": ("demo", [2000, 1000], a, [], False)}
    assert [key for key in TASKS["mnli"].rows if "dev" in key] == ["dev_matched", "dev_mismatched"]


# ---- reading: what may be odd and what is refused ----------------------------------------------------------

def test_odd_but_legal_text(tmp_path):
    """Oracle: the strings that were written: separators of other standards, quotes, byte order mark, CRLF."""
    odd = "a\u2028b\x85c\x0bd\x0ce\x1cf \"g\r h 'i"
    rows = [("index", "sentence1", "sentence2", "label"), ("0", odd, '"', "entailment"),
            ("1", "", '""x', "not_entailment")]
    for end in ("\n", "\r\n"):
        path = write(tmp_path / "x.tsv", rows, end)
        plain = path.read_bytes()
        for content in (plain, b"\xef\xbb\xbf" + plain, plain + end.encode() * 3, plain[:-len(end)]):
            path.write_bytes(content)
            assert glue.read_split(path, TASKS["rte"]) == Split([(odd, '"'), ("", '""x')], [0, 1])


@pytest.mark.parametrize("content, line, says", [
    (b"", 1, "empty"), (b"\n\r\n\n", 1, "empty"), (b"index\tsentence1\tsentence2\tlabel\n", 1, "no row"),
    (b"index\tsentence1\tlabel\n0\ta\tentailment\n", 1, "no column named 'sentence2'"),
    (b"sentence1\tsentence2\tlabel\tlabel\na\tb\tc\td\n", 1, "more than one column named 'label'"),
    (b"sentence1\tsentence2\tlabel\na\tb\tentailment\na\tb\n", 3, "2 tab-separated columns where 3"),
    (b"sentence1\tsentence2\tlabel\na\tb\tentailment\n\na\tb\tentailment\n", 3, "1 tab-separated columns"),
    (b"sentence1\tsentence2\tlabel\na\tb\tneutral\n", 2, "'neutral' where one of 'entailment', 'not_"),
    (b"sentence1\tsentence2\tlabel\na\tb\tentailment\na\t\0b\tentailment\n", 3, "not UTF-8"),
    (b"sentence1\tsentence2\tlabel\na\tb\tentailment\na\t\xe9b\tentailment\n", 3, "UTF-8"),
    (b"sentence1\tsentence2\tlabel\na\tb\tentailment\r\r\n", 2, "the label is 'entailment\\r' where"),
    (b"sentence1\tsentence2\tlabel\na\tb\t-\n", 2, "the label is '-' where"),      # as raw MNLI and SNLI have it
    ("sentence1\tsentence2\tlabel\n".encode("utf-16"), 1, "UTF-8")])
def test_bad_files(content, line, says, tmp_path):
    """Oracle: the line that was spoilt."""
    path = tmp_path / "x.tsv"
    path.write_bytes(content)
    message = refusal(ValueError, glue.read_split, path, TASKS["rte"])
    assert message.startswith(f"{path}:{line}: ") and says in message


def test_empty_lines_at_the_end(tmp_path, capsys):
    """Oracle: the file: with a single column each empty line could be a row, and the count would be another; the last
    ones are none, and that is said. One in between is a row."""
    path, task = tmp_path / "x.tsv", data.Task("", {}, ("sentence",), "label", ("a", "b"))
    for content, rows, says in (("sentence\nx\n\ny\n", 3, ""), ("sentence\nx\n\n\r\n", 1, "2 empty line(s)"),
                                ("sentence\tlabel\nx\ta\n\n", 1, "")):
        path.write_text(content, newline="")
        assert len(glue.read_split(path, task, labelled=False).texts) == rows
        said = capsys.readouterr().err
        assert says in said and bool(says) == bool(said)


def test_bad_scores(tmp_path):
    """Oracle: STS-B's range, 0 to 5, and decimal numbers as C reads them: float() takes more."""
    header = HEADERS["stsb"].split()
    for score in ("", "five", "nan", "inf", "-0.1", "5.001", "4,5", "0_1.5", "\u0664", "\uff14.2", "0x1p0"):
        path = write(tmp_path / "x.tsv", [header, ["0"] * 9 + ["4.2"], ["0"] * 9 + [score]])
        message = refusal(ValueError, glue.read_split, path, TASKS["stsb"])
        assert message == f"{path}:3: the score is {score!r} where a number from 0 to 5 is expected"


def test_only_damaged_files_skip_rows(tmp_path, capsys):
    """Oracle: the limit of 0.1 %: of 2,000 rows two may be skipped, and are counted; a third is refused."""
    header = HEADERS["qqp"].split()

    def qqp(bad):
        good = [["0", "1", "2", "a", "b", "1"]] * (2000 - bad)
        kinds = [["0", "1", "2", "a"], ["0"] * 6 + ["x"], ["x"] * 6]  # too few, too many, no such label
        return write(tmp_path / "x.tsv", [header] + kinds[:bad] + good)

    assert len(glue.read_split(qqp(2), TASKS["qqp"]).texts) == 1998
    assert "skipped 2 damaged rows of 2000" in capsys.readouterr().err
    assert "x.tsv:4: the label is 'x'" in refusal(ValueError, glue.read_split, qqp(3), TASKS["qqp"])
    # without one of its rows a submission would be shifted
    assert "x.tsv:2" in refusal(ValueError, glue.read_split, qqp(1), TASKS["qqp"], labelled=False)


def test_row_counts_warn(tmp_path, capsys):
    """Oracle: the official counts; of QQP, whose copies differ, only a gap of more than 0.1 % is told."""
    write(tmp_path / "RTE" / "train.tsv", [HEADERS["rte"].split(), ["0", "a", "b", "entailment"]])
    glue.load_split(TASKS["rte"], tmp_path, "train")
    assert "1 rows where the official split has 2490" in capsys.readouterr().err
    for n, warns in ((40431, 0), (40430, 0), (40300, 1)):
        rows = [HEADERS["qqp"].split()] + [["0", "1", "2", "a", "b", "1"]] * n
        write(tmp_path / "QQP" / "dev.tsv", rows)
        glue.load_split(TASKS["qqp"], tmp_path, "dev")
        assert capsys.readouterr().err.count("warning") == warns


def test_unknown_and_missing(tmp_path):
    """Oracle: what a user needs to read: the tasks there are, the layout expected, the address."""
    assert all(name in refusal(ValueError, data.load_task, "wnli") for name in TASKS)
    for name in ("cola", "mrpc", "mnli"):
        message, task = refusal(OSError, data.load_task, name, tmp_path), TASKS[name]
        assert str(tmp_path / task.folder / "train.tsv") in message and "https://" in message
        assert all(address in message for address in task.downloads)
        assert f"the folder {tmp_path / task.folder} holds " in message
    for path in (tmp_path / "no.tsv", tmp_path):
        assert str(path) in refusal(OSError, glue.read_split, path, TASKS["rte"])
        assert str(path) in refusal(OSError, own_task, path)


def test_own_files(tmp_path):
    """Oracle: the documented rule, by hand."""
    for table, labels, metrics, split in [
            ("label sentence|b x|a y", ("a", "b"), ("accuracy", "f1"), Split([("x",), ("y",)], [1, 0])),
            ("sentence label|x 10|x 9|x -1|x 9", ("-1", "9", "10"), ("accuracy",), Split([("x",)] * 4, [2, 1, 0, 1])),
            ("sentence2 n label sentence1|x 0 yes y|x 0 10 y", ("10", "yes"), ("accuracy", "f1"),
             Split([("y", "x")] * 2, [1, 0])),
            ("sentence1 sentence2 score|x y -3.5|x y 1e3", (), ("pearson", "spearman"),
             Split([("x", "y")] * 2, [-3.5, 1000.0]))]:
        path = write(tmp_path / "own.tsv", [row.split() for row in table.split("|")])
        task = own_task(path)
        assert (task.labels, task.metrics) == (labels, metrics) and glue.read_split(path, task) == split


def own_labels(path, labels):
    """A user's own file with these labels; returns what read_columns() finds."""
    write(path, [("sentence", "label"), *((f"text {i}", label) for i, label in enumerate(labels))])
    return own_task(path).labels


def test_one_label_in_two_spellings_is_refused(tmp_path):
    """Oracle: by hand: the line that spells a label in another way than the first one, and both spellings.
    They would be two classes."""
    for first, other in (("1", " 1"), ("1 ", "1"), ("a", "a\u00a0"), ("-0", "0"), ("+7", " 007"), ("no", "no "),
                         ("1", "1.0"), ("2.", "2.00"), ("yes", '"yes"')):
        path = tmp_path / "own.tsv"
        message = refusal(ValueError, own_labels, path, [first, "x", first, other])
        assert message.startswith(f"{path}:5: the label is {other!r} where a row before has {first!r}")


def test_labels_that_are_near_to_each_other_are_classes(tmp_path):
    """Oracle: by hand. Versions, cases, and a space in each: what nobody would take for one label."""
    for labels, expected in [(["1.1", "1.10", "1.1"], ("1.1", "1.10")), (["A", "a"], ("A", "a")),
                             ([" 1", " 0", " 1"], (" 0", " 1")), (["1", "\u0661"], ("1", "\u0661")),
                             (["10", "9", "1_0"], ("10", "1_0", "9")), (["9" * 5000, "8"], ("8", "9" * 5000))]:
        assert own_labels(tmp_path / "own.tsv", labels) == expected


def test_doubtful_labels_are_told(tmp_path, capsys):
    """Oracle: by hand: what SNLI, the Hub and pandas write for no label, and labels that look alike; a rare class
    is none of them."""
    path = tmp_path / "own.tsv"
    for labels, says in ((["a", "-", "b"], "'-' is taken"), (["-1", "1", "0"], "'-1' is taken"),
                         (["1", "NaN"], "'NaN' is taken"), (["Good", "bad", "good"], "'Good', 'good' are taken"),
                         (["nin\u0303o", "ni\u00f1o"], "are taken"), (["\uff11", "1"], "are taken")):
        assert set(own_labels(path, labels)) == set(labels)
        told = capsys.readouterr().err
        assert told.count("warning") == 1 and f"{path}: " in told and says in told
    for labels in (["a", "b", "none"], ["a"] * 199 + ["b"]):
        assert set(own_labels(path, labels)) == set(labels) and capsys.readouterr().err == ""


def as_csv(rows, **options):
    """Rows as Python's csv writes them, with tabs or as told."""
    text = io.StringIO()
    csv.writer(text, **{"delimiter": "\t", "lineterminator": "\n"} | options).writerows(rows)
    return text.getvalue()


HEAD = ("sentence", "label")
QUOTED = [HEAD, ("plain", "a"), ('He said "no"', "b"), ('"', "a")]


@pytest.mark.parametrize("content, line, says", [
    (as_csv(QUOTED), 3, "the field '\"He said \"\"no\"\"\"' is quoted as csv does"),
    (as_csv([HEAD, ("x", "a"), ("y", 'b "c"')]), 3, "the field '\"b \"\"c\"\"\"' is quoted"),
    (as_csv([HEAD, ("one\ttab", "a")]), 2, "3 tab-separated columns where 2"),
    (as_csv([HEAD, ("x", "a"), ("two\nlines", "b")]), 3, "1 tab-separated columns where 2"),
    (as_csv(QUOTED, quoting=csv.QUOTE_ALL), 1, "'\"sentence\"', '\"label\"'"),
    (as_csv(QUOTED, delimiter=","), 1, "'sentence,label', without a tab: CSV"),
    (as_csv(QUOTED, delimiter=";"), 1, "without a tab"),
    ('{"sentence": "x", "label": "a"}\n' * 3, 1, "without a tab: CSV and JSON lines"),
    ("sentence\tlabel\rx\ta\ry\tb\r", 1, "old Macs"),
    ("sentence\tlabel\nx\t1\ny\t\"1\"\n", 3, "spell each label in one way"),
    ("sentence\tlabel\tscore\nx\ta\t1\n", 1, "one of label (classes) and score (a number)"),
    ("sentence\tlabel\nx\ta\n".encode("utf-16-le"), 1, "UTF-16"),
    ("text\tlabel\nx\t1\ny\t0\n", 1, "no column named 'sentence'"), ("sentence\nx\n", 1, "label (classes)"),
    ("sentence\tlabel\nx\t1\n", None, "1 different"), ("sentence\tlabel\nx\t1\ny\t\n", 3, "the label is empty"),
    ("sentence\tscore\nx\tinf\n", 2, "the score is 'inf' where a finite"),
    ("sentence\tlabel\n" + "".join(f"x\t{i}.5\n" for i in range(1001)), None, "named score")])
def test_own_files_that_are_refused(content, line, says, tmp_path):
    """Oracle: Python's csv as the writer; the cause and the line by hand. Nothing is read wrongly."""
    path = tmp_path / "own.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(ValueError, lambda: glue.read_split(path, own_task(path)))
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ") and says in message


def test_quotes_that_may_be_meant_are_text_and_told(tmp_path, capsys):
    """Oracle: by hand: a quotation is a text; a spreadsheet would put such quotes around a comma, too."""
    texts = ['"Hello, world"', 'a "b" c', '"', '""', '"a" and "b"', '"a ""b" c']
    path = write(tmp_path / "own.tsv", [HEAD, *((text, "ab"[i % 2]) for i, text in enumerate(texts))], "\r\n")
    split = glue.read_split(path, own_task(path))
    assert [text for text, in split.texts] == texts
    assert capsys.readouterr().err.startswith(f"warning: {path}: the quotes around 2 of its fields are read")
    task = TASKS["sst2"]                                   # an official file: csv's quoting is not looked for
    rows = [("sentence", "label"), ('"He said ""no"""', "1")]
    assert glue.read_split(write(path, rows), task).texts == [('"He said ""no"""',)]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_colas_files_with_and_without_a_header(tmp_path, end):
    """Oracle: the rows that were written: the official files, labelled without a header line and the test file
    with one, and copies of the other kind; to train on, to evaluate and to predict."""
    rows = [("gj04", "1", "", "label"), ("gj04", "0", "*", "sentence"), ("bc01", "1", "", "A b.")]
    right = [("label",), ("sentence",), ("A b.",)]
    header = ("source", "label", "mark", "sentence")
    other = [("sentence", "x", "label"), *((row[3], "y", row[1]) for row in rows)]
    for table in (rows, [header, *rows], other):
        path = write(tmp_path / "CoLA" / "dev.tsv", table, end)
        assert glue.read_split(path, TASKS["cola"]) == Split(right, [1, 0, 1])
        assert glue.read_split(path, TASKS["cola"], labelled=False) == Split(right, None)
        assert data.load_file(path, TASKS["cola"]) == Split(right, [1, 0, 1])
    numbered = [(str(i), row[3]) for i, row in enumerate(rows)]
    test = write(tmp_path / "test.tsv", [("index", "sentence"), *numbered])
    assert glue.read_split(test, TASKS["cola"], labelled=False) == Split(right, None)
    for bad in (("gj04", "2", "", "x"), ("gj04", "1", "x")):
        message = refusal(ValueError, glue.read_split, write(path, [bad, *rows]), TASKS["cola"])
        assert message.startswith(f"{path}:1: ")


# ---- predictions -------------------------------------------------------------------------------------------

def test_submissions(tmp_path, capsys):
    """Oracle: the format of gluebenchmark.com, written out by hand."""
    small = {name: task._replace(rows={}) for name, task in TASKS.items()}
    for name, split, predictions, file, column in [
            ("cola", "test", torch.tensor([1, 0]), "CoLA.tsv", "1 0"), ("mrpc", "test", [0, 1], "MRPC.tsv", "0 1"),
            ("rte", "test", [1, 0], "RTE.tsv", "not_entailment entailment"),
            ("mnli", "test_matched", [0, 1, 2], "MNLI-m.tsv", "entailment neutral contradiction"),
            ("stsb", "test", torch.tensor([-.4, 2.34567, 5.2]), "STS-B.tsv", "0.000 2.346 5.000"),
            ("rte", "mine", [1], "mine_predictions.tsv", "not_entailment")]:
        path = glue.write_submission(tmp_path / "out", small[name], predictions, split)
        assert path == tmp_path / "out" / file and capsys.readouterr().err == ""
        rows = "".join(f"{i}\t{value}\n" for i, value in enumerate(column.split()))
        assert path.read_bytes() == f"index\tprediction\n{rows}".encode()
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    glue.write_submission(tmp_path, TASKS["rte"], [0])
    assert "1 predictions where the official split test has 3000" in capsys.readouterr().err
