# SPDX-License-Identifier: Apache-2.0
"""One run of an engine: a process group that is ended as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_KEEPER = Path(__file__).with_name("keeper.py")
_TAIL_BYTES = 16 << 10


class EngineProcess:
    """A command that runs, or ran, in a session of its own."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path | None, begin: int) -> None:
        self._process = process
        self._log = log
        self._begin = begin
        self._swept = False

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        env: Mapping[str, str],
        folder: Path | None = None,
        log: Path | None = None,
    ) -> EngineProcess:
        """Run ``command``; a wrong one ends with 127 and a line in the log.

        Args:
            command: program and arguments.
            env: its whole environment.
            folder: where it runs; None for here.
            log: where its output is appended to; None for where this process's goes.

        Raises:
            OSError: folder or log cannot be used.
        """
        keeper = (sys.executable, "-I", "-S", str(_KEEPER), str(os.getpid()))
        with contextlib.ExitStack() as stack:
            output = None
            begin = 0
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log.open("ab"))
                begin = output.tell()
            process = await asyncio.create_subprocess_exec(
                *keeper,
                *command,
                env=dict(env),
                cwd=folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(process, log, begin)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """Its exit status, negative for a signal, once it ended; what it left is killed."""
        code = await self._process.wait()
        # Once, and at once: later the number may be somebody else's.
        if not self._swept:
            self._swept = True
            self._signal_group(signal.SIGKILL)
        return code

    async def stop(self, timeout_s: float) -> int:
        """Ask it to end, kill it after ``timeout_s``; its exit status."""
        if self.runs:
            # Only the leader: it ends its workers in the order it wants.
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(asyncio.shield(self._process.wait()), timeout_s)
            except asyncio.TimeoutError:
                self._signal_group(signal.SIGKILL)
        return await self.wait()

    def last_words(self, lines: int = 5) -> str:
        """The end of what this run wrote, if that is known."""
        if self._log is None:
            return ""
        try:
            with self._log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._begin, size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        said = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(said[-lines:])[-600:]

    def _signal_group(self, number: signal.Signals) -> None:
        # The session's first process, so the group has its id as long as anyone is in it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
