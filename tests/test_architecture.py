"""The rules of the house, held by tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from grimp import build_graph

ROOT = Path(__file__).parent.parent
PLUGINS = ("device_agents.backends", "search_client.metrics", "search_client.networks", "search_client.data")


def test_the_contracts_of_imports_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def graph():  # type: ignore[no-untyped-def]
    return build_graph("lut_db", "device_agents", "profiler_server", "search_client")


@pytest.mark.parametrize("package", PLUGINS)
def test_plugins_do_not_import_each_other(graph, package: str) -> None:  # type: ignore[no-untyped-def]
    plugins = graph.find_children(package)
    assert plugins, f"{package} holds no plug-in"
    for plugin in plugins:
        assert not graph.find_modules_directly_imported_by(plugin) & plugins


def test_there_are_no_cycles(graph) -> None:  # type: ignore[no-untyped-def]
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        if module in done:
            return
        for imported in graph.find_modules_directly_imported_by(module):
            visit(imported, (*path, module))
        done.add(module)

    for module in graph.modules:
        visit(module, ())


@pytest.mark.parametrize("heavy", ["sqlalchemy", "onnx", "torch", "fastapi", "httpx", "numpy"])
def test_the_vocabulary_is_light(heavy: str) -> None:
    code = f"import sys, lut_db.wire, lut_db.canary; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_error_is_swallowed() -> None:
    """An `except` whose body is only `pass` hides what went wrong."""
    for package in ("lut_db", "device_agents", "profiler_server", "search_client", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ExceptHandler):
                    silent = all(isinstance(statement, ast.Pass) for statement in node.body)
                    assert not silent, f"{path.relative_to(ROOT)}:{node.lineno} swallows an error"
