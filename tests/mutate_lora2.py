"""Does test_lora2.py notice when lora2.py is wrong? One small mistake at a time, in a temporary copy.

    python tests/mutate_lora2.py [--jobs N] [WORD ...]       only the mutants whose description has a WORD

Prints one line per mutant and, when all were run, writes the lines to tests/mutants.txt. Exit status 1 if one
survived: then a test is missing. A mutant is a piece of lora2.py, which must occur there exactly once, and what
stands in its place; when lora2.py changes, the list has to follow.
"""
import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT = 300                                              # seconds; a mutant that hangs is noticed, too

MUTANTS = [
    # the layer
    ("the base is not frozen", "base.requires_grad_(False)", "base"),
    ("scale is alpha", "alpha / r\n", "alpha\n"),
    ("scale is alpha / k", "self.k, self.r, self.scale = k, r, alpha / r", "self.k, self.r, self.scale = k, r, alpha / k"),
    ("scale counts what is kept", "return self.scale * (self.u", "return self.scale * self.r / self.lam.count_nonzero().clamp(1) * (self.u"),
    ("factors in the base's dtype", "torch.promote_types(base.weight.dtype, torch.float32)", "base.weight.dtype"),
    ("factors in fp32 on an fp64 base", "torch.promote_types(base.weight.dtype, torch.float32)", "torch.float32"),
    ("init of std 0.2", "std=0.02", "std=0.2"),
    ("Λ starts at random as well", "for factor in (self.v, self.u, self.U, self.V):", "for factor in (self.v, self.u, self.U, self.V, self.lam[None]):"),
    ("u starts at 0", "for factor in (self.v, self.u, self.U, self.V):", "for factor in (self.v, self.U, self.V):"),
    ("the inits are swapped", 'if init == "gaussian" else', 'if init != "gaussian" else'),
    ("training mode does not follow the base", "        self.train(base.training)\n", ""),
    ("the core forgets Λ", "(self.u * self.lam) @ self.U  ", "self.u @ self.U  "),
    ("the core forgets the scale", "return self.scale * (self.u * self.lam)", "return (self.u * self.lam)"),
    ("the core is rounded by autocast", 'v and V. Not rounded by autocast."""\n        with torch.autocast(self.u.device.type, enabled=False)', 'v and V. Not rounded by autocast."""\n        if True'),
    ("ΔW is rounded by autocast", 'export agree with."""\n        with torch.autocast(self.u.device.type, enabled=False)', 'export agree with."""\n        if True'),
    ("the export is rounded by autocast", 'lora_alpha = k.)"""\n        with torch.autocast(self.u.device.type, enabled=False)', 'lora_alpha = k.)"""\n        if True'),
    ("ΔW is transposed", "(self.v @ self.core() @ self.V).T", "(self.v @ self.core() @ self.V)"),
    ("the export leaves the core out", "(self.core() @ self.V).T", "(self.scale * self.u @ self.U @ self.V).T"),
    ("the export is a view of v", "A.clone(memory_format=torch.contiguous_format)", "A"),
    ("the export is not contiguous", "A.clone(memory_format=torch.contiguous_format), B.contiguous()", "A.clone(), B"),
    ("the export keeps its graph", "    @torch.no_grad()\n    def to_lora", "    def to_lora"),
    ("a hook sees its output change", "            y = y.clone()  ", "            pass  "),
    ("a forward hook sees its output change", "if self.base._forward_hooks or self.base._backward_hooks", "if self.base._backward_hooks"),
    ("a backward hook breaks the pass", "or self.base._backward_hooks or", "or"),
    ("a backward pre-hook breaks the pass", " or self.base._backward_pre_hooks", ""),
    ("forward leaves the core out", " @ self.core().to(y.dtype)  ", "  "),
    ("forward applies the core twice", " @ self.core().to(y.dtype)  ", " @ self.core().to(y.dtype) @ self.core().to(y.dtype)  "),
    ("forward runs in the input's dtype", "h = rows.to(y.dtype) @ self.v.to(y.dtype)", "h = rows @ self.v.to(rows.dtype)"),
    ("forward builds ΔW", "        y.addmm_(h, self.V.to(y.dtype))", "        y = y + rows.to(y.dtype) @ self.delta_weight().T.to(y.dtype)"),
    ("forward subtracts", "y.addmm_(h, self.V.to(y.dtype))", "y.addmm_(h, self.V.to(y.dtype), alpha=-1)"),
    ("forward keeps two dimensions", "return y.view(*x.shape[:-1], self.out_features)", "return y"),
    ("weight is the base's", "return (self.base.weight + self.delta_weight())", "return (self.base.weight + 0 * self.delta_weight())"),
    ("weight changes the dtype", ".to(self.base.weight.dtype)\n", "\n"),
    ("weight rounds ΔW first", "(self.base.weight + self.delta_weight()).to(self.base.weight.dtype)", "self.base.weight + self.delta_weight().to(self.base.weight.dtype)"),
    ("there is no bias to read", "property(lambda self: self.base.bias)", "None"),
    # what is refused
    ("subclasses of nn.Linear are adapted", "require(type(base) is nn.Linear", "require(isinstance(base, nn.Linear)"),
    ("tensor subclasses are adapted", "type(W) is nn.Parameter and", "isinstance(W, nn.Parameter) and"),
    ("integer weights are adapted", "and W.is_floating_point() and", "and"),
    ("the meta device is adapted", " and not W.is_meta", ""),
    ("k = 0 is allowed", "1 <= k <= most", "0 <= k <= most"),
    ("r = 0 is allowed", "1 <= r <= most", "0 <= r <= most"),
    ("k may exceed the matrix", "1 <= k <= most", "1 <= k"),
    ("r may exceed the matrix", "1 <= r <= most", "1 <= r"),
    ("k has to be less than the matrix", "1 <= k <= most", "1 <= k < most"),
    ("a Boolean is a number", "type(k) is type(r) is int", "isinstance(k, int) and isinstance(r, int)"),
    ("alpha may be 0", "require(0 < alpha <", "require(0 <= alpha <"),
    ("alpha may be infinite", '0 < alpha < float("inf")', '0 < alpha <= float("inf")'),
    ("any init will do", ' and init in ("gaussian", "orthonormal")', ""),
    # adding
    ("adapters may be added twice", "require(not lora2_layers(model)", "require(True"),
    ("one name is a list of letters", "({part} if isinstance(part, str) else set(part)", "(set(part)"),
    ("shared modules are adapted", "model.named_modules(remove_duplicate=False)", "model.named_modules()"),
    ("tied weights are adapted", "model.named_parameters(remove_duplicate=False)", "model.named_parameters()"),
    ("a target is a piece of a name", 'f".{name}".endswith(f".{target}")', "name.endswith(target)"),
    ("a target is a whole name", 'f".{name}".endswith(f".{target}")', "name == target"),
    ("a target is found anywhere", 'f".{name}".endswith(f".{target}")', 'f".{target}" in f".{name}"'),
    ("the root matches the empty name", "remove_duplicate=False) if name}", "remove_duplicate=False)}"),
    ("what is trained in full is adapted as well", "for target in targets) and not parts(n) & trainable]", "for target in targets)]"),
    ("targets without a match are passed over", "missing = sorted(target for target in targets if not any(hit(n, target) for n in names))", "missing = []"),
    ("trainable names without a match are passed over", "    missing += sorted(trainable.difference(*map(parts, kept)))\n", ""),
    ("no target at all is fine", "require(names and not missing", "require(not missing"),
    ("the numbers of layers are listed one by one", r're.sub(r"\b\d+\b", "*", n)', "n"),
    ("every digit becomes a star", r're.sub(r"\b\d+\b", "*", n)', r're.sub(r"\d+", "*", n)'),
    ("what is wrong is found out while adding", "        check_base(name, modules[name], k, r, alpha, init)\n        uses", "        uses"),
    ("two uses are fine", "require(uses == 1", "require(uses <= 2"),
    ("nothing is frozen", "parameter.requires_grad_(name in kept)", "pass"),
    ("the named parts are not made trainable", "parameter.requires_grad_(name in kept)", "parameter.requires_grad_(name in kept and parameter.requires_grad)"),
    ("subclasses are ignored", "layer(modules[name], k, r, alpha, init) for", "LoRA2Linear(modules[name], k, r, alpha, init) for"),
    ("the init is not passed on", "layer(modules[name], k, r, alpha, init) for", "layer(modules[name], k, r, alpha) for"),
    ("alpha is not passed on", "layer(modules[name], k, r, alpha, init) for", "layer(modules[name], k, r, 32, init) for"),
    # the regulariser
    ("R without vᵀv", '"uv": (Gv, bmm(u, u.mT))', '"uv": (bmm(u, u.mT),)'),
    ("R without uuᵀ", '"uv": (Gv, bmm(u, u.mT))', '"uv": (Gv,)'),
    ("R without UᵀU", '"UV": (GV, bmm(U.mT, U))', '"UV": (GV,)'),
    ("R without VVᵀ", '"UV": (GV, bmm(U.mT, U))', '"UV": (bmm(U.mT, U),)'),
    ("R without PᵀP", '"PQ": (bmm(u.mT, bmm(Gv, u)), ', '"PQ": ('),
    ("R without QQᵀ", "bmm(u.mT, bmm(Gv, u)), bmm(U, bmm(GV, U.mT)))", "bmm(u.mT, bmm(Gv, u)),)"),
    ("the large side of u", "(Gv, bmm(u, u.mT))", "(Gv, bmm(u.mT, u)[:, :1, :1].expand_as(Gv))"),
    ("P and Q see each other's Gram matrix", "bmm(u.mT, bmm(Gv, u)), bmm(U, bmm(GV, U.mT))", "bmm(u.mT, bmm(GV, u)), bmm(U, bmm(Gv, U.mT))"),
    ("v is detached", "Gv = torch.cat([bmm(v.mT, v)", "Gv = torch.cat([bmm(v.mT, v).detach()"),
    ("norms that are not squared", "(G - eye(G)).square().sum() for", "(G - eye(G)).square().sum().sqrt() for"),
    ("R without the identity", "(G - eye(G)).square()", "G.square()"),
    ("R is a sum over the adapters", "for G in pairs) / len(layers)", "for G in pairs)"),
    ("R is a mean over the shapes", "for G in pairs) / len(layers)", "for G in pairs) / len(groups)"),
    ("R of one shape only", "layers, bmm = sum(groups.values(), [])", "groups = dict([*groups.items()][:1]); layers, bmm = sum(groups.values(), [])"),
    ("layers of two shapes are mixed up", "layers, bmm = sum(groups.values(), [])", "layers, bmm = [layer for _, layer in lora2_layers(model)]"),
    ("R is rounded by autocast", "with torch.autocast(layers[0].u.device.type, enabled=False)", "if True"),
    ("all terms, whatever is asked", "for term in grams if term in terms]", "for term in grams]"),
    ("unknown terms are ignored", ' and set(terms) <= {"uv", "UV", "PQ"}', ""),
    ("a model without adapters is fine", "require(groups and terms", "require(terms"),
    ("the floor of P and Q once", "2 * max(r - k, 0) if term", "max(r - k, 0) if term"),
    ("the floor for k < r only", "else max(k - r, 0) for", "else 0 for"),
    ("a term named twice counts twice", "for term in set(terms))\n", "for term in terms)\n"),
    # the pruner
    ("adapters of several kinds", "require(len(kinds) == 1", "require(len(kinds) >= 1"),
    ("target_rank may be r + 1", "0 <= target_rank <= self.r", "0 <= target_rank <= self.r + 1"),
    ("target_rank has to be less than r", "0 <= target_rank <= self.r", "0 <= target_rank < self.r"),
    ("target_rank may not be 0", "0 <= target_rank <= self.r", "1 <= target_rank <= self.r"),
    ("steps may be fractions", "type(n) is int and n >= 0 for n in steps", "n >= 0 for n in steps"),
    ("steps may be negative", "type(n) is int and n >= 0 for n in steps", "type(n) is int for n in steps"),
    ("no interval", "for n in steps) and interval and", "for n in steps) and"),
    ("warm-up and final phase may fill all steps", "warmup + final < total_steps", "warmup + final <= total_steps"),
    ("any importance will do", 'require(importance in ("reduced", "full")', "require(True"),
    ("always the reduced importance", 'importance == "full", len(found)', "False, len(found)"),
    ("always the full importance", 'importance == "full", len(found)', "True, len(found)"),
    ("a linear budget", "(1 - min(max(progress, 0), 1)) ** 3", "(1 - min(max(progress, 0), 1))"),
    ("a square budget", "** 3)", "** 2)"),
    ("the budget rounds up", "return int(end + ", "return -int(-end - "),
    ("the budget forgets the warm-up", "progress = (t - self.warmup) /", "progress = t /"),
    ("the budget forgets the final phase", "(self.total_steps - self.final - self.warmup)", "(self.total_steps - self.warmup)"),
    ("the budget starts at the target", "start, end = len(self.layers) * self.r,", "start, end = len(self.layers) * self.target_rank,"),
    ("the budget is of one adapter", "len(self.layers) * self.target_rank\n", "self.target_rank\n"),
    ("steps count from 0", "t, last = self.t + 1,", "t, last = self.t,"),
    ("one step too many", "require(self.t < self.total_steps", "require(self.t <= self.total_steps"),
    ("scores move in the last phase", "        if t <= last:\n", "        if True:\n"),
    ("scores stop one step early", "        if t <= last:\n", "        if t < last:\n"),
    ("sensitivity has a sign", '* self._scored("grad")).abs_()', '* self._scored("grad"))'),
    ("sensitivity is the gradient alone", '(self._scored("data") * self._scored("grad"))', '(self._scored("grad") * 1)'),
    ("an overflow stays in the scores", ".nan_to_num_(0.0, 0.0, 0.0)", ""),
    ("an infinite gradient counts a lot", ".nan_to_num_(0.0, 0.0, 0.0)", ".nan_to_num_(0.0)"),
    ("Ī forgets 1 − β1", "self.sensitivity.lerp_(I, 1 - self.beta1)", "self.sensitivity.mul_(self.beta1).add_(I)"),
    ("Ī with the weights swapped", "self.sensitivity.lerp_(I, 1 - self.beta1)", "self.sensitivity.lerp_(I, self.beta1)"),
    ("Ī with the other β", "self.sensitivity.lerp_(I, 1 - self.beta1)", "self.sensitivity.lerp_(I, 1 - self.beta2)"),
    ("Ū with the other β", "(I - self.sensitivity).abs_(), 1 - self.beta2)", "(I - self.sensitivity).abs_(), 1 - self.beta1)"),
    ("Ū with a sign", "(I - self.sensitivity).abs_()", "(I - self.sensitivity)"),
    ("Ū of I itself", "(I - self.sensitivity).abs_()", "I.abs_()"),
    ("the step is not counted", "        self.t = t\n", ""),
    ("a failed step is counted", "        t, last = self.t + 1, self.total_steps - self.final ", "        self.t += 1; t, last = self.t, self.total_steps - self.final "),
    ("pruning during the warm-up", "choose = self.warmup < t <= last", "choose = t <= last"),
    ("pruning at the last step of the warm-up", "choose = self.warmup < t <= last", "choose = self.warmup <= t <= last"),
    ("choosing in the last phase", "choose = self.warmup < t <= last", "choose = self.warmup < t"),
    ("the last selection is left to chance", "t % self.interval == 0 or t == last", "t % self.interval == 0"),
    ("a selection in every step", "(t % self.interval == 0 or t == last)", "True"),
    ("the selection is one step late", "t % self.interval == 0 or", "t % self.interval == 1 or"),
    ("the count is not kept up to date", "            self.kept_total = self.budget(t)\n", "            kept_total = self.kept_total; self.kept_total = self.budget(t - 1)\n"),
    ("the least important are kept", "argsort(descending=True, stable=True)", "argsort(stable=True)"),
    ("one too many is kept", "[:self.kept_total]\n", "[:self.kept_total + 1]\n"),
    ("ties prune everything", "self.keep.view(-1).fill_(False).index_fill_(0, best, True)", "self.keep.copy_(self.scores() > self.scores().flatten().sort(descending=True)[0][min(self.kept_total, self.keep.numel() - 1)])"),
    ("a pruned value never returns", "self.keep.view(-1).fill_(False).index_fill_(0, best, True)", "self.keep.view(-1).index_fill_(0, self.scores().flatten().argsort(descending=True, stable=True)[self.kept_total:], False)"),
    ("nothing is set to 0 when chosen", "if choose or t > last:", "if t > last:"),
    ("nothing is held at 0 in the last phase", "if choose or t > last:", "if choose:"),
    ("held at 0 from the first selection on", "if choose or t > last:", "if t > self.warmup:"),
    ("the kept ones are set to 0", "masks = self.keep.to(", "masks = (~self.keep).to("),
    ("a host synchronisation", "        return self.kept_total\n", "        self.kept_total = int(self.keep.sum()); return self.kept_total\n"),
    ("a loop over the adapters", "torch._foreach_mul_([layer.lam for layer in self.layers], masks)", "[layer.lam.mul_(mask) for layer, mask in zip(self.layers, masks)]"),
    ("the weights for the gradients", 'if what == "grad" else columns', "if False else columns"),
    ("missing gradients are not noticed", "require(all(x is not None for column in columns for x in column)", "require(True"),
    ("v and V are always scored", '("lam", "u", "U", "v", "V") if self.full else ("lam", "u", "U")', '("lam", "u", "U", "v", "V")'),
    ("u stands for U", '("lam", "u", "U", "v", "V") if', '("lam", "u", "u", "v", "V") if'),
    ("V side by side with the wrong cut", "torch.cat(columns[4], dim=1).flatten()", "torch.cat([V.T for V in columns[4]]).flatten()"),
    ("the score leaves Λ out", "total = lam.view(n, r) + u", "total = 0 * lam.view(n, r) + u"),
    ("the score leaves u out", " + u.view(n, k, r).mean(1)", ""),
    ("the score leaves U out", " + U.view(n, r, k).mean(2)", ""),
    ("the mean of u the other way round", "u.view(n, k, r).mean(1)", "u.view(n, r, k).mean(2)"),
    ("the mean of U the other way round", "U.view(n, r, k).mean(2)", "U.view(n, k, r).mean(1)"),
    ("a sum over k, not a mean", "u.view(n, k, r).mean(1)", "u.view(n, k, r).sum(1)"),
    ("the score is Ī alone", "S = self.sensitivity * self.uncertainty", "S = self.sensitivity * 1"),
    ("the score is Ī + Ū", "S = self.sensitivity * self.uncertainty", "S = self.sensitivity + self.uncertainty"),
    ("Eq. 8 takes the root of squares", "d_out, dim=1), 1)", "d_out, dim=1), 2)"),
    ("Eq. 8 forgets 1 / k", ".sum(0) / k\n", ".sum(0)\n"),
    ("Eq. 8 gives v and V to other adapters", "sums.view(2, n, 1).sum(0)", "sums.view(n, 2, 1).sum(1)"),
    ("kept counts what is pruned", "self.keep.sum(1).tolist()", "(~self.keep).sum(1).tolist()"),
    ("the state forgets the step", 'self.t, self.kept_total = state["t"], state["kept_total"]', 'self.kept_total = state["kept_total"]'),
    ("the state forgets the count", 'self.t, self.kept_total = state["t"], state["kept_total"]', 'self.t = state["t"]'),
    ("the selection is not in the state", 'self.register_buffer("keep", torch.ones(len(found), self.r, device=device).bool())', "self.keep = torch.ones(len(found), self.r, device=device).bool()"),
    ("the scores are not in the state", 'self.register_buffer("uncertainty", torch.zeros_like(self.sensitivity))', "self.uncertainty = torch.zeros_like(self.sensitivity)"),
    # saving, loading, merging
    ("the head is not saved", "if t.requires_grad}\n    state", 'if t.requires_grad and n.endswith(".lam")}\n    state'),
    ("buffers are not saved", "(t.requires_grad or not isinstance(t, nn.Parameter))}", "t.requires_grad}"),
    ("frozen weights are saved", "and (t.requires_grad or not isinstance(t, nn.Parameter))}", "or n.endswith('.base.weight')}"),
    ("what is saved changes on", "n: t.detach().clone() for n, t in tensors.items() if", "n: t.detach() for n, t in tensors.items() if"),
    ("the scale is not saved", '        state[f"{name}.scale"] = torch.tensor(layer.scale)\n', ""),
    ("the base is not sampled", "weight[::-(-len(weight) // 16)].float().clone()", "weight[:0].float().clone()"),
    ("missing keys are allowed", "require(not missing and not stray", "require(not stray"),
    ("unexpected keys are allowed", "require(not missing and not stray", "require(not missing"),
    ("shapes are not compared", "require(state[name].shape == mine.shape", "require(True"),
    ("scale and base are not compared", "require(torch.allclose(state[name].to(own[name]), own[name], tolerance, 1e-7)", "require(True"),
    ("alpha is compared loosely", "tolerance = 1e-6 if", "tolerance = 0.02 if"),
    ("the base is compared too tightly", "else 0.02 ", "else 1e-6 "),
    ("tiny weights are compared too tightly", "tolerance, 1e-7)", "tolerance, 0)"),
    ("nothing is loaded", "    model.load_state_dict(state, strict=False)", "    model.load_state_dict({}, strict=False)"),
    ("loading comes before the checks", "    own = lora2_state_dict(model)\n", "    own = lora2_state_dict(model)\n    model.load_state_dict({n: t for n, t in state.items() if n in own and own[n].shape == t.shape}, strict=False)\n"),
    ("merging adds twice the update", "layer.base.weight.copy_(layer.weight)", "layer.base.weight.copy_(layer.weight + layer.delta_weight())"),
    ("merging forgets the update", "layer.base.weight.copy_(layer.weight)", "layer.base.weight.copy_(layer.base.weight)"),
    ("merging leaves the adapters", "setattr(model.get_submodule(parent), child, layer.base)", "pass"),
    ("merging stops at the first", "setattr(model.get_submodule(parent), child, layer.base)\n    return", "setattr(model.get_submodule(parent), child, layer.base)\n        return model\n    return"),
    ("a bare layer cannot be merged", "            return layer.base\n", "            return layer\n"),
]


