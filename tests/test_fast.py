"""methods/fast_lora2.py against lora2.py: the version to read is the oracle of the version that runs. And both as people
use them: copies, hooks, checkpointing, torch.compile."""
import copy
import inspect
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from experiments.speed import counts
from lora2 import (LoRA2Linear, RankPruner, add_lora2, lora2_layers, lora2_state_dict, merge_lora2,
                   orthogonality_loss)
from methods import fast_lora2 as fast
from methods.fast_lora2 import FastLoRA2Linear, FastRankPruner, add_gradients, cast_frozen, shared_updates
from tests.checkpoints import Operations

DOUBLE = torch.float64


def twins(k=2, r=4, bias=True, dtype=DOUBLE, sizes=(6, 9)):
    """The same layer twice, plain and fast, with random factors."""
    torch.manual_seed(k + r)
    plain = LoRA2Linear(nn.Linear(*sizes, bias=bias, dtype=dtype), k, r)
    for p in plain.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    quick = copy.deepcopy(plain)
    quick.__class__ = FastLoRA2Linear
    return plain, quick


def network(layer=FastLoRA2Linear):
    """A perceptron in float64 whose three layers are adapted, with random factors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    add_lora2(net, ["0", "2", "4"], k=2, r=3, layer=layer)
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)                    # else tanh is ±1, whatever the scale
    return net


def inputs(*shape, dtype=DOUBLE):
    return torch.linspace(-1, 1, math.prod(shape), dtype=dtype).view(shape)


def passed(net, x, call=None):
    """Output and gradients, of x (None if it needs none) and of all that is trained, of a weighted sum of the output:
    of a pass through net, or through what stands for it."""
    net.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    y = (call or net)(x)
    (y * inputs(*y.shape, dtype=y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]


def assert_close(ours, theirs, rtol=0, atol=1e-12):
    """Lists of tensors, or of None in the same places."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# --- the layer ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,), (1, 6), (2, 1, 3, 6)])
@pytest.mark.parametrize("k, r, bias", [(1, 1, True), (1, 4, False), (3, 2, True), (6, 6, False)])
def test_same_function_and_gradients(shape, k, r, bias):
    """Oracle: LoRA2Linear in float64, with and without a gradient for the input, also from a view."""
    plain, quick = twins(k, r, bias)
    x = inputs(*shape)
    view = torch.stack([x, x], -1)[..., 0]
    for given in (x, x.clone().requires_grad_(), view.requires_grad_()):
        assert_close(passed(quick, given), passed(plain, given))
    with torch.no_grad():
        assert_close([quick(x)], [plain(x)])


def test_a_gradient_of_a_gradient_is_refused():
    """Oracle: torch's own words: what is kept for the backward pass is kept as numbers."""
    _, layer = twins()
    (dv,) = torch.autograd.grad(layer(inputs(5, 6)).square().sum(), [layer.v], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dv.sum().backward()


@pytest.mark.parametrize("words", [["bias"], ["weight", "bias"]])
def test_a_base_that_is_trained_too(words):
    """Oracle: LoRA2Linear: add_lora2(..., trainable=["bias"]) trains the biases of adapted layers as well."""
    x, nets = inputs(5, 6), [network(LoRA2Linear), network()]
    for net in nets:
        for name, p in net.named_parameters():
            p.requires_grad_(p.requires_grad or name.rpartition(".")[2] in words)
    cast_frozen(nets[1], torch.bfloat16)
    plain, quick = (passed(net, x) for net in nets)
    assert len(quick) == 2 + 15 + 3 * len(words)
    assert_close(quick, plain)


def test_what_was_cast_is_gone_with_the_adapter():
    """Oracle: LoRA2Linear, which never casts W0 ahead: merged in place, then adapted once more."""
    net, x = network().float(), inputs(5, 6, dtype=torch.float32)
    cast_frozen(net, torch.bfloat16)
    merge_lora2(net)
    other = copy.deepcopy(net)
    for each, layer in ((net, FastLoRA2Linear), (other, LoRA2Linear)):
        add_lora2(each, ["0", "2", "4"], k=2, r=3, layer=layer)            # Λ = 0: W0 alone is seen
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("base_dtype, autocast", [(torch.float32, True), (torch.bfloat16, False),
                                                  (torch.bfloat16, True), (DOUBLE, True)])
def test_precisions(base_dtype, autocast):
    """Oracle: LoRA2Linear: same dtypes of output and gradients, numbers to the rounding of bfloat16."""
    layers = twins(dtype=base_dtype, sizes=(32, 48))
    x = torch.randn(7, 32, dtype=base_dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, quick = (passed(layer, x) for layer in layers)
    for ours, theirs in zip(quick, plain, strict=True):
        assert ours.dtype == theirs.dtype
        tolerance = 0.05 if base_dtype != DOUBLE else 1e-12
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_what_nn_linear_would_do_is_done():
    """Oracle: nn.Linear: hooks see the base, and may keep what they saw; a backward hook may stand in between; a forward
    put in its place is called, mixed dtypes are an error."""
    x = inputs(5, 6)
    for layer in twins():
        seen, free, forward = [], layer(x), layer.base.forward
        handle = layer.base.register_forward_pre_hook(lambda module, args: seen.append(*args))
        assert torch.allclose(layer(x), free) and torch.equal(seen[0], x)
        handle.remove()
        handle = layer.base.register_forward_hook(lambda module, args, y: seen.append(y))
        assert torch.allclose(layer(x), free) and torch.equal(seen[1], layer.base(x))
        handle.remove()
        for register in (layer.base.register_full_backward_hook, layer.base.register_full_backward_pre_hook):
            handle = register(lambda *args: None)
            layer(x.clone().requires_grad_()).sum().backward()
            handle.remove()
        layer.base.forward = lambda x: forward(x) + 1      # as accelerate's offloading does it
        assert torch.allclose(layer(x), free + 1)
    for layer in twins(dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.float())


def test_dynamo_of_torch_2_6_can_trace_it():
    """Oracle: that version, by hand: it breaks the graph at vars(), which torch 2.13 traces."""
    assert "vars(" not in inspect.getsource(fast)


@pytest.mark.parametrize("layer", [LoRA2Linear, pytest.param(FastLoRA2Linear, marks=pytest.mark.ci)])
def test_where_people_use_it(layer):
    """Oracle: the plain forward and backward pass: copies and pickles, which share no storage with it, torch.compile
    as one graph, also with autocast, gradient checkpointing."""
    torch._dynamo.reset()
    net, x = network(layer), inputs(5, 6).requires_grad_()
    expected = passed(net, x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), expected[0])
        assert lora2_state_dict(other).keys() == lora2_state_dict(net).keys()
        nn.init.ones_(other[0].lam)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for call in (compiled, lambda x: checkpoint(net, x, use_reentrant=False)):
        assert_close(passed(net, x, call), expected)
        assert_close(passed(net, x.detach(), call), [expected[0], None, *expected[2:]])
    net, x = net.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), net(x))


