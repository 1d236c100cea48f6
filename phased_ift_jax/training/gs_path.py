"""How orbax walks about in a bucket: the few calls on folders that it makes beside its arrays, which tensorstore writes by itself.

Orbax knows paths by `etils.epath`, whose own ways to a bucket are TensorFlow and gcsfs. This one has our client, its patience and its
errors, keeps no listing that may be out of date on another host, and knows no rename: none can be used by accident.
"""

from __future__ import annotations

import fnmatch
import io
from typing import IO, Any

from etils import epath
from etils.epath import backend, gpath, stat_utils

from phased_ift_jax.object_store import SCHEME, Objects


class _Bucket(backend.Backend):
    """Folders are what names have before a slash: they need not be made, and are gone with their last object."""

    def open(self, path: Any, mode: str) -> IO[Any]:
        if mode.strip("bt") == "r":
            content = self._at(path).read(_name(path))
            if content is None:
                raise FileNotFoundError(f"no object '{path}'")
            return io.BytesIO(content) if "b" in mode else io.StringIO(content.decode("utf-8"))
        if mode.strip("bt") == "w":
            return _Writing(self._at(path), _name(path), "b" not in mode)  # type: ignore[return-value]
        raise NotImplementedError(f"an object cannot be opened with mode {mode!r}: '{path}'")

    def exists(self, path: Any) -> bool:
        return self._at(path).facts(_name(path)) is not None or self.isdir(path)

    def isdir(self, path: Any) -> bool:
        return self._at(path).is_folder(_name(path))

    def listdir(self, path: Any) -> list[str]:
        begin = _name(path) + "/"
        return sorted({name.removeprefix(begin).split("/")[0] for name in self._at(path).list(begin)} - {""})

    def glob(self, path: Any) -> list[str]:
        parts = str(path).split("/")
        fixed = next((place for place, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
        found = ["/".join(parts[:fixed])]
        for part in parts[fixed:]:
            found = [f"{folder}/{name}" for folder in found for name in self.listdir(folder) if fnmatch.fnmatchcase(name, part)]
        return found

    def makedirs(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        if not exist_ok and self.exists(path):
            raise FileExistsError(f"'{path}' is there already")

    mkdir = makedirs

    def rmtree(self, path: Any) -> None:
        self._at(path).delete(self._at(path).list(_name(path) + "/"))

    def remove(self, path: Any) -> None:
        self._at(path).delete([_name(path)])

    def _refused(self, *paths: Any, **_: Any) -> Any:
        raise NotImplementedError(f"nothing is renamed, copied or walked through in a bucket: {paths}")

    rename = replace = copy = walk = _refused

    def stat(self, path: Any) -> stat_utils.StatResult:
        facts = self._at(path).facts(_name(path))
        if facts is None and not self.isdir(path):
            raise FileNotFoundError(f"no object '{path}'")
        return stat_utils.StatResult(is_directory=facts is None, length=facts.size if facts else 0, mtime=int(facts.updated) if facts else 0, owner=None, group=None, mode=None)

    @staticmethod
    def _at(path: Any) -> Objects:
        bucket, _, name = str(path).removeprefix(SCHEME).partition("/")
        return Objects(f"{SCHEME}{bucket}/{name.split('/')[0]}")


def _name(path: Any) -> str:
    """A name relative to the first folder of a bucket, in which every path of ours lies."""
    return "/".join(str(path).removeprefix(SCHEME).rstrip("/").split("/")[2:])


class _Writing(io.BytesIO):
    """What is written becomes an object when it is closed, whole."""

    def __init__(self, objects: Objects, name: str, text: bool) -> None:
        super().__init__()
        self._objects, self._named, self._text = objects, name, text

    def write(self, content: Any) -> int:
        return super().write(content.encode("utf-8") if self._text else content)

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            super().close()  # half of it is no object
        self.close()

    def close(self) -> None:
        if not self.closed:
            self._objects.write(self._named, self.getvalue())
        super().close()


@epath.register_path_cls(SCHEME)
class GsPath(gpath.PosixGPath):
    """A path in a bucket, as `epath.Path("gs://...")` makes it once this module is imported."""

    _bucket = _Bucket()

    @property
    def _backend(self) -> backend.Backend:
        return self._bucket
