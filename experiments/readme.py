"""The parts of README.md and docs/ that follow from other files: line numbers, results, performance.

    python experiments/readme.py                               # rewrite them
    python experiments/readme.py --check                       # only say whether that would change anything

    `code` [lora2.py:1](lora2.py#L1)        the number becomes that of the one line that holds `code`
    <!-- results --> ... <!-- /results -->  what is between becomes what the function of that name returns

Results are the tables of the Markdown files below experiments/results, as they stand there; what has no file is
"not run".
"""
import argparse
import json
import os
import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import grid as grids
from experiments import summary
from experiments import tables
from formats import disk

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES = ("README.md", "docs/paper-and-code.md", "docs/results.md", "docs/performance.md")
LINK = re.compile(r"`([^`\n]+)`(\s+)\[([\w./]+):\d+\]\(((?:\.\./)*)\3#L\d+\)")
BLOCK = re.compile(r"(<!-- (\w+) -->\n)(.*?)(<!-- /\2 -->)", re.DOTALL)


def link(match):
    """A reference `code` [file:line](file#Lline) with the line where the code is now.

    ValueError unless the code is on exactly one line of the file.
    """
    code, space, name, up = match.groups()
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines, 1) if code in line]
    if len(found) != 1:
        raise ValueError(f"`{code}` is on {len(found)} lines of {name}: name code that is on one")
    return f"`{code}`{space}[{name}:{found[0]}]({up}{name}#L{found[0]})"


def tables_of(path, folder):
    """What stands in a Markdown file between its title and its second heading, for a page in `folder`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: make it again") from None
    first = text.partition("\n## ")[0].partition("\n")[2].strip()
    return first.replace("](", f"]({relative(path.parent, folder)}/")      # its pictures


def relative(path, folder):
    """A path as a page in `folder` links to it."""
    return Path(os.path.relpath(path, folder)).as_posix()


def folder_of(preset):
    """Where reproduce.py puts what a preset gives with its own model."""
    return RESULTS / f"{preset}-{Path(grids.PRESETS[preset]['model']).name}"


def prose(text):
    """A paragraph, broken into lines."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


# --- the blocks ---------------------------------------------------------------------------------------------

def table1(folder):
    """Table 1 after the last step, on the small model."""
    path = folder_of("small") / "table1.json"
    return tables.score_table(summary.load(path), digits=1)


def results(folder):
    """All tables of reproduce.py, and the names of those that there are not."""
    parts = []
    for preset, facts in grids.PRESETS.items():
        contents, shown, missing = [], [], []
        for name, table in grids.TABLES.items():
            path = folder_of(preset) / f"{name}.md"
            if not path.with_suffix(".json").exists():
                missing.append(table.title)
                continue
            contents.append(summary.load(path.with_suffix(".json")))
            shown += [f"### {table.title}", tables_of(path, folder),
                      f"{tables.size_of(contents[-1])}; in full: [{name}.md]({relative(path, folder)})."]
        parts.append(f"## {Path(facts['model']).name}, `--preset {preset}`")
        if shown:
            parts += [prose(tables.made_on(contents) + "."), *shown]
        if missing:
            parts.append(prose(f"Not run: {'; '.join(missing)}."))
    return "\n\n".join(parts)


def performance(folder):
    """What bench.py measured for the shape that the goals are for; links to the other shapes and machines."""
    parts, missing = [], []
    for device, words in (("cpu", "a CPU"), ("cuda", "a GPU")):
        path = RESULTS / f"bench-{device}.md"
        if not path.exists():
            missing.append(words)
            continue
        first = tables_of(path, folder).partition("\n\n")[0]
        content = disk.read_json(path.with_suffix(".json"), "measure again")
        facts = ", ".join(str(content[name]) for name in ("device", "dtype", "date"))
        parts += [first, prose(f"{facts}, {content['threads']} threads. In full: "
                               f"[{path.name}]({relative(path, folder)}).")]
    others = []
    for path in sorted(RESULTS.glob("bench-*-*.md")):
        if not path.stem.endswith("quick"):
            others.append(f"[{path.stem}]({relative(path, folder)})")
    if others:
        parts.append(prose(f"Of other shapes and machines: {', '.join(others)}."))
    if missing:
        parts.append(f"Not run on {' nor on '.join(missing)}.")
    return "\n\n".join(parts)


BLOCKS = {"table1": table1, "results": results, "performance": performance}


def update(text, folder):
    """A page in `folder` with everything that follows from other files as it should be."""
    def block(match):
        return f"{match[1]}{BLOCKS[match[2]](folder).strip()}\n{match[4]}"

    return LINK.sub(link, BLOCK.sub(block, text))


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is stale")
    args, stale = parser.parse_args(argv), []
    for name in PAGES:
        path = ROOT / name
        try:
            before = path.read_text(encoding="utf-8")
            after = update(before, path.parent)
            if before != after:
                stale.append(name)
                if not args.check:
                    disk.write_file(path, after)
        except (ValueError, OSError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 2
    if args.check:
        print(f"stale: {', '.join(stale)}: python experiments/readme.py" if stale else "up to date")
        return int(bool(stale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
