"""LoRA² (arXiv 2408.06854) for the linear layers of a frozen model. Copy it: it needs torch ≥ 2.6.

    add_lora2(model, ["query", "value"], k=8, r=4, trainable=["classifier"])
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    pruner = RankPruner(model, target_rank=2, total_steps=1000, warmup=100, final=400, interval=10)
    for x, y in batches:
        (task_loss(model(x), y) + 0.1 * orthogonality_loss(model)).backward()
        optimizer.step()
        pruner.step()  # it reads the gradients
        optimizer.zero_grad()
    torch.save(lora2_state_dict(model), "adapter.pt")  # or merge_lora2(model)

AdaLoRA adds P Λ Q, like an SVD of r terms, to a frozen W0ᵀ, and prunes by setting values in Λ to 0.
In LoRA² P = v u and Q = U V are products themselves, through a second scale k (Eq. 4). The update
is ΔWᵀ = scale · v u diag(Λ) U V, with scale = alpha / r. For d = 768, k = 8, r = 4:

            ┌─────────────────────── W0ᵀ, b (frozen) ───────────────────────┐
    x N×768 ┤                                                               + y N×768
            └─ v 768×8 ─── u 8×4 ─── Λ 4 ─── U 4×8 ─── V 8×768 ─── scale ───┘

    symbol   shape        init          scored?   meaning
    v        (d_in, k)    N(0, 0.02²)   in Eq. 8  takes the input down to k numbers
    u        (k, r)       N(0, 0.02²)   yes       input directions of the r terms, in these k
    Λ lam    (r,)         0             yes       singular values; pruning sets them to 0
    U        (r, k)       N(0, 0.02²)   yes       output directions of the r terms
    V        (k, d_out)   N(0, 0.02²)   in Eq. 8  takes k numbers up to the output

The rank of ΔW is at most min(k, r): with k = 1 LoRA² can reach what LoRA can with r = 1, no more.
Pruning lowers it only where fewer than k terms are left. With k = 1 these are none: it decides
which matrices keep an update.
"""
import math
import warnings

import torch
from torch import nn

# --- the layer (Eq. 4) --------------------------------------------------------------------

class LoRA2Linear(nn.Module):
    """A frozen nn.Linear plus the update of Eq. 4, with factors in fp32 (fp64 on an fp64 base).

    k, r: projected dimension and number of singular values, from 1 to min(d_in, d_out).
    alpha: positive. The update is scaled by alpha / r, with the initial r.
    init: "gaussian" is that of the authors' code: ∂L/∂Λ is tiny at first, so use AdamW, whose steps
        do not shrink with it. "orthonormal" is ours: with it ∂L/∂Λ is not tiny."""

    def __init__(self, base, k=1, r=8, alpha=32, init="gaussian"):
        super().__init__()
        check_base("base", base, k, r, alpha, init)
        self.base = base.requires_grad_(False)
        self.in_features = d_in = base.in_features
        self.out_features = d_out = base.out_features
        self.k, self.r, self.scale = k, r, alpha / r
        new = {"dtype": torch.promote_types(base.weight.dtype, torch.float32),
               "device": base.weight.device}
        self.v = nn.Parameter(torch.empty(d_in, k, **new))
        self.u = nn.Parameter(torch.empty(k, r, **new))
        self.lam = nn.Parameter(torch.zeros(r, **new))  # ΔW = 0: training starts at the base
        self.U = nn.Parameter(torch.empty(r, k, **new))
        self.V = nn.Parameter(torch.empty(k, d_out, **new))
        for factor in (self.v, self.u, self.U, self.V):
            if init == "gaussian":
                nn.init.normal_(factor, std=0.02)
            else:
                nn.init.orthogonal_(factor)
        self.train(base.training)

    def forward(self, x):
        """x (..., d_in) → (..., d_out). ΔW is never built: its gradient would be as large as W0."""
        y = self.base(x)
        h = x.to(y.dtype) @ self.v.to(y.dtype)  # (..., k), in the dtype of the base or of autocast
        h = h @ self.core().to(y.dtype)  # (..., k)
        return y + h @ self.V.to(y.dtype)

    def core(self):
        """C = scale · u diag(Λ) U, (k, k), between v and V."""
        with no_autocast(self.u):
            return self.scale * (self.u * self.lam) @ self.U

    def delta_weight(self):
        """ΔW, (d_out, d_in) as in nn.Linear, to merge."""
        with no_autocast(self.u):
            return (self.v @ self.core() @ self.V).T

    @torch.no_grad()
    def to_lora(self):
        """ΔW = B @ A as a LoRA with r = k, exactly: copies of A (k, d_in) and B (d_out, k)."""
        with no_autocast(self.u):
            A, B = self.v.T, (self.core() @ self.V).T
        return A.contiguous().clone(), B.contiguous()  # for k = 1, contiguous() copies nothing

    @property
    def weight(self):
        """W0 + ΔW, to merge. The fast path of nn.TransformerEncoderLayer reads it too."""
        require(not is_quantised(self.base), "W0 is quantised: there is no W0 + ΔW", TypeError)
        return (self.base.weight + self.delta_weight()).to(self.base.weight.dtype)

    @property
    def bias(self):
        return self.base.bias


