"""The other methods of the paper's Table 1, behind the same calls as LoRA², so that one loop trains them all.

    full      every weight                                      nothing added, nothing frozen
    head      the classification head alone                     what the frozen backbone already knows
    bitfit    every bias, and the head                          Ben Zaken et al., arXiv 2106.10199
    lora      W0 + (alpha / r) B A                              Hu et al., arXiv 2106.09685
    adalora   W0 + (alpha / r) P Λ Q, pruned                    Zhang et al., arXiv 2303.10512
    sora      W0 + (alpha / r) B diag(g) A, sparse gate g       Ding et al., arXiv 2311.11696
    lora2     W0 + (alpha / r) v u Λ U V, pruned                lora2.py

All methods train the head, the pooler and the classifier; `full` trains all. The adapters are subclasses of
LoRA2Linear, so that wrapping, saving, loading and merging are lora2.py's own.
"""
import math

import torch
from torch import nn

from methods.fast import FastLoRA2Linear, linear_with_update
from lora2 import (LoRA2Linear, RankPruner, add_lora2, check_base, lora2_layers, orthogonality_floor,
                   orthogonality_loss)

METHODS = ("lora2", "adalora", "lora", "sora", "bitfit", "full", "head")


class LoRALinear(LoRA2Linear):
    """y = x W0ᵀ + b + scale · (x Aᵀ) Bᵀ, A (r, d_in) kaiming-uniform, B (d_out, r) zero. k, init: unused."""

    cast = None                                            # as in FastLoRA2Linear

    def __init__(self, base, k=None, r=8, alpha=32, init=None):
        nn.Module.__init__(self)                           # not LoRA2Linear's, which would make v, u, U and V
        check_base("base", base, 1, r, alpha, "gaussian")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.k, self.r, self.scale = r, r, alpha / r       # no second scale: ΔW has rank r, as if k were r
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.add_factors(lambda *shape: nn.Parameter(base.weight.new_zeros(shape, dtype=dtype)))
        self.train(base.training)

    def add_factors(self, new):
        """Make the trained factors. new(*shape): a Parameter of zeros, as wide and where the base is."""
        self.A, self.B = new(self.r, self.in_features), new(self.out_features, self.r)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def down_up(self):
        """The update as two factors, (d_in, r) and (r, d_out), whose product times scale is ΔWᵀ."""
        return self.A.T, self.B.T

    def delta_weight(self):
        """ΔW, (d_out, d_in) as in nn.Linear."""
        down, up = self.down_up()
        with torch.autocast(down.device.type, enabled=False):
            return self.scale * (down @ up).T

    def to_lora(self):
        """ΔW = B @ A as a plain LoRA: detached copies of A (r, d_in) and B (d_out, r), the scale in B."""
        down, up = self.down_up()
        return down.T.detach().clone(), (self.scale * up).T.detach().clone()

    def forward(self, x):
        """x (..., d_in) → (..., d_out)."""
        down, up = self.down_up()
        return linear_with_update(self.base, x, down, self.scale * up, self.cast)


class AdaLoRALinear(LoRALinear):
    """ΔWᵀ = scale · P Λ Q, LoRA² without the scale k. P (d_in, r) and Q (r, d_out) ~ N(0, 0.02²), Λ = 0."""

    def add_factors(self, new):
        self.P, self.lam, self.Q = new(self.in_features, self.r), new(self.r), new(self.r, self.out_features)
        nn.init.normal_(self.P, std=0.02)
        nn.init.normal_(self.Q, std=0.02)

    def down_up(self):
        return self.P * self.lam, self.Q


class SoRALinear(LoRALinear):
    """ΔWᵀ = scale · Aᵀ diag(g) Bᵀ; the gate g ~ N(0, 1) is driven to zeros by SparseGates."""

    def add_factors(self, new):
        super().add_factors(new)
        self.gate = new(self.r)
        nn.init.normal_(self.gate)

    def down_up(self):
        return self.A.T * self.gate, self.B.T


class AdaLoRAPruner(RankPruner):
    """RankPruner with AdaLoRA's scores: 1 + d_in + d_out numbers, all there are, for each singular value."""

    def _scored(self, get):
        factors = [get(getattr(layer, name)) for layer in self.layers for name in ("lam", "P", "Q")]
        if any(factor is None for factor in factors):
            raise RuntimeError("an adapter has no gradient (unused?): call pruner.step() after backward() "
                               "and optimizer.step(), before zero_grad()")
        return torch.cat([factor.flatten() for factor in factors])

    def scores(self):
        """S(Λ_i) + mean over d_in of S(P_·i) + mean over d_out of S(Q_i·), (n, r), from S(w) = Ī · Ū."""
        sizes = [factor.numel() for layer in self.layers for factor in (layer.lam, layer.P, layer.Q)]
        S = (self.sensitivity * self.uncertainty).split(sizes)  # Λ, P, Q of one adapter, of the next
        return torch.stack([lam + P.view(-1, self.r).mean(0) + Q.view(self.r, -1).mean(1)
                            for lam, P, Q in zip(S[0::3], S[1::3], S[2::3])])


