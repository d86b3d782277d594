"""Tests of experiments/first_gradient.py and of --outer-lr, which moves v and V at a rate of their own."""
import pytest
import torch
from safetensors.torch import load_file

from lora2 import add_lora2
from experiments.first_gradient import start_at_gradient


def net_and_loss():
    """A small net with dropout, batches, and the function that a training step would call."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.Tanh(), torch.nn.Dropout(), torch.nn.Linear(12, 16))
    batches = list(torch.randn(5, 7, 20))
    return net, batches, lambda batch: net(batch).square().mean().backward()


@pytest.mark.parametrize("k", [1, 3])
def test_v_and_V_are_the_leading_singular_vectors(k):
    """Oracle: autograd on the plain net without dropout, and torch.linalg.svd of its summed gradients."""
    net, batches, backward = net_and_loss()
    net.eval()
    for batch in batches:
        backward(batch)
    expected = [net[i].weight.grad.T for i in (0, 3)]
    before = net(batches[0])
    net.train()
    add_lora2(net, ["0", "3"], k=k, r=4, init="orthonormal")
    u, state = net[0].u.clone(), torch.get_rng_state()
    start_at_gradient(net, backward, batches)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(net[0].u, u) and net.training
    assert torch.equal(net.eval()(batches[0]), before)     # Λ = 0: the pretrained model, bit for bit
    for layer, G in zip((net[0], net[3]), expected):
        left, _, right = torch.linalg.svd(G)
        assert torch.allclose(layer.v @ layer.v.T, left[:, :k] @ left[:, :k].T, atol=1e-5)
        assert torch.allclose(layer.V.T @ layer.V, right[:k].T @ right[:k], atol=1e-5)
    assert not net[0].base.weight.requires_grad and all(p.grad is None for p in net.parameters())
    with pytest.raises(FloatingPointError, match="first gradient"):
        start_at_gradient(net, backward, [batches[0] * float("inf")])


@pytest.mark.parametrize("words, outer", [
    ("lora2", (".v", ".V")), ("adalora", (".P", ".Q")), ("sora", (".A",))])
def test_a_rate_of_their_own(words, outer, cli):
    """Oracle: AdamW: at rate 0 the outer factors stay as they begin while the others move; at another rate all move."""
    def trained(rates):
        assert cli.tiny("--overwrite --method", words, rates).status == 0
        return load_file("run/adapter.safetensors")

    start, held, moved = trained("--lr 0 --head-lr 0"), trained("--outer-lr 0"), trained("--outer-lr 0.01")
    inner = [name for name in start if ".layer." in name and not name.endswith(outer)]
    names = [name for name in start if name.endswith(outer)]
    assert len(names) == 12 * len(outer)
    assert all(torch.equal(start[name], held[name]) and not torch.equal(start[name], moved[name]) for name in names)
    assert any(not torch.equal(start[name], held[name]) for name in inner)
