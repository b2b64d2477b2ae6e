"""The house keeps its walls: import directions, one door per dependency, pure decisions, sizes.

    scripts, benchmarks, simulation, apps -> client | server -> dht -> kernel

Every Python file is read with ast, so that imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSES = (
    "swarm",
    "scripts",
    "benchmarks",
    "simulation",
    "examples",
    "tests",
)  # not the links at the top, or all counts twice

# Rooms from the bottom up; a file may import its own room and every room of a lower floor.
FLOORS = {"kernel": 0, "dht": 1, "client": 2, "server": 2, "apps": 3, "tests": 4}
# The commands and what they start, and the facade for `from swarm import ...`.
APPS = re.compile(r"swarm/(__init__|__main__|local|web|listening|(cli|api|monitor)(/.*)?)\.py")

DOORS = {
    "grpc": "swarm/rpc.py",
    "msgpack": "swarm/wire.py",
    "hivemind": "swarm/dht/node.py and swarm/dht/keeping.py and swarm/dht/averaging.py"
    " and swarm/dht/allreduce.py",
    "uvloop": "swarm/loop.py",
    "opacus": "swarm/client/federated_privacy.py",
    "prometheus_client": "swarm/metrics.py",
    "opentelemetry": "swarm/tracing.py",
}

PURE = {
    "swarm/plan.py",
    "swarm/protocol.py",
    "swarm/dht/validation.py",
    "swarm/client/pace.py",
    "swarm/client/peers.py",
    "swarm/client/pricing.py",
    "swarm/client/probing.py",
    "swarm/client/routing.py",
    "swarm/client/sweep.py",
    "swarm/server/memory.py",
    "swarm/server/pace.py",
    "swarm/server/placement.py",
    "swarm/server/scheduler.py",
}
IMPURE = {"torch", "asyncio", "grpc", "time", "random", "uvloop", "hivemind", "socket", "os"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}

MAX_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7  # without self


@dataclass(frozen=True)
class Source:
    """One parsed file; `path` is relative to the root, with slashes."""

    path: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        house, _, rest = self.path.partition("/")
        if house == "tests":
            return "tests"
        if house != "swarm" or APPS.fullmatch(self.path):
            return "apps"
        room = rest.partition("/")[0]
        return room if room in FLOORS else "kernel"


def read_sources(root: Path) -> dict[str, Source]:
    """Every Python file of the houses, also scripts without a suffix."""
    sources: dict[str, Source] = {}
    for path in chain.from_iterable((root / house).rglob("*") for house in HOUSES):
        if path.is_symlink() or not path.is_file() or "__pycache__" in path.parts:
            continue
        with path.open("rb") as stream:
            shebang = stream.readline(200)
        if path.suffix == ".py" or (not path.suffix and re.match(rb"#!.*python", shebang)):
            name = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8")
            sources[name] = Source(name, text, ast.parse(text, name))
    return sources


def imports(source: Source, known: Mapping[str, Source]) -> Iterator[str]:
    """Dotted names of all modules that this file imports, anywhere in it."""
    package = source.path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:  # `from swarm import errors` imports swarm.errors
                inner = f"{module}.{alias.name}"
                yield inner if file_of(inner, known) else module
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            yield str(first.value) if isinstance(first, ast.Constant) else "?"


def called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def file_of(module: str, known: Mapping[str, Source]) -> str | None:
    path = module.replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in known), None)


def directions(sources: Mapping[str, Source]) -> Iterator[str]:
    for source in sources.values():
        for module in imports(source, sources):
            if module == "?" and source.path not in ("swarm/__init__.py", "tests/nursery.py"):
                yield f"{source.path} hides what it imports"
            target = sources.get(file_of(module, sources) or "")
            if target is None or target.room == source.room:
                continue
            if FLOORS[target.room] >= FLOORS[source.room]:
                yield f"{source.path} ({source.room}) imports {target.path} ({target.room})"


def doors(sources: Mapping[str, Source]) -> Iterator[str]:
    for source in sources.values():
        for module in imports(source, sources):
            door = DOORS.get(module.split(".")[0])
            if door and source.path not in door.split(" and ") and source.room != "tests":
                yield f"{source.path} imports {module}, whose door is {door}"


def purity(sources: Mapping[str, Source]) -> Iterator[str]:
    """Also what a decision imports must be pure, or time would come in by way of the kernel.

    There `os` is let in: who verifies a signature must not mind that keys are also files.
    """
    for start in PURE & sources.keys():
        seen: set[str] = set()
        todo = [start]
        while todo:
            path = todo.pop()
            if path in seen:
                continue
            seen.add(path)
            banned = IMPURE | {"?"} if path == start else IMPURE - {"os"}
            for module in imports(sources[path], sources):
                if module.split(".")[0] in banned:
                    yield f"{start} decides, but imports {module} (in {path})"
                target = file_of(module, sources)
                if target is not None and not APPS.fullmatch(target):
                    todo.append(target)


def pickles(sources: Mapping[str, Source]) -> Iterator[str]:
    for source in sources.values():
        for module in imports(source, sources):
            if module.split(".")[0] in PICKLES:
                yield f"{source.path} imports {module}"
        for node in ast.walk(source.tree):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "torch.load"
                and "weights_only=False" in map(ast.unparse, node.keywords)
            ):
                yield f"{source.path} lets torch.load read pickles"


def sizes(sources: Mapping[str, Source]) -> Iterator[str]:
    for source in sources.values():
        lines = len(source.text.splitlines())
        if lines > MAX_LINES:
            yield f"{source.path} has {lines} lines"
        if source.room == "tests":
            continue
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{source.path}: {node.name} has {length} lines"
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in named)
            if count > MAX_PARAMETERS:
                yield f"{source.path}: {node.name} takes {count} parameters"


def openings(sources: Mapping[str, Source]) -> Iterator[str]:
    for source in sources.values():
        if not ast.get_docstring(source.tree) and source.text.strip():
            yield f"{source.path} does not say what it is for"


RULES = (directions, doors, purity, pickles, sizes, openings)


@pytest.fixture(scope="module")
def house() -> dict[str, Source]:
    return read_sources(ROOT)


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps(rule, house: dict[str, Source]) -> None:
    assert len(house) > 40, "the walk must not miss the house"
    assert not any(path.split("/")[0] in ("server", "client", "dht") for path in house)
    assert list(rule(house)) == []


def test_the_linter_looks_at_all_of_it(house: dict[str, Source]) -> None:
    """It had left out every folder that is called like one of the links at the top."""
    ruff = Path(sys.executable).with_name("ruff")
    command = [ruff, "check", "--no-cache", "--show-files", "."]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    seen = {str(Path(line).relative_to(ROOT)) for line in told.splitlines()}
    assert house.keys() - seen == set()


GOOD = {
    "swarm/__init__.py": '"""Facade."""\nfrom swarm.client.model import Model',
    "swarm/errors.py": '"""Errors."""',
    "swarm/types.py": '"""Types."""\nfrom swarm.errors import SwarmError\nfrom . import errors',
    "swarm/protocol.py": '"""Protocol."""\nfrom swarm import types\nimport dataclasses',
    "swarm/rpc.py": '"""Door."""\nimport grpc.aio, asyncio\nfrom swarm.types import X',
    "swarm/models/spans.py": '"""Spans."""\nimport torch\nfrom swarm.errors import SwarmError',
    "swarm/dht/node.py": '"""DHT."""\nimport hivemind\nfrom swarm.rpc import X',
    "swarm/server/scheduler.py": '"""Scheduler."""\nfrom swarm.protocol import X',
    "swarm/server/node.py": '"""Server."""\nfrom swarm.dht.node import X\nimport os',
    "swarm/client/model.py": '"""Model."""\nfrom swarm.dht import node\nfrom .peers import X',
    "swarm/client/peers.py": '"""Peers."""',
    "swarm/cli.py": '"""Commands."""\nfrom swarm.server.node import X\nfrom swarm import local',
    "swarm/local.py": '"""Swarm."""\nfrom swarm.client.model import Model',
    "scripts/tool": '#!/usr/bin/env python3\n"""Tool."""\nfrom swarm import Model',
    "tests/test_x.py": '"""Test."""\nimport grpc\nfrom swarm.client import model',
}
BAD = {
    "kernel imports a room": (directions, "swarm/types.py", "from swarm.dht.node import X"),
    "models import a room": (directions, "swarm/models/spans.py", "import swarm.server.node"),
    "dht imports a client": (directions, "swarm/dht/node.py", "import swarm.client.model"),
    "client imports server": (directions, "swarm/client/peers.py", "from swarm.server import node"),
    "server imports client": (directions, "swarm/server/node.py", "from swarm import client\n"
                              "import swarm.client.peers"),
    "server imports an app": (directions, "swarm/server/node.py", "from swarm.local import X"),
    "kernel imports the facade": (directions, "swarm/types.py", "from swarm import Model"),
    "an app imports tests": (directions, "swarm/cli.py", "from tests.test_x import X"),
    "inside a function": (directions, "swarm/types.py", "def f():\n import swarm.dht.node"),
    "for types only": (directions, "swarm/types.py", "from typing import TYPE_CHECKING\n"
                       "if TYPE_CHECKING:\n from swarm.client.model import Model"),
    "relative": (directions, "swarm/types.py", "from .server.node import X"),
    "relative, two up": (directions, "swarm/client/peers.py", "from ..server import node"),
    "by name": (directions, "swarm/types.py", "import importlib\n"
                "importlib.import_module('swarm.dht.node')"),
    "by a computed name": (directions, "swarm/types.py", "__import__('swarm.' + 'dht')"),
    "a script without a suffix": (directions, "scripts/tool", "from tests.test_x import X"),
    "grpc elsewhere": (doors, "swarm/server/node.py", "from grpc import aio"),
    "msgpack elsewhere": (doors, "swarm/rpc.py", "def f():\n import msgpack"),
    "hivemind elsewhere": (doors, "swarm/cli.py", "from hivemind.dht import DHT"),
    "uvloop elsewhere": (doors, "scripts/tool", "import uvloop as fast"),
    "a decision reads the clock": (purity, "swarm/server/scheduler.py", "from time import time"),
    "a decision by way of another": (purity, "swarm/types.py", "import random"),
    "a decision holds tensors": (purity, "swarm/client/peers.py", "import torch.nn as nn"),
    "a pickle": (pickles, "swarm/rpc.py", "import pickle"),
    "a pickle in torch": (pickles, "swarm/models/spans.py", "import torch\n"
                          "torch.load('x', weights_only=False)"),
    "a long file": (sizes, "swarm/types.py", "\n" * 400 + "x = 1"),
    "a long test": (sizes, "tests/test_x.py", "\n" * 400 + "x = 1"),
    "a long function": (sizes, "swarm/types.py", "async def f():\n" + " x = 1\n" * 60),
    "a wide function": (sizes, "swarm/types.py", "def f(a, b, c, d, *, e, f, g, h): ..."),
    "a wide constructor": (sizes, "swarm/cli.py", "class A:\n"
                           " def __init__(self, a, b, c, d, e, f, g, h): ..."),
    "a file that opens with nothing": (openings, "swarm/new.py", "x = 1"),
}  # fmt: skip


def build(root: Path, files: Mapping[str, str]) -> dict[str, Source]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (root / "server").symlink_to("swarm/server")
    return read_sources(root)


def test_a_good_house_passes(tmp_path: Path) -> None:
    sources = build(tmp_path, GOOD)
    assert sources.keys() == GOOD.keys()
    assert [list(rule(sources)) for rule in RULES] == [[] for _ in RULES]


@pytest.mark.parametrize("case", BAD)
def test_a_broken_wall_is_seen(tmp_path: Path, case: str) -> None:
    rule, path, addition = BAD[case]
    sources = build(tmp_path, GOOD | {path: f"{GOOD.get(path, '')}\n{addition}"})
    assert any(path in violation for violation in rule(sources))


# Written in pieces, so that this file does not match itself.
HERE_ONLY = re.compile(
    "|".join(
        "".join(parts)
        for parts in (
            ("/wo", "rk/"),
            ("/ro", "ot/"),
            ("/ho", r"me/\w"),
            ("py", r"pi\.org"),
            ("python", "hosted"),
            ("registry", r"\.np", "mjs"),
            ("download", r"\.py", "torch"),
            ("index", "-url"),
            ("find", "-links"),
        )
    ).encode()
)


def only_here(data: bytes) -> list[str]:
    return [match[0].decode() for match in HERE_ONLY.finditer(data)]


def test_nothing_names_this_machine_or_a_registry() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and path.suffix != ".safetensors":
            assert only_here(path.read_bytes()) == [], name


@pytest.mark.parametrize("text", ["cd /wo{}rk/x", "/ro{}ot/.cache", "https://py{}pi.org/simple"])
def test_such_a_name_is_seen(text: str) -> None:
    assert only_here(text.format("").encode())
    assert not only_here(text.encode())
