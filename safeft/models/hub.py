"""A model from a Hugging Face hub, in that library's own cache. Safetensors only."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from safeft.cache import require_disk
from safeft.errors import ModelError
from safeft.models.directory import no_safetensors
from safeft.models.explain import explain
from safeft.models.source import HubSource
from safeft.progress import Progress

_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
#: Weights in another layout, and exports for other programs: as large again, and never read.
_IGNORED = ["*/*", "consolidated*"]


def fetch_hub(source: HubSource, progress: Progress) -> Path:
    """The snapshot directory of the repository at that revision, downloaded where needed.

    A commit hash that is already here needs no network; a branch or tag is asked for each time,
    unless HF_HUB_OFFLINE says to take the newest that is here.

    Raises:
        ModelError: no such repository or revision, no access, no network, or pickles only.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import LocalEntryNotFoundError

    if HF_HUB_OFFLINE or re.fullmatch("[0-9a-f]{40}", source.revision):
        try:
            return _snapshot(source, local_files_only=True)
        except LocalEntryNotFoundError as error:
            if HF_HUB_OFFLINE:
                raise ModelError(
                    f"{source}: is not in the local hub cache and HF_HUB_OFFLINE is set; "
                    "unset it to download"
                ) from error
    try:
        return _download(source, progress)
    except ModelError:
        raise
    except Exception as error:  # the kind depends on the HTTP library under the hub's client
        raise _hub_error(source, error) from error


def _snapshot(source: HubSource, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            source.repo,
            revision=source.revision,
            allow_patterns=_PATTERNS,
            ignore_patterns=_IGNORED,
            local_files_only=local_files_only,
        )
    )


def _download(source: HubSource, progress: Progress) -> Path:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    info = HfApi().model_info(source.repo, revision=source.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = [name for name in sizes if _is_wanted(name)]
    if not any(name.endswith(".safetensors") for name in wanted):
        raise no_safetensors(str(source), sizes)
    missing = sum(
        sizes[name]
        for name in wanted
        if not isinstance(try_to_load_from_cache(source.repo, name, revision=info.sha), str)
    )
    require_disk(Path(HF_HUB_CACHE), missing, str(source))
    progress(f"downloading {source.repo}", 0, missing)
    directory = _snapshot(source, local_files_only=False)
    progress(f"downloading {source.repo}", missing, missing)
    return directory


def _is_wanted(name: str) -> bool:
    """What the hub's client makes of the two lists of patterns."""
    return any(fnmatch(name, pattern) for pattern in _PATTERNS) and not any(
        fnmatch(name, pattern) for pattern in _IGNORED
    )


def _hub_error(source: HubSource, error: Exception) -> ModelError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{source}: is gated; accept its terms on its page and set HF_TOKEN to a token that "
            "may read it"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(f"{source}: there is no such repository, or it is private (set HF_TOKEN)")
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"{source}: the repository has no revision {source.revision!r}")
    if isinstance(error, HfHubHTTPError):
        return explain(f"{source}: the hub answered with an error", error)
    kind = f"{type(error).__name__}: {error}"
    return explain(
        f"{source}: cannot download from the hub; check the network (HF_ENDPOINT, proxies)", kind
    )
