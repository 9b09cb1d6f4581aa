"""A first signal stops all processes at the same step; a second signal, hangs and exceptions end a process at once."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import signals
from train.peer_watch import EXIT_PEER_LOST, REMEDY, PeerWatch, describe, is_collective_failure
from train.signals import EXIT_HUNG, StopSignal, Watchdog

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()


def run_code(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def start_peers(scenario: str, folder: Path, devices: int = 4) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.train.peers", scenario, address, str(rank), str(folder)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]


def finish(peers: list[subprocess.Popen], timeout: float = 200) -> list[tuple[str, str]]:
    try:
        return [peer.communicate(timeout=timeout) for peer in peers]
    finally:
        for peer in peers:
            peer.kill()


# ---------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_the_first_signal_requests_a_stop_and_handlers_are_restored(number, capfd):
    before = [signal.getsignal(each) for each in signals.SIGNALS]
    with StopSignal() as stop:
        assert not stop.requested and not stop.agreed(0)
        signal.raise_signal(number)
        assert stop.requested and stop.agreed(1)
        assert capfd.readouterr().err.count("\n") == 1
    assert [signal.getsignal(each) for each in signals.SIGNALS] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_exits_at_once(number, code):
    done = run_code(f"""
import signal
from train.signals import StopSignal
with StopSignal():
    signal.raise_signal({number:d})
    print("still here", flush=True)
    signal.raise_signal({number:d})
    print("not here")
""")
    assert (done.returncode, done.stdout) == (code, "still here\n")
    assert "save and exit" in done.stderr and "exiting at once" in done.stderr


def test_the_watchdog_shows_where_the_loop_hangs():
    done = run_code("""
import time
from train.signals import Watchdog
with Watchdog(0.5) as dog:
    time.sleep(0.8)          # compiling: the clock has not started
    for _ in range(4):
        dog.beat()
        time.sleep(0.2)
    print("now", flush=True)
    def stuck_here():
        time.sleep(30)
    stuck_here()
""")
    assert (done.returncode, done.stdout) == (EXIT_HUNG, "now\n")
    assert "no step for 0.5 s" in done.stderr and "in stuck_here" in done.stderr


def test_the_watchdog_is_off_at_zero_and_ends_on_exit():
    threads = threading.active_count()
    with Watchdog(0) as dog:
        dog.beat()
        assert threading.active_count() == threads
    with Watchdog(0.2) as dog:
        dog.beat()
    assert threading.active_count() == threads
    time.sleep(0.4)
    with pytest.raises(ValueError, match="watchdog seconds = -1"):
        Watchdog(-1)


@pytest.mark.parametrize(("error", "code"), [("RuntimeError('injected')", 1), ("KeyboardInterrupt", 130)])
def test_an_exception_exits_hard(error, code):
    done = run_code(f"""
import atexit, sys
from train.signals import exit_hard_on_exception
exit_hard_on_exception()
atexit.register(lambda: print("waited for peers"))
sys.stdout.write("unflushed ")
raise {error}
""")
    assert (done.returncode, done.stdout) == (code, "unflushed ")
    assert "Traceback" in done.stderr and error.partition("(")[0] in done.stderr


# ---------------------------------------------------------------------------------------------------- agreement


class Store:
    """A stand-in for the coordination service's key-value store, within one process."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key, value):
        assert key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(folder)]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0.0005, 0.004), min_size=2, max_size=4),
    st.integers(0, 3),
    st.floats(0, 0.05),
    st.integers(1, 60),
)
def test_all_loops_stop_after_the_same_step(paces, asked, delay, last_step):
    """Threads simulate processes of different speeds, at most two steps apart, as collectives keep them."""
    with pytest.MonkeyPatch.context() as patch:
        store = Store()
        patch.setattr(signals, "POLL_SECONDS", 0.005)
        patch.setattr(signals.distributed.global_state, "client", store)
        patch.setattr(signals.jax, "process_count", lambda: len(paces))
        # Each simulated process and its watcher have the same rank.
        patch.setattr(signals.jax, "process_index", lambda: ranks[threading.current_thread().name])
        ranks: dict[str, int] = {}
        stops = [StopSignal() for _ in paces]
        agreements = []
        for index, stop in enumerate(stops):
            patch.setattr(signals, "_generation", iter([0]))
            agreement = signals._Agreement(stop)
            agreement._thread.name = f"watcher-{index}"
            ranks[f"watcher-{index}"] = ranks[f"loop-{index}"] = index
            agreements.append(agreement)
        done, at = [None] * len(paces), [0] * len(paces)

        def loop(index):
            for step in range(last_step + 1):
                at[index] = step
                while step - min(at) > 2 and None in done:
                    time.sleep(0.0005)
                time.sleep(paces[index])
                if agreements[index].reached(step):
                    break
            done[index] = step
            at[index] = last_step + 3
            agreements[index].leave()

        loops = [threading.Thread(target=loop, args=(index,), name=f"loop-{index}") for index in range(len(paces))]
        for each in loops:
            each.start()
        time.sleep(delay)
        stops[asked % len(paces)].requested = True
        for each in loops:
            each.join(10)
            assert not each.is_alive()
        assert len(set(done)) == 1, done


# ---------------------------------------------------------------------------------------------------- lost peers


class Peers(Store):
    """The store with the calls of `PeerWatch`. Without a coordinator, every call fails."""

    coordinator = True

    def key_value_set(self, key, value, allow_overwrite=False):
        self._answer()
        self.values[key] = value

    def key_value_dir_get(self, folder):
        self._answer()
        return super().key_value_dir_get(folder)

    def _answer(self):
        if not self.coordinator:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to remote host")


