"""Uploads a finished folder to a Hub repository: one commit, compared with the folder, then a tag that never moves."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # httpx's or httpx2's, as the version has it
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from .repository import PublishError


class Published(NamedTuple):
    """Names a published model: its repository, and the revision to load it by."""

    repo_id: str
    commit: str
    tag: str


def upload(
    folder: Path,
    repo_id: str,
    allow_patterns: Sequence[str],
    tag: str | None = None,
    private: bool = False,
    api: HfApi | None = None,
) -> Published:
    """Replaces the repository's files of `allow_patterns` by those of `folder`, in one commit, and tags it.

    Running it again after an interruption resumes: large files that have arrived are not sent again, and a commit is
    not made twice. `HfApi.upload_folder` may split an upload into several commits, of which a reader could load the
    first; so it is not used.

    Args:
        folder: the files to publish.
        repo_id: `ORG/NAME`; created if it does not exist.
        allow_patterns: the files of a model; those that `folder` lacks are deleted from the repository, other files
            (an image that someone added to the page) are kept.
        tag: name of the tag; `None`: the next free one of v1, v2, ….
        private: whether the repository must be private.
        api: the Hub and the token; `None`: `HF_ENDPOINT`, and `HF_TOKEN` or the login of `hf auth login`.

    Raises:
        PublishError: the Hub refused, somebody else pushed, the connection broke, or the tag has other files.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise PublishError(f"{repo_id!r} is not a repository's name; write ORG/NAME, such as your-name/viPolyQwen.")
    api = HfApi() if api is None else api
    with _explained(api, repo_id):
        api.whoami()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        head = api.model_info(repo_id)
        if private and not head.private:
            raise PublishError(f"{repo_id} exists already and public; make it private first, or drop --private.")
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        if tag in tags:
            if differences(api, repo_id, tags[tag], folder, allow_patterns):
                raise PublishError(
                    f"The tag {tag!r} of {repo_id} stands for other files (commit {tags[tag]}), on which "
                    "readers who pinned it rely. Choose another --tag."
                )
            return Published(repo_id, tags[tag], tag)
        commit = _commit(api, repo_id, head.sha, folder, allow_patterns)
        tag = tag or _free_tag(tags, commit)
        if tags.get(tag) != commit:
            api.create_tag(repo_id, tag=tag, revision=commit)
    return Published(repo_id, commit, tag)


def differences(
    api: HfApi, repo_id: str, revision: str, folder: Path, allow_patterns: Sequence[str]
) -> dict[str, bool]:
    """Returns path -> whether `folder` has it, of every file that differs between folder and repository."""
    remote = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, revision=revision, recursive=True)
        if isinstance(entry, RepoFile)
    }
    ours = set(filter_repo_objects(remote, allow_patterns=list(allow_patterns)))
    local = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    paths = ours | set(filter_repo_objects(local, allow_patterns=list(allow_patterns)))
    return {
        path: path in local
        for path in sorted(paths)
        if path not in local or path not in remote or not _is_same(local[path], remote[path])
    }


def _is_same(path: Path, remote: RepoFile) -> bool:
    if path.stat().st_size != remote.size:
        return False
    if remote.lfs is None:
        return git_hash(path.read_bytes()) == remote.blob_id
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == remote.lfs.sha256


def _commit(api: HfApi, repo_id: str, parent: str, folder: Path, allow_patterns: Sequence[str]) -> str:
    """Commits the folder's files and returns the commit: the parent if it holds them already."""
    changed = differences(api, repo_id, parent, folder, allow_patterns)
    if not changed:
        return parent
    operations = [
        CommitOperationAdd(path, folder / path) if is_here else CommitOperationDelete(path)
        for path, is_here in changed.items()
    ]
    commit = api.create_commit(
        repo_id, operations, commit_message="Publish with publish_vipolyqwen.py", parent_commit=parent
    ).oid
    wrong = differences(api, repo_id, commit, folder, allow_patterns)
    if wrong:
        raise PublishError(
            f"Commit {commit} of {repo_id} lacks files that were sent: {', '.join(wrong)}. It has no tag; run again."
        )
    return commit


def _free_tag(tags: dict[str, str], commit: str) -> str:
    numbered = {int(name[1:]): target for name, target in tags.items() if re.fullmatch(r"v\d+", name)}
    of_commit = [number for number, target in numbered.items() if target == commit]
    return f"v{max(of_commit) if of_commit else max(numbered, default=0) + 1}"


@contextmanager
def _explained(api: HfApi, repo_id: str) -> Iterator[None]:
    """Turns errors of the network and the Hub into `PublishError`s that name the remedy."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, HTTPError):
            cause = cause.__cause__  # an upload's thread wraps what happened to it
        if isinstance(cause, (LocalTokenNotFoundError, OfflineModeIsEnabled)):
            raise PublishError(
                f"{cause} Log in with `hf auth login`, or set HF_TOKEN; HF_HUB_OFFLINE must be unset."
            ) from error
        if not isinstance(cause, HTTPError):
            raise
        raise PublishError(_explanation(api.endpoint, repo_id, cause)) from error


def _explanation(endpoint: str, repo_id: str, error: HTTPError) -> str:
    if not isinstance(error, HfHubHTTPError):
        return (
            f"The connection to {endpoint} broke ({type(error).__name__}: {error}). {repo_id} still shows its "
            "previous files. Run the same command again: files that have arrived are not sent again."
        )
    status = error.response.status_code
    remedies = {
        401: f"{endpoint} does not know the token. Log in with `hf auth login`, or set HF_TOKEN.",
        403: f"The token may not write to {repo_id}. Use one with write access to this name (or another --repo_id).",
        409: f"Somebody else changed {repo_id} meanwhile. Look at their change, then run the same command again.",
        412: f"Somebody else pushed to {repo_id} meanwhile. Look at their commit, then run the same command again.",
    }
    remedy = remedies.get(status, f"{endpoint} refused. Run again later, or see its message.")
    return f"{remedy} (HTTP {status}: {error.server_message or error})"
