"""Ray Data from a dataset's files through a pool of scorers, as often as it takes to finish.

One reader a file streams blocks of rows; each is scored as a unit by one actor and written by the
driver as it arrives. Memory is bounded by what may be in flight, not by the dataset.
"""

from __future__ import annotations

import gc
import logging
import re
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from jobs.screening.blocks import BlockStore
from jobs.screening.scan import Scan, read_units
from safeft.data import RowLimits
from safeft.errors import InputError, MeasurementError, SafeftError
from safeft.progress import Progress

#: How often one scorer is started again, and how often the pool without a block in between.
_RESTARTS, _FRUITLESS_ATTEMPTS = 2, 2
_BLOCKS_PER_SCORER = 2  # one that is scored and one that waits
_IN_FLIGHT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Pool:
    """How many scorers there are; Ray Data grows the pool from `least` to `most` under load."""

    least: int
    most: int
    use_gpu: bool

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InputError(
                f"--max-scorers: {self.most} is less than the {self.least} of --scorers"
            )

    def threads(self) -> int:
        """What each scorer computes with, so that the largest pool fills the machines.

        Raises:
            InputError: so many scorers do not fit on the cluster.
        """
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        if self.use_gpu and self.most > gpus:
            raise InputError(f"--scorers: {self.most} do not fit on {gpus} GPUs")
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        for threads in range(max(cpus, default=0), 0, -1):
            if sum(count // threads for count in cpus) >= self.most:
                return threads
        raise InputError(f"--scorers: {self.most} do not fit on {sum(cpus)} processors")


def score_missing(
    scan: Scan,
    blocks: BlockStore,
    scorer: dict[str, Any],
    pool: Pool,
    limits: RowLimits,
    progress: Progress,
) -> None:
    """Score every block that is not finished. Ray must be running.

    A lost scorer is replaced, a pipeline that fails is started again for what is missing; only if
    no block was finished between two failures is there no point in trying once more.

    Args:
        scorer: arguments of `BlockScorer`, without the number of threads.

    Raises:
        InputError: the data changed, or the pool does not fit on the cluster.
        MeasurementError: scoring fails again and again.
    """
    from ray.data.exceptions import ExecutionTimeoutError, SystemException
    from ray.exceptions import RayError

    arguments = {**scorer, "threads": pool.threads(), "use_gpu": pool.use_gpu}
    fruitless = 0
    while missing := blocks.missing():
        before = blocks.rows_done
        failure: SafeftError | None = None
        progress("starting the scorers", 0, None)
        try:
            with closing(_scored(scan, missing, arguments, pool, limits)) as batches:
                for one in (row for batch in batches for row in batch.to_pylist()):
                    blocks.add(one["file"], one["block"], one["scores"])
                    progress("screening rows", blocks.rows_done, scan.rows)
            if blocks.rows_done == before:
                raise MeasurementError("screening lost rows, nothing is accepted; run it again")
        except (RayError, ExecutionTimeoutError, SystemException) as error:
            fruitless = 0 if blocks.rows_done > before else fruitless + 1
            failure = _failure(error, hopeless=fruitless == _FRUITLESS_ATTEMPTS)
        # The error's frames hold handles of living scorers, and these hold processors.
        gc.collect()
        if failure is not None:
            raise failure
    progress("screening rows", scan.rows, scan.rows)


def _scored(
    scan: Scan,
    missing: dict[int, frozenset[int]],
    arguments: dict[str, Any],
    pool: Pool,
    limits: RowLimits,
) -> Generator[pa.Table, None, None]:
    """Tables of `SCORED_SCHEMA` in the order in which blocks are finished."""
    import ray.data
    from ray.data import DataContext
    from ray.util.annotations import RayDeprecationWarning

    from jobs.screening.scorer import BlockScorer

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of settings that a copy sets again
        context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # Ray would gather small blocks into one; a unit is to travel, fail and be scored by itself.
    context.target_max_block_size = 1
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=_IN_FLIGHT_BYTES * pool.most
    )
    with DataContext.current(context), warnings.catch_warnings():
        # Ray's own numbers are "for ever"; a scorer that dies each time must end the screening.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        units = ray.data.read_datasource(
            _datasource(scan, missing, limits),
            num_cpus=0,  # the scorers hold the processors; reading takes next to nothing
            concurrency=min(len(missing), pool.most),
            override_num_blocks=len(missing),
        )
        scored = units.map_batches(
            BlockScorer,
            fn_constructor_kwargs=arguments,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.least,
                max_size=pool.most,
                max_tasks_in_flight_per_actor=_BLOCKS_PER_SCORER,
            ),
            num_cpus=1,
            num_gpus=1 if pool.use_gpu else 0,
            scheduling_strategy="SPREAD",
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )
        yield from scored.iter_batches(batch_size=None, batch_format="pyarrow")


def _datasource(scan: Scan, missing: dict[int, frozenset[int]], limits: RowLimits) -> Any:
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Units(Datasource):  # type: ignore[misc]
        """One read task a file. Local files are read where the driver is, objects anywhere."""

        @property
        def supports_distributed_reads(self) -> bool:
            return all(scan.files[number].file.etag is not None for number in missing)

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[Any]:
            unknown = BlockMetadata(None, None, input_files=None, exec_stats=None)
            return [
                ReadTask(partial(read_units, scan.files[number], number, left, limits), unknown)
                for number, left in missing.items()
            ]

    return Units()


def _failure(error: BaseException, *, hopeless: bool) -> SafeftError | None:
    """What to raise for an error of the pipeline; None: it is worth another attempt."""
    causes = list(_causes(error))
    if ours := next((c for c in causes if isinstance(c, SafeftError)), None):
        return type(ours)(*ours.args)
    if not hopeless and _lost_a_process(causes):
        return None
    return MeasurementError(
        f"screening failed, nothing is accepted: {_said(error)}. Finished rows are kept: run it "
        "again to go on"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        inner = getattr(found, "cause", None)
        found = inner if isinstance(inner, BaseException) else found.__cause__


def _said(error: BaseException) -> str:
    """What went wrong, in one line.

    Ray wraps a worker's error in others and sends their tracebacks as text, the innermost first.
    """
    text = str(error)
    lines = (line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception): ", line))
    return " ".join(next(lines, text).split())[-300:]


def _lost_a_process(causes: list[BaseException]) -> bool:
    """Whether a process or machine was lost, which may go better the next time."""
    from ray.exceptions import RayTaskError

    return not any(isinstance(cause, RayTaskError) for cause in causes)
