"""The folder of a run: what may be in it when a run starts, and how it is put aside."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from phased_ift_jax.config import RunConfig, load
from phased_ift_jax.files import LOCK, holder_of, sole_writer
from phased_ift_jax.lease import LEASE, refusal, whoami
from phased_ift_jax.object_store import Objects, StoreError, is_address
from phased_ift_jax.records import UserError


def begin_afresh(config: RunConfig) -> Path | None:
    """Rename what lies in output_dir, so that a run starts at zero and nothing is lost; returns its new name, None where nothing was there.

    Raises:
        UserError: another process is at it, it holds no run, or it is an address, where nothing can be renamed.
    """
    if is_address(config.output_dir):
        if Objects(config.output_dir).facts("config.yaml") is None:
            return None
        raise UserError(f"--fresh: nothing in '{config.output_dir}' can be renamed; name another output_dir, and what is there stays")
    output = Path(config.output_dir).expanduser()
    if not (output / "config.yaml").exists():
        return None
    output = output.resolve()
    aside = next(path for number in itertools.count(1) if not (path := output.with_name(f"{output.name}.{number}")).exists())
    try:
        with sole_writer(output):
            return output.rename(aside)
    except OSError as error:
        raise UserError(f"output_dir: cannot rename '{output}' to '{aside}': {error.strerror}; choose another output_dir") from None


def check_output(config: RunConfig, same_settings: bool = True, look: bool = True) -> None:
    """Refuse an output_dir that holds something else, is at another process's work, or holds a run with settings that would give another result."""
    if is_address(config.output_dir):
        try:
            return _check_address(config, Objects(config.output_dir), same_settings, look)
        except StoreError as error:
            raise UserError(f"output_dir: {error}") from None
    output = Path(config.output_dir).expanduser()
    try:
        _check_folder(config, output, same_settings, look)
    except OSError as error:
        raise UserError(f"output_dir: cannot look into '{output}': {error.strerror}") from None


def _check_folder(config: RunConfig, output: Path, same_settings: bool, look: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir: '{output}' is a file; name a folder")
    there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UserError(f"output_dir: cannot write '{output}': '{there}' is not a folder that this user may write to")
    if look and (holder := holder_of(output)):
        raise UserError(f"output_dir: {holder} is at work in '{output}'; wait for it to end, or choose another output_dir")
    saved = output / "config.yaml"
    if not saved.exists():
        if output.exists() and any(path.name not in (LOCK, ".config.yaml.part") for path in output.iterdir()):
            raise UserError(f"output_dir: '{output}' is not empty and holds no run; name another folder")
        return
    if same_settings:
        _check_settings(config, load(saved), str(output))


def _check_address(config: RunConfig, objects: Objects, same_settings: bool, look: bool) -> None:
    if look and (there := objects.facts(LEASE)) and (reason := refusal(objects, there, whoami())):
        raise UserError(reason)
    saved = objects.read("config.yaml")
    if saved is None:
        if any(name not in (LEASE, "config.yaml") for name in objects.list()):
            raise UserError(f"output_dir: '{objects.address}' is not empty and holds no run; name another address")
    elif same_settings:
        try:
            then = RunConfig.model_validate(yaml.safe_load(saved))
        except (ValueError, yaml.YAMLError):
            raise UserError(f"output_dir: '{objects.address}/config.yaml' is no configuration of this version; restore it, or name another output_dir") from None
        _check_settings(config, then, objects.address)


def _check_settings(config: RunConfig, saved: RunConfig, output: str) -> None:
    for name in ("seed", "model", "data", "curriculum", "training", "mesh"):
        then, now = ({name: tree[name]} for tree in (saved.model_dump(mode="json", by_alias=True), config.model_dump(mode="json", by_alias=True)))
        for key in _differences(then, now):
            was, is_now = (yaml.safe_dump(_at(tree, key), default_flow_style=True).split("\n")[0] for tree in (then, now))
            raise UserError(f"{key}: the run in '{output}' was started with {was}, this is {is_now}; go back to that, name another output_dir, or start again with --fresh")


def _differences(then: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict) and then.keys() == now.keys():
        for name in then:
            yield from _differences(then[name], now[name], f"{key}.{name}" if key else name)
    elif then != now:
        yield key


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
