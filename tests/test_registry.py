"""Registries: names that clash, names that go, plug-ins that break."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from workbench import registry as registry_module
from workbench.config import ConfigError
from workbench.contract import feedforwards
from workbench.registry import PLUGIN_FILES, Registry, import_variables, plug_in

pytestmark = pytest.mark.process

SOURCE = """
from typing import Literal
from workbench.config import Config

class Thing:
    class Config(Config):
        kind: Literal["thing"] = "thing"
        size: int = 1
"""


def load(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    (folder / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(folder))
    module = __import__(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module.Thing


def empty_registry() -> Registry[Any]:
    """A registry of a package without modules."""
    return Registry("thing", "nothing_registered")


@pytest.fixture(autouse=True)
def _package_without_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("nothing_registered")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "nothing_registered", package)


def test_a_clash_names_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    things = empty_registry()
    things.register(load(tmp_path, "first_thing", monkeypatch))
    second = load(tmp_path, "second_thing", monkeypatch)
    with pytest.raises(TypeError, match=r"'thing' is registered by .*first_thing\.py .*second_thing\.py"):
        things.register(second)
    things.unregister("thing")
    assert things.register(second) is second and things.names() == ["thing"] and "thing" in things
    things.unregister("thing")
    things.unregister("thing")
    assert list(things) == []


def test_what_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match="needs a nested Config"):
        empty_registry().register(type("Bare", (), {}))


def test_parse_and_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    things = empty_registry()
    things.register(load(tmp_path, "third_thing", monkeypatch))
    assert things.parse("thing").size == things.parse({}, "thing").size == 1
    for data, text in (
        ("thin", "Nearest valid name: 'thing'"),
        ({}, "got 'nothing'"),
        ({"kind": []}, "kind: got []"),
        (3, "got 3"),
        ({"kind": "thing", "sizze": 1}, "'size'"),
    ):
        with pytest.raises(ConfigError) as raised:
            things.parse(data)
        assert text in str(raised.value)


def test_a_broken_entry_point_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("broken", "no_such_module_anywhere", registry_module.ENTRY_POINT_GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    monkeypatch.setattr(registry_module, "broken_plugins", {})
    empty_registry().names()
    assert "ModuleNotFoundError" in registry_module.broken_plugins["broken"]


def test_a_file_is_plugged_in_here_and_in_child_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "throwaway_variant.py"
    text = (
        "from typing import Literal\nfrom workbench.contract import Cost, FeedForward, VariantConfig, feedforwards\n"
        "@feedforwards.register\nclass Nothing(FeedForward):\n    class Config(VariantConfig):\n"
        "        kind: Literal['nothing_{0}'] = 'nothing_{0}'\n    said = {1}\n"
    )
    monkeypatch.setenv(PLUGIN_FILES, "")
    try:
        for version in (1, 2):  # edited, and plugged in again
            path.write_text(text.format("a", version))
            plug_in(path)
            assert feedforwards["nothing_a"].said == version
        code = "from workbench.contract import feedforwards; print(feedforwards['nothing_a'].said)"
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert answer.stdout == "2\n"
    finally:
        feedforwards.unregister("nothing_a")
    with pytest.raises(ConfigError, match="no such file"):
        plug_in(tmp_path / "throwaway_varian.py")


THING = """
from typing import Literal
from workbench.contract import FeedForward, VariantConfig, feedforwards

@feedforwards.register
class Thing(FeedForward):
    class Config(VariantConfig):
        kind: Literal["thing_{0}"] = "thing_{0}"
"""


@pytest.mark.parametrize("by", ["plug_in", "environment"])
def test_a_file_may_be_named_like_a_module(by: str, tmp_path: Path) -> None:
    """Under these names torch finds the standard library's modules, whether it is imported before or afterwards."""
    names = ("queue", "random", "secrets")
    for folder, name in enumerate(("queue", "random", "secrets", "queue")):
        (tmp_path / str(folder)).mkdir()
        (tmp_path / str(folder) / f"{name}.py").write_text(THING.format(folder))
    files = [f"{folder}/{name}.py" for folder, name in enumerate((*names, "queue"))]  # relative paths
    script = f"""
import os
from workbench.registry import broken_plugins, plug_in
if {by!r} == "plug_in":
    for file in {files}:
        plug_in(file)
else:
    os.environ["WORKBENCH_PLUGINS"] = os.pathsep.join({files})
import queue, random, secrets
from torch.utils.data import DataLoader
from workbench.contract import feedforwards
print(sorted(set(feedforwards) & {{"thing_0", "thing_1", "thing_2", "thing_3"}}), broken_plugins)
print(len(list(DataLoader(range(4), num_workers=1))), queue.Queue and random.random and secrets.token_hex and "ok")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "WORKBENCH_PLUGINS": ""}
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert answer.stdout == "['thing_0', 'thing_1', 'thing_2', 'thing_3'] {}\n4 ok\n", answer.stdout + answer.stderr


def test_a_listed_file_that_does_not_exist_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(PLUGIN_FILES, str(tmp_path / "absent.py"))
    monkeypatch.setattr(registry_module, "broken_plugins", {})
    empty_registry().names()
    assert "No such file" in registry_module.broken_plugins[str(tmp_path / "absent.py")]


def test_a_path_that_cannot_be_passed_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "x.py").touch()
    with pytest.raises(ConfigError, match="a path with ':'"):
        plug_in(tmp_path / "a:b" / "x.py")


def test_a_process_imports_nothing_from_the_folder_it_starts_in(tmp_path: Path) -> None:
    (tmp_path / "optuna.py").write_text("print('foreign')")
    code = "import optuna, workbench; print(optuna.__file__); print(workbench.__file__)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **import_variables()},
        capture_output=True,
        text=True,
        check=True,
    )
    optuna, package = process.stdout.split()
    assert not optuna.startswith(str(tmp_path))
    assert package == registry_module.__file__.replace("registry.py", "__init__.py")
