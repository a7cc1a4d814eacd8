"What holds the whole together: who may call whom, how lines and chapters look, what is documented."
from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "subnet_explorer"
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))

# the house: a module imports from its own folder and from those to the left
FOLDERS = ("core", "data", "model", "search", "measure", "tasks", "look", "recipes")
ROOT_MODULES = ("cli", "docs")                         # they may import everything
MODULES = {f"{p.parent.name}.{p.stem}": p for folder in FOLDERS for p in sorted((LIB / folder).glob("*.py"))
           if p.stem != "__init__"}
MODULES |= {name: LIB / f"{name}.py" for name in ROOT_MODULES}
WITHOUT_TORCH = [name for name in MODULES if name.split(".")[0] in ("core", "data", "look")]
CHAPTERS = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)]
ESSAYS = [p for p in NOTEBOOKS if p.parent.name in ("tutorials", "explain")]

modules = pytest.mark.parametrize("name", MODULES)
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}-{p.stem}")
chapters = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: f"{p.parent.name}-{p.stem}")


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def absolute(name: str, node: ast.ImportFrom) -> str:
    "The module that an import names, from the package on: `core.mask`; empty for the package itself."
    if not node.level:
        return (node.module or "").removeprefix("subnet_explorer.") if _ours(node.module) else f"/{node.module}"
    parts = name.split(".")[:-1]
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, *filter(None, [node.module])])


def _ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "subnet_explorer"


def imports(name: str) -> Iterator[tuple[str, str, bool]]:
    "Module, name, and whether at module level: lazy imports and those for type checkers count, but not as such."
    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, str, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names: yield f"/{alias.name}", "", top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names: yield absolute(name, node), alias.name, top
        lazy = isinstance(node, (ast.FunctionDef, ast.Lambda))
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node): yield from visit(child, top and not lazy and not checking)
    yield from visit(tree(name), True)


def siblings(name: str, top_only: bool = False) -> set[str]:
    "Modules of the library that a module imports."
    found = set()
    for module, what, top in imports(name):
        if module.startswith("/") or (top_only and not top): continue
        found |= {m for m in (module, f"{module}.{what}") if m in MODULES}
    return found


# ── who may call whom ────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_module_has_its_place():
    loose = {p.name for p in LIB.glob("*.py")} - {"__init__.py", "__main__.py", "_modidx.py"}
    assert loose == {f"{name}.py" for name in ROOT_MODULES}
    assert {p.name for p in LIB.iterdir() if p.is_dir()} - {"__pycache__", "static"} == set(FOLDERS)
    assert not {"utils", "util", "helpers", "common", "misc"} & {name.split(".")[-1] for name in MODULES}


@modules
def test_arrows_point_to_the_left(name):
    if name in ROOT_MODULES: return
    mine = FOLDERS.index(name.split(".")[0])
    right = {m for m in siblings(name) if m in ROOT_MODULES or FOLDERS.index(m.split(".")[0]) > mine}
    assert not right, f"{name} imports {right}"


def test_there_is_no_circle():
    done: set[str] = set()
    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "circle: " + " → ".join([*path[path.index(name):], name])
        if name in done: return
        for m in sorted(siblings(name) - {name}): visit(m, (*path, name))
        done.add(name)
    for name in MODULES: visit(name, ())


@modules
def test_private_names_stay_at_home(name):
    private = [f"{m}.{what}" for m, what, _ in imports(name)
               if not m.startswith("/") and what.startswith("_") and not what.startswith("__")]
    assert not private


@modules
def test_modules_do_not_go_through_the_front_door(name):
    through = {what for m, what, _ in imports(name) if m == ""} - {"__version__"} - set(FOLDERS) - {"recipes"}
    assert not through, f"{name} imports {through} from the package: name the module"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_torch_stays_out(name):
    "At module level, in the module and in everything it pulls in."
    seen, todo = set(), [name]
    while todo:
        if (m := todo.pop()) in seen: continue
        seen.add(m)
        todo += siblings(m, top_only=True)
        heavy = [i for i, _, top in imports(m) if top and i.split(".")[0] in ("/torch", "/transformers", "/datasets")]
        assert not heavy, f"{name} loads {heavy} through {m}"


def test_torch_stays_out_in_a_fresh_interpreter():
    modules = "\n".join(f"import subnet_explorer.{name}" for name in WITHOUT_TORCH)
    code = f"import sys\n{modules}\nbad = {{'torch', 'transformers', 'datasets', 'matplotlib'}} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", f"{code}\nsys.exit(', '.join(bad) or 0)"],
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@modules
def test_transformers_only_inside_functions(name):
    top = [m for m, _, top in imports(name) if top and m.split(".")[0] in ("/transformers", "/datasets")]
    assert not top


