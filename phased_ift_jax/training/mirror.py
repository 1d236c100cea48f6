"""A run in a bucket: its arrays lie there, and a folder on this machine, its mirror, holds what is small and grows, as on a disk.

A save writes the arrays into the bucket, then the ledgers as they were when it began, then the manifest, which makes it a checkpoint.
A start empties the mirror, and brings into it what the bucket says: the manifests, and the ledgers of the checkpoint that is gone on
from. Only the holder of the lease writes, and it asks whether it still is that before it removes or commits anything.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phased_ift_jax import pictures
from phased_ift_jax.files import LOCK, write_whole
from phased_ift_jax.lease import Lease
from phased_ift_jax.object_store import SCHEME, Facts, Objects, StoreError, split, work_folder
from phased_ift_jax.records import Failure, UserError

MANIFEST = "manifest.json"
LEDGERS = "ledgers"
SINCE = ("forgetting.json", "held_out_answers.jsonl", "starts.jsonl")  # what was noted there since a checkpoint stays when it is gone on from
LEDGER_FILES = ("config.yaml", "plan.json", "metrics.jsonl", "trained_ids.jsonl", "seconds.jsonl", "quarantine.jsonl", "nonfinite.json", "wandb_run_id", *SINCE)
SNAPSHOT = ".snapshot"
NEWEST = "newest_checkpoint"
CHECKPOINT = re.compile(r"(checkpoints/[^/]+/[0-9]+)/(.+)")
MARK = re.compile(r"(checkpoints/[^/]+/)\.([0-9]+)\.under-way")
SMALL = re.compile(rf"{MANIFEST}|commit_success\.txt|[^/]+/_METADATA")  # of a checkpoint: what is read without orbax

_opened: dict[Path, Mirror] = {}


def folder_of(output_dir: str) -> Path:
    """The folder on this machine's disk that a run works in: output_dir itself, or the mirror of an address."""
    if not output_dir.startswith(SCHEME):
        return Path(output_dir).expanduser()
    bucket, name = split(output_dir)
    return work_folder() / hashlib.sha256(f"{bucket}/{name}".encode()).hexdigest()[:16] / name.rpartition("/")[2]


def uploaded(export: Path) -> Path:
    """A file beside an export's folder: it is whole in the bucket, and these are its objects."""
    return export.with_name(f".{export.name}.uploaded.json")


def of(path: Path) -> Mirror | None:
    """The mirror that a path lies in; None where it is simply a path on a disk."""
    return next((mirror for folder, mirror in _opened.items() if path.absolute().is_relative_to(folder)), None)


def shown(path: Path) -> str:
    """A path as the user knows it."""
    mirror = of(path)
    return pictures.shown(path) if mirror is None else str(path).replace(str(mirror.folder), mirror.objects.address)


@contextmanager
def held(output_dir: str, folder: Path, writer: bool = True) -> Iterator[None]:
    """Where a run's output_dir is an address: hold its lease, and bring into the folder what lies there. On a disk nothing is to do.

    Of several processes one is the writer; the others save and load arrays, and know the address for that.

    Raises:
        UserError: another run holds it.
        StoreError: the bucket cannot be reached, or does not let us write.
    """
    if not output_dir.startswith(SCHEME):
        yield
        return
    objects = Objects(output_dir)
    if not writer:
        with Mirror(objects, folder).open():
            yield
        return
    mirror = Mirror(objects, folder, Lease(objects).acquire())
    try:
        mirror.pull()
        with mirror.open():
            yield
    finally:
        mirror.close()


