"""Three scales, the paper's future work: P = v w u and Q = U W V. To use and to judge by itself.

    v (d_in, k) · w (k, m) · u (m, r) · Λ (r) · U (r, m) · W (m, k) · V (k, d_out)

What it cannot change: ΔW has rank min(k, m, r) at most, and at k = 1 it is, as ever, LoRA's with
r = 1: nothing that two scales cannot be. What it can: by which path the optimizer gets there. A
matrix has k (d_in + d_out) + 2 k m + 2 m r + r numbers, and 2 m r + r of them are scored.

    add_lora2(model, targets, k=1, r=4, layer=ThreeScaleLinear)
    pruner = RankPruner(model, ...)                 # as it is: w and W are shared by all i, like v
    loss + gamma * orthogonality_loss(model)        # this file's
"""
import torch
from torch import nn

from lora2 import LoRA2Linear, off_identity, lora2_layers


class ThreeScaleLinear(LoRA2Linear):
    """LoRA2Linear with a scale of m numbers between its k and its r. The arguments are the same."""

    m = 2                                           # between k = 1 and r = 4

    def __init__(self, base, k=1, r=8, alpha=32, init="gaussian"):
        super().__init__(base, k, r, alpha, init)
        self.w = nn.Parameter(self.v.new_empty(k, self.m))
        self.u = nn.Parameter(self.v.new_empty(self.m, r))
        self.U = nn.Parameter(self.v.new_empty(r, self.m))
        self.W = nn.Parameter(self.v.new_empty(self.m, k))
        for factor in (self.w, self.u, self.U, self.W):
            if init == "gaussian":
                nn.init.normal_(factor, std=0.02)
            else:
                nn.init.orthogonal_(factor)

    def core(self):
        """C = scale · w u diag(Λ) U W, (k, k), between v and V."""
        with torch.autocast(self.u.device.type, enabled=False):
            return self.scale * self.w @ (self.u * self.lam) @ self.U @ self.W


def orthogonality_loss(model):
    """Eq. 5 with two more terms, of w and W: a scalar, the mean over the adapters, without gamma.

    Each factor by its smaller side, P and Q by r. The floor is 2 · max(r − min(k, m), 0).
    """
    R = 0
    for _, layer in lora2_layers(model):
        with torch.autocast(layer.u.device.type, enabled=False):
            P = layer.v @ layer.w @ layer.u         # (d_in, r)
            Q = layer.U @ layer.W @ layer.V         # (r, d_out)
            R = R + off_identity(P.T @ P) + off_identity(Q @ Q.T)
            for factor in (layer.v, layer.w, layer.u, layer.U, layer.W, layer.V):
                small = factor if len(factor) <= len(factor.T) else factor.T
                R = R + off_identity(small @ small.T)
    return R / len(lora2_layers(model))
