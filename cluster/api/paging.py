"""Lists in OpenAI's shape, newest first, going on after the last object of the page before."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from fastapi import Query
from sqlalchemy import Select, and_, or_
from sqlalchemy.orm import Session

from cluster.api.errors import not_found
from cluster.state.models import File, Job

R = TypeVar("R", File, Job)
After = Annotated[str | None, Query(max_length=64, description="The last id of the page before.")]
Order = Literal["asc", "desc"]


def page(
    session: Session,
    query: Select[R],
    model: type[R],
    after: str | None,
    limit: int,
    order: Order = "desc",
) -> tuple[list[R], bool]:
    """So many rows after the row `after`, and whether there are more.

    Raises:
        ApiError: 404, there is no row `after`.
    """
    newest = order == "desc"
    if after is not None:
        last = session.get(model, after)
        if last is None:
            raise not_found("object", after)
        at, same = (
            (model.created_at < last.created_at, model.id < last.id)
            if newest
            else (model.created_at > last.created_at, model.id > last.id)
        )
        query = query.where(or_(at, and_(model.created_at == last.created_at, same)))
    keys = (model.created_at, model.id)
    query = query.order_by(*(key.desc() if newest else key.asc() for key in keys))
    found = list(session.scalars(query.limit(limit + 1)))
    return found[:limit], len(found) > limit


def listed(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """OpenAI's list object."""
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
