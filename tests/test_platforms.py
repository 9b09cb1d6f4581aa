"""Calls that Linux has and macOS lacks are guarded, so that the same code runs on both."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from tests.test_rooms import ARROWS

ROOT = Path(__file__).resolve().parent.parent
LINUX_ONLY = (
    "posix_fallocate", "posix_fadvise", "sched_getaffinity", "sched_setaffinity", "memfd_create", "pidfd_open",
    "copy_file_range", "splice", "eventfd", "getrandom", "sync_file_range",
)  # fmt: skip


def test_every_use_of_a_linux_call_asks_whether_it_exists():
    for room in ARROWS:
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for name in set(re.findall(rf"\bos\.({'|'.join(LINUX_ONLY)})\b", text)):
                assert f'hasattr(os, "{name}")' in text, f"{path}: os.{name} is missing on macOS; guard it with hasattr"


def test_arrays_are_written_where_space_cannot_be_reserved(monkeypatch, tmp_path):
    from data.storage import open_array

    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    with open_array(tmp_path / "rows.npy", rows.shape, rows.dtype) as write:
        write(rows)
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), rows)


def test_a_refused_memory_limit_is_an_error_except_on_macos(monkeypatch):
    pytest.importorskip("jinja2")
    from data.chat_worker import limit_memory

    def refuse(*_):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    limit_memory(1 << 30, platform="darwin")
    with pytest.raises(ValueError, match="current limit"):
        limit_memory(1 << 30, platform="linux")


def test_usable_cores_are_all_cores_without_affinity(monkeypatch):
    from experiments.cpu_devices import cores

    assert 1 <= cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores() == os.cpu_count()
