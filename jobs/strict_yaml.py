"""YAML without its traps: no objects, no aliases, no key given twice, no file without end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from safeft.errors import SpecError

MAX_BYTES = 64 * 1024


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses aliases (a few lines can expand to gigabytes) and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*) are not supported", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key} is given twice", problem_mark=key_node.start_mark
                )
            seen[key] = key_node
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, takes 5e-5 for a string because it has no dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+"), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """The content of a small YAML file.

    Raises:
        SpecError: it cannot be read, is larger than 64 KiB, is not UTF-8 or not YAML, uses
            aliases, or gives a key twice. The message names file and line.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_BYTES:
        raise SpecError(f"{path}: is larger than {MAX_BYTES // 1024} KiB, so it is not a job spec")
    try:
        return yaml.load(raw.decode("utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise SpecError(f"{path}: {line}{error.problem or 'not valid YAML'}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: is not valid YAML ({str(error).splitlines()[0]})") from error
