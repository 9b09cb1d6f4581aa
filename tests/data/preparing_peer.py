"""A process that prepares data, alone or with others. test_processes and test_storage start it.

    python -m tests.data.preparing_peer INDEX COUNT STORE CONFIG [SCENARIO]

SCENARIO: interrupt | interrupt waiting | slow | limit=BYTES | keep=BYTES | section=BYTES

The processes share the folder STORE as their key-value store. CONFIG is a pickled DataConfig. With `interrupt`, the
process gets Ctrl-C when it first opens a file of the corpus; with `interrupt waiting`, while it waits for the others to
prepare. With `slow`, it pauses at every file. With `limit`, no file can grow beyond BYTES. With `keep`, it keeps BYTES
of text in memory. With `section`, a section has BYTES of text and no text stays in memory. The last line of output is
JSON with the number of times each file of the corpus was opened, and the identity or the error.
"""

import collections
import json
import os
import pickle
import resource
import signal
import sys
import time
from pathlib import Path

from data.config import DataConfig
from data.prepare import prepare
from data.processes import ONE_PROCESS


class FolderProcesses:
    """`Processes` that share a folder with one file per key."""

    def __init__(self, index: int, count: int, store: Path):
        self.index, self.count, self._store = index, count, store
        self.interrupted = False  # whether to send Ctrl-C while waiting for the others to prepare

    def send(self, key: str, text: str) -> None:
        path = self._path(key)
        temporary = self._store / f"{os.getpid()}.writing"
        temporary.write_text(text)
        temporary.rename(path)

    def receive(self, key: str, timeout: float | None = None) -> str:
        started = time.monotonic()
        if self.interrupted and key.startswith("4/"):
            signal.raise_signal(signal.SIGINT)
        while not self._path(key).exists():
            if timeout is not None and time.monotonic() - started > timeout:
                raise TimeoutError(key)
            time.sleep(0.005)
        return self._path(key).read_text()

    def _path(self, key: str) -> Path:
        return self._store / key.replace("/", "-")


def main(index: int, count: int, store: Path, config_file: Path, scenario: str = "") -> None:
    config: DataConfig = pickle.loads(config_file.read_bytes())
    corpus = tuple(source.path + "/" for source in config.sources)
    opened: collections.Counter[str] = collections.Counter()

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(corpus):
            opened[arguments[0]] += 1
            if scenario == "slow":
                time.sleep(0.1)
            if scenario == "interrupt" and opened.total() == 1:
                os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(watch)
    if scenario.startswith("limit="):
        limit = int(scenario.removeprefix("limit="))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    keep = {"keep_bytes": int(scenario.removeprefix("keep="))} if scenario.startswith("keep=") else {}
    if scenario.startswith("section="):
        keep = {"keep_bytes": 0, "section_bytes": int(scenario.removeprefix("section="))}
    lines: list[str] = []
    result: dict[str, object] = {"lines": lines}
    try:
        processes = FolderProcesses(index, count, store)
        processes.interrupted = scenario == "interrupt waiting"
        prepared = prepare(config, lines.append, processes=processes if count > 1 else ONE_PROCESS, **keep)
        result |= {"identity": prepared.identity, "directory": str(prepared.directory)}
    except (ValueError, OSError, KeyboardInterrupt) as error:
        result |= {"error": str(error), "kind": type(error).__name__}
    print(json.dumps({"opened": opened, **result}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), *sys.argv[5:])