def test_fewer_passes_over_large_arrays():
    """Oracle: counted by hand. Fast: W0, update; dy W0, update. Plain: a product and a sum more, each way."""
    for layer, n in zip(twins(sizes=(40, 50)), (3, 2)):
        x, dy = inputs(60, 40).requires_grad_(), inputs(60, 50)
        with Operations() as forward:
            y = layer(x)
        with Operations() as backward:
            y.backward(dy)
        for operations in (forward, backward):
            arrays = [out for function, out in operations.seen if torch.is_tensor(out) and not function.is_view]
            assert sum(out.numel() >= 60 * 40 for out in arrays) == n


def test_shared_updates():
    """Oracle: the same passes without it, also where two adapters of one shape have other scales. Afterwards nothing
    is left, whatever went wrong; other adapters are left alone."""
    net, x = network(), inputs(5, 6)
    net.insert(3, copy.deepcopy(net[2]))
    net[3].scale *= 9
    layers = [layer for _, layer in lora2_layers(net)]
    apart = passed(net, x)

    def together(x):
        with shared_updates(net):
            return net(x)

    assert_close(passed(net, x, together), apart)
    with pytest.raises(ZeroDivisionError), shared_updates(net):
        1 / 0
    assert all(layer.shared is None for layer in layers)
    with shared_updates(network(LoRA2Linear)), shared_updates(nn.Linear(2, 2)):
        pass
    net[-1].U = None                                       # of the last shape: its factors cannot be stacked
    with pytest.raises(TypeError), shared_updates(net):
        pass
    assert all(layer.shared is None for layer in layers)


# --- the regulariser ----------------------------------------------------------------------------------------

TERMS = [terms for n in (1, 2, 3) for terms in itertools.combinations(("uv", "UV", "PQ"), n)]


@pytest.mark.parametrize("k, r", [(1, 4), (3, 3), (4, 2)])
def test_the_batched_regulariser(k, r):
    """Oracle: lora2.orthogonality_loss(), adapter by adapter, in float64: value and gradients to 1e-12. The
    shapes take turns, so that a group is not a run of neighbours, and one adapter has another scale."""
    torch.manual_seed(k)
    net = nn.ModuleList([nn.Linear(*((5, 7), (7, 5), (6, 6))[i % 3]) for i in range(7)]).double()
    for i, linear in enumerate(net):
        net[i] = LoRA2Linear(linear, k, r, alpha=1 + (i == 3))
    for p in net.parameters():
        nn.init.normal_(p)
    factors = [p for p in net.parameters() if p.requires_grad]
    for terms in TERMS:
        found = []
        for loss in (orthogonality_loss, fast.orthogonality_loss):
            R = loss(net, terms)
            found.append([R.detach(), *torch.autograd.grad(R, factors, allow_unused=True)])
        assert_close(*found, rtol=1e-12)


