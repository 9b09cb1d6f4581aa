"""A run, the same run stopped and resumed, and the same run again, compared bit by bit; started by test_loop.

    python -m tests.train.exact_resume FOLDER

Its own process, so that the compiler works as it does for users: the tests' flags switch its optimizations off.
"""

import sys
from pathlib import Path

from data.config import SourceConfig
from data.prepare import prepare
from tests.data.conftest import byte_config
from tests.train.small_runs import StopAt, bits, experiment, run, train_rows
from train.program import build


def main(root: Path) -> None:
    data = byte_config(root, *(SourceConfig(name=name, path=str(root / name)) for name in ("large", "small")))
    prepared, program = prepare(data), build(experiment(data))
    whole = run(program, prepared, root / "whole")
    for when in (4, 10):  # an evaluation, a checkpoint
        folder = root / f"stopped_{when}"
        with StopAt(when) as stop:
            assert not run(program, prepared, folder, stop=stop).finished
        # A new program, as a new process would compile it.
        resumed = run(build(experiment(data)), prepared, folder)
        assert bits(resumed.state) == bits(whole.state), f"stopped at {when}: other weights"
        assert train_rows(folder) == train_rows(root / "whole"), f"stopped at {when}: other losses"
    again = run(program, prepared, root / "again")
    assert bits(again.state) == bits(whole.state), "a second start: other weights"
    print("exact")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
