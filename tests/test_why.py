"""Tests of three_scales.py, of what why.py looks at, and of what docs/results.md says of both and of the claims."""
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from experiments import look_inside, reproduce, search, tables, why, why_page
from formats import disk
from lora2 import LoRA2Linear, RankPruner, add_lora2, lora2_layers, lora2_state_dict, merge_lora2, orthogonality_loss
from methods import three_scales
from methods.three_scales import ThreeScaleLinear
from tests.cli import write_task

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
DOCS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def adapted(k=1, r=4, layer=ThreeScaleLinear, init="orthonormal", ends=(9, 7, 5)):
    """A net of two adapted layers with random Λ, and its layers."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(*ends[:2]), torch.nn.Linear(*ends[1:])).double()
    add_lora2(net, ["0", "1"], k=k, r=r, alpha=r, init=init, layer=layer)
    layers = [layer for _, layer in lora2_layers(net)]
    for layer in layers:
        torch.nn.init.normal_(layer.lam)
    return net, layers


# ---- three scales ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("k, r", [(1, 4), (3, 5), (5, 1)])
def test_three_scales_as_one_product(k, r):
    """Oracle: the dense product v w u Λ U W V, torch.linalg.matrix_rank, and the count that the docstring gives."""
    net, layers = adapted(k, r)
    x = torch.randn(6, 9).double()
    y = net(x)
    for layer in layers:
        dense = layer.v @ layer.w @ layer.u @ torch.diag(layer.lam) @ layer.U @ layer.W @ layer.V * layer.scale
        assert torch.allclose(layer.delta_weight(), dense.T)
        assert torch.linalg.matrix_rank(dense) == min(k, layer.m, r)
        x = layer.base(x) + x @ dense
        ours = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        assert ours == k * (layer.in_features + layer.out_features) + 2 * k * layer.m + 2 * layer.m * r + r
    assert torch.allclose(y, x) and {"0.w", "0.W"} <= lora2_state_dict(net).keys()
    A, B = layers[0].to_lora()
    assert torch.allclose(B @ A, layers[0].delta_weight())
    assert torch.allclose(merge_lora2(net)(torch.ones(9).double()), adapted(k, r)[0](torch.ones(9).double()))


@pytest.mark.parametrize("init", ["gaussian", "orthonormal"])
def test_three_scales_begin_at_the_pretrained_model(init):
    """Oracle: Λ = 0; and every factor is drawn: none is as torch.empty left it, std 0.02 or orthonormal."""
    layer = ThreeScaleLinear(torch.nn.Linear(400, 300), k=20, r=30, init=init)
    assert not layer.delta_weight().any()
    for factor in (layer.w, layer.u, layer.U, layer.W):
        small = factor if len(factor) < len(factor.T) else factor.T
        if init == "orthonormal":
            assert torch.allclose(small @ small.T, torch.eye(len(small)), atol=1e-5)
        else:
            assert 0.01 < factor.std() < 0.04


def test_the_regulariser_of_three_scales():
    """Oracle: Eq. 5 with dense norms on the printed sides, whose gradient is the same; lora2.py's R where w and W
    are the identity, k = m = r; the floor of the docstring at orthonormal factors."""
    net, layers = adapted(k=1, r=4)
    R = three_scales.orthogonality_loss(net)
    assert math.isclose(R.item(), 2 * max(4 - 1, 0), abs_tol=1e-9)
    printed = 0
    for layer in layers:
        for p in layer.parameters():
            if p.requires_grad:
                p.data += 0.3 * torch.randn_like(p)
        P, Q = layer.v @ layer.w @ layer.u, layer.U @ layer.W @ layer.V
        for A in (P.T, Q, layer.v, layer.w, layer.u, layer.U, layer.W, layer.V):
            printed = printed + (A @ A.T - torch.eye(len(A))).square().sum() / len(layers)
    factors = [p for p in net.parameters() if p.requires_grad and p.dim() == 2]
    ours = torch.autograd.grad(three_scales.orthogonality_loss(net), factors)
    assert all(map(torch.allclose, ours, torch.autograd.grad(printed, factors)))
    net, layers = adapted(k=2, r=2, init="gaussian")
    for layer in layers:
        layer.w.data = layer.W.data = torch.eye(2).double()
    assert torch.allclose(three_scales.orthogonality_loss(net), orthogonality_loss(net))


# ---- what is looked at -----------------------------------------------------------------------------------

def judged(gamma, kind=look_inside.Judge, **what):
    """A pruner after six steps of a model that nothing else updates."""
    net, _ = adapted(k=1, r=4, layer=LoRA2Linear, init="gaussian")  # orthonormal: R has no gradient
    judge = kind(net, 1, total_steps=6, warmup=0, final=1, interval=1)
    for name, value in ({"clipped": 1.0} | what).items():
        setattr(judge, name, value)
    judge.mean = 0                                         # Ī by hand, (n, r), where nothing is pruned
    for t in range(6):
        net(torch.randn(6, 9).double()).square().sum().backward()
        if kind is look_inside.Judge:
            judge.see()
        (gamma * orthogonality_loss(net)).backward()
        I = [[(w * w.grad).abs().detach() for w in (layer.lam, layer.u, layer.U)] for layer in judge.layers]
        if t < 5:                                          # the last step is final: averages stay
            I = torch.stack([lam + u.mean(0) + U.mean(1) for lam, u, U in I])
            judge.mean = 0.85 * judge.mean + 0.15 * I
        judge.step()
        net.zero_grad()
    return judge


def test_a_judge():
    """Oracle: lora2.py's RankPruner, by itself, without R, and of Ī by hand; one that does not prune leaves Λ."""
    itself, plain = judged(9.0), judged(9.0, RankPruner)
    assert torch.equal(itself.scores(), plain.scores()) and torch.equal(itself.keep, plain.keep)
    of_task = judged(0.0).scores()
    torch.testing.assert_close(judged(9.0, of_task=True).scores(), of_task, rtol=1e-6, atol=0)
    assert not torch.allclose(itself.scores(), of_task, atol=0)
    half = judged(9.0, of_task=True, clipped=0.5).scores()                  # Ī and Ū are both half as large
    torch.testing.assert_close(4 * half, of_task, rtol=1e-6, atol=0)
    idle = judged(9.0, by_mean=True, prunes=False)
    assert idle.keep.sum() == 2 and all(layer.lam.all() for layer in idle.layers)
    assert not all(layer.lam.all() for layer in itself.layers)
    torch.testing.assert_close(idle.scores(), idle.mean, rtol=1e-6, atol=0)
    assert (idle.uncertainty != 1).all()                   # Ū is put back