class Mirror:
    """A folder, the address whose picture it is, and the lease to write there (None: to look only)."""

    def __init__(self, objects: Objects, folder: Path, lease: Lease | None = None) -> None:
        self.objects, self.folder, self.lease = objects, folder.absolute(), lease
        self._announced = self._pulled = False

    @contextmanager
    def open(self) -> Iterator[Path]:
        """Let `of` find this mirror; errors name the address instead of the folder."""
        _opened[self.folder] = self
        try:
            yield self.folder
        except (Failure, UserError) as error:
            error.args = (str(error).replace(str(self.folder), self.objects.address),)
            raise
        finally:
            del _opened[self.folder]

    def pull(self) -> None:
        """Make the folder what the bucket says; what an earlier save or removal that was killed has left there goes, if we may write."""
        for path in self.folder.iterdir():
            if path.name not in (LOCK, "profile", "wandb"):  # traces, which are nowhere else
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        listing = self.objects.list()
        remains = {f"{match[1]}{match[2]}" for match in map(MARK.fullmatch, listing) if match} - {name.removesuffix(f"/{MANIFEST}") for name in listing}
        left = [name for name in listing if MARK.fullmatch(name) or ((match := CHECKPOINT.fullmatch(name)) and match[1] in remains)]
        if self.lease is not None:
            self.objects.delete(name for name in left if not MARK.fullmatch(name))
            self.objects.delete(name for name in left if MARK.fullmatch(name))
        wanted = {name for name in listing if name in (*LEDGER_FILES, NEWEST)}
        for name in listing.keys() - set(left):
            if match := CHECKPOINT.fullmatch(name):
                (self.folder / match[1]).mkdir(parents=True, exist_ok=True)
                wanted |= {name} if SMALL.fullmatch(match[2]) else set()
        self.objects.download((name, self.folder / name) for name in wanted)
        for name in listing:
            if (match := re.fullmatch(r"(hf/[^/]+)\.json", name)) and self.objects.read(name) == (text := self._inventory(match[1], listing)).encode():
                (self.folder / match[1]).mkdir(parents=True)
                write_whole(uploaded(self.folder / match[1]), text)
        self._pulled = True

    def restore(self, checkpoint: Path) -> None:
        """Bring in the ledgers as they were with a checkpoint. What was measured since then is of weights that were saved, and stays."""
        names = (name for name in self.contents(checkpoint) if name.startswith(f"{LEDGERS}/"))
        files = {name: self.folder / name.removeprefix(f"{LEDGERS}/") for name in names}
        self.objects.download((f"{self._name(checkpoint)}/{name}", path) for name, path in files.items() if path.name not in SINCE or not path.exists())

    def begin(self, checkpoint: Path) -> str:
        """Get ready for a save, and return the address for its arrays: what lies there goes, and the ledgers are kept as they are now."""
        if self.lease is not None:
            self.lease.confirm()
            self._announce()
            self._clear(checkpoint)
            for path in self._ledgers():
                kept = self.folder / SNAPSHOT / path.relative_to(self.folder)
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, kept)
        return self.address(checkpoint)

    def address(self, path: Path) -> str:
        """Where in the bucket a path of the folder lies."""
        return f"{self.objects.address}/{self._name(path)}"

    def contents(self, checkpoint: Path) -> dict[str, list[object]]:
        """Size and CRC32C of every object of a checkpoint but its manifest, by name, as the store tells them."""
        return self._look(self._name(checkpoint))

    def settle(self, checkpoint: Path) -> None:
        """Upload the ledgers as they were when the save began, to the checkpoint and to where everybody looks for them."""
        self._confirm()
        snapshot = self.folder / SNAPSHOT
        files = [path for path in snapshot.rglob("*") if path.is_file()]
        self.objects.upload((f"{self._name(checkpoint)}/{LEDGERS}/{path.relative_to(snapshot)}", path) for path in files)
        self.objects.upload((path.name, path) for path in files if path.parent == snapshot)
        shutil.rmtree(snapshot)

    def commit(self, checkpoint: Path, text: str) -> None:
        """Write the manifest, which makes it a checkpoint: the last of its objects, and only if nobody else has taken the run over."""
        assert self.lease is not None, "only the holder of the lease saves"
        self.lease.confirm()
        name = self._name(checkpoint)
        self.objects.write(f"{name}/{MANIFEST}", text.encode(), over=0)
        self.lease.confirm()  # again: what is old goes only where this one counts
        self.objects.write(NEWEST, f"{self.objects.address}/{name}\n".encode())
        self.objects.delete([self._mark(checkpoint)])
        small = (inside for inside in self.contents(checkpoint) if SMALL.fullmatch(inside))
        checkpoint.mkdir(parents=True, exist_ok=True)
        self.objects.download((f"{name}/{inside}", checkpoint / inside) for inside in small)

    def remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint that newer ones have made old."""
        assert self.lease is not None, "only the holder of the lease removes"
        self._clear(checkpoint)
        self.objects.delete([self._mark(checkpoint)])

    def export(self, folder: Path) -> None:
        """Upload a Hugging Face folder, and last the object that says that it is whole. Of earlier ones the weights leave the mirror."""
        name = str(folder.absolute().relative_to(self.folder))
        self._confirm()
        self.objects.delete([f"{name}.json", *(f"{name}/{inside}" for inside in self._look(name))])
        self.objects.upload((f"{name}/{path.relative_to(folder)}", path) for path in folder.rglob("*") if path.is_file())
        if self.lease is not None:
            self.lease.confirm()
        text = self._inventory(name)
        self.objects.write(f"{name}.json", text.encode())
        write_whole(uploaded(folder), text)
        for weights in folder.parent.glob("*/*.safetensors"):
            if weights.parent != folder and uploaded(weights.parent).exists():
                weights.unlink()
        self.publish()

    def publish(self) -> None:
        """Upload what lies at the top of the folder as it is now, for whoever looks; a start goes by the checkpoints."""
        self.objects.upload((path.name, path) for path in self._ledgers() if path.parent == self.folder)

    def show(self, path: Path) -> None:
        """Upload one of these files now: what it says is not to be lost with this machine."""
        self._confirm()
        self._announce()
        self.objects.upload([(path.name, path)])

    def _announce(self) -> None:
        """What tells a run that was killed before its first checkpoint from something else."""
        if not self._announced:
            self.objects.upload([("config.yaml", self.folder / "config.yaml")])
            self._announced = True

    def close(self) -> None:
        """The last word of a run that ends, however it does, and the lease is another's."""
        assert self.lease is not None
        with suppress(Failure):  # the error that ends the run is said, not this one; what a start needs is in the checkpoints
            if self._pulled:  # else what lies in the folder is not the run
                self.lease.confirm()
                self.publish()
        self.lease.release()

    def _ledgers(self) -> list[Path]:
        """Files of the run but checkpoints, exports and traces."""
        inside = ((path, path.relative_to(self.folder).parts) for path in self.folder.rglob("*") if path.is_file())
        return [path for path, parts in inside if parts[0] in (*LEDGER_FILES, "tensorboard") and not any(part.startswith(".") for part in parts)]

    def _clear(self, checkpoint: Path) -> None:
        """Remove what lies where a checkpoint is or is to be, the manifest first; the mark says until then that these are remains."""
        name = self._name(checkpoint)
        there = {found: facts.generation for found, facts in self.objects.list(f"{name}/").items()}
        self._confirm()  # after the look: what another has put there since is of another generation, and stays
        self.objects.write(self._mark(checkpoint), b"")
        if sealed := there.pop(f"{name}/{MANIFEST}", 0):
            self.objects.delete({f"{name}/{MANIFEST}": sealed})
        self.objects.delete(there)

    def _confirm(self) -> None:
        if self.lease is not None:
            self.lease.confirm()

    def _inventory(self, name: str, listing: dict[str, Facts] | None = None) -> str:
        """What an export is made of, as the object that makes it whole says it."""
        return json.dumps({"address": f"{self.objects.address}/{name}", "files": self._look(name, listing)}, indent=1) + "\n"

    def _look(self, name: str, listing: dict[str, Facts] | None = None) -> dict[str, list[object]]:
        listing = self.objects.list(f"{name}/") if listing is None else listing
        inside = {found.removeprefix(f"{name}/"): facts for found, facts in listing.items() if found.startswith(f"{name}/")}
        return {found: [facts.size, facts.crc32c] for found, facts in sorted(inside.items()) if found != MANIFEST}

    def _name(self, path: Path) -> str:
        return path.absolute().relative_to(self.folder).as_posix()

    def _mark(self, checkpoint: Path) -> str:
        return f"{self._name(checkpoint.parent)}/.{checkpoint.name}.under-way"