def run(mutant, folder):
    """(caught or survived, the test that caught it)."""
    _, old, new = mutant
    source = (ROOT / "lora2.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as copy:
        (Path(copy) / "lora2.py").write_text(source.replace(old, new), encoding="utf-8")
        shutil.copy(ROOT / "test_lora2.py", copy)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow",
                   "--rootdir", copy, "-c", "/dev/null", "-W", "ignore", "--tb=line", "test_lora2.py"]
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return "caught", "by the time limit"
    if done.returncode == 0:
        return "SURVIVED", ""
    failed = re.search(r"^(?:FAILED|ERROR) test_lora2.py(?:::(\w+))?", done.stdout, re.M)
    return "caught", f"by {failed[1] or 'the import'}" if failed else f"by exit status {done.returncode}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="how many mutants at a time (default: 2)")
    parser.add_argument("words", nargs="*", help="only the mutants whose description has one of these")
    given = parser.parse_args()
    source = (ROOT / "lora2.py").read_text(encoding="utf-8")
    stale = [name for name, old, new in MUTANTS if source.count(old) != 1 or old == new]
    if stale:
        sys.exit("not exactly once in lora2.py, mend the list: " + "; ".join(stale))
    chosen = [mutant for mutant in MUTANTS if not given.words or any(word in mutant[0] for word in given.words)]
    lines, survived = [], 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        if run(("none", "", ""), folder)[0] == "caught":
            sys.exit("the tests fail on lora2.py as it is: mend that first")
        for mutant, (outcome, by) in zip(chosen, pool.map(lambda mutant: run(mutant, folder), chosen)):
            lines.append(f"{outcome:8}  {mutant[0]:50}  {by}".rstrip())
            survived += outcome == "SURVIVED"
            print(lines[-1], flush=True)
    lines.append(f"{len(chosen)} mutants, {len(chosen) - survived} caught, {survived} survived")
    print(lines[-1])
    if len(chosen) == len(MUTANTS):
        (ROOT / "tests" / "mutants.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
