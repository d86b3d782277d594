"""The other methods of the paper's Table 1, behind LoRA²'s calls: one loop trains them all.

    full      every weight                                    nothing added, nothing frozen
    head      the classification head alone                   what the frozen backbone knows
    bitfit    every bias, and the head                        Ben Zaken et al., arXiv 2106.10199
    lora      W0 + (alpha / r) B A                            Hu et al., arXiv 2106.09685
    adalora   W0 + (alpha / r) P Λ Q, pruned                  Zhang et al., arXiv 2303.10512
    sora      W0 + (alpha / r) B diag(g) A, sparse gate g     Ding et al., arXiv 2311.11696
    lora2     W0 + (alpha / r) v u Λ U V, pruned              lora2.py

All methods train the head, the pooler and the classifier; `full` trains all. The adapters are
subclasses of LoRA2Linear, so that wrapping, saving, loading and merging are lora2.py's own.
"""
import math

import torch
from torch import nn

from lora2 import LoRA2Linear, add_lora2, check_base, lora2_layers, orthogonality_floor, require
from methods import fast_lora2
from methods.fast_lora2 import FastRankPruner, linear_with_update

METHODS = ("lora2", "adalora", "lora", "sora", "bitfit", "full", "head")
OUTER = (".v", ".V", ".A", ".P", ".Q")  # large factors that do not start at 0: --outer-lr


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


LAYERS = {"lora2": LoRA2Linear, "lora": LoRALinear, "adalora": AdaLoRALinear, "sora": SoRALinear}


def add_method(method, model, targets, head, k, r, alpha, init):
    """Freeze what `method` freezes and add what it adds, in place. Returns names of adapted layers.

    targets: names of the layers to adapt.
    head: parts of the names of the head's parameters, as add_lora2() has them in `trainable`.
    k, r, alpha, init: of the adapters; None for a method that has no use for them.
    """
    if method in LAYERS:
        return add_lora2(model, targets, k or 1, r, alpha, init or "gaussian", head, LAYERS[method])
    for name, parameter in model.named_parameters():
        chosen = {"full": True, "bitfit": name.endswith("bias"), "head": False}[method]
        in_head = not set(head).isdisjoint(name.split("."))
        parameter.requires_grad_(chosen or in_head)
    return []


def regulariser(method, model, terms):
    """What `method` adds to the loss, before gamma: a scalar, or None.

    LoRA²: Eq. 5 with the pairs in `terms`. AdaLoRA: the mean of all ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F,
    not squared, as in its code.
    """
    if method == "lora2":
        return fast_lora2.orthogonality_loss(model, terms)
    if method != "adalora":
        return None
    grams = []
    for _, layer in lora2_layers(model):
        with torch.autocast(layer.P.device.type, enabled=False):
            grams += [layer.P.T @ layer.P, layer.Q @ layer.Q.T]
    grams = torch.stack(grams)  # (2n, r, r)
    identity = torch.eye(grams.shape[-1], device=grams.device)
    return (grams - identity).norm(dim=(1, 2)).mean()


def regulariser_floor(method, k, r, terms):
    """The least value of regulariser(): what is shown to the user is the distance from it."""
    return orthogonality_floor(k, r, terms) if method == "lora2" else 0.0


def make_pruner(method, model, target_rank, importance=None, threshold=None, **schedule):
    """What prunes: the RankPruner of "lora2" or "adalora", the SparseGates of "sora", or None.

    threshold: of the gates. target_rank, importance, schedule: arguments of RankPruner.
    """
    if method == "sora":
        return SparseGates(model, threshold)
    kinds = {"lora2": FastRankPruner, "adalora": AdaLoRAPruner}
    if method not in kinds:
        return None
    require(method == "lora2" or importance != "full",
            "importance = 'full' is Eq. 8 of LoRA²: AdaLoRA has no v and V to add")
    return kinds[method](model, target_rank, importance=importance or "reduced", **schedule)


def surviving_parameters(model, kept, trained):
    """How many of the `trained` adapter parameters are needed when what was pruned is taken out.

    kept: {adapter: singular values, or gates, that are left}; None for a method that does not
    prune, where all survive. A pruned singular value takes its column and row along, the last one
    of LoRA² also v and V.
    """
    if not kept:
        return trained
    total = 0
    for name, layer in lora2_layers(model):
        n = kept[name]
        ends = layer.in_features + layer.out_features
        if isinstance(layer, LoRALinear):
            total += n * (1 + ends)  # AdaLoRA: Λ_i, P_·i, Q_i·. SoRA: g_i, A_i·, B_·i
        elif n:
            total += n * (1 + 2 * layer.k) + layer.k * ends
    return total
