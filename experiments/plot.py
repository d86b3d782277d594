"""Pictures of a run: Figure 3 as a heat map, kept singular values over time, task loss and R over time.

    python experiments/plot.py runs/cola-lora2-s6              # PNG and SVG files into that folder
    python experiments/plot.py runs/cola-lora2-s6 --out pictures

Needs matplotlib. What a run does not have is not drawn: kept values of a method that does not prune, say.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model
from experiments import tables

MATRICES = {"q": "query", "k": "key", "v": "value", "o": "attention output", "f1": "feed-forward 1",
            "f2": "feed-forward 2"}


def kept_grid(kept):
    """{module name: count} → (short names of the matrices in Figure 3's order, {short: {layer: count}})."""
    grid = {}
    for name, count in kept.items():
        ends = [(len(end), short) for targets in model.TARGETS.values() for short, end in targets.items()
                if name.endswith(f".{end}")]
        layer = [part for part in name.split(".") if part.isdigit()]
        if not ends or not layer or not isinstance(count, (int, float)):
            raise ValueError(f"{name}: {count!r} is no count of an adapted matrix of an encoder layer")
        grid.setdefault(max(ends)[1], {})[int(layer[0])] = count           # the longest: o, not f2
    return [short for short in MATRICES if short in grid], grid


def heat_map(axes, kept, r, title):
    """Figure 3: layers from left to right, matrices from top to bottom, the count in each cell."""
    rows, grid = kept_grid(kept)
    layers = sorted({layer for cells in grid.values() for layer in cells})
    counts = [[grid[short].get(layer, float("nan")) for layer in layers] for short in rows]
    image = axes.imshow(counts, vmin=0, vmax=r, cmap="YlGnBu", aspect="auto")
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count == count:                             # not for a matrix that was not adapted
                axes.text(j, i, f"{count:.3g}", ha="center", va="center", fontsize=8,
                          color="white" if count > 0.6 * r else "black")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(rows)), [MATRICES[short] for short in rows])
    axes.set_xlabel("layer")
    axes.set_title(f"{title}: kept of {r} singular values", fontsize=10)
    return image


def new_figure(panels=1, height=3.2):
    """(figure, its axes from top to bottom), without a display."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("the pictures need matplotlib: pip install -r requirements-dev.txt") from e
    matplotlib.rcParams["svg.hashsalt"] = "lora2"          # the same picture, the same bytes
    figure = Figure(figsize=(7, height * panels), layout="constrained")
    return figure, [figure.add_subplot(panels, 1, i + 1) for i in range(panels)]


def save(figure, stem):
    """Write stem.png and stem.svg; returns their paths."""
    figure.savefig(f"{stem}.png", dpi=150, metadata={"Software": None})
    figure.savefig(f"{stem}.svg", metadata={"Date": None})
    return [Path(f"{stem}.png"), Path(f"{stem}.svg")]


def figure3(found, labels, stem):
    """Figure 3 from finished runs (as in tables.py), mean over seeds: draws it; (dict for JSON, Markdown)."""
    table, text, panels = {}, "", []
    for (row, task), some in found.items():
        counts = list(tables.load_alike(some, "ranks.json", int).values())
        mean = {name: sum(one[name] for one in counts) / len(counts) for name in (counts or [{}])[0]}
        r = max((result["settings"]["r"] for _, result in some.values()), default=None)
        title = f"{tables.COLUMNS[task][0]}, {labels[row]}"
        table[task] = {"row": row, "kept": mean, "r": r, "runs": len(counts)}
        text += f"\n{title}: " + (f"kept of {r}, mean of {len(counts)} runs\n\n" if counts else "not run\n")
        if counts:
            rows, grid = kept_grid(mean)
            layers = sorted(grid[rows[0]])
            text += tables.markdown(["layer", *map(str, layers)], [
                [MATRICES[short], *(f"{grid[short][layer]:.3g}" for layer in layers)] for short in rows])
            panels.append((mean, r, title))
    if panels:
        figure, all_axes = new_figure(len(panels))
        for axes, panel in zip(all_axes, panels):
            figure.colorbar(heat_map(axes, *panel), ax=axes)
        text += f"\n![kept singular values]({save(figure, stem)[0].name})\n"
    return table, text


def read_run(folder):
    """(title, r, kept counts or None, log lines with a loss) of a run folder; ValueError for a gap."""
    folder = Path(folder)
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        title, r = f"{result['task']}, {result['method']}", result["settings"]["r"]
        ranks = folder / "ranks.json"
        kept = dict(json.loads(ranks.read_text(encoding="utf-8"))) if ranks.exists() else None
        if kept is not None and not (kept and type(r) is int and all(type(n) is int for n in kept.values())):
            raise ValueError("ranks.json or r holds no counts")
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        log = [record for record in map(json.loads, filter(str.strip, lines))
               if "loss" in record and record["step"]]
    except FileNotFoundError as e:
        raise ValueError(f"{e.filename} is missing: give the folder of a finished run of train.py") from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{folder} holds a damaged run ({type(e).__name__}: {e}): run it again") from e
    if not log:
        raise ValueError(f"{folder / 'log.jsonl'} has no line about a step: run it again")
    return title, r, kept, log


def draw(folder, out):
    """Draw what a run folder holds; returns the paths of the pictures."""
    title, r, kept, log = read_run(folder)
    out, paths = Path(out), []
    out.mkdir(parents=True, exist_ok=True)
    if kept is not None:
        figure, (axes,) = new_figure()
        figure.colorbar(heat_map(axes, kept, r, title), ax=axes)
        paths += save(figure, out / "ranks")
    panels = (("loss", "task loss"), ("R", "R above its floor"), ("kept", "kept singular values"))
    panels = [(key, name) for key, name in panels if any(key in line for line in log)]
    figure, all_axes = new_figure(len(panels), 2.2)
    for axes, (key, name) in zip(all_axes, panels):
        points = [(line["step"], line[key]) for line in log if line.get(key) is not None]
        axes.plot(*zip(*points), drawstyle="steps-post" if key == "kept" else "default")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    all_axes[0].set_title(title, fontsize=10)
    all_axes[-1].set_xlabel("optimizer step")
    return paths + save(figure, out / "training")


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--out", help="folder for the pictures; by default the run's")
    args = parser.parse_args(argv)
    try:
        for path in draw(args.run, args.out or args.run):
            print(path)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
