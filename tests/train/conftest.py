"""Fixtures of the tests of checkpoints."""

from pathlib import Path

import pytest

from tests.train.checkpoints import random_state
from train.checkpoint import Checkpointer


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory) -> Path:
    """A folder with steps 1 and 2 that stays intact; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("good")
    with Checkpointer(folder) as checkpointer:
        for step in (1, 2):
            assert checkpointer.save(step, random_state(step), metadata={"position": step}, wait=True)
    return folder
