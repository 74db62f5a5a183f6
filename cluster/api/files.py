"""/v1/files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import Select, select
from starlette.concurrency import run_in_threadpool

from cluster.api.auth import FilesReader, FilesWriter
from cluster.api.errors import invalid, not_found
from cluster.api.idempotency import Key, Repeatable, fingerprint, once
from cluster.api.paging import After, Order, listed, page
from cluster.api.services import Services, With
from cluster.api.upload import Form, receive
from cluster.api_errors import ApiError
from cluster.artifacts import ArtifactTooLarge, ArtifactWriter, Stored
from cluster.artifacts.names import file_key
from cluster.controller.phases import FINAL
from cluster.state import TenantSession
from cluster.state.ids import new_id
from cluster.state.models import WHOLE, File, Job
from cluster.tenancy import quotas
from cluster.tenancy.audit import record
from cluster.tenancy.keys import Caller

router = APIRouter(prefix="/v1/files", tags=["files"])
_CONTROL = dict.fromkeys([*range(32), *range(127, 160)])
_NO_ROOM = (
    "max_storage_bytes: the file does not fit beside your other ones and those that are being "
    "uploaded; delete files, or wait for the uploads"
)
_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=_UPLOAD_BODY)
async def upload(
    request: Request, services: With, caller: FilesWriter, key: Key = None
) -> dict[str, Any]:
    """Upload a dataset. It is hashed on its way into the store and never rests in between."""
    file_id = new_id("file")
    most = room = _most(request, services)
    with ExitStack() as stack:

        async def begin() -> ArtifactWriter:
            nonlocal room
            key, room = await run_in_threadpool(_announce, services, caller, file_id, most)
            stack.callback(_forget, services, caller, file_id)
            return stack.enter_context(services.store.writer(key, room))

        try:
            form, writer = await receive(request, begin, services.upload_idle_s)
            _check(form)
            stored = await run_in_threadpool(writer.commit)
            if stored.bytes == 0:
                raise invalid("The file is empty", "file")
            content = (str(form.filename).encode(), stored.sha256.encode())
            post = Repeatable(key, fingerprint(request, *content))
            found, new = await run_in_threadpool(
                _accept, services, caller, post, file_id, form, stored
            )
            if new:
                stack.pop_all()  # the file stays
        except ArtifactTooLarge as error:
            if room < most:
                raise quotas.QuotaExceeded(_NO_ROOM) from error
            raise
        finally:
            await run_in_threadpool(stack.close)
    return found


def _most(request: Request, services: Services) -> int:
    """Bytes that the file can have. Nobody reserves more: others of the tenant upload, too."""
    most, length = services.settings.max_upload_bytes, request.headers.get("content-length", "")
    return min(most, int(length)) if length.isdecimal() else most


def _announce(services: Services, caller: Caller, file_id: str, most: int) -> tuple[str, int]:
    """A row before the first byte, so that what a killed server leaves in the store is known.

    Its `bytes` are what the upload may store, reserved until it ends: uploads at the same time
    store no more than the tenant may have, either.
    """
    key = file_key(caller.tenant_id, file_id)
    with services.database.tenant(caller.tenant_id) as session:
        room = min(most, quotas.storage_left(session))
        if room == 0:
            raise quotas.QuotaExceeded(_NO_ROOM)
        session.add(
            File(
                id=file_id,
                tenant_id=caller.tenant_id,
                filename="",
                purpose="",
                bytes=room,
                key=key,
                created_at=services.clock(),
            )
        )
    return key, room


def _forget(services: Services, caller: Caller, file_id: str) -> None:
    """Take an upload back that was not accepted. What fails here is left to the sweep."""
    with services.database.tenant_read(caller.tenant_id) as session:
        row = session.get(File, file_id)
    if row is None or row.sha256 is not None:  # accepted, though nobody was told any more
        return
    services.store.delete(row.key)  # first: a row that is left tells the sweep what to remove
    with services.database.tenant(caller.tenant_id) as session:
        if (row := session.get(File, file_id, with_for_update=True)) is not None:
            session.delete(row)


def _check(form: Form) -> None:
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise invalid("purpose is required", "purpose", "missing_required_parameter")
    if purpose != "fine-tune":
        raise invalid(f"purpose must be 'fine-tune', not {purpose[:40]!r}", "purpose")
    if unknown := sorted(form.fields.keys() - {"purpose"}):
        raise invalid(f"Unknown parameter: {unknown[0][:64]!r}", unknown[0][:64])


def _accept(
    services: Services,
    caller: Caller,
    post: Repeatable,
    file_id: str,
    form: Form,
    stored: Stored,
) -> tuple[dict[str, Any], bool]:
    now = services.clock()

    def effect(session: TenantSession) -> dict[str, Any]:
        if stored.bytes > quotas.storage_left(session, besides=file_id):
            raise quotas.QuotaExceeded(_NO_ROOM)
        row = session.get(File, file_id)
        if row is None or row.deleted_at is not None:
            raise ApiError(408, "The upload took too long and was given up; upload it again")
        row.filename = _shown_name(str(form.filename))
        row.purpose = form.fields["purpose"]
        row.bytes, row.sha256 = stored.bytes, stored.sha256
        answer = file_object(row)
        record(
            session,
            at=now,
            actor=caller.actor,
            tenant_id=caller.tenant_id,
            action="file.create",
            object_id=file_id,
            after={"bytes": stored.bytes, "sha256": stored.sha256},
        )
        return answer

    return once(services.database, caller, post, now, effect)


def _shown_name(given: str) -> str:
    """What is shown as the file's name; it is a path nowhere."""
    name = given.replace("\\", "/").rpartition("/")[2].translate(_CONTROL).strip()
    return name[-255:] or "file"


