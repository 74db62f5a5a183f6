"""GGUF to safetensors, once, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from safeft.errors import ModelError
from safeft.models.convert_gguf import STEP
from safeft.models.explain import explain
from safeft.progress import Progress

_STEPS = 4  # starting, and the three that convert_gguf prints


def convert_gguf(what: str, gguf: Path, into: Path, progress: Progress) -> None:
    """Write the model in `gguf` into the directory `into` as fp32 safetensors with its tokenizer.

    Args:
        what: names the model in messages.

    Raises:
        ModelError: transformers cannot read this GGUF, the disk is full, or memory ran out.
    """
    program = Path(__file__).with_name("convert_gguf.py")
    log = gguf.with_suffix(".log")
    progress(f"converting {gguf.name}", 0, _STEPS)
    with (
        open(log, "wb") as stderr,
        subprocess.Popen(
            # -P: this directory's modules must not hide the packages of the same names.
            [sys.executable, "-P", str(program), str(gguf), str(into)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
            # Everything needed is in the file: no network.
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        ) as process,
    ):
        assert process.stdout is not None
        try:
            steps = (line for line in process.stdout if line.startswith(STEP))
            for done, line in enumerate(steps, start=1):
                label = line.removeprefix(STEP).strip()
                progress(f"converting {gguf.name}: {label}", done, _STEPS)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise _failed(f"{what}: cannot convert {gguf.name}", process.returncode, log)


def _failed(what: str, code: int, log: Path) -> ModelError:
    if code == -signal.SIGKILL:
        return ModelError(f"{what}: killed, probably for want of memory")
    # The last line of a traceback is the error itself.
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code == -signal.SIGBUS:  # writing through mmap on a full disk
        lines.append("No space left on device")
    return explain(what, lines[-1] if lines else f"exit code {code}")
