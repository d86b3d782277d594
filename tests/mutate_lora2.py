"""Do the tests notice when lora2.py or methods/fast_lora2.py is wrong? One small mistake at a time, in a copy.

    python tests/mutate_lora2.py [--jobs N] [WORD ...]       only the mutants whose description has a WORD

The mutants stand in tests/mutants.txt. Prints one line for each and, when all were run, writes there which test
caught it. Exit status 1 if one survived: then a test is missing. Takes about 20 minutes of one core.
"""
import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "mutants.txt"
TIMEOUT = 300                                              # seconds; a mutant that hangs is noticed, too
TESTS = {"lora2.py": ["test_lora2.py", "tests/test_lora2_edges.py", "tests/test_fast.py"],
         "methods/fast_lora2.py": ["tests/test_fast.py"]}
LEAVE = shutil.ignore_patterns(".git", "__pycache__", "results", "docs", "runs", "glue")


class Mutant(NamedTuple):
    file: str
    description: str
    old: str                                               # a piece of the file that stands there exactly once
    new: str                                               # what takes its place
    caught_by: str


def parse(text):
    """The mutants of the table, in order. ValueError for a line that is none."""
    mutants, file = [], None
    for line in text.splitlines():
        if line.startswith("=="):
            file = line.strip("= ")
        elif line and not line.startswith("#"):
            fields = [field.strip() for field in line.split("  |  ")]
            if len(fields) != 4 or file not in TESTS:
                raise ValueError(f"not description, old, new, caught by: {line!r}")
            mutants.append(Mutant(file, *(field.replace("\\n", "\n") for field in fields)))
    return mutants


def with_results(text, results):
    """The table with its last column filled in: {description: what caught it}."""
    lines = []
    for line in text.splitlines():
        cells = line.split("  |  ")
        if len(cells) == 4 and not line.startswith("#"):
            line = "  |  ".join([*cells[:3], results[cells[0].strip()]])
        lines.append(line.rstrip() if len(cells) < 4 else line)
    return "\n".join(lines) + "\n"


def run(file, old, new, folder):
    """What catches it: a test's name, "the import", "the time limit"; "" if all tests pass."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        copy = Path(temporary) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEAVE)
        source = (ROOT / file).read_text(encoding="utf-8")
        (copy / file).write_text(source.replace(old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow",
                   "--noconftest", "--rootdir", copy, "-c", "/dev/null", "-W", "ignore", "--tb=line", *TESTS[file]]
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return "the time limit"
    if done.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else "the import"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="how many mutants at a time (default: 2)")
    parser.add_argument("words", nargs="*", help="only the mutants whose description has one of these")
    given = parser.parse_args()
    text = TABLE.read_text(encoding="utf-8")
    mutants = parse(text)
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in TESTS}
    stale = [m.description for m in mutants if sources[m.file].count(m.old) != 1 or m.old == m.new]
    if stale:
        sys.exit("not exactly once in their file, mend the table: " + "; ".join(stale))
    if len({m.description for m in mutants}) < len(mutants):
        sys.exit("two mutants have one description, mend the table")
    chosen = [m for m in mutants if any(word in m.description for word in given.words or [""])]
    results = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        for file in TESTS:
            if run(file, "", "", folder):
                sys.exit(f"the tests fail on {file} as it is: mend that first")
        found = pool.map(lambda m: run(m.file, m.old, m.new, folder), chosen)
        for mutant, caught_by in zip(chosen, found):
            results[mutant.description] = caught_by or "SURVIVED"
            print(f"{mutant.description:55}  {results[mutant.description]}", flush=True)
    survived = [name for name, caught_by in results.items() if caught_by == "SURVIVED"]
    print(f"{len(chosen)} mutants: {len(chosen) - len(survived)} caught, {len(survived)} survived")
    if len(chosen) == len(mutants):
        TABLE.write_text(with_results(text, results), encoding="utf-8")
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main())
