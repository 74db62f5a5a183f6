"""The API's description to read, made from its OpenAPI document.

Swagger UI and ReDoc would be loaded from somebody else's server, and their scripts could then read
the pages of whoever is logged in here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from cluster.api.pages.render import page

router = APIRouter()


@dataclass(frozen=True)
class Parameter:
    """`place`: path, query, header, or body."""

    name: str
    place: str
    type: str
    required: bool
    about: str


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    about: str
    parameters: list[Parameter]


@router.get("/reference")
def reference(request: Request) -> HTMLResponse:
    """Every route, with its parameters; the schemas of the bodies."""
    document = request.app.state.document()
    groups: dict[str, list[Operation]] = {}
    for path, methods in document["paths"].items():
        for method, found in methods.items():
            tag = found.get("tags", ["other"])[0]
            groups.setdefault(tag, []).append(_operation(method, path, found))
    schemas = document.get("components", {}).get("schemas", {})
    return page(
        request,
        "reference.html.j2",
        title=document["info"]["title"],
        about=document["info"]["description"],
        version=document["info"]["version"],
        groups=groups,
        schemas={name: json.dumps(schema, indent=2) for name, schema in sorted(schemas.items())},
    )


def _operation(method: str, path: str, found: dict[str, Any]) -> Operation:
    parameters = [
        Parameter(
            name=one["name"],
            place=one["in"],
            type=_type(one.get("schema", {})),
            required=one.get("required", False),
            about=one.get("description", ""),
        )
        for one in found.get("parameters", [])
    ]
    body = found.get("requestBody", {})
    for kind, content in body.get("content", {}).items():
        schema = content.get("schema", {})
        parameters.append(Parameter(kind, "body", _type(schema), body.get("required", False), ""))
    return Operation(method.upper(), path, found.get("description", ""), parameters)


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words; `#Name` where it is one of the schemas below."""
    if "$ref" in schema:
        return "#" + str(schema["$ref"]).rpartition("/")[2]
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(_type(one) for one in schema[several])
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    kind = str(schema.get("type", "any"))
    return f"{kind} of {_type(schema['items'])}" if "items" in schema else kind
