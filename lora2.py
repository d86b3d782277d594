"""LoRA²: multi-scale low-rank adaptation of frozen linear layers. One file that needs torch only: copy it.

After arXiv 2408.06854. The update of a frozen W0 is AdaLoRA's P Λ Q, whose factors P = v u and Q = U V are
themselves products through a second, smaller scale k (Eq. 4, row vectors; here d = 768, k = 8, r = 8):

         ┌──────────────────  W0ᵀ, b  (frozen)  ─────────────────┐
    x ───┤                                                       + ─── y
         └─── v ────── u ────── Λ ────── U ────── V ─── scale ───┘
  N×768     768×8     8×8       8       8×8     8×768             N×768
            └──── P ────┘               └──── Q ────┘

    symbol   shape        init          scored?   meaning
    v        (d_in, k)    N(0, 0.02²)   no        takes the input down to k numbers
    u        (k, r)       N(0, 0.02²)   yes       left singular directions, inside those k
    Λ lam    (r,)         0             yes       singular values; a pruned one is held at 0
    U        (r, k)       N(0, 0.02²)   yes       right singular directions
    V        (k, d_out)   N(0, 0.02²)   no        takes k numbers up to the output
    scale    alpha / r                            with the initial r: pruning does not change it

So rank ΔW ≤ min(k, r): with k = 1 the update is some LoRA of rank 1. Use:

    add_lora2(model, ["query", "value"], k=8, trainable=["classifier"])      # freeze, wrap, return the names
    pruner = RankPruner(model, target_rank=2, total_steps=T, warmup=T // 10, final=T // 2, interval=10)
    for batch in loader:                                                     # T optimizer steps
        loss = task_loss(model, batch) + 0.1 * orthogonality_loss(model)
        loss.backward(); optimizer.step(); pruner.step(); optimizer.zero_grad()
"""
import math
import re
from collections import Counter

import torch
from torch import nn


class LoRA2Linear(nn.Module):
    """A frozen nn.Linear plus the LoRA² update of Eq. 4.

    base: the nn.Linear, kept as it is. k: projected dimension. r: number of singular values. alpha: scale =
    alpha / r. init: "gaussian", N(0, 0.02²) as in the authors' code (the paper: "random Gaussian"), or
    "orthonormal" (ours): Eq. 5 starts at its floor and Λ has useful gradients from the first step. The factors
    are fp32 (fp64 on an fp64 base). TypeError or ValueError if the base cannot be adapted.
    """

    def __init__(self, base, k=1, r=8, alpha=32, init="gaussian"):
        super().__init__()
        check_base("base", base, k, r, alpha, init)
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.k, self.r, self.scale = k, r, alpha / r
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        new = lambda *shape: nn.Parameter(torch.zeros(shape, dtype=dtype, device=base.weight.device))
        self.v, self.V = new(base.in_features, k), new(k, base.out_features)
        self.u, self.U = new(k, r), new(r, k)
        self.lam = new(r)                                  # Λ = 0: at the start the model is the base model
        for factor in (self.v, self.u, self.U, self.V):
            nn.init.normal_(factor, std=0.02) if init == "gaussian" else nn.init.orthogonal_(factor)
        self.train(base.training)

    def core(self):
        """C = scale · u diag(Λ) U, (k, k): all of the update that lies between v and V."""
        return self.scale * (self.u * self.lam) @ self.U

    def delta_weight(self):
        """ΔW, (d_out, d_in) as in nn.Linear. The one formula: forward, merge and export must agree with it."""
        return (self.v @ self.core() @ self.V).T

    def to_lora(self):
        """The update as a plain LoRA of rank k, exactly: A (k, d_in), B (d_out, k), B @ A = ΔW with scale in B.

        In peft's terms r = lora_alpha = k, so that its own scale lora_alpha / r is 1.
        """
        return self.v.T.detach().clone(), (self.core() @ self.V).T.detach().clone()

    def forward(self, x):
        """x (..., d_in) → (..., d_out). Never builds ΔW (the authors' forward does: +134 % FLOPs at 128 tokens)."""
        rows = x.reshape(-1, self.in_features)             # (N, d_in)
        y = self.base(rows)                                # (N, d_out), in the base's dtype or autocast's
        h = rows.to(y.dtype) @ self.v.to(y.dtype)          # (N, k)
        h = h @ self.core().to(y.dtype)                    # (N, k)
        y = y.addmm_(h, self.V.to(y.dtype))                # (N, d_out): adds in place, no second output
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self):
        """W0 + ΔW in the base's dtype: for merging, and for parents that read the matrix instead of calling the
        layer (the fast path of nn.TransformerEncoder). Dense and slow, but never silently without the update."""
        return (self.base.weight + self.delta_weight()).to(self.base.weight.dtype)

    @property
    def bias(self):
        return self.base.bias

    def extra_repr(self):
        return f"k={self.k}, r={self.r}, scale={self.scale:g}"


