"""Tests of experiments/bench*.py: counters by hand, the step against train.py's loop, a tiny run.

Offline. What needs transformers and peft is skipped without them.
"""
import contextlib
import gc
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import data
import model as models
from experiments import bench
from experiments.speed import counts, growth, peers, steps, table, tasks
from formats import glue, toy
from running import progress

ROOT = Path(__file__).parent.parent

needs_peers = pytest.mark.skipif(not peers.available(), reason="transformers or peft is not installed")


@pytest.fixture(autouse=True)
def few_threads(one_thread):
    """Matrices this small are slower on several cores."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{shape: checkpoint with random weights}."""
    folder = tmp_path_factory.mktemp("bench")
    shapes = ("tiny", "tiny-roberta")
    return {name: steps.write_checkpoint(folder / name, steps.SHAPES[name]) for name in shapes}


def batch_of(shape, B=3, T=16):
    return steps.make_batch(steps.SHAPES[shape], B, T)


# --- counting -----------------------------------------------------------------------------------------------

def test_operations_are_counted_forward_and_backward():
    """Oracle: a product and a sum, counted by hand; their backward pass is one product and one expand."""
    x, w = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    with counts.Operations() as forward:
        y = (x @ w).sum()
    assert forward.names == {"mm": 1, "sum": 1} and forward.total == 2
    with counts.Operations() as backward:
        y.backward()
    assert backward.names == {"ones_like": 1, "mm": 1}      # dw = xᵀ @ 1; the gradient of a sum is a view


@pytest.mark.parametrize("read, n", [
    (lambda x: x.sum().item(), 1), (lambda x: float(x[0]) + int(x[1]), 2),
    (lambda x: bool((x > 0).all()), 1), (lambda x: x.tolist(), 1), (lambda x: x.nonzero(), 1),
    (lambda x: x[x > 0], 1), (lambda x: x.cpu(), 1), (lambda x: x.numpy(), 1),
    (lambda x: torch.where(x > 0, x, 0.0), 0), (lambda x: x.argsort()[:2], 0)])
def test_host_reads_are_counted(read, n):
    """Oracle: what needs the numbers on the host is known from torch's documentation, case by case."""
    with counts.Operations() as seen:
        read(torch.randn(4))
    assert (seen.reads > 0) == (n > 0) and seen.reads >= n


def test_saved_bytes():
    """Oracle: by hand. A Linear whose weight is trained keeps its input, tanh its output; the 4 × 7 twice, counted
    once. A column of a 4 × 1000 matrix keeps all 16,000 bytes alive; a parameter is free."""
    def saved(net, forward):
        return counts.saved(forward, net).total()

    net, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh()), torch.randn(4, 5)
    assert saved(net, lambda: net(x).sum()) == 4 * (4 * 5 + 4 * 7 + 4 * 3)
    net[0].weight.requires_grad_(False)
    assert saved(net, lambda: net(x).sum()) == 4 * (4 * 7 + 4 * 3)
    net[0].bias.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    assert saved(net, lambda: net(x).sum()) == 4 * (4 * 3)                  # only the last bias is trained
    net, wide = nn.Linear(4, 1, bias=False), torch.randn(4, 1000)
    assert saved(net, lambda: (net.weight * wide[:, 0]).sum()) == 16000


@pytest.mark.parametrize("shape, T", [("tiny", 16), ("tiny", 160), ("tiny-roberta", 24)])
def test_flops_of_the_frozen_step(folders, shape, T):
    """Oracle: by hand, dropout on. No frozen matrix needs a gradient, so that the backward pass costs the forward
    pass once more, down to the first layer's q, k and v; products of two activations cost it twice more, as the
    head does, which is trained. 160 tokens share some buckets. A column makes products with positions even in width."""
    B, L, d, f, rows = 2, 2, 32, 64, 2 * T
    expected = L * 2 * 2 * rows * (4 * d * d + 2 * d * f) - 3 * 2 * rows * d * d + 3 * 2 * B * (d * d + 2 * d)
    expected += L * 3 * 2 * 2 * rows * T * d               # q kᵀ and (softmax) v
    if shape == "tiny":
        buckets = int(models.bucket(torch.tensor(T - 1), 256, 512))
        positions = 2 * 2 * rows * (2 * T - 1) * d         # q Kᵀ and k Qᵀ against all distances
        expected += L * (2 * 2 * (2 * buckets + 1) * d * d + 2 * positions) + positions
        expected += (2 * L + 1) * 2 * 2 * rows * d         # the column
    assert counts.flops(steps.OwnStep(folders[shape], "frozen", batch_of(shape, B, T))) == expected


