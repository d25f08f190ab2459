"""Upload a bundle or a pair to the Hugging Face Hub (`nla push`).

Large files go first, one by one. The Hub keeps what has arrived, so a push that was stopped goes on where it
was when the same command runs again. One commit then makes all files visible together.
"""

import contextlib
from collections.abc import Callable, Iterator

from nla_jax.errors import UserError, one_line
from nla_jax.interchange.hub_files import Upload
from nla_jax.util import network

LARGE = 10**6  # bytes; larger files are sent one by one before the commit
TOKENS = "https://huggingface.co/settings/tokens"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def push(upload: Upload, *, message: str, revision: str = "", public: bool = False,
         tell: Callable[[str], None] = lambda words: None) -> str:
    """Upload to the Hub and return the address of the commit.

    Args:
      revision: a branch, made if it is not there; default: main.
      public: whether a new repository is public. An existing one is left as it is.
      tell: is called with a line before each large file.

    Raises UserError without a token, without the network, and for whatever the Hub refuses.
    """
    api = _api()
    repo = upload.repo
    with _explained(repo):
        api.create_repo(repo, private=not public, exist_ok=True)
        if revision and revision != "main":
            api.create_branch(repo, branch=revision, exist_ok=True)
        return _upload(api, upload, message, revision or None, tell)


def _api():
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, and a push needs the network: unset it")
    token = get_token()
    if not token:
        raise UserError(f"there is no Hugging Face token: {LOGIN} ({TOKENS})")
    return HfApi(endpoint=constants.ENDPOINT, token=token)


def _upload(api, upload: Upload, message: str, revision: str | None, tell: Callable) -> str:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    adds = []
    for name in sorted(upload.files, key=lambda n: (upload.size(n), n)):
        file = upload.files[name]
        adds.append(CommitOperationAdd(name, file if isinstance(file, bytes) else str(file)))
        if upload.size(name) > LARGE:
            tell(f"{upload.repo}: {name}, {upload.size(name) / 1e6:,.1f} MB")
            api.preupload_lfs_files(upload.repo, [adds[-1]], revision=revision, free_memory=False)
    return str(api.create_commit(upload.repo, adds, commit_message=message, revision=revision).commit_url)


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn errors of the Hub and of the network into one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # HTTP, DNS, files: many unrelated classes
        raise UserError(explain_error(repo, e)) from e


def explain_error(repo: str, error: Exception) -> str:
    """Return a line for an error of huggingface_hub. It never contains the token."""
    if type(error) is ValueError:  # a card that the client or the Hub finds invalid
        return f"{repo} cannot be uploaded: {one_line(error)[:200]}"
    chain = [error]
    while chain[-1].__cause__ is not None:  # the client wraps the answer to an upload
        chain.append(chain[-1].__cause__)
    error = next((e for e in chain if getattr(e, "response", None) is not None), chain[-1])
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = one_line(getattr(error, "server_message", None) or str(error))[:200]
    again = "run the same command again to go on"
    match status:
        case 401:
            return f"the Hub does not accept your token: {LOGIN} ({TOKENS})"
        case 402 | 403 if _is_about_storage(said):
            return f"{repo}: your storage on the Hub is full ({said}); delete something there, then {again}"
        case 403:
            return f"your token may not write to {repo} ({said}): make one that may, at {TOKENS}"
        case 404:
            return (f"{repo} was not found, or your token may not see it: check the owner's name, and that "
                    "the token may write there")
        case 409:
            return f"{repo} changed while this push was under way: {again}"
        case 413:
            return f"{repo}: a file is larger than the Hub takes ({said}): pack or export it in smaller files"
        case 429:
            return f"the Hub limits your requests: wait some minutes, then {again}"
        case int() if status >= 500:
            return f"the Hub failed with status {status}: {again}"
        case int():
            return f"the Hub refused {repo} with status {status} ({said})"
    return f"the Hub cannot be reached ({type(error).__name__}: {said}){network.hint(error)}; {again}"


def _is_about_storage(said: str) -> bool:
    """Return whether a refusal is about storage."""
    return any(word in said.lower() for word in ("quota", "storage limit", "storage patterns"))
