"""What every host of lora2.py has to do right, seen from outside: run an example and count.

    python -m tests.watch in_trainer                       # also under torchrun: each process counts for itself
"""
import contextlib
import hashlib
import io
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import lora2

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FACTORS = ("v", "u", "lam", "U", "V")


def run(name):
    """Run examples/NAME.py under watch. Returns (its variables, what was seen).

    AssertionError unless each optimizer step of the adapters was followed by one step of the pruner with gradients
    in every factor, and 0.1 · R entered the first one once: with Λ = 0, u's gradient is that of R alone.
    """
    seen = SimpleNamespace(steps=0, prunings=0, pruner=None, expected=None, moved=set())
    make, step = lora2.RankPruner.__init__, lora2.RankPruner.step
    add = lora2.add_lora2

    def off_the_floor(*args, **options):
        names = add(*args, **options)
        with torch.no_grad():
            for _, layer in lora2.lora2_layers(args[0]):
                layer.u *= 1.5                             # an orthonormal start has no gradient of R
        return names

    def made(self, model, *args, **options):
        make(self, model, *args, **options)
        if seen.pruner is None:                            # a second one may be made to load a checkpoint
            seen.pruner, seen.model = self, model

    def before(optimizer, args, options):
        if seen.pruner is not None and seen.steps == 0 and seen.expected is None:
            u = seen.pruner.layers[0].u
            seen.expected = torch.autograd.grad(0.1 * lora2.orthogonality_loss(seen.model), u)[0]

    def after(optimizer, args, options):
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        if seen.pruner is not None and any(p is seen.pruner.layers[0].lam for p in mine):
            seen.steps += 1

    def stepped(self):
        if self is seen.pruner:
            seen.prunings += 1
            assert seen.prunings == seen.steps
            for adapter, layer in zip(self.names, self.layers):
                for factor in FACTORS:
                    gradient = getattr(layer, factor).grad
                    assert gradient is not None, (adapter, factor)
                    if gradient.any():
                        seen.moved.add((adapter, factor))
            if seen.steps == 1:
                torch.testing.assert_close(self.layers[0].u.grad, seen.expected, rtol=1e-4, atol=1e-6)
        return step(self)

    with (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after),
          mock.patch.object(lora2, "add_lora2", off_the_floor), mock.patch.object(lora2.RankPruner, "__init__", made),
          mock.patch.object(lora2.RankPruner, "step", stepped)):
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__"), seen


def check(seen):
    """AssertionError unless the run was whole, every factor of every adapter got a gradient, and in the end kept,
    nonzero Λ and the budget are one number."""
    pruner = seen.pruner
    assert seen.steps == seen.prunings == pruner.total_steps, (seen.steps, seen.prunings)
    assert seen.moved == {(name, factor) for name in pruner.names for factor in FACTORS}
    nonzero = {name: int(layer.lam.count_nonzero()) for name, layer in zip(pruner.names, pruner.layers)}
    assert pruner.kept() == nonzero and sum(nonzero.values()) == len(nonzero) * pruner.target_rank


if __name__ == "__main__":
    torch.set_num_threads(1)
    is_first = os.environ.get("RANK", "0") == "0"          # of two that print at once lines may come out mixed
    with contextlib.redirect_stdout(sys.stdout if is_first else io.StringIO()):
        _, seen = run(sys.argv[1])
    check(seen)
    digest = hashlib.sha256()
    for _, layer in lora2.lora2_layers(seen.model):
        for factor in FACTORS:
            digest.update(getattr(layer, factor).detach().numpy().tobytes())
    print(f"\nas it should be {digest.hexdigest()}\n", end="")  # in one piece: two processes speak at once
