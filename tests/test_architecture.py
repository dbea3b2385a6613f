"""Rules of the source tree that a reader relies on (CONTRIBUTING.md has them in words)."""

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ARROWS: list[set[str]] = [
    {"cli"},
    {"quantize"},
    {"transform", "tuning"},
    {"serve", "vllm", "job", "evaluation", "lora", "processes"},
    {"kv", "fusion", "checkpoint"},
    {"models"},
    {"layers"},
    {"rotations"},
    {"solvers", "calibration", "report"},
    {"formats", "recipe", "numerics", "autocast", "memory", "devices", "disk", "patterns", "ranks"},
    {"ops", "phases"},
]
"""Packages and modules of rotq; a file imports from its own entry and from later rows only."""

ANYWHERE = {"errors", ""}
"""Importable from all; "" is rotq itself, for its version."""

FILES = sorted((ROOT / "rotq").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "rotq_kernels").rglob("*.py"))
ENGINE = [file for file in FILES if file.is_relative_to(ROOT / "rotq" / "serve" / "engine")]


def area_of(file: Path) -> str:
    """The entry of ARROWS that a file belongs to: its package, or the module at rotq's root."""
    name = file.relative_to(ROOT / "rotq").with_suffix("").parts[0]
    return {"__init__": "", "__main__": "cli"}.get(name, name)


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Imported module names and lines; what is under TYPE_CHECKING does not run."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {child for branch in node.body for child in ast.walk(branch)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield node.module or "", node.lineno


def rank(name: str) -> int:
    found = [row for row, names in enumerate(ARROWS) if name in names]
    assert found, f"rotq.{name} has no place in ARROWS"
    return found[0]


def identify(file: Path) -> str:
    return str(file.relative_to(ROOT))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 30
    assert KERNELS
    assert ENGINE


@pytest.mark.parametrize("file", FILES, ids=identify)
def test_imports_point_right(file: Path) -> None:
    here = area_of(file)
    for name, line in imports(parse(file)):
        package, _, module = name.partition(".")
        if package == "rotq_kernels":
            assert here == "ops", f"line {line}: only rotq.ops imports rotq_kernels"
        if package != "rotq" or here in ANYWHERE:
            continue
        there = module.split(".")[0]
        if there in ANYWHERE or there == here:
            continue
        assert rank(there) > rank(here), f"line {line}: rotq.{here} imports rotq.{there}"


@pytest.mark.parametrize("file", KERNELS, ids=identify)
def test_kernels_know_nothing_of_rotq(file: Path) -> None:
    assert not [name for name, _ in imports(parse(file)) if name.split(".")[0] == "rotq"]


@pytest.mark.parametrize("file", KERNELS, ids=identify)
def test_kernels_are_launched_in_one_place(file: Path) -> None:
    """``launching.launch`` has the device guard that Triton lacks."""
    if file.name == "launching.py":
        return
    for node in ast.walk(parse(file)):
        launched = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        assert not launched, f"line {node.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", ENGINE, ids=identify)
def test_engine_knows_nothing_of_http(file: Path) -> None:
    """It also runs without a server, and of ``rotq.serve`` it knows itself and the settings."""
    for name, line in imports(parse(file)):
        assert name.split(".")[0] not in {"fastapi", "starlette", "uvicorn"}, f"line {line}: {name}"
        if f"{name}.".startswith("rotq.serve."):
            known = name.startswith("rotq.serve.engine.") or name == "rotq.serve.settings"
            assert known, f"line {line}: the engine imports {name}"


@pytest.mark.parametrize("file", FILES, ids=identify)
def test_transformers_stays_at_the_edge(file: Path) -> None:
    allowed = {"models", "calibration", "evaluation", "checkpoint", "lora", "pipeline", "kv"}
    used = [name for name, _ in imports(parse(file)) if name.split(".")[0] == "transformers"]
    assert not used or area_of(file) in allowed


def test_peft_is_needed_by_no_other() -> None:
    lora = ROOT / "rotq" / "lora.py"
    for file in FILES:
        names = {name for name, _ in imports(parse(file))}
        assert file == lora or "rotq.lora" not in names, file
        assert file == lora or not any(name.split(".")[0] == "peft" for name in names), file


def test_a_pool_needs_nothing_of_a_cache_alone() -> None:
    """These modules are of caches only; the others of kv/cache are of pools too."""
    names = ("esm", "layer", "packed_cache", "placement", "sequences")
    own = {f"rotq.kv.cache.{name}" for name in names}
    for file in (ROOT / "rotq" / "kv").glob("*/*.py"):
        if ".".join(file.relative_to(ROOT).with_suffix("").parts) not in own:
            assert not own & {name for name, _ in imports(parse(file))}, file


def test_kernels_folder_is_no_package() -> None:
    # with an __init__.py it would shadow the `kernels` that transformers imports
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_folder_holds_one_package_and_its_documents() -> None:
    files = [path for path in (ROOT / "kernels").rglob("[!.]*") if path.is_file()]
    found = {path.relative_to(ROOT / "kernels").parts[0] for path in files}
    assert found == {"rotq_kernels", "README.md", "COMPILE.md"}


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("file", [*FILES, *KERNELS], ids=identify)
def test_modules_are_named_for_what_they_hold(file: Path) -> None:
    assert file.stem not in {"utils", "util", "helpers", "common", "base", "misc"}


@pytest.mark.parametrize("file", [*FILES, *KERNELS], ids=identify)
def test_nothing_is_decided_at_import(file: Path) -> None:
    """No environment is read and no CUDA is asked outside of functions."""
    todo: list[ast.AST] = list(parse(file).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert not dotted.startswith(("os.environ", "os.getenv", "torch.cuda")), dotted
        todo.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("file", [*FILES, *KERNELS], ids=identify)
def test_no_error_is_swallowed(file: Path) -> None:
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            silent = all(isinstance(item, ast.Pass) for item in node.body)
            assert not silent, f"line {node.lineno}: except ...: pass"


@pytest.mark.parametrize("file", [*FILES, *KERNELS], ids=identify)
def test_no_lu_factorization(file: Path) -> None:
    """It is wrong without an error in torch 2.13's CPU build; rotq.numerics has the reason."""
    wrong = {"inv", "inv_ex", "solve", "solve_ex", "lu", "lu_factor", "lu_solve", "det", "slogdet"}
    used = {ast.unparse(node) for node in ast.walk(parse(file)) if isinstance(node, ast.Attribute)}
    assert not used & {f"torch.linalg.{name}" for name in wrong}
    assert not used & {f"torch.{name}" for name in {*wrong, "inverse", "logdet"}}


def test_rows_name_what_exists() -> None:
    existing = {area_of(file) for file in FILES}
    missing = set().union(*ARROWS) - existing
    assert not missing
    for left, right in pairwise(ARROWS):
        assert not left & right
