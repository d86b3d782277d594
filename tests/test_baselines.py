"""Tests of baselines.py and by_name.py: each method against closed forms, the paper's counts, peft, and LoRA².

Offline, on the CPU, in seconds. Those that ask peft are skipped without it.
"""
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as M
from lora2 import LoRA2Linear, load_lora2_state_dict, lora2_layers, lora2_state_dict, merge_lora2
from methods import baselines, by_name
from methods import fast_lora2 as fast
from tests.checkpoints import NARROW, SIX, STILL, V3_BASE, build, skeleton

pytestmark = pytest.mark.usefixtures("one_thread")
ADAPTERS = ("lora2", "lora", "adalora", "sora")
HEAD = ["pooler", "classifier"]
SCHEDULE = {"target_rank": 1, "total_steps": 10, "warmup": 1, "final": 1, "interval": 1}


def trained(model, head=()):
    """(numbers trained outside the head, numbers trained in it)."""
    sizes = [0, 0]
    for name, p in model.named_parameters():
        sizes[M.in_head(name, head)] += p.numel() * p.requires_grad
    return tuple(sizes)


def bert():
    """A small BERT with random weights in float64, to be trained."""
    return build(NARROW["bert"] | STILL).double().train()


def adapted(method, r=3, k=2, alpha=6):
    """A small BERT with `method` in it, and the names of its adapted layers."""
    model = bert()
    names = by_name.add_method(method, model, M.target_modules(model, SIX), HEAD, k, r, alpha, "gaussian")
    return model, names


def stir(model, seed=1):
    """Random values for all that is trained: no factor stays 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return model


IDS, MASK = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(0)), torch.ones(4, 7)


def net(d=(6, 8, 8, 4)):
    """A perceptron of three Linear layers in float64 with random data for it: (net, x, targets)."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b).double() for a, b in zip(d, d[1:])]
    for layer in layers:
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x, y = torch.randn(32, d[0], dtype=torch.float64), torch.randn(32, d[-1], dtype=torch.float64)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]), x, y


def adapt(method, base, r=3, k=None, alpha=6.0):
    """A copy of `base` with `method` on all its layers."""
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    by_name.add_method(method, model, ["0", "2", "4"], [], k, r, alpha, None)
    return model


# --- counts -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, r, count", [
    ("lora", 1, 165_888),                                  # 0.17M
    ("adalora", 2, 2 * (165_888 + 72)), ("sora", 8, 8 * (165_888 + 72)), ("bitfit", None, 102_912),        # 0.1M
    ("head", None, 0), ("full", None, 184_423_682 - 592_130)])
def test_counts(method, r, count):
    """Oracle: closed forms and the paper's printed counts, to the unit; apart, a head of (d + 2)(d + 1). (LoRA²'s:
    test_lora2.py.)"""
    model = skeleton(V3_BASE)
    names = by_name.add_method(method, model, M.target_modules(model, SIX), model.head_parts, None, r, 32, "gaussian")
    assert trained(model, model.head_parts) == (count, 592_130)
    assert len(names) == (0 if r is None else 12 * 6)


# --- peft as the oracle -------------------------------------------------------------------------------------

class WithLoss(nn.Module):
    """A net that returns what peft's AdaLoRA expects: an object with a loss."""

    def __init__(self, inner, x, y):
        super().__init__()
        self.inner, self.x, self.y = inner, x, y

    def forward(self):
        return SimpleNamespace(loss=F.mse_loss(self.inner(self.x), self.y))


