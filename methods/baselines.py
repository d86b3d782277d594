"""The adapters and pruners that LoRA² is compared with: LoRA, AdaLoRA, SoRA.

The adapters are subclasses of LoRA2Linear, so that wrapping, saving, loading and merging are
lora2.py's own. by_name.py chooses among them.
"""
import math

import torch
from torch import nn

from lora2 import LoRA2Linear, check_base, lora2_layers
from methods.fast_lora2 import FastRankPruner, linear_with_update


class LoRALinear(LoRA2Linear):
    """y = x W0ᵀ + b + scale · (x Aᵀ) Bᵀ, A (r, d_in) kaiming-uniform, B (d_out, r) zero.

    base, r, alpha: as for LoRA2Linear. k, init: unused.
    """

    cast = None  # as in FastLoRA2Linear

    def __init__(self, base, k=None, r=8, alpha=32, init=None):
        nn.Module.__init__(self)  # not LoRA2Linear's, which would make v, u, U and V
        check_base("base", base, 1, r, alpha, "gaussian")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.k, self.r = r, r  # no second scale: ΔW has rank r, as if k were r
        self.scale = alpha / r
        self.add_factors()
        self.train(base.training)

    def new_factor(self, *shape):
        """A Parameter of zeros where the base is, in fp32, or in fp64 if the base is."""
        W = self.base.weight
        dtype = torch.promote_types(W.dtype, torch.float32)
        return nn.Parameter(torch.zeros(shape, dtype=dtype, device=W.device))

    def add_factors(self):
        """Make the trained factors."""
        self.A = self.new_factor(self.r, self.in_features)
        self.B = self.new_factor(self.out_features, self.r)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def down_up(self):
        """The update as two factors, (d_in, r) and (r, d_out), whose product times scale is ΔWᵀ."""
        return self.A.T, self.B.T

    def delta_weight(self):
        """ΔW, (d_out, d_in) as in nn.Linear."""
        down, up = self.down_up()
        with torch.autocast(down.device.type, enabled=False):
            return self.scale * (down @ up).T

    @torch.no_grad()
    def to_lora(self):
        """ΔW = B @ A as a plain LoRA: copies of A (r, d_in) and B (d_out, r)."""
        down, up = self.down_up()
        return down.T.clone(), (self.scale * up).T.clone()

    def forward(self, x):
        """x (..., d_in) → (..., d_out)."""
        down, up = self.down_up()
        return linear_with_update(self.base, x, down, self.scale * up, self.cast)


class AdaLoRALinear(LoRALinear):
    """ΔWᵀ = scale · P Λ Q, P (d_in, r) and Q (r, d_out) ~ N(0, 0.02²), Λ = 0: no second scale."""

    def add_factors(self):
        self.P = self.new_factor(self.in_features, self.r)
        self.lam = self.new_factor(self.r)
        self.Q = self.new_factor(self.r, self.out_features)
        nn.init.normal_(self.P, std=0.02)
        nn.init.normal_(self.Q, std=0.02)

    def down_up(self):
        return self.P * self.lam, self.Q


class SoRALinear(LoRALinear):
    """ΔWᵀ = scale · Aᵀ diag(g) Bᵀ; the gate g ~ N(0, 1) is driven to zeros by SparseGates."""

    def add_factors(self):
        super().add_factors()
        self.gate = self.new_factor(self.r)
        nn.init.normal_(self.gate)

    def down_up(self):
        return self.A.T * self.gate, self.B.T


class AdaLoRAPruner(FastRankPruner):
    """RankPruner with AdaLoRA's scores: 1 + d_in + d_out numbers, all there are, for each Λ_i."""

    factors = ("lam", "P", "Q")

    def scores(self):
        """S(Λ_i) + mean over d_in of S(P_·i) + mean over d_out of S(Q_i·), (n, r); S(w) = Ī · Ū."""
        n = len(self.layers)
        S = (self.sensitivity * self.uncertainty).split(self.sizes)
        P = [each.view(-1, self.r).mean(0) for each in S[n:2 * n]]  # each (d_in, r)
        Q = [each.view(self.r, -1).mean(1) for each in S[2 * n:]]  # each (r, d_out)
        return torch.stack(S[:n]) + torch.stack(P) + torch.stack(Q)


class SparseGates(nn.Module):
    """SoRA's sparsifier, called like a pruner: a proximal step of ξ‖g‖₁ after each optimizer step.

    That is the soft threshold g ← sign(g) · max(|g| − ξ, 0). (The released code shrinks first and
    then zeroes what is below ξ: a dead zone of 2ξ.) ξ is of one step, as there: T steps take at
    most T ξ off a gate.
    threshold: ξ, at least 0.
    """

    def __init__(self, model, threshold):
        super().__init__()  # it keeps nothing: the gates are parameters
        self.layers = lora2_layers(model)
        self.threshold = threshold

    @torch.no_grad()
    def step(self):
        """Shrink all gates. Returns None: only kept() asks the device how many still live."""
        gates = [layer.gate for _, layer in self.layers]
        shrunk = nn.functional.softshrink(torch.stack(gates), self.threshold)  # (n, r)
        torch._foreach_copy_(gates, shrunk.unbind())

    def kept(self):
        """{adapter: gates that are not 0}."""
        return {name: int((layer.gate != 0).sum()) for name, layer in self.layers}


def orthogonality_loss(model):
    """AdaLoRA's R: the mean of all ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F, not squared, as in its code."""
    grams = []
    for _, layer in lora2_layers(model):
        with torch.autocast(layer.P.device.type, enabled=False):
            grams += [layer.P.T @ layer.P, layer.Q @ layer.Q.T]
    grams = torch.stack(grams)  # (2n, r, r)
    identity = torch.eye(grams.shape[-1], device=grams.device)
    return (grams - identity).norm(dim=(1, 2)).mean()
