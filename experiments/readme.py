"""The parts of README.md and docs/ that follow from other files: line numbers, tables of results.

    python experiments/readme.py                  # rewrite them
    python experiments/readme.py --check          # only say whether that would change anything

    `code` [lora2.py:1](lora2.py#L1)         the number becomes that of the one line with this code
    <!-- all of FILE.md --> ... <!-- -->     between them comes what FILE.md has between its title
                                             and its second heading
    <!-- first of FILE.md --> ... <!-- -->   or the first table of that

FILE.md is below experiments/results: reproduce.py or bench.py made it of the JSON file beside it.
"""
import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from formats import disk

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/paper-and-code.md", "docs/results.md", "docs/performance.md")
LINK = re.compile(r"`([^`\n]+)`(\s+)\[([\w./]+):\d+\]\(((?:\.\./)*)\3#L\d+\)")
BLOCK = re.compile(r"<!-- (all|first) of (\S+) -->\n.*?<!-- -->", re.DOTALL)


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


def block(match, folder):
    """A block of a page in `folder` with the tables that are in its file now."""
    which, name = match.groups()
    path = ROOT / "experiments" / "results" / name
    first_part = path.read_text(encoding="utf-8").partition("\n## ")[0]
    shown = first_part.partition("\n")[2].strip()         # without the title
    if which == "first":
        shown = shown.partition("\n\n")[0]
    place = Path(os.path.relpath(path.parent, folder)).as_posix()
    return f"<!-- {which} of {name} -->\n{shown.replace('](', f']({place}/')}\n<!-- -->"


def update(text, folder):
    """A page in `folder` with everything that follows from other files as it should be."""
    return LINK.sub(link, BLOCK.sub(lambda match: block(match, folder), text))


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if stale")
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
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
