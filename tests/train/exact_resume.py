"""A program, started by test_loop, that compares a run bit by bit with a resumed and with a repeated one.

    python -m tests.train.exact_resume FOLDER

It is a separate process so that the compiler optimizes as it does for users; the tests' flags turn that off.
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
        # Build a new program, as a new process would.
        resumed = run(build(experiment(data)), prepared, folder)
        assert bits(resumed.state) == bits(whole.state), f"stopped at {when}: the weights differ"
        assert train_rows(folder) == train_rows(root / "whole"), f"stopped at {when}: the losses differ"
    again = run(program, prepared, root / "again")
    assert bits(again.state) == bits(whole.state), "second run: the weights differ"
    print("exact")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
