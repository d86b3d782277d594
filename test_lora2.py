"""What lora2.py promises, equation by equation. Needs torch and pytest only: the two files travel together.

Every test names its oracle: what the result is held against, and why that can be trusted. What happens at the
edges, refusals, dtypes and so on, is in tests/test_lora2_edges.py of the project.
"""
import copy
import hashlib
import io
import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora2 import (LoRA2Linear, RankPruner, add_lora2, load_lora2_state_dict, lora2_layers, lora2_state_dict,
                   merge_lora2, orthogonality_floor, orthogonality_loss)

FACTORS = ("v", "u", "lam", "U", "V")


@pytest.fixture(autouse=True)
def seeded_and_single_threaded():
    """Everything here is tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """A module with the names people target, a norm, a head with statistics, and nothing that is tied."""

    def __init__(self, d=8, h=12, classes=3):
        super().__init__()
        self.query, self.value = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, h), nn.Linear(h, d)
        self.norm = nn.LayerNorm(d)
        self.classifier = nn.Sequential(nn.BatchNorm1d(d), nn.Linear(d, classes))

    def forward(self, x):                                  # (N, d) → (N, classes)
        x = self.norm(x + torch.tanh(self.query(x)) * self.value(x))
        return self.classifier(x + self.down(F.gelu(self.up(x))))


TARGETS = ["query", "value", "up", "down"]


def adapted(k=2, r=4, dtype=torch.float32, alpha=8, randomise=True, **options):
    """A Block with adapters; Λ is 0 at the start, which hides mistakes, so it is made random unless told."""
    model = Block().to(dtype)
    add_lora2(model, TARGETS, k=k, r=r, alpha=alpha, **options)
    return randomised(model) if randomise else model


def randomised(model, scale=0.5):
    with torch.no_grad():
        for _, layer in lora2_layers(model):
            for name in FACTORS:
                getattr(layer, name).normal_(std=scale)
    return model


def sha(tensors):
    """A hash of the bytes of {name: tensor}."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        as_bytes = tensor.detach().contiguous().view(-1, 1).view(torch.uint8)
        digest.update(name.encode() + bytes(as_bytes.flatten().tolist()))
    return digest.hexdigest()


def trainable_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def dense(layer):
    """ΔW written out from Eq. 4, entry by entry in one sum; shares no code with lora2.py."""
    P_L_Q = torch.einsum("ak,kr,r,rl,lb->ab", layer.v, layer.u, layer.lam, layer.U, layer.V)
    return (layer.scale * P_L_Q).T


def random_shapes(count, seed=0):
    """(d_in, d_out, k, r) of random layers."""
    rng = random.Random(seed)
    for _ in range(count):
        d_in, d_out = rng.randint(1, 12), rng.randint(1, 12)
        yield d_in, d_out, rng.randint(1, min(d_in, d_out)), rng.randint(1, min(d_in, d_out))


# --- the layer (Eq. 4) --------------------------------------------------------------------------------------

@pytest.mark.parametrize("init", ["gaussian", "orthonormal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_at_the_start_nothing_changes_bit_for_bit(init, dtype):
    """Oracle: the base layer itself."""
    for shape in [(5, 8), (2, 3, 8), (1, 8), (0, 8), (2, 0, 8)]:
        base = nn.Linear(8, 6).to(dtype)
        layer, x = LoRA2Linear(base, k=2, r=4, init=init), torch.randn(shape, dtype=dtype)
        assert torch.equal(layer(x), base(x)) and layer(x).shape == (*shape[:-1], 6)


def test_one_hot_factors_give_the_entry_computed_by_hand():
    """Oracle: arithmetic. scale = 6 / 3 = 2, and 2 · 3 · 5 · 7 · 11 · 13 = 30030 at one place."""
    layer = LoRA2Linear(nn.Linear(4, 5, bias=False), k=2, r=3, alpha=6)
    with torch.no_grad():
        for name in ("base.weight", *FACTORS):
            layer.get_parameter(name).zero_()
        layer.v[3, 1], layer.u[1, 2], layer.lam[2], layer.U[2, 0], layer.V[0, 4] = 3, 5, 7, 11, 13
    expected = torch.zeros(5, 4)
    expected[4, 3] = 30030
    assert torch.equal(layer.delta_weight(), expected)
    assert torch.equal(layer(torch.eye(4)), expected.T)


def test_forward_is_x_W_plus_delta_and_the_merged_layer():
    """Oracle: Eq. 4 as one einsum, added to W0 in float64, over random shapes; 1e-10."""
    for d_in, d_out, k, r in random_shapes(40):
        base = nn.Linear(d_in, d_out, bias=d_in % 2 == 0).double()
        layer = randomised(LoRA2Linear(base, k, r, alpha=3.0))
        x, delta = torch.randn(2, 3, d_in, dtype=torch.float64), dense(layer)
        expected = F.linear(x, base.weight + delta, base.bias)
        close = dict(rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.delta_weight(), delta, **close)
        torch.testing.assert_close(layer(x), expected, **close)
        torch.testing.assert_close(layer.weight, base.weight + delta, **close)
        torch.testing.assert_close(merge_lora2(layer)(x), expected, **close)


def test_gradients_of_the_forward():
    """Oracle: finite differences (torch.autograd.gradcheck), for x and all five factors."""
    layer = randomised(LoRA2Linear(nn.Linear(4, 3).double(), k=2, r=3))
    factors = {name: getattr(layer, name).detach().requires_grad_() for name in FACTORS}

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(factors, values)), (x,))

    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *factors.values()))