# --- statistics and the table -------------------------------------------------------------------------------

def test_numbers_of_a_row():
    """Oracle: by hand. A machine that slows down by 10 for two rounds changes no paired ratio."""
    a, b = [2.0, 30.0, 20.0, 1.0], [1.0, 10.0, 10.0, 1.0]
    assert table.paired(a, b) == {"value": 2.0, "min": 1.0, "max": 3.0, "n": 4}
    with pytest.raises(ValueError, match="shorter"):
        table.paired(a, b[:3])
    assert table.worst([1, 5, 2])["value"] == 5 and table.summary([1, 5, 2])["value"] == 2
    for goal, met, missed in (("≤ 1.10", 1.1, 1.11), ("≥ 1.3", 1.3, 1.29), ("= 0", 0, -1)):
        assert table.passes(met, goal) and not table.passes(missed, goal)


def test_report_says_pass_fail_and_not_run():
    """Oracle: the lines written out."""
    text = table.report(table.rows({"4": table.summary([1.0, 1.1, 1.3]), "6": table.worst([2499, 2501])}, "cpu"))
    assert "| 4 | transformers frozen / own frozen | ≥ 1.15 | 1.100 (1.000 – 1.300; n = 3) | FAIL |" in text
    assert "| 6 | operations of a full LoRA² step | ≤ 2500 | 2,501 (2,499 – 2,501; n = 2) | FAIL |" in text
    assert "| 8 | R + importance + pruning, on / off | ≤ 1.02 | not run |  |" in text
    assert "T=256 | ≥ 3" not in text and "FAIL" not in table.report(table.rows({"4": table.summary([1.0])}, "cpu"), False)
    assert "T=256 | ≥ 3 | not run" in table.report(table.rows({}, "cuda"))


def test_interleaved_variants_take_turns():
    """Oracles: each once a round, the first round a warm-up that is not among the times; over many rounds
    each comes right after each other one about as often, 50 times (Python's generator, ±3 deviations)."""
    seen = []
    times = steps.interleave({name: lambda name=name: seen.append(name) for name in "abcd"}, 199)
    rounds = [seen[i:i + 4] for i in range(0, 800, 4)]
    assert all(sorted(each) == list("abcd") for each in rounds) and len(seen) == 800
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abcd", 199)
    followed = Counter(pair for each in rounds for pair in zip(each, each[1:]))
    assert len(followed) == 12 and all(30 < n < 70 for n in followed.values()), followed


# --- the step -----------------------------------------------------------------------------------------------

def test_the_loop_reads_no_more_than_the_step(cli, monkeypatch):
    """Oracle: by hand: beside the step, which reads nothing (row 7), ten steps of train.py's loop read two
    numbers each, the width of a batch and its count of tokens, both on the host."""
    monkeypatch.setattr(progress, "LOG_STEPS", 10**9)
    reads = []
    for steps_of_run in (15, 5, 15):                       # the first makes the plans of positions
        with counts.Operations() as counted:
            assert cli.tiny(f"--limit-train 240 --max-steps {steps_of_run} --overwrite").status == 0
        reads.append(counted.reads)
    assert reads[2] - reads[1] == 10 * 2


@pytest.mark.parametrize("shape, dtype", [("deberta-narrow", "fp32"), ("deberta-narrow", "bf16"),
                                          ("roberta-narrow", "bf16")])
