"""What each task and each method is trained with unless the command line says otherwise."""

# The authors' released settings: batch 32, AdamW, clip 1.0, linear decay after a warm-up, dropout
# 0.1 in the backbone. Warm-up and pruning (Algorithm 1's t_i, t_f, ΔT) are steps of all T steps of
# a full-length run; runs of another length use the same fractions of theirs.
SCHEDULE = ("warmup", "prune_warmup", "prune_final", "prune_interval")
COLUMNS = ("lr", "epochs", "all_steps", "warmup", "max_len", "head_dropout", "weight_decay",
           "alpha", *SCHEDULE[1:], "r", "target_rank", "reg", "seed")
ROWS = {
    #        lr    epochs  T     warmup  len drop decay alpha ti    tf     dT r target reg seed
    "cola": (8e-4,   25, 6700,   100,    64, .10, 0,    32,  800,  3500,  10, 4, 3,    .1, 6),
    "sst2": (8e-4,   24, 50520,  1000,  128, 0,   .01,  16, 6000, 22000, 100, 8, 2,    .1, 6),
    "mrpc": (1e-3,   30, 3450,   345,   320, 0,   .01,  32,  600,  1800,   1, 8, 1,    .1, 6),
    "qqp":  (8e-4,   20, 227420, 2000,  320, .15, .01,  16, 8000, 25000, 100, 8, 3,    .1, 6),
    "stsb": (2.2e-3, 25, 4500,   100,   128, .20, .1,   32,  800,  2000,  10, 4, 1,    .3, 6),
    "mnli": (5e-4,    7, 85904,  1000,  256, .15, 0,    16, 8000, 50000, 100, 8, 3,    .1, 6),
    "qnli": (1.2e-3,  5, 16370,  500,   512, .10, .01,  32, 2000,  8000, 100, 8, 2,    .1, 6),
    "rte":  (1.2e-3, 50, 3900,   200,   320, .20, .01,  32,  600,  1800,   1, 4, 3,    .3, 4),
    "demo": (5e-3,    7, 441,    20,     16, 0,   0,    32,   50,   150,   5, 8, 2,    .1, 0),
    "own":  (8e-4,   10, 1000,   60,    128, .10, .01,  32,  120,   450,  10, 8, 2,    .1, 0),
}
PRESETS = {task: dict(zip(COLUMNS, row)) for task, row in ROWS.items()}
# What a method, or a method on one task, wants otherwise. alpha 16 at r = 8 is scale 2, as LoRA's
# and SoRA's authors have it (LoRA at alpha 32 collapsed on CoLA); SoRA's authors clip at 0.1.
EXCEPTIONS = {
    "full": {"lr": 2e-5}, "lora": {"r": 8, "alpha": 16}, "adalora": {"r": 2, "target_rank": 1},
    "sora": {"r": 8, "alpha": 16, "weight_decay": .1, "warmup": .06, "clip": .1},
    "adalora on cola": {"r": 3}, "adalora on mnli": {"r": 3}, "adalora on qqp": {"epochs": 5},
    "adalora on qnli": {"lr": 5e-4}, "full on demo": {"lr": 1e-3}}


def preset_of(task, method):
    """{name: value} that a task and a method want; schedules are fractions of all steps."""
    preset = dict(PRESETS[task])
    T = preset.pop("all_steps")
    for name in SCHEDULE:
        preset[name] /= T
    return preset | EXCEPTIONS.get(method, {}) | EXCEPTIONS.get(f"{method} on {task}", {})