def test_what_is_seen():
    """Oracle: dense matrices: norms, cosines, angles."""
    net, layers = adapted(k=1, r=4, layer=LoRA2Linear)
    film = look_inside.Film(net, {})
    film.look(1)
    before = torch.cat([layer.delta_weight().flatten() for layer in layers])
    v = [layer.v.detach().clone() for layer in layers]
    for layer in layers:
        layer.v.data.add_(torch.randn_like(layer.v))
    film.look(2)
    after = torch.cat([layer.delta_weight().flatten() for layer in layers])
    seen = film.developed()
    sizes = [layer.delta_weight().norm() / layer.base.weight.norm() for layer in layers]
    angles = []
    for a, layer in zip(v, layers):
        share = abs(torch.dot(a.flatten(), layer.v.detach().flatten())) / a.norm() / layer.v.detach().norm()
        angles.append(math.degrees(math.acos(share)))
    assert math.isclose(seen["size"][1], (sum(sizes) / 2).item(), rel_tol=1e-3)
    cosine = torch.cosine_similarity(before, after, dim=0).item()
    assert math.isclose(seen["to the last"][0], cosine, abs_tol=1e-4)
    assert math.isclose(seen["turned v"][1], statistics.mean(angles), rel_tol=1e-3)
    assert seen["turned V"] == [0, 0] and seen["turned v"][0] == 0
    assert look_inside.angle(v[0], -v[0]) == 0              # of lines, which have no sign
    assert look_inside.cosine(film.updates[0], [(A, 0 * B) for A, B in film.updates[0]]) == 0


@pytest.fixture
def args(cli, monkeypatch):
    """Six steps on a small file of STS-B, as the command line of why.py would have it."""
    write_task("stsb")
    monkeypatch.setitem(why.GIVEN, "flags", "--max-steps 6 --batch-size 16 --max-len 16 --device cpu")
    return SimpleNamespace(model=str(cli.models["bert"]), data_dir="glue")


@pytest.mark.parametrize("row", ["lora", "adalora", "lora2", "sora", "head"])
def test_a_run_is_that_of_train(row, args):
    """Oracle: train.py itself, with the words that why.py would give it: the same scores after the last step."""
    point = {"lr": 0.01} if row == "head" else {"lr": 0.01, "scale": 8}
    record, end = why.run(row, "stsb", 3, point, args)
    assert train.main([*why.words_of(row, "stsb", 3, point, args), "--out", "run"]) == 0
    result = disk.read_json(Path("run/result.json"), "")
    assert record["last"]["score"] == pytest.approx(result["last"]["score"], abs=1e-6)
    if row == "head":
        assert end == [] and record["film"] == {}              # no layer is adapted
    else:
        assert record["film"]["t"] == [1, 6] and len(end) == len(record["film"]["size"]) * 6


