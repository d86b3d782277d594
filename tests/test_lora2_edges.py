"""Edge cases of lora2.py: refusals, dtypes, skipped steps, two processes.

What the method promises stands in test_lora2.py, from where the models and helpers come. Every test names
its oracle.
"""
import ast
import copy
import math
import statistics
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lora2
from lora2 import (LoRA2Linear, RankPruner, add_lora2, load_lora2_state_dict, lora2_layers, lora2_state_dict,
                   merge_lora2, orthogonality_loss)
from methods.fast_lora2 import FastLoRA2Linear, FastRankPruner
from methods.hosts import adapters_off
from test_lora2 import (FACTORS, TARGETS, Block, SlowImportance, adapted, dense, everything, give_gradients,
                        randomised, seeded_and_single_threaded, sha, stack_of, through_a_file,
                        trainable_parameters)          # seeded_and_single_threaded works by being here

ROOT = Path(lora2.__file__).resolve().parent


# --- the layer ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_dtypes(base_dtype, autocast):
    """Oracle: the same layer computed in float64; the dtype of the output is the base's own."""
    base = nn.Linear(16, 12).to(base_dtype)
    layer = randomised(LoRA2Linear(base, k=2, r=4, alpha=4))
    factor_dtype = torch.float64 if base_dtype == torch.float64 else torch.float32
    assert {getattr(layer, name).dtype for name in FACTORS} == {factor_dtype}
    x = torch.randn(2, 7, 16, dtype=base_dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y, plain = layer(x), base(x)
    assert y.dtype == plain.dtype and layer.weight.dtype == base_dtype
    precise = copy.deepcopy(layer).double()
    exact = F.linear(x.double(), precise.base.weight + dense(precise), precise.bias)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 0.01}.get(y.dtype, 0.06)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
    y.float().square().sum().backward()
    for name in FACTORS:
        grad = getattr(layer, name).grad
        assert grad.dtype == factor_dtype and grad.isfinite().all() and grad.any()


def test_autocast_does_not_round_the_update():
    """Oracle: the same calls outside autocast, bit for bit: core, ΔW, merging, export and the regulariser."""
    model = adapted()
    layer = model.up

    def calls():
        return (layer.core(), layer.delta_weight(), layer.weight, *layer.to_lora(), orthogonality_loss(model),
                merge_lora2(copy.deepcopy(model)).up.weight)

    outside = calls()
    with torch.autocast("cpu", torch.bfloat16):
        inside = calls()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(outside, inside))


