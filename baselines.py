"""The other methods of the paper's Table 1, behind the same calls as LoRA², so that one loop trains them all.

    full      every weight                                      nothing added, nothing frozen
    head      the classification head alone                     what the frozen backbone already knows
    bitfit    every bias, and the head                          Ben Zaken et al., arXiv 2106.10199
    lora      W0 + (alpha / r) B A                              Hu et al., arXiv 2106.09685
    adalora   W0 + (alpha / r) P Λ Q, pruned                    Zhang et al., arXiv 2303.10512
    sora      W0 + (alpha / r) B diag(g) A, sparse gate g       Ding et al., arXiv 2311.11696
    lora2     W0 + (alpha / r) v u Λ U V, pruned                lora2.py

Every method but `full` also trains the head: all that is not the encoder. The adapters are subclasses of
LoRA2Linear, so that wrapping, saving, loading and merging are lora2.py's own.
"""
import math

import torch
from torch import nn

from lora2 import (LoRA2Linear, RankPruner, add_lora2, check_base, lora2_layers, orthogonality_floor,
                   orthogonality_loss)

METHODS = ("lora2", "adalora", "lora", "sora", "bitfit", "full", "head")


class LoRALinear(LoRA2Linear):
    """y = x W0ᵀ + b + scale · (x Aᵀ) Bᵀ with A (r, d_in) kaiming-uniform and B (d_out, r) zero. k and init unused."""

    def __init__(self, base, k=None, r=8, alpha=32, init=None):
        nn.Module.__init__(self)
        check_base("base", base, 1, r, alpha, "gaussian")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.k, self.r, self.scale = r, r, alpha / r
        self.dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.add_factors(lambda *shape: nn.Parameter(base.weight.new_zeros(shape, dtype=self.dtype)))
        self.train(base.training)

    def add_factors(self, new):
        self.A, self.B = new(self.r, self.in_features), new(self.out_features, self.r)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def down_up(self):
        """The update as two factors, (d_in, r) and (r, d_out), whose product times scale is ΔWᵀ."""
        return self.A.T, self.B.T

    def delta_weight(self):
        down, up = self.down_up()
        return self.scale * (down @ up).T

    def to_lora(self):
        down, up = self.down_up()
        return down.T.detach().clone(), (self.scale * up).T.detach().clone()

    def forward(self, x):
        """x (..., d_in) → (..., d_out)."""
        rows = x.reshape(-1, self.in_features)
        y = self.base(rows)                                # (N, d_out)
        down, up = (factor.to(y.dtype) for factor in self.down_up())
        y = y.addmm_(rows.to(y.dtype) @ down, up, alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)


class AdaLoRALinear(LoRALinear):
    """ΔWᵀ = scale · P Λ Q. P and Q stand where LoRA² has u and U, which is why RankPruner fits: AdaLoRA is LoRA²
    without the inner scale k. u is P (d_in, r), U is Q (r, d_out)."""

    def add_factors(self, new):
        self.u, self.lam, self.U = new(self.in_features, self.r), new(self.r), new(self.r, self.out_features)
        nn.init.normal_(self.u, std=0.02)
        nn.init.normal_(self.U, std=0.02)

    def down_up(self):
        return self.u * self.lam, self.U


class SoRALinear(LoRALinear):
    """ΔWᵀ = scale · Aᵀ diag(g) Bᵀ; the gate g ~ N(0, 1) is driven to zeros by SparseGates."""

    def add_factors(self, new):
        super().add_factors(new)
        self.gate = new(self.r)
        nn.init.normal_(self.gate)

    def down_up(self):
        return self.A.T * self.gate, self.B.T


