"""Saving a run: where it may write, and what RunFolder writes when.

    last.pt               all that --resume needs: tensors and plain values
    adapter.safetensors   the best adapter and head, and the settings that define the function
    predictions_*.tsv     its predictions for each dev split
    log.jsonl             one object for each logged step and each evaluation
    ranks.json            kept singular values of each adapted matrix
    result.json           best, last, counts, settings, versions; a run that has it is finished

Every file but the log is written beside and renamed: at any moment it is whole or absent. After a
kill the log may be ahead of last.pt, which knows how long it was; so may adapter.safetensors,
which knows the best. How these files are read: folder.py.
"""
import contextlib
import json
import os
import platform
import time
from pathlib import Path

import torch

from formats import disk, glue
from formats.disk import digest
from lora2 import load_lora2_state_dict, lora2_state_dict
from methods.by_name import surviving_parameters
from running import folder, machine, progress
from running.errors import Stopped, user_errors

# --overwrite removes them in this order: half removed is not finished, and known by its last.pt.
FILES = ("result.json", "adapter.safetensors", "log.jsonl", "ranks.json", "predictions_dev.tsv",
         "predictions_dev_matched.tsv", "predictions_dev_mismatched.tsv", "last.pt")


# --- before a run -------------------------------------------------------------------------

