"""The package as a graph of modules, read off the sources: no module is imported for it."""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "visionpulse"
TOP = "__init__"  # the package itself, as a module


@dataclass(frozen=True)
class Import:
    """One imported module: ours by its path below the package, another by its first name."""

    target: str
    ours: bool
    at_import: bool  # runs when the module is imported: neither in a function nor for types alone


def module_of(path: Path, package: Path = PACKAGE) -> str:
    """`models.session` for visionpulse/models/session.py, `models` for its package."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == TOP and len(parts) > 1 else parts)


def exists(module: str, package: Path = PACKAGE) -> bool:
    """Whether a dotted name is a module or a folder of the package."""
    path = package.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imports_of(path: Path, package: Path = PACKAGE, text: str | None = None) -> list[Import]:
    """All imports of a file, those inside functions too."""
    tree = ast.parse(path.read_text() if text is None else text)
    folder = list(path.relative_to(package).parts[:-1])
    found: list[Import] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            at_import = False
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                ours = first == package.name
                name = (".".join(rest) or TOP) if ours else first
                found.append(Import(name, ours, at_import))
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level == 0 and parts[0] != package.name:
                found.append(Import(parts[0], False, at_import))
                parts = None
            elif node.level == 0:
                parts = parts[1:]
            else:
                parts = folder[: len(folder) - node.level + 1] + parts
            for alias in node.names if parts is not None else ():
                deeper = ".".join([*parts, alias.name])
                target = deeper if exists(deeper, package) else ".".join(parts) or TOP
                found.append(Import(target, True, at_import))
        for child in ast.iter_child_nodes(node):
            visit(child, at_import)

    visit(tree, True)
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other, sorted."""
    reach = {module: _reached(module, edges) for module in edges}
    groups = {
        tuple(sorted(other for other in seen if module in reach.get(other, ())))
        for module, seen in reach.items()
        if module in seen
    }
    return sorted(list(group) for group in groups)


def _reached(module: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [module]
    while todo:
        for target in edges.get(todo.pop(), ()):
            if target not in seen:
                seen.add(target)
                todo.append(target)
    return seen