def present() -> Select[File]:
    """Files that are whole and not deleted."""
    return select(File).where(*WHOLE)


def file_of(session: TenantSession, file_id: str) -> File:
    """Raises ApiError 404 where the tenant has no such file."""
    found = session.scalars(present().where(File.id == file_id)).one_or_none()
    if found is None:
        raise not_found("File object", file_id)
    return found


def file_object(row: File) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": int(row.created_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
        "expires_at": None,
        "status_details": None,
    }


@router.get("")
def list_files(
    services: With,
    caller: FilesReader,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """The tenant's files."""
    query = present() if purpose is None else present().where(File.purpose == purpose)
    with services.database.tenant_read(caller.tenant_id) as session:
        rows, more = page(session, query, File, after, limit, order)
    return listed([file_object(row) for row in rows], more)


@router.get("/{file_id}")
def retrieve(file_id: str, services: With, caller: FilesReader) -> dict[str, Any]:
    """One file."""
    with services.database.tenant_read(caller.tenant_id) as session:
        return file_object(file_of(session, file_id))


@router.get("/{file_id}/content", response_class=StreamingResponse)
def content(file_id: str, services: With, caller: FilesReader) -> StreamingResponse:
    """The file's bytes."""
    with services.database.tenant_read(caller.tenant_id) as session:
        row = file_of(session, file_id)
    return download(services.store.read(row.key), row.filename)


def download(blocks: Iterator[bytes], filename: str) -> StreamingResponse:
    """Bytes that no browser takes for a page."""
    return StreamingResponse(
        blocks,
        media_type="application/octet-stream",
        headers={
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
            "X-Content-Type-Options": "nosniff",
        },
    )


@router.delete("/{file_id}")
def delete(file_id: str, services: With, caller: FilesWriter) -> dict[str, Any]:
    """Delete a file that no unfinished job needs."""
    now = services.clock()
    with services.database.tenant(caller.tenant_id) as session:
        row = file_of(session, file_id)
        uses = (Job.training_file == file_id) | (Job.validation_file == file_id)
        user = session.scalars(select(Job.id).where(uses, Job.phase.not_in(FINAL))).first()
        if user is not None:
            raise ApiError(409, f"{user} still needs this file; cancel it first", code="in_use")
        row.deleted_at = now
        record(
            session,
            at=now,
            actor=caller.actor,
            tenant_id=caller.tenant_id,
            action="file.delete",
            object_id=file_id,
            before={"bytes": row.bytes, "sha256": row.sha256},
        )
    services.store.delete(row.key)  # or the sweep does it, where this process ends here
    return {"id": file_id, "object": "file", "deleted": True}
