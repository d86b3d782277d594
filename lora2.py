"""LoRA²: multi-scale low-rank adaptation of frozen linear layers. One file that needs torch only: copy it.

After arXiv 2408.06854. The update of a frozen W0 is AdaLoRA's P Λ Q, whose factors P = v u and Q = U V are
themselves products through k numbers, the second scale (Eq. 4, row vectors; here d = 768, k = 8, r = 8):

         ┌──────────────────  W0ᵀ, b  (frozen)  ─────────────────┐
    x ───┤                                                       + ─── y
         └─── v ────── u ────── Λ ────── U ────── V ─── scale ───┘
  N×768     768×8     8×8       8       8×8     8×768             N×768
            └──── P ────┘               └──── Q ────┘

    symbol   shape        init          scored?   meaning
    v        (d_in, k)    N(0, 0.02²)   no        takes the input down to k numbers
    u        (k, r)       N(0, 0.02²)   yes       left singular directions, inside those k
    Λ lam    (r,)         0             yes       singular values; pruning sets them to 0
    U        (r, k)       N(0, 0.02²)   yes       right singular directions
    V        (k, d_out)   N(0, 0.02²)   no        takes k numbers up to the output
    scale    alpha / r                            with the initial r: pruning does not change it

So rank ΔW ≤ min(k, r); with k = 1 the updates are exactly those of LoRA with r = 1. demo() shows a whole run.
"""
import re

import torch
from torch import nn


class LoRA2Linear(nn.Module):
    """A frozen nn.Linear plus the update of Eq. 4, its factors in fp32 whatever the base is (fp64 on fp64).

    base: the nn.Linear, frozen here. k: projected dimension. r: number of singular values. alpha: scale =
    alpha / r. init: "gaussian", N(0, 0.02²) as in the authors' code (the paper: "random Gaussian"), or
    "orthonormal" (ours): Eq. 5 starts at its floor and Λ gets useful gradients from the first step.
    """

    def __init__(self, base, k=1, r=8, alpha=32, init="gaussian"):
        super().__init__()
        check_base("base", base, k, r, alpha, init)
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.k, self.r, self.scale = k, r, alpha / r
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        new = lambda *shape: nn.Parameter(torch.zeros(shape, dtype=dtype, device=base.weight.device))
        self.v, self.u, self.lam = new(base.in_features, k), new(k, r), new(r)             # Λ = 0, so ΔW = 0
        self.U, self.V = new(r, k), new(k, base.out_features)
        for factor in (self.v, self.u, self.U, self.V):
            nn.init.normal_(factor, std=0.02) if init == "gaussian" else nn.init.orthogonal_(factor)
        self.train(base.training)

    def core(self):
        """C = scale · u diag(Λ) U, (k, k), what v and V enclose; in the factors' dtype under autocast too."""
        with torch.autocast(self.u.device.type, enabled=False):
            return self.scale * (self.u * self.lam) @ self.U               # (k, r) @ (r, k)

    def delta_weight(self):
        """ΔW, (d_out, d_in) as in nn.Linear, in the factors' dtype: dense, for merging; others use core()."""
        with torch.autocast(self.u.device.type, enabled=False):
            return (self.v @ self.core() @ self.V).T       # ((d_in, k) @ (k, k) @ (k, d_out))ᵀ

    @torch.no_grad()
    def to_lora(self):
        """ΔW = B @ A, a LoRA of rank k (peft: r = lora_alpha = k): copies of A (k, d_in) and B (d_out, k)."""
        with torch.autocast(self.u.device.type, enabled=False):
            A, B = self.v.T, (self.core() @ self.V).T      # (k, d_in), (d_out, k)
        return A.clone(memory_format=torch.contiguous_format), B.contiguous()

    def forward(self, x):
        """x (..., d_in) → (..., d_out), without building ΔW (the authors do: over twice the FLOPs)."""
        y = self.base(x)                                   # (..., d_out), in the base's dtype or autocast's
        h = x.to(y.dtype) @ self.v.to(y.dtype) @ self.core().to(y.dtype)       # (..., k) twice
        return y + h @ self.V.to(y.dtype)

    @property
    def weight(self):
        """W0 + ΔW in the base's dtype: for merging, and for parents that read the matrix instead of calling
        the layer (the fast path of nn.TransformerEncoder). Dense and slow, but never without the update."""
        return (self.base.weight + self.delta_weight()).to(self.base.weight.dtype)

    bias = property(lambda self: self.base.bias)