def check(path: Path) -> None:
    """Raise `LeaseLost` where the run that a path belongs to was taken over."""
    if (mirror := of(path)) and mirror.lease:
        mirror.lease.check()


def restore(checkpoint: Path) -> None:
    """Bring the ledgers of a run back to what they were with a checkpoint; on a disk they lie where they were."""
    if mirror := of(checkpoint):
        mirror.restore(checkpoint)


def show(path: Path) -> None:
    """Let a bucket have a file of the run at once; on a disk it is there."""
    if mirror := of(path):
        mirror.show(path.absolute())


def export(folder: Path) -> None:
    """Upload an export that is in a mirror."""
    if mirror := of(folder):
        mirror.export(folder)


def withdraw(folder: Path) -> bool:
    """Let an export in a bucket count as none, until it is made again in its place; False on a disk, where it can be renamed."""
    mirror = of(folder)
    if mirror is None:
        return False
    mirror._confirm()
    mirror.objects.delete([f"{folder.absolute().relative_to(mirror.folder)}.json"])
    uploaded(folder).unlink(missing_ok=True)
    shutil.rmtree(folder)
    return True


def fetched(folder: Path) -> Path:
    """An export's folder, with the files in it that an earlier start of the run has uploaded."""
    if uploaded(folder).exists():
        facts = json.loads(uploaded(folder).read_text(encoding="utf-8"))
        Objects(facts["address"]).download((name, folder / name) for name in facts["files"] if not (folder / name).exists())
    return folder


@contextmanager
def picture(address: str) -> Iterator[Path]:
    """A folder that shows, for a while, what lies at an address now: to look at, while the run may be at work."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="phased_ift_jax-") as work:
        mirror = Mirror(Objects(address), Path(work))
        for last in (False, False, True):
            try:
                mirror.pull()
                break
            except StoreError:  # what was listed may be removed before it is read
                if last:
                    raise
        with mirror.open() as folder:
            yield folder
