"""``safeft models verify``: is this what was published?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.console import print_json


def verify(
    directory: Annotated[Path, typer.Argument(help="A published model's files.")],
    public_key: Annotated[
        Path, typer.Option(help="PEM of the publisher's key, from a source you trust.")
    ],
) -> None:
    """Check signature, manifest and every file. Exit code 1: it is not what was published."""
    from cluster.provenance import PublicKey, verify_model
    from safeft.errors import InputError

    try:
        pem = public_key.read_bytes()
    except OSError as error:
        raise InputError(f"{public_key}: cannot be read ({error.strerror})") from error
    print_json(verify_model(directory, [PublicKey.from_pem(pem)]).model_dump(mode="json"))
