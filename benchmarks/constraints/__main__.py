"""`python -m benchmarks.constraints`: what the constraints cost, as ratios within one run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.constraints import dense, sharded
from benchmarks.constraints.memory import device_note, held_by
from benchmarks.constraints.steps import Shape, Step
from benchmarks.constraints.timing import block, interleaved, median_seconds, ratio, spread
from cluster.cli.console import progress_bars
from safeft.constraints import AsftConfig, Constraint, CwacConfig, ProfileFiles
from safeft.constraints.alignment import load_directions
from safeft.latents import load_activation_targets
from safeft.models import resolve, weights_hash
from safeft.profile import SafetyProfile
from safeft.progress import Progress

BARS = {
    "asft_step": 1.01,
    "asft_dense_over_ours": 50,
    "asft_dense_over_ours_4096": 500,
    "cwac_weight_step": 1.02,
    "cwac_weight_added": 0.005,
    "cwac_step": 1.10,
    "zero3_step": 1.05,
    "zero3_bytes": 1.05,
}
AT_LEAST = {"asft_dense_over_ours", "asft_dense_over_ours_4096"}
#: The rank to which CWAC's subspace is cut in the rows with a bar; `_energy99` rows cut nothing.
CWAC_RANK = 32


@dataclass
class Run:
    """What is measured, with a note on each."""

    model_dir: Path
    files: ProfileFiles
    quick: bool
    progress: Progress
    numbers: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float, note: str) -> None:
        self.numbers[name], self.notes[name] = value, note

    @property
    def shape(self) -> Shape:
        return Shape(rows=2, tokens=128, labels=32) if self.quick else Shape()

    @property
    def repeats(self) -> int:
        return 3 if self.quick else 7

    def build(self, *configs: AsftConfig | CwacConfig) -> list[Constraint]:
        return [config.build(self.files) for config in configs]


def asft(run: Run) -> None:
    """A LoRA step with AsFT against a plain one, and the added work by itself."""
    constrained = Step(
        run.model_dir, lora=True, constraints=run.build(AsftConfig()), shape=run.shape
    )
    plain = Step(run.model_dir, lora=True, constraints=[], shape=run.shape)
    pairs = interleaved(constrained, plain, run.repeats, "AsFT, LoRA steps", run.progress)
    step = sorted(b for _, b in pairs)[len(pairs) // 2]
    added = median_seconds(lambda: constrained.hooks.before_backward(1), 20)
    with FlopCounterMode(display=False) as counter:
        constrained.hooks.before_backward(1)
    low, high = spread(pairs)
    run.add(
        "asft_step",
        ratio(pairs),
        f"quartiles {low:.3f}-{high:.3f}; penalty and gradient by themselves {added * 1e3:.1f} ms, "
        f"{added / step:.4f} of a plain step of {step:.2f} s; "
        f"floor {counter.get_total_flops() / plain.flop():.1e} (extra FLOP / step FLOP)",
    )


def asft_dense(run: Run) -> None:
    """The penalty with its backward pass, dense against factored."""
    saved = load_directions(run.files.part("alignment", "asft"))
    names = [n for n in saved if n.endswith(("q_proj", "v_proj"))]
    directions = {name: saved[name] for name in names}
    d_in = directions[next(n for n in names if n.endswith("q_proj"))].U.shape[0]
    pairs = dense.random_pairs({n: (d.U.shape[0], d_in) for n, d in directions.items()})
    big = {"layer": dense.random_direction(4096, 16)}
    cases = {
        "asft_dense_over_ours": (pairs, directions, f"{len(names)} layers, V of rank "),
        "asft_dense_over_ours_4096": (
            dense.random_pairs({"layer": (4096, 4096)}),
            big,
            "one layer, V of rank ",
        ),
    }
    for name, (factors, found, note) in cases.items():
        slow, ours = dense.DenseAsft(factors, found), dense.FactoredAsft(factors, found)
        assert abs(float(slow()) / ours() - 1) < 1e-3, "the two forms do not agree"
        # A call of ours alone, right after one of the dense form, would pay for a cold cache.
        repeats, calls = (3 if run.quick else 9), 100
        timed = interleaved(block(slow, 2), block(ours, calls), repeats, name, run.progress)
        timed = [(a / 2, b / calls) for a, b in timed]
        dense_ms, ours_ms = (1e3 * statistics.median(times) for times in zip(*timed, strict=True))
        rank = max(d.U.shape[1] for d in found.values())
        run.add(name, ratio(timed), f"{note}{rank}; {dense_ms:.0f} ms against {ours_ms:.2f} ms")


def cwac_weights(run: Run) -> None:
    """A full-parameter step with the projection against a plain one, and the projection alone."""
    plain = Step(run.model_dir, lora=False, constraints=[], shape=run.shape)
    for suffix, rank in (("", CWAC_RANK), ("_energy99", None)):
        config = CwacConfig.as_published(mode="weight_only", project="update", rank=rank)
        constrained = Step(
            run.model_dir, lora=False, constraints=run.build(config), shape=run.shape
        )
        label = f"CWAC weights{suffix}, full steps"
        pairs = interleaved(constrained, plain, run.repeats, label, run.progress)
        step = sorted(b for _, b in pairs)[len(pairs) // 2]
        added = median_seconds(constrained.hooks.project, 20)
        bases = [c.update_bases() for c in constrained.constraints]
        flop = sum(
            4.0 * constrained.layers[name].d_out * U.numel()
            for mapping in bases
            for name, U in mapping.items()
        )
        ks = [U.shape[1] for mapping in bases for U in mapping.values()]
        low, high = spread(pairs)
        note = f"mean k {sum(ks) / len(ks):.0f} of {len(ks)} down_proj"
        run.add(
            f"cwac_weight_step{suffix}", ratio(pairs), f"quartiles {low:.3f}-{high:.3f}; {note}"
        )
        run.add(
            f"cwac_weight_added{suffix}",
            added / step,
            f"{added * 1e3:.0f} ms of {step:.2f} s; floor {flop / plain.flop():.4f} "
            "(extra FLOP / step FLOP)",
        )
        del constrained


def cwac_both(run: Run) -> None:
    """A full-parameter step with both sides, harmful tokens at most 5 % of the task's."""
    batch = 1 if run.quick else 2
    config = CwacConfig.as_published(project="update", rank=CWAC_RANK, harmful_batch=batch)
    constrained = Step(run.model_dir, lora=False, constraints=run.build(config), shape=run.shape)
    plain = Step(run.model_dir, lora=False, constraints=[], shape=run.shape)
    pairs = interleaved(constrained, plain, run.repeats, "CWAC, full steps", run.progress)
    targets = load_activation_targets(run.files.part("autoencoder", "cwac"))
    lengths = sorted(len(prompt) for prompt in targets.prompts)
    harmful = config.harmful_batch * lengths[len(lengths) // 2] / constrained.ids.numel()
    low, high = spread(pairs)
    run.add(
        "cwac_step",
        ratio(pairs),
        f"quartiles {low:.3f}-{high:.3f}; harmful tokens {harmful:.3f} of the task's",
    )


def memory(run: Run) -> None:
    """Tensors held between steps beyond those of plain full-parameter training."""
    small = Shape(rows=1, tokens=32, labels=8)

    def built(*configs: AsftConfig | CwacConfig) -> Callable[[], Step]:
        return lambda: Step(run.model_dir, lora=False, constraints=run.build(*configs), shape=small)

    plain, _ = held_by(built())
    for name, configs in {
        "": (CwacConfig.as_published(project="update", rank=CWAC_RANK),),
        "_asft": (AsftConfig(),),
        "_cwac_energy99": (CwacConfig.as_published(mode="weight_only", project="update"),),
    }.items():
        held, said = held_by(built(*configs))
        run.add(f"memory_above_plain_mib{name}", held - plain, f"{said}; plain holds {plain:.0f}")


PARTS: dict[str, Callable[[Run], None]] = {
    "asft": asft,
    "asft-dense": asft_dense,
    "cwac-weights": cwac_weights,
    "cwac": cwac_both,
    "memory": memory,
    "zero3": lambda run: sharded.zero3(run.model_dir, run.files, run.quick, run.add, run.progress),
}


def main(
    quick: Annotated[bool, typer.Option(help="A smaller version of the same work.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write {name: number}.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Parts: {', '.join(PARTS)}.")] = None,
    model: Annotated[str, typer.Option(help="A model with a whole profile.")] = "demo:aligned",
) -> None:
    """Measure, print a table with bars, and write the numbers."""
    with progress_bars() as progress:
        model_dir = resolve(model, progress)
        profile = SafetyProfile.for_weights(weights_hash(model_dir))
        files = ProfileFiles(
            alignment=profile.path("alignment"),
            harmful_inputs=profile.path("harmful-inputs"),
            autoencoder=profile.path("autoencoder"),
        )
        run = Run(model_dir, files, quick, progress)
        for name in only or PARTS:
            PARTS[name](run)
    table = Table("name", "measured", "bar", "note")
    for name, value in run.numbers.items():
        bar = BARS.get(name)
        sign = ">=" if name in AT_LEAST else "<="
        missed = bar is not None and (value < bar if name in AT_LEAST else value > bar)
        shown = f"{value:.4g}" + (" (missed)" if missed else "")
        table.add_row(name, shown, "" if bar is None else f"{sign} {bar:g}", run.notes[name])
    Console(width=160).print(table)
    Console().print(device_note())
    if json_file is not None:
        json_file.write_text(json.dumps(run.numbers, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
