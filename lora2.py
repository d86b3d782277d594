"""LoRA²: multi-scale low-rank adaptation of frozen linear layers. One file; needs torch only; copy it.

Implements arXiv 2408.06854. A frozen W0 gets an update that is low-rank twice: AdaLoRA's P Λ Q, whose factors
P = v u and Q = U V are themselves products through a second, smaller scale k (Eq. 4, row vectors):

    y = x W0ᵀ + b + scale · x v u Λ U V

         ┌────────────────────  W0ᵀ, b  ────────────────────┐
    x ───┤                                                  + ─── y
         └── v ──── u ──── Λ ──── U ──── V ──── · scale ────┘
    N×768  768×8   8×8     8     8×8   8×768                N×768      here d = 768, k = 8, r = 8
           └── P ───┘             └── Q ───┘

    symbol    shape        init          scored   what it is
    v         (d_in, k)    N(0, 0.02²)   no       projects the input down to k numbers
    u         (k, r)       N(0, 0.02²)   yes      left singular directions inside that k-space
    Λ  lam    (r,)         0             yes      singular values; a pruned one is held at 0
    U         (r, k)       N(0, 0.02²)   yes      right singular directions
    V         (k, d_out)   N(0, 0.02²)   no       projects back up to the output
    scale     alpha / r                           fixed at the initial r; pruning does not change it

Whoever writes U Σ Vᵀ elsewhere: here the lower-case letters are the left side, the capitals the right side.
rank ΔW ≤ min(k, r): at k = 1 the update is some LoRA of rank 1, and the r values act through one scalar.

    add_lora2(model, ["query", "value"], k=8, trainable=["classifier"])     # freeze, wrap, return the names
    pruner = RankPruner(model, target_rank=2, total_steps=T, warmup=T // 10, final=T // 2, interval=10)
    for batch in loader:                                                    # exactly T optimizer steps
        loss = task_loss(model, batch) + 0.1 * orthogonality_loss(model)    # Eq. 5, once per optimizer step
        loss.backward(); optimizer.step(); pruner.step(); optimizer.zero_grad()
"""
import math
import re

import torch
from torch import nn


class LoRA2Linear(nn.Module):
    """A frozen nn.Linear plus the LoRA² update of Eq. 4.

    base: the nn.Linear, kept as it is and frozen. k: projected dimension. r: number of singular values.
    alpha: scale = alpha / r. init: "gaussian" (N(0, 0.02²), the authors' code; the paper only says Gaussian) or
    "orthonormal" (ours: every term of Eq. 5 starts at its floor, so Λ gets useful gradients from the first step).
    Factors are fp32, or fp64 on an fp64 base. Raises TypeError or ValueError if the base cannot be adapted.
    """
    factors = ("v", "u", "lam", "U", "V")

    def __init__(self, base, k=1, r=8, alpha=32, init="gaussian"):
        super().__init__()
        check_base("base", base, k, r, alpha, init)
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.k, self.r, self.scale = k, r, alpha / r
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        shapes = (self.in_features, k), (k, r), (r,), (r, k), (k, self.out_features)    # v u lam U V
        for name, shape in zip(LoRA2Linear.factors, shapes):
            factor = torch.zeros(shape, dtype=dtype, device=base.weight.device)
            if name != "lam":                              # Λ = 0, so ΔW = 0 and step 0 is the base model
                nn.init.normal_(factor, std=0.02) if init == "gaussian" else nn.init.orthogonal_(factor)
            self.register_parameter(name, nn.Parameter(factor))
        self.train(base.training)

    def core(self):
        """C = scale · u diag(Λ) U, shape (k, k): all of the update that is not v or V."""
        return self.scale * (self.u * self.lam) @ self.U

    def delta_weight(self):
        """ΔW of shape (d_out, d_in), nn.Linear's layout: (v C V)ᵀ. The one formula merge and export refer to."""
        return (self.v @ self.core() @ self.V).T

    def to_lora(self):
        """The update as a plain LoRA of rank k, exactly: A (k, d_in) and B (d_out, k) with B @ A = ΔW.

        scale is inside B. In peft's terms r = lora_alpha = k, so that its own factor lora_alpha / r is 1.
        """
        return self.v.T.detach().clone(), (self.core() @ self.V).T.detach().clone()

    def forward(self, x):
        """x (..., d_in) → (..., d_out). Never builds ΔW; the authors' forward does, at twice the step's cost."""
        rows = x.reshape(-1, self.in_features)             # (N, d_in)
        y = self.base(rows)                                # (N, d_out), in the dtype of the base or of autocast
        h = rows.to(y.dtype) @ self.v.to(y.dtype)          # (N, k)
        h = h @ self.core().to(y.dtype)                    # (N, k)
        y = y.addmm_(h, self.V.to(y.dtype))                # (N, d_out), added in place: no second output
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self):
        """W0 + ΔW in the base's dtype, for parents that read the matrix instead of calling the layer, such as
        the fast path of nn.TransformerEncoder: dense, hence slow, but never silently the base alone."""
        return (self.base.weight + self.delta_weight()).to(self.base.weight.dtype)

    @property
    def bias(self):
        return self.base.bias

    def extra_repr(self):
        return f"k={self.k}, r={self.r}, scale={self.scale:g}"


