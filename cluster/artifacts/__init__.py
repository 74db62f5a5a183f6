"""Where files and models are kept, by URL: a directory, or a bucket. Nothing is overwritten."""

from cluster.artifacts.open import open_store
from cluster.artifacts.store import (
    ArtifactCorrupt,
    ArtifactError,
    ArtifactExists,
    ArtifactMissing,
    ArtifactStore,
    ArtifactTooLarge,
    ArtifactUnavailable,
    ArtifactWriter,
    Stored,
    fetch,
    put_file,
)

__all__ = [
    "ArtifactCorrupt",
    "ArtifactError",
    "ArtifactExists",
    "ArtifactMissing",
    "ArtifactStore",
    "ArtifactTooLarge",
    "ArtifactUnavailable",
    "ArtifactWriter",
    "Stored",
    "fetch",
    "open_store",
    "put_file",
]
