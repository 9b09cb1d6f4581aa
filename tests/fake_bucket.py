"""A bucket of Google Cloud Storage in memory, so that the paths of one can be tried without a network or gcsfs."""

from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FakeBucket(MemoryFileSystem):
    """What gs:// names from `use_fake_bucket` on: one store for the whole process."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    failures: ClassVar[list[Exception]] = []  # raised by the next writes, one each

    def _open(self, path, mode="rb", **options):
        if "w" in mode and self.failures:
            raise self.failures.pop(0)
        return super()._open(path, mode, **options)

    @classmethod
    def _strip_protocol(cls, path):
        path = path.split("://", 1)[-1]
        return f"/{path.strip('/')}" if path.strip("/") else ""


def use_fake_bucket() -> None:
    fsspec.register_implementation("gcs", FakeBucket, clobber=True)