def test_counts_meet_their_goals(tmp_path, shape, dtype):
    """Oracle: the specification's goals for operations and host reads, of twelve and more layers."""
    config = steps.SHAPES[shape]
    folder, batch = steps.write_checkpoint(tmp_path / "model", config), steps.make_batch(config, 2, 16)
    for k in (1, 8):
        step = steps.OwnStep(folder, "lora2", batch, k=k, dtype=dtype)
        parts, lines = counts.count_parts(step), table.rows({}, "cpu")
        assert table.passes(parts["total"], lines["6"]["goal"])
        assert parts["update"] == parts["clip, AdamW"] + parts["importance, selection"]
        assert table.passes(parts["update"], lines["6 update"]["goal"])
        assert table.passes(parts["host reads"], lines["7"]["goal"])
        assert parts["R"] < 100 and len(step.net.backbone.encoder.layer) >= 12


def test_steps_leave_no_memory_behind(folders):
    """Oracle: none: after its second step a run holds no more tensors or bytes, however many steps follow."""
    step = steps.OwnStep(folders["tiny"], "lora2", batch_of("tiny"), k=2, r=4)
    held = []
    for n in (2, 10):
        for _ in range(n):
            step()
        gc.collect()
        held.append({})
        for t in gc.get_objects():
            if type(t) in (torch.Tensor, nn.Parameter):
                with contextlib.suppress(RuntimeError):        # torch.compile leaves some without numbers
                    held[-1][t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    assert len(held[1]) <= len(held[0]) and sum(held[1].values()) <= sum(held[0].values())


def test_the_frozen_step_trains_the_head_and_reaches_the_first_layer(folders):
    """Oracle: the list written out."""
    step = steps.OwnStep(folders["tiny"], "frozen", batch_of("tiny"))
    names = {f"deberta.encoder.layer.0.attention.self.{x}_proj.bias" for x in ("query", "key", "value")}
    names |= {f"{part}.{x}" for part in ("pooler.dense", "classifier") for x in ("weight", "bias")}
    assert {name for name, p in step.net.named_parameters() if p.requires_grad} == names
    step.loss().backward()
    assert all(p.grad.abs().sum() > 0 for p in step.parameters)


# --- the peers ----------------------------------------------------------------------------------------------

@needs_peers
@pytest.mark.parametrize("shape", ["tiny", "tiny-roberta"])
def test_parity_sees_a_difference(folders, shape, monkeypatch):
    """Oracle: own and peer agree; with a scale that is off by 0.1 % in a single adapter they do not."""
    errors = peers.parity(folders[shape], batch_of(shape))
    assert len(errors) == 8 and max(errors.values()) < 5e-5
    honest = peers.pairs

    def dishonest(own, peer):
        found = honest(own, peer)
        found[-1][0].scale *= 1.001
        return found

    monkeypatch.setattr(peers, "pairs", dishonest)
    with pytest.raises(AssertionError, match="do not compute the same: .*AdaLoRA"):
        peers.parity(folders[shape], batch_of(shape))


@needs_peers
def test_peers_adapt_the_six_matrices_and_train_the_head(folders):
    """Oracle: names and parameter counts written out: r (d_in + d_out) per matrix, + r for AdaLoRA's Λ."""
    S = 2 * (4 * 64 + 2 * 96)                              # of both layers, d = 32 and f = 64
    head = 32 * 32 + 32 + 2 * 32 + 2
    for method, expected in (("lora", 4 * S), ("adalora", 4 * (S + 12))):
        step = peers.PeerStep(folders["tiny"], method, batch_of("tiny"), r=4)
        assert sum(p.numel() for p in step.parameters) == expected + head
        dropouts = [module.p for module in step.net.modules() if type(module).__name__.endswith("Dropout")]
        assert step.net.training and dropouts and 0.1 in dropouts


# --- the whole ----------------------------------------------------------------------------------------------

@needs_peers
def test_a_tiny_run_measures_and_writes(tmp_path, capsys, monkeypatch):
    """Oracle: each row without data is there with a number, the others say so; the file names no folder."""
    monkeypatch.setattr(steps, "SHAPES", steps.SHAPES | {"deberta-narrow": steps.SHAPES["tiny"]})
    words = f"--quick --device cpu --shape tiny --data-dir {tmp_path} --out {tmp_path}".split()
    assert bench.main(words) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "bench-cpu-tiny-quick.json").read_text(encoding="utf-8"))
    for key, row in result["rows"].items():
        expected = key.split()[0] not in ("9", "12", "13", "14") and key not in ("3 T=256", "5 peak")
        assert (row["result"] != "not run") == expected, key
        assert not expected or 0 <= row["result"]["min"] <= row["result"]["value"] <= row["result"]["max"]
    assert str(tmp_path) not in json.dumps(result) and "FAIL" not in out and "pass |" not in out
    assert {"device", "threads", "versions", "date", "dropout", "dtype", "B", "T"} <= result.keys()


