"""A folder in a bucket that is made object by object, and is whole when its last object is there (floor 0)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from phased_ift_jax.lease import LEASE, Lease
from phased_ift_jax.object_store import Facts, Objects
from phased_ift_jax.pictures import told
from phased_ift_jax.records import UserError

KEY = "DST"  # of convert
SOURCE = "source.json"  # as long as a folder is not whole, there or on a disk: what it is made from
LAST = "config.json"  # without it a folder is no model


@dataclass(frozen=True)
class Making:
    """What lies there already, of the same source, each object whole."""

    objects: Objects
    lease: Lease
    there: Mapping[str, Facts]

    def watched(self, done: Callable[[int], object]) -> Callable[[int], object]:
        """`done`, which raises `LeaseLost` where another process has taken the folder over: what it makes is not to be written over."""

        def told_of(size: int) -> None:
            self.lease.check()
            done(size)

        return told_of

    def finish(self, contents: Mapping[str, bytes]) -> None:
        """Write what is small, LAST last: then the folder is whole.

        Raises:
            StoreError, LeaseLost: it cannot be written, or another process has taken it over; what is there goes on with the same command.
        """
        for name, content in contents.items():
            if name != LAST:
                self.objects.write(name, content)
        self.lease.confirm()
        self.objects.write(LAST, contents[LAST])
        self.objects.delete([SOURCE])


@contextmanager
def making(address: str, source: str) -> Iterator[Making]:
    """A folder to be made at an address from a source (a text that says all of it); only one process makes it at a time.

    What a call that was stopped has made of the same source is kept; of another it is removed.

    Raises:
        UserError: something else lies there, another process is making it, or the bucket is not there or may not be written.
    """
    with told(KEY):
        objects = Objects(address, KEY)
        try:
            lease = Lease(objects).acquire()
        except UserError as error:
            raise UserError(str(error).replace("output_dir: ", "").replace("output_dir", "folder")) from None
    try:
        with told(KEY):
            there = objects.list()
            there.pop(LEASE, None)
            if there and (SOURCE not in there or LAST in there) and objects.read(SOURCE) != source.encode():
                raise UserError(f"'{objects.address}' is there, and was not made from this source as it is now in the way asked for; name another folder")
            if objects.read(SOURCE) != source.encode():
                objects.delete(there)
                objects.write(SOURCE, source.encode())
                there = {}
        yield Making(objects, lease, there)
    finally:
        lease.release()


def is_made(address: str, name: str) -> bytes | None:
    """What the object `name` of a whole folder says; None where the folder is not there, or not whole."""
    with told(KEY):
        objects = Objects(address, KEY)
        return objects.read(name) if objects.facts(LAST) and not objects.facts(SOURCE) else None
