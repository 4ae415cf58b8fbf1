"""Upload of a finished export to the Hugging Face hub, by the calls of huggingface_hub."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lowrank_pl.models.digests import NESTED
from lowrank_pl.version import __version__

__all__ = ["HubRepo", "UploadError", "announce_upload", "upload"]

_log = logging.getLogger(__name__)

_STALE = [
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    f"{NESTED}/*.safetensors",
]
"""Weights and components of an earlier export, which go unless the new one has a file of the same name.

transformers prefers ``model.safetensors`` to an index, so an old one would be loaded in place of new, sharded weights.
The names are whole, because the ``*`` of the hub also stands for folders: those of adapters and other models stay.
"""


class UploadError(RuntimeError):
    """A finished export could not be uploaded; its folder is whole, and the message names the command that uploads."""


@dataclass(frozen=True)
class HubRepo:
    """A model repository on the Hugging Face hub.

    The token is huggingface_hub's own: that of ``hf auth login``, or ``HF_TOKEN`` in the environment.

    Args:
        name: ``user/model`` or ``organization/model``; without the first part, a repository of the token's user.
        private: Whether a new repository is private; by default what its owner has set. One that exists stays as it is.
        revision: Branch to upload to, made if it does not exist; by default the main one.

    Raises:
        ValueError: The name is no repository's.

    Example:
        >>> HubRepo("me/small", private=True).command("runs/my model")  # doctest: +ELLIPSIS
        "hf upload me/small 'runs/my model' . --private --delete model.safetensors --delete ..."
    """

    name: str
    private: bool | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{self.name!r} can't be a repository of the hub: {said} Expected user/model") from None

    def command(self, directory: str | Path) -> str:
        """Return the command line that uploads ``directory`` to this repository."""
        words = ["hf", "upload", self.name, str(directory), "."]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision is not None else []
        for pattern in _STALE:
            words += ["--delete", pattern]
        return shlex.join(words)


def announce_upload(repo: HubRepo) -> None:
    """Warn if an upload to ``repo`` is going to fail as things are: there is time to log in before it begins."""
    if constants.HF_HUB_OFFLINE:
        _log.warning("HF_HUB_OFFLINE is set, so the upload to %s is going to fail", repo.name)
    elif get_token() is None:
        _log.warning("nobody is logged in to the hub: run `hf auth login` before the upload to %s begins", repo.name)


def upload(directory: str | Path, repo: HubRepo) -> str:
    """Upload a finished export, and return the address of the commit.

    The repository and its branch are made if they do not exist. All files of the folder are uploaded, with those
    of its subfolder ``nested``. Weight files and components of an earlier export go, and other files in the repository
    stay.

    Args:
        directory: The folder.
        repo: Where to upload it.

    Raises:
        UploadError: Offline mode, no connection, no login, no permission, or another answer of the hub. The folder is
            as it was.
    """
    api = HfApi(library_name="lowrank_pl", library_version=__version__)
    try:
        name = api.create_repo(repo.name, private=repo.private, exist_ok=True).repo_id
        if repo.revision is not None and not repo.revision.startswith("refs/pr/"):
            api.create_branch(name, branch=repo.revision, exist_ok=True)
        made = api.upload_folder(
            repo_id=name,
            folder_path=directory,
            revision=repo.revision,
            commit_message="Upload a model compressed by lowrank_pl",
            delete_patterns=_STALE,
        )
    # Versions of huggingface_hub use different HTTP libraries, each with errors of its own.
    except Exception as error:
        raise UploadError(
            f"{str(directory)!r} is finished and checked, but was not uploaded to {repo.name}: {_reason(error, api)}. "
            f"This uploads it: {repo.command(directory)}"
        ) from error
    _log.info("uploaded %s to %s", directory, made.commit_url)
    return str(made.commit_url)


def _reason(error: Exception, api: HfApi) -> str:
    """Return in words why an upload failed."""
    # The upload of one file wraps what went wrong.
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and get_token() is None):
        return "nobody is logged in; run `hf auth login`, or set HF_TOKEN"
    said = " ".join(str(error).split()) or type(error).__name__
    if status == 401:
        return f"the hub does not accept the token; run `hf auth login` again ({said})"
    if status == 403:
        return f"the token may not write there ({said})"
    if status is None and not isinstance(error, ValueError):
        return f"{api.endpoint} can't be reached or broke off ({type(error).__name__}: {said})"
    return said
