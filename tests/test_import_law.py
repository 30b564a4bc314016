"""Who may import whom: one direction through the layers, heavy packages behind one door each."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "hydrajax"
FILES = [*PACKAGE.rglob("*.py"), REPO / "train.py", REPO / "convert_torch.py"]

# Each module imports only from groups before its own.
ORDER = (
    ("typing",),
    ("model_config",),
    ("config", "head_plan"),
    ("sharding",),
    ("layers", "cache"),
    ("attention", "deltanet"),
    ("hydra",),
    ("model",),
    ("losses",),
    ("selection", "transplant"),
    ("stages",),
    ("trainer",),
    ("loop", "start"),
    ("train",),
)
LEAVES = ("optim", "data", "metrics", "checkpoint", "distributed", "manifest", "run_folder",
          "array_tree", "flops", "tokenizer", "command")  # fmt: skip
TORCH = ("torch", "transformers")
REPORTS = {"evals.report", "selection.report", "selection.figures"}


def name_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else REPO)
    return ".".join(relative.with_suffix("").parts)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, inside a function) of everything a file imports."""
    found = []

    def walk(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.extend((f"{child.module}.{alias.name}", inside) for alias in child.names)
            walk(child, inside or isinstance(child, ast.FunctionDef))

    walk(ast.parse(path.read_text()), False)
    return found


def own(path: Path) -> set[str]:
    """First parts of the hydrajax modules that a file imports: model, data, selection, ..."""
    names = [name.split(".") for name, _ in imports(path)]
    return {parts[1] for parts in names if parts[0] == "hydrajax" and len(parts) > 1}


IMPORTS = {name_of(path): own(path) for path in FILES}
ALL = {name_of(path): imports(path) for path in FILES}


def users_of(*packages: str) -> set[str]:
    return {
        module
        for module, found in ALL.items()
        if any(name.split(".")[0] in packages for name, _ in found)
    }


@pytest.mark.parametrize("module", [name for group in ORDER for name in group])
def test_the_core_imports_downwards_only(module):
    rank = {name: i for i, group in enumerate(ORDER) for name in group}
    for path, found in IMPORTS.items():
        if path.split(".")[0] != module:
            continue
        upwards = {n for n in found if n != module and rank.get(n, -1) >= rank[module]}
        assert not upwards, f"{path} imports {upwards}"


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_know_nothing_of_models(leaf):
    forbidden = {"model", "hydra", "attention", "deltanet", "trainer", "stages", "loop", "losses"}
    matched = {module: found for module, found in IMPORTS.items() if module.split(".")[0] == leaf}
    assert matched
    for module, found in matched.items():
        assert not found & forbidden, f"{module} imports {found & forbidden}"


def test_ops_are_used_by_the_two_kinds_of_heads_and_use_nothing_of_ours():
    assert users_of("pallas_kernels") == {"attention", "deltanet"}
    for path in (REPO / "pallas_kernels").rglob("*.py"):
        assert not [name for name, _ in imports(path) if name.split(".")[0] == "hydrajax"], path


def test_torch_is_imported_inside_functions_of_one_module():
    assert users_of(*TORCH) <= {"hf.parity", "hf.source"}
    for module, found in ALL.items():
        for name, inside in found:
            assert inside or name.split(".")[0] not in TORCH, f"{module} imports {name} at the top"


def test_matplotlib_is_imported_by_reports_alone():
    assert users_of("matplotlib") == REPORTS


def test_no_private_jax():
    kernels = {str(p): imports(p) for p in (REPO / "pallas_kernels").rglob("*.py")}
    for module, found in (ALL | kernels).items():
        assert not [name for name, _ in found if name.startswith("jax._")], module