def test_lora_is_pefts_lora():
    """Oracle: peft.LoraConfig with the same A and B: output, gradients, merged weight."""
    peft = pytest.importorskip("peft")
    base, x, y = net()
    ours = stir(adapt("lora", base, r=3, alpha=5.0))
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, target_modules=["0", "2", "4"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    pairs = []
    for name, mine in lora2_layers(ours):
        layer = theirs.base_model.model[int(name)]
        for factor, copied in ((mine.A, layer.lora_A["default"].weight), (mine.B, layer.lora_B["default"].weight)):
            copied.data = factor.data.clone()
            pairs.append((factor, copied))
    F.mse_loss(ours(x), y).backward()
    F.mse_loss(theirs(x), y).backward()
    pairs += [(mine.grad, copied.grad) for mine, copied in pairs]
    pairs.append((ours(x), theirs(x)))
    merged = theirs.merge_and_unload()
    pairs += [(mine.weight, merged[int(name)].weight) for name, mine in lora2_layers(ours)]
    for mine, copied in pairs:
        torch.testing.assert_close(mine, copied, rtol=1e-9, atol=1e-12)


def test_how_they_start():
    """Oracle: the releases. A: kaiming_uniform with a = √5 is uniform in ±1/√d_in, so its variance is
    1 / (3 d_in); B = 0. AdaLoRA: P, Q ~ N(0, 0.02²), Λ = 0. SoRA: A and B as in LoRA, g ~ N(0, 1)."""
    torch.manual_seed(0)
    lora, ada, sora = (by_name.LAYERS[name](nn.Linear(400, 300), r=100, alpha=1)
                       for name in ("lora", "adalora", "sora"))
    gates = torch.cat([baselines.SoRALinear(nn.Linear(100, 100), r=100).gate for _ in range(20)])
    bound = 400 ** -0.5
    for layer in (lora, sora):
        assert 0.999 * bound < layer.A.abs().max() <= bound and not layer.B.any()
    uniform = bound / 3 ** 0.5
    for factor, std in ((lora.A, uniform), (sora.A, uniform), (ada.P, 0.02), (ada.Q, 0.02), (gates, 1)):
        assert factor.std().item() == pytest.approx(std, rel=0.05) and abs(factor.mean()) < 0.07 * std
    assert not ada.lam.any()


def test_adalora_is_pefts_adalora_over_50_steps():
    """Oracle: peft.AdaLoraConfig from the same weights, each side with its own AdamW: in each of 50 steps
    the same loss and regulariser, gradients, weights, smoothed importance and kept set.

    peft's rule is well defined where its kthvalue has something to prune (a budget below N·r: from the first
    pruning step on, as the cubic is rounded down) and no two scores are equal (float64, all above 0). It
    divides by r + 1e-5, here a matter of alpha. The 50 steps end before step T − tf, from which on the two
    differ by design: peft leaves that step's gradients out of the last selection.
    """
    peft = pytest.importorskip("peft")
    r, target, T, tinit, tfinal, interval, gamma = 4, 1, 60, 5, 9, 2, 0.3
    base, x, y = net()
    ours = adapt("adalora", base, r=r, alpha=8 * r / (r + 1e-5))
    pruner = by_name.make_pruner("adalora", ours, target, total_steps=T, warmup=tinit, final=tfinal,
                                 interval=interval, importance=None)
    config = peft.AdaLoraConfig(init_r=r, target_r=target, tinit=tinit, tfinal=tfinal, deltaT=interval,
                                lora_alpha=8, total_step=T, orth_reg_weight=gamma,
                                target_modules=["0", "2", "4"])
    theirs = peft.get_peft_model(WithLoss(copy.deepcopy(base), x, y), config).double()
    allocator, pairs = theirs.base_model.rankallocator, []
    for name, mine in lora2_layers(ours):
        layer = theirs.base_model.model.inner[int(name)]
        layer.ranknum["default"].requires_grad_(False)     # the number r, which peft 0.21 leaves trainable
        for w, other in ((mine.P, layer.lora_A), (mine.lam[:, None], layer.lora_E), (mine.Q, layer.lora_B)):
            other["default"].data = (w if other is layer.lora_E else w.T).detach().clone()     # A is Pᵀ, B is Qᵀ
        pairs += [(mine.P, layer.lora_A["default"]), (mine.lam, layer.lora_E["default"]),
                  (mine.Q, layer.lora_B["default"])]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (ours, theirs)]

    def assert_near(mine, their, rtol=1e-6, atol=1e-9):
        torch.testing.assert_close(mine, their.view(-1) if mine.dim() == 1 else their.T, rtol=rtol, atol=atol)

    sets = set()
    for step in range(1, 51):
        my_loss = F.mse_loss(ours(x), y) + gamma * by_name.regulariser("adalora", ours, None)()
        loss = theirs.base_model().loss                    # PeftModel itself would leave the regulariser out
        assert my_loss.item() == pytest.approx(loss.item(), rel=1e-9)
        my_loss.backward()
        loss.backward()
        for mine, their in pairs:
            assert_near(mine.grad, their.grad)
        for optimizer in optimizers:
            optimizer.step()
        kept_total = pruner.step()
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()

        budget, selects = allocator.budget_schedule(step)
        assert kept_total == pruner.budget(step) == budget or not selects
        for i, (name, mine) in enumerate(lora2_layers(ours)):
            element = {kind: allocator._element_score(f"inner.{name}.lora_{kind}.default") for kind in "EAB"}
            score = element["E"].view(-1) + element["A"].mean(1) + element["B"].mean(0)
            assert_near(pruner.scores()[i], score, rtol=1e-5, atol=1e-16)
            _, E = pairs[3 * i + 1]
            assert_near(mine.lam.detach(), E.detach())
            assert not selects or torch.equal(E.view(-1) != 0, pruner.keep[i])
        sets.add(tuple(pruner.keep.flatten().tolist()))
    assert len(sets) >= 5 and kept_total == 3              # it did prune, several times, and to the target


