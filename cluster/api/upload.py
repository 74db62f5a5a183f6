"""A multipart upload, parsed as it arrives: the file's bytes go on at once and are never collected.

(Starlette's own form parser writes the file to a temporary one first.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from cluster.api.errors import invalid
from cluster.api_errors import ApiError
from cluster.artifacts import ArtifactWriter
from cluster.artifacts.store import BLOCK

_LONGEST_FIELD = 1024
_MOST_PARTS = 8
_MOST_AROUND = 256 << 10  # bytes of the form beside the file: heads, fields, what follows the end


@dataclass
class Form:
    """What came: the fields, and the name of the file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


class _Parts:
    """The parser's callbacks. What they are told waits to be taken.

    `waiting`: bytes of the file that `take` returns.
    """

    def __init__(self) -> None:
        self.form = Form()
        self.file_bytes = 0
        self.waiting = 0
        self._file: list[bytes] = []
        self.ended = False
        self._count = 0
        self._header = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._is_file = False
        self._content = bytearray()

    def on_part_begin(self) -> None:
        self._count += 1
        if self._count > _MOST_PARTS:
            raise invalid(f"The form has more than {_MOST_PARTS} parts")
        self._headers, self._content = {}, bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = b"filename" in options
        if self._is_file:
            if self._name != "file" or self.form.filename is not None:
                raise invalid("Send one file, in the field `file`", "file")
            self.form.filename = options[b"filename"].decode("utf-8", "replace")
        elif self._name in self.form.fields:
            raise invalid(f"{self._name} is given twice", self._name[:64])

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._file.append(data[start:end])
            self.file_bytes += end - start
            self.waiting += end - start
            return
        self._content += data[start:end]
        if len(self._content) > _LONGEST_FIELD:
            raise invalid(f"{self._name[:64]} is too long", self._name[:64])

    def on_part_end(self) -> None:
        if not self._is_file:
            self.form.fields[self._name] = self._content.decode("utf-8", "replace")

    def on_end(self) -> None:
        self.ended = True

    def take(self) -> bytes:
        """What came of the file since the last time."""
        taken = b"".join(self._file)
        self._file, self.waiting = [], 0
        return taken


async def receive(
    request: Request, begin: Callable[[], Awaitable[ArtifactWriter]], idle_s: float
) -> tuple[Form, ArtifactWriter]:
    """Read the request's form; the file goes to the writer that `begin` makes when it comes.

    Raises:
        ApiError: the body is no such form, breaks off, or no byte of it came for `idle_s`.
        ArtifactTooLarge, ArtifactUnavailable: from the writer.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(415, "Send the file as multipart/form-data, in the field `file`")
    parts = _Parts()
    callbacks = {name: getattr(parts, name) for name in dir(parts) if name.startswith("on_")}
    sink: _Sink | None = None
    size = 0
    try:
        parser = MultipartParser(options[b"boundary"], callbacks)  # type: ignore[arg-type]
        async for chunk in _chunks(request, idle_s):
            parser.write(chunk)
            size += len(chunk)
            if size - parts.file_bytes > _MOST_AROUND:
                raise ApiError(413, f"The form has more than {_MOST_AROUND} bytes beside its file")
            if sink is None and parts.form.filename is not None:
                sink = _Sink(await begin())
            if sink is not None and parts.waiting >= BLOCK:
                await sink.put(parts.take())
        if not parts.ended:
            raise invalid("The form breaks off before its end; upload it again")
        if sink is None:
            raise invalid("file is required", "file", "missing_required_parameter")
        await sink.put(parts.take())
        await sink.settle()
    except FormParserError as error:
        raise invalid(f"The form cannot be read: {str(error)[:100]}") from None
    finally:
        if sink is not None:
            await sink.rest()
    return parts.form, sink.writer


class _Sink:
    """A writer that takes one block while the next one is received."""

    def __init__(self, writer: ArtifactWriter) -> None:
        self.writer = writer
        self._writing: asyncio.Future[None] | None = None

    async def put(self, block: bytes) -> None:
        """Begin to write a block, after the one before it. Raises what that one's writing did."""
        await self.settle()
        self._writing = asyncio.ensure_future(run_in_threadpool(self.writer.write, block))

    async def settle(self) -> None:
        """Wait until all is written."""
        if self._writing is not None:
            await asyncio.shield(self._writing)

    async def rest(self) -> None:
        """Wait until nothing is being written, however it ended: then the writer may be closed."""
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)


async def _chunks(request: Request, idle_s: float) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(idle_s):  # unlike wait_for: no task for each chunk
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(408, f"No byte came for {idle_s:g} s; upload it again") from None
        yield chunk
