"""How a learning rate and a scale are chosen: uphill on a grid, until the best is inside it.

A point is what is tuned, {"lr": ..., "scale": ..., "outer": ...} or a part of that. Its neighbours
are one rung of a ladder away along one axis. The search begins at a point and all its neighbours;
then it runs the neighbours of the best so far, until there are none left to run. So the best is at
no edge: on each axis a smaller and a larger value were tried, and were not better.
"""
import math

from experiments import tables

LADDERS = {
    "lr": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3),
    "scale": (0.03125, 0.125, 0.5, 2, 8, 32, 128, 512, 2048, 8192),
    "outer": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)}  # --outer-lr over --lr


def neighbours(point):
    """The points one rung away, two for each axis; at the end of a ladder there is one."""
    found = []
    for axis, value in point.items():
        ladder = LADDERS[axis]
        i = ladder.index(value)
        for other in ladder[max(i - 1, 0):i + 2]:
            if other != value:
                found.append(point | {axis: other})
    return found


def best(tried):
    """The point with the best score of [(point, score)], the first of equals; None without any.

    A run that diverged has the score −inf and is never the best.
    """
    point, score = max(tried, key=lambda entry: entry[1], default=(None, -math.inf))
    return None if score == -math.inf else point


def missing(tried, start):
    """The points to run next, [] when the search is over. tried: [(point, score)]."""
    points = [point for point, _ in tried]
    for centre in (start, best(tried) or start):
        wanted = [point for point in [centre, *neighbours(centre)] if point not in points]
        if wanted:
            return wanted
    return []


def is_inside(tried):
    """Whether the best of [(point, score)] has all its neighbours beside it, two for each axis."""
    chosen = best(tried)
    if chosen is None:
        return False
    return len(neighbours(chosen)) == 2 * len(chosen) and missing(tried, chosen) == []


# --- the search of a table --------------------------------------------------------------------

def point_text(point):
    """A point of the grid as text: "0.003, 32" or, with a rate of v and V, "0.003, 32, × 0.3"."""
    text = ", ".join(f"{point[axis]:g}" for axis in ("lr", "scale") if axis in point)
    return text + (f", × {point['outer']:g}" if "outer" in point else "")


def tried(content, row, task):
    """[(point, score)] of a row's tuning, in order; −inf for a run that diverged."""
    return [(run["tuned"], tables.final_score(run))
            for run in tables.runs_of(content, row, task) if run["part"] == "tune"]
