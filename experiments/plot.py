"""Pictures of a run: Figure 3 as a heat map; kept singular values, task loss and R over time.

    python experiments/plot.py runs/cola-lora2-s6              # PNG and SVG files into that folder
    python experiments/plot.py runs/cola-lora2-s6 --out pictures

What moves is made by moving.py, the rest needs matplotlib. What a run does not have is not drawn,
kept values without pruning for example.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import moving, summary, tables
from formats import disk

PANELS = {"loss": "task loss", "R": "R above its floor", "kept": "kept singular values"}
# The kinds of files, and what keeps date and program out of them.
SAVED = {".png": {"dpi": 150, "metadata": {"Software": None}}, ".svg": {"metadata": {"Date": None}}}


def heat_map(axes, ranks, r, title):
    """Figure 3 of {matrix: [count of each layer]}: layers to the right, matrices downwards."""
    counts = list(ranks.values())
    image = axes.imshow(counts, vmin=0, vmax=r, cmap="YlGnBu", aspect="auto")
    for i, layers in enumerate(counts):
        for j, count in enumerate(layers):
            axes.text(j, i, f"{count:.3g}", ha="center", va="center", fontsize=8,
                      color="white" if count > 0.6 * r else "black")
    axes.set_xticks(range(len(counts[0])))
    axes.set_yticks(range(len(ranks)), [tables.MATRICES[short] for short in ranks])
    axes.set_xlabel("layer")
    axes.set_title(f"{title}: kept of {r} singular values", fontsize=10)
    axes.figure.colorbar(image, ax=axes)
    return image


def new_figure(panels=1, height=3.2):
    """(figure, its axes from top to bottom), without a display."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from e
    matplotlib.rcParams["svg.hashsalt"] = "lora2"          # the same picture, the same bytes
    figure = Figure(figsize=(7, height * panels), layout="constrained")
    return figure, [figure.add_subplot(panels, 1, i + 1) for i in range(panels)]


def save(figure, stem, kinds=SAVED):
    """Write stem.png and stem.svg; returns their paths."""
    paths = [Path(f"{stem}{kind}") for kind in kinds]
    for path in paths:
        figure.savefig(path, **SAVED[path.suffix])
    return paths


def figure3(content, stem):
    """Draw Figure 3 from what its page is made of: a panel for each task, the mean over seeds."""
    panels = [(title, runs) for title, runs in tables.panels(content) if runs]
    if panels:
        figure, all_axes = new_figure(len(panels))
        for axes, (title, runs) in zip(all_axes, panels):
            heat_map(axes, tables.mean_ranks(runs), runs[0]["settings"]["r"], title)
        save(figure, stem, [".svg"])


def draw(folder, out):
    """Draw what a run folder holds; returns the paths of the pictures.

    ValueError or OSError of one sentence for what is missing or damaged.
    """
    counts = {}
    with disk.reading(folder, "give the folder of a finished run of train.py, or run it again"):
        result = json.loads((folder / "result.json").read_bytes())
        log = [line for line in summary.read_log(folder) if line["step"]]
        if (folder / "ranks.json").exists():
            counts = json.loads((folder / "ranks.json").read_bytes())
        title, r = f"{result['task']}, {result['method']}", result["settings"]["r"]
        story = moving.story_of(result, log, sorted(counts))
        ranks = summary.by_place(counts)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    if story is not None:
        paths += moving.save(story, out / "pruning")
    if ranks:
        figure, (axes,) = new_figure()
        heat_map(axes, ranks, r, title)
        paths += save(figure, out / "ranks")
    shown = [key for key in PANELS if any(key in line for line in log)]
    figure, all_axes = new_figure(len(shown), 2.2)
    for axes, key in zip(all_axes, shown):
        points = [(line["step"], line[key]) for line in log if line.get(key) is not None]
        axes.plot(*zip(*points), drawstyle="steps-post" if key == "kept" else "default")
        axes.set_ylabel(PANELS[key])
        axes.grid(alpha=0.3)
    all_axes[0].set_title(title, fontsize=10)
    all_axes[-1].set_xlabel("optimizer step")
    return paths + save(figure, out / "training")


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="folder for the pictures; by default the run's")
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
