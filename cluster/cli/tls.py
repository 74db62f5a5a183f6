"""Where the API may listen, and the certificate that it shows there."""

from __future__ import annotations

import ssl
from pathlib import Path

from safeft.errors import InputError

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def check_listener(host: str, certificate: Path | None, private_key: Path | None) -> None:
    """Look at what uvicorn would otherwise fail on later, or serve in the clear.

    Raises:
        InputError: one PEM file without the other, files that are no pair, or an address that
            others reach, without TLS.
    """
    if (certificate is None) != (private_key is None):
        raise InputError("--certificate and --private-key: give both, or none")
    if certificate is None or private_key is None:
        if host not in _LOOPBACK:
            raise InputError(
                f"--host {host}: keys would travel in the clear; give --certificate and "
                "--private-key, or stay on loopback behind a proxy with TLS"
            )
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key, "")
    except OSError as error:  # an SSLError is one, too
        said = error.strerror if error.errno and not isinstance(error, ssl.SSLError) else error
        raise InputError(
            f"--certificate {certificate}, --private-key {private_key}: not a certificate and its "
            f"key, in PEM and without a password ({said})"
        ) from None