def check_base(name, base, k, r, alpha, init):
    """Raise unless `base` is what LoRA² can adapt rightly: exactly an nn.Linear with weights of its own."""
    if type(base) is not nn.Linear:      # subclasses compute something else, or are read without being called
        raise TypeError(f"{name} is a {type(base).__name__}; LoRA² adapts plain nn.Linear layers only")
    if base.weight.is_meta or not isinstance(base.weight, nn.Parameter) or not base.weight.is_floating_point():
        raise TypeError(f"{name} has no ordinary weight (meta device, re-parametrised or quantised): "
                        "load the real weights first")
    smaller = min(base.in_features, base.out_features)
    for symbol, value in (("k", k), ("r", r)):
        if type(value) is not int or not 1 <= value <= smaller:
            raise ValueError(f"{symbol} = {value!r} does not fit {name}: give an integer from 1 to {smaller}")
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha = {alpha!r}: give a positive number")
    if init not in ("gaussian", "orthonormal"):
        raise ValueError(f"init = {init!r}: give 'gaussian' or 'orthonormal'")


def add_lora2(model, targets, k=1, r=8, alpha=32, init="gaussian", trainable=(), layer=LoRA2Linear):
    """Freeze `model` and wrap its target layers in LoRA2Linear, in place. Returns the adapted names, in order.

    targets: module names; one matches a module called exactly so or ending in "." + it ("query" matches
    "encoder.layer.0.attention.self.query"). trainable: parts of parameter names that stay trainable, such as
    "classifier"; layers under them are trained in full and never adapted. Either all is adapted or nothing is
    touched: ValueError for a name that matches nothing, for shared layers and for a model that has adapters;
    TypeError for a match that is no plain nn.Linear.
    """
    if isinstance(targets, str) or isinstance(trainable, str):
        raise TypeError("targets and trainable are lists of names, not one string")
    if lora2_layers(model):
        raise ValueError("the model has LoRA² adapters already: name all targets in one call of add_lora2")

    modules = dict(model.named_modules(remove_duplicate=False))
    names_of, tensors_of = {}, {}                          # who else uses this module, this weight?
    for name, module in modules.items():
        names_of.setdefault(module, []).append(name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensors_of.setdefault(parameter, []).append(name)
    in_head = lambda name: not set(trainable).isdisjoint(name.split("."))

    found = {target: [name for name in modules if (name == target or name.endswith("." + target))
                      and name and not in_head(name)] for target in targets}
    missing = [target for target, names in found.items() if not names]
    unused = [part for part in trainable if not any(part in n.split(".") for n, _ in model.named_parameters())]
    if missing or unused or not found:
        linears = sorted({re.sub(r"\b\d+\b", "*", n) for n, m in modules.items() if type(m) is nn.Linear})
        raise ValueError(f"no layer to adapt matches {missing or list(targets)}; the Linear layers are {linears}"
                         if not unused else f"no parameter's name has the part {unused}: correct `trainable`")
    names = [name for name in modules if any(name in matches for matches in found.values())]
    for name in names:
        check_base(name, modules[name], k, r, alpha, init)
        if len(names_of[modules[name]]) > 1 or len(tensors_of[modules[name].weight]) > 1:
            uses = sorted({*names_of[modules[name]], *tensors_of[modules[name].weight]})
            raise ValueError(f"{name} is shared ({', '.join(uses)}): one adapter would change every use of it")

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_head(name) and parameter.is_floating_point())
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer(modules[name], k, r, alpha, init))
    return names


