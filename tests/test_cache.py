"""The cache: a directory under its final name is whole, whatever interrupts the work."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from safeft.cache import (
    cache_root,
    discard_dir,
    is_disk_full,
    locked,
    publish_dir,
    require_disk,
    scratch_dir,
    sha256_file,
    write_whole,
)
from safeft.errors import InputError

REPOSITORY = Path(__file__).parent.parent


def leftovers(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if ".staging+" in path.name]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SAFEFT_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/home/somebody/mine")
    monkeypatch.delenv("SAFEFT_CACHE")
    assert cache_root() == Path("/xdg/safeft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("/home/somebody/.cache/safeft")


def test_a_files_checksum_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "file") == known


def test_a_published_directory_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "made" / "thing"
    with publish_dir(target) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("content")
        assert not target.exists()
        assert staging.parent == target.parent
    assert (target / "sub" / "file").read_text() == "content"
    assert leftovers(target.parent) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full"), SystemExit])
def test_an_interrupted_publication_leaves_nothing(
    tmp_path: Path, error: BaseException | type[BaseException]
) -> None:
    with pytest.raises((KeyboardInterrupt, OSError, SystemExit)):  # noqa: SIM117
        with publish_dir(tmp_path / "thing") as staging:
            (staging / "half").write_text("half")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_who_publishes_second_keeps_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with publish_dir(target) as second:
        (second / "file").write_text("second")
        with publish_dir(target) as first:
            (first / "file").write_text("first")
    assert (target / "file").read_text() == "first"
    assert leftovers(tmp_path) == []


def test_a_published_file_is_as_readable_as_its_directory(tmp_path: Path) -> None:
    with publish_dir(tmp_path / "thing") as staging:
        (staging / "private").write_text("")
        (staging / "private").chmod(0o600)
    directory, file = (tmp_path / "thing"), (tmp_path / "thing" / "private")
    assert file.stat().st_mode & 0o777 == directory.stat().st_mode & 0o666


def test_a_killed_publication_is_not_taken_for_whole_and_is_swept(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    program = (
        "import sys, time; from pathlib import Path; from safeft.cache import publish_dir\n"
        "with publish_dir(Path(sys.argv[1])) as staging:\n"
        "    (staging / 'half').write_text('half'); print('half', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE, cwd=REPOSITORY
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        with publish_dir(tmp_path / "other"):  # its owner is alive: left alone
            pass
        assert len(leftovers(tmp_path)) == 1
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert len(leftovers(tmp_path)) == 1
    with scratch_dir(tmp_path / "another"):
        assert len(leftovers(tmp_path)) == 1  # only the new one
    assert leftovers(tmp_path) == []


def test_the_staging_of_another_host_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / f".thing.staging+elsewhere.1+{2**22 + 1}+0123abcd"
    theirs.mkdir()
    with scratch_dir(tmp_path / "thing"):
        pass
    assert theirs.exists()


def test_a_discarded_directory_is_gone(tmp_path: Path) -> None:
    with publish_dir(tmp_path / "thing") as staging:
        (staging / "file").write_text("")
    discard_dir(tmp_path / "thing")
    assert list(tmp_path.iterdir()) == []


def hold(target: Path, inside: multiprocessing.Queue[str], release: object) -> None:
    with locked(target):
        inside.put("held")
        release.wait()  # type: ignore[attr-defined]


def test_a_second_process_waits_for_the_lock_and_says_so(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, release = context.Queue(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "thing", held, release))
    holder.start()
    assert held.get(timeout=30) == "held"
    said = threading.Event()
    labels: list[str] = []

    def progress(label: str, done: int, total: int | None) -> None:
        labels.append(label)
        said.set()

    def wait() -> None:
        with locked(tmp_path / "thing", progress):
            labels.append("inside")

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert said.wait(30)
    assert labels == ["waiting for another process that prepares thing"]
    release.set()
    waiter.join(30)
    holder.join(30)
    assert labels[-1] == "inside"


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, release = context.Queue(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "thing", held, release))
    holder.start()
    assert held.get(timeout=30) == "held"
    holder.kill()
    holder.join(30)
    with locked(tmp_path / "thing"):
        pass


def test_too_little_disk_names_what_is_needed_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9_000_000, 0, 5_000_000))
    require_disk(tmp_path / "not" / "yet" / "there", 5_000_000, "a model")
    with pytest.raises(InputError, match=r"a model: needs 6\.0 MB .* but 5\.0 MB is free"):
        require_disk(tmp_path / "not" / "yet" / "there", 6_000_000, "a model")


def test_a_full_disk_is_recognised_in_whatever_form_it_is_reported() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))


def test_a_file_that_could_not_be_written_whole_keeps_its_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_whole(path, "one")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
