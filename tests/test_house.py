"""The house: what stands where, and which way the imports point. Each docstring names its oracle."""
import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.ci                                # a user's own files in a clone are nobody's business
ROOT = Path(__file__).resolve().parents[1]
TOP = {"README.md", "lora2.py", "test_lora2.py", "model.py", "data.py", "train.py", "requirements.txt",
       "requirements-dev.txt", "LICENSE"}
ROOMS = ("methods", "formats", "running", "examples", "experiments", "docs", "tests")
OUTPUT = {"runs", "glue", "merged", "exported", "own"}     # what the README's commands make; git ignores it
# A file may import from what stands before it; lora2.py and formats/ import nobody but their own room.
ORDER = ("formats", "lora2", "model", "data", "methods", "running", "train", "examples", "experiments", "tests")


def sources():
    """{dotted name of a module: its path} of all modules of the project."""
    paths = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports(name, path, known):
    """The modules of the project that one of them imports, also inside functions, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {other for other in found if other in known and other != name}


MODULES = sources()
ARROWS = {name: imports(name, path, MODULES) for name, path in MODULES.items()}


def room_of(name):
    """The room of a module, or the module itself at the top; test_lora2 belongs to the tests."""
    first = name.split(".")[0]
    return "tests" if first.startswith("test_") else first


def test_the_top_level_is_the_card():
    """Oracle: the design card's names and the rooms; hidden files and what git ignores do not count."""
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__pycache__"))}
    assert names - OUTPUT == TOP | set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_says_what_it_is(room):
    """Oracle: the file: one docstring and no code, so that no installed package of the same name wins."""
    tree = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1 and len(ast.get_docstring(tree)) > 20


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    """Oracle: the order above: formats ← model, data ← methods ← running ← train ← experiments ← tests."""
    mine = room_of(name)
    for other in ARROWS[name]:
        theirs = room_of(other)
        assert theirs == mine or ORDER.index(theirs) < ORDER.index(mine), f"{name} imports {other}"
        assert theirs == mine or mine not in ("lora2", "formats"), f"{name} imports {other}"


def test_there_is_no_circle():
    """Oracle: a depth-first walk: no module is reached from itself, also within a room."""
    done, path = set(), []

    def walk(name):
        assert name not in path, " → ".join([*path[path.index(name):], name])
        if name not in done:
            path.append(name)
            for other in ARROWS[name]:
                walk(other)
            done.add(path.pop())

    for name in MODULES:
        walk(name)


def test_data_and_model_do_not_know_each_other():
    """Oracle: by hand: neither of the two files that a student reads needs the other."""
    assert "data" not in ARROWS["model"] and "model" not in ARROWS["data"]


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_defined_twice(name):
    """Oracle: the file: a second definition of a name would hide the first."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        names = [node.name for node in scope.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert sorted(names) == sorted(set(names))


def lines_of(*names):
    """How many lines these files have together."""
    return sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in names)


# File or room → how many lines it may have, which are today's; the aim stands behind where it is less.
SIZES = {"lora2.py": 469,           # 350: readers preferred 472 lines to 423
         "model.py": 381, "data.py": 305, "train.py": 295,
         "the four that are read": 1450,
         "product": 6912,           # 4,300: all but tests/ and experiments/
         "experiments": 3737,       # 2,400
         "tests": 12155}           # 9,500


def test_what_is_read_stays_small():
    """Oracle: the sizes above, in lines; and of results there are summaries, not logs."""
    of_room = {room: [MODULES[name] for name in MODULES if room_of(name) == room] for room in ROOMS}
    files = ["lora2.py", "model.py", "data.py", "train.py"]
    found = {name: lines_of(name) for name in files}
    found["the four that are read"] = lines_of(*files)
    product = ("methods", "formats", "running", "examples")
    found["product"] = lines_of(*files, *(path for room in product for path in of_room[room]))
    for room in ("experiments", "tests"):
        found[room] = lines_of(*of_room[room])
    assert {name: n for name, n in found.items() if n > SIZES[name]} == {}
    results = [path for path in (ROOT / "experiments" / "results").rglob("*") if path.is_file()]
    assert len(results) <= 60 and not [path for path in results if path.suffix == ".jsonl"]


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) != "tests"])
def test_functions_fit_on_a_screen(name):
    """Oracle: the file: no function above 45 lines, no line above 100 columns, no lambda with a name."""
    text = MODULES[name].read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if len(line) > 100] == []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 45, node.name
        assert not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)), node.lineno


def test_no_function_takes_what_knows_everything():
    """Oracle: the signatures: no parameter called run, as the object with 72 attributes once was."""
    for name, path in MODULES.items():
        if room_of(name) == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert "run" not in [argument.arg for argument in node.args.args], (name, node.name)
