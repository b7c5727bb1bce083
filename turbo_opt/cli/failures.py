"""What the user sees and what the shell gets when a command does not end well."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import click

from turbo_opt.cli.session import Session
from turbo_opt.errors import TurboOptError

FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE, TERMINATED = 1, 2, 130, 141, 143
_USERS_TO_FIX = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY,
}  # fmt: skip
_QUIET_VARIABLES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


class Terminated(BaseException):
    """SIGTERM arrived."""


def run_guarded(session: Session, run: Callable[[], Any]) -> int:
    """Run a command; its exit code, after one clear message if it failed."""
    try:
        with _signals(), _other_libraries_quiet(session):
            code = run()
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail(session, INTERRUPTED, "interrupted" + session.when_stopped)
    except Terminated:
        return _fail(session, TERMINATED, "terminated" + session.when_stopped)
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it somewhere to go.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        code, message = describe(error)
        if session.debug:
            session.print_error(traceback.format_exc())
        return _fail(session, code, message)


def describe(error: Exception) -> tuple[int, str]:
    """(exit code, message) of anything that a command may raise."""
    if isinstance(error, TurboOptError):
        return error.exit_code, str(error)
    if isinstance(error, click.UsageError):
        where = f"\nsee '{error.ctx.command_path} --help'" if error.ctx else ""
        text = error.format_message()
        return BAD_INPUT, text[:1].lower() + text[1:] + where
    if isinstance(error, click.ClickException):
        return BAD_INPUT, error.format_message()
    if isinstance(error, OSError) and error.errno in _USERS_TO_FIX:
        where = f"{error.filename}: " if error.filename else ""
        return BAD_INPUT, f"{where}{os.strerror(error.errno).lower()}"
    if _is(error, "turbo_opt.kernels.errors", "ProviderError"):
        return BAD_INPUT, str(error)
    if isinstance(error, MemoryError) or _is(error, "torch", "OutOfMemoryError"):
        return FAILED, f"out of memory: {str(error).splitlines()[0] if str(error) else 'RAM'}"
    kind = type(error).__name__
    return FAILED, f"internal error, {kind}: {error}\nrun it again with --debug for a traceback"


def _fail(session: Session, code: int, message: str) -> int:
    session.print_error(f"error: {message}")
    return code


def _is(error: Exception, module: str, name: str) -> bool:
    """Whether it is of a class in a module that may not have been imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Make SIGTERM an exception, so that what is half done is cleaned up."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _other_libraries_quiet(session: Session) -> Iterator[None]:
    """No progress bars, warnings and log lines of the libraries below, but under `--debug`.

    What is wrong with a provider table is shown as a note. The flag is looked for before click
    reads it: the variables count when they are imported.
    """
    if "--debug" in sys.argv or session.debug:
        yield
        return
    before = {name: os.environ.get(name) for name in _QUIET_VARIABLES}
    for name, value in _QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module=r"turbo_opt\.kernels\.provider_table")
            warnings.showwarning = lambda message, *_, **__: session.note(f"note: {message}")
            yield
    finally:
        logging.disable(disabled)
        for name, earlier in before.items():
            if earlier is None:
                os.environ.pop(name, None)
