"""Who may import whom, and a few habits, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import argus

ROOT = Path(argus.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [".".join(("argus", *path.relative_to(ROOT).with_suffix("").parts)) for path in FILES]
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in zip(NAMES, FILES, strict=True)}
LIBRARY = {name: tree for name, tree in TREES.items() if not name.startswith("argus.testing")}

COMMAND_LINE = ("__main__", "commandline", "runner", "sweep", "report", "pictures", "models", "caches", "tasks")
"""The rooms of the command line: nothing else may know them."""

ALLOWED = {
    "errors": (),
    "hookspecs": (),
    "attention": ("errors",),
    "pages": (),
    "window": ("errors",),
    "ledger": ("errors",),
    "exact": ("errors", "backends.base"),
    "config": ("errors", "plugins"),
    "plugins": ("errors", "hookspecs"),
    "tiers": ("errors", "hookspecs", "tiers", "backends.base"),
    "policies": ("errors", "hookspecs", "policies"),
    "backends": ("errors", "hookspecs", "attention", "backends"),
    "plan": ("ledger", "backends.base", "policies.base", "tiers.base"),
    "blocks": ("pages", "exact", "plan", "backends.base", "tiers.base"),
    "moves": ("errors", "pages", "window", "blocks", "plan", "policies.base", "tiers.base"),
    "engine": (
        "errors",
        "attention",
        "pages",
        "window",
        "exact",
        "blocks",
        "plan",
        "backends.base",
        "tiers.base",
    ),
    "turns": ("errors", "pages", "exact", "blocks", "moves", "plan", "engine", "policies.base", "tiers.base"),
    "build": ("errors", "config", "plugins", "plan", "backends.base", "policies.base", "tiers.base"),
    "budget": ("errors", "config", "plan", "engine", "turns", "moves", "ledger", "policies.base"),
    "adapters": (
        "errors",
        "attention",
        "config",
        "plan",
        "engine",
        "turns",
        "moves",
        "window",
        "ledger",
        "policies.base",
        "budget",
        "build",
        "adapters",
    ),
}
"""What each room may import of ARGUS; what only type checkers import is free."""


def room(module: str) -> str:
    """``argus.tiers.fp8`` is in ``tiers``."""
    return module.split(".")[1] if "." in module else ""


def imports(tree: ast.AST) -> set[str]:
    """Modules that run when this one does, imports inside functions included, those for type checkers left out."""
    hidden = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for inner in block.body
        for node in ast.walk(inner)
    }
    found = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide who imports whom"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in TREES}
    return found


def own(module: str) -> set[str]:
    """Modules of ARGUS that `module` imports, without the leading ``argus.``."""
    return {name.removeprefix("argus.") for name in imports(TREES[module]) if name.startswith("argus.")}


@pytest.mark.parametrize("module", sorted(name for name in LIBRARY if room(name) in ALLOWED))
def test_directions(module):
    allowed = ALLOWED[room(module)]
    others = {name for name in own(module) if not any(name == other or name.startswith(f"{other}.") for other in allowed)}
    assert not others, f"{module} may not import {sorted(others)}; allowed: {allowed}"


def test_every_room_has_a_rule():
    assert {room(name) for name in LIBRARY} - set(ALLOWED) - set(COMMAND_LINE) == {"__init__"}


@pytest.mark.parametrize("module", sorted(name for name in LIBRARY if room(name) not in COMMAND_LINE))
def test_nothing_knows_the_command_line(module):
    assert not {name for name in own(module) if name.split(".")[0] in COMMAND_LINE}


def test_the_engine_names_no_tier():
    """No tier by class or by name, in code: stages are places."""
    from argus import plugins

    tree = ast.Module([line for name in ("engine", "blocks", "moves") for line in TREES[f"argus.{name}"].body], [])
    kinds = plugins.kinds(plugins.load(), "argus_tiers")
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    words = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented
    ]
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assert not set(kinds) & set(words)
    assert not {kind.__name__ for kind in kinds.values()} & set(names)
    assert "EXACT" in names


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("module", ["argus.engine", "argus.build", "argus.pages", "argus.exact", "argus.tasks.fidelity"])
def test_no_ladders_of_isinstance(module):
    """Who a tier or a policy is, nobody asks."""
    for call in calls(TREES[module]):
        if isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "issubclass", "type"):
            asked = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
            assert not asked & {"Tier", "Aging", "Anchors", "Outliers", "tier", "policy", "Backend"} or call.func.id == "type"
            if call.func.id == "type":
                assert module == "argus.tasks.fidelity", "only a report may name a tier's class"


@pytest.mark.parametrize("module", sorted(TREES))
def test_no_assert_and_no_silent_except(module):
    """Asserts vanish under -O; an error that is swallowed is a lie."""
    for node in ast.walk(TREES[module]):
        assert not isinstance(node, ast.Assert), f"{module}:{node.lineno} asserts"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}:{node.lineno} catches everything"
            silent = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
            broad = {leaf.id for leaf in ast.walk(node.type) if isinstance(leaf, ast.Name)}
            assert not (silent and broad & {"Exception", "BaseException", "ImportError"}), f"{module}:{node.lineno} is silent"


@pytest.mark.parametrize("module", sorted(LIBRARY))
def test_no_global_random_state(module):
    """Randomness comes from a generator of its own."""
    for call in calls(LIBRARY[module]):
        words = ast.unparse(call.func)
        assert words not in ("torch.manual_seed", "torch.random.manual_seed", "torch.seed", "random.seed")
        assert not words.startswith(("numpy.random.", "np.random."))


def test_importing_argus_brings_nothing_heavy():
    heavy = ("torch", "triton", "transformers", "hydra", "numpy", "pydantic", "matplotlib")
    program = f"import sys, argus; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there():
    for name in argus.__all__:
        assert getattr(argus, name) is not None
    with pytest.raises(AttributeError, match="public names: ArgusCache"):
        _ = argus.nonsense