# --- closed forms -------------------------------------------------------------------------------------------

def test_sparse_gates_are_the_proximal_step():
    """Oracle: argmin over z of ½(z − g)² + ξ|z|, on a fine grid, for gates around ξ and 2ξ: there is no dead
    zone of 2ξ as in the released code. A threshold of 0 changes nothing, bit for bit."""
    layers = lora2_layers(model := adapt("sora", net()[0], r=3))
    gates = torch.tensor([[0.5, -0.5, 0.3], [0.31, -0.29, 0.0], [-0.45, 0.6, 0.59]], dtype=torch.float64)
    for (_, layer), gate in zip(layers, gates):
        layer.gate.data = gate.clone()
    baselines.SparseGates(model, 0).step()
    assert all(torch.equal(layer.gate, gate) for (_, layer), gate in zip(layers, gates))
    sparsifier = baselines.SparseGates(model, 0.3)
    sparsifier.step()
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    for (_, layer), gate in zip(layers, gates):
        best = grid[(0.5 * (grid - gate[:, None]) ** 2 + 0.3 * grid.abs()).argmin(1)]
        torch.testing.assert_close(layer.gate.detach(), best, rtol=0, atol=2e-5)
    assert sparsifier.kept() == {"0": 2, "2": 1, "4": 3}   # 0.5 and 0.31 live: 0.2 and 0.01 are below ξ


@pytest.mark.parametrize("method", ADAPTERS)
def test_autocast_does_not_round_the_update(method):
    """Oracle: the same calls outside autocast, bit for bit: ΔW, export and the regulariser."""
    model = stir(adapt(method, net()[0].float(), r=3, k=2))
    layer = model[0]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            R_of = by_name.regulariser(method, model, ("uv", "UV", "PQ"))
            found.append([layer.delta_weight(), *layer.to_lora(), R_of() if R_of else torch.zeros(())])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*found))


