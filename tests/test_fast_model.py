"""The model part of methods/fast.py against model.py: what speed_up() makes computes the same numbers.

Parity of the fast model with transformers is tests/test_model.py's, which asks everything of both forms.
"""
import copy
import math
from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as M
from lora2 import LoRA2Linear, add_lora2
from methods import fast
from tests.checkpoints import FAMILIES, NARROW, SIX, STILL, Operations, build, mixed, rows

pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(family, targets=SIX, **changes):
    """A narrow model with random weights and adapters whose factors are not 0, its head trainable."""
    net = build(NARROW[family] | STILL | changes)
    add_lora2(net, M.target_modules(net, targets), k=2, r=3, trainable=net.head_parts)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad and p.dim() < 3 and 3 in p.shape:           # u, Λ, U
                p.normal_(generator=generator)
    return net


def step(net, batch):
    """The logits, and the gradient of each parameter that is trained: {name: tensor}."""
    net.zero_grad()
    logits = net(*batch)
    logits.float().square().sum().backward()
    return {"": logits.detach()} | {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def assert_near(found, expected, tolerance):
    """Two results of step(): to the tolerance of the logits' and of the gradients' largest number; 0 is to the bit."""
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max() for name, tensor in expected.items() if name)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * (largest if name else tensor.abs().max()), name


# --- the whole model ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("trained, training", [("adapters", True), ("adapters", False), ("all", True)])
@pytest.mark.parametrize("T", [1, 24, 132, 133, 200])
@FAMILIES
def test_same_function_and_gradients(family, T, trained, training):
    """Oracle: model.py's, in float64 to 1e-12 of the largest; from T = 133 on distances share buckets. Adapters
    and the head are trained, or everything, the table of positions and the embeddings too."""
    plain = adapted(family) if trained == "adapters" else build(NARROW[family] | STILL)
    plain = plain.double().train(training)
    quick = fast.speed_up(copy.deepcopy(plain))
    batch = rows(NARROW[family], mixed(T))
    expected = step(plain, batch)
    assert len(expected) > (60 if trained == "adapters" else 30)
    assert_near(step(quick, batch), expected, 1e-12)


@pytest.mark.parametrize("buckets, longest", [(8, 64), (2, 9), (7, 40), (64, 40)])
def test_other_tables_of_positions(buckets, longest):
    """Oracle: model.py's, in float64, at every length."""
    plain = build(NARROW["deberta"] | {"position_buckets": buckets, "max_position_embeddings": longest}).double()
    quick = fast.speed_up(copy.deepcopy(plain))
    for T in range(1, longest + 1):
        batch = rows(plain.config, [T])
        with torch.no_grad():
            assert (quick(*batch) - plain(*batch)).abs().max() < 1e-12


class Other(LoRA2Linear):
    """A subclass, which may compute something else."""


@FAMILIES
def test_only_classes_change(family):
    """Oracle: the model before: the same tensors under the same keys; a second call changes nothing more."""
    net = adapted(family, ["q", "f1"])
    net.other = Other(nn.Linear(4, 4), 1, 2)
    tensors = net.state_dict(keep_vars=True)
    slow = {M.Encoder, nn.Dropout, LoRA2Linear, M.SelfAttention, M.DisentangledSelfAttention}
    for _ in range(2):
        assert fast.speed_up(net) is net
        again = net.state_dict(keep_vars=True)
        assert again.keys() == tensors.keys() and all(again[key] is tensor for key, tensor in tensors.items())
        kinds = {type(module) for module in net.modules()}
        attention = fast.FastDisentangledSelfAttention if family == "deberta" else fast.FastSelfAttention
        assert {fast.FastEncoder, fast.CheapDropout, fast.FastLoRA2Linear, attention, Other} < kinds
        assert not kinds & slow


# --- dropout and attention ---------------------------------------------------------------------------------

@pytest.mark.parametrize("p, shape", [(0.1, (331, 301)), (0.5, (7, 11, 1001)), (1e-6, (10,)), (1.0, (3, 5))])
def test_dropout(p, shape):
    """Oracle: the binomial distribution within five standard deviations, torch's nn.Dropout for the rest."""
    ours, x = fast.CheapDropout(p), torch.full(shape, 3.0, requires_grad=True)
    torch.manual_seed(0)
    y = ours(x)
    y.sum().backward()
    kept, n = (y != 0).sum().item(), y.numel()
    assert abs(kept - n * (1 - p)) <= 5 * math.sqrt(n * p * (1 - p)) + n / 2**16
    assert torch.equal(y, 3 * x.grad) and y.dtype == x.dtype
    if kept:
        assert y.max() == y[y != 0].min() and abs(y.max().item() - 3 / (1 - p)) < 3e-4
    if 0.1 <= p < 1:                                       # neighbours and passes are independent
        dropped = (y == 0).float().flatten() - p
        again = (ours(x) == 0).float().flatten() - p
        for other in [again] + [dropped.roll(i) for i in (1, 2, 3, 4, shape[-1])]:
            assert abs((dropped * other).mean()) < 5 * p * (1 - p) / math.sqrt(n) + 1 / 2**15
    assert ours.eval()(x) is x and fast.CheapDropout(0.0)(x) is x


