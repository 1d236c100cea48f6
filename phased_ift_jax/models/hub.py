"""The Hugging Face hub: models from it and to it, and scored files to it. With HF_HUB_OFFLINE=1 nothing here tries the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from phased_ift_jax.records import UserError

LOCALLY = "give a local folder"


def is_name(text: str) -> bool:
    """Whether a text may be a hub name, such as meta-llama/Llama-2-7b-hf."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The files of a model that fit these patterns, in the local cache; fetched, where they are not there yet.

    Other copies of the weights, which a repository may hold in folders or as `consolidated`, stay there.

    Raises:
        UserError: no such name or revision, no access, or no network and not in the cache.
    """
    import huggingface_hub

    with _one_line(name, LOCALLY), _found(name, revision):
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*", "consolidated*"]))


def headers(name: str, revision: str | None) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor of a model on the hub, by its name: a few kilobytes of each file are read, no weights."""
    import huggingface_hub
    from huggingface_hub import errors

    with _one_line(name, LOCALLY), _found(name, revision):
        try:
            found = huggingface_hub.get_safetensors_metadata(name, revision=revision)
        except errors.NotASafetensorsRepoError:
            raise UserError(f"model.model_name_or_path: '{name}' has no safetensors") from None
    return {tensor: (info.dtype, list(info.shape)) for file in found.files_metadata.values() for tensor, info in file.tensors.items()}


def push(folder: Path, name: str) -> str:
    """Upload a model folder, made under this name where it is not there; returns its address.

    Raises:
        UserError: no network, no access. The folder is as it was.
    """
    import huggingface_hub

    with _one_line(name, f"'{folder}' is whole; the same command uploads it again"):
        api = huggingface_hub.HfApi()
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model trained with phased_ift_jax")
        return str(address)


def push_dataset(files: Mapping[str, Path | bytes], name: str) -> str:
    """Upload files as one commit of a dataset, made under this name where it is not there; returns its address.

    Raises:
        UserError: no network, no access.
    """
    import huggingface_hub

    with _one_line(name, "the files here are whole; the same command uploads them again"):
        api = huggingface_hub.HfApi()
        address = api.create_repo(name, repo_type="dataset", exist_ok=True)
        operations = [huggingface_hub.CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(name, operations, commit_message="Scored with phased_ift_jax", repo_type="dataset")
        return str(address)


@contextmanager
def _found(name: str, revision: str | None) -> Iterator[None]:
    """A name or revision under which there is no model that may be read, said by the key that gives it."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"model.model_name_or_path: '{name}' is gated; accept the licence on its page, then set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"model.revision: '{name}' has no branch, tag or commit {revision!r}") from None
    except errors.HFValidationError:
        raise UserError(f"model.model_name_or_path: no such folder '{name}', and it is not a hub name") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"model.model_name_or_path: no folder and no hub model '{name}' (a private one needs HF_TOKEN)") from None


@contextmanager
def _one_line(name: str, else_do: str) -> Iterator[None]:
    """Whatever the hub refuses, or its client, said in one line with what would do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a kind for each step that may fail: HTTPError, OSError, ValueError, RuntimeError, kinds of their own
        absent = isinstance(error, errors.LocalEntryNotFoundError)
        cause = error.__cause__ or error if absent or isinstance(error, RuntimeError) else error  # these say only that something failed
        said = f"{type(cause).__name__}: " + " ".join(str(cause).split())[:200]
        if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403):
            said += "; set HF_TOKEN to one that may do this"
        if absent or isinstance(error, errors.OfflineModeIsEnabled):
            said = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else said
            raise UserError(f"hub: cannot reach it for '{name}'{', and it is not in the cache' * absent} ({said}); {else_do}") from None
        raise UserError(f"hub: '{name}': {said}; {else_do}") from None
