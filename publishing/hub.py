"""A finished folder to a Hub repository: one commit, compared with what was sent, then a tag that never moves."""

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
    """Where a model went: a repository, and the revision to load it by."""

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
    """Makes the repository's files of `allow_patterns` those of `folder`, in one commit, and tags it.

    Running it again after an interruption goes on: large files that had arrived are not sent again, a commit that was
    made is not made twice, and only the tag may be left to do. `HfApi.upload_folder` is not used because it may split
    an upload into several commits, of which a reader could load the first.

    Args:
        folder: what to publish.
        repo_id: `ORG/NAME`; created if it is not there.
        allow_patterns: the files that are ours; such files that are not in `folder` are deleted from the repository,
            others (a picture that someone added to the page) are left alone.
        tag: name of the tag; `None`: the next free one of v1, v2, ….
        private: whether nobody else may see it.
        api: the Hub and the token; `None`: `HF_ENDPOINT`, and `HF_TOKEN` or the login of `hf auth login`.

    Raises:
        PublishError: the Hub refused, somebody else pushed, the connection broke, or the tag stands for other files.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise PublishError(f"{repo_id!r} is no repository's name; write ORG/NAME, such as your-name/viPolyQwen.")
    api = HfApi() if api is None else api
    with _explained(api, repo_id):
        api.whoami()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        head = api.model_info(repo_id)
        if private and not head.private:
            raise PublishError(f"{repo_id} is there already and public; make it private first, or drop --private.")
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        if tag in tags:
            if differences(api, repo_id, tags[tag], folder, allow_patterns):
                raise PublishError(
                    f"The tag {tag!r} of {repo_id} stands for other files (commit {tags[tag]}), and who pinned it "
                    "relies on them. Choose another --tag."
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
    """Path -> whether `folder` has it, of every file that is not byte for byte the same on both sides."""
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
    """The commit that holds the folder's files: the parent itself if it does already."""
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
            f"Commit {commit} of {repo_id} does not hold what was sent: {', '.join(wrong)}. It has no tag; run again."
        )
    return commit


def _free_tag(tags: dict[str, str], commit: str) -> str:
    numbered = {int(name[1:]): target for name, target in tags.items() if re.fullmatch(r"v\d+", name)}
    of_commit = [number for number, target in numbered.items() if target == commit]
    return f"v{max(of_commit) if of_commit else max(numbered, default=0) + 1}"


@contextmanager
def _explained(api: HfApi, repo_id: str) -> Iterator[None]:
    """Turns what goes wrong between here and the Hub into what to do about it."""
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
            f"The connection to {endpoint} broke ({type(error).__name__}: {error}). {repo_id} still shows what it did "
            "before. Run the same command again: what has arrived is not sent again."
        )
    status = error.response.status_code
    remedies = {
        401: f"{endpoint} does not know the token. Log in with `hf auth login`, or set HF_TOKEN.",
        403: f"The token may not write to {repo_id}. Use one with write access to this name (or another --repo_id).",
        409: f"Somebody else changed {repo_id} meanwhile. Look at what they did, then run the same command again.",
        412: f"Somebody else pushed to {repo_id} meanwhile. Look at their commit, then run the same command again.",
    }
    remedy = remedies.get(status, f"{endpoint} refused. Run again later, or see what it says.")
    return f"{remedy} (HTTP {status}: {error.server_message or error})"