# ── lines and cells ──────────────────────────────────────────────────────────────────────────────────────────────────

@cache
def cells(path: Path) -> list[dict]: return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str: return "".join(cell["source"])


def directive(cell: dict, word: str) -> bool:
    return cell["cell_type"] == "code" and bool(re.search(rf"^#\s*\|\s*{word}\b", source(cell), re.M))


def lines(cell: dict) -> list[str]:
    "Lines of code that are neither empty nor a directive."
    return [line for line in source(cell).splitlines() if line.strip() and not re.match(r"#\s*\|", line)]


def exported(path: Path) -> list[dict]: return [c for c in cells(path) if directive(c, "export")]


def code(path: Path) -> list[dict]: return [c for c in cells(path) if c["cell_type"] == "code"]


@notebooks
def test_lines_of_notebooks_are_short(path):
    essay = path in ESSAYS
    for cell in code(path):
        most = 88 if essay and not directive(cell, "hide") else 120
        long = [line for line in source(cell).splitlines() if len(line) > most]
        assert not long, f"{len(long[0])} characters: {long[0]}"


PYTHON = sorted(p for folder in ("tests", "benchmarks", "nbs") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", [*PYTHON, LIB / "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_of_files_are_short(path):
    long = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 120]
    assert not long, f"{len(long[0])} characters: {long[0]}"


def test_most_lines_are_shorter():
    lengths = sorted(len(line) for path in CHAPTERS for cell in exported(path) for line in lines(cell))
    assert lengths[-1] <= 120 and lengths[int(.9 * len(lengths))] <= 95


@chapters
def test_cells_and_chapters_are_short(path):
    sizes = [len(lines(cell)) for cell in exported(path)]
    assert max(sizes, default=0) <= 40 and sum(sizes) <= 450


@modules
def test_code_is_plain(name):
    "No named lambda, no condition inside a conditional expression, no comprehension three deep; ruff sees to `;`."
    deep = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.walk(tree(name)):
        where = f"{name}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Assign, ast.AnnAssign)): assert not isinstance(node.value, ast.Lambda), where
        if isinstance(node, ast.IfExp):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.IfExp) and n is not node]
            assert not inner, f"{where}: a condition inside a conditional expression"
        if isinstance(node, deep):
            inner = [n for n in ast.walk(node) if isinstance(n, deep) and n is not node]
            nested = [m for n in inner for m in ast.walk(n) if isinstance(m, deep) and m is not n]
            assert not nested, f"{where}: comprehensions three deep"


# ── safety ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PICKLES = ("/pickle", "/dill", "/shelve", "/marshal", "/cloudpickle")
BETWEEN_PROCESSES = ("model.travel",)      # work that one's own processes hand to each other; it never lies in a file


@modules
def test_nothing_is_unpickled_or_evaluated(name):
    found = [(m, what) for m, what, _ in imports(name)]
    assert name in BETWEEN_PROCESSES or not [m for m, _ in found if m in PICKLES]
    assert not [what for m, what in found if m == "/joblib" and what in ("load", "dump", "Memory")]
    for node in ast.walk(tree(name)):
        if not isinstance(node, ast.Call): continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called == "torch.load": assert keywords.get("weights_only") == "True", f"{name}: torch.load"
        if called in ("np.load", "numpy.load"): assert keywords.get("allow_pickle", "False") == "False"
        assert called.split(".")[-1] not in ("read_pickle", "to_pickle")
        assert called not in ("eval", "exec", "os.system"), f"{name} calls {called}"
        assert keywords.get("trust_remote_code", "False") == "False" and keywords.get("shell", "False") == "False"


def test_no_machine_in_the_repository():
    "Files that are or would be committed name no folder of the machine they were written on."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True,
                            check=False)
    if listed.returncode: pytest.skip("not a git checkout")
    private = [b"/wo" + b"rk/", b"/tmp/bash" + b"_jobs", b"/tmp/" + b"nbsrc", b"/ro" + b"ot/"]
    files = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    found = [(f, p) for f in files if f.is_file() for p in private if p in f.read_bytes()]
    assert not found


# ── documentation ────────────────────────────────────────────────────────────────────────────────────────────────────