def no_autocast(tensor):
    """A context in which autocast, on the tensor's device, does not round."""
    return torch.autocast(tensor.device.type, enabled=False)


def lora2_layers(model):
    """[(name, LoRA2Linear), ...] of a model, in the model's order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoRA2Linear)]


# --- the regularisers (Eq. 5) -------------------------------------------------------------

def orthogonality_loss(model, terms=("uv", "UV", "PQ")):
    """R of Eq. 5 without gamma, a scalar: a mean over adapters. Add it once per optimizer step.

    terms: the pairs to take, as in Table 3. ValueError for any other.
    For orthonormal P and Q, which need k ≥ r, ‖ΔW‖² = scale² Σ Λ_i². Then |Λ_i| says how much of ΔW
    a term is, in every layer alike. Otherwise terms can overlap or cancel."""
    adapters = lora2_layers(model)
    require(adapters, "the model has no LoRA² adapters: call add_lora2() first")
    require(terms and set(terms) <= {"uv", "UV", "PQ"},
            f"terms = {terms!r}: list some of 'uv', 'UV', 'PQ'")
    R = 0
    for _, layer in adapters:
        with no_autocast(layer.u):
            # Nothing is d × d. The paper's ‖vvᵀ − I‖² is ‖vᵀv − I‖² + d_in − k, and its
            # ‖uᵀu − I‖² is ‖uuᵀ − I‖² + r − k. These constants are left out.
            Gv, Gu = layer.v.T @ layer.v, layer.u @ layer.u.T  # (k, k)
            GU, GV = layer.U.T @ layer.U, layer.V @ layer.V.T  # (k, k)
            if "uv" in terms:
                R = R + off_identity(Gv) + off_identity(Gu)  # ‖vᵀv − I‖² + ‖uuᵀ − I‖²
            if "UV" in terms:
                R = R + off_identity(GU) + off_identity(GV)  # ‖UᵀU − I‖² + ‖VVᵀ − I‖²
            # PᵀP = uᵀ(vᵀv)u is (r, r), X = (vᵀv)(uuᵀ) is (k, k). Their traces are equal,
            # and tr X² = tr (PᵀP)². So ‖PᵀP − I_r‖² = tr (X − I_k)² + r − k.
            if "PQ" in terms:
                R = R + off_identity(Gv @ Gu) + layer.r - layer.k  # ‖PᵀP − I‖²
                R = R + off_identity(GV @ GU) + layer.r - layer.k  # ‖QQᵀ − I‖²
    return R / len(adapters)  # ours: the paper is silent, but a sum would grow with the model


def off_identity(X):
    """tr (X − I)². For a symmetric X, as Gv is and Gv @ Gu is not, this is ‖X − I‖²."""
    E = X - torch.eye(len(X), dtype=X.dtype, device=X.device)
    return (E * E.T).sum()  # Σ E_ij E_ji


def orthogonality_floor(k, r, terms=("uv", "UV", "PQ")):
    """The least value of R, 2|k − r| with all terms: P, Q, u and U have rank min(k, r) at most."""
    floors = {"uv": max(k - r, 0), "UV": max(k - r, 0), "PQ": 2 * max(r - k, 0)}
    return sum(map(floors.__getitem__, set(terms)))


# --- importance and pruning (Eq. 6 to 9, Algorithm 1) -------------------------------------

class RankPruner(nn.Module):
    """Algorithm 1: keep the b(t) most important singular values of the model, set the rest to 0.

    target_rank: singular values per adapter in the end, on average.
    total_steps: T, all optimizer steps of the run, not micro-batches.
    warmup: t_i, the first steps, in which all are kept. Then b(t) falls along a cubic.
    final: t_f, the last steps, in which the choice is fixed. Before, what was set to 0 may return.
    interval: ΔT, steps from choice to choice.
    beta1, beta2: of the averages Ī and Ū, at least 0 and below 1.
    importance: "reduced" (Eq. 9) or "full" (Eq. 8). ValueError for what does not fit.

    Make it when the adapters are on their device, and save its state_dict() if a run may go on.
    The scores multiply new weights by gradients taken at the old ones, as AdaLoRA does. R counts in
    these gradients. The task's gradient of u and U has a factor Λ, which is 0 at first: early on
    they are scored by R."""

    factors = ("lam", "u", "U")  # of each adapter: what is scored

    def __init__(self, model, target_rank, total_steps, warmup, final, interval,
                 beta1=0.85, beta2=0.85, importance="reduced"):
        super().__init__()
        found = lora2_layers(model)
        require(found, "the pruner needs adapters: call add_lora2() first")
        self.names, self.layers = zip(*found)  # in a tuple they are not the pruner's submodules
        kinds = {(m.k, m.r, m.lam.dtype, m.lam.device, m.lam.requires_grad) for m in self.layers}
        require(len(kinds) == 1, "the pruner needs adapters of one k, r, dtype, device and "
                f"requires_grad, not {kinds}")
        check_schedule(self.layers[0].r, target_rank, total_steps, warmup, final, interval)
        require(0 <= beta1 < 1 and 0 <= beta2 < 1, f"{beta1 = }, {beta2 = }: give 0 to below 1")
        require(importance in ("reduced", "full"), f"{importance = }: give 'reduced' or 'full'")
        self.all_parameters = list(model.parameters())
        self.r = self.layers[0].r
        self.target_rank = target_rank
        self.total_steps = total_steps
        self.warmup = warmup
        self.last_choice = total_steps - final
        self.interval = interval
        self.beta1, self.beta2 = beta1, beta2
        self.t = 0
        self.kept_total = len(found) * self.r

        if importance == "full":
            self.factors = (*self.factors, "v", "V")
        self.sizes = list(map(torch.numel, self.scored()))
        lam = self.layers[0].lam
        self.dtype = torch.promote_types(lam.dtype, torch.float32)  # fp16 would round I to 0
        zeros = torch.zeros(sum(self.sizes), dtype=self.dtype, device=lam.device)
        self.sensitivity = nn.Buffer(zeros)  # Ī of all that is scored, one after another
        self.uncertainty = nn.Buffer(zeros.clone())  # Ū
        self.keep = nn.Buffer(torch.ones(len(found), self.r, dtype=torch.bool, device=lam.device))

    @torch.no_grad()
    def step(self):
        """Call it after optimizer.step() and before zero_grad(). Returns how many are kept."""
        require(self.t < self.total_steps, "step() came more than total_steps times", RuntimeError)
        t = self.t + 1  # this step, 1 .. T
        if t <= self.last_choice:
            self.update_averages()
            if t % self.interval == 0 or t == self.last_choice:
                self.choose(t)
                self.prune(self.layers)
        else:  # the choice stays, but gradient and momentum have moved Λ_i off 0
            self.prune(self.layers)
        self.t = t
        return self.kept_total

    def update_averages(self):
        """Ī and Ū of all that is scored.

        I = |w · ∂L/∂w| estimates how much the loss would change if w were 0. One batch is noisy, so
        Ī is its average over the steps, and Ū that of |I − Ī|. Their product, a heuristic of
        AdaLoRA's, is large only where both are.
        Ours: without a gradient I is 0. If a gradient of the model is not finite, as where a
        GradScaler skips the step, I is Ī: all Ū shrink by β2, and the order of the scores stays."""
        require(any(layer.lam.grad is not None for layer in self.layers),
                "no adapter has a gradient: call pruner.step() after optimizer.step() and before "
                "zero_grad(), with a loss that depends on the adapters, and gradient checkpointing "
                "with use_reentrant=False", RuntimeError)
        self.to(self.dtype)  # should somebody have cast the pruner with the model
        dense = [p.grad for p in self.all_parameters  # no DTensor, nothing sparse
                 if type(p.grad) is torch.Tensor and p.grad.layout == torch.strided]
        norm = nn.utils.get_total_norm(dense, math.inf)

        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.scored()]
        w = torch.cat(list(map(torch.flatten, self.scored()))).to(self.dtype)
        dw = torch.cat(list(map(torch.flatten, grads))).to(self.dtype)
        I = torch.where(norm < math.inf, (w * dw).abs(), self.sensitivity)  # False for NaN
        self.sensitivity.lerp_(I, 1 - self.beta1)  # Ī ← β1 Ī + (1 − β1) I
        self.uncertainty.lerp_((I - self.sensitivity).abs(), 1 - self.beta2)  # with the new Ī

    def scored(self):
        """Λ of all adapters, then all u, then all U; for Eq. 8 all v and all V."""
        return [getattr(layer, factor) for factor in self.factors for layer in self.layers]

    def scores(self):
        """Importance of every singular value, (n, r) for n adapters, from S(w) = Ī · Ū."""
        n = len(self.layers)
        S = (self.sensitivity * self.uncertainty).split(self.sizes)
        lam = torch.stack(S[:n])  # (n, r)
        u = torch.stack(S[n:2 * n]).view(n, -1, self.r)  # (n, k, r)
        U = torch.stack(S[2 * n:3 * n]).view(n, self.r, -1)  # (n, r, k)
        scores = lam + u.mean(1) + U.mean(2)  # Eq. 9
        for i, outer in enumerate(S[3 * n:]):  # Eq. 8: all v, then all V; one sum for all r terms
            scores[i % n] += outer.sum() / self.layers[0].k
        return scores

    def budget(self, t):
        """b(t), how many singular values of the whole model to keep at step t = 1 .. T."""
        n, falling = len(self.layers), self.last_choice - self.warmup
        left = min(max(self.last_choice - t, 0), falling)  # steps of the fall to come
        surplus = n * (self.r - self.target_rank)  # that falls to 0
        return n * self.target_rank + (surplus * left**3) // falling**3

    def choose(self, t):
        """Keep the b(t) best, exactly; of equal ones the first."""
        self.kept_total = self.budget(t)
        best = self.scores().flatten().argsort(descending=True, stable=True)[:self.kept_total]
        self.keep.zero_().view(-1).index_fill_(0, best, True)

    def prune(self, layers):
        """Set what the last choice left out to 0."""
        for layer, row in zip(layers, self.keep):
            layer.lam.mul_(row.to(layer.lam.device))

    @torch.no_grad()
    def mask(self, model):
        """Apply the last choice to a model with the same adapters, after other weights were loaded
        into it. Warns if the final budget was not reached."""
        layers = [layer for _, layer in lora2_layers(model)]
        fits = len(layers) == len(self.layers) and layers[0].r == self.r
        require(fits, "mask() needs a model with the adapters that the pruner has")
        self.prune(layers)
        if self.kept_total > self.budget(self.total_steps):
            warnings.warn(f"the run ended at step {self.t} of {self.total_steps}: {self.kept_total}"
                          " singular values are left, more than the budget", stacklevel=3)

    def kept(self):
        """{adapter: how many singular values the last choice kept}, as in Figure 3. RuntimeError if
        the last phase has begun and the model has other Λ, as after loading its best weights."""
        if self.t >= self.last_choice:
            lam = torch.stack(self.scored()[:len(self.layers)]).to(self.keep.device)
            require(not lam[~self.keep].any(), "the model's Λ are not what the pruner left: call "
                    "pruner.mask(model), and step() after optimizer.step()", RuntimeError)
            if self.kept_total > 0 and not (lam.any() and self.sensitivity.any()):
                warnings.warn("all Λ or all scores are 0: make the optimizer after add_lora2(), "
                              "and call step() before zero_grad()", stacklevel=2)
        return dict(zip(self.names, self.keep.sum(1).tolist()))

    def get_extra_state(self):
        return torch.tensor([self.t, self.kept_total])  # safetensors holds only tensors

    def set_extra_state(self, state):
        self.t, self.kept_total = state.tolist()


# --- into a model -------------------------------------------------------------------------

def add_lora2(model, targets, k=1, r=8, alpha=32, init="gaussian", trainable=(), layer=LoRA2Linear):
    """Freeze a model and put a LoRA2Linear around its target layers. Returns their names, in order.
    Load and cast the model before this; wrap it and make the optimizer afterwards.

    targets: names of modules, or one: "query" is also every name that ends in ".query".
        "all-linear": every plain nn.Linear but the output embeddings of a transformers model.
    k, r, alpha, init: as for LoRA2Linear, or the subclass of it that is given as `layer`.
    trainable: whole parts of dotted names, such as "classifier": trained in full, in their dtype.
        Name all that is new, often a pooler too: what is left out stays random and is not saved.
    ValueError or TypeError, and no change, if a name has no match or a match cannot be adapted."""
    require(not lora2_layers(model), "the model has LoRA² adapters already: name all in one call")
    trainable = {trainable} if isinstance(trainable, str) else set(trainable)
    targets = {targets} if isinstance(targets, str) else set(targets)
    in_full = find_parameters(model, trainable)
    bases = find_layers(model, targets, trainable)

    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied ones by all names
    weights = list(map(id, parameters.values()))
    for name, base in bases.items():
        check_base(name, base, k, r, alpha, init)
        require(weights.count(id(base.weight)) == 1,
                f"{name}, or its weight, is used in several places: leave it out")

    adapters = {name: layer(base, k, r, alpha, init) for name, base in bases.items()}
    model.requires_grad_(False).zero_grad()  # clipping would count gradients from before
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter)
    for parameter in in_full:
        parameter.requires_grad_(True)
    return list(bases)


def find_parameters(model, trainable):
    """The parameters with a name of which a part is in `trainable`, a set of words."""
    found, unmatched = [], set(trainable)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        hits = trainable.intersection(name.split("."))
        if hits and parameter.is_floating_point():
            found.append(parameter)
            unmatched -= hits
    require(not unmatched, f"trainable = {sorted(unmatched)} match nothing to train")
    return found


def find_layers(model, targets, trainable):
    """{name: layer} of all that are in `targets`, a set, and in no part that is trainable."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found, unmatched, linear = {}, set(targets), set()
    for name, module in model.named_modules(remove_duplicate=False):
        hits = {target for target in targets if f".{name}".endswith(f".{target}")}
        if module is not head and (type(module) is nn.Linear or is_quantised(module)):
            linear.add(name.rpartition(".")[2])
            if "all-linear" in targets:
                hits.add("all-linear")
        if hits and name and trainable.isdisjoint(name.split(".")):
            found[name] = module
            unmatched -= hits
    require(found and not unmatched, f"targets = {sorted(unmatched)} match no layer outside of "
            f"what is trainable; Linear layers: {sorted(linear)}")
    return found


