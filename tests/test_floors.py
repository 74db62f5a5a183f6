"""The staircase: cluster -> jobs -> safeft, and safeft stands without what is above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("safeft", "jobs", "cluster")
NOT_FOR_SAFEFT = {
    *("ray", "deepspeed", "fastapi", "starlette", "uvicorn", "httpx", "requests", "aiohttp"),
    *("boto3", "sqlalchemy", "pydantic", "pyarrow", "rich", "typer", "matplotlib"),
}


def modules(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def imported(nodes: list[ast.stmt]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_only(floor: str) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    assert modules(floor)
    for path in modules(floor):
        everywhere = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.stmt)]
        assert not above & set(imported(everywhere)), path


def test_safeft_names_no_ray_deepspeed_or_http_at_module_level() -> None:
    for path in modules("safeft"):
        assert not NOT_FOR_SAFEFT & set(imported(ast.parse(path.read_text()).body)), path


def test_every_safeft_module_imports_where_ray_deepspeed_and_pydantic_are_not_installed() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in modules("safeft")
    ]
    blocked = sorted({"ray", "deepspeed", "pydantic", "pyarrow", "fastapi", "boto3", "matplotlib"})
    program = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in {blocked!r}:
            return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import importlib
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_what_ray_starts_to_keep_count_or_ask_imports_no_torch() -> None:
    """Serving's exporter, keeper, prober and gateway, and training's mailbox: a second or two each.

    Batches of rows and the measuring of models come with the packages that these read names from.
    """
    program = """
import sys
import cluster.serving.actors, jobs.finetune.telemetry
from safeft.data import collate, encode_prompt
from safeft.evaluate import AnswerClass
print([m for m in ("torch", "transformers", "peft", "deepspeed") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_the_api_imports_neither_transformers_nor_peft() -> None:
    """It knows the constraints' settings, which torch comes with, but never touches a model."""
    program = """
import sys
import cluster.api
print([m for m in ("transformers", "peft", "deepspeed", "ray") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_no_file_outgrows_its_room() -> None:
    for floor in FLOORS:
        for path in modules(floor):
            assert len(path.read_text().splitlines()) <= 300, path
