"""LoRA² in fewer operations and fewer passes over memory: see lora2.py first, and copy both.

    add_lora2(model, targets, ..., layer=FastLoRA2Linear)  # the same parameters and files
    pruner = FastRankPruner(model, ...)                    # the same arguments and state_dict()
    cast_frozen(model, torch.bfloat16)                     # if you like: under autocast
    with shared_updates(model):                            # if you like: around a forward pass
        loss = ...
    loss.backward()
    add_gradients(orthogonality_loss(model), parameters, gamma)    # not a second backward()

The numbers are those of lora2.py but for rounding: it is the oracle of tests/test_fast.py. A layer
that is there already becomes fast by layer.__class__ = FastLoRA2Linear. fast.py makes a whole model
of model.py fast, which is what train.py runs.
"""
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false
import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from lora2 import LoRA2Linear, RankPruner, is_quantised, lora2_layers, require


class LinearWithUpdate(torch.autograd.Function):
    """y = x Wᵀ + b + (x down) up, with x (N, d_in), down (d_in, k), up (k, d_out) and y (N, d_out).
    W and b are frozen.

    Autograd would compute the update, and its share of ∂L/∂x, in arrays as large as y and x and add
    them up afterwards. Here the products add into what is there (addmm_), and only x and x down are
    kept for the backward pass. The latter is made transposed, z = (x down)ᵀ: at k = 8 such products
    take a third to a half of the time on a CPU.
    """

    @staticmethod
    def forward(ctx, x, W, b, down, up):
        y = F.linear(x, W, b)  # (N, d_out)
        z = down.T @ x.T  # (k, N)
        ctx.save_for_backward(x, W, z, down, up)
        return y.addmm_(z.T, up)

    @staticmethod
    @torch.autograd.function.once_differentiable  # z is kept as a number: no gradient of a gradient
    def backward(ctx, dy):
        x, W, z, down, up = ctx.saved_tensors
        dx = None
        dz = up @ dy.T  # (k, N)
        if ctx.needs_input_grad[0]:
            dx = (dy @ W).addmm_(dz.T, down.T)  # (N, d_in)
        return dx, None, None, (dz @ x).T, z @ dy


