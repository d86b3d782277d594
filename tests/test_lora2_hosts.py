"""lora2.py where people will drop it: models of transformers with random weights. Every test names its oracle."""
import copy

import pytest
import torch

from lora2 import (LoRA2Linear, RankPruner, add_lora2, lora2_layers, lora2_state_dict, merge_lora2,
                   orthogonality_loss)
from methods.fast_lora2 import FastLoRA2Linear, cast_frozen
from methods.hosts import adapters_off, conv1d_to_linear, rebuild
from test_lora2 import through_a_file

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::FutureWarning")]         # renamed methods of transformers
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 60, "max_position_embeddings": 32}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
LABELS = torch.tensor([0, 2, 1])


def ids(*shape, vocabulary=60):
    return torch.randint(1, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def text():
    return {"input_ids": ids(3, 7), "labels": ids(3, 7)}


def llama(tied=False, **changes):
    config = transformers.LlamaConfig(**TEXT | changes, num_key_value_heads=2, tie_word_embeddings=tied)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    return transformers.LlamaForCausalLM(config), targets, ["lm_head"], text()


def bert():
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, **STILL))
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
    mask = torch.arange(7) < torch.tensor([[7], [4], [5]])
    batch = {"input_ids": ids(3, 7), "attention_mask": mask, "labels": LABELS}
    return model, targets, ["pooler", "classifier"], batch


def vit():
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES, **STILL)
    model = transformers.ViTForImageClassification(config)
    linears = [name for name, m in model.vit.named_modules() if isinstance(m, torch.nn.Linear)]
    targets = [name.partition(".0.")[2] for name in linears if ".0." in name]
    assert len(targets) == 6, linears                      # the six matrices of a layer, under any names
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return model, targets, ["classifier"], {"pixel_values": pixels, "labels": LABELS}


def t5():
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0)
    return (transformers.T5ForConditionalGeneration(config), ["q", "v", "wi", "wo"], ["final_layer_norm"],
            {"input_ids": ids(3, 7), "labels": ids(3, 5)})


HOSTS = pytest.mark.parametrize("make", [llama, bert, vit, t5])


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def train(model, batch, target=2, schedule=(5, 1, 1, 1), kind=torch.optim.AdamW):
    """Steps with regulariser and pruning; returns the losses, the pruner and the optimizer."""
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.02)
    pruner, losses = RankPruner(model, target, *schedule), []
    model.train()
    for _ in range(pruner.total_steps):
        loss = model(**batch).loss
        (loss + 0.1 * orthogonality_loss(model)).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(pruner.kept().values()) == target * len(pruner.names)
    return losses, pruner, optimizer


