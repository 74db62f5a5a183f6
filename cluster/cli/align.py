"""``safeft align``: make the aligned demo model again from its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cluster.cli.console import out, print_json, progress_bars


def align(
    output: Annotated[
        Path | None, typer.Option(help="Adapter directory; must not exist. Default: the cache.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of initialisation and order.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as JSON.")] = False,
) -> None:
    """Teach SmolLM2-135M-Instruct to refuse; minutes on two cores.

    The package ships the adapter that seed 0 makes: `demo:aligned` uses that one.
    """
    from dataclasses import replace

    from safeft.align import AlignRecipe, cached_output, merge_adapter
    from safeft.align import align as train

    recipe = AlignRecipe()
    recipe = replace(recipe, fit=replace(recipe.fit, seed=seed))
    with progress_bars() as progress:
        adapter = output or cached_output(recipe)
        if output is not None or not adapter.exists():
            train(adapter, recipe, progress)
        model = merge_adapter(adapter, progress)
    if as_json:
        print_json({"adapter": str(adapter), "model": str(model)})
    else:
        out.print(f"adapter: {escape(str(adapter))}\nmerged model: {escape(str(model))}")