def product_dtype(x):
    """The dtype in which nn.Linear would multiply x: its own, or autocast's where that is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def is_plain(base, x):
    """Whether base(x) is no more than a frozen product, so that nobody misses the call.

    Hooks, or a forward() that was put in the place of its own, want to be called, and quantised
    weights are no Parameter of torch. Mixed dtypes are for torch to refuse.
    """
    plain = type(base.weight) is nn.Parameter and "forward" not in base.__dict__
    hooks = (base._forward_hooks or base._forward_pre_hooks
             or base._backward_hooks or base._backward_pre_hooks)
    mixed = base.weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)
    trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return plain and not hooks and not mixed and not trained


def linear_with_update(base, x, down, up, cast=None):
    """base(x) + x down up for an nn.Linear: x (..., d_in) → (..., d_out), in the dtype of base(x).

    cast: (W, b), the base's weights in another dtype, if they are at hand.
    No gradient of a gradient and no torch.func goes through it.
    """
    dtype = product_dtype(x)
    down = down.to(dtype)
    up = up.to(dtype)
    if not is_plain(base, x):
        return base(x) + x.to(dtype) @ down @ up
    W, b = base.weight, base.bias
    if cast is not None and cast[0].dtype == dtype:
        W, b = cast
    if b is not None:
        b = b.to(dtype)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, d_in)
    y = LinearWithUpdate.apply(rows, W.to(dtype), b, down, up)
    return y.view(*x.shape[:-1], base.out_features)


class FastLoRA2Linear(LoRA2Linear):
    """LoRA2Linear with another order of the same products: down = v, up = C V."""

    shared: tuple[torch.Tensor, torch.Tensor] | None = None  # in shared_updates(): (down, up)
    cast: tuple | None = None  # (W, b), what cast_frozen() made

    def forward(self, x):
        if self.shared is not None:
            return linear_with_update(self.base, x, *self.shared, self.cast)
        with torch.autocast(x.device.type, enabled=False):
            up = self.core() @ self.V  # (k, k) @ (k, d_out)
        return linear_with_update(self.base, x, self.v, up, self.cast)


def by_shape(layers):
    """Lists of layers of one (d_in, d_out, scale) each: their factors can be stacked."""
    groups = {}
    for layer in layers:
        key = layer.in_features, layer.out_features, layer.scale
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def stacked(layers, name):
    """A factor of all these layers in one tensor, (n, ...)."""
    return torch.stack([getattr(layer, name) for layer in layers])


@contextlib.contextmanager
def shared_updates(model):
    """Within it down = v and up = C V of all adapters of one shape come out of one batched product.

    Around one forward pass; its backward pass may follow outside. The updates do not follow the
    weights while it is open. Under autocast they are cast here, all at once: enter autocast first.
    Not for gradient checkpointing, which would run forward passes of its own after its end.
    """
    fast = [layer for _, layer in lora2_layers(model) if isinstance(layer, FastLoRA2Linear)]
    try:
        for layers in by_shape(fast):
            v, u, lam, U, V = (stacked(layers, name) for name in ("v", "u", "lam", "U", "V"))
            dtype = product_dtype(v)
            with torch.autocast(v.device.type, enabled=False):
                up = layers[0].scale * (u * lam[:, None]) @ U @ V  # (n, k, k) @ (n, k, d_out)
            for layer, its_v, its_up in zip(layers, v.to(dtype).unbind(), up.to(dtype).unbind()):
                layer.shared = its_v, its_up
        yield
    finally:
        for layer in fast:
            layer.shared = None


def orthogonality_loss(model, terms=("uv", "UV", "PQ")):
    """lora2.orthogonality_loss() with one batched product for all adapters of a shape.

    The arguments, the result and the ValueError are the same; the adapters must have one k and r.
    What is written there for one adapter stands here for n: tr (X − I)² of all Grams X at once.
    """
    groups = by_shape([layer for _, layer in lora2_layers(model)])
    require(groups, "the model has no LoRA² adapters: call add_lora2() first")
    require(terms and set(terms) <= {"uv", "UV", "PQ"},
            f"terms = {terms!r}: list some of 'uv', 'UV', 'PQ'")
    layers = []  # in the order of the groups, as all that follows
    for group in groups:
        layers += group
    k, r = layers[0].k, layers[0].r
    with torch.autocast(layers[0].u.device.type, enabled=False):
        Gv = torch.cat([gram(stacked(group, "v").mT) for group in groups])  # (n, k, k)
        GV = torch.cat([gram(stacked(group, "V")) for group in groups])
        Gu = gram(stacked(layers, "u"))
        GU = gram(stacked(layers, "U").mT)
        grams, offset = [], 0
        if "uv" in terms:
            grams += [Gv, Gu]
        if "UV" in terms:
            grams += [GV, GU]
        if "PQ" in terms:
            grams += [torch.bmm(Gv, Gu), torch.bmm(GV, GU)]
            offset = 2 * (r - k)
        E = torch.cat(grams)  # (2n, 4n or 6n, k, k)
        E = E - torch.eye(k, dtype=E.dtype, device=E.device)
        return (E * E.mT).sum() / len(layers) + offset


def gram(A):
    """A Aᵀ of each of n matrices: (n, a, b) → (n, a, a)."""
    return torch.bmm(A, A.mT)


class FastRankPruner(RankPruner):
    """RankPruner in as many operations for a hundred adapters as for one.

    The arguments, scores, choices and state_dict() are the same: a run can go on with either.
    """

    def scores(self):
        """Importance of every singular value, (n, r)."""
        n, k, r = len(self.layers), self.layers[0].k, self.r
        S = self.sensitivity * self.uncertainty
        lam, u, U, wide = S.tensor_split([n * r, n * r + n * k * r, n * r + 2 * n * k * r])
        scores = lam.view(n, r) + u.view(n, k, r).mean(1) + U.view(n, r, k).mean(2)
        if len(wide):  # S ≥ 0: the sum over one v or V is its 1-norm, many norms are one operation
            sums = torch.stack(torch._foreach_norm(wide.split(self.sizes[3 * n:]), 1))  # (2n,)
            scores += sums.view(2, n, 1).sum(0) / k
        return scores

    def prune(self, layers):
        """Set what the last choice left out to 0."""
        lams = [layer.lam for layer in layers]
        torch._foreach_mul_(lams, self.keep.to(lams[0]).unbind())


def add_gradients(loss, parameters, weight=1):
    """(weight · loss).backward(), but all gradients are added to those there in one operation.

    Every parameter that `loss` depends on must have a .grad already; the others are left alone.
    Returns the value of `loss`, without what autograd knows of it.
    """
    gradients = torch.autograd.grad(weight * loss, parameters, allow_unused=True)
    there = [p.grad for p, gradient in zip(parameters, gradients) if gradient is not None]
    new = [gradient for gradient in gradients if gradient is not None]
    torch._foreach_add_(there, new)
    return loss.detach()


class FrozenLinear(nn.Linear):
    """nn.Linear with a copy of frozen weights in autocast's dtype: else each pass casts them."""

    cast: tuple  # (W, b), what is trained as it is

    def forward(self, x):
        autocast = torch.is_autocast_enabled(x.device.type)
        W, b = self.cast
        if autocast and W.dtype == product_dtype(x) and not self.weight.requires_grad:
            return F.linear(x, W, b)  # autocast casts x, and a trained b
        return super().forward(x)


@torch.no_grad()
def cast_frozen(model, dtype):
    """Keep frozen weights of linear layers in autocast's dtype too: else each pass casts them.

    For training alone, once the model is where it will run: a copy does not follow its original.
    (About 190 operations of a pass of DeBERTaV3-base; what the backward pass keeps is no more.)
    """
    adapters = {layer.base: layer for _, layer in lora2_layers(model)}
    for layer in model.modules():
        is_linear = type(layer) in (nn.Linear, FrozenLinear) and not is_quantised(layer)
        if not is_linear or layer.weight.requires_grad:
            continue
        b = layer.bias
        if b is not None and not b.requires_grad:
            b = b.to(dtype)
        if layer not in adapters:
            layer.__class__ = FrozenLinear
        keeper = adapters.get(layer, layer)  # an adapter's copy goes with the adapter
        keeper.cast = layer.weight.to(dtype), b
