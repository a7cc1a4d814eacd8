"What holds the whole together: who imports whom, what is documented, how notebooks look."
from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "subnet_explorer"
MODULES = {p.stem: p for p in sorted(LIB.glob("*.py")) if not p.stem.startswith("_")}
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)]
WITHOUT_TORCH = ("space", "mask", "masks", "data", "texts", "sentences", "tables", "squad", "knowledge", "compare", "maps", "patterns", "plots", "site", "explorer", "pieces", "widgets")
WITH_TRANSFORMERS = {"space", "packed", "data", "pocket", "heads", "cli", "represent", "shrink"}      # and inside functions only

existing = lambda names: [pytest.param(n, marks=() if n in MODULES else pytest.mark.skip(reason="not written yet")) for n in names]
modules, notebooks = pytest.mark.parametrize("name", MODULES), pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@cache
def tree(name: str) -> ast.Module: return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(name: str) -> list[tuple[str, bool]]:
    "Dotted names that a module imports, and whether at module level (`if TYPE_CHECKING` and functions are not)."
    found = []
    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import): found.extend((a.name, top) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert [a.name for a in node.names] != ["*"], f"{name} has a star-import"
            module = ".".join(filter(None, ["subnet_explorer" if node.level else "", node.module]))     # nbdev writes relative imports
            found.extend((f"{module}.{a.name}", top) for a in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")) and isinstance(node.args[0], ast.Constant): found.append((node.args[0].value, top))
        inner = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node): visit(child, inner)
    visit(tree(name), True)
    return found


def siblings(name: str, top_only: bool = False) -> set[str]:
    "Modules of the library that a module imports."
    full = [i.split(".") for i, top in imports(name) if i.startswith("subnet_explorer.") and (top or not top_only)]
    return {p[1] for p in full if p[1] in MODULES}


# ── imports ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_there_are_modules(): assert {"space", "mask", "masks", "apply", "gates", "objectives", "data", "pocket", "store"} <= set(MODULES)


@pytest.mark.parametrize("name", existing(WITHOUT_TORCH))
def test_torch_stays_out(name):
    "At module level, in the module and in everything it pulls in."
    seen, todo = set(), [name]
    while todo:
        if (m := todo.pop()) in seen: continue
        seen.add(m); todo += siblings(m, top_only=True)
        heavy = [i for i, top in imports(m) if top and i.split(".")[0] in ("torch", "transformers", "datasets")]
        assert not heavy, f"{name} loads {heavy} through {m}"


@pytest.mark.parametrize("name", existing(WITHOUT_TORCH))
def test_torch_stays_out_in_a_fresh_interpreter(name):
    code = f"import sys, subnet_explorer.{name}; bad = {{'torch', 'transformers', 'datasets', 'matplotlib'}} & set(sys.modules); sys.exit(', '.join(bad) or 0)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@modules
def test_transformers_only_inside_functions(name):
    for i, top in imports(name):
        if i.split(".")[0] in ("transformers", "datasets"): assert name in WITH_TRANSFORMERS and not top, f"{name} imports {i}"


@modules
def test_nothing_imports_widgets_or_cli(name): assert not siblings(name) & {"widgets", "cli"} - {name}


def test_no_cycles_and_no_utils():
    assert not {"utils", "util", "helpers", "common", "misc"} & set(MODULES)
    state: dict[str, int] = {}
    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, "cycle: " + " → ".join([*path[path.index(name):], name])
        if state.get(name): return
        state[name] = 1
        for m in sorted(siblings(name, top_only=True) - {name}): visit(m, (*path, name))
        state[name] = 2
    for name in MODULES: visit(name, ())


def test_the_order_of_the_layers():
    "mask ← apply ← gates, objectives ← search ← recipes; store under search."
    def below(name: str, seen: set[str]) -> set[str]:
        for m in siblings(name) - seen: seen.add(m); below(m, seen)
        return seen
    order = [n for n in ("space", "mask", "masks", "apply", "gates", "objectives", "search", "recipes") if n in MODULES]
    for i, name in enumerate(order): assert not (up := below(name, set()) & set(order[i + 1:])), f"{name} reaches up to {up}"
    assert not below("store", set()) & {"search", "recipes"}


def test_patterns_stand_above_what_they_name():
    "Maps come from represent; only what draws, shows or runs an analysis may know their patterns."
    for name in set(MODULES) - {"patterns", "plots", "explorer", "widgets", "recipes", "cli"}: assert "patterns" not in siblings(name), f"{name} imports patterns"
    assert siblings("patterns", top_only=True) <= {"space", "mask", "masks", "maps", "pocket", "data", "represent"} and not siblings("patterns") & {"plots", "widgets"}
    assert siblings("maps") <= {"space", "pocket"} and "patterns" not in siblings("widgets")


def test_knowledge_stands_on_data():
    "Graphs of facts are made without a model; what asks one (`fluent`) is in evaluate."
    assert siblings("knowledge") <= {"space", "data", "pocket"} and "knowledge" not in siblings("data") | siblings("objectives")


def test_readers_stand_on_data():
    "Text of any size, sentences and tables share how files are opened, and nothing else; all are read without torch."
    assert siblings("data") <= {"space", "pocket"} and siblings("texts") <= {"space", "mask", "data", "pocket"}
    assert siblings("sentences") <= {"space", "data", "texts", "pocket"} and siblings("tables") <= {"space", "data", "pocket"}


def test_parser_and_controls_stand_on_heads():
    "A parser is a head like the others; what trains and scores it does not know it."
    assert siblings("parser") <= {"space", "objectives", "heads", "evaluate"}
    assert not any({"parser", "controls"} & siblings(name) for name in ("objectives", "evaluate", "search", "heads", "score"))


def test_compact_stands_on_masks_alone():
    "Removing what is masked needs no search and no data; only what runs it from outside may know it."
    assert siblings("shrink") <= {"space", "mask", "apply", "packed", "pocket"}
    assert not [n for n in set(MODULES) - {"cli", "recipes"} if "shrink" in siblings(n)]


def test_questions_stand_on_data_and_spans_on_heads():
    "What trains and scores asks the task; only what makes heads knows the one for spans."
    assert siblings("squad") <= {"space", "data", "tables", "pocket"} and siblings("spans") <= {"space", "heads"}
    assert not any("spans" in siblings(name) for name in set(MODULES) - {"spans", "heads", "cli"})


def test_task_agnostic_masks_stand_on_what_there_is():
    "One way to find, to train and to read tasks."
    assert {"search", "heads", "lottery", "evaluate", "store"} <= siblings("tamt", top_only=True) and not siblings("tamt", top_only=True) & {"plots", "critical", "probing", "recipes"}
    assert {n for n in MODULES if "tamt" in siblings(n)} <= {"recipes", "cli"}


# ── safety ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@modules
def test_nothing_is_unpickled_or_evaluated(name):
    assert not [i for i, _ in imports(name) if i.split(".")[0] in ("pickle", "dill", "shelve", "marshal", "cloudpickle") or i in ("joblib.load", "joblib.dump", "joblib.Memory")]
    for node in ast.walk(tree(name)):
        if not isinstance(node, ast.Call): continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called == "torch.load": assert keywords.get("weights_only") == "True", f"{name}: torch.load without weights_only=True"
        if called.split(".")[-1] in ("read_pickle", "to_pickle") or called in ("eval", "exec", "os.system"): pytest.fail(f"{name} calls {called}")
        if called in ("np.load", "numpy.load"): assert keywords.get("allow_pickle", "False") == "False"
        assert keywords.get("trust_remote_code", "False") == "False" and keywords.get("shell", "False") == "False"


def test_no_machine_in_the_repository():
    "Files that are or would be committed name no folder of the machine they were written on."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode: pytest.skip("not a git checkout")
    private = [b"/wo" + b"rk/", b"/tmp/bash" + b"_jobs", b"/tmp/" + b"nbsrc", b"/ro" + b"ot/"]
    found = [(f.decode(), p.decode()) for f in listed.stdout.split(b"\0") if f and (path := ROOT / f.decode()).is_file() for p in private if p in path.read_bytes()]
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
def test_public_names_are_annotated(name):
    missing = []
    for n in public(name):
        if isinstance(n, ast.FunctionDef): missing += unannotated(n, False)
        else: missing += [f"{n.name}.{m}" for f in n.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_") or isinstance(f, ast.FunctionDef) and f.name == "__init__" for m in unannotated(f, True)]
    assert not missing, f"without annotation: {missing}"


@modules
def test_exports_exist(name):
    "`__all__`, which nbdev writes, names what is there and nothing private."
    for node in tree(name).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            defined = {n.name for n in public(name)} | {t.id for n in tree(name).body for t in (n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []) if isinstance(t, ast.Name)}
            assert set(ast.literal_eval(node.value)) <= defined


def test_the_front_door_leads_somewhere():
    import subnet_explorer
    for name in subnet_explorer.__all__:
        if name in subnet_explorer._MODULES and name not in MODULES: continue       # announced, not written yet
        assert getattr(subnet_explorer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'utils'"): subnet_explorer.utils


# ── notebooks ────────────────────────────────────────────────────────────────────────────────────────────────────────

@cache
def cells(path: Path) -> list[dict]: return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell: dict) -> str: return "".join(cell["source"])
def directive(cell: dict, word: str) -> bool: return cell["cell_type"] == "code" and bool(re.search(rf"^#\s*\|\s*{word}\b", source(cell), re.M))


@notebooks
def test_notebooks_are_clean(path):
    assert path.stat().st_size <= 1_500_000
    ids = [c.get("id") for c in cells(path)]
    assert all(ids) and len(set(ids)) == len(ids)                       # nbdev writes them into the modules
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
    for c in cells(path):
        for o in c.get("outputs", []):
            assert o["output_type"] != "error", f"{source(c)[:80]!r} ended with {o.get('ename')}"
            assert not (o["output_type"] == "stream" and o.get("name") == "stderr" and "Traceback" in "".join(o["text"]))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_read_like_chapters(path):
    cs = cells(path)
    first = source(cs[0])
    assert cs[0]["cell_type"] == "markdown" and re.match(r"# \S.*\n+> \S", first), "a title and a promise come first"
    code = [c for c in cs if c["cell_type"] == "code"]
    assert source(code[0]) == f"#| default_exp {path.stem[3:]}", "default_exp is the first code cell"
    previous = None
    for c in cs:
        if directive(c, "export"):
            assert previous is None or not directive(previous, "export"), f"two exported cells in a row at {source(c)[:80]!r}"
            assert not re.search(r"^\s*@patch", source(c), re.M)
        previous = c
    assert any(c["cell_type"] == "code" and not directive(c, "export") and not directive(c, "hide") and not directive(c, "default_exp") for c in cs), "nothing is shown"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_and_modules_agree(path):
    "Every exported cell stands in the module that its notebook announces."
    module = MODULES.get(path.stem[3:])
    assert module, "not exported yet: run nbdev_export"
    text, normal = module.read_text(encoding="utf-8"), lambda s: "\n".join(line for line in s.splitlines() if not re.match(r"#\s*\|", line) and "__future__" not in line).strip()
    text = re.sub(r"\bfrom \.(\w*) import", lambda m: f"from subnet_explorer{'.' * bool(m[1])}{m[1]} import", text)
    for c in cells(path):
        if directive(c, "export"): assert normal(source(c)) in text, f"{source(c)[:80]!r} differs: run nbdev_export"
