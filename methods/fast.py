"""LoRA² with fewer operations and fewer passes over memory: what train.py runs. Read lora2.py instead.

    add_lora2(model, targets, ..., layer=FastLoRA2Linear)      # the same parameters, files and functions
    cast_frozen(model, torch.bfloat16)                         # if you like: for what runs under autocast
    with shared_updates(model):                                # if you like: around one forward pass
        loss = ...
    loss.backward()
    add_gradients(gamma * orthogonality_loss(model), parameters)       # in place of a second backward()

The numbers are those of LoRA2Linear but for rounding, which tests/test_fast.py takes as its oracle.
"""
import contextlib

import torch
import torch.nn.functional as F

from lora2 import LoRA2Linear, lora2_layers


class LinearWithUpdate(torch.autograd.Function):
    """y = x Wᵀ + b + (x down) up.

    x (N, d_in), down (d_in, k), up (k, d_out) → y (N, d_out). Autograd would compute the update, and its
    share of ∂L/∂x, in arrays as large as y and x and add them up afterwards. Here the products add into what
    is there (addmm_), and only x and x down are kept for the backward pass. The latter is made transposed,
    z = (x down)ᵀ: at k = 8 such products take a third to a half of the time on a CPU.
    """

    @staticmethod
    def forward(ctx, x, W, b, down, up):
        y = F.linear(x, W, b)                              # (N, d_out)
        z = down.T @ x.T                                   # (k, N)
        ctx.save_for_backward(x, W, z, down, up)
        return y.addmm_(z.T, up)

    @staticmethod
    @torch.autograd.function.once_differentiable           # z is kept as a number: no gradient of a gradient
    def backward(ctx, dy):
        x, W, z, down, up = ctx.saved_tensors
        dz = up @ dy.T                                     # (k, N)
        dx = (dy @ W).addmm_(dz.T, down.T) if ctx.needs_input_grad[0] else None            # (N, d_in)
        dW = dy.T @ x if ctx.needs_input_grad[1] else None                     # frozen, as a rule
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dW, db, (dz @ x).T, z @ dy


def product_dtype(x):
    """The dtype in which nn.Linear would multiply x: its own, or autocast's where that is on."""
    cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if cast else x.dtype


def linear_with_update(base, x, down, up, cast=None):
    """base(x) + x down up for an nn.Linear: x (..., d_in) → (..., d_out), in the dtype of base(x).

    cast: {dtype: (W, b)}, the base's weights in other dtypes, if they are at hand. No gradient of a gradient
    and no torch.func goes through it.
    """
    dtype = product_dtype(x)
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    mixed = base.weight.dtype != dtype and not torch.is_autocast_enabled(x.device.type)
    if hooks or mixed or "forward" in vars(base):          # for others to see, for torch to refuse
        return base(x) + x.to(dtype) @ down.to(dtype) @ up.to(dtype)
    W, b = (cast or {}).get(dtype, (base.weight, base.bias))
    y = LinearWithUpdate.apply(x.reshape(-1, x.shape[-1]).to(dtype), W.to(dtype), None if b is None else
                               b.to(dtype), down.to(dtype), up.to(dtype))
    return y.view(*x.shape[:-1], base.out_features)


@torch.no_grad()
def cast_frozen(model, dtype):
    """Keep the frozen weights of all adapters' bases in autocast's dtype too: else each pass casts them.

    For training alone, once the model is where it will run: a copy does not follow its original. (About 190
    operations of a pass of DeBERTaV3-base; what the backward pass keeps is no more than before.)
    """
    for _, layer in lora2_layers(model):
        weights = layer.base.weight, layer.base.bias
        if not any(w is not None and w.requires_grad for w in weights):
            layer.cast = {dtype: tuple(w if w is None else w.to(dtype) for w in weights)}


class FastLoRA2Linear(LoRA2Linear):
    """LoRA2Linear with another order of the same products: down = v, up = C V."""

    shared = None                                          # (down, up) while shared_updates() is active
    cast = None                                            # what cast_frozen() made: gone with the adapter

    def forward(self, x):
        if self.shared is not None:
            return linear_with_update(self.base, x, *self.shared, self.cast)
        with torch.autocast(x.device.type, enabled=False):
            up = self.core() @ self.V                      # (k, k) @ (k, d_out)
        return linear_with_update(self.base, x, self.v, up, self.cast)


@contextlib.contextmanager
def shared_updates(model):
    """Within it down = v and up = C V of all adapters of one shape come out of one batched product.

    Around one forward pass; its backward pass may follow outside. The updates do not follow the weights while
    it is open. Under autocast they are cast here, all at once: enter autocast first. Not for gradient
    checkpointing, which would run forward passes of its own after its end.
    """
    shapes = {}
    for _, layer in lora2_layers(model):
        if isinstance(layer, FastLoRA2Linear):
            shapes.setdefault((layer.in_features, layer.out_features, layer.scale), []).append(layer)
    try:
        for (*_, scale), layers in shapes.items():
            v, u, lam, U, V = (torch.stack([getattr(layer, name) for layer in layers])
                               for name in ("v", "u", "lam", "U", "V"))
            dtype = product_dtype(v)
            with torch.autocast(v.device.type, enabled=False):
                up = scale * (u * lam[:, None]) @ U @ V                        # (n, k, k) @ (n, k, d_out)
            for layer, *pair in zip(layers, v.to(dtype).unbind(), up.to(dtype).unbind()):
                layer.shared = pair
        yield
    finally:
        for layer in sum(shapes.values(), []):
            layer.shared = None


def add_gradients(loss, parameters):
    """loss.backward(), but all gradients are added to those that are there in one operation, not one each.

    Every parameter that `loss` depends on must have a .grad already; the others are left alone.
    """
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = [(p.grad, gradient) for p, gradient in zip(parameters, gradients) if gradient is not None]
    torch._foreach_add_(*map(list, zip(*pairs)))


def speed_up(net, dtype="fp32", compile=False):
    if dtype == "bf16":
        cast_frozen(net, torch.bfloat16)
    if compile:
        for layer in net.backbone.encoder.layer: layer.compile(dynamic=True)
    return net
