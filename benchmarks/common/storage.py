"""Where searches keep their trials: a database with optuna's heartbeat, or a journal file."""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError

from benchmarks.common.config import ConfigError

MAX_RETRIES = 5
OPEN_ATTEMPTS = 5


def open_database(place: str, heartbeat_seconds: int, grace_seconds: int) -> BaseStorage:
    """The storage at ``place``: a database URL, a journal file (``*.journal``) or else an SQLite file.

    Raises:
        ConfigError: if the database cannot be reached; the message has the address without what may be secret.
    """
    if "://" not in place:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
    if place.endswith((".journal", ".log")):
        return JournalStorage(JournalFileBackend(place))
    url = database_url(place)
    retry, keyword = retry_callback()
    options = {"heartbeat_interval": heartbeat_seconds, "grace_period": grace_seconds, keyword: retry}
    # Several processes write to one SQLite file: let them wait for each other instead of giving up.
    sqlite = url.get_backend_name() == "sqlite"
    engine = {"connect_args": {"timeout": 120}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(1, OPEN_ATTEMPTS + 1):
        try:
            storage = RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=engine, **options)
            return _without_waiting_for_the_disk(storage)
        except Exception as error:  # drivers raise their own kinds
            if attempt == OPEN_ATTEMPTS:
                said = _without_secrets(f"{type(error).__name__}: {str(error).splitlines()[0]}", url)
                raise ConfigError(
                    f"key 'storage': the database '{_public(url)}' cannot be used ({said}). Give a URL like "
                    "postgresql://user:password@host/database (its driver installed), or the path of a file."
                ) from None
            time.sleep(0.2 * attempt)  # two workers that start together both try to make the tables: one is told off
    raise AssertionError("the last attempt returns or raises")


def database_url(place: str) -> URL:
    """The URL of a database, or of the SQLite file ``place``.

    ``postgresql://`` takes the driver that is installed: which one SQLAlchemy takes depends on its version.
    """
    if "://" not in place:
        return URL.create("sqlite", database=str(Path(place).resolve()))
    try:
        url = make_url(place)
    except (ArgumentError, ValueError):
        raise ConfigError(
            f"key 'storage': the URL '{place.partition('://')[0]}://…' cannot be read. Give one like "
            "postgresql://user:password@host/database (with %40 for an '@' in the password), or the path of a file."
        ) from None
    if url.drivername == "postgresql":
        driver = next((name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name)), "psycopg")
        return url.set(drivername=f"postgresql+{driver}")
    return url


def _public(url: URL) -> str:
    """A URL without password and query: drivers take passwords there too."""
    return url.set(password=None, query={}).render_as_string()


def _without_secrets(text: str, url: URL) -> str:
    """``text`` with ``***`` in place of the password and all values of the query of ``url``."""
    values = [value for found in url.query.values() for value in ([found] if isinstance(found, str) else found)]
    for secret in [url.password, *values]:
        text = text.replace(str(secret), "***") if secret else text
    return text


def _without_waiting_for_the_disk(storage: RDBStorage) -> RDBStorage:
    """SQLite with a write-ahead log: a trial makes some fifteen commits, each of which else waits for the disk.

    What was committed survives the death of any process; a power failure may cost the last trials, never the file.
    """
    if storage.engine.dialect.name == "sqlite":

        def prepare(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

        event.listen(storage.engine, "connect", prepare)
        storage.engine.dispose()  # connections that are open already were not prepared
    return storage


def retry_callback() -> tuple[Callable[..., None], str]:
    """Optuna's callback that queues dead trials again, and the name of its argument (renamed in optuna 4.9)."""
    current = "heartbeat_stale_trial_callback"
    if current in inspect.signature(RDBStorage).parameters:
        return optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES), current
    return optuna.storages.RetryFailedTrialCallback(max_retry=MAX_RETRIES), "failed_trial_callback"
