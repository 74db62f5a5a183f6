"""``safeft doctor``: is this machine ready, and if not, what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli.console import out, print_json

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "pyarrow", "safetensors")
NEEDED_DISK_GB = 3.0
NEEDED_MEMORY_GB = 8.0


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, what was found, and what to do if it is not good."""

    name: str
    found: str
    good: bool
    remedy: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check Python, packages, processors, memory, disk and the cache."""
    findings = [_python(), *(_package(name) for name in PACKAGES), *_machine(), _cache()]
    if as_json:
        print_json([asdict(check) for check in findings])
    else:
        table = Table("", "check", "found", "what to do")
        for check in findings:
            mark = "[green]ok[/]" if check.good else "[red]no[/]"
            table.add_row(mark, check.name, escape(check.found), escape(check.remedy))
        out.print(table)
    if not all(check.good for check in findings):
        raise typer.Exit(1)


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Check("Python", found, good, "" if good else "install 3.11 or newer")


def _package(name: str) -> Check:
    try:
        return Check(name, importlib.metadata.version(name), True)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "not installed", False, f"pip install {name}, or make a new .venv")


def _machine() -> list[Check]:
    import psutil

    try:
        import torch
    except ImportError:
        gpus = 0
    else:
        gpus = torch.cuda.device_count()
    memory = psutil.virtual_memory().total / 2**30
    return [
        Check("processors", str(os.cpu_count()), True),
        Check(
            "memory",
            f"{memory:.1f} GiB",
            memory >= NEEDED_MEMORY_GB,
            "" if memory >= NEEDED_MEMORY_GB else f"the demo needs {NEEDED_MEMORY_GB:.0f} GiB",
        ),
        Check("GPUs", str(gpus) if gpus else "none: everything runs on the processor", True),
    ]


def _cache() -> Check:
    from safeft.cache import cache_root

    root = cache_root()
    there = root
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / 2**30
    writable = os.access(there, os.W_OK)
    good = writable and free >= NEEDED_DISK_GB
    remedy = "" if good else f"free {NEEDED_DISK_GB:.0f} GiB or set SAFEFT_CACHE elsewhere"
    return Check("cache", f"{root}, {free:.1f} GiB free", good, remedy)