def require(condition, message, error=ValueError):
    """Raise `error` unless `condition`: the message says what is wrong and what to do."""
    if not condition:
        raise error(message)


def check_base(name, base, k, r, alpha, init):
    """Only an nn.Linear with a plain weight of its own is adapted, with k and r that fit into it: a subclass
    computes something else, or its parent reads it without calling it, as nn.MultiheadAttention does."""
    require(type(base) is nn.Linear, f"{name} is a {type(base).__name__}, not an nn.Linear", TypeError)
    W, most = base.weight, min(base.in_features, base.out_features)
    require(type(W) is nn.Parameter and W.is_floating_point() and W.itemsize > 1 and not W.is_meta,
            f"{name} has no plain weight of its own: meta device, quantised or re-parametrised", TypeError)
    require(type(k) is type(r) is int and 1 <= k <= most and 1 <= r <= most,
            f"k = {k!r} or r = {r!r} does not fit {name}: give integers from 1 to {most}")
    require(0 < alpha < float("inf") and init in ("gaussian", "orthonormal"),
            f"alpha = {alpha!r} must be positive, init = {init!r} 'gaussian' or 'orthonormal'")


def add_lora2(model, targets, k=1, r=8, alpha=32, init="gaussian", trainable=(), layer=LoRA2Linear):
    """Freeze `model` and wrap its target layers in LoRA2Linear, in place. Return their names, in order.

    targets: module names; "query" matches a module called so, and all whose names end in ".query", such as
    "encoder.layer.0.attention.self.query". trainable: dotted parts of parameter names that stay trainable,
    such as "classifier"; modules under them are trained in full, never adapted. layer: LoRA2Linear or a
    subclass. A name without a match, or a match that cannot be adapted: ValueError, TypeError, no change.
    """
    require(not lora2_layers(model), "the model has LoRA² adapters already: name all targets in one call")
    targets, trainable = ({part} if isinstance(part, str) else set(part) for part in (targets, trainable))
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    parameters = dict(model.named_parameters(remove_duplicate=False))

    parts = lambda name: set(name.split("."))
    hit = lambda name, target: f".{name}".endswith(f".{target}")
    kept = {n for n, p in parameters.items() if parts(n) & trainable and p.is_floating_point()}
    names = [n for n in modules if any(hit(n, target) for target in targets) and not parts(n) & trainable]
    missing = sorted(target for target in targets if not any(hit(n, target) for n in names))
    missing += sorted(trainable.difference(*map(parts, kept)))
    linears = sorted({re.sub(r"\b\d+\b", "*", n) for n, m in modules.items() if type(m) is nn.Linear})
    require(names and not missing, f"{missing or 'an empty list'} matches nothing; Linear layers: {linears}")
    for name in names:
        check_base(name, modules[name], k, r, alpha, init)
        uses = sum(parameter is modules[name].weight for parameter in parameters.values())
        require(uses == 1, f"{name}, or its weight, is used in {uses} places: all of them would change")
    adapters = {name: layer(modules[name], k, r, alpha, init) for name in names}
    for name in sorted(parameters, key=kept.__contains__):         # if tied, the name that is kept comes last
        parameters[name].requires_grad_(name in kept)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapters[name])
    return names


