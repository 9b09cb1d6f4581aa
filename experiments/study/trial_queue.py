"""A queue of trials in a storage of Optuna: an SQLite file, or the URL of any database. Studies and searches share it.

Workers are any number of processes on any machines. What makes them safe:
- Claiming is the database's own atomic change of a trial from WAITING to RUNNING.
- Several processes may queue the same trial. The one with the lowest number counts; the others are set aside.
- A running trial sends heartbeats. One whose worker died is queued again, at most `RETRIES` times, and continues from
  its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from experiments.study.definition import StudyError

HEARTBEAT_SECONDS = 10
GRACE = 4  # heartbeats that may be missing before a worker counts as dead
RETRIES = 5
ATTEMPTS = 5  # to open a database, a second apart
FAILURES = (SQLAlchemyError, optuna.exceptions.StorageInternalError)  # of a database


class Claimed(NamedTuple):
    """A trial that this process runs."""

    number: int  # of Optuna
    key: int  # of Optuna's storage
    id: str


class Counts(NamedTuple):
    """How many trials of a plan are in each state."""

    waiting: int
    running: int
    done: int  # or pruned
    failed: int


def open_storage(url: str, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> RDBStorage:
    """Return the storage at an SQLAlchemy URL. Raises StudyError with the fix if it cannot be used."""
    if url.startswith("sqlite:///") and (folder := Path(url.removeprefix("sqlite:///")).parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"--storage {url}: {folder} cannot be created ({error}); choose another file") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shown = without_password(url)
    try:
        return _connect(url, heartbeat_seconds)
    except RuntimeError as error:  # written by another version of Optuna
        raise StudyError(
            f"--storage {shown}: {' '.join(str(error).split())} Upgrade it: `optuna storage upgrade --storage URL`, "
            "install the version that wrote it, or use another storage"
        ) from error
    except (*FAILURES, ImportError) as error:  # ImportError: the driver is not installed
        reason = str(error).strip().splitlines()[0]
        raise StudyError(
            f"--storage {shown}: cannot be opened ({reason}). Check the URL, that the server runs, and that its driver "
            "is installed (psycopg for postgresql+psycopg://)"
        ) from error


def _connect(url: str, heartbeat_seconds: int) -> RDBStorage:
    """Return the storage at a URL. Raises what SQLAlchemy and Optuna raise."""
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    for left in reversed(range(ATTEMPTS)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                warnings.simplefilter("ignore", FutureWarning)
                storage = RDBStorage(
                    url,
                    engine_kwargs=engine,
                    heartbeat_interval=heartbeat_seconds,
                    grace_period=GRACE * heartbeat_seconds,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
                )
            if url.startswith("sqlite") and ":memory:" not in url:  # memory belongs to one connection of one process
                _lock_at_begin(storage.engine)
            return storage
        except SQLAlchemyError as error:
            # Another process creates the tables of an empty database, or inserts their versions.
            if not left or not (isinstance(error, IntegrityError) or "already exists" in str(error)):
                raise
            time.sleep(1.0)
    raise AssertionError("the last attempt returns or raises")


def _lock_at_begin(engine: Engine) -> None:
    """Make every transaction of an SQLite engine take the write lock at its beginning.

    By default, a transaction begins with its first write, so that two processes may both read that a trial is waiting
    before either takes it. (Servers lock the row that Optuna reads.)
    """
    engine.dispose()  # connections without the hooks

    @event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.rpartition(':')[0]}:***{at}{tail}" if at and head.count(":") > 1 else url


class TrialQueue:
    """The trials of one study or search, each with an `id`. Every method may raise StudyError if the storage fails.

    `recipe`: of the code that trains them. Trials of two recipes are not mixed.
    """

    def __init__(self, url: str, name: str, recipe: int, heartbeat_seconds: int = HEARTBEAT_SECONDS):
        self.url, self.name, self._heartbeat_seconds = url, name, heartbeat_seconds
        self._storage = open_storage(url, heartbeat_seconds)
        with self._failures():
            self._study = optuna.create_study(
                storage=self._storage, study_name=name, load_if_exists=True, direction="minimize"
            )
            found = self._study.user_attrs.get("recipe")
            if found is None:
                self._study.set_user_attr("recipe", recipe)
        if found not in (None, recipe):
            raise StudyError(
                f"--storage {without_password(url)}: the trials of {name!r} were recorded with recipe {found}, and "
                f"this code has recipe {recipe}: the same config now trains other weights, and the two must not be "
                "mixed. Use another storage (--storage sqlite:///runs/studies-2.db), or check out the code that "
                "recorded them"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            cause = error.__cause__ or error
            reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
            raise StudyError(
                f"--storage {without_password(self.url)}: the database failed ({reason}). Free its disk, or start it "
                "again, then repeat the command: finished trials are kept, and others continue from their checkpoint"
            ) from error

    def add(self, trials: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> int:
        """Queue the trials (id, further attributes, fixed parameters) that are not recorded yet, in order.

        Return how many were queued.
        """
        with self._failures():
            recorded = self._trials()
            known = {t.user_attrs["id"] for t in recorded if t.state != TrialState.FAIL or "error" in t.user_attrs}
            new = [trial for trial in trials if trial[0] not in known]
            for identity, attributes, parameters in new:
                self._study.enqueue_trial(dict(parameters), user_attrs={"id": identity, **attributes})
            return len(new)

    def claim(self, ids: Sequence[str] | None = None) -> Claimed | None:
        """Return the next waiting trial, which now belongs to this process, or None. `ids`: only one of these."""
        with self._failures():
            trials = self._trials()
            first: dict[str, int] = {}
            for trial in trials:
                if trial.state != TrialState.FAIL:
                    first.setdefault(trial.user_attrs["id"], trial.number)
            for trial in trials:
                identity = trial.user_attrs["id"]
                if trial.state != TrialState.WAITING or (ids is not None and identity not in ids):
                    continue
                if not self._take(trial):
                    continue  # another worker was faster
                if first[identity] != trial.number:
                    self._storage.set_trial_user_attr(trial._trial_id, "duplicate_of", first[identity])
                    self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                    continue
                self._storage.record_heartbeat(trial._trial_id)
                return Claimed(trial.number, trial._trial_id, identity)
            return None

    def _take(self, trial: FrozenTrial) -> bool:
        """Change a trial from WAITING to RUNNING. Return False if it is no longer waiting."""
        try:
            return self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:  # another worker finished it, or set it aside as a duplicate
            return False

    @contextlib.contextmanager
    def heartbeat(self, claimed: Claimed) -> Iterator[None]:
        """Send heartbeats for a trial in a thread."""
        left = threading.Event()

        def beat() -> None:
            while not left.wait(self._heartbeat_seconds):
                with contextlib.suppress(*FAILURES):  # the next write of the main thread reports a lost database
                    self._storage.record_heartbeat(claimed.key)
            self._storage.remove_session()  # that of this thread

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()

    def record(
        self, claimed: Claimed, state: TrialState, value: float, attributes: Mapping[str, Any],
        curve: Mapping[int, float],
    ) -> None:  # fmt: skip
        """Record the end of a trial, with its value at some steps. Nothing changes if another worker ended it first."""
        # Finished: the heartbeats failed, and another worker took over.
        with self._failures(), contextlib.suppress(UpdateFinishedTrialError):
            for step, at_step in curve.items():
                self._storage.set_trial_intermediate_value(claimed.key, step, at_step)
            for name, each in attributes.items():
                self._storage.set_trial_user_attr(claimed.key, name, json.loads(json.dumps(each)))
            self._storage.set_trial_state_values(claimed.key, state, [value])

    def fail(self, claimed: Claimed, reason: str) -> None:
        """Record that a trial cannot run. It is not repeated unless `retry_failed` is called."""
        with self._failures(), contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(claimed.key, "error", reason)
            self._storage.set_trial_state_values(claimed.key, TrialState.FAIL)

    def release(self, claimed: Claimed) -> None:
        """Queue a trial again that was stopped on request; it continues from its checkpoint."""
        with self._failures(), contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(claimed.key, TrialState.WAITING)

    def recover(self) -> None:
        """Queue the trials of dead workers again."""
        with self._failures(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)

    def retry_failed(self) -> int:
        """Forget the failures of trials, and queue them again. Return their number."""
        with self._failures():
            failed = [t for t in self._trials() if t.state == TrialState.FAIL and "error" in t.user_attrs]
            for trial in failed:
                attributes = {k: v for k, v in trial.user_attrs.items() if k != "error"}
                self._study.enqueue_trial(trial.params, user_attrs=attributes)
            return len(failed)

    def failures(self) -> dict[str, str]:
        """Return the reasons of the trials that failed and were not queued again, by id."""
        with self._failures():
            failed: dict[str, str] = {}
            for trial in self._trials():
                identity = trial.user_attrs["id"]
                if trial.state != TrialState.FAIL:
                    failed.pop(identity, None)
                elif "error" in trial.user_attrs:
                    failed[identity] = trial.user_attrs["error"]
                elif "duplicate_of" not in trial.user_attrs:
                    failed.setdefault(identity, f"its worker died {RETRIES + 1} times")
            return failed

    def counts(self, ids: Sequence[str]) -> Counts:
        """Return how many of the trials with these ids are in each state."""
        with self._failures():
            states: dict[str, TrialState] = {}
            for trial in self._trials():
                identity = trial.user_attrs["id"]
                if states.get(identity, TrialState.FAIL) == TrialState.FAIL:
                    states[identity] = trial.state
            found = [states.get(identity, TrialState.WAITING) for identity in ids]
            return Counts(
                found.count(TrialState.WAITING),
                found.count(TrialState.RUNNING),
                found.count(TrialState.COMPLETE) + found.count(TrialState.PRUNED),
                found.count(TrialState.FAIL),
            )

    def _trials(self) -> list[FrozenTrial]:
        trials = self._storage.get_all_trials(self._study._study_id, deepcopy=False)
        return sorted((t for t in trials if "id" in t.user_attrs), key=lambda t: t.number)
