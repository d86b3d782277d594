"""When things happen in a run, and what has happened: Plan and State."""
import math
import time
from dataclasses import dataclass, field
from typing import NamedTuple, Optional


class Plan(NamedTuple):
    """When things happen in a run: all numbers are optimizer steps, counted from 1."""
    steps: int                       # T
    per_epoch: int
    lr_warmup: int
    prune_warmup: int                # t_i
    prune_final: int                 # t_f
    prune_interval: int              # ΔT
    eval_steps: Optional[int]        # between evaluations besides those after each epoch
    save_steps: Optional[int]
    stop_at: Optional[float]         # a score

    def lr_factor(self, step):
        """Linear up over the warm-up, then linear down; not 0 at any of the steps 1 .. T."""
        if step <= self.lr_warmup:
            return step / self.lr_warmup
        return (self.steps - step + 1) / (self.steps - self.lr_warmup)

    def pruning(self):
        """The arguments of RankPruner that say when."""
        return {"total_steps": self.steps, "warmup": self.prune_warmup, "final": self.prune_final,
                "interval": self.prune_interval}

    def evaluates(self, state):
        """Whether an evaluation belongs after step state.step and has not been made."""
        at_end = state.step == self.steps or state.step % self.per_epoch == 0
        in_between = self.eval_steps is not None and state.step % self.eval_steps == 0
        return state.step > state.evaluated and (at_end or in_between)

    def saves(self, state):
        """Whether last.pt is written after this step: after evaluations, and for --save-steps."""
        in_between = self.save_steps is not None and state.step % self.save_steps == 0
        return in_between or 0 < state.step == state.evaluated

    def is_over(self, state):
        """Whether this was the last step: of all, or because --stop-at is reached."""
        if self.stop_at is not None and state.evaluations:
            if state.evaluations[-1]["score"] >= self.stop_at:
                return True
        return state.step == self.steps


def plan(o, rows):
    """The Plan of a run on that many training rows. ValueError if its phases do not fit."""
    per_epoch = math.ceil(rows / o.batch_size)
    T = o.max_steps or o.epochs * per_epoch
    warmup = steps_of(o.warmup, T)
    start = steps_of(o.prune_warmup, T)
    final = steps_of(o.prune_final, T)
    interval = max(1, steps_of(o.prune_interval, T))
    if warmup >= T:
        raise ValueError(f"--warmup {warmup} must be less than the {T} steps of this run")
    if start + final >= T:
        raise ValueError(f"--prune-warmup {start} and --prune-final {final} together must be less "
                         f"than the {T} steps of this run")
    return Plan(T, per_epoch, warmup, start, final, interval, o.eval_steps, o.save_steps,
                o.stop_at)


def steps_of(value, T):
    """A number of steps, from a number, a fraction of T or None (nothing to the method: 0).

    Fractions are rounded down, so that a sum of them that is below 1 stays below T.
    """
    if value is None:
        return 0
    return int(round(value * T, 6)) if value < 1 else int(value)


@dataclass
class State:
    """All that changes in a run beside tensors; last.pt holds it."""
    step: int = 0                    # optimizer steps done
    tokens: int = 0                  # of the training rows seen, without padding
    seconds: float = 0.0             # that the run took before this process
    evaluations: list = field(default_factory=list)  # [{"step", "scores", "score", perhaps "kept"}]
    best: Optional[dict] = None      # one of them; of equals the last, which is pruned more
    adapter: str = ""                # the hash of its adapter.safetensors
    started: float = field(default_factory=time.monotonic)

    def count(self, batch):
        """A step more, on that Batch."""
        self.step += 1
        self.tokens += int(batch.attention_mask.sum())

    @property
    def evaluated(self):
        """The step of the last evaluation; 0 before the first one."""
        return self.evaluations[-1]["step"] if self.evaluations else 0

    def elapsed(self):
        """Seconds that the run has taken so far."""
        return self.seconds + time.monotonic() - self.started