def test_rows_that_differ_in_the_loop(args):
    """Oracle: by hand: V = 0 has no direction at first; what judges in a run that is not pruned does not prune."""
    films = {}
    for row in ("three", "zero", "gradient", "of-task", "unpruned", "lora2"):
        films[row] = why.run(row, "stsb", 0, {"lr": 0.01, "scale": 8}, args)[0]["film"]
    assert films["zero"]["turned V"][1] == 90                   # from no direction to one
    assert films["unpruned"]["kept"] == films["lora2"]["kept"] and films["unpruned"]["lam"] != films["lora2"]["lam"]
    assert all(0.25 < share <= 1 for name in ("of-task", "by-mean") for share in films["unpruned"][name])
    assert films["three"]["size"] != films["lora2"]["size"] != films["gradient"]["size"]


def test_what_runs_next(monkeypatch):
    """Oracle: by hand: the plan's order; the points of study-gpu.md, of why.json, or of a search that comes first."""
    monkeypatch.setitem(why.GIVEN, "plan", [["lora zero gradient", "stsb", 1], ["lora", "stsb", 2]])
    runs, scores = [], {8: 0.3, 32: 0.5, 128: 0.4}
    while wanted := why.next_run(runs):
        row, task, seed, point = wanted
        score = scores[point["scale"]] - abs(math.log(point["lr"] / 0.003))
        part = "tune" if seed == 1000 else "reported"
        runs.append({"row": row, "task": task, "seed": seed, "tuned": point, "part": part, "last": {"score": score}})
    seeds = [(run["row"], run["seed"]) for run in runs]
    assert seeds == [("lora", 0), ("zero", 0), *5 * [("gradient", 1000)], ("gradient", 0), ("lora", 1)]
    assert [runs[i]["tuned"] for i in (0, 1, 7)] == [{"lr": lr, "scale": scale} for lr, scale in
                                                     ((0.001, 8), (0.003, 8), (0.003, 32))]


# ---- what docs/results.md says ---------------------------------------------------------------------------

CLAIMED = "## The paper's claims, one by one"
SEEN = DOCS.partition("## Why it is as it is")[2].partition(CLAIMED)[0]


def test_the_page_is_that_of_the_file():
    """Oracle: why.json: its page is what is committed, and every number with a point in the text stands there."""
    content = disk.read_json(RESULTS / "why.json", "restore it") | why.GIVEN
    page = (RESULTS / "why.md").read_text(encoding="utf-8")
    assert why_page.page(content) == page
    assert why_page.fair_page(content) == (RESULTS / "fair-cpu.md").read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?<!-- -->", "", SEEN, flags=re.DOTALL)
    numbers = re.findall(r"[−+]?\d+\.\d+", re.sub(r"arXiv \d+\.\d+", "", text))
    assert numbers and [number for number in numbers if number not in page] == []
    ends = [100 * run["last"]["score"] for run in tables.runs_of(why_page.reported(content), "adalora", "stsb")]
    assert sum(score < 10 for score in ends) == 2 and len(ends) == 5 and "two of\n  five seeds end at chance" in text
    for task, chance in (("cola", 0), ("mrpc", 69), ("stsb", 10)):         # "None of the ten collapsed"
        ends = [100 * run["last"]["score"] for run in tables.runs_of(why_page.reported(content), "zero-own", task)]
        assert min(ends) > chance + 2 and len(ends) == 10
    of_k8 = search.best(search.tried(content, "k8", "stsb"))
    assert why.GIVEN["points"]["k8-unpruned"] == why.GIVEN["points"]["k8-small"] == of_k8
    level = [("zero-own", "lora", task) for task in ("stsb", "cola", "mrpc", "average")]   # README: with LoRA
    level += [("k8", other, task) for other in ("lora8", "adalora8") for task in ("stsb", "cola", "mrpc", "average")]
    level += [("gaussian", "lora", task) for task in ("stsb", "cola")]
    level += [("again", "lora", task) for task in ("cola", "mrpc", "average")]
    above = [("k8", "lora2", "stsb"), ("k8", "again", "cola"), ("k8", "lora2", "mrpc")]  # README: k = 8 over k = 1
    above += [("lora", "lora2", "stsb"), ("lora", "again", "stsb")]        # README: by 1.7 to 2.5 points
    for *rows, task in level + above:
        part = tables.summary(tables.differences(why_page.reported(content), *rows, task).values())
        assert part["n"] == (10 if "zero-own" in rows or rows[0] == "again" and task == "cola" else 5)
        assert verdict([part]) == ("supported" if (*rows, task) in above else "inconclusive here")
    assert part["mean"] == pytest.approx(2.5, abs=0.05)
    assert search.best(search.tried(content, "again", "stsb"))["scale"] == 8                # README: 8 to 128
    for task in ("stsb", "cola"):
        assert search.best(search.tried(content, "gaussian", task))["scale"] == 64 * 8      # README: LoRA's is 8
    of_gaussian = tables.summary(tables.differences(why_page.reported(content), "gaussian", "lora", "average").values())
    assert verdict([of_gaussian]) == "not supported" and round(of_gaussian["mean"]) == -2    # README: two points below