# --- out of a model -----------------------------------------------------------------------

@torch.no_grad()
def lora2_state_dict(model):
    """{name: copy} of all that may have changed: state_dict() without frozen parameters and without
    a RankPruner. Two entries for each adapter guard against a wrong file: NAME.scale, alpha / r,
    and NAME.base_sample, up to 16 numbers of W0; NaN, which fits any, if W0 is quantised."""
    changing = set()
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(name, recurse=False):
            if parameter.requires_grad or isinstance(module, LoRA2Linear):
                changing.add(key)
        if not isinstance(module, RankPruner):
            changing |= dict(module.named_buffers(name, recurse=False)).keys()
    state = {key: w.clone() for key, w in model.state_dict().items() if key in changing}
    for name, layer in lora2_layers(model):
        state[f"{name}.scale"] = torch.tensor(layer.scale)
        unknown = torch.full((16,), math.nan)
        W = unknown if is_quantised(layer.base) else layer.base.weight.flatten()
        state[f"{name}.base_sample"] = W[::math.ceil(len(W) / 16)].float().clone()
    return state


def load_lora2_state_dict(model, state):
    """Load lora2_state_dict() into a model that the same add_lora2() call prepared. Strict:
    ValueError, and nothing is loaded, if a name, a shape, alpha or the sample of W0 differs."""
    own = lora2_state_dict(model)
    for name in sorted(own | state):
        here = getattr(own.get(name), "shape", "missing")
        there = getattr(state.get(name), "shape", "missing")
        require(here == there, f"{name} is {there} in the file, {here} in the model: use the "
                "file's base model, targets, k, r and trainable names, all unwrapped")
    for name, _ in lora2_layers(model):
        for key, tolerance in ((f"{name}.scale", 1e-6), (f"{name}.base_sample", 0.02)):
            here, there = own[key], state[key].to(own[key])  # W0 may be in bf16 on one side
            differs = (there - here).abs() > tolerance * here.abs() + 1e-7  # False for NaN
            require(not differs.any(), f"{key} differs: use the file's alpha and base model")
    model.load_state_dict(state, strict=False)  # it has nothing frozen, and two keys more


