"""One commit of a repository of the hub, as a folder; nothing else talks to it."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from diffquant.errors import OfflineError, SourceError, UsageError
from diffquant.sources._folders import CONFIG, Folder, LocalFolder, not_here
from diffquant.sources._reference import FORMS, Reference, endpoint

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """One commit of a repository: its files, and where the cache keeps what is downloaded.

    sizes     every file by its path in the repository, with its bytes where they are known
    is_cache  the hub was not asked: `sizes` holds what an earlier download left here
    """

    name: str
    commit: str
    snapshot: Path
    sizes: Mapping[str, int | None]
    is_cache: bool

    def download(self, file: str) -> Path:
        here = self.snapshot / file
        if not here.exists():
            from huggingface_hub import hf_hub_download

            with _hub_errors(self.name, self.commit):
                hf_hub_download(self.name, file, revision=self.commit, endpoint=endpoint())
        return here


@dataclass(frozen=True, slots=True)
class HubFolder:
    repository: Repository
    prefix: str = ""  # "" or "folder/"

    @property
    def origin(self) -> str:
        return f"{self.repository.name}/{self.prefix}".rstrip("/")

    @property
    def root(self) -> Path:
        return self.repository.snapshot / self.prefix

    @property
    def revision(self) -> str:
        return self.repository.commit

    @property
    def is_partial(self) -> bool:
        return self.repository.is_cache

    def names(self) -> list[str]:
        return sorted(name for name in self._below() if "/" not in name)

    def folders(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self._below() if "/" in name})

    def inside(self, name: str) -> "HubFolder":
        return HubFolder(self.repository, f"{self.prefix}{name}/")

    def size(self, name: str) -> int | None:
        return self.repository.sizes[self.prefix + name]

    def is_sidecar(self, name: str) -> bool:
        return any(PurePosixPath(name).match(pattern) for pattern in _HUB_SIDECARS)

    def path(self, name: str) -> Path:
        return self.repository.download(self.prefix + name)

    def _below(self) -> Iterator[str]:
        for name in self.repository.sizes:
            if name.startswith(self.prefix):
                yield name.removeprefix(self.prefix)


#: JSON files that formats read; the others of a repository are not downloaded beside weights.
_HUB_SIDECARS = (
    CONFIG,
    "*.index.json",
    "quant_model_description*.json",
    "hf_quant_config.json",
    "quantization_config.json",
    "*quantization_map.json",
)


def opened(
    reference: Reference, revision: str | None, local_files_only: bool
) -> tuple[Folder, str | None]:
    """The folder a reference leads to, and the file in it when it names one."""
    if (path := reference.path) is not None:
        if path.is_dir():
            return LocalFolder(path, reference.origin), None
        return LocalFolder(path.parent, str(path.parent)), path.name
    revision = _one_revision(reference, revision)
    repository = repository_of(reference, revision, local_files_only)
    inside = reference.inside.strip("/")
    if not inside:
        return HubFolder(repository), None
    folder, _, file = inside.rpartition("/")
    if inside in repository.sizes:
        return HubFolder(repository, f"{folder}/" if folder else ""), file
    if any(name.startswith(f"{inside}/") for name in repository.sizes):
        return HubFolder(repository, f"{inside}/"), None
    if repository.is_cache:
        raise not_here(f"{repository.name}/{inside}", repository.name)
    known = {*repository.sizes, *(str(PurePosixPath(name).parent) for name in repository.sizes)}
    near = get_close_matches(inside, sorted(known - {"."}), n=3)
    raise SourceError(
        f"repository {repository.name!r} has no file or folder {inside!r}",
        hint=f"near are: {', '.join(near)}" if near else f"look at {endpoint()}/{repository.name}",
    )


def _one_revision(reference: Reference, revision: str | None) -> str | None:
    """The revision that was asked for; a full commit may pin the branch that was typed."""
    typed = reference.revision
    if None not in (typed, revision) and typed != revision and not is_commit(revision or ""):
        raise UsageError(
            f"{reference.origin!r} asks for revision {typed!r} and the revision given is "
            f"{revision!r}",
            hint="give one of them",
        )
    return revision or typed


def repository_of(reference: Reference, revision: str | None, local_files_only: bool) -> Repository:
    """The commit that `revision` (default: the main branch) is now, and its files.

    Without the hub: the commit it was when something was last downloaded, and what is left of it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    name = reference.repository
    store = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    branch = revision or constants.DEFAULT_REVISION
    if local_files_only or constants.is_offline_mode():
        return _cached(name, store, branch)
    try:
        with _hub_errors(name, branch):
            info = HfApi(endpoint=endpoint()).model_info(
                name, revision=branch, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
    except OfflineError as error:
        if not (store / "snapshots").is_dir():
            raise
        _log.warning("%s; using what was downloaded earlier", error.what)
        return _cached(name, store, branch)
    commit = info.sha or branch
    _remember(store, branch, commit)
    return Repository(
        name=name,
        commit=commit,
        snapshot=store / "snapshots" / commit,
        sizes={file.rfilename: file.size for file in info.siblings or ()},
        is_cache=False,
    )


def _cached(name: str, store: Path, branch: str) -> Repository:
    reference = store / "refs" / branch
    commit = reference.read_text().strip() if reference.is_file() else branch
    snapshot = store / "snapshots" / commit
    if not snapshot.is_dir():
        raise not_here(name if branch == "main" else f"{name}@{branch}", name)
    files = (path for path in snapshot.rglob("*") if path.is_file())
    return Repository(
        name=name,
        commit=commit,
        snapshot=snapshot,
        sizes={path.relative_to(snapshot).as_posix(): path.stat().st_size for path in files},
        is_cache=True,
    )


def _remember(store: Path, branch: str, commit: str) -> None:
    """Note what a branch is now, where huggingface_hub notes it, so that offline runs know."""
    reference = store / "refs" / branch
    if is_commit(branch) or (reference.is_file() and reference.read_text().strip() == commit):
        return
    try:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    except OSError as error:
        _log.warning("the cache cannot be written: %s", error)


def is_commit(revision: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


@contextmanager
def _hub_errors(name: str, revision: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into our errors, each with what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # hub 1 speaks httpx and hub 2 httpx2; the base of its own error is that of all transport errors
    transport: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        yield
    except (transport, OSError, HFValidationError) as error:
        raise _explained(error, name, revision) from error


def _explained(error: Exception, name: str, revision: str) -> SourceError:
    from huggingface_hub import errors

    hub = endpoint()
    if isinstance(error, errors.GatedRepoError):
        return SourceError(
            f"repository {name!r} is gated, and this machine has no access to it",
            hint=f"accept its terms at {hub}/{name}, then `hf auth login`",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            f"{name!r} is no directory here and no repository on {hub}, or a private one",
            hint="check the spelling; for a private repository `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(
            f"repository {name!r} has no revision {revision!r}",
            hint=f"the branches and tags are listed at {hub}/{name}/tree/main",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return SourceError(
            f"{hub} refused {name!r} with status {error.response.status_code}",
            hint="`hf auth whoami` shows whether this machine is logged in; or try again later",
        )
    if isinstance(error, errors.HFValidationError):
        return SourceError(f"{name!r} is no repository name", hint=f"a source is {FORMS}")
    return OfflineError(
        f"{hub} cannot be reached for {name!r}: {error}",
        hint=f"`hf download {name}` with a network, or name the path of a copy",
    )