def test_a_run_that_diverged_is_named():
    """Oracle: by hand: it is in no mean, so both pages say which it was."""
    content = disk.read_json(RESULTS / "why.json", "restore it") | why.GIVEN
    first = next(run for run in content["runs"] if (run["row"], run["part"]) == ("k8", "reported"))
    content["runs"] = [run | {"failed": "step 3"} if run is first else run for run in content["runs"]]
    for page in (why_page.page(content), why_page.fair_page(content)):
        assert f"Diverged, and in no mean: {tables.name_of(first)}" in page


def lower_less_upper(run):
    """Singular values that a matrix of the lower half of the layers keeps more than one of the upper half."""
    layers = [statistics.mean(layer) for layer in zip(*run["ranks"].values())]
    half = len(layers) // 2
    return statistics.mean(layers[:half]) - statistics.mean(layers[half:])


def measured(page, rows):
    """[interval] for each task of a page, over the seeds, of what is above 0 where the claim holds."""
    words, found = [page.stem, "--preset", "small", "--out", str(RESULTS)], []
    if page.stem == "study-gpu":
        words = ["study", "--out", str(page.with_suffix(".json"))]
    content = reproduce.content_of(reproduce.parse(words))
    content["runs"] = [run for run in content["runs"] if run["part"] == "reported"]
    for task in content["tasks"]:
        if page.stem == "figure3":
            values = [lower_less_upper(run) for run in tables.runs_of(content, *rows, task)]
        else:
            values = list(tables.differences(content, *rows, task).values())
        found.append(tables.summary(values))
    return [part for part in found if part]


def verdict(parts):
    """By intervals of several tasks: on which side of 0 those are that do not hold it."""
    above = any(part["mean"] > tables.half_of(part) for part in parts)
    below = any(part["mean"] < -tables.half_of(part) for part in parts)
    return "inconclusive here" if above == below else "supported" if above else "not supported"


ORTHONORMAL = "lora2-k1-orthonormal"
CLAIMS = {"k = 1 is above LoRA r = 1": ["lora2-k1", "lora-r1"],            # claim → the rows it is about
          "k = 1 is above AdaLoRA r = 2": ["lora2-k1", "adalora-r2"],
          "k = 8 is above LoRA r = 8": ["lora2-k8", "lora-r8"],
          "Pruning makes it better": [ORTHONORMAL, f"{ORTHONORMAL}-unpruned"],
          "The regulariser makes it better": [ORTHONORMAL, f"{ORTHONORMAL}-noreg"],
          "All six matrices: better than q, v": [ORTHONORMAL, f"{ORTHONORMAL}-qv"],
          "Upper layers are pruned more": [ORTHONORMAL]}


def test_the_claims_one_by_one():
    """Oracle: the committed records, by the rule above. A claim that rests on no records names a test that exists."""
    text = DOCS.partition(CLAIMED)[2]
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)[2:]
    files = dict(re.findall(r"^(\[.*\]): \.\./(.*)$", text, re.MULTILINE))
    names = " ".join(re.findall(r"^def (test_\w+)", (ROOT / "test_lora2.py").read_text(encoding="utf-8"), re.MULTILINE))
    assert len(lines) == 11 and len(CLAIMS) == 7
    for claim, found, command, file in (line.split(" | ") for line in lines):
        path = ROOT / files[file]
        if claim in CLAIMS:
            assert found == verdict(measured(path, CLAIMS[claim])), claim
            assert command.strip("`").split()[-1] in (path.stem, "study")
        else:
            assert found in ("holds by arithmetic", "not supported") and path.exists()
            assert command.strip("`").split()[-1] in names
