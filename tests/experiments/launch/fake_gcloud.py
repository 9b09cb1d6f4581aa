"""A `gcloud` that plays a scripted sequence: python -m tests.experiments.launch.fake_gcloud FOLDER ARGUMENTS.

FOLDER/script holds a line for each call of `describe` (the state that it prints; ABSENT fails as gcloud does) and of
`ssh` with COMMAND ("run CODE", or "run forever" for one that waits for a stop or its death). FOLDER/calls gets one line
for each call, without the flags that say where.
"""

from __future__ import annotations

import fcntl
import sys
import time
from pathlib import Path


def next_line(folder: Path, running: bool) -> str:
    """Return the next line of the script. The last one lasts, and a slice that is about to run something is active."""
    with (folder / "script").open("r+") as script:
        fcntl.flock(script, fcntl.LOCK_EX)
        line, *rest = script.read().splitlines()
        if line.startswith("run ") and not running:
            return "ACTIVE"
        script.seek(0)
        script.write("\n".join(rest or [line]))
        script.truncate()
        return line


def main(folder: Path, words: list[str]) -> int:
    verb = " ".join(word for word in words[2:5] if not word.startswith("-"))
    kind = verb
    if "ssh" in verb:
        kind = "run" if "launch.worker --lock" in words[-1] else "stop" if "--stop" in words[-1] else "install"
    with (folder / "calls").open("a") as calls:
        calls.write(f"{kind}\n")
    if kind == "run":
        (folder / "command").write_text(words[-1])
    if kind == "stop":
        (folder / "stopped").write_text("")
    if "describe" not in verb and kind != "run":
        return 0
    line = next_line(folder, running=kind == "run")
    if kind == "run":
        assert line.startswith("run "), f"the script expects {line}"
        if line != "run forever":
            return int(line.split()[1])
        end = time.monotonic() + 30.0
        while time.monotonic() < end:
            if (folder / "stopped").exists():
                return 143
            time.sleep(0.02)
        return 1
    if line == "ABSENT":
        print("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource", file=sys.stderr)
        return 1
    if line == "DENIED":
        print("ERROR: (gcloud) PERMISSION_DENIED: Permission denied on tpu.googleapis.com", file=sys.stderr)
        return 1
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