class SparseGates(nn.Module):
    """SoRA's sparsifier, called like a pruner: the proximal step of ξ‖g‖₁ after each optimizer step.

    That is the soft threshold g ← sign(g) · max(|g| − ξ, 0). (The released code shrinks first and then zeroes
    what is below ξ: a dead zone of 2ξ.) ξ is of one step, as there: T steps take at most T ξ off a gate.
    threshold: ξ; ValueError unless it is 0 or positive and finite.
    """

    def __init__(self, model, threshold):
        super().__init__()                                 # it keeps nothing: the gates are parameters
        if not 0 <= threshold < math.inf:
            raise ValueError(f"threshold = {threshold!r}: give 0 or a positive number")
        self.layers, self.threshold = lora2_layers(model), threshold

    @torch.no_grad()
    def step(self):
        """Shrink all gates. Returns None: how many still live only kept() asks the device, not every step."""
        gates = [layer.gate for _, layer in self.layers]
        shrunk = nn.functional.softshrink(torch.stack(gates), self.threshold)              # (n, r)
        torch._foreach_copy_(gates, list(shrunk.unbind()))

    def kept(self):
        """{adapter: gates that are not 0}."""
        return {name: int((layer.gate != 0).sum()) for name, layer in self.layers}


LAYERS = {"lora2": FastLoRA2Linear, "lora": LoRALinear, "adalora": AdaLoRALinear, "sora": SoRALinear}


def add_method(method, model, targets, head, k, r, alpha, init):
    """Freeze what `method` freezes and add what it adds, in place. Returns the names of the adapted layers.

    targets: layer names; head: the parts of parameter names that make up the head, as for add_lora2. The
    others may be None for a method without use for them. ValueError for what matches nothing.
    """
    if method in LAYERS:                                   # k and init: None but for LoRA²
        k = 1 if k is None else k
        return add_lora2(model, targets, k, r, alpha, init or "gaussian", head, LAYERS[method])
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}: the methods are {', '.join(METHODS)}")
    parameters = dict(model.named_parameters())
    in_head = {name for name in parameters if not set(head).isdisjoint(name.split("."))}
    chosen = {"full": set(parameters), "head": in_head,
              "bitfit": {name for name in parameters if name.endswith("bias")} - in_head}[method]
    if not chosen:
        what = "there is no bias outside the head" if method == "bitfit" else f"no parameter is under {head}"
        raise ValueError(f"{method} finds nothing to train: {what}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen | in_head)
    return []


def regulariser(method, model, terms):
    """What `method` adds to the loss, before gamma: a scalar, or None.

    LoRA²: Eq. 5 with the groups in `terms`. AdaLoRA: the mean over all P and Q of ‖PᵀP−I‖_F and ‖QQᵀ−I‖_F.
    """
    if method == "lora2":
        return orthogonality_loss(model, terms)
    if method == "adalora":                                # as in its code: the norms are not squared
        layers = [layer for _, layer in lora2_layers(model)]
        with torch.autocast(layers[0].P.device.type, enabled=False):
            grams = [gram for layer in layers for gram in (layer.P.T @ layer.P, layer.Q @ layer.Q.T)]
        grams = torch.stack(grams)                         # (2N, r, r)
        return (grams - torch.eye(grams.shape[-1], device=grams.device)).norm(dim=(1, 2)).mean()
    return None


def regulariser_floor(method, k, r, terms):
    """The least value of regulariser(): what is shown to the user is the distance from it."""
    return orthogonality_floor(k, r, terms) if method == "lora2" else 0.0


def make_pruner(method, model, target_rank, total_steps, warmup, final, interval, importance):
    """The RankPruner of "lora2" or "adalora", with RankPruner's arguments. SoRA has SparseGates instead."""
    if method == "adalora" and importance == "full":
        raise ValueError("importance = 'full' is Eq. 8 of LoRA²: AdaLoRA has no v and V to add")
    kind = RankPruner if method == "lora2" else AdaLoRAPruner
    return kind(model, target_rank, total_steps, warmup, final, interval, importance=importance or "reduced")


def surviving_parameters(model, kept, trained):
    """How many of the `trained` adapter parameters are still needed when what was pruned is taken out.

    kept: {adapter: singular values, or gates, that are left}; None for a method that does not prune, where
    all survive. A pruned singular value takes its column and row along, the last one of LoRA² also v and V.
    """
    if not kept:
        return trained
    total = 0
    for name, layer in lora2_layers(model):
        n, ends = kept[name], layer.in_features + layer.out_features
        if isinstance(layer, LoRALinear):
            total += n * (1 + ends)                        # AdaLoRA: Λ_i, P_·i, Q_i·. SoRA: g_i, A_i·, B_·i
        else:
            total += n * (1 + 2 * layer.k) + (layer.k * ends if n else 0)
    return total
