"""Ray for one process: started here and gone afterwards, or a cluster that already runs."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from safeft.errors import InputError

_OBJECT_STORE_BYTES = 512 * 1024 * 1024
#: A Unix socket's path may have 107 bytes, and Ray adds up to 70 to its directory's.
_LONGEST_TEMP_DIR = 37
_CONNECT_S = 10.0

#: Read by Ray when it starts or when a run begins; what the user has set stays.
_DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # What Ray's C++ core would write on the terminal stays in its log files; failures are raised.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # How often the controller looks: 2 s by default, which is what each report() then takes.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
}
#: The same, where Ray is started here: no machine of a cluster of one is announced to go away.
_LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def worker_environment(*, use_gpu: bool) -> dict[str, str]:
    """What a training worker's process must have in its environment before it imports anything."""
    environment = {
        # DeepSpeed says weights_only=False; torch then obeys this, and never unpickles code.
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "DS_LOG_LEVEL": "error",
    }
    if not use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


@contextlib.contextmanager
def embedded_ray(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """Ray for the length of the block.

    Where this process already is connected to a Ray, that one is used and left as it is. While
    the block runs, SIGTERM and SIGHUP end it like Ctrl-C does. At its end, also through an
    exception, every process that was started here is gone.

    Args:
        address: of a running cluster (``host:port``); None starts Ray on this machine, with a
            directory of its own that is removed at the end.
        num_cpus: that the local Ray may give out; None: all of this process's processors.

    Raises:
        InputError: no Ray answers at `address`.
    """
    import ray

    for name, value in _DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield
        return
    for name, value in ({} if address else _LOCAL_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    temp_dir = None if address else _short_temp_dir()
    try:
        with _signals_restored(), _kept(address, temp_dir, num_cpus):
            yield
    finally:
        if temp_dir is not None:
            shutil.rmtree(temp_dir, ignore_errors=True)


def usable_cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _kept(address: str | None, temp_dir: Path | None, num_cpus: int | None) -> Iterator[None]:
    """Ray, started and shut down by a thread of its own.

    An interruption in the middle of ``ray.init`` would leave processes that nothing stops; in this
    thread it cannot be interrupted, only awaited. The thread lives as long as Ray does, because
    the kernel ends Ray's processes with the thread that started them.
    """
    import ray

    ready, finished = threading.Event(), threading.Event()
    failure: list[BaseException] = []

    def keep() -> None:
        try:
            if address:
                _connect(address)
            else:
                _start(temp_dir, num_cpus)
        except BaseException as error:  # noqa: BLE001  (raised in the thread that waits)
            failure.append(error)
        ready.set()
        finished.wait()
        ray.shutdown()

    thread = threading.Thread(target=keep, name="ray-keeper", daemon=True)
    thread.start()
    try:
        _await_ready(ready)
        if failure:
            raise failure[0]
        yield
    finally:
        _await_ready(ready)
        finished.set()
        thread.join()


def _await_ready(ready: threading.Event) -> None:
    """Ray replaces signal handlers while it starts; put ours back all the time."""
    _interrupt_on_signals()
    while not ready.wait(0.05):
        _interrupt_on_signals()
    _interrupt_on_signals()


def _start(temp_dir: Path | None, num_cpus: int | None) -> None:
    import ray

    _keep_token_private()
    # Ray listens on every interface, so its token authentication matters: ray.init turns it on for
    # a local cluster. (Setting RAY_AUTH_MODE after `import ray` would leave the driver without.)
    ray.init(
        address="local",  # never another Ray on this machine, whatever RAY_ADDRESS says
        num_cpus=num_cpus or usable_cpus(),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        _temp_dir=str(temp_dir),
        **_quiet(),
    )


def _keep_token_private() -> None:
    """Nobody but us reads the token that Ray is about to make, or has made: it lets code run.

    Ray would leave its file as the umask says. An empty one is written to, and keeps its mode.
    """
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be kept from others ({error.strerror}); make it yours, or name a "
            "token's file in RAY_AUTH_TOKEN_PATH"
        ) from error


def _connect(address: str) -> None:
    import ray

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise InputError(f"distributed.address: must be host:port of a Ray cluster, not {address}")
    try:
        # Ray itself tries for minutes.
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        ray.init(address=address, **_quiet())
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"distributed.address: no Ray answers at {address} ({first})") from error


def _quiet() -> dict[str, Any]:
    import ray

    # Ray prints a lost worker's end to our standard output even so. Its debugger turns it off thus.
    ray._private.worker._worker_logs_enabled = False
    return {"log_to_driver": False, "logging_level": logging.ERROR}


def _short_temp_dir() -> Path:
    """A new directory whose path leaves room for the names of Ray's sockets."""
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) > _LONGEST_TEMP_DIR - len("/safeft-12345678"):
        parent = Path("/tmp")
    return Path(tempfile.mkdtemp(prefix="safeft-", dir=parent))


def _interrupt_on_signals() -> None:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, so that every `finally` runs."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, interrupt)


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    """Put the signal handlers back at the end; only the main thread can have changed them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
