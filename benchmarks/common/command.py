"""A benchmark as a command: what its user can mend is said in one line that names it, without a traceback."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.common.config import ConfigError


class WorkerError(RuntimeError):
    """A worker process ended with an error that it has printed itself."""


def run_command(main: Callable[[], object]) -> None:
    """Calls ``main`` and ends the program with status 1 and one line for an error that its user can mend."""
    with plain_errors(Path(sys.argv[0]).stem):
        main()


@contextlib.contextmanager
def plain_errors(name: str) -> Iterator[None]:
    """Turns errors that the user of the command ``name`` can mend into ``SystemExit`` with one line."""
    saved = threading.excepthook
    threading.excepthook = lambda given: None if _is_database_error(given.exc_value) else saved(given)  # optuna's heartbeat
    try:
        yield
    except (ConfigError, WorkerError) as error:
        raise SystemExit(f"{name}: {error}") from None
    except OSError as error:
        raise SystemExit(f"{name}: {_writing_failed(error)}") from None
    except Exception as error:
        if not _is_database_error(error):
            raise
        raise SystemExit(f"{name}: the trials could not be stored: {_cause(error)}. {_GO_ON}") from None
    finally:
        threading.excepthook = saved


def exit_with_parent() -> None:
    """Ends this worker process at once when its parent dies, even by ``kill -9``: nobody would count its work.

    The pipe to the parent closes with it, which the operating system sees to; it needs no polling, on any system.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only for processes that multiprocessing has started"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="exit with parent").start()


_GO_ON = "What was finished is kept: free space or mend the place (--out, --storage), then the same command goes on."


def _writing_failed(error: OSError) -> str:
    place = f"'{error.filename}': " if error.filename else ""
    return f"{place}{error.strerror or error}. {_GO_ON}"


def _is_database_error(error: BaseException | None) -> bool:
    """Whether a database is behind ``error``: a full disk, a file that cannot be written, a server that went away."""
    while error is not None:
        if type(error).__module__.split(".")[0] in ("sqlalchemy", "sqlite3", "psycopg", "psycopg2"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _cause(error: BaseException) -> str:
    """First line of what the driver itself said."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
