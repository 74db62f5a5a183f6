"""Signed provenance: what was published is what is there, and who says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.provenance import (
    PROVENANCE,
    ProvenanceError,
    PublicKey,
    SigningKey,
    Statement,
    checked_files,
    verify_model,
)
from jobs.finetune.manifest import Identity, Manifest, read_manifest
from safeft.cache import sha256_file
from safeft.errors import InputError


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return SigningKey.load_or_create(tmp_path / "keys" / "signing.pem")


def statement(directory: Path) -> Statement:
    return Statement(
        model="ft:tiny:acme::1",
        job="ftjob-1",
        base_model="tiny",
        base_weights="w",
        dataset_sha256="d",
        profile="p",
        files=checked_files(directory, read_manifest(directory / "manifest.json").files),
        facts={"gate": "passed"},
        code_version="1",
        published_at=5.5,
    )


@pytest.fixture
def published(tmp_path: Path, key: SigningKey) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    (directory / "job.json").write_text("{}")
    manifest = Manifest(
        kind="adapter",
        name="n",
        model="tiny",
        run="r",
        identity=Identity(settings={}, rows_sha256="x", base_weights="w", profile={}),
        files={"adapter_model.safetensors": sha256_file(directory / "adapter_model.safetensors")},
        file_sha256=None,
        rows=1,
        label_tokens=1,
        steps=1,
        final_loss=1.0,
        seconds=1.0,
        workers=1,
        zero_stage=0,
        libraries={},
    )
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    (directory / PROVENANCE).write_text(key.sign(statement(directory)).model_dump_json())
    return directory


def test_what_was_published_verifies(published: Path, key: SigningKey) -> None:
    trusted = [PublicKey.from_pem(key.public.pem.encode())]
    assert verify_model(published, trusted).job == "ftjob-1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"weightz"), "was changed"),
        (lambda d: (d / "job.json").unlink(), "is missing"),
        (lambda d: (d / "more.safetensors").write_bytes(b""), "was added"),
        (lambda d: (d / PROVENANCE).unlink(), "nobody vouches"),
        (lambda d: _replace(d / PROVENANCE, "ftjob-1", "ftjob-2"), "does not fit"),
        (lambda d: _replace(d / "manifest.json", '"steps":1', '"steps":2'), "was changed"),
    ],
)
def test_whatever_is_changed_is_found(
    published: Path, key: SigningKey, change: Callable[[Path], None], message: str
) -> None:
    change(published)
    with pytest.raises(ProvenanceError, match=message):
        verify_model(published, [key.public])


def test_the_signature_of_a_stranger_is_refused(published: Path, tmp_path: Path) -> None:
    other = SigningKey.load_or_create(tmp_path / "other.pem")
    with pytest.raises(ProvenanceError, match="is not trusted"):
        verify_model(published, [other.public])


def test_a_candidate_that_is_not_what_was_trained_is_never_signed(published: Path) -> None:
    (published / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ProvenanceError, match="was changed"):
        checked_files(published, read_manifest(published / "manifest.json").files)


def test_the_private_key_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "signing.pem"
    first = SigningKey.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load_or_create(path).public.id == first.public.id
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        SigningKey.load_or_create(path)
    path.write_text("no key")
    path.chmod(0o600)
    with pytest.raises(InputError, match="no Ed25519"):
        SigningKey.load_or_create(path)
    with pytest.raises(InputError, match="not an Ed25519"):
        PublicKey.from_pem(b"no key")


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