@pytest.mark.parametrize("training", [True, False])
def test_fused_attention_drops_in_training_alone(monkeypatch, training):
    """Oracle: the configuration's rate, on a device that is no CPU (meta: no numbers); 0 when evaluating."""
    rates, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, mask, p: rates.append(p) or attention(q, k, v, mask, p))
    with torch.device("meta"):
        block = M.SelfAttention(NARROW["roberta"] | {"attention_probs_dropout_prob": 0.23}).train(training)
        block.__class__ = fast.FastSelfAttention
        assert block(torch.ones(2, 20, 24), torch.zeros(2, 1, 1, 20)).shape == (2, 20, 24)
    assert rates == [0.23 if training else 0.0]


# --- frozen weights in bf16 --------------------------------------------------------------------------------

def bf16_step(net, batch):
    """step() under autocast, and how many weights were cast on the way: matrices of at least 24 columns."""
    with torch.autocast("cpu", torch.bfloat16), Operations() as operations:
        found = step(net, batch)
    weights = [cast for cast in operations.casts()
               if cast.dim() == 2 and cast.dtype == torch.bfloat16 and min(cast.shape) >= 24]
    return found, len(weights)


@pytest.mark.parametrize("trained", [(), ("bias", "classifier"), ("classifier",), ("attention",)])
@FAMILIES
def test_frozen_weights_are_cast_once(family, trained):
    """Oracle: the same model without copies, to the bit; by hand: what is frozen is not cast in a pass.

    trained: parts of names; none stands for LoRA² on q and f1, whose bases and other layers are frozen.
    """
    net = build(NARROW[family] | STILL) if trained else adapted(family, ["q", "f1"])
    for name, p in net.named_parameters() if trained else ():
        p.requires_grad_(M.in_head(name, trained))
    net.train()
    batch = rows(NARROW[family], mixed(40))
    uncast = fast.speed_up(copy.deepcopy(net))
    expected, before = bf16_step(uncast, batch)
    quick = fast.speed_up(net, "bf16")
    found, after = bf16_step(quick, batch)
    assert_near(found, expected, 0)
    matrices = [m for m in quick.modules() if isinstance(m, nn.Linear) and min(m.weight.shape) >= 24]
    frozen = [m for m in matrices if not m.weight.requires_grad]
    assert before - after >= len(frozen) >= 4
    assert not any("cast" in name for name in quick.state_dict())
    with torch.no_grad():
        assert torch.equal(quick(*batch), uncast(*batch))  # in fp32


def test_a_copy_is_not_used_where_it_would_be_wrong():
    """Oracle: nn.Linear: for a weight that is trained after all, in another dtype, and what it refuses."""
    layer, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(4, 6)
    fast.cast_frozen(nn.Sequential(layer), torch.bfloat16)
    with pytest.raises(TypeError, match="is a FrozenLinear, not an nn.Linear"):
        add_lora2(nn.Sequential(layer), ["0"], k=2, r=3)   # too late
    layer.weight.zero_()                                   # the copy does not follow
    zeros = layer.bias.expand(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(layer(x), zeros.bfloat16())
        assert torch.equal(layer.requires_grad_(True)(x), zeros.bfloat16())
        layer.requires_grad_(False)
    assert torch.equal(layer(x), zeros)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(layer(x), zeros.half())
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x.bfloat16())


# --- torch.compile -----------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("family, dtype, others", [("deberta", "bf16", [160, 180, 133]), ("roberta", "fp32", [])])
def test_compiled_layers(family, dtype, others, monkeypatch):
    """Oracle: the same model uncompiled, 1e-4; as many graphs for two layers as for three; and of what is
    merely a new length or number of rows, none. Lengths above 132 are other graphs of DeBERTa's."""
    from torch._dynamo.testing import CompileCounterWithBackend
    counts, compile = [], nn.Module.compile
    for layers in (2, 3):
        torch.compiler.reset()
        graphs = CompileCounterWithBackend("aot_eager")    # needs no C++ compiler
        monkeypatch.setattr(nn.Module, "compile", partialmethod(compile, backend=graphs))
        net = adapted(family, ["q", "f1"], num_hidden_layers=layers).train()
        plain = fast.speed_up(copy.deepcopy(net), dtype)
        compiled = fast.speed_up(net, dtype, compile=True)
        after = []
        for i, T in enumerate([10, 40, 20, *others, 17, 10]):              # none is d or H by chance
            batch = rows(NARROW[family], [T] * (5 + i % 3))
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                assert_near(step(compiled, batch), step(plain, batch), 1e-4)
            after.append(graphs.frame_count)
        assert 0 < after[0] == after[2] and after[3] == after[-1] <= 6, after
        counts.append(after)
    assert counts[0] == counts[1]