def test_the_batched_regulariser_refuses_the_same():
    """Oracle: the words of lora2.orthogonality_loss(), also where there is no adapter."""
    for terms, net in (((), network()), (["uV"], network()), (["uv", "all"], network()), (["uv"], nn.Identity())):
        words = []
        for loss in (orthogonality_loss, fast.orthogonality_loss):
            with pytest.raises(ValueError, match="list some of|no LoRA² adapters") as error:
                loss(net, terms)
            words.append(str(error.value))
        assert words[0] == words[1]


def test_autocast_does_not_round_the_batched_regulariser():
    """Oracle: the same call outside autocast, bit for bit."""
    net = network().float()
    outside = fast.orthogonality_loss(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast.orthogonality_loss(net), outside)


@pytest.mark.parametrize("terms", [("uv", "UV", "PQ"), ("uv",)])
def test_add_gradients(terms):
    """Oracle: a second backward(); what R does not depend on keeps its gradient, or has none."""
    net, other = network(), network()
    for each in (net, other):
        passed(each, inputs(5, 6))
    (0.3 * orthogonality_loss(other, terms)).backward()
    unused = nn.Parameter(torch.ones(2))
    parameters = [p for p in net.parameters() if p.requires_grad]
    R = orthogonality_loss(net, terms)
    value = add_gradients(R, [*parameters, unused], 0.3)
    assert torch.equal(value, R) and not value.requires_grad
    assert_close([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])
    assert unused.grad is None


# --- the pruner ---------------------------------------------------------------------------------------------

def some_layers(n, dtype=DOUBLE, k=2, r=4):
    """n adapters of three shapes with random factors, which are never called."""
    torch.manual_seed(n)
    sizes = ((5, 4), (4, 6), (7, 7))
    net = nn.ModuleList([nn.Linear(*sizes[i % 3], dtype=dtype) for i in range(n)])
    add_lora2(net, [str(i) for i in range(n)], k=k, r=r)
    return net


def stir(net, step, value=None):
    """Random factors and gradients that depend on the step alone; or gradients of one value."""
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        if p.requires_grad:
            w, dw = torch.randn(2, *p.shape, generator=generator, dtype=DOUBLE).to(p.dtype)
            p.data.copy_(w)
            p.grad = dw if value is None else torch.full_like(p, value)


def averages_of(pruner):
    return [pruner.sensitivity, pruner.uncertainty]


@pytest.mark.filterwarnings("ignore:all Λ or all scores are 0")
@pytest.mark.parametrize("never", [False, True])
@pytest.mark.parametrize("importance", ["reduced", "full"])
def test_the_fast_pruner_is_the_pruner(importance, never):
    """Oracle: RankPruner over a whole schedule: averages and scores to 1e-12, the same sets and the same Λ, also
    after steps that overflowed and (never a gradient but 0) where all scores tie; either goes on from the other."""
    nets = [some_layers(5), some_layers(5)]
    plain, quick = (kind(net, 1, 20, 2, 5, 3, 0.7, 0.8, importance)
                    for kind, net in zip((RankPruner, FastRankPruner), nets))
    sets = set()
    for step in range(20):
        value = 0.0 if never else {4: math.inf, 5: math.nan}.get(step)
        for net in nets:
            stir(net, step, value)
            if step == 6:                                  # in one number only
                net[3].u.grad[0, 0] = math.inf
        assert plain.step() == quick.step() and plain.kept() == quick.kept()
        assert torch.equal(plain.keep, quick.keep)
        assert_close([*averages_of(quick), quick.scores()], [*averages_of(plain), plain.scores()], rtol=1e-12)
        assert all(torch.equal(a.lam, b.lam) for a, b in zip(*nets))
        sets.add(tuple(quick.keep.flatten().tolist()))
        if step == 9:                                      # they change places
            state = copy.deepcopy(plain.state_dict())
            plain.load_state_dict(quick.state_dict())
            quick.load_state_dict(state)
    assert quick.t == 20 and quick.kept_total == 5 and len(sets) >= (2 if never else 4)


@pytest.mark.parametrize("importance, most", [("reduced", 24), ("full", 29)])
def test_a_step_costs_the_same_few_operations_for_any_depth(importance, most):
    """Oracle: torch's dispatch mode counts those that compute, and sees whether the host asks the device for a
    number, as for the benchmark."""
    counted = {2: [], 24: []}
    for n in counted:
        net = some_layers(n)
        pruner = FastRankPruner(net, 2, 20, 0, 5, 2, importance=importance)
        for step in range(20):
            stir(net, step)
            with counts.Operations() as operations:
                pruner.step()
            counted[n].append(operations.total)
            assert operations.reads == 0
    assert counted[2] == counted[24] and max(counted[2]) <= most