@pytest.fixture
def watches():
    """Three simulated processes that watch each other in one store, and the last words of each."""
    store, words = Peers(), {0: [], 1: [], 2: []}
    made = [PeerWatch(store, index, 3, words[index].append, 0.5, 0.02) for index in range(3)]
    for watch in made:
        watch.start()
    time.sleep(0.2)
    assert not any(words.values())
    yield store, made, words
    for watch in made:
        watch.stop()


def last_words(words, *indices, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not all(words[index] for index in indices) and time.monotonic() < deadline:
        time.sleep(0.01)
    return {words[index][0] if words[index] else None for index in indices}


def test_a_killed_process_is_reported_and_one_that_left_is_not(watches):
    _, (_, first, second), words = watches
    first.stop()
    time.sleep(1.0)
    assert not any(words.values())
    second._stopped.set()  # as after kill -9: no more beats and no message
    second._thread.join()
    assert last_words(words, 0) == {describe([2], 3, "no heartbeat for 0.5 s", {2: HOST})}


def test_a_process_that_never_sends_a_beat_is_reported():
    words: list[str] = []
    watch = PeerWatch(Peers(), 0, 2, words.append, 0.5, 0.02)
    watch.start()
    assert last_words({0: words}, 0) == {describe([1], 2, "no heartbeat for 0.5 s")}
    watch.stop()


def test_a_process_that_raised_is_named_with_its_error(watches):
    _, (_, first, _), words = watches
    first.fail("ValueError: no")
    assert last_words(words, 0, 2) == {describe([1], 3, "it ended with ValueError: no", {1: HOST})} and not words[1]


def test_a_silent_coordinator_is_reported_as_process_0(watches):
    store, _, words = watches
    store.coordinator = False
    (sentence,) = last_words(words, 1, 2)
    assert sentence.startswith(f"error: process 0 (host {HOST}) of 3 was lost: the coordinator") and sentence.endswith(
        REMEDY
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("UNKNOWN: Gloo all-reduce failed: [gloo/transport/tcp/pair.cc:547] Connection closed by peer", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes", False),
    ],
)
def test_only_errors_of_collectives_count_as_a_lost_peer(text, expected):
    assert is_collective_failure(jax.errors.JaxRuntimeError(text)) == expected
    assert not is_collective_failure(ValueError(text))


# ---------------------------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_share_checkpoints(tmp_path):
    peers = start_peers("checkpoints", tmp_path)
    for peer, (out, err) in zip(peers, finish(peers), strict=True):
        assert peer.returncode == 0 and "checkpoints held" in out, err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_stop_at_the_same_step(tmp_path, rank):
    peers = start_peers("stop", tmp_path)
    deadline = time.monotonic() + 40
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    peers[rank].send_signal(signal.SIGTERM)
    outputs = [re.findall(r"stopped at (\d+), requested here: (\w+)", out) for out, _ in finish(peers)]
    assert [peer.returncode for peer in peers] == [0, 0]
    (step, asked), (other_step, other_asked) = outputs[rank][0], outputs[1 - rank][0]
    assert step == other_step and (asked, other_asked) == ("True", "False")


@pytest.mark.slow
def test_gradients_of_gathered_weights_are_exact_between_processes(tmp_path):
    """Gloo's reduce-scatter corrupts large arrays without an error (see sharding/manual.py)."""
    peers = start_peers("sums", tmp_path, devices=1)
    for peer, (out, err) in zip(peers, finish(peers, timeout=200), strict=True):
        assert peer.returncode == 0 and "wrong sums: 0\n" in out, (out, err)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_loss_of_a_peer_is_reported_in_one_sentence(tmp_path, killed):
    """Process 0 runs the coordinator, and without it JAX aborts the other process. Without process 1, a collective
    fails."""
    peers = start_peers("train_forever", tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    peers[killed].kill()
    _, err = finish(peers)[1 - killed]
    assert peers[1 - killed].returncode == EXIT_PEER_LOST, err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"error: process {killed} (host {HOST}) of 2 was lost: ") and last.endswith(REMEDY), err
    assert "Traceback" not in err and err.count(REMEDY) == 1, err


@pytest.mark.slow
def test_the_error_of_a_peer_is_reported_by_the_other(tmp_path):
    busy, raising = start_peers("crash", tmp_path)
    (_, err), (_, other_err) = finish([busy, raising])
    assert (busy.returncode, raising.returncode) == (EXIT_PEER_LOST, 1)
    assert "Traceback" in other_err and REMEDY not in other_err
    assert err.strip().splitlines()[-1] == describe(
        [1], 2, "it ended with RuntimeError: injected in two lines", {1: HOST}
    )


@pytest.mark.parametrize(
    ("count", "indices"), [(2, [1]), (3, [0]), (2, [0, 2])], ids=["no_coordinator", "too_few", "index_too_large"]
)
def test_processes_that_fail_to_join_end_with_a_sentence(count, indices):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # Each process gets a count above its index, because jax checks that.
    code = "import sys; from train.peer_watch import join; join(*map(int, sys.argv[1:]), 4)"
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(max(count, index + 1)), str(index)],
            cwd=ROOT, env=os.environ | {"JAX_COORDINATOR_ADDRESS": address}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in indices
    ]  # fmt: skip
    for index, peer, (_, err) in zip(indices, peers, finish(peers), strict=True):
        assert peer.returncode == 1, err
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: --distributed: the processes did not all join within 4 s")
        assert f"JAX_COORDINATOR_ADDRESS = {address}, " in last and f"JAX_PROCESS_ID = {index})" in last
