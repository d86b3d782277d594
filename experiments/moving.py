"""The picture that moves: which singular values a run kept, over its steps, as an animated SVG.

It is made from a "story", a dict that plot.py writes beside it as pruning.json:

    settings, FACTS             what was run, and where (FACTS: of summary.py)
    best, last                  two of its evaluations
    frames                      step, loss, kept, ranks {matrix: [count of each layer]}; one a line

It is a flip book in CSS, without script, which pages that show an SVG as an image play. Where
nothing moves, or the reader wants nothing to move, its last frame stands.
"""
import math
from pathlib import Path
from string import Template
from xml.sax.saxutils import escape

from experiments import summary, tables
from formats import disk
from running import progress

FRAMES = 100                                               # at most: then some are left out
TIME, REST = 9, 4                                          # seconds of all; of the last, more
LEFT, RIGHT = 150, 790                                     # of map and curves; 860 is all
TOP, ROW, PANEL = 92, 28, 56                               # first row; heights of a row, a curve


# --- from a run to its story -----------------------------------------------------------------

def story_of(result, log, names):
    """The story of a finished run; None unless its log says what was kept where.

    names: of its matrices, in the log's order.
    """
    frames = []
    for line in log:
        if "ranks" in line:
            ranks = summary.by_place(dict(zip(names, line["ranks"], strict=True)))
            frames.append({"step": line["step"], "loss": round(line["loss"], 4),
                           "kept": line["kept"], "ranks": ranks})
    return summary.facts_of(result) | {"frames": frames} if frames else None


def save(story, stem):
    """Write stem.json, the story, and stem.svg; returns their paths."""
    disk.write_file(stem.with_suffix(".json"), summary.layout(story) + "\n")
    disk.write_file(stem.with_suffix(".svg"), picture(story))
    return [stem.with_suffix(".json"), stem.with_suffix(".svg")]


# --- from the story to the picture -----------------------------------------------------------

def picture(story):
    """The SVG of a story, text: what is in moving.svg, and the map, the curves and the frames."""
    settings, frames = story["settings"], story["frames"]
    every = math.ceil(len(frames) / FRAMES)
    frames = frames[(len(frames) - 1) % every::every]      # with the last one
    turn = round(TIME / len(frames), 3)                    # seconds of a frame
    whole = turn * len(frames) + REST
    loss = TOP + ROW * len(frames[0]["ranks"]) + 16        # where the curves begin
    kept = loss + PANEL + 20
    foot = kept + PANEL
    parts = empty_map(frames[0]["ranks"], settings["r"])
    parts += curve(story, frames, "loss", loss, "task loss, log scale")
    parts += curve(story, frames, "kept", kept, "kept: the budget")
    for i, frame in enumerate(frames):
        kind = "frame last" if frame is frames[-1] else "frame"
        delay = turn * (i - 0.5) - whole                   # all are under way: it is below 0
        parts += [f'  <g class="{kind}" style="animation-delay: {delay:.4f}s">',
                  squares("lit", frame["ranks"], settings["r"]),
                  f'  <path class="now" d="M{x_of(frame["step"], story)} {loss}V{foot}"/>',
                  label(loss + 34, f"{frame['loss']:.3f}"),
                  label(kept + 34, f"{frame['kept']} of {story['singular_values']}"),
                  label(foot + 26, f"step {frame['step']} of {story['steps']}"),
                  "  </g>"]
    task, *_ = tables.COLUMNS.get(settings["task"], [settings["task"]])
    title = f"Singular values that pruning keeps: {settings['model']} on {task}"
    return Template(Path(__file__).with_suffix(".svg").read_text(encoding="utf-8")).substitute(
        TITLE=escape(title, {'"': "&quot;"}), R=settings["r"], HEIGHT=foot + 44, FOOT=foot + 26,
        SCORES=progress.scores_text(story["last"]["scores"]), PARTS="\n".join(parts),
        ROUND=f"{whole:.3f}s", TURN=f"{100 * turn / whole:.5f}%",      # of the last one REST more
        STAY=f"{100 * (turn + REST) / whole:.5f}%")


def text(x, y, words, kind):
    """A line of text."""
    return f'  <text class="{kind}" x="{x:g}" y="{y}">{escape(words)}</text>'


def label(y, words, kind="end"):
    """A line of text that ends left of the map and of the curves."""
    return text(LEFT - 12, y, words, kind)


def empty_map(ranks, r):
    """The map with no square filled, and the names of its rows and columns."""
    layers = len(next(iter(ranks.values())))
    parts = [squares("room", {short: [r] * layers for short in ranks}, r)]
    for i, short in enumerate(ranks):
        parts.append(label(TOP + ROW * i + 5, tables.MATRICES[short]))
    parts.append(label(TOP - 16, "layer", "note end"))
    for layer in range(layers):
        x = round(LEFT + (RIGHT - LEFT) * layer / layers, 1)
        parts.append(text(x, TOP - 16, str(layer), "note"))
    return parts


def squares(kind, ranks, r):
    """So many squares for each count of {matrix: [count of each layer]}: a path, dashed."""
    layers = len(next(iter(ranks.values())))
    cell = (RIGHT - LEFT) / layers
    unit = round(0.92 * cell / r, 1)                       # a square and the gap behind it
    lines = []
    for i, counts in enumerate(ranks.values()):
        for layer, count in enumerate(counts):
            if count:
                x = round(LEFT + cell * layer, 1)
                lines.append(f"M{x:g} {TOP + ROW * i}h{count * unit:.1f}")
    dashes = f"{0.8 * unit:.2f} {0.2 * unit:.2f}"
    return f'  <path class="{kind}" stroke-dasharray="{dashes}" d="{"".join(lines)}"/>'


def curve(story, frames, key, top, name):
    """One number of all frames as a curve, with its name, its largest and its least value."""
    values = [frame[key] for frame in frames]
    heights = values
    if key == "loss":                                      # where 0.0000 was less than that
        heights = [math.log(max(value, 1e-4)) for value in values]
    least, most = min(heights), max(heights)
    points = []
    for frame, height in zip(frames, heights):
        share = (height - least) / (most - least or 1)
        points.append(f"{x_of(frame['step'], story)} {top + PANEL * (1 - share):.1f}")
    return [f'  <path class="axis" d="M{LEFT} {top}V{top + PANEL}H{RIGHT}"/>',
            f'  <path class="{key}" d="M{"L".join(points)}"/>',
            label(top + 14, name, "note end"),
            text(RIGHT + 8, top + 8, f"{max(values):.4g}", "note"),
            text(RIGHT + 8, top + PANEL, f"{min(values):.4g}", "note")]


def x_of(step, story):
    """Where a step stands on the axis of the curves."""
    return round(LEFT + (RIGHT - LEFT) * step / story["steps"], 1)