def check_destinations(o):
    """OSError or ValueError unless all that will be written has a free place of its own."""
    named = {"--out": o.out, "--merge": o.merge, "--export-peft": o.export_peft}
    if o.eval and not o.predict:
        del named["--out"]                                 # nothing is written there
    places = {name: Path(place) for name, place in named.items() if place}
    for name, place in places.items():
        nearest = next(path for path in (place, *place.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise OSError(f"{name} {place}: {nearest} is no folder to write to: give another")
        there = os.listdir(place) if place.exists() else []
        cut_off = [file for file in there if file.endswith(disk.LEFT)]         # by a kill
        if name != "--out" and there and not cut_off:
            raise ValueError(f"{name} {place}: this folder is not empty: give a new or an empty "
                             "one")
        if name == "--out" and len(there) > len(cut_off) and not (o.resume or o.eval):
            if not o.overwrite:
                raise ValueError(f"{place} is not empty: go on with its run by --resume {place}, "
                                 "replace it by --overwrite, or give another --out")
            files_to_replace(place)
    if len({place.resolve() for place in places.values()}) < len(places):
        raise ValueError(f"{', '.join(map(str, places.values()))} need a folder each")


def files_to_replace(place):
    """What --overwrite removes from a folder, in order; ValueError if that is no run of ours."""
    there = [place / name for name in FILES if (place / name).exists()]
    if there and not folder.is_run(place):
        raise ValueError(f"{there[0]} is not of a run of this program, --overwrite leaves it "
                         "alone: give another --out")
    return there


def check_predictions(o, task):
    """ValueError if --predict would write over a file that is no part of a run to be replaced."""
    path = glue.place_of_predictions(o.out, task, Path(o.predict).stem)
    if path.exists():
        with open(path, "rb") as file:                     # it may be anybody's
            is_ours = file.readline(100).startswith(b"index\tprediction")
        if not (o.overwrite and is_ours):
            raise ValueError(f"the predictions for {o.predict} would replace {path}: move that "
                             "away, or give another --out, beside --eval if the run has ended")
    if o.predict_scores and not task.labels:
        raise ValueError("--predict-scores: here a score is all that is predicted: leave it out")


# --- during a run -------------------------------------------------------------------------

def snapshot(state, net, optimizer, pruner, finite, here):
    """What last.pt holds: all on which the rest of a run depends, tensors and plain values."""
    finite.check()                                         # no bad step is saved
    return {"step": state.step, "tokens": state.tokens, "seconds": state.elapsed(),
            "evaluations": state.evaluations, "adapter": state.adapter,
            "weights": lora2_state_dict(net),
            "optimizer": optimizer.state_dict(),
            "pruner": dict(pruner.state_dict()) if pruner else {},
            "rng": machine.gathered(machine.random_state(here), here)}


class RunFolder:
    """The folder of one run, locked inside `with`; a run that is stopped there is saved.

    identity: what run it is, from folder.identity_of().
    snapshot: a function that returns all else on which the rest of the run depends, a dict.
    Of several processes, which all call these methods, the first one writes.
    """

    def __init__(self, identity, plan, here, snapshot):
        self.identity, self.settings = identity, identity["settings"]
        self.path = Path(self.settings["out"])
        self.log = self.path / "log.jsonl"
        self.plan, self.here, self.snapshot = plan, here, snapshot
        self.lock = contextlib.ExitStack()

    @user_errors()
    def __enter__(self):
        if self.here.is_main:                              # two runs would mix up their files
            self.lock.enter_context(disk.alone(self.path, "train.py"))
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if isinstance(error, Stopped):
                step = self.save()["step"]
                error.args = (f"stopped after step {step} of {self.plan.steps}: "
                              f"--resume {self.path} goes on",)
        finally:
            self.lock.close()

    @user_errors()
    def begin(self, o):
        """Make the folder of a new run, without an older one."""
        if self.here.is_main:
            check_destinations(o)                          # again: another run may just have ended
            for path in files_to_replace(self.path):
                path.unlink()
            for path in sorted(self.path.glob("*.tsv")):   # of --predict, or somebody's
                disk.warn(f"{path} stays: it is of --predict, or not of this run")
        self.save()

    def save(self):
        """Write last.pt: what run it is, and the snapshot, which is returned."""
        content = self.snapshot()
        if self.here.is_main:
            which = {name: self.identity[name] for name in ("settings", "base", "rows")}
            log_bytes = self.log.stat().st_size if self.log.exists() else 0
            folder.write_state(self.path, which | content | {"log_bytes": log_bytes})
        return content

    @user_errors()
    def restore(self, saved, state, net, optimizer, pruner):
        """Go on where save() was called last: put back, in place, what snapshot() gave.

        saved: from folder.load_state(). ValueError if it cannot be of this run: base model, data or
        number of processes are others.
        """
        if saved["written"] != (self.path / "last.pt").stat().st_mtime_ns:
            raise ValueError(f"another train.py has gone on with {self.path} meanwhile: --resume "
                             "again")
        folder.check_state(saved, self.snapshot(), self.identity, self.plan.steps, self.here,
                           optimizer)
        state.best, state.adapter = self.find_best(saved)
        if self.here.is_main and os.path.lexists(self.log):
            if self.log.is_symlink() or not self.log.is_file():
                raise ValueError(f"{self.log} is a link or no file: remove it")
            with open(self.log, "rb") as file:             # the steps of later lines come again
                lines = file.read(min(saved["log_bytes"], self.log.stat().st_size))
            disk.write_file(self.log, lines)
        state.step = saved["step"]
        state.tokens = saved["tokens"]
        state.seconds = saved["seconds"]
        state.evaluations = saved["evaluations"]
        load_lora2_state_dict(net, saved["weights"])
        moments = saved["optimizer"]["state"]              # the groups are this run's own
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        if pruner:
            pruner.load_state_dict(saved["pruner"])
        machine.set_random_state(self.here, saved["rng"][self.here.rank])
        saved.clear()                                      # its tensors are copied: free them

    def find_best(self, saved):
        """The best evaluation and the hash of its adapter, from the adapter, which may be ahead."""
        adapter = self.path / "adapter.safetensors"
        if not saved["evaluations"] and not adapter.exists():
            return None, ""
        stored = folder.load_adapter(adapter)[1]
        is_ahead = stored["best"]["step"] > saved["step"]  # a kill came before the next last.pt
        is_that_one = is_ahead or stored["digest"] == saved["adapter"]
        mine = folder.facts_of(self.identity, stored["best"]) | {"digest": stored["digest"]}
        mine["settings"]["model"] = stored["settings"].get("model")    # it may be elsewhere now
        if not is_that_one or stored != mine:
            raise ValueError(f"{adapter} is not of this run: give back the one that was there")
        return stored["best"], stored["digest"]

    def note_evaluation(self, state, net, pruner, task, scores, predictions):
        """Note an evaluation; write its predictions and adapter.safetensors if none was better.

        scores: {dev split: {metric: value}}, of which the first decides; predictions: {dev split:
        (N,)}.
        """
        score = next(iter(scores.values()))[task.metrics[0]]
        evaluation = {"step": state.step, "scores": scores, "score": score}
        if self.settings["target_rank"] is not None:
            evaluation["kept"] = sum(pruner.kept().values())
        state.evaluations.append(evaluation)
        if state.best is not None and score < state.best["score"]:
            return
        state.best = evaluation
        if self.here.is_main:                              # the adapter last: never ahead of these
            for name, values in predictions.items():
                glue.write_predictions(self.path / f"predictions_{name}.tsv", task, values)
            facts = folder.facts_of(self.identity, state.best)
            state.adapter = folder.write_adapter(self.path, lora2_state_dict(net), facts)

    def finish(self, state, net, pruner, task):
        """Write and print ranks.json and result.json."""
        settings, numbers = self.settings, progress.counts(net)
        kept = pruner.kept() if pruner else None
        budget = None                                      # it does not prune to a number
        if settings["target_rank"] is not None:
            budget = len(kept) * settings["target_rank"]
        peak = machine.peak_memory(self.here.device)
        result = {
            "task": settings["task"], "method": settings["method"], "settings": settings,
            "metric": task.metrics[0], "steps": state.step,
            "best": state.best, "last": state.evaluations[-1], "evaluations": state.evaluations,
            "kept": sum(kept.values()) if kept else None, "budget": budget,
            "singular_values": len(kept) * settings["r"] if kept else None,
            "seconds": round(state.elapsed(), 1),
            "peak_memory_gb": round(peak, 2) if peak else None,
            "device": machine.name_of(self.here.device), "dtype": self.here.dtype,
            "processes": self.here.world, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"), "code": folder.CODE,
            "base": self.identity["base"], "rows": self.identity["rows"],
            "adapter": state.adapter, **numbers,
            "surviving_parameters": surviving_parameters(net, kept, numbers["adapter_parameters"])}
        assert budget is None or result["kept"] == budget, kept
        if self.here.is_main:
            if kept:
                disk.write_json(self.path / "ranks.json", kept)
                print(progress.kept_map(kept, settings["r"]))
            hash_ = digest(json.dumps(result, sort_keys=True))
            disk.write_json(self.path / "result.json", result | {"hash": hash_})
            print(progress.summary(result, self.path), flush=True)