class AdaLoRAPruner(RankPruner):
    """RankPruner with AdaLoRA's triplets, whose rows have 1 + d_in + d_out numbers: they differ between layers."""

    def _scored(self, what):
        rows = []
        for layer in self.layers:
            lam, P, Q = (getattr(getattr(layer, name), what) for name in ("lam", "u", "U"))
            if lam is None or P is None or Q is None:
                raise RuntimeError("an adapter has no gradient: call pruner.step() after backward() and "
                                   "optimizer.step(), before zero_grad()")
            rows.append(torch.cat([lam[:, None], P.T, Q], dim=1).flatten())
        return torch.cat(rows)

    def scores(self):
        """S(Λ_i) + mean over d_in of S(P_·i) + mean over d_out of S(Q_i·), (n, r). (AdaLoRA, Eq. 10.)"""
        S = self.sensitivity * self.uncertainty
        sizes = [(1, layer.in_features, layer.out_features) for layer in self.layers]
        rows = S.split([self.r * sum(size) for size in sizes])
        return torch.stack([sum(part.mean(1) for part in row.view(self.r, -1).split(size, dim=1))
                            for row, size in zip(rows, sizes)])


class SparseGates:
    """SoRA's sparsifier, called like a pruner: the proximal step of ξ‖g‖₁ after each optimizer step.

    The exact soft threshold g ← sign(g) · max(|g| − ξ, 0). (The released code shrinks first and then zeroes what is
    below ξ: a dead zone of 2ξ.)
    """

    def __init__(self, model, threshold):
        if not threshold >= 0:
            raise ValueError(f"threshold = {threshold!r}: give 0 or a positive number")
        self.layers, self.threshold = lora2_layers(model), threshold

    @torch.no_grad()
    def step(self):
        """Shrink all gates; returns None: how many live is known to the device alone until kept() asks."""
        gates = [layer.gate for _, layer in self.layers]
        sizes = torch._foreach_abs(gates)
        torch._foreach_sub_(sizes, self.threshold)
        torch._foreach_clamp_min_(sizes, 0.0)
        for gate, size in zip(gates, sizes):
            gate.copy_(gate.sign() * size)

    def kept(self):
        """{adapter: gates that are not 0}."""
        return {name: int((layer.gate != 0).sum()) for name, layer in self.layers}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def add_method(method, model, targets, head, k, r, alpha, init):
    """Freeze what `method` freezes and add what it adds, in place. Returns the names of the adapted layers.

    targets: layer names; head: the parts of parameter names that make up the head, as for add_lora2.
    """
    layers = {"lora2": LoRA2Linear, "lora": LoRALinear, "adalora": AdaLoRALinear, "sora": SoRALinear}
    if method in layers:
        return add_lora2(model, targets, k or 1, r, alpha, init or "gaussian", trainable=head, layer=layers[method])
    for name, parameter in model.named_parameters():
        in_head = not set(head).isdisjoint(name.split("."))
        parameter.requires_grad_(method == "full" or in_head or (method == "bitfit" and name.endswith(".bias")))
    return []


def regulariser(method, model, terms):
    """What `method` adds to the loss, before gamma: a scalar, or None."""
    if method == "lora2":
        return orthogonality_loss(model, terms)
    if method == "adalora":                                # mean of the *unsquared* norms of its 2N matrices
        layers = [layer for _, layer in lora2_layers(model)]
        grams = [gram for layer in layers for gram in (layer.u.T @ layer.u, layer.U @ layer.U.T)]     # (r, r) each
        grams = torch.stack(grams)
        return (grams - torch.eye(grams.shape[-1], device=grams.device)).norm(dim=(1, 2)).mean()
    return None


def regulariser_floor(method, k, r, terms):
    """The least value of regulariser(): what is shown to the user is the distance from it."""
    return orthogonality_floor(k, r, terms) if method == "lora2" else 0.0


def make_pruner(method, model, target_rank, total_steps, warmup, final, interval, importance):
    """The RankPruner of "lora2" or "adalora"; the arguments are RankPruner's."""
    kind = RankPruner if method == "lora2" else AdaLoRAPruner
    return kind(model, target_rank, total_steps, warmup, final, interval, importance=importance or "reduced")
