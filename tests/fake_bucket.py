"""A bucket of Google Cloud Storage for tests in this process, behind the real clients (tests/gcs_server.py)."""

import contextlib
import functools
import os

import fsspec.config

from tests.gcs_server import Store, client_environment, serve_bucket

_serving = contextlib.ExitStack()  # until the process ends


@functools.cache
def use_fake_bucket() -> Store:
    """Serve gs://bucket from this process until it ends, and lead this process's clients there. Return its store."""
    store, port = _serving.enter_context(serve_bucket())
    os.environ.update(client_environment(port))
    fsspec.config.conf.setdefault("gs", {})["token"] = "anon"  # FSSPEC_GS_TOKEN is read by the import
    return store