def test_rank_of_the_update():
    """Oracle: torch.linalg.matrix_rank. P, Λ and Q of full rank reach min(k, r), and nothing exceeds it."""
    for k, r in itertools.product((1, 2, 5), (1, 3, 6)):
        layer = randomised(LoRA2Linear(nn.Linear(10, 9).double(), k, r))
        assert torch.linalg.matrix_rank(layer.delta_weight()) == min(k, r)


def test_k_1_spans_exactly_the_updates_of_LoRA_with_r_1():
    """Oracle: LoRA's own formula B A. Every LoRA²(k=1) is some LoRA(r=1), and every LoRA(r=1) is met."""
    layer = randomised(LoRA2Linear(nn.Linear(10, 9).double(), k=1, r=8))
    A, B = layer.to_lora()
    assert A.shape == (1, 10) and B.shape == (9, 1)
    torch.testing.assert_close(B @ A, dense(layer), rtol=1e-10, atol=1e-10)
    a, b = torch.randn(1, 10, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.v.copy_(a.T), layer.V.copy_(b.T), layer.u.fill_(1), layer.U.fill_(1)
        layer.lam.fill_(1 / (8 * layer.scale))
    torch.testing.assert_close(layer.delta_weight(), b @ a, rtol=1e-10, atol=1e-10)


def test_export_as_a_plain_lora_is_exact():
    """Oracle: B A = ΔW in float64, to 1e-12; the copies share nothing with the layer."""
    for d_in, d_out, k, r in random_shapes(20, seed=1):
        layer = randomised(LoRA2Linear(nn.Linear(d_in, d_out).double(), k, r))
        A, B = layer.to_lora()
        assert A.shape == (k, d_in) and B.shape == (d_out, k)
        torch.testing.assert_close(B @ A, dense(layer), rtol=1e-12, atol=1e-12)
        assert A.is_contiguous() and B.is_contiguous() and not A.requires_grad and not B.requires_grad
        before = layer.v.clone()
        A.zero_()
        assert torch.equal(layer.v, before)


def test_initial_values():
    """Oracle: the symbol table. Gaussian: std 0.02, Λ = 0; orthonormal: the short side's Gram matrix is I."""
    base = nn.Linear(768, 512)
    layer = LoRA2Linear(base, k=8, r=64)
    for name in ("v", "u", "U", "V"):
        factor = getattr(layer, name)
        assert abs(factor.std() / 0.02 - 1) < 0.15 and abs(factor.mean()) < 0.004, name
    assert torch.equal(layer.lam, torch.zeros(64))
    for k, r in ((8, 64), (64, 8)):
        layer = LoRA2Linear(base, k, r, init="orthonormal")
        assert torch.equal(layer.lam, torch.zeros(r))
        small = (layer.u, layer.U.T) if k < r else (layer.u.T, layer.U)
        for wide in (layer.v.T, layer.V, *small):
            torch.testing.assert_close(wide @ wide.T, torch.eye(len(wide)), rtol=0, atol=1e-5)


def test_shapes_scale_and_defaults():
    """Oracle: the symbol table; k = 1, r = 8, alpha = 32 unless told."""
    layer = LoRA2Linear(nn.Linear(768, 512))
    shapes = {name: tuple(getattr(layer, name).shape) for name in FACTORS}
    assert shapes == {"v": (768, 1), "u": (1, 8), "lam": (8,), "U": (8, 1), "V": (1, 512)}
    assert layer.scale == 4.0 and layer.in_features == 768 and layer.out_features == 512
    assert layer.bias is layer.base.bias


def test_pruning_does_not_change_the_scale():
    """Oracle: linearity. With one pruned, ΔW is what the others add up to, at alpha over the full r."""
    layer = randomised(LoRA2Linear(nn.Linear(6, 5).double(), k=2, r=3, alpha=6))
    alone = []
    lam = layer.lam.detach().clone()
    for i in range(3):
        with torch.no_grad():
            layer.lam.copy_(lam * F.one_hot(torch.tensor(i), 3))
        alone.append(layer.delta_weight().detach())
    with torch.no_grad():
        layer.lam.copy_(lam * torch.tensor([1, 0, 1]))
    torch.testing.assert_close(layer.delta_weight(), alone[0] + alone[2], rtol=1e-10, atol=1e-12)


class Shapes(TorchDispatchMode):
    """Records the name and the output shape of every operation."""

    def __init__(self):
        super().__init__()
        self.ops, self.shapes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        self.shapes += [tuple(out.shape)] if isinstance(out, torch.Tensor) else []
        return out


def test_the_dense_update_is_never_built():
    """Oracle: torch's dispatch mode sees every tensor of a forward and backward pass."""
    layer, x = randomised(LoRA2Linear(nn.Linear(19, 23), k=2, r=4)), torch.randn(3, 5, 19, requires_grad=True)
    with Shapes() as seen:
        layer(x).sum().backward()
    made = [shape for op, shape in zip(seen.ops, seen.shapes) if op != "aten.t.default"]
    assert made and not {(19, 23), (23, 19)} & set(made)
    assert layer.base.weight.grad is None


# --- add_lora2 ----------------------------------------------------------------------------------------------

def test_adds_to_the_named_layers_and_freezes_the_rest():
    """Oracle: the list of names, written out."""
    model = nn.ModuleDict({"enc": nn.ModuleList([Block(), Block()]), "query_head": nn.Linear(8, 8),
                           "pooler": Block()})
    names = add_lora2(model, ["down", "query", "enc.1.up"], k=2, r=3, trainable=["query_head", "pooler"])
    assert names == ["enc.0.query", "enc.0.down", "enc.1.query", "enc.1.up", "enc.1.down"]
    assert [name for name, _ in lora2_layers(model)] == names
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = {f"{name}.{factor}" for name in names for factor in FACTORS}
    assert factors <= trained
    kept = {name for name, _ in model.named_parameters() if name.split(".")[0] in ("query_head", "pooler")}
    assert trained - factors == kept


def test_adding_keeps_the_base_modules_as_they_are():
    """Oracle: identity and hash of the layers from before; training mode follows the base. Old gradients, which would
    be clipped with the new ones, are gone."""
    model = Block().eval()
    model(torch.ones(1, 8)).sum().backward()
    before, base, weight = sha(model.state_dict()), model.query, model.query.weight
    add_lora2(model, TARGETS, k=2, r=4)
    assert model.query.base is base and base.weight is weight and not weight.requires_grad
    assert not model.query.training and all(p.grad is None for p in model.parameters())
    plain = {name.replace(".base.", "."): t for name, t in model.state_dict().items()
             if name.rpartition(".")[2] not in FACTORS}
    assert sha(plain) == before


# --- the regulariser (Eq. 5) --------------------------------------------------------------------------------

def eq5_as_printed(layer):
    """{term: value}, literally: PᵀP, QQᵀ and uᵀu are (r, r), UᵀU and VVᵀ (k, k), vvᵀ (d_in, d_in)."""
    P, Q = layer.v @ layer.u, layer.U @ layer.V
    far = lambda G: ((G - torch.eye(len(G), dtype=G.dtype)) ** 2).sum()
    return {"uv": far(layer.u.T @ layer.u) + far(layer.v @ layer.v.T),
            "UV": far(layer.U.T @ layer.U) + far(layer.V @ layer.V.T), "PQ": far(P.T @ P) + far(Q @ Q.T)}


ALL_TERMS = [list(terms) for n in (1, 2, 3) for terms in itertools.combinations(("uv", "UV", "PQ"), n)]


@pytest.mark.parametrize("terms", ALL_TERMS)
def test_regulariser_against_the_printed_form(terms):
    """Oracle: Eq. 5 as printed, with d × d Grams, in float64: equal gradients, and values that differ by the
    constant (d_in − k) + (r − k) of ‖AAᵀ−I_n‖² = ‖AᵀA−I_k‖² + n − k; layers of several shapes."""
    for k, r in ((1, 4), (3, 3), (4, 2)):
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 7), nn.Linear(5, 5)).double()
        add_lora2(model, ["0", "1", "2", "3"], k=k, r=r)
        randomised(model)
        layers = [layer for _, layer in lora2_layers(model)]
        printed = sum(eq5_as_printed(layer)[term] for layer in layers for term in terms) / 4
        offset = sum(layer.in_features + r - 2 * k for layer in layers) / 4 if "uv" in terms else 0
        ours = orthogonality_loss(model, terms)
        torch.testing.assert_close(ours + offset, printed, rtol=1e-10, atol=1e-10)
        touched = [getattr(layer, name) for layer in layers for name in FACTORS]
        for a, b in zip(torch.autograd.grad(ours, touched, allow_unused=True),
                        torch.autograd.grad(printed, touched, allow_unused=True)):
            assert (a is None) == (b is None) or not (a if b is None else b).any()
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_mean_over_the_adapters_not_their_sum():
    """Oracle: the mean of every adapter's value on its own, in float64."""
    model = adapted(dtype=torch.float64)
    alone = [orthogonality_loss(nn.ModuleList([layer])) for _, layer in lora2_layers(model)]
    torch.testing.assert_close(orthogonality_loss(model), torch.stack(alone).mean(), rtol=1e-12, atol=0)
    assert len({round(value.item(), 6) for value in alone}) == 4


