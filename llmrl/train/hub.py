"""Sending an exported model to the Hugging Face hub, or to what $HF_ENDPOINT names."""

from __future__ import annotations

import json
from pathlib import Path

from llmrl.errors import ConfigError, LLMRLError

# What an earlier export left in the repository and this one may not overwrite: old shards beside new ones would be loaded.
_OURS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_*", "config.json"]


class HubError(LLMRLError):
    """The hub can't be reached, or refused."""


def open_repository(repo: str) -> str:
    """Makes the repository `name` or `owner/name`, private where it is new, and returns its full name.

    Raises ConfigError for a name that is none or without a token, HubError where the hub is not reached or refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo}: {error}") from error
    if get_token() is None:
        raise ConfigError(
            "--push-to-hub: there is no token; run `hf auth login`, or put one that may write into the variable HF_TOKEN"
        )
    try:
        return HfApi().create_repo(repo, private=True, exist_ok=True).repo_id
    except Exception as error:  # of an HTTP library that huggingface_hub has changed before
        raise HubError(
            f"the hub did not take the repository {repo}: {_why(error)}. Nothing was written or sent"
        ) from error


def check_public(model: str, merge: bool) -> None:
    """Raises ConfigError for an adapter alone whose base is a directory of this machine: nobody else could load it."""
    file = Path(model) / "adapter_config.json"
    if merge or not file.is_file():
        return
    base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if Path(base).is_dir():
        raise ConfigError(
            f"--push-to-hub: the adapter {model} names as its base {base}, a directory that is only on this machine; send the merged "
            "model (--merge), or push the base first and write its name into adapter_config.json"
        )


def upload(directory: Path, repo: str, message: str) -> str:
    """Sends the files of `directory`, in place of those of an earlier export; returns the address of the commit.

    Raises HubError; the directory is as it was.
    """
    from huggingface_hub import HfApi

    try:
        commit = HfApi().upload_folder(
            repo_id=repo, folder_path=directory, commit_message=message, delete_patterns=list(_OURS)
        )
    except Exception as error:
        raise HubError(
            f"{directory} is written, but was not sent to {repo}: {_why(error)}. `hf upload {repo} {directory}` tries again"
        ) from error
    return commit.commit_url


def _why(error: BaseException) -> str:
    """What the hub answered, or else the innermost reason: huggingface_hub wraps what a file's upload failed of."""
    from huggingface_hub.errors import HfHubHTTPError

    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None and str(error.__cause__).strip():
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", 0)
    hints = {401: ". The token is not known there, or has expired", 403: ". The token may not write there"}
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}{hints.get(status, '')}"