def public(name: str) -> list[ast.FunctionDef | ast.ClassDef]:
    return [n for n in tree(name).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


@modules
def test_public_names_are_documented(name):
    bare = [n.name for n in public(name) if not ast.get_docstring(n)]
    assert not bare, f"without docstring: {bare}"


def unannotated(f: ast.FunctionDef, method: bool) -> list[str]:
    a = f.args
    args = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    static = any("staticmethod" in ast.unparse(d) for d in f.decorator_list)
    missing = [x.arg for x in args[method and not static:] if x.annotation is None]
    return [f"{f.name}({x})" for x in missing] + ([f"{f.name} → ?"] if f.returns is None else [])


@modules
def test_names_are_annotated(name):
    missing = []
    for node in tree(name).body:
        if isinstance(node, ast.FunctionDef): missing += unannotated(node, False)
        if isinstance(node, ast.ClassDef):
            for f in node.body:
                if isinstance(f, ast.FunctionDef): missing += [f"{node.name}.{m}" for m in unannotated(f, True)]
    assert not missing, f"without annotation: {missing}"


def defined(name: str) -> set[str]:
    "Public names that a module defines."
    found = {n.name for n in public(name)}
    for node in tree(name).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


@modules
def test_exports_exist(name):
    "`__all__`, which nbdev writes, names what is there and nothing private."
    for node in tree(name).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            assert set(ast.literal_eval(node.value)) <= defined(name)


def test_the_front_door_leads_somewhere():
    import subnet_explorer
    for name in subnet_explorer.__all__: assert getattr(subnet_explorer, name) is not None
    for name in subnet_explorer._GATHERED:
        space = getattr(subnet_explorer, name)
        assert dir(space) and all(getattr(space, one) is not None and not one.startswith("_") for one in dir(space))
    for name, renamed in subnet_explorer._RENAMED.items():
        for old, new in renamed.items():
            with pytest.warns(DeprecationWarning, match=f"is now called {new}"):
                assert getattr(getattr(subnet_explorer, name), old) is getattr(getattr(subnet_explorer, name), new)
    with pytest.raises(AttributeError, match="no attribute 'utils'"): _ = subnet_explorer.utils
    with pytest.raises(AttributeError, match="has no 'densty'"): _ = subnet_explorer.plots.densty


# ── notebooks ────────────────────────────────────────────────────────────────────────────────────────────────────────

@notebooks
def test_notebooks_are_clean(path):
    assert path.stat().st_size <= 1_500_000
    ids = [c.get("id") for c in cells(path)]
    assert all(ids) and len(set(ids)) == len(ids)                       # nbdev writes them into the modules
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
    for c in cells(path):
        for o in c.get("outputs", []):
            assert o["output_type"] != "error", f"{source(c)[:80]!r} ended with {o.get('ename')}"
            assert not (o.get("name") == "stderr" and "Traceback" in "".join(o["text"]))


def home(path: Path) -> str:
    "The module of a chapter."
    stem = path.stem[3:]
    return stem if path.parent.name == "nbs" else f"{path.parent.name}.{stem}"


@chapters
def test_chapters_read_like_chapters(path):
    cs = cells(path)
    assert cs[0]["cell_type"] == "markdown", "a title comes first"
    assert re.match(r"# \S.*\n+> \S", source(cs[0])), "a title and a promise come first"
    assert source(code(path)[0]) == f"#| default_exp {home(path)}", "default_exp is the first code cell"
    for before, cell in pairwise(cs):
        both = directive(before, "export") and directive(cell, "export")
        assert not both, f"two exported cells in a row at {source(cell)[:80]!r}"
        assert not re.search(r"^\s*@patch", source(cell), re.M)
    hidden = ("export", "hide", "default_exp")
    assert any(not any(directive(c, word) for word in hidden) for c in code(path)), "nothing is shown"


@chapters
def test_chapters_and_modules_agree(path):
    "Every exported cell stands in the module that its notebook announces."
    module = MODULES.get(home(path))
    assert module, "not exported yet: run nbdev_export"
    ids = set(re.findall(r"^# %% .*ipynb #(\w+)$", module.read_text(encoding="utf-8"), re.M))
    assert ids == {c["id"] for c in exported(path)}, "run nbdev_export"


def test_chapters_are_numbered_in_their_folders():
    for folder in FOLDERS:
        numbers = [int(p.name[:2]) for p in CHAPTERS if p.parent.name == folder]
        assert numbers == list(range(len(numbers))), f"{folder}: {numbers}"


# ── programs in strings ──────────────────────────────────────────────────────────────────────────────────────────────

IMPORT = re.compile(r"^ *from (subnet_explorer[\w.]*) import (\w+(?: as \w+)?(?:, \w+(?: as \w+)?)*) *$", re.M)


@pytest.mark.parametrize("path", [*PYTHON, *NOTEBOOKS], ids=lambda p: str(p.relative_to(ROOT)))
def test_imported_names_exist(path):
    "Also in programs that stand in strings, which no linter reads."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb": text = "\n".join(source(c) for c in code(path))
    for found in IMPORT.finditer(text):
        module = importlib.import_module(found[1])
        for name in re.sub(r" as \w+", "", found[2]).split(", "):
            there = hasattr(module, name) or importlib.util.find_spec(f"{found[1]}.{name}")
            assert there, f"{found[1]} has no {name}"
