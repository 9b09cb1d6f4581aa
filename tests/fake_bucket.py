"""An in-memory bucket of Google Cloud Storage, to test gs:// paths without a network or gcsfs."""

from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FakeBucket(MemoryFileSystem):
    """The file system behind gs:// after `use_fake_bucket`: one store for the whole process."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    failures: ClassVar[list[Exception]] = []  # each of the next writes raises one of these

    def _open(self, path, mode="rb", **options):
        if "w" in mode and self.failures:
            raise self.failures.pop(0)
        return super()._open(path, mode, **options)

    @classmethod
    def _strip_protocol(cls, path):
        path = path.split("://", 1)[-1]
        return f"/{path.strip('/')}" if path.strip("/") else ""


def use_fake_bucket() -> None:
    """Serve gs:// paths from FakeBucket in this process."""
    fsspec.register_implementation("gcs", FakeBucket, clobber=True)
