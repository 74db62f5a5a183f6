"""Where a published model comes from, signed with Ed25519, so that anybody can check it later.

``provenance.json`` lies beside the weights and ``manifest.json``. The signature is over its
statement, character for character, and the statement holds the hash of every file.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from safeft.cache import sha256_file
from safeft.errors import InputError, SafeftError

PROVENANCE = "provenance.json"
_CONTEXT = b"safeft.provenance.1\n"  # a signature for this purpose is none for another


class ProvenanceError(SafeftError):
    """The model is not what was published, or nobody who is trusted says so."""


class Statement(BaseModel):
    """What the publisher says about a model.

    Attributes:
        files: SHA-256 of every file beside ``provenance.json``.
        facts: what screening and the gate found, as the job recorded it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["safeft.provenance.1"] = "safeft.provenance.1"
    model: str
    job: str
    base_model: str
    base_weights: str
    dataset_sha256: str
    profile: str
    files: dict[str, str]
    facts: dict[str, Any]
    code_version: str
    published_at: float


class Signed(BaseModel):
    """A statement's exact text, and the signature over it (base64)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    statement: str
    key_id: str
    signature: str


class SigningKey:
    """The publisher's private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def load_or_create(cls, path: Path) -> SigningKey:
        """The key in a PEM file that only its owner reads; a new one where there is no file.

        Raises:
            InputError: the file holds no Ed25519 key, or others may read it.
        """
        if not path.exists():
            pem = Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(pem)
            try:
                os.link(partial, path)
            except FileExistsError:
                pass  # another process was first; its key is the key
            finally:
                partial.unlink()
        if path.stat().st_mode & 0o077:
            raise InputError(f"{path}: others may read this key; run `chmod 600 {path}`")
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except ValueError:
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise InputError(f"{path}: holds no Ed25519 private key; move it away")
        return cls(key)

    @property
    def public(self) -> PublicKey:
        """What a signature is checked with."""
        return PublicKey(self._key.public_key())

    def sign(self, statement: Statement) -> Signed:
        """The statement with this key's signature."""
        text = statement.model_dump_json()
        signature = self._key.sign(_CONTEXT + text.encode())
        return Signed(
            statement=text,
            key_id=self.public.id,
            signature=base64.b64encode(signature).decode(),
        )


class PublicKey:
    """Whoever has it can check signatures."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key

    @classmethod
    def from_pem(cls, pem: bytes) -> PublicKey:
        """Raises InputError where it is no Ed25519 public key."""
        try:
            key = serialization.load_pem_public_key(pem)
        except ValueError:
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise InputError("not an Ed25519 public key in PEM")
        return cls(key)

    @property
    def pem(self) -> str:
        """The key as text."""
        return self._key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode()

    @property
    def id(self) -> str:
        """The first 16 hex digits of the raw key's SHA-256."""
        raw = self._key.public_bytes_raw()
        return hashlib.sha256(raw).hexdigest()[:16]

    def check(self, signed: Signed) -> None:
        """Raise ProvenanceError unless this key signed exactly this text."""
        try:
            signature = base64.b64decode(signed.signature, validate=True)
            self._key.verify(signature, _CONTEXT + signed.statement.encode())
        except (InvalidSignature, ValueError):
            raise ProvenanceError("the signature does not fit the statement") from None


def verify_model(directory: Path, trusted: Sequence[PublicKey]) -> Statement:
    """Check a published model: signature, manifest and every file.

    Raises:
        ProvenanceError: with what is wrong: unsigned, signed by somebody else, or changed.
    """
    try:
        signed = Signed.model_validate_json((directory / PROVENANCE).read_bytes())
    except (OSError, ValidationError):
        raise ProvenanceError(
            f"{directory}: has no readable {PROVENANCE}; nobody vouches for it"
        ) from None
    key = next((key for key in trusted if key.id == signed.key_id), None)
    if key is None:
        ours = ", ".join(key.id for key in trusted)
        raise ProvenanceError(
            f"{directory}: signed by the key {signed.key_id[:32]}, which is not trusted ({ours})"
        )
    key.check(signed)
    statement = Statement.model_validate_json(signed.statement)
    _check_files(directory, statement.files)
    known = {*statement.files, PROVENANCE}
    if extra := sorted(path.name for path in directory.iterdir() if path.name not in known):
        raise ProvenanceError(f"{directory / extra[0]}: was added; nobody vouches for it")
    return statement


def checked_files(directory: Path, made: dict[str, str]) -> dict[str, str]:
    """SHA-256 of every file of a model that is about to be published.

    Args:
        made: SHA-256 of the weights' files when they were made.

    Raises:
        ProvenanceError: the weights are not those.
    """
    _check_files(directory, made)
    return {path.name: sha256_file(path) for path in sorted(directory.iterdir())}


def _check_files(directory: Path, files: dict[str, str]) -> None:
    for name, sha256 in files.items():
        path = directory / name
        if not path.is_file() or sha256_file(path) != sha256:
            raise ProvenanceError(f"{path}: is missing or was changed")
