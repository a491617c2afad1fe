"""Models by name from the Hugging Face hub, in huggingface_hub's own cache: owner/model or owner/model@revision.

huggingface_hub finds, names and links the files. Fetching one is done here, because it no longer goes on with a file
that an earlier process left half done.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import HfFileMetadata, http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, validate_repo_id

from polyglot_jax.config import InputError

# The forms weights come in, the best first; only one of them is fetched.
_FORMS = (
    r"model\.safetensors",
    r"model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
    r"pytorch_model\.bin",
    r"pytorch_model(-\d+-of-\d+\.bin|\.bin\.index\.json)",
)
_FAILURES = (HTTPError, OSError, ValueError)


def is_hub_name(text: str) -> bool:
    """Whether `text` has the form owner/model or owner/model@revision."""
    repo, at, revision = text.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return (
        "/" in repo
        and repo.isascii()
        and (not at or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision, re.ASCII) is not None)
    )


def download(name: str) -> Path:
    """The folder of a model on the hub: config.json, tokenizer.json and one form of the weights, fetched if need be.

    name: as `is_hub_name` takes it; a revision is a branch, a tag or a commit, and main if none is named. Run again, it
    goes on where it was stopped. When the hub does not give the model, the one fetched before is taken. InputError, in
    one line, if there is no such model or revision, if it may not be read, if it has no weights, or if the network
    fails.
    """
    repo, _, revision = name.partition("@")
    revision = revision or "main"
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except _FAILURES as error:
        config = try_to_load_from_cache(repo, "config.json", revision=revision)
        if isinstance(config, str):
            return Path(config).parent
        why = _refusal(error, repo, revision) or (
            f"{constants.ENDPOINT} cannot be reached ({_first_line(error)}); connect, or give the folder of a copy"
        )
        raise InputError(f"{name}: no such folder here, none fetched before, and {why}") from error
    files = _wanted(name, [sibling.rfilename for sibling in info.siblings or ()])
    try:
        folder = [_fetch(repo, file, info.sha) for file in files][-1].parent
    except _FAILURES as error:
        if isinstance(error, InputError) or getattr(error, "errno", None):  # ours, or of the disk
            raise
        why = _refusal(error, repo, revision) or f"the download broke off ({_first_line(error)})"
        raise InputError(f"{name}: {why}; the same command goes on from here") from error
    if revision != info.sha:
        _note(folder, revision, info.sha)
    return folder


def _wanted(name: str, there: Sequence[str]) -> list[str]:
    """The files to fetch, config.json last: with it the folder is a model, so what was stopped is none."""
    forms = ([file for file in there if re.fullmatch(form, file)] for form in _FORMS)
    weights = next(filter(None, forms), None)
    if weights is None or "config.json" not in there:
        raise InputError(f"{name}: is on the hub, but not with a config.json and weights that transformers would open")
    return [file for file in ("tokenizer.json",) if file in there] + sorted(weights) + ["config.json"]


def _fetch(repo: str, file: str, commit: str) -> Path:
    """The file in the cache, begun or gone on with if it is not there."""
    cached = try_to_load_from_cache(repo, file, revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    url = hf_hub_url(repo, file, revision=commit)
    found = get_hf_file_metadata(url)
    folder = repo_folder_name(repo_id=repo, repo_type="model")
    blob = Path(constants.HF_HUB_CACHE, folder, "blobs", found.etag)
    lock = Path(constants.HF_HUB_CACHE, ".locks", folder, f"{found.etag}.lock")  # huggingface_hub's own for this blob
    for parent in (blob.parent, lock.parent):
        parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            _fill(blob, file, url, found)
    return Path(hf_hub_download(repo, file, revision=commit))  # only links to the blob


def _fill(blob: Path, file: str, url: str, found: HfFileMetadata) -> None:
    partial = blob.with_name(f"{blob.name}.incomplete")
    with partial.open("ab") as out:
        if out.tell() > (found.size or 0):
            out.seek(0)
            out.truncate()
        size, headers = out.tell(), build_hf_headers()
        http_get(url, out, resume_size=size, headers=headers, expected_size=found.size, displayed_filename=file)
    # The hub names large files by their SHA-256. Unchecked, a wrong beginning would be gone on with for ever.
    if len(blob.name) == 64:
        with partial.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
        if digest != blob.name:
            partial.unlink()
            raise InputError(f"{url}: came damaged and was removed; run the same command again")
    partial.rename(blob)


def _note(folder: Path, revision: str, commit: str) -> None:
    """Have the cache say that the revision leads to the commit. After the files, so that it never leads to a part."""
    ref = folder.parent.parent / "refs" / revision
    if not ref.is_file() or ref.read_text() != commit:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _refusal(error: Exception, repo: str, revision: str) -> str | None:
    """What the hub's answer means and what to do; None if it did not answer."""
    page = f"{constants.ENDPOINT}/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it, or give the folder of a copy"
    if isinstance(error, GatedRepoError):
        return f"its licence must be accepted first, at {page}; then set HF_TOKEN to a token of that account"
    if isinstance(error, RepositoryNotFoundError):
        return f"{page} is not there, or is private; for a private one set HF_TOKEN to a token that may read it"
    if isinstance(error, RevisionNotFoundError):
        return f"{page} has no revision {revision}; name a branch, a tag or a commit"
    if status in (401, 403):
        return f"{page} may not be read (status {status}); set HF_TOKEN to a token that may read it"
    if status is not None:
        return f"{constants.ENDPOINT} answered with status {status}; try again later"
    return None