def lora2_layers(model):
    """[(name, LoRA2Linear), ...] of a model, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRA2Linear)]


def orthogonality_loss(model, terms=("uv", "UV", "PQ")):
    """R of Eq. 5, a scalar: the mean over the adapters, without gamma. Add it once per optimizer step.

    Per adapter, in squared Frobenius norms: ‖vᵀv−I‖² + ‖uuᵀ−I‖² ("uv"), ‖VVᵀ−I‖² + ‖UᵀU−I‖² ("UV"),
    ‖PᵀP−I‖² + ‖QQᵀ−I‖² ("PQ"); `terms` chooses, as Table 3 does. Only k×k products are formed: with
    X = (vᵀv)(uuᵀ), tr(X) = tr(PᵀP) and tr(X²) = tr((PᵀP)²), so that ‖PᵀP−I_r‖² = tr((X−I_k)²) + r − k.
    Paper: "uv" on the large sides, vvᵀ and uᵀu; as ‖AAᵀ−I_n‖² = ‖AᵀA−I_k‖² + n − k, that is a constant more
    and the same gradient. Authors' code: norms not squared, P and Q detached, an UnboundLocalError. Neither
    says how to combine layers. Ours: the mean; a sum over 72 (gamma · sum = 135 at k = 1) swamps the task.
    """
    groups = {}                                            # layers of one shape share a batched product
    for _, layer in lora2_layers(model):
        groups.setdefault((layer.in_features, layer.out_features), []).append(layer)
    require(groups and terms and set(terms) <= {"uv", "UV", "PQ"},
            f"terms = {terms!r}: list some of 'uv', 'UV', 'PQ', on a model with LoRA² adapters")
    layers, bmm = sum(groups.values(), []), torch.bmm
    stack = lambda name, group: torch.stack([getattr(layer, name) for layer in group])
    with torch.autocast(layers[0].u.device.type, enabled=False):
        Gv = torch.cat([bmm(v.mT, v) for v in (stack("v", group) for group in groups.values())])   # (n, k, k)
        GV = torch.cat([bmm(V, V.mT) for V in (stack("V", group) for group in groups.values())])   # (n, k, k)
        u, U = stack("u", layers), stack("U", layers)                          # (n, k, r), (n, r, k)
        Gu, GU = bmm(u, u.mT), bmm(U.mT, U)                                    # (n, k, k)
        grams = {"uv": [Gv, Gu], "UV": [GV, GU], "PQ": [bmm(Gv, Gu), bmm(GV, GU)]}
        k, r = u.shape[1:]
        E = torch.cat([G for term in grams if term in terms for G in grams[term]])
        E = E - torch.eye(k, dtype=E.dtype, device=E.device)                   # (2n · groups, k, k)
        return (E * E.mT).sum() / len(layers) + 2 * (r - k) * ("PQ" in terms)  # tr(E²) of each


def orthogonality_floor(k, r, terms=("uv", "UV", "PQ")):
    """The least value of R: 2|k − r| with all terms, because P, Q, u and U have rank min(k, r) at most."""
    return sum(2 * max(r - k, 0) if term == "PQ" else max(k - r, 0) for term in set(terms))


class RankPruner(nn.Module):
    """Algorithm 1: every `interval` steps keep the b(t) best singular values of the model, set the rest to 0.

    target_rank: singular values per adapter at the end, on average. total_steps: T, in optimizer steps (never
    micro-batches). For `warmup` (t_i) steps all stay, then b falls along a cubic; what is pruned trains on
    and may return, until in the last `final` (t_f) steps the set is fixed and the rest is held at 0.
    importance: "reduced" (Eq. 9) or "full" (Eq. 8); beta1, beta2: of its averages Ī and Ū. ValueError for
    what does not fit. Call step() after optimizer.step() and before zero_grad(): the importance is this
    step's gradients times the new weights, as in AdaLoRA's loop. A gradient that is None: RuntimeError.
    """

    def __init__(self, model, target_rank, total_steps, warmup, final, interval, beta1=0.85, beta2=0.85,
                 importance="reduced"):
        super().__init__()
        found = lora2_layers(model)
        kinds = {(layer.k, layer.r, layer.lam.dtype, layer.lam.device) for _, layer in found}
        require(len(kinds) == 1, f"the pruner needs adapters of one (k, r, dtype, device), not {kinds or 0}")
        [(self.k, self.r, _, device)] = kinds
        require(type(target_rank) is int and 0 <= target_rank <= self.r,
                f"target_rank = {target_rank!r}: give an integer from 0 to r = {self.r}")
        steps = (total_steps, warmup, final, interval)
        require(all(type(n) is int and n >= 0 for n in steps) and interval and warmup + final < total_steps,
                f"T, warmup, final, interval = {steps}: keep warmup + final < T and interval > 0")
        require(importance in ("reduced", "full"), f"importance = {importance!r}: give 'reduced' or 'full'")
        self.names, self.layers = zip(*found)
        self.target_rank, self.total_steps, self.beta1, self.beta2 = target_rank, total_steps, beta1, beta2
        self.warmup, self.final, self.interval = warmup, final, interval
        self.t, self.full, self.kept_total = 0, importance == "full", len(found) * self.r
        self.register_buffer("sensitivity", torch.zeros_like(self._scored(lambda w: w)))   # Ī, as _scored()
        self.register_buffer("uncertainty", torch.zeros_like(self.sensitivity))            # Ū, as _scored()
        self.register_buffer("keep", torch.ones(len(found), self.r, device=device).bool())

    def budget(self, t):
        """b(t): how many singular values of the whole model to keep at step t = 1 .. T."""
        start, end = len(self.layers) * self.r, len(self.layers) * self.target_rank
        progress = (t - self.warmup) / (self.total_steps - self.final - self.warmup)
        return int(end + (start - end) * (1 - min(max(progress, 0), 1)) ** 3)

    @torch.no_grad()
    def step(self):
        """Algorithm 1 for one optimizer step. Returns the kept count, without waiting for the device."""
        require(self.t < self.total_steps, f"step() came more than {self.total_steps} times", RuntimeError)
        t, last = self.t + 1, self.total_steps - self.final        # after step `last` the scores are frozen
        if t <= last:
            # The paper has "??" for these in Algorithm 1; they are AdaLoRA's:  I = |w · ∂L/∂w|,
            # Ī ← β1 Ī + (1−β1) I,  Ū ← β2 Ū + (1−β2) |I − Ī|.  Ours: I = 0 in a step that overflowed in fp16.
            I = (self._scored(lambda w: w) * self._scored(lambda w: w.grad)).abs_()
            I = I.where(I.amax() < float("inf"), 0.0)      # also if amax is NaN
            self.sensitivity.lerp_(I, 1 - self.beta1)
            self.uncertainty.lerp_((I - self.sensitivity).abs_(), 1 - self.beta2)
        self.t = t
        if t % self.interval == 0 or t >= last:
            self.kept_total = self.budget(t)
            # Exactly this many: the authors' "score <= kthvalue" prunes all of them when scores are equal.
            best = self.scores().flatten().argsort(descending=True, stable=True)[:self.kept_total]
            self.keep.view(-1).fill_(False).index_fill_(0, best, True)
            # Momentum moves a zeroed Λ again, so it can come back; in the last phase it is 0 after each step.
            masks = self.keep.to(self.sensitivity.dtype).unbind()                          # n × (r,)
            torch._foreach_mul_([layer.lam for layer in self.layers], masks)
        return self.kept_total

    def _scored(self, get):
        """All numbers that count for the scores, in one row: all Λ, all u, all U; get(w) of each.
        At k = 1, r = 8 on 768 × 768 that is 24 of 1,560 numbers, the paper's 98.5 % fewer. (Its Section 3.2
        swaps the letters of 3.1; only leaving out the big v and V gives that figure.) Eq. 8 needs all."""
        factors = ("lam", "u", "U", "v", "V") if self.full else ("lam", "u", "U")
        columns = [[get(getattr(layer, factor)) for layer in self.layers] for factor in factors]
        require(all(w is not None for w in sum(columns, [])), "an adapter has no gradient (unused?): call "
                "pruner.step() after backward() and optimizer.step(), before zero_grad()", RuntimeError)
        row = [torch.stack(column).flatten() for column in columns[:3]]        # n·r, n·k·r and n·r·k numbers
        if self.full:                                                          # v below v, V beside V
            row += [torch.cat(columns[3]).flatten(), torch.cat(columns[4], dim=1).flatten()]
        return torch.cat(row)

    def scores(self):
        """Importance of every singular value, (n, r), from S(w) = Ī · Ū.
        Eq. 9 ("reduced"): S(Λ_i) + mean over k of S(u_·i) + mean over k of S(U_i·).
        Eq. 8 ("full") adds (ΣS(v) + ΣS(V)) / k, the same for every i of an adapter: the order inside one
        adapter cannot change, as the paper says, but the selection over all adapters can."""
        n, r, k = len(self.layers), self.r, self.k
        S = self.sensitivity * self.uncertainty
        lam, u, U, rest = S.split([n * r, n * k * r, n * r * k, len(S) - n * r * (1 + 2 * k)])
        total = lam.view(n, r) + u.view(n, k, r).mean(1) + U.view(n, r, k).mean(2)         # (n, r)
        if self.full:                                      # S ≥ 0: the sum over one v or V is its 1-norm
            d_in, d_out = zip(*((layer.in_features, layer.out_features) for layer in self.layers))
            v, V = rest[:k * sum(d_in)].view(-1, k), rest[k * sum(d_in):].view(k, -1)
            sums = torch.stack(torch._foreach_norm(v.split(d_in) + V.split(d_out, dim=1), 1))          # (2n,)
            total += sums.view(2, n, 1).sum(0) / k
        return total

    def kept(self):
        """{adapter: singular values kept by the last selection}: Figure 3. (rank ΔW ≤ min(k, kept).)"""
        return dict(zip(self.names, self.keep.sum(1).tolist()))

    def get_extra_state(self):
        return {"t": self.t, "kept_total": self.kept_total}

    def set_extra_state(self, state):
        self.t, self.kept_total = state["t"], state["kept_total"]


def lora2_state_dict(model):
    """{name in state_dict(): copy} of all that fine-tuning changes: adapters, what else is trainable, buffers
    beside either, BatchNorm's statistics; and NAME.scale and 16 entries of W0, to tell alpha and base by."""
    tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    adapters, owner = dict(lora2_layers(model)), lambda n: n.rpartition(".")[0]
    trained = {n for n, t in tensors.items() if t.requires_grad or owner(n) in adapters}
    owners = {*map(owner, trained), *(n for n, m in model.named_modules() if hasattr(m, "running_mean"))}
    state = {n: t.detach().clone() for n, t in tensors.items()
             if n in trained or owner(n) in owners and not isinstance(t, nn.Parameter)}
    for name, layer in adapters.items():
        weight = layer.base.weight.detach().flatten()
        state[f"{name}.scale"] = torch.tensor(layer.scale)
        state[f"{name}.base_sample"] = weight[::-(-len(weight) // 16)].float().clone()
    return state


def load_lora2_state_dict(model, state):
    """Load lora2_state_dict() into a model prepared by the same add_lora2 call. Strict: a missing, unexpected
    or mis-shaped tensor, another alpha, another base is a ValueError that names it, and nothing is loaded."""
    own = lora2_state_dict(model)
    missing, stray = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    require(not missing and not stray, f"missing in the file: {missing[:3]}, not in this model: {stray[:3]}: "
            "use the base model, targets, k, r and trainable names that the file was made with")
    for name, mine in own.items():
        require(state[name].shape == mine.shape, f"{name} is {tuple(state[name].shape)} in the file and "
                f"{tuple(mine.shape)} here: use the base model, k and r that the file was made with")
    for name in sorted(own.keys() - model.state_dict().keys()):    # each adapter's .scale and .base_sample
        tolerance = 1e-6 if name.endswith(".scale") else 0.02      # W0 may be in bf16 on one side
        require(torch.allclose(state[name].to(own[name]), own[name], tolerance, 1e-7),
                f"{name} differs between file and model: use the file's alpha and base model")
    model.load_state_dict(state, strict=False)             # not strict: the file leaves out what is frozen


@torch.no_grad()
def merge_lora2(model):
    """Fold every ΔW into its W0 in place (summed in fp32, cast once), put nn.Linear back. Returns model."""
    for name, layer in lora2_layers(model):
        layer.base.weight.copy_(layer.weight)
        if not name:                                       # the model itself is an adapter
            return layer.base
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    return model


def demo(seed=0, steps=300, gamma=0.1):
    """Four frozen layers, a change of rank 4 planted in one: which of 32 singular values does LoRA² keep?"""
    torch.manual_seed(seed)
    layers = [nn.Linear(32, 32) for _ in range(4)]
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2], nn.Tanh(), layers[3])
    x, planted = torch.randn(512, 32), torch.randn(32, 4) @ torch.randn(4, 32) / 32
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.4)
    layers[2].weight.data += planted
    target = net(x).detach()
    layers[2].weight.data -= planted
    add_lora2(net, ["0", "2", "4", "6"], k=8, r=8, alpha=8, init="orthonormal")
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    pruner = RankPruner(net, target_rank=1, total_steps=steps, warmup=30, final=90, interval=5)
    print("planted: a change of rank 4 in layer 4\nstep     loss  R - floor  kept in layers 0, 2, 4, 6")
    for step in range(1, steps + 1):
        loss, R = nn.functional.mse_loss(net(x), target), orthogonality_loss(net)
        (loss + gamma * R).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        if step in (1, 30, 60, 90, 150, 210, steps):
            print(f"{step:4d}  {loss:.5f}  {R - orthogonality_floor(8, 8):9.5f}  {[*pruner.kept().values()]}")
    y, (A, B), update = net(x), net[4].to_lora(), net[4].delta_weight()
    print(f"exported as a plain LoRA of rank {len(A)}: B @ A = ΔW to {(B @ A - update).abs().max():.0e}")
    print(f"merged into plain layers: the same output to {(merge_lora2(net)(x) - y).abs().max():.0e}")


if __name__ == "__main__":
    torch.set_num_threads(1)                               # the matrices are tiny: threads would only wait
    demo()