def check_base(name, base, k, r, alpha, init):
    """Raise unless `base` is what LoRA² can adapt rightly, an nn.Linear with a weight of its own, and k, r fit."""
    if type(base) is not nn.Linear:      # a subclass computes something else, or is read without being called
        raise TypeError(f"{name} is a {type(base).__name__}; LoRA² adapts plain nn.Linear layers only")
    if base.weight.is_meta or not isinstance(base.weight, nn.Parameter):
        raise TypeError(f"{name} has no weight of its own (meta device, re-parametrised): load real weights first")
    smaller = min(base.in_features, base.out_features)
    for symbol, value in (("k", k), ("r", r)):
        if type(value) is not int or not 1 <= value <= smaller:
            raise ValueError(f"{symbol} = {value!r} does not fit {name}: give an integer from 1 to {smaller}")
    if not 0 < alpha < math.inf or init not in ("gaussian", "orthonormal"):
        raise ValueError(f"alpha = {alpha!r} must be positive, init = {init!r} be 'gaussian' or 'orthonormal'")


def add_lora2(model, targets, k=1, r=8, alpha=32, init="gaussian", trainable=(), layer=LoRA2Linear):
    """Freeze `model` and wrap its target layers in LoRA2Linear, in place. Returns the adapted names, in order.

    targets: module names; one matches a module called exactly so or ending in "." + it ("query" matches
    "encoder.layer.0.attention.self.query"). trainable: dotted parts of parameter names that stay trainable, such
    as "classifier"; layers under them are trained in full and never adapted. All is adapted or nothing touched:
    ValueError for a name that matches nothing, for a layer or weight used in two places and for a model that has
    adapters; TypeError for a match that is no plain nn.Linear.
    """
    if isinstance(targets, str) or isinstance(trainable, str):
        raise TypeError("targets and trainable are lists of names, not one string")
    if lora2_layers(model):
        raise ValueError("the model has LoRA² adapters already: name all targets in one call of add_lora2")
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter([*modules.values(), *parameters.values()])        # under how many names is each one known?
    kept = {part: [name for name in parameters if part in name.split(".")] for part in trainable}
    found = {target: [name for name in modules if f".{name}".endswith(f".{target}")
                      and set(trainable).isdisjoint(name.split("."))] for target in targets}

    missing = [name for name, matches in [*found.items(), *kept.items()] if not matches]
    if missing or not found:
        linears = sorted({re.sub(r"\b\d+\b", "*", n) for n, m in modules.items() if type(m) is nn.Linear})
        raise ValueError(f"{missing or 'an empty list'} matches nothing; the Linear layers are {linears}")
    names = [name for name in modules if any(name in matches for matches in found.values())]
    for name in names:
        check_base(name, modules[name], k, r, alpha, init)
        if uses[modules[name]] > 1 or uses[modules[name].weight] > 1:
            raise ValueError(f"{name} or its weight is used in two places: an adapter would change both")

    for name, parameter in parameters.items():
        parameter.requires_grad_(any(name in matches for matches in kept.values()))
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer(modules[name], k, r, alpha, init))
    return names