@torch.no_grad()
def merge_lora2(model):
    """Add every ΔW to its W0, in place, and put the nn.Linear back. Returns the model. TypeError,
    and no change, if a W0 is quantised."""
    for name, layer in lora2_layers(model):
        require(not is_quantised(layer.base), f"the W0 of {name} is quantised: load the file into "
                "the full-precision base and merge there", TypeError)
    for name, layer in lora2_layers(model):
        layer.base.weight.copy_(layer.weight)
        if not name:  # the model itself is an adapter
            return layer.base
        model.set_submodule(name, layer.base)
    return model


# --- what is refused ----------------------------------------------------------------------

def require(condition, message, error=ValueError):
    if not condition:
        raise error(message)


def check_base(name, base, k, r, alpha, init):
    """TypeError or ValueError unless `base` is an nn.Linear that the rest fits. A subclass may
    compute something else, or never be called, as out_proj of nn.MultiheadAttention."""
    plain = type(base) is nn.Linear and type(base.weight) is nn.Parameter
    plain = plain and base.weight.is_floating_point() and base.weight.itemsize > 1  # no fp8
    require((plain or is_quantised(base)) and not base.weight.is_meta,
            f"{name} is a {type(base).__name__}, not an nn.Linear with a plain weight of its own "
            "(meta device, quantised otherwise, re-parametrised): leave it out", TypeError)
    most = min(base.in_features, base.out_features)
    require({type(k), type(r)} == {int} and 1 <= min(k, r) and max(k, r) <= most,
            f"{k = }, {r = }: {name} takes integers from 1 to {most}, or leave it out")
    require(0 < alpha < math.inf, f"{alpha = }: give a positive number")
    require(init in ("gaussian", "orthonormal"), f"{init = }: give 'gaussian' or 'orthonormal'")


def is_quantised(base):
    """Whether W0 is held in few bits: by a layer of bitsandbytes, or a tensor of torchao."""
    library = type(base.weight if type(base) is nn.Linear else base).__module__
    return isinstance(base, nn.Linear) and library.startswith(("bitsandbytes", "torchao"))


def check_schedule(r, target_rank, total_steps, warmup, final, interval):
    """ValueError unless these are whole numbers, and steps are left between warmup and final."""
    require(type(target_rank) is int and 0 <= target_rank <= r,
            f"{target_rank = }: give an integer from 0 to r = {r}")
    steps = (total_steps, warmup, final, interval)
    whole = set(map(type, steps)) == {int} and min(steps) >= 0
    require(whole and warmup + final < total_steps and interval > 0,
            f"{total_steps = }, {warmup = }, {final = }, {interval = }: give integers, "
            "warmup + final < total_steps and interval > 0")