def lora2_layers(model):
    """[(name, LoRA2Linear), ...] of a model, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRA2Linear)]


def orthogonality_loss(model, terms=("uv", "UV", "PQ")):
    """R of Eq. 5, a scalar: the mean over the adapters, not yet multiplied by gamma.

    Per adapter the sum of ‖vᵀv−I‖² + ‖uuᵀ−I‖² ("uv"), ‖VVᵀ−I‖² + ‖UᵀU−I‖² ("UV") and ‖PᵀP−I‖² + ‖QQᵀ−I‖² ("PQ"),
    squared Frobenius norms; `terms` picks groups as Table 3 does. Its floor is 2|k−r| with all three groups.

    Paper: the norms of "uv" on the large sides, vvᵀ (d_in × d_in) and uᵀu. Since ‖AAᵀ−I_n‖² = ‖AᵀA−I_k‖² + n − k,
    that is a constant more and the same gradient, so every Gram matrix here is k × k. Authors' code: unsquared
    norms of detached tensors (and it raises UnboundLocalError); ours follows the paper. The paper gives no
    normalisation over layers; a plain sum over 72 matrices swamps the task loss, hence the mean.
    """
    if not terms or not set(terms) <= {"uv", "UV", "PQ"} or isinstance(terms, str):
        raise ValueError(f"terms = {terms!r}: give one or more of 'uv', 'UV', 'PQ' as a tuple")
    layers = [layer for _, layer in lora2_layers(model)]
    if not layers:
        raise ValueError("the model has no LoRA² adapters: call add_lora2 first")
    total = 0.0
    for group in _by_shape(layers, ("v", "u", "U", "V")):  # as many turns as there are distinct shapes
        v, u, U, V = (torch.stack([getattr(layers[i], name) for i in group]) for name in ("v", "u", "U", "V"))
        with torch.autocast(v.device.type, enabled=False):                  # in full precision always
            Gv, Gu, GU, GV = v.mT @ v, u @ u.mT, U.mT @ U, V @ V.mT         # each (n, k, k)
            I = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
            for term, pair in (("uv", (Gv, Gu)), ("UV", (GV, GU))):
                if term in terms:
                    total = total + sum((G - I).square().sum() for G in pair)
            if "PQ" in terms:                              # ‖PᵀP−I_r‖² = tr(MM) − 2 tr(M) + r, M = (vᵀv)(uuᵀ)
                for M in (Gv @ Gu, GU @ GV):
                    total = total + (M * M.mT).sum() - 2 * (M * I).sum() + len(group) * u.shape[-1]
    return total / len(layers)


def _by_shape(layers, names):
    """Indices of the layers, grouped by the shapes of the named tensors: what can be stacked and batched."""
    groups = {}
    for i, layer in enumerate(layers):
        groups.setdefault(tuple(getattr(layer, name).shape for name in names), []).append(i)
    return list(groups.values())


class RankPruner:
    """Algorithm 1: keeps the b(t) most important singular values of the whole model and holds the others at 0.

    target_rank: singular values per adapter, on average, at the end. total_steps: T, optimizer steps (never
    micro-batches). For t = 1 .. T: up to `warmup` all are kept; then the budget falls along a cubic, with a
    selection every `interval` steps, in which a pruned value may return; the last `final` steps hold one fixed
    selection. importance: "reduced" (Eq. 9) or "full" (Eq. 8). Raises ValueError for an impossible schedule.

    Call step() after optimizer.step() and before zero_grad(): it wants this step's gradients, and, as in
    AdaLoRA's loop, the weights it multiplies them with are those after the step.
    """

    def __init__(self, model, target_rank, total_steps, warmup, final, interval, beta1=0.85, beta2=0.85,
                 importance="reduced"):
        self.names, self.layers = zip(*lora2_layers(model)) if lora2_layers(model) else ((), ())
        ranks = {layer.r for layer in self.layers}
        if len(ranks) != 1:
            raise ValueError(f"RankPruner needs adapters of one rank r, the model has {sorted(ranks) or 'none'}")
        self.r = ranks.pop()
        problems = [f"{name} = {value!r} must be an integer of at least {least}" for name, value, least in (
            ("target_rank", target_rank, 0), ("total_steps", total_steps, 1), ("warmup", warmup, 0),
            ("final", final, 0), ("interval", interval, 1)) if type(value) is not int or value < least]
        if not problems and target_rank > self.r:
            problems.append(f"target_rank = {target_rank} is above r = {self.r}: lower it or raise r")
        if not problems and warmup + final >= total_steps:
            problems.append(f"warmup + final = {warmup} + {final} leaves none of the {total_steps} steps to prune in: "
                            "lower them or train longer")
        if not (0 < beta1 < 1 and 0 < beta2 < 1):
            problems.append(f"beta1 = {beta1}, beta2 = {beta2}: both must lie between 0 and 1")
        if importance not in ("reduced", "full"):
            problems.append(f"importance = {importance!r}: give 'reduced' (Eq. 9) or 'full' (Eq. 8)")
        if problems:
            raise ValueError("; ".join(problems))
        self.target_rank, self.total_steps = target_rank, total_steps
        self.warmup, self.final, self.interval = warmup, final, interval
        self.beta1, self.beta2, self.t = beta1, beta2, 0
        # At k = 1, r = 8 on 768 × 768 these are 24 of 1,560 numbers: the 98.5 % fewer sensitivities of the paper.
        # (Its Eq. 6-9 swap the letters; only leaving out the *big* factors v and V gives that saving.)
        scored = ("lam", "u", "U") + (("v", "V") if importance == "full" else ())
        self.groups = [(name, rows) for name in scored for rows in _by_shape(self.layers, (name,))]
        stacks = [torch.stack([getattr(self.layers[i], name).detach() for i in rows]) for name, rows in self.groups]
        self.sensitivity = [torch.zeros_like(stack) for stack in stacks]         # Ī, one (n, ...) stack a group
        self.uncertainty = [torch.zeros_like(stack) for stack in stacks]         # Ū
        lam = self.layers[0].lam
        self.rows = [torch.tensor(rows, device=lam.device) for _, rows in self.groups]
        self.keep = torch.ones(len(self.layers), self.r, dtype=torch.bool, device=lam.device)
        self.kept_total = self.keep.numel()

    def budget(self, t):
        """b(t), the number of singular values to keep in the whole model at step t = 1 .. T."""
        start, end = len(self.layers) * self.r, len(self.layers) * self.target_rank
        if t <= self.warmup:
            return start
        if t > self.total_steps - self.final:
            return end
        progress = (t - self.warmup) / (self.total_steps - self.final - self.warmup)
        return int(end + (start - end) * (1 - progress) ** 3)

    @torch.no_grad()
    def step(self):
        """One optimizer step's worth of Algorithm 1. Returns the kept count; never waits for the device.

        Raises RuntimeError without gradients or after the last of the announced steps.
        """
        t, last_phase_starts = self.t + 1, self.total_steps - self.final + 1
        if t > self.total_steps:
            raise RuntimeError(f"pruner.step() number {t}, but total_steps = {self.total_steps}: announce all steps")
        if t < last_phase_starts:
            self._update_importance()
        self.t = t
        in_phase = self.warmup < t < last_phase_starts
        if (in_phase and t % self.interval == 0) or t in (last_phase_starts - 1, last_phase_starts):
            self._select(self.budget(t))
            self._mask()
        elif t > last_phase_starts:     # Adam's momentum moves a zeroed Λ again: hold the fixed set after each step
            self._mask()
        return self.kept_total

    def _update_importance(self):
        """I = |w · ∂L/∂w|;  Ī ← β1 Ī + (1−β1) I;  Ū ← β2 Ū + (1−β2) |I − Ī|. (Missing in the paper, where "??" stands
        in Algorithm 1; these are AdaLoRA's.)"""
        for (name, rows), mean, spread in zip(self.groups, self.sensitivity, self.uncertainty):
            weights = [getattr(self.layers[i], name) for i in rows]
            if any(w.grad is None for w in weights):
                raise RuntimeError(f"no gradient in {name} of {self.names[rows[0]]} or of another adapter: call "
                                   "pruner.step() after backward() and optimizer.step(), before zero_grad()")
            current = (torch.stack(weights) * torch.stack([w.grad for w in weights])).abs_()
            mean.lerp_(current, 1 - self.beta1)
            spread.lerp_((current - mean).abs_(), 1 - self.beta2)

    @torch.no_grad()
    def scores(self):
        """Importance of every singular value, (adapters, r).  S(w) = Ī · Ū.

        Eq. 9 ("reduced"): S(Λ_i) + mean over k of S(u_·i) + mean over k of S(U_i·).
        Eq. 8 ("full") adds (ΣS(v) + ΣS(V)) / k, the same for every i of an adapter: the order inside one adapter
        cannot change, as the paper says, but the choice over all adapters can.
        """
        total = torch.zeros_like(self.keep, dtype=self.sensitivity[0].dtype)
        for (name, _), rows, mean, spread in zip(self.groups, self.rows, self.sensitivity, self.uncertainty):
            S = mean * spread                                                    # (n, *shape of the factor)
            if name in ("v", "V"):
                S = S.sum((1, 2), keepdim=True)[:, 0] / min(S.shape[1:])         # (n, 1): one number an adapter
            elif name != "lam":
                S = S.mean(1 if name == "u" else 2)                              # u (n, k, r), U (n, r, k) → (n, r)
            total.index_add_(0, rows, S.expand(-1, self.r))
        return total

    def _select(self, budget):
        """Keep exactly `budget` entries. (Authors' code: score <= kthvalue, which on ties prunes them all.)"""
        best = self.scores().flatten().argsort(descending=True, stable=True)[:budget]
        self.keep = torch.zeros_like(self.keep).flatten().index_fill_(0, best, True).view_as(self.keep)
        self.kept_total = budget

    def _mask(self):
        lams = [layer.lam for layer in self.layers]
        torch._foreach_mul_(lams, list(self.keep.to(lams[0].dtype).unbind()))

    def kept(self):
        """{adapter name: singular values kept by the last selection}, the data of Figure 3. (Not the rank of ΔW,
        which is at most min(k, kept).)"""
        return dict(zip(self.names, self.keep.sum(1).tolist()))

    def state_dict(self):
        """Everything a resumed run needs: plain values and tensors only."""
        return {"t": self.t, "kept_total": self.kept_total, "keep": self.keep.clone(),
                "sensitivity": [s.clone() for s in self.sensitivity],
                "uncertainty": [s.clone() for s in self.uncertainty]}

    def load_state_dict(self, state):
        """Restore state_dict(); ValueError if it is that of another model, rank or form of importance."""
        mine = self.state_dict()
        shapes = lambda s: [s["keep"].shape] + [x.shape for n in ("sensitivity", "uncertainty") for x in s[n]]
        if set(state) != set(mine) or shapes(state) != shapes(mine):
            raise ValueError("this pruner state belongs to other adapters, another r or another form of importance")
        self.t, self.kept_total = state["t"], state["kept_total"]
        self.keep.copy_(state["keep"])
        for name in ("sensitivity", "uncertainty"):
            for own, saved in zip(getattr(self, name), state[name]):
                own.copy_(saved)


def _saved_tensors(model):
    """{name: tensor} of what fine-tuning made: the factors, every other trainable parameter, and the buffers
    that live beside one (a trained BatchNorm's statistics)."""
    live = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    adapters = {name for name, _ in lora2_layers(model)}
    owner = lambda name: name.rpartition(".")[0]
    trained = {owner(n) for n, t in live.items() if t.requires_grad}
    return {n: t for n, t in live.items() if owner(n) in adapters
            or owner(n) in trained and (t.requires_grad or not isinstance(t, nn.Parameter))}


def _facts(layer):
    """What an adapter file must agree on besides shapes: the scale, and 16 entries of W0 as its fingerprint."""
    weight = layer.base.weight.detach().flatten()
    return {"scale": torch.tensor(layer.scale), "base_sample": weight[:: -(-len(weight) // 16)].float().cpu()}


def lora2_state_dict(model):
    """Adapters, their scales, a fingerprint of each W0, and every tensor kept trainable: {name: tensor copy}."""
    state = {name: tensor.detach().clone() for name, tensor in _saved_tensors(model).items()}
    for name, layer in lora2_layers(model):
        state |= {f"{name}.{fact}": value for fact, value in _facts(layer).items()}
    return state


@torch.no_grad()
def load_lora2_state_dict(model, state):
    """Load lora2_state_dict() into a model prepared by the same add_lora2 call. Strict: a missing, unexpected or
    mis-shaped tensor, another alpha or another base is a ValueError that names it, and nothing is loaded."""
    own = _saved_tensors(model)
    facts = {f"{name}.{fact}": value for name, layer in lora2_layers(model) for fact, value in _facts(layer).items()}
    for what, names in (("is missing", {*own, *facts} - {*state}), ("is not in this model", {*state} - {*own, *facts})):
        if names:
            raise ValueError(f"{len(names)} tensors do not fit, e.g. {min(names)} {what}: "
                             "use the same base model, targets, k, r and trainable names")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} here: "
                             "use the same base model, k and r")
    for name, value in facts.items():      # a loose tolerance: the same base may be held in half precision
        if not (state[name].shape == value.shape and torch.allclose(state[name].float().cpu(), value, rtol=0.02)):
            raise ValueError(f"{name.removesuffix('.scale')} has scale {state[name].item():g} in the file and "
                             f"{value.item():g} here: use the same alpha" if name.endswith(".scale") else
                             f"{name.removesuffix('.base_sample')} was trained on another base model's weights")
    for name, tensor in own.items():
        tensor.copy_(state[name])


@torch.no_grad()
def merge_lora2(model):
    """Fold every ΔW into its W0 (in fp32, cast once) and put the plain nn.Linear back. Returns the model."""
    modules = dict(model.named_modules())
    for name, layer in lora2_layers(model):
        layer.base.weight.copy_(layer.weight)
        if name == "":
            return layer.base
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer.base)
    return model


def demo(steps=400, gamma=0.1):
    """A reader's first sight: find a planted rank-2 change of one layer among three, pruning 24 values to 6."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    add_lora2(net, ["0", "2", "4"], k=4, r=8, alpha=8, init="orthonormal")
    planted = torch.randn(32, 2) @ torch.randn(2, 32) * 0.1
    x = torch.randn(2048, 32)
    h = net[1](net[0](x))
    target = net[4](net[3](net[2](h) + h @ planted.T)).detach()     # the frozen network with layer 2 changed
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    pruner = RankPruner(net, target_rank=2, total_steps=steps, warmup=50, final=100, interval=10)
    print("planted: a change of rank 2 in layer 2\nstep    loss  R - floor  kept per layer")
    for step in range(1, steps + 1):
        loss, R = nn.functional.mse_loss(net(x), target), orthogonality_loss(net)
        (loss + gamma * R).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        if step in (1, 50, 100, 200, 300, steps):
            print(f"{step:4d}  {loss:6.4f}  {R - 2 * abs(4 - 8):9.4f}  {pruner.kept()}")
    before, (A, B) = net(x), net[2].to_lora()
    print(f"exported as a plain LoRA of rank {len(A)}: B @ A = ΔW within {(B @ A - net[2].delta_weight()).abs().max():.1e}")
    print(f"merged into plain layers: same output within {(merge_lora2(net)(x) - before).abs().max():.1e}")


if __name__ == "__main__":
    demo()