# --- in other people's modules ------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_fast_path_reads_the_adapted_matrix(monkeypatch):
    """Oracle: the merged model. The fast path never calls its Linear layers: it takes .weight and .bias."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [4], [2]])
    assert len(add_lora2(model, ["linear1", "linear2"], k=2, r=4)) == 4
    fast, calls = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fast(*a))
    before = copy.deepcopy(model)
    for change in range(2):
        randomised(model)
        with torch.no_grad():
            y, merged = model(x), merge_lora2(copy.deepcopy(model))(x)
            padded = model(x, src_key_padding_mask=padding)
        assert len(calls) == 2 * 3 * (change + 1)          # it was the fast path, every time
        torch.testing.assert_close(y, merged, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)          # with gradients: the slow path
        kept = ~padding
        slow = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(padded[kept], slow[kept], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(y, before(x), atol=1e-3)                     # it follows every change
        before = copy.deepcopy(model)
    with pytest.raises(TypeError, match="self_attn.out_proj is a NonDynamicallyQuantizableLinear"):
        add_lora2(nn.TransformerEncoder(layer, 1), ["out_proj"], k=2, r=4)


# --- add_lora2 ----------------------------------------------------------------------------------------------

def test_trainable_parts_stay_trainable_inside_adapted_layers_too():
    """Oracle: requires_grad of every bias; what was frozen by the user and is named becomes trainable."""
    model = Block().requires_grad_(False)
    add_lora2(model, ["query", "up"], k=2, r=4, trainable=["bias"])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.endswith("bias") or name.rpartition(".")[2] in FACTORS), name


def test_one_name_or_any_collection_of_names_will_do():
    """Oracle: the list form."""
    for targets, trainable in (("query", "norm"), (("query",), {"norm"}), (iter(["query"]), iter(["norm"]))):
        model = Block()
        assert add_lora2(model, targets, k=2, r=4, trainable=trainable) == ["query"]
        assert model.norm.weight.requires_grad and not model.value.weight.requires_grad


def test_a_subclass_can_be_added():
    """Oracle: the type of the layers."""
    class Mine(LoRA2Linear):
        pass

    model = Block()
    add_lora2(model, ["query"], k=2, r=4, init="orthonormal", layer=Mine)
    assert type(model.query) is Mine and lora2_layers(model) == [("query", model.query)]
    torch.testing.assert_close(orthogonality_loss(model), torch.tensor(4.0))   # the floor: init was passed on


def integer_linear(dtype):
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=dtype), requires_grad=False)
    return layer


class Traced(torch.Tensor):
    """A tensor subclass, as quantisation and sharding libraries put into plain nn.Linear layers."""


def subclassed_weight():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8).as_subclass(Traced))
    return layer


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.lm_head.weight = self.embed.weight


SHARED = nn.Linear(8, 8)


REFUSED = {
    "embedding": (lambda: nn.Embedding(8, 8), TypeError, "bad is a Embedding"),
    "a whole block": (Block, TypeError, "bad is a Block"),
    "a subclass": (lambda: type("MyLinear", (nn.Linear,), {})(8, 8), TypeError, "bad is a MyLinear"),
    "lazy": (lambda: nn.LazyLinear(8), TypeError, "bad is a LazyLinear"),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), TypeError, "bad is a Paramet"),
    "pruned by torch": (lambda: prune.identity(nn.Linear(8, 8), "weight"), TypeError, "re-parametrised"),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), TypeError, "meta device"),
    "integers": (lambda: integer_linear(torch.int32), TypeError, "quantised"),
    "fp8": (lambda: nn.Linear(8, 8).to(torch.float8_e4m3fn), TypeError, "quantised"),
    "tensor subclass": (subclassed_weight, TypeError, "bad is a Linear, not an nn.Linear with a plain weight"),
    "too small for k": (lambda: nn.Linear(8, 1), ValueError, "bad takes integers from 1 to 1"),
    "shared": (lambda: SHARED, ValueError, "bad, or its weight, is used in several places"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_by_name_and_nothing_is_touched(case):
    """Oracle: the list above; types, flags and bytes of the model from before. The bad layer comes last."""
    make, error, message = REFUSED[case]
    model = nn.ModuleDict({"good": nn.Linear(8, 8), "other": SHARED, "bad": make()})
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    types = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        add_lora2(model, ["good", "bad"], k=2, r=2)
    assert [type(module) for module in model.modules()] == types
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("name", ["embed", "lm_head"])
def test_a_tied_weight_is_trained_under_either_name(name):
    """Oracle: the name that was given. It is listed under both: the other one must not freeze it."""
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "tied": Tied()})
    add_lora2(model, ["query"], k=2, r=2, trainable=[name])
    assert model["tied"].embed.weight.requires_grad and not model["query"].base.weight.requires_grad


def test_what_cannot_have_a_gradient_stays_frozen():
    """Oracle: torch, which refuses a gradient of integers: quantised weights may stand beside a head."""
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "head": integer_linear(torch.int8)})
    add_lora2(model, ["query"], k=2, r=2, trainable=["head"])
    assert model["head"].bias.requires_grad and not model["head"].weight.requires_grad
    only = nn.ModuleDict({"query": nn.Linear(8, 8), "head": integer_linear(torch.int8)})
    only["head"].bias = None
    with pytest.raises(ValueError, match=r"trainable = \['head'\] match nothing to train"):
        add_lora2(only, ["query"], k=2, r=2, trainable=["head"])


@pytest.mark.parametrize("options, message", [
    (dict(targets=["nothing"]), r"^targets = \['nothing'\] match .*; Linear layers: \['1', 'down', 'query', 'up', 'value'\]$"),
    (dict(targets=["quer"]), "match no layer"),
    (dict(targets=["uery"]), "match no layer"),
    (dict(targets=["query", "dense"]), r"= \['dense'\] match no layer"),
    (dict(targets=[]), r"^targets = \[\] match no layer"),
    (dict(targets=[""]), r"\[''\] match no layer"),
    (dict(trainable=["clas"]), r"^trainable = \['clas'\] match nothing to train"),
    (dict(trainable=["query"]), r"^targets = \['query'\] match no layer outside of what is trainable"),
    (dict(targets=["query", "value"], trainable=["query"]), r"^targets = \['query'\] match no layer"),
    (dict(k=0), "k = 0"), (dict(r=0), "r = 0"), (dict(k=-1), "k = -1"), (dict(k=9), "integers from 1 to 8"),
    (dict(r=9), "integers from 1 to 8"), (dict(k=2.0), "k = 2.0"), (dict(r=True), "r = True"),
    (dict(alpha=0), "alpha = 0: give a positive"), (dict(alpha=-1), "alpha = -1"),
    (dict(alpha=math.inf), "alpha = inf"), (dict(alpha=math.nan), "alpha = nan"),
    (dict(init="zeros"), "init = 'zeros'"),
])
def test_bad_arguments(options, message):
    """Oracle: the sentence the user should read; the model stays as it was."""
    model = Block()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        add_lora2(model, **{"targets": ["query"], "k": 2, "r": 4, **options})
    assert not lora2_layers(model) and [p.requires_grad for p in model.parameters()] == flags


def test_a_subclass_that_raises_leaves_the_model_without_adapters():
    """Oracle: the model before: all adapters are made before the first is put in."""
    class Picky(LoRA2Linear):
        def __init__(self, base, *arguments):
            super().__init__(base, *arguments)
            if base.out_features == 12:
                raise ValueError("not this one")

    model = Block()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="not this one"):
        add_lora2(model, TARGETS, k=2, r=4, layer=Picky)
    assert [name for name, _ in model.named_modules()] == names


def test_adding_twice_is_refused():
    """Oracle: the sentence."""
    with pytest.raises(ValueError, match="has LoRA² adapters already"):
        add_lora2(adapted(), ["query"], k=2, r=4)


# --- the regulariser ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("terms", [(), ["uV"], ["uv", "all"], "uv", "PQ"])
def test_unknown_terms_are_refused(terms):
    """Oracle: the three names there are."""
    with pytest.raises(ValueError, match="list some of 'uv', 'UV', 'PQ'"):
        orthogonality_loss(adapted(), terms)


def test_a_model_without_adapters_has_no_regulariser():
    """Oracle: the sentence; a silent 0 would train without the method."""
    with pytest.raises(ValueError, match="the model has no LoRA² adapters"):
        orthogonality_loss(Block())


# --- the pruner ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [RankPruner, FastRankPruner])
@pytest.mark.parametrize("where, bad", [("head", math.inf), ("v", math.nan), ("u", math.inf)])
def test_a_step_that_a_scaler_skipped_does_not_spoil_the_scores(kind, fused, where, bad):
    """Oracle: SlowImportance of the gradients without scaling, where that step alone lets all Ū fade: the order of the
    scores stays. One number overflows, of the head, of a v, which is not scored, or of a u; a fused AdamW leaves the
    other gradients times 65536."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    add_lora2(net, ["0"], k=2, r=4, init="orthonormal", trainable=["1"])
    randomised(net)
    optimizer = torch.optim.AdamW(trainable_parameters(net), lr=1e-3, fused=fused)
    scaler, pruner, slow = torch.amp.GradScaler("cpu"), kind(net, 1, 100, 99, 0, 1), SlowImportance(net)
    for step in range(6):
        scaler.scale(net(torch.randn(8, 6)).square().mean()).backward()
        if step == 3:
            (net[1].bias if where == "head" else getattr(net[0], where)).grad.view(-1)[0] = bad
        scaler.step(optimizer)
        scaler.update()
        before = pruner.scores()
        pruner.step()
        if step == 3:
            assert torch.equal(pruner.scores().flatten().argsort(), before.flatten().argsort())
            for U_bar in slow.U_bar:
                U_bar.update({name: slow.beta2 * U for name, U in U_bar.items()})
        else:
            slow.update()
        optimizer.zero_grad()
    torch.testing.assert_close(pruner.scores().double(), slow.scores(), rtol=1e-4, atol=1e-12)