def lora2_layers(model):
    """[(name, LoRA2Linear), ...] of a model, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRA2Linear)]


def orthogonality_loss(model, terms=("uv", "UV", "PQ")):
    """R of Eq. 5, a scalar: the mean over the adapters, without gamma. Add it once per optimizer step.

    Per adapter ‖vᵀv−I‖² + ‖uuᵀ−I‖² ("uv"), ‖VVᵀ−I‖² + ‖UᵀU−I‖² ("UV") and ‖PᵀP−I‖² + ‖QQᵀ−I‖² ("PQ"), squared
    Frobenius norms; `terms` chooses groups, as Table 3 does. ValueError for other terms or no adapters.

    Paper: "uv" on the large sides, vvᵀ (d_in × d_in) and uᵀu. As ‖AAᵀ−I_n‖² = ‖AᵀA−I_k‖² + n − k, that is a
    constant more and the same gradient, so every Gram matrix here is k × k. Authors' code: unsquared norms, P and
    Q detached, and an UnboundLocalError. Neither says how to combine layers: a plain sum over 72 matrices would
    swamp the task loss (gamma · sum = 135 at k = 1), hence the mean.
    """
    layers = [layer for _, layer in lora2_layers(model)]
    if not layers or isinstance(terms, str) or not terms or not set(terms) <= {"uv", "UV", "PQ"}:
        raise ValueError(f"terms = {terms!r}: name some of 'uv', 'UV', 'PQ', on a model with LoRA² adapters")
    groups = {}                                            # layers of one shape are stacked and computed at once
    for layer in layers:
        groups.setdefault((layer.v.shape, layer.u.shape, layer.V.shape), []).append(layer)
    total = 0.0
    for group in groups.values():
        v, u, U, V = (torch.stack([getattr(layer, name) for layer in group]) for name in ("v", "u", "U", "V"))
        I = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
        with torch.autocast(v.device.type, enabled=False):                     # in full precision always
            Gv, Gu, GU, GV = v.mT @ v, u @ u.mT, U.mT @ U, V @ V.mT            # each (n, k, k)
            for term, pair in (("uv", (Gv, Gu)), ("UV", (GV, GU))):
                if term in terms:
                    total = total + sum((G - I).square().sum() for G in pair)
            if "PQ" in terms:                              # ‖PᵀP−I_r‖² = tr(MM) − 2 tr(M) + r, M = (vᵀv)(uuᵀ)
                for M in (Gv @ Gu, GU @ GV):
                    total = total + (M * M.mT).sum() - 2 * (M * I).sum() + len(group) * u.shape[-1]
    return total / len(layers)


def orthogonality_floor(k, r, terms=("uv", "UV", "PQ")):
    """The least value of R: 2|k − r| with all terms, because P, Q, u and U have rank min(k, r) at most."""
    return sum(2 * max(r - k, 0) if term == "PQ" else max(k - r, 0) for term in terms)


class RankPruner(nn.Module):
    """Algorithm 1: keep the b(t) most important singular values of the whole model and hold the others at 0.

    target_rank: singular values per adapter, on average, at the end. total_steps: T, in optimizer steps (never
    micro-batches). Of t = 1 .. T the first `warmup` keep all; then the budget falls along a cubic, with a new
    selection every `interval` steps, in which a pruned value may return; the last `final` steps hold one fixed
    selection. importance: "reduced" (Eq. 9) or "full" (Eq. 8). ValueError for an impossible schedule.

    Call step() after optimizer.step() and before zero_grad(). It needs this step's gradients; the weights it
    multiplies them with are those after the step, as in AdaLoRA's loop. A Module for its state_dict() alone.
    """

    def __init__(self, model, target_rank, total_steps, warmup, final, interval, beta1=0.85, beta2=0.85,
                 importance="reduced"):
        super().__init__()
        self.names = [name for name, _ in lora2_layers(model)]
        self.layers = [layer for _, layer in lora2_layers(model)]
        sizes = {(layer.k, layer.r) for layer in self.layers}
        if len(sizes) != 1:
            raise ValueError(f"the pruner needs adapters of one (k, r), the model has {sorted(sizes) or 'none'}")
        self.k, self.r = sizes.pop()
        if type(target_rank) is not int or not 0 <= target_rank <= self.r:
            raise ValueError(f"target_rank = {target_rank!r}: give an integer from 0 to r = {self.r}")
        if (any(type(n) is not int or n < 0 for n in (total_steps, warmup, final, interval))
                or interval < 1 or warmup + final >= total_steps):
            raise ValueError(f"warmup + final = {warmup} + {final} must be less than the {total_steps} steps "
                             f"there are, interval = {interval} at least 1: lower them or train longer")
        if not (0 < beta1 < 1 and 0 < beta2 < 1) or importance not in ("reduced", "full"):
            raise ValueError(f"beta1, beta2 = {beta1}, {beta2} must lie between 0 and 1, importance = "
                             f"{importance!r} be 'reduced' or 'full'")
        self.target_rank, self.total_steps = target_rank, total_steps
        self.warmup, self.final, self.interval = warmup, final, interval
        self.beta1, self.beta2, self.full, self.t = beta1, beta2, importance == "full", 0
        self.register_buffer("sensitivity", torch.zeros_like(self._scored("data")))       # Ī
        self.register_buffer("uncertainty", torch.zeros_like(self.sensitivity))           # Ū
        keep = torch.ones(len(self.layers), self.r, dtype=torch.bool, device=self.sensitivity.device)
        self.register_buffer("keep", keep)
        self.kept_total = keep.numel()

    def budget(self, t):
        """b(t): how many singular values of the whole model to keep at step t = 1 .. T."""
        start, end = len(self.layers) * self.r, len(self.layers) * self.target_rank
        if t <= self.warmup:
            return start
        if t > self.total_steps - self.final:
            return end
        progress = (t - self.warmup) / (self.total_steps - self.final - self.warmup)
        return int(end + (start - end) * (1 - progress) ** 3)

    @torch.no_grad()
    def step(self):
        """Algorithm 1 for one optimizer step. Returns the kept count, without waiting for the device.

        RuntimeError without gradients, or after more steps than were announced.
        """
        if self.t == self.total_steps:
            raise RuntimeError(f"step() was called more than total_steps = {self.total_steps} times")
        t, last_phase = self.t + 1, self.total_steps - self.final + 1
        if t < last_phase:                                 # in the last phase scores and selection are frozen
            # The paper has "??" for these in Algorithm 1; they are AdaLoRA's:  I = |w · ∂L/∂w|,
            # Ī ← β1 Ī + (1−β1) I,  Ū ← β2 Ū + (1−β2) |I − Ī|.
            I = (self._scored("data") * self._scored("grad")).abs_()
            self.sensitivity.lerp_(I, 1 - self.beta1)
            self.uncertainty.lerp_((I - self.sensitivity).abs_(), 1 - self.beta2)
        self.t = t
        on_time = t % self.interval == 0 or t == last_phase - 1
        if (self.warmup < t < last_phase and on_time) or t == last_phase:
            self.kept_total = self.budget(t)
            # Exactly this many: the authors' "score <= kthvalue" prunes all of them when scores are equal.
            best = self.scores().flatten().argsort(descending=True, stable=True)[:self.kept_total]
            self.keep.view(-1).fill_(False).index_fill_(0, best, True)
        elif t < last_phase:
            return self.kept_total
        lams = [layer.lam for layer in self.layers]        # Adam's momentum moves a zeroed Λ: zero it each step
        torch._foreach_mul_(lams, list(self.keep.to(lams[0].dtype).unbind()))
        return self.kept_total

    def _scored(self, what):
        """All numbers that count for the scores, in one row. what: "data" or "grad".

        First the triplets (n, r, 1 + 2k): Λ_i, column i of u and row i of U. At k = 1, r = 8 on 768 × 768 these are
        24 of 1,560 numbers, the paper's 98.5 % fewer sensitivities. (Its Section 3.2 swaps the letters of 3.1; only
        leaving out the big v and V gives that figure.) For Eq. 8 every v and V follows.
        """
        pick = lambda name: [getattr(getattr(layer, name), what) for layer in self.layers]
        if any(x is None for name in ("v", "u", "lam", "U", "V") for x in pick(name)):
            raise RuntimeError("an adapter has no gradient: call pruner.step() after backward() and "
                               "optimizer.step(), before zero_grad()")
        lam, u, U = (torch.stack(pick(name)) for name in ("lam", "u", "U"))
        triplets = torch.cat([lam[..., None], u.mT, U], dim=-1).flatten()
        return torch.cat([triplets] + [x.flatten() for x in pick("v") + pick("V")]) if self.full else triplets

    def scores(self):
        """Importance of every singular value, (n, r), from S(w) = Ī · Ū.

        Eq. 9 ("reduced"): S(Λ_i) + mean over k of S(u_·i) + mean over k of S(U_i·).
        Eq. 8 ("full") adds (ΣS(v) + ΣS(V)) / k, the same for every i of an adapter: the order inside one adapter
        cannot change, as the paper says, but the selection over all adapters can.
        """
        n, r, k = len(self.layers), self.r, self.k
        big = [layer.v.numel() for layer in self.layers] + [layer.V.numel() for layer in self.layers]
        S, *big = (self.sensitivity * self.uncertainty).split([n * r * (1 + 2 * k)] + (big if self.full else []))
        S = S.view(n, r, 1 + 2 * k)
        total = S[..., 0] + S[..., 1:1 + k].mean(-1) + S[..., 1 + k:].mean(-1)
        if self.full:
            total += torch.stack([s.sum() for s in big]).view(2, n, 1).sum(0) / k
        return total

    def kept(self):
        """{adapter: singular values kept by the last selection}, the data of Figure 3. (Not the rank of ΔW, which
        is at most min(k, kept).)"""
        return dict(zip(self.names, self.keep.sum(1).tolist()))

    def get_extra_state(self):
        return {"t": self.t, "kept_total": self.kept_total}

    def set_extra_state(self, state):
        self.t, self.kept_total = state["t"], state["kept_total"]


def _trained(model):
    """{name: tensor} of all that fine-tuning made: the factors, every other trainable parameter, and the buffers
    that live beside one (the statistics of a trained BatchNorm)."""
    live = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    owner = lambda name: name.rpartition(".")[0]
    adapters = {name for name, _ in lora2_layers(model)}
    owners = {owner(n) for n, t in live.items() if t.requires_grad}
    return {n: t for n, t in live.items() if owner(n) in adapters
            or owner(n) in owners and (t.requires_grad or not isinstance(t, nn.Parameter))}


def lora2_state_dict(model):
    """{name: copy} of the factors, of every tensor kept trainable, and of each adapter's scale and 16 entries of
    its W0 (".scale", ".base_sample"), by which loading knows another alpha and another base model."""
    state = {name: tensor.detach().clone() for name, tensor in _trained(model).items()}
    for name, layer in lora2_layers(model):
        weight = layer.base.weight.detach().flatten()
        state[f"{name}.scale"] = torch.tensor(layer.scale)
        state[f"{name}.base_sample"] = weight[::-(-len(weight) // 16)].float().clone()
    return state


@torch.no_grad()
def load_lora2_state_dict(model, state):
    """Load lora2_state_dict() into a model prepared by the same add_lora2 call. Strict: a missing, unexpected or
    mis-shaped tensor, another alpha and another base are a ValueError that names it, and nothing is loaded."""
    own, live = lora2_state_dict(model), _trained(model)
    for name in sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{name} is {'missing in the file' if name in own else 'not in this model'}: use the "
                         "base model, targets, k, r and trainable names that the file was made with")
    for name, mine in own.items():
        theirs = state[name].to(mine.device)
        if theirs.shape != mine.shape:
            raise ValueError(f"{name} is {tuple(theirs.shape)} in the file and {tuple(mine.shape)} here: "
                             "use the same base model, k and r")
        if name not in live and not torch.allclose(theirs, mine, rtol=0.02):   # 2 %: it may be held in bf16
            raise ValueError(f"{name} differs between file and model: " + (
                "use the same alpha" if name.endswith(".scale") else "the file belongs to another base model"))
    for name, tensor in live.items():
        tensor.copy_(state[name])


@torch.no_grad()
def merge_lora2(model):
    """Fold every ΔW into its W0 (summed in fp32, cast once), put the plain nn.Linear back, return the model."""
    modules = dict(model.named_modules())
    for name, layer in lora2_layers(model):
        layer.base.weight.copy_(layer.weight)
        parent, _, child = name.rpartition(".")
        if not name:
            return layer.base
        setattr(modules[parent], child, layer.base)
    return model


def demo(steps=400, gamma=0.1):
    """Find a planted rank-2 change of one layer among three, pruning 24 singular values to 6."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    x, planted = torch.randn(2048, 32), torch.randn(32, 2) @ torch.randn(2, 32) / 4
    add_lora2(net, ["0", "2", "4"], k=4, r=8, alpha=8, init="orthonormal")
    h = net[1](net[0](x))
    target = net[4](net[3](net[2](h) + h @ planted.T)).detach()
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
            print(f"{step:4d}  {loss:6.4f}  {R - orthogonality_floor(4, 8):9.4f}  {pruner.kept()}")
    y, (A, B) = net(x), net[2].to_lora()
    print(f"as a plain LoRA of rank {len(A)}: B @ A = ΔW to {(B @ A - net[2].delta_weight()).abs().max():.0e}")
    print(f"merged into plain layers: the same output to {(merge_lora2(net)(x) - y).abs().max():.0e}")


if __name__ == "__main__":
    demo()
