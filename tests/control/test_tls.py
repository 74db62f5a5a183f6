"""`safeft api` with a certificate of its own: TLS or nothing, and cookies that keep to it."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cluster.cli.tls import check_listener
from cluster.state import Database
from cluster.tenancy.keys import create_key
from safeft.errors import InputError
from tests.control.rows import add_tenant

LONG_S = 120.0


def certificate(directory: Path, name: str = "server") -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    paths = directory / f"{name}.pem", directory / f"{name}-key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


@pytest.fixture
def server(sqlite_url: str, tmp_path: Path) -> Iterator[str]:
    """The address of `safeft api` in a process of its own."""
    settings = tmp_path / "plane.yaml"
    settings.write_text(json.dumps({"home": str(tmp_path / "home"), "database": sqlite_url}))
    chain, key = certificate(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli.main", "api", "--settings", settings,
         "--port", str(port), "--certificate", chain, "--private-key", key],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        until = time.monotonic() + LONG_S
        while True:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < until, "the server does not listen"
                time.sleep(0.1)
        yield f"https://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(LONG_S)
        assert process.stderr is not None
        process.stderr.close()


def test_the_api_speaks_tls_only_and_its_cookie_stays_there(
    server: str, sqlite_url: str, tmp_path: Path
) -> None:
    trusting = ssl.create_default_context(cafile=tmp_path / "server.pem")
    http = httpx2.Client(base_url=server, verify=trusting, timeout=LONG_S)
    assert http.get("/healthz").json() == {"status": "ok"}
    with pytest.raises(httpx2.TransportError):
        httpx2.get(server.replace("https", "http") + "/healthz", timeout=LONG_S)
    with pytest.raises(httpx2.ConnectError, match="certificate verify failed"):
        httpx2.get(f"{server}/healthz", verify=ssl.create_default_context(), timeout=LONG_S)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server}/healthz", verify=old, timeout=LONG_S)

    database = Database(sqlite_url)
    add_tenant(database)
    with database.system() as session:
        key = create_key(session, "ten_a", name="test", now=1.0)[1]
    database.close()
    answer = http.post("/status/login", data={"key": key})
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 303 and cookie.startswith("__Host-safeft=")
    assert {"Secure", "HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "Jobs" in http.get("/status/").text


def test_a_listener_that_would_not_be_safe_is_refused_before_it_listens(tmp_path: Path) -> None:
    chain, key = certificate(tmp_path)
    _, other = certificate(tmp_path, "other")
    for host in ("127.0.0.1", "::1", "localhost"):
        check_listener(host, None, None)
    check_listener("0.0.0.0", chain, key)
    with pytest.raises(InputError, match="in the clear"):
        check_listener("0.0.0.0", None, None)
    with pytest.raises(InputError, match="give both"):
        check_listener("0.0.0.0", chain, None)
    with pytest.raises(InputError, match="give both"):
        check_listener("127.0.0.1", None, key)
    for pair in ((chain, other), (key, chain), (chain, tmp_path / "none.pem")):
        with pytest.raises(InputError, match="not a certificate and its key"):
            check_listener("0.0.0.0", *pair)
