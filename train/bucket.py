"""Objects in a bucket that change only from a known generation, and a check that a bucket can be used.

gcsfs can create an object only if it is absent, but cannot replace it only if it is unchanged. TensorStore can, and its
number of retries can be limited, so that a bucket that cannot be reached is an error within seconds.
"""

from __future__ import annotations

import os
from typing import Any

from etils import epath

from data.paths import PathError, bucket_client, is_local, require_backend

ABSENT = b"\x02"  # TensorStore's generation of an object that does not exist
ANSWER_SECONDS = 30.0  # for one request, with its retries
_RETRIES = {"gcs_request_retries": {"max_retries": 3, "initial_delay": "500ms", "max_delay": "2s"}}
_checked: set[str] = set()  # buckets that answered this process


class BucketError(OSError):
    """A bucket refused a request or could not be reached; the message says why."""


class BucketObject:
    """One object. Its methods raise BucketError."""

    def __init__(self, path: epath.Path):
        import tensorstore

        self._path = path
        bucket, _, name = os.fspath(path).partition("://")[2].partition("/")
        spec = {"driver": "gcs", "bucket": bucket, "path": name}
        self._store = self._answer(tensorstore.KvStore.open(spec, context=tensorstore.Context(_RETRIES)))

    def read(self) -> tuple[bytes, bytes]:
        """Return (content, generation). The content of an absent object is empty, and its generation is ABSENT."""
        found = self._answer(self._store.read(""))
        return found.value, found.stamp.generation

    def write(self, content: bytes, generation: bytes) -> bytes | None:
        """Write the object if it still has this generation. Return the new generation, or None if it has another."""
        return self._answer(self._store.write("", content, if_equal=generation)).generation or None

    def _answer(self, future: Any) -> Any:
        try:
            return future.result(timeout=ANSWER_SECONDS)
        except TimeoutError as error:
            raise BucketError(f"{self._path}: no answer in {ANSWER_SECONDS:.0f} s; check the network") from error
        except Exception as error:  # TensorStore raises generic types such as ValueError
            raise BucketError(f"{self._path}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Return why a bucket's client failed, as a phrase with a fix."""
    text = " ".join(str(error).split(" [http")[0].split())
    if "specified bucket does not exist" in text:
        return "the bucket does not exist; check its name, or create it with gcloud storage buckets create"
    denied = ("PERMISSION_DENIED", "UNAUTHENTICATED", "Forbidden", "401")
    if any(word in text for word in denied):
        return (
            f"permission denied ({text}); give this account the role Storage Object User on the bucket, or log in "
            f"with gcloud auth application-default login"
        )
    return f"the bucket cannot be reached ({text}); check the network, then start the same command again"


def is_client_error(error: Exception) -> bool:
    """Return whether a library below gcsfs raised this, which has no class in common with OSError."""
    return type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google", "requests")


def check_bucket(path: epath.Path, field: str = "path") -> epath.Path:
    """Return `path`. Raises PathError if it is in a bucket that does not exist, answer or let this account read.

    A bucket is asked once per process.
    """
    require_backend(path, field)
    bucket = "" if is_local(path) else os.fspath(path).partition("://")[2].partition("/")[0]
    if not bucket or bucket in _checked:
        return path
    try:
        BucketObject(path / "config.json").read()
        # Objects of an absent bucket are absent, too; only a listing shows the difference.
        bucket_client().call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
    except FileNotFoundError as error:
        reason = reason_of(ValueError("The specified bucket does not exist"))
        raise PathError(f"{field} = {os.fspath(path)!r}: {reason}") from error
    except BucketError as error:
        raise PathError(f"{field} = {os.fspath(path)!r}: {str(error).partition(': ')[2]}") from error
    except Exception as error:  # gcsfs raises its own exception classes
        raise PathError(f"{field} = {os.fspath(path)!r}: {reason_of(error)}") from error
    _checked.add(bucket)
    return path