@pytest.mark.parametrize("method", ["lora", "adalora", "sora"])
def test_one_formula(method):
    """Oracle: y = x (W0 + ΔW)ᵀ + b with delta_weight(); B A of to_lora(); ΔW itself from one-hot factors."""
    layer = stir(adapt(method, net()[0], r=3))[0]
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    dense = F.linear(x, layer.base.weight + layer.delta_weight(), layer.base.bias)
    torch.testing.assert_close(layer(x), dense, rtol=1e-10, atol=1e-10)
    A, B = layer.to_lora()
    torch.testing.assert_close(B @ A, layer.delta_weight(), rtol=1e-10, atol=1e-12)
    A.zero_(), B.zero_()                                   # copies: the layer is as it was
    assert layer.delta_weight().any()

    factors = [p for p in layer.parameters() if p.requires_grad]
    for p in factors:
        nn.init.zeros_(p)
        p.data.view(-1)[0] = -3.0
    expected = torch.zeros(8, 6, dtype=torch.float64)
    expected[0, 0] = (-3.0) ** len(factors) * 2            # scale = alpha / r = 6 / 3
    assert torch.equal(layer.delta_weight(), expected)


# --- saving, loading, merging, pruning ----------------------------------------------------------------------

@pytest.mark.parametrize("method", ADAPTERS + ("bitfit", "head", "full"))
def test_save_load_merge(method):
    """Oracle: the model itself. At first it gives the logits of the base model, bit for bit. Its state in a
    fresh copy gives its logits bit for bit, merged they agree to rounding, the state holds all that was
    trained and no base weight, and merging leaves a plain model."""
    model, names = adapted(method)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.eval()(IDS, MASK), bert().eval()(IDS, MASK))
    logits = stir(model).eval()(IDS, MASK)
    state = lora2_state_dict(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= state.keys()
    assert not any(n.endswith("base.weight") for n in state)
    assert len(names) == (12 if method in ADAPTERS else 0)
    fresh, _ = adapted(method)
    assert not torch.allclose(fresh.eval()(IDS, MASK), logits)
    load_lora2_state_dict(fresh, state)
    assert torch.equal(fresh(IDS, MASK), logits)
    merged = merge_lora2(fresh)
    torch.testing.assert_close(merged(IDS, MASK), logits, rtol=1e-9, atol=1e-9)
    assert merged.state_dict().keys() == bert().state_dict().keys()
    assert not any(isinstance(m, LoRA2Linear) for m in merged.modules())


@pytest.mark.parametrize("method", ["lora", "adalora", "sora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_base_in_half_precision(method, dtype):
    """Oracle: the same layer in float32. Factors stay float32; output and merged weight are the base's."""
    base, x, _ = net()
    half, full = (stir(adapt(method, copy.deepcopy(base).to(kind))) for kind in (dtype, torch.float32))
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    y = half[0](x.to(dtype))
    assert y.dtype == half[0].weight.dtype == dtype
    torch.testing.assert_close(y.float(), full[0](x.to(dtype).float()), rtol=0.05, atol=0.1)


# --- mistakes and choices -----------------------------------------------------------------------------------

def test_mistakes_are_named():
    """Oracle: the sentences; nothing is silently ignored or trained."""
    model = bert()
    with pytest.raises(ValueError, match="r = 25"):
        by_name.add_method("lora", model, ["query"], HEAD, None, 25, 32, None)
    assert not lora2_layers(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="Eq. 8"):
        by_name.make_pruner("adalora", adapt("adalora", net()[0]), importance="full", **SCHEDULE)


def test_what_belongs_to_each_method():
    """Oracle: fast.py's regulariser and pruner for LoRA², which tests/test_fast.py holds to lora2.py's."""
    model = adapt("lora2", net()[0], r=4, k=2)
    assert type(model[0]) is LoRA2Linear
    assert torch.equal(by_name.regulariser("lora2", model, ("uv",))(), fast.orthogonality_loss(model, ("uv",)))
    assert by_name.regulariser("lora", model, None) is None is by_name.regulariser("sora", model, None)
    assert by_name.make_pruner("lora", model, importance=None, **SCHEDULE) is None
    for importance, factors in (("full", "lam u U v V"), ("reduced", "lam u U"), (None, "lam u U")):
        pruner = by_name.make_pruner("lora2", model, importance=importance, **SCHEDULE)
        assert type(pruner) is fast.FastRankPruner and " ".join(pruner.factors) == factors