@needs_peers
def test_texts_are_timed_side_by_side(tmp_path, monkeypatch, capsys):
    """Oracle: by hand: a time for the file and one for the texts of each, a round; never of other ids."""
    pytest.importorskip("sentencepiece")
    shutil.copy(ROOT / "tests" / "data" / "spm_small.model", tmp_path / "spm.model")
    times = tasks.measure_texts(tmp_path, ["A man is playing a guitar."] * 20, 2)
    for some in times:
        assert some.keys() == {"SentencePiece", "transformers", "own"}
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in some.values())
    monkeypatch.setitem(tasks.READERS, "own", lambda folder: lambda rows: [[1, 3, 2]] * len(rows))
    with pytest.raises(ValueError, match="20 of 20 texts have other ids"):
        tasks.measure_texts(tmp_path, ["A man is playing a guitar."] * 20, 2)
    assert bench.main(["--texts"]) == 2 and "row 13 needs --spm" in capsys.readouterr().err


def test_profile_of_one_product():
    """Oracle: by hand: one call of one product of 2 · 64 · 64 · 64 FLOPs, in its place by time."""
    x = torch.randn(64, 64)
    lines = steps.profile(lambda: x @ x)
    line, = [line for line in lines if line["operation"] == "mm"]
    assert line["calls"] == 1 and line["GFLOP/s"] * line["seconds"] == pytest.approx(2 * 64**3 / 1e9)
    shown = table.profile_table(lines, most=1).splitlines()
    assert shown[2].startswith(f"| {lines[0]['operation']} | ") and shown[3].startswith("| all others | ")
    lines = [{"operation": name, "seconds": seconds} for name, seconds in (
        ("addmm", 1.0), ("copy_", 0.5), ("baddbmm_", 0.25), ("add_", 0.25))]
    text = table.products_text(lines, {"GFLOP": 250.0, "GFLOP/s": {"value": 300.0, "max": 400.0}})
    assert text.startswith("The matrix products take 1,250 of 2,000 ms, at 200 of the 400 GFLOP/s that "
                           "were measured at best. Alone they would be a share of 0.500; the other 750 ms ")


def test_folders_are_named_by_their_last_part(tmp_path, monkeypatch, capsys):
    """Oracle: by hand. A model without data for rows 9 and 12 is an error before anything is measured."""
    monkeypatch.chdir(tmp_path)
    words = ["--model", "/a/b/minilm", "--quick", "--out", "x/results"]
    assert bench.main(words) == 2
    assert capsys.readouterr().err.startswith("error: rows 9, 12 and 13 need glue/")
    for task in tasks.TASKS:
        Path("glue", data.TASKS[task].folder).mkdir(parents=True)
    job = bench.parse(words)
    bench.prepare(job)
    command = bench.circumstances(job, words)["command"]
    assert command == "python experiments/bench.py --model minilm --quick --out results"


def test_made_up_mnli_is_read(tmp_path):
    """Oracle: the number of rows asked for and MNLI's labels; [CLS], [SEP] twice and a token a word."""
    path = tmp_path / "train.tsv"
    growth.write_mnli(path, 50, SimpleNamespace(get_vocab=lambda: {"cue1": 1, "filler2": 2, "##x": 3}))
    split = glue.read_split(path, data.TASKS["mnli"])
    assert len(split.texts) == 50 and set(split.labels) == {0, 1, 2}
    assert {word for pair in split.texts for text in pair for word in text.split()} == {"cue1", "filler2"}
    found = growth.read_mnli(path, toy.tokenizer())
    words = [len(text.split()) for pair in split.texts for text in pair]
    assert found["rows"] == 50 and found["tokens"] == 3 * 50 + sum(words)