@pytest.mark.parametrize("k, r, floor", [(1, 8, 14), (8, 4, 8), (8, 8, 0), (2, 3, 2)])
def test_the_floor(k, r, floor):
    """Oracle: minimising R by gradient descent, and the orthonormal init, which has to start at the floor."""
    assert orthogonality_floor(k, r) == floor == 2 * abs(k - r)
    model = nn.Sequential(LoRA2Linear(nn.Linear(12, 10).double(), k, r, init="orthonormal"))
    for terms in ALL_TERMS:
        R = orthogonality_loss(model, terms)
        torch.testing.assert_close(R.item(), float(orthogonality_floor(k, r, terms)), rtol=0, atol=1e-10)
    factors = [p for n, p in randomised(model).named_parameters() if p.requires_grad and "lam" not in n]
    optimizer = torch.optim.LBFGS(factors, max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        R = orthogonality_loss(model)
        R.backward()
        assert R > floor - 1e-9
        return R

    for _ in range(3):
        optimizer.step(closure)
    assert orthogonality_loss(model).item() - floor < 1e-3


def test_the_floor_of_single_terms():
    """Oracle: rank arguments by hand: PᵀP (r × r) has rank ≤ k, uuᵀ (k × k) has rank ≤ r."""
    assert [orthogonality_floor(1, 8, [term]) for term in ("uv", "UV", "PQ")] == [0, 0, 14]
    assert [orthogonality_floor(8, 4, [term]) for term in ("uv", "UV", "PQ")] == [4, 4, 0]
    assert orthogonality_floor(8, 4, ["uv", "uv"]) == 4


def test_the_size_of_R_at_the_start():
    """Oracle: Eq. 5 with the expected Gram matrices of N(0, 0.02²). On DeBERTaV3-base shapes at r = 8 the
    mean is 18.8 at k = 1, so gamma = 0.1 times a plain sum over 72 matrices would be 135; at k = 8, 277."""
    for k, total in ((1, 135), (8, 277)):
        model = skeleton(1, 768, 3072)
        add_lora2(model, list("qkvo") + ["f1", "f2"], k=k, r=8)
        assert abs(0.1 * 72 * orthogonality_loss(model).item() - total) < 0.02 * total


# --- importance and pruning (Algorithm 1, Eq. 6 to 9) -------------------------------------------------------

def stack_of(n, k=1, r=2, dtype=torch.float64, sizes=((5, 4), (4, 6))):
    """n adapters, in turn of these sizes, that are never called: the tests set their gradients."""
    model = nn.ModuleList([nn.Linear(*sizes[i % len(sizes)]).to(dtype) for i in range(n)])
    add_lora2(model, [str(i) for i in range(n)], k=k, r=r)
    return randomised(model)


def give_gradients(model, value=None):
    """Random gradients for every factor, or one value."""
    for p in trainable_parameters(model):
        p.grad = torch.randn_like(p) if value is None else torch.full_like(p, value)


def everything(model, **options):
    """A pruner that keeps all for a long time: for its scores."""
    return RankPruner(model, options.pop("target_rank", 1), 1000, 999, 0, 1, **options)


class SlowImportance:
    """Eq. 6 to 9 once more, adapter by adapter and without batching, from the papers' formulas."""

    def __init__(self, model, full=False, beta1=0.85, beta2=0.85):
        self.layers = [layer for _, layer in lora2_layers(model)]
        self.full, self.beta1, self.beta2 = full, beta1, beta2
        self.I_bar = [{n: torch.zeros_like(getattr(layer, n)) for n in FACTORS} for layer in self.layers]
        self.U_bar = copy.deepcopy(self.I_bar)

    def update(self):
        for layer, I_bar, U_bar in zip(self.layers, self.I_bar, self.U_bar):
            for n in FACTORS:
                I = (getattr(layer, n) * getattr(layer, n).grad).abs().detach()
                I_bar[n] = self.beta1 * I_bar[n] + (1 - self.beta1) * I
                U_bar[n] = self.beta2 * U_bar[n] + (1 - self.beta2) * (I - I_bar[n]).abs()

    def scores(self):
        rows = []
        for layer, I_bar, U_bar in zip(self.layers, self.I_bar, self.U_bar):
            S = {n: I_bar[n] * U_bar[n] for n in FACTORS}
            constant = (S["v"].sum() + S["V"].sum()) / layer.k if self.full else 0
            rows.append([float(S["lam"][i] + (S["u"][:, i].sum() + S["U"][i, :].sum()) / layer.k + constant)
                         for i in range(layer.r)])
        return torch.tensor(rows, dtype=torch.float64)


def test_moving_averages_by_hand():
    """Oracle: arithmetic. Λ = 2 and gradients 1, 3, -1 give I = 2, 6, 2; with beta = 0.85, Ī is 0.3, 1.155,
    1.28175 and Ū 0.255, 0.9435, 0.9097125. The score is their product; u and U get no gradient here."""
    model = stack_of(1, k=1, r=1)
    pruner = everything(model, target_rank=1)
    with torch.no_grad():
        model[0].lam.fill_(2)
    for g, I_bar, U_bar in ((1, 0.3, 0.255), (3, 1.155, 0.9435), (-1, 1.28175, 0.9097125)):
        give_gradients(model, 0.0)
        model[0].lam.grad.fill_(g)
        pruner.step()
        torch.testing.assert_close(pruner.scores().item(), I_bar * U_bar, rtol=1e-12, atol=0)


@pytest.mark.parametrize("full", [False, True])
def test_scores_against_a_slow_version(full):
    """Oracle: SlowImportance, over random models, betas and steps, in float64."""
    rng = random.Random(int(full))
    for _ in range(12):
        k, r, betas = rng.randint(1, 3), rng.randint(1, 4), (rng.uniform(0.1, 0.95), rng.uniform(0.1, 0.95))
        model = stack_of(rng.randint(1, 4), k, r)
        pruner = everything(model, beta1=betas[0], beta2=betas[1], importance="full" if full else "reduced")
        slow = SlowImportance(model, full, *betas)
        for _ in range(rng.randint(1, 5)):
            give_gradients(model)
            randomised(model)
            pruner.step()
            slow.update()
        assert pruner.scores().shape == (len(model), r)
        torch.testing.assert_close(pruner.scores(), slow.scores(), rtol=1e-10, atol=1e-12)


def test_at_step_1_only_lambda_counts():
    """Oracle: Eq. 4 at Λ = 0 by the chain rule: gradients of exactly 0 for v, u, U and V, so the scores are
    those of Λ alone, after the optimizer step moved it; R gives the others gradients of their own."""
    model, x = adapted(randomise=False, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    pruner = everything(model)
    model(x).square().sum().backward()
    for _, layer in lora2_layers(model):
        assert layer.lam.grad.any()
        assert not any(getattr(layer, name).grad.any() for name in ("v", "u", "U", "V"))
    torch.optim.SGD(trainable_parameters(model), lr=0.1).step()
    pruner.step()
    I = torch.stack([0.1 * layer.lam.grad.square() for _, layer in lora2_layers(model)])
    torch.testing.assert_close(pruner.scores(), 0.15 * I * 0.15 * (I - 0.15 * I), rtol=1e-10, atol=0)
    orthogonality_loss(model).backward()
    assert all(getattr(layer, name).grad.any() for _, layer in lora2_layers(model) for name in FACTORS)


def test_sensitivities_24_of_1560():
    """Oracle: the paper's 98.5 %: at k = 1, r = 8 on 768 × 768, u, U and Λ are 24 of 1,560 numbers."""
    model = nn.Sequential(LoRA2Linear(nn.Linear(768, 768), k=1, r=8))

    def count(importance):                                 # of the averages Ī, one for each number
        return everything(model, importance=importance).sensitivity.numel()

    assert count("reduced") == 24
    assert count("full") == 1560 == sum(p.numel() for p in trainable_parameters(model))
    assert round(100 * (1 - 24 / 1560), 2) == 98.46


def score_by_gradients(model, wanted, constants):
    """Weights of 1, and gradients by which after one step S(Λ_i) = wanted, (ΣS(v) + ΣS(V)) / k = constants.

    After one step S = (1 − β1) (1 − β2) β1 I², so I has to be the root of what is wanted over that factor.
    """
    unit = 0.15 * 0.15 * 0.85
    give_gradients(model, 0.0)
    for (_, layer), scores, constant in zip(lora2_layers(model), wanted, constants):
        with torch.no_grad():
            layer.lam.fill_(1), layer.v.fill_(1), layer.V.fill_(1)
        layer.lam.grad.copy_((torch.tensor(scores, dtype=torch.float64) / unit).sqrt())
        layer.v.grad[0, 0] = layer.V.grad[0, 0] = math.sqrt(constant / 2 / unit)


@pytest.mark.parametrize("importance, left", [("reduced", {"0": 1, "1": 1}), ("full", {"0": 0, "1": 2})])
def test_the_two_importances_can_choose_differently(importance, left):
    """Oracle: by hand. Scores (1.0, 0.6) and (0.9, 0.7), constants 0.1 and 0.5, two to prune: Eq. 9 drops the
    second of each, Eq. 8 compares (1.1, 0.7) with (1.4, 1.2) and drops both of the first."""
    model = stack_of(2, k=1, r=2)
    pruner = RankPruner(model, 1, 1, 0, 0, 1, importance=importance)
    score_by_gradients(model, [(1.0, 0.6), (0.9, 0.7)], [0.1, 0.5])
    assert pruner.step() == 2
    expected = {"reduced": [[1.0, 0.6], [0.9, 0.7]], "full": [[1.1, 0.7], [1.4, 1.2]]}[importance]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(pruner.scores(), expected, rtol=1e-10, atol=0)
    assert pruner.kept() == left
    assert (model[0].lam != 0).tolist() == [[True, False], [False, False]][importance == "full"]


def test_the_order_inside_an_adapter_is_the_same_for_both_importances():
    """Oracle: the paper's claim, as a property of random cases: Eq. 8 − Eq. 9 is one constant per adapter."""
    differ = 0
    for seed in range(20):
        torch.manual_seed(seed)
        model = stack_of(3, k=2, r=4)
        pruners = [everything(model, importance=importance) for importance in ("reduced", "full")]
        for _ in range(3):
            give_gradients(model)
            randomised(model)
            for pruner in pruners:
                pruner.step()
        reduced, full = (pruner.scores() for pruner in pruners)
        constant = full - reduced
        assert (constant > 0).all()
        torch.testing.assert_close(constant, constant[:, :1].expand_as(constant), rtol=1e-9, atol=1e-12)
        assert torch.equal(reduced.argsort(1), full.argsort(1))
        differ += reduced.flatten().argsort().tolist() != full.flatten().argsort().tolist()
    assert differ > 10                                     # over all adapters it is another order


def budget_in_the_paper(t, start, end, T, warmup, final):
    if t <= warmup:
        return start
    if t <= T - final:
        return int(end + (start - end) * (1 - Fraction(t - warmup, T - final - warmup)) ** 3)
    return end


def test_budget():
    """Oracle: the three cases of the cubic as printed; both ends, the midpoint (1/8 is left), monotone."""
    model = stack_of(3, k=1, r=4)
    pruner = RankPruner(model, 1, 100, 20, 40, 7)
    assert [pruner.budget(t) for t in (1, 20, 21)] == [12, 12, 11]
    assert pruner.budget(40) == int(3 + 9 / 8) == 4
    assert [pruner.budget(t) for t in (60, 61, 100)] == [3, 3, 3]
    whole = RankPruner(stack_of(54, k=1, r=4), 0, 7, 0, 1, 1)
    assert [whole.budget(t) for t in range(7)] == [216, 125, 64, 27, 8, 1, 0]   # 6³ to 0³, not one less
    rng = random.Random(0)
    for _ in range(50):
        T = rng.randint(1, 60)
        warmup = rng.randint(0, T - 1)
        final, target = rng.randint(0, T - 1 - warmup), rng.randint(0, 4)
        pruner = RankPruner(model, target, T, warmup, final, rng.randint(1, 9))
        budgets = [pruner.budget(t) for t in range(1, T + 1)]
        assert budgets == [budget_in_the_paper(t, 12, 3 * target, T, warmup, final) for t in range(1, T + 1)]
        assert budgets == sorted(budgets, reverse=True) and budgets[-1] == 3 * target


@pytest.mark.filterwarnings("ignore:all Λ or all scores are 0")
@pytest.mark.parametrize("ties", [False, True])
def test_a_whole_run_against_a_slow_version(ties):
    """Oracle: Algorithm 1 written out with sorted(), SlowImportance and the printed budget, on random
    schedules: what is kept, what is 0 and the counts agree at every step, and the target is met exactly.
    With ties all scores are 0 and the first ones by index stay."""
    rng = random.Random(ties)
    for _ in range(25):
        T = rng.randint(1, 25)
        warmup = rng.randint(0, T - 1)
        final, interval = rng.randint(0, T - 1 - warmup), rng.randint(1, 8)
        n, r, target = rng.randint(1, 3), rng.randint(1, 4), rng.randint(0, 4)
        target = min(target, r)
        model = stack_of(n, 1, r)
        pruner, slow = RankPruner(model, target, T, warmup, final, interval), SlowImportance(model)
        kept, total = {(i, j) for i in range(n) for j in range(r)}, n * r
        for t in range(1, T + 1):
            give_gradients(model, 0.0 if ties else None)
            randomised(model)
            lams = [layer.lam.detach().clone() for layer in model]
            if t <= T - final:
                slow.update()
            chosen = warmup < t <= T - final and (t % interval == 0 or t == T - final)
            if chosen:
                total, scores = budget_in_the_paper(t, n * r, n * target, T, warmup, final), slow.scores()
                order = sorted(((i, j) for i in range(n) for j in range(r)), key=lambda ij: -scores[ij])
                kept = set(order[:total])
            assert pruner.step() == pruner.kept_total == total and type(pruner.kept_total) is int
            assert pruner.kept() == {str(i): sum((i, j) in kept for j in range(r)) for i in range(n)}
            for i, j in itertools.product(range(n), range(r)):
                held = (chosen or t > T - final) and (i, j) not in kept
                assert model[i].lam[j] == (0 if held else lams[i][j])
        alive = sum(int((layer.lam != 0).sum()) for layer in model)
        assert sum(pruner.kept().values()) == n * target == alive


@pytest.mark.parametrize("importance", ["reduced", "full"])
def test_a_step_does_not_wait_for_the_device(importance):
    """Oracle: torch's dispatch mode sees whether the host asks the device for a number."""
    model = stack_of(3, k=2, r=4)
    pruner = RankPruner(model, 2, 6, 0, 2, 2, importance=importance)
    for _ in range(6):
        give_gradients(model)
        with Shapes() as seen:
            pruner.step()
        waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique"}
        assert seen.ops and not [op for op in seen.ops if op.split(".")[1] in waits]


def test_in_the_last_phase_scores_are_frozen_and_no_gradient_is_asked_for():
    """Oracle: scores and selection of the step before it."""
    model = stack_of(2, k=1, r=3)
    pruner = RankPruner(model, 1, 8, 1, 4, 1)
    for t in range(1, 9):
        give_gradients(model)
        randomised(model)
        if t == 5:
            frozen, kept = pruner.scores().clone(), pruner.keep.clone()
        if t == 7:
            torch.optim.SGD(trainable_parameters(model)).zero_grad()
        pruner.step()
    assert torch.equal(pruner.scores(), frozen) and torch.equal(pruner.keep, kept)


def test_a_pruned_value_may_return_but_not_in_the_last_phase():
    """Oracle: what AdamW's momentum and weight decay do to Λ between optimizer.step and pruner.step."""
    model = stack_of(1, k=1, r=2, dtype=torch.float32)
    lam = model[0].lam
    pruner = RankPruner(model, 1, 16, 0, 6, 2)             # selections at 2, 4, .., 10; fixed for 11 .. 16
    optimizer = torch.optim.AdamW([lam], lr=0.1, weight_decay=0.1)
    with torch.no_grad():
        lam.fill_(1)
    history, moved = [], []
    for t in range(1, 17):
        give_gradients(model, 0.0)
        lam.grad.copy_(torch.tensor([1.0, 0.0] if t <= 2 else [0.0, 100.0] if t <= 10 else [100.0, 0.0]))
        optimizer.step()
        moved.append(lam.tolist())
        pruner.step()
        history.append((lam != 0).tolist())
    assert history[1] == [True, False]                     # pruned at 2
    assert moved[2][1] != 0 and history[2][1]              # moved by AdamW at 3, and left alone
    assert history[9] == [False, True]                     # back by the last selection
    assert all(step[0] != 0 for step in moved[10:])        # AdamW moves it in every step of the last phase
    assert history[10:] == [[False, True]] * 6             # and no forward ever sees that


@pytest.mark.parametrize("importance", ["reduced", "full"])
def test_a_pruner_goes_on_from_its_state_dict(importance):
    """Oracle: the unbroken run, bit for bit; the state passes through torch.save and weights_only loading."""
    def run(model, pruner, steps):
        for t in steps:
            torch.manual_seed(t)
            give_gradients(model)
            randomised(model)
            yield pruner.step(), pruner.kept(), sha(model.state_dict()), sha(dict(scores=pruner.scores()))

    make = lambda model: RankPruner(model, 1, 20, 2, 5, 3, importance=importance)
    model = stack_of(3, 2, 4)
    pruner, twin = make(model), copy.deepcopy(model)
    unbroken = list(run(model, pruner, range(20)))
    for stop in (1, 7, 10, 17):
        first, file = make(twin), io.BytesIO()
        assert list(run(twin, first, range(stop))) == unbroken[:stop]
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = make(twin)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert list(run(twin, second, range(stop, 20))) == unbroken[stop:]
    with pytest.raises(RuntimeError, match="size mismatch"):
        RankPruner(stack_of(3, 2, 3), 1, 20, 2, 5, 3).load_state_dict(pruner.state_dict())


# --- saving, loading, merging -------------------------------------------------------------------------------

def trained_block(steps=6, **options):
    """A Block trained for a few steps, head included; returns it in evaluation mode."""
    model = adapted(trainable=["classifier"], randomise=False, init="orthonormal", **options)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.05, weight_decay=0.1)
    pruner = RankPruner(model, 1, steps, 1, 2, 1)
    for step in range(steps):
        model.train(step % 2 == 0)
        loss = F.cross_entropy(model(torch.randn(8, 8)), torch.randint(3, (8,)))
        (loss + 0.1 * orthogonality_loss(model)).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    return model.eval()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_training_leaves_the_base_weights_alone():
    """Oracle: a hash of every frozen tensor, before adding and after training and ten changes of mode."""
    torch.manual_seed(1)
    plain = Block()
    before = sha({n: p for n, p in plain.named_parameters() if "classifier" not in n})
    torch.manual_seed(1)
    model = trained_block()
    for flip in range(10):
        model.train(flip % 2 == 0)
    frozen = {n.replace(".base.", "."): p for n, p in model.named_parameters() if not p.requires_grad}
    assert sha(frozen) == before
    assert any(layer.delta_weight().abs().max() > 1e-3 for _, layer in lora2_layers(model))


def test_save_and_load_give_the_same_model():
    """Oracle: the trained model's own outputs, bit for bit, head and its BatchNorm statistics included."""
    torch.manual_seed(1)
    base = Block()
    torch.manual_seed(1)
    model, x = trained_block(), torch.randn(5, 8)
    state = lora2_state_dict(model)
    fresh = copy.deepcopy(base).eval()
    add_lora2(fresh, TARGETS, k=2, r=4, alpha=8, trainable=["classifier"])
    assert not torch.allclose(fresh(x), model(x), atol=1e-3)
    load_lora2_state_dict(fresh, through_a_file(state))
    assert torch.equal(fresh(x), model(x))
    assert sha(lora2_state_dict(fresh)) == sha(state)


def test_what_is_saved():
    """Oracle: the list of names, written out: factors, trainable tensors, buffers beside them, two marks."""
    model = trained_block()
    adapters = {f"{name}.{part}" for name in TARGETS for part in (*FACTORS, "scale", "base_sample")}
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    head = {f"classifier.0.{name}" for name in statistics}
    state = lora2_state_dict(model)
    assert state.keys() == adapters | head | {"classifier.1.weight", "classifier.1.bias"}
    before = sha(state)
    randomised(model)
    assert sha(state) == before                            # copies, not views
    assert state["up.scale"] == 2.0 and len(state["up.base_sample"]) == 16


def test_the_life_of_an_adapter():
    """Oracle: the list of minLoRA: no change when added, change when trained, the base again when disabled,
    the same outputs again after saving, removing, adding and loading, and after merging."""
    base, x = Block().eval(), torch.randn(5, 8)
    original = base(x)
    model = copy.deepcopy(base)
    add_lora2(model, TARGETS, k=2, r=4)
    assert torch.equal(model(x), original)
    changed = randomised(model)(x)
    assert not torch.allclose(changed, original, atol=1e-2)
    state = lora2_state_dict(model)
    with torch.no_grad():
        for _, layer in lora2_layers(model):
            layer.lam.zero_()
    assert torch.equal(model(x), original)
    model = copy.deepcopy(base)
    add_lora2(model, TARGETS, k=2, r=4)
    load_lora2_state_dict(model, state)
    assert torch.equal(model(x), changed)
    merged = merge_lora2(model)
    torch.testing.assert_close(merged(x), changed, rtol=1e-5, atol=1e-5)
    assert merged is model and [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert list(merged.state_dict()) == list(base.state_dict())
    assert not torch.equal(merged.query.weight, base.query.weight)
    again = sha(merged.state_dict())
    assert sha(merge_lora2(merged).state_dict()) == again  # nothing is left to merge
    add_lora2(merged, TARGETS, k=1, r=1)                   # and it can start over


def skeleton(layers, d, f):
    """The adapted matrices of an encoder; their memory is never written to."""
    shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "f1": (d, f), "f2": (f, d)}
    make = lambda: nn.ModuleDict({name: nn.utils.skip_init(nn.Linear, *shape, dtype=torch.float16)
                                  for name, shape in shapes.items()})
    return nn.ModuleList([make() for _ in range(layers)])


@pytest.mark.parametrize("encoder, targets, k, r, count", [
    ((12, 768, 3072), "q k", 1, 8, 37_440), ((12, 768, 3072), "q k v", 1, 8, 56_160),
    ((12, 768, 3072), "q k v o f1 f2", 1, 8, 167_616), ((12, 768, 3072), "q k v o f1 f2", 8, 8, 1_336_896),
    ((12, 768, 3072), "q k v o f1 f2", 8, 4, 1_332_000), ((24, 1024, 4096), "q k v o f1 f2", 1, 8, 445_824)])
def test_parameter_counts(encoder, targets, k, r, count):
    """Oracle: the counts of Tables 1 and 4 (DeBERTaV3-base, RoBERTa-large) and k (d_in + d_out) + 2kr + r."""
    model = skeleton(*encoder)
    names = add_lora2(model, targets.split(), k=k, r=r)
    assert len(names) == encoder[0] * len(targets.split())
    assert sum(p.numel() for p in trainable_parameters(model)) == count
    layers = [layer for _, layer in lora2_layers(model)]
    assert count == sum(k * (layer.in_features + layer.out_features) + 2 * k * r + r for layer in layers)