def test_a_sparse_gradient_elsewhere():
    """Oracle: the same model with a dense one: the same scores."""
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(5, 6, sparse=sparse), nn.Linear(6, 6))
        add_lora2(net, ["1"], k=2, r=4, init="orthonormal", trainable=["0"])
        randomised(net)
        pruner = RankPruner(net, 1, 10, 0, 0, 1)
        net(torch.tensor([1, 3])).square().mean().backward()
        pruner.step()
        found.append(pruner.scores())
    assert torch.equal(*found) and found[0].all()


@pytest.mark.parametrize("kind", [RankPruner, FastRankPruner])
def test_an_adapter_that_a_batch_left_out(kind):
    """Oracle: the rule: without a gradient I = 0, as SlowImportance has it for gradients of 0 (LayerDrop, experts)."""
    model = stack_of(3)
    pruner, slow = kind(model, 1, 100, 99, 0, 1), SlowImportance(model)
    for left_out in ([1], [], [0, 2]):
        give_gradients(model)
        for i in left_out:
            model[i].lam.grad.zero_(), model[i].u.grad.zero_()
        slow.update()
        for i in left_out:
            model[i].lam.grad = model[i].u.grad = None     # U has one of R
        pruner.step()
    torch.testing.assert_close(pruner.scores(), slow.scores(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", [RankPruner, FastRankPruner])
def test_the_pruner_needs_gradients_and_stays_as_it_was_without(kind):
    """Oracle: the sentence, and the state from before. After zero_grad() there is none; if the loss does not come
    through the adapters, R alone gives u and U one, and Λ none."""
    model = stack_of(2)
    pruner = kind(model, 1, 10, 0, 2, 1)
    give_gradients(model)
    pruner.step()
    before = sha(pruner.state_dict())
    for clear in (lambda: torch.optim.SGD(trainable_parameters(model)).zero_grad(),
                  lambda: orthogonality_loss(model).backward()):
        clear()
        with pytest.raises(RuntimeError, match=r"^no adapter has a gradient: call pruner.step\(\) after"):
            pruner.step()
        assert sha(pruner.state_dict()) == before


def nonzero(model):
    return sum(int(layer.lam.count_nonzero()) for _, layer in lora2_layers(model))


def test_the_choice_is_put_on_an_averaged_model():
    """Oracle: counting. An average of models has every Λ that one of them had; kept() is of the choice alone."""
    model = small_net()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    pruner = RankPruner(model, 1, 12, 2, 4, 2)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.05)
    for step in range(12):
        x, y = data(step)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    assert sum(pruner.kept().values()) == nonzero(model) == 2 < nonzero(averaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.mask(averaged)
    assert nonzero(averaged) == 2
    for (_, mine), (_, theirs) in zip(lora2_layers(model), lora2_layers(averaged)):
        assert torch.equal(mine.lam != 0, theirs.lam != 0)
    for other in (Block(), adapted(), nn.Sequential(*stack_of(2, r=3))):
        with pytest.raises(ValueError, match="a model with the adapters that the pruner has"):
            pruner.mask(other)


def test_kept_does_not_speak_of_weights_that_were_loaded_afterwards():
    """Oracle: the weights of an earlier step have more Λ than the choice: an error, until mask() was called. Before
    the last phase what is 0 may return, and kept() is of the choice."""
    model = stack_of(2)
    pruner = RankPruner(model, 1, 4, 0, 1, 1)
    best = copy.deepcopy(model.state_dict())
    for t in range(1, 5):
        give_gradients(model)
        kept = pruner.step()
        if t == 2:
            assert kept == sum(pruner.kept().values()) == 2 and nonzero(randomised(model)) == 4
            assert kept == sum(pruner.kept().values())
    kept = pruner.kept()
    model.load_state_dict(best)
    with pytest.raises(RuntimeError, match=r"call pruner.mask\(model\)"):
        pruner.kept()
    pruner.mask(model)
    assert pruner.kept() == kept and nonzero(model) == sum(kept.values()) == 2


@pytest.mark.parametrize("fault", ["none", "early optimizer", "zeroed gradients"])
def test_a_choice_of_nothing_is_told(fault):
    """Oracle: by hand: an optimizer that was made before add_lora2() has no factor; what is zeroed has the score 0."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    add_lora2(model, ["0"], k=2, r=4, trainable=["1"])
    if fault != "early optimizer":
        optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.05)
    pruner = RankPruner(model, 1, 6, 0, 2, 1)
    for step in range(6):
        x, y = data(step)
        (F.mse_loss(model(x), y) + orthogonality_loss(model)).backward()
        optimizer.step()
        if fault == "zeroed gradients":
            optimizer.zero_grad(set_to_none=False)
        pruner.step()
        model.zero_grad()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pruner.kept()
    assert len(said) == (fault != "none") and all("optimizer after" in str(one.message) for one in said)


def test_a_run_that_ends_early_says_that_its_budget_was_not_reached():
    """Oracle: the cubic by hand: of 8 singular values 5, 3 and 2, which is the budget, are left at steps 2, 4 and
    6. When it is reached nothing is said."""
    model = stack_of(2, r=4)
    pruner = RankPruner(model, 1, 20, 0, 10, 2)
    for t in range(1, 11):
        give_gradients(model)
        pruner.step()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            pruner.mask(model)
        assert bool(said) == (t < 6) and nonzero(model) == sum(pruner.kept().values())
        if t == 5:
            assert "the run ended at step 5 of 20: 3 singular values are left" in str(said[0].message)
            assert said[0].filename == __file__            # where mask() was called


@pytest.mark.parametrize("layer", [LoRA2Linear, FastLoRA2Linear])
def test_adapters_off_gives_the_base(layer):
    """Oracle: the base, bit for bit; the tuned model afterwards, also after an error and when nested. A file that
    was saved within it is refused."""
    base, x = Block().eval(), torch.randn(5, 8)
    model = copy.deepcopy(base)
    add_lora2(model, TARGETS, k=2, r=4, layer=layer)
    tuned = randomised(model)(x)
    with adapters_off(model):
        assert torch.equal(model(x), base(x))
        with adapters_off(model):
            pass
        assert torch.equal(model(x), base(x)) and torch.equal(model.up.weight, base.up.weight)
        state = lora2_state_dict(model)
    with pytest.raises(ValueError, match="scale differs"):
        load_lora2_state_dict(model, state)
    assert torch.equal(model(x), tuned) and not torch.allclose(tuned, base(x), atol=1e-3)
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        1 / 0
    assert torch.equal(model(x), tuned)


def test_all_linear_layers():
    """Oracle: the list, written out: not the head, which trains, nor what is no plain nn.Linear."""
    model = nn.ModuleDict({"layer": nn.ModuleList([Block()]), "attention": nn.MultiheadAttention(8, 2)})
    names = add_lora2(model, "all-linear", k=2, r=4, trainable=["classifier"])
    assert names == [f"layer.0.{name}" for name in ("query", "value", "up", "down")]
    with pytest.raises(ValueError, match=r"\['all-linear'\] match no layer"):
        add_lora2(nn.ModuleDict({"norm": nn.LayerNorm(8)}), "all-linear", k=2, r=4)
    with pytest.raises(ValueError, match="lm_head, or its weight, is used in several places"):
        add_lora2(nn.ModuleDict({"a": nn.Linear(8, 8), "tied": Tied()}), "all-linear", k=2, r=4)


def test_a_pruner_in_the_model_does_not_enter_its_file():
    """Oracle: the file of the model without it. All that it has to keep are tensors, as some files hold only such."""
    model = adapted()
    before = lora2_state_dict(model)
    model.pruner = RankPruner(model, 1, 10, 1, 1, 1)
    assert sha(lora2_state_dict(model)) == sha(before)
    assert all(isinstance(tensor, torch.Tensor) for tensor in model.state_dict().values())


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_averages_in_full_precision_whatever_the_model_is_cast_to(dtype, attached):
    """Oracle: SlowImportance in float64, on the weights and gradients as they were rounded, of a model that is cast
    before its pruner is made, or with the pruner in it."""
    model = stack_of(2, dtype=torch.float32)
    if attached:
        model.append(everything(model))
    pruner = model.to(dtype)[-1] if attached else everything(model.to(dtype))
    for value in (3e-4, 1e-4):
        give_gradients(model, value)                       # I is about 1e-4, and Ī · Ū far below 6e-8
        pruner.step()
    model.to(torch.float32)
    exact = torch.float64 if dtype == torch.float64 and not attached else torch.float32
    assert pruner.sensitivity.dtype == pruner.uncertainty.dtype == exact
    slow = SlowImportance(model.to(torch.float64))
    for value in (3e-4, 1e-4):
        give_gradients(model, torch.tensor(value, dtype=dtype).item())
        slow.update()
    torch.testing.assert_close(pruner.scores().double(), slow.scores(), rtol=1e-4, atol=0)
    assert pruner.scores().min() > 0


@pytest.mark.parametrize("kind", [RankPruner, FastRankPruner])
def test_the_last_choice_stays_when_averages_are_lost(kind):
    """Oracle: the selection at T - t_f, of a model with its pruner in it that was saved in fp16 afterwards."""
    model = stack_of(3, r=4, dtype=torch.float32)
    model.append(kind(model, 1, 20, 2, 12, 2))
    for step in range(20):
        if step == 10:
            chosen = model[-1].keep.clone()
            model.half().float()
        give_gradients(model, 1e-9)                        # Ī becomes 0 in fp16
        model[-1].step()
    assert not model[-1].sensitivity.any() and torch.equal(model[-1].keep, chosen)
    assert not torch.stack(model[-1].scored()[:3])[~chosen].any()


def test_the_pruner_stops_at_its_end():
    """Oracle: total_steps."""
    model = stack_of(1)
    pruner = RankPruner(model, 1, 2, 0, 1, 1)
    give_gradients(model)
    assert [pruner.step(), pruner.step()] == [1, 1]
    with pytest.raises(RuntimeError, match="more than total_steps times"):
        pruner.step()
    assert pruner.t == 2


@pytest.mark.parametrize("options, message", [
    (dict(target_rank=3), "from 0 to r = 2"), (dict(target_rank=-1), "= -1"),
    (dict(target_rank=1.0), "target_rank = 1.0"), (dict(target_rank=True), "target_rank = True"),
    (dict(warmup=5, final=5), "warmup = 5, final = 5, interval = 1: give integers"),
    (dict(warmup=11), "warmup = 11,"), (dict(final=10), "final = 10,"), (dict(final=8), "final = 8,"),
    (dict(total_steps=0), "total_steps = 0,"), (dict(interval=0), "interval > 0"), (dict(interval=-2), "-2"),
    (dict(warmup=-1), "warmup = -1,"), (dict(final=-1), "final = -1,"),
    (dict(warmup=0.1), "warmup = 0.1,"), (dict(interval=1.5), "interval = 1.5: give integers"),
    (dict(importance="both"), "importance = 'both': give 'reduced' or 'full'"),
    (dict(beta1=1.0), "beta1 = 1.0, beta2 = 0.85: give 0 to below 1"),               # all scores stay 0
    (dict(beta1=-0.1), "beta1 = -0.1"), (dict(beta2=1.0), "beta2 = 1.0"), (dict(beta2=1.5), "beta2 = 1.5"),
    (dict(beta1=math.nan), "beta1 = nan"), (dict(beta2=-1e-9), "beta2 = -1e-09"),
])
def test_impossible_schedules_name_what_to_change(options, message):
    """Oracle: the sentence the user should read."""
    given = {"target_rank": 1, "total_steps": 10, "warmup": 2, "final": 2, "interval": 1, **options}
    with pytest.raises(ValueError) as error:
        RankPruner(stack_of(1), **given)
    assert message in str(error.value)


def test_the_pruner_needs_adapters_of_one_kind():
    """Oracle: the sentence; scores of stacked adapters need one shape, and their sum one dtype."""
    first = LoRA2Linear(nn.Linear(8, 8), k=1, r=2)
    other = [LoRA2Linear(nn.Linear(8, 8), k=1, r=3), LoRA2Linear(nn.Linear(8, 8), k=2, r=2),
             LoRA2Linear(nn.Linear(8, 8).double(), k=1, r=2),
             LoRA2Linear(nn.Linear(8, 8), k=1, r=2).requires_grad_(False)]
    with pytest.raises(ValueError, match=r"call add_lora2\(\) first"):
        RankPruner(Block(), 1, 10, 0, 0, 1)
    for second in other:
        with pytest.raises(ValueError, match="needs adapters of one"):
            RankPruner(nn.ModuleList([first, second]), 1, 10, 0, 0, 1)


def run_training(model, batches, steps=12, accumulate=1, forward=None):
    """A run on fixed data with R and pruning; returns what was kept at the end."""
    pruner = RankPruner(model, 1, steps, 2, 4, 2)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.05, weight_decay=0.01)
    for step in range(steps):
        for x, y in batches(step):
            (F.mse_loss((forward or model)(x), y) / accumulate).backward()
        (0.1 * orthogonality_loss(model)).backward()       # once per optimizer step
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    return pruner.keep


def small_net():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    add_lora2(model, ["0", "2"], k=2, r=4, alpha=4, init="orthonormal", trainable=["4"])
    return model


def data(step):
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(8, 6, generator=generator, dtype=torch.float64),
            torch.randn(8, 2, generator=generator, dtype=torch.float64))


def test_accumulated_gradients_prune_the_same():
    """Oracle: the run on whole batches: the same entries, and factors equal to 1e-8 in float64."""
    model = small_net()
    twin = copy.deepcopy(model)
    keep = run_training(model, lambda step: [data(step)])
    micro = lambda step: list(zip(*(part.split(2) for part in data(step))))
    assert torch.equal(run_training(twin, micro, accumulate=4), keep)
    assert keep.sum() == 2 and not keep.all()
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# --- saving, loading, merging -------------------------------------------------------------------------------

def test_frozen_adapters_are_saved_and_loaded():
    """Oracle: the model that was trained, bit for bit: freezing it, say to evaluate, loses no adapter."""
    base, x = Block().eval(), torch.randn(5, 8)
    model, fresh, frozen = (copy.deepcopy(base) for _ in range(3))
    for each in (model, fresh, frozen):
        add_lora2(each, TARGETS, k=2, r=4)
    expected = randomised(model)(x)
    state = lora2_state_dict(model.requires_grad_(False))
    for other in (fresh, frozen.requires_grad_(False)):
        load_lora2_state_dict(other, through_a_file(state))
        assert torch.equal(other(x), expected)


def test_the_statistics_of_a_frozen_norm_are_saved():
    """Oracle: the model that was trained: while it is, a BatchNorm moves its statistics, frozen or not."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model, fresh, x = copy.deepcopy(base), copy.deepcopy(base), torch.randn(64, 8) * 3 + 1
    for net in (model, fresh):
        add_lora2(net, ["0"], k=2, r=4, trainable=["2"])
    for _ in range(20):
        model(x)
    load_lora2_state_dict(fresh, through_a_file(lora2_state_dict(model)))
    assert torch.equal(fresh.eval()(x), model.eval()(x)) and not base[1].running_mean.any()


def test_what_may_have_changed_is_saved():
    """Oracle: the rule: all of state_dict() but frozen parameters; the extra state of other modules may be no
    tensor, and is left out."""
    class Counter(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    model = nn.ModuleDict({"query": nn.Linear(8, 8), "frozen": Counter(8, 8), "trained": nn.Linear(8, 8)})
    model["frozen"].register_buffer("seen", torch.ones(2))
    add_lora2(model, ["query"], k=2, r=4, trainable=["trained"])
    query = {f"query.{part}" for part in (*FACTORS, "scale", "base_sample")}
    assert lora2_state_dict(model).keys() == query | {"frozen.seen", "trained.weight", "trained.bias"}


def with_key(state, key, value):
    return {**state, key: value} if value is not None else {n: t for n, t in state.items() if n != key}


def of_another(**options):
    return lambda state: lora2_state_dict(adapted(trainable=["classifier"], **options))


@pytest.mark.parametrize("change, message", [
    (lambda s: with_key(s, "query.lam", None), "query.lam is .*the (file|model)"),
    (lambda s: with_key(s, "classifier.1.bias", None), "classifier.1.bias is .*the (file|model)"),
    (lambda s: with_key(s, "up.scale", None), "up.scale is .*the (file|model)"),
    (lambda s: with_key(s, "dense.lam", torch.zeros(4)), "dense.lam is .*the (file|model)"),
    (lambda s: with_key(s, "query.u", torch.zeros(3, 4)), "query.u is .*the (file|model)"),
    (lambda s: with_key(s, "classifier.1.bias", torch.zeros(5)), "classifier.1.bias is .*the (file|model)"),
    (lambda s: with_key(s, "down.scale", s["down.scale"] * 1.01), "down.scale differs: use"),
    (lambda s: with_key(s, "value.base_sample", s["value.base_sample"] * 1.1), "value.base_sample differs"),
    (lambda s: {}, "classifier.0.bias is .*the (file|model)"),
    (of_another(k=3), "down.U is .*the (file|model).*: use the file's base model, targets, k"),
    (of_another(alpha=8.1), "query.scale differs: use the file's alpha"),
    (of_another(), "query.base_sample differs: .* base model"),
])
def test_loading_is_strict_and_changes_nothing_when_it_refuses(change, message):
    """Oracle: the sentence, and a hash of the whole model from before."""
    model = adapted(trainable=["classifier"])
    state = lora2_state_dict(model)
    randomised(model)
    before = sha(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_lora2_state_dict(model, change(state))
    assert sha(model.state_dict()) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_half_precision_is_recognised(dtype):
    """Oracle: it is the same base, rounded; tiny weights may round to 0."""
    torch.manual_seed(1)
    base = Block()
    with torch.no_grad():
        base.up.weight.mul_(1e-6), base.down.weight.mul_(1e-8)
    saved = copy.deepcopy(base)
    add_lora2(saved, TARGETS, k=2, r=4)
    add_lora2(base.to(dtype), TARGETS, k=2, r=4)
    load_lora2_state_dict(base, lora2_state_dict(randomised(saved)))
    assert torch.equal(base.query.delta_weight(), saved.query.delta_weight())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merging_sums_in_full_precision_and_rounds_once(dtype):
    """Oracle: W0 + ΔW in float64, rounded to the base's dtype; a half-precision base gets almost everywhere
    exactly that."""
    base = nn.Linear(40, 30).to(dtype)
    layer = randomised(LoRA2Linear(base, k=2, r=4, alpha=2))
    expected = (base.weight.double() + dense(copy.deepcopy(layer).double())).to(dtype)
    merged = merge_lora2(nn.Sequential(layer))[0]
    assert merged is base and merged.weight.dtype == dtype and not merged.weight.requires_grad
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 0.01)
    torch.testing.assert_close(merged.weight, expected, rtol=tolerance, atol=1e-6)
    if dtype in (torch.bfloat16, torch.float16):
        assert (merged.weight == expected).float().mean() > 0.99


# --- the file -----------------------------------------------------------------------------------------------

def test_the_file_can_be_copied_and_read():
    """Oracle: its own source: torch and the standard library only, and nothing private of torch; half of the code
    (without docstrings) of 55 columns, ten comprehensions."""
    source = Path(lora2.__file__).read_text(encoding="utf-8")
    lines, nodes = source.splitlines(), list(ast.walk(ast.parse(source)))
    of_kind = lambda *kinds: [node for node in nodes if isinstance(node, kinds)]
    imports = {alias.name for node in of_kind(ast.Import) for alias in node.names}
    imports |= {node.module.split(".")[0] for node in of_kind(ast.ImportFrom)}
    assert imports <= {"torch", *sys.stdlib_module_names}
    prose = set()
    for node in of_kind(ast.Expr):                         # docstrings
        prose |= set(range(node.lineno, node.end_lineno + 1)) if isinstance(node.value, ast.Constant) else set()
    code = [line for i, line in enumerate(lines, 1) if i not in prose and line.strip() and line.strip()[0] != "#"]
    assert statistics.median(map(len, code)) <= 55
    assert len(of_kind(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)) <= 10
    assert not [node.attr for node in of_kind(ast.Attribute) if node.attr.startswith("_")
                and not node.attr.startswith("__")]


# --- last, because they take longest ------------------------------------------------------------------------

def ddp_worker(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(rank)                                # another model on rank 1: DDP hands out rank 0's
    model = small_net()
    parallel = nn.parallel.DistributedDataParallel(model)

    def forward(x):                                        # DDP averages the gradients of the halves
        return parallel(x)

    half = lambda step: [tuple(part[rank::2] for part in data(step))]
    keep = run_training(model, half, forward=forward)
    torch.save({"keep": keep, "state": lora2_state_dict(model)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_prune_the_same(tmp_path):
    """Oracle: one process on the whole batches: the same entries, and factors equal to 1e-8 in float64."""
    torch.manual_seed(0)
    model = small_net()
    keep = run_training(model, lambda step: [data(step)])
    torch.multiprocessing.spawn(ddp_worker, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        other = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(other["keep"], keep)
        for name, tensor in lora2_state_dict(model).items():
            torch.testing.assert_close(other["state"][name], tensor, rtol=1e-8, atol=1e-8)