@HOSTS
def test_add_train_save_rebuild_merge(make):
    """Oracle: the model itself. Adding changes no bit of the logits; training lowers the loss and leaves the base
    alone. A fresh copy of the base and the saved file alone give the same logits, bit for bit, names, scales and what
    trains; merging gives the original modules, with those logits to 1e-5."""
    torch.manual_seed(0)
    model, targets, trainable, batch = make()
    base, fresh, before = copy.deepcopy(model), copy.deepcopy(model), logits(model, batch)
    names = add_lora2(model, targets, k=2, r=3, alpha=7, init="orthonormal", trainable=trainable)
    assert len(names) >= 2 * len(targets)                  # in every layer
    assert torch.equal(logits(model, batch), before)
    losses, _, _ = train(model, batch)
    after = logits(model, batch)
    assert losses[-1] < losses[0] and not torch.allclose(after, before, atol=1e-2)
    with adapters_off(model):
        assert not torch.equal(logits(model, batch), after)
    assert torch.equal(logits(model, batch), after)

    assert rebuild(fresh, through_a_file(lora2_state_dict(model))) == names
    assert torch.equal(logits(fresh, batch), after)
    assert [layer.scale for _, layer in lora2_layers(fresh)] == pytest.approx([7 / 3] * len(names))
    assert [(name, p.requires_grad) for name, p in fresh.named_parameters()] == [
        (name, p.requires_grad) for name, p in model.named_parameters()]
    merged = merge_lora2(fresh)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert list(merged.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(logits(merged, batch), after, rtol=1e-5, atol=1e-5)


def test_what_a_file_cannot_rebuild():
    """Oracle: the sentence for a file that is of no such model, before anything is touched."""
    model, targets, _, _ = bert()
    other = bert()[0]
    add_lora2(model, targets, k=2, r=3)
    state = lora2_state_dict(model)
    for wrong in ({}, {"classifier.weight": torch.zeros(3, 32)}, {f"no.{key}": t for key, t in state.items()}):
        with pytest.raises(ValueError, match="not in this model: .*, or no adapters in the file"):
            rebuild(other, wrong)
        assert not lora2_layers(other) and all(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="base_sample differs"):
        rebuild(other, state)


def test_a_schedule_free_optimizer():
    """Oracle: counting. What such an optimizer evaluates is an average of pruned weights, with more nonzero Λ: kept()
    refuses to speak for them, and after mask() kept = nonzero Λ = budget."""
    schedulefree = pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    model, targets, trainable, batch = bert()
    add_lora2(model, targets, k=2, r=4, init="orthonormal", trainable=trainable)

    class Training(schedulefree.AdamWScheduleFree):
        def __init__(self, parameters, lr):
            super().__init__(parameters, lr=lr)
            self.train()

    losses, pruner, optimizer = train(model, batch, 1, (40, 4, 16, 2), Training)
    optimizer.eval()
    nonzero = lambda: {name: int(layer.lam.count_nonzero()) for name, layer in lora2_layers(model)}
    assert sum(nonzero().values()) > len(pruner.names)
    with pytest.raises(RuntimeError, match="mask"):
        pruner.kept()
    pruner.mask(model)
    assert pruner.kept() == nonzero() and sum(nonzero().values()) == len(pruner.names)
    assert model(**batch).loss < losses[0] / 2


def nf4(layer):
    return in_few_bits(layer, "Linear4bit", quant_type="nf4", compute_dtype=torch.float32)


def llm_int8(layer):
    return in_few_bits(layer, "Linear8bitLt", has_fp16_weights=False)


def in_few_bits(layer, kind, **options):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    few = getattr(bitsandbytes.nn, kind)(layer.in_features, layer.out_features, layer.bias is not None, **options)
    few.load_state_dict(layer.state_dict())
    return few.to("cpu")


def torchao_int8(layer):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


def in_training(model, batch):
    """Logits without eval(): after it bitsandbytes packs nf4 anew on a CPU, inexactly and without gradients."""
    with torch.no_grad():
        return model.train()(**batch).logits


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("layer", [LoRA2Linear, FastLoRA2Linear])
@pytest.mark.parametrize("quantise", [nf4, llm_int8, torchao_int8])
def test_a_quantised_base(quantise, layer):
    """Oracle: the model itself: no bit of it changes when adapters are added; trained, saved and loaded it gives
    equal logits; rounded to bf16 by autocast it still calls its own layers. On the full-precision base the file
    gives B A, which merging adds to 1e-5. Into few bits nothing can be merged, and nothing is touched."""
    torch.manual_seed(0)
    model, _, _, batch = llama(hidden_size=64, intermediate_size=64)       # nf4 has blocks of 64
    exact = copy.deepcopy(model)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "gate" not in name:
            model.model.set_submodule(name, quantise(module))
    base = copy.deepcopy(model)
    before = in_training(model, batch)
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]           # k_proj is in few bits and not adapted
    names = add_lora2(model, targets, k=2, r=4, init="orthonormal", trainable=["norm"], layer=layer)
    cast_frozen(model, torch.bfloat16)
    assert len(names) == 8 and torch.equal(in_training(model, batch), before)
    losses, _, _ = train(model, batch)
    assert losses[-1] < losses[0]
    after, state = in_training(model, batch), lora2_state_dict(model)
    assert not torch.allclose(after, before, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(in_training(model, batch).float(), after, atol=0.1)

    rebuild(base, through_a_file(state), layer)
    assert torch.equal(in_training(base, batch), after)
    for refused in (lambda: merge_lora2(model), lambda: lora2_layers(model)[0][1].weight):
        with pytest.raises(TypeError, match="quantised"):
            refused()
    assert torch.equal(in_training(model, batch), after) and len(lora2_layers(model)) == 8

    rebuild(exact, state)
    tuned = in_training(exact, batch)
    torch.testing.assert_close(in_training(merge_lora2(exact), batch), tuned, rtol=1e-5, atol=1e-5)
    assert (tuned - after).abs().max() < 0.3 * (after - before).abs().max()
    A, B = lora2_layers(model)[0][1].to_lora()
    torch.testing.assert_close(B @ A, lora2_layers(model)[0][1].delta_weight())


@HOSTS
def test_all_linear_layers_of_a_host(make):
    """Oracle: peft's target "all-linear": the same names."""
    peft = pytest.importorskip("peft")
    model, _, trainable, _ = make()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear"))
    expected = {name for name, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    heads = {name for name in expected if not set(trainable).isdisjoint(name.split("."))}
    names = add_lora2(model, "all-linear", k=2, r=4, trainable=[t for t in trainable if t != "lm_head"])
    assert set(names) == expected - heads


def test_conv1d_made_linear():
    """Oracle: the GPT-2 that has Conv1D: the same logits and the same gradients, transposed."""
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    linear = conv1d_to_linear(copy.deepcopy(gpt2))
    for model in (gpt2, linear):
        model(**text()).loss.backward()
    torch.testing.assert_close(logits(linear, text()), logits(gpt2, text()), rtol=1e-5, atol=1e-6)
    mine, theirs = linear.transformer.h[1].attn.c_attn, gpt2.transformer.h[1].attn.c_attn
    assert type(mine) is torch.nn.Linear and mine.weight.shape == (96, 32)
    torch.testing.assert_close(mine.weight.grad, theirs.weight.grad.T)
    assert len(add_lora2(linear, "all-linear", k=2, r=4)) == 8
