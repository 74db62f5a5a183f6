"""Ends a controller whose Ray is gone for good.

A process cannot leave a Ray that died: it stays bound to it, also where another one answers at the
same address, and asks it in vain for ever. A controller holds nothing that matters, so it ends, and
whoever supervises it starts one that finds the new Ray.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
import ray.exceptions
import ray.util

log = logging.getLogger(__name__)
_LOOK_S = 2.0
_PATIENCE_S = 60.0
EXIT_CODE = 75  # EX_TEMPFAIL: try again


def same_ray() -> bool:
    """Whether the node that this process is connected to belongs to the Ray that answers."""
    try:
        # First: `ray.nodes` aborts the process where another Ray answers.
        ray.util.list_named_actors(all_namespaces=True)
    except ray.exceptions.AuthenticationError:  # "WrongClusterID": it has another one's number
        return False
    mine = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == mine and node["Alive"] for node in ray.nodes())


def end_process(why: str) -> None:
    """End this process at once: threads that wait for Ray would hold an orderly end up."""
    log.error("%s; this controller ends, so that another one can be started", why)
    logging.shutdown()
    os._exit(EXIT_CODE)


@contextmanager
def watched_ray(
    look: Callable[[], bool] = same_ray,
    lost: Callable[[str], None] = end_process,
    *,
    look_s: float = _LOOK_S,
    patience_s: float = _PATIENCE_S,
) -> Iterator[None]:
    """While the block runs, call `lost` once if Ray is another one, or silent for too long.

    Args:
        look: False where Ray answers and is another one; raises, or hangs, where it is silent.
    """
    over = threading.Event()
    answered = time.monotonic()
    gone = threading.Event()

    def looks() -> None:
        nonlocal answered
        while not over.wait(look_s):
            try:
                if not look():
                    gone.set()
            except Exception as error:  # noqa: BLE001  (whatever it is: no answer)
                log.warning("Ray does not answer (%s)", type(error).__name__)
            else:
                answered = time.monotonic()

    def judges() -> None:
        while not over.wait(look_s):
            if gone.is_set():
                lost("the Ray that it was connected to is gone")
                return
            if time.monotonic() - answered > patience_s:
                lost(f"Ray has not answered for {patience_s:g} s")
                return

    for work in (looks, judges):
        threading.Thread(target=work, daemon=True, name=f"ray-watch-{work.__name__}").start()
    try:
        yield
    finally:
        over.set()
