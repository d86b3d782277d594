"""Where LoRA² may start: v and V along the first gradient of W0. Ours, after LoRA-GA and LoRA-One.

What full fine-tuning would do first is a step along −∂L/∂W0. Its best approximation of rank k lies
between the leading singular vectors of that gradient, so v and V begin as these (Wang et al., arXiv
2407.05000; Zhang et al., arXiv 2502.01235). Those two change W0 or the update's first value too.
Here Λ = 0 as ever: training starts from the pretrained model bit for bit.
"""
import torch

from lora2 import lora2_layers, require

BATCHES = 8                                                 # over which the gradient is averaged
MORE = 8                                                    # directions than k, for accuracy


def start_at_gradient(net, backward, batches):
    """Set v and V of all adapters in place; u, U and Λ stay as they are.

    net: the model, with adapters whose Λ are 0.
    backward: a function that adds the gradient of a batch's loss to every .grad.
    batches: those of the training rows, which backward() takes; the first eight are used.
    FloatingPointError if the gradient is not finite.
    """
    layers = [layer for _, layer in lora2_layers(net)]
    for layer in layers:
        layer.base.weight.requires_grad_(True)
    net.eval()                                              # no dropout, and no number drawn
    for _, batch in zip(range(BATCHES), batches):
        backward(batch)
    net.train()
    for layer in layers:
        G = layer.base.weight.grad.T                        # (d_in, d_out), like ΔWᵀ = v C V
        require(G.isfinite().all(), "the first gradient of W0 is not finite", FloatingPointError)
        left, right = leading(G.to(layer.v.dtype), layer.k)
        with torch.no_grad():
            layer.v.copy_(left)
            layer.V.copy_(right.T)
        layer.base.weight.requires_grad_(False)
    net.zero_grad()


def leading(G, k):
    """The k leading singular vectors of G (n, m): (n, k) and (m, k), the same in every process."""
    devices = [G.device] if G.is_cuda else []
    with torch.random.fork_rng(devices):                    # dropout's random numbers stay
        torch.manual_seed(0)
        left, _, right = torch.svd_lowrank(G, min(k + MORE, *G.shape), niter=4)
    return left[:, :k], right[:, :k]
