"""What `make lint` says about dependencies, without a network: ``python -m tests.dependencies``.

It compares three things that have to tell the same story: pyproject.toml (ranges),
constraints.txt (one version of everything), and what is imported. Known vulnerabilities are
another matter, and need a service that knows them: `make audit`.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical
from packaging.version import Version

ROOT = Path(__file__).parent.parent
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)")
#: Extras that need another environment than ours, with other versions: nothing of them is here.
_ELSEWHERE = {"vllm"}
#: Used without an import: drivers, what moto needs for its server, types.
_NOT_IMPORTED = {"psycopg", "flask", "flask-cors", "types-pyyaml"}
_TOOLS = {"ruff", "mypy", "pytest", "pytest-xdist"}
#: Imported, and declared by declaring what they are a part of.
_PART_OF = {
    "botocore": "boto3",
    "grpcio": "ray",
    "huggingface-hub": "transformers",
    "markupsafe": "jinja2",
    "pillow": "matplotlib",
    "pydantic-core": "pydantic",
    "starlette": "fastapi",
    "tokenizers": "transformers",
}
#: Comes with its own build's companions (CUDA), which differ by where torch was installed from.
_UNPINNED_BELOW = {"torch"}


def pins(text: str) -> tuple[dict[str, Version], list[str]]:
    """The versions of a constraints file, and what is wrong with it."""
    found: dict[str, Version] = {}
    wrong = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _PIN.fullmatch(line)
        if match is None:
            wrong.append(f"constraints.txt:{number}: {line!r} is not name==version")
        elif canonical(match[1]) in found:
            wrong.append(f"constraints.txt:{number}: {match[1]} is there twice")
        else:
            found[canonical(match[1])] = Version(match[2])
    return found, wrong


def declared(project: dict[str, object]) -> tuple[list[Requirement], list[str]]:
    """What pyproject.toml asks for, extras among it, and what it names twice."""
    extras = dict(project["optional-dependencies"])  # type: ignore[call-overload]
    here = [extra for name, extra in extras.items() if name not in _ELSEWHERE]
    lists = [project["dependencies"], *here]
    all_of_them = [Requirement(text) for some in lists for text in some]
    counts = Counter(canonical(one.name) for one in all_of_them)
    twice = [f"pyproject.toml: {name} is there twice" for name, n in counts.items() if n > 1]
    return all_of_them, twice


def uncovered(asked: Iterable[Requirement], pinned: dict[str, Version]) -> list[str]:
    """Requirements without a pin, or whose range has no place for it."""
    wrong = []
    for one in asked:
        pin = pinned.get(canonical(one.name))
        if pin is None:
            wrong.append(f"constraints.txt: has no version of {one.name}")
        elif not one.specifier.contains(pin, prereleases=True):
            wrong.append(f"constraints.txt: {one.name}=={pin} is not {one.specifier}")
    return wrong


def unpinned(asked: Iterable[Requirement], pinned: dict[str, Version]) -> list[str]:
    """What is installed because of `asked`, and has no pin or another version than its pin."""
    wrong, seen, waiting = [], set(), list(asked)
    while waiting:
        one = waiting.pop()
        name = canonical(one.name)
        if (name, *one.extras) in seen or not _applies(one, set()):
            continue
        seen.add((name, *one.extras))
        try:
            there = Version(version(name))
        except PackageNotFoundError:
            continue  # `pip check` says so
        if name not in pinned:
            wrong.append(f"constraints.txt: has no version of {name}, which is installed")
        elif Version(there.public) != pinned[name]:
            wrong.append(f"constraints.txt: {name}=={pinned[name]}, but {there} is installed")
        if name not in _UNPINNED_BELOW:
            below = [Requirement(text) for text in requires(name) or []]
            waiting += [Requirement(str(r).split(";")[0]) for r in below if _applies(r, one.extras)]
    return sorted(set(wrong))


def _applies(one: Requirement, extras: set[str]) -> bool:
    if one.marker is None:
        return True
    return any(one.marker.evaluate({"extra": extra}) for extra in (*extras, ""))


def imported(directories: Iterable[str]) -> Iterator[str]:
    """The distributions that the Python files of these directories import."""
    owners = packages_distributions()
    for directory in directories:
        for path in sorted((ROOT / directory).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                else:
                    continue
                for name in names:
                    yield from map(canonical, owners.get(name.split(".")[0], []))


def misused(asked: Iterable[Requirement], used: set[str]) -> list[str]:
    """What is asked for and imported nowhere, and what is imported and not asked for."""
    names = {canonical(one.name) for one in asked}
    idle = sorted(names - used - _NOT_IMPORTED - _TOOLS)
    missing = sorted(name for name in used - names if _PART_OF.get(name) not in names)
    return [
        *(f"pyproject.toml: {name} is imported nowhere" for name in idle),
        *(f"pyproject.toml: {name} is imported and not there" for name in missing),
    ]


def problems(pyproject: str, constraints: str, used: set[str]) -> list[str]:
    """Everything that is wrong, in words; `used` is what is imported."""
    pinned, wrong = pins(constraints)
    project = tomllib.loads(pyproject)["project"]
    asked, twice = declared(project)
    used = used - {canonical(project["name"])}  # ours, where it is installed
    return [
        *wrong,
        *twice,
        *uncovered(asked, pinned),
        *unpinned(asked, pinned),
        *misused(asked, used),
    ]


def main() -> None:
    """Exit with 1 where anything is wrong."""
    used = set(imported(("safeft", "jobs", "cluster", "benchmarks", "tests")))
    texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt")]
    wrong = problems(texts[0], texts[1], used)
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
