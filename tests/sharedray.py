"""One Ray for all tests of a process that need a Ray, whichever: starting one takes seconds."""

from __future__ import annotations

import os
import uuid
from contextlib import ExitStack
from pathlib import Path

import pytest


class SharedRay:
    """Started when first asked for, and again after it was stopped.

    Args:
        cache: what its processes find in SAFEFT_CACHE, whichever test they were started for.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._running = ExitStack()

    def start(self) -> None:
        """Two processors, which `embedded_ray` finds from now on; nothing if it runs."""
        import ray

        from jobs.runtime import embedded_ray
        from tests.tinyjob import MARK

        if not ray.is_initialized():
            os.environ.setdefault(MARK, uuid.uuid4().hex)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SAFEFT_CACHE", str(self._cache))
                self._running.enter_context(embedded_ray(num_cpus=2))

    def stop(self) -> None:
        """Nothing if none runs."""
        self._running.close()
