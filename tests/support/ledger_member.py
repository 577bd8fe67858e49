# SPDX-License-Identifier: Apache-2.0
"""A process that is a member of a ledger, as an engine is, and complies with its policy.

Run as a script, with the member as JSON; it prints "ready" and lives until stdin is closed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from kvcached_core._core import Ledger, Member

MIB = 1 << 20


@dataclass(frozen=True)
class Spec:
    """What the member holds. A deaf one never looks at its policy."""

    ledger: str
    name: str = "engine"
    capacity: int = 1024 * MIB
    live: int = 0
    parked: int = 0
    cached: int = 0
    guarantee: int = 0
    deaf: bool = False


@contextmanager
def member(path: Path, **spec: object) -> Iterator[subprocess.Popen[str]]:
    """The process, once it is a member."""
    data = json.dumps(asdict(Spec(str(path), **spec)))  # type: ignore[arg-type]
    command = [sys.executable, "-m", "tests.support.ledger_member", data]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


class Complying:
    """Gives back what policy and trims ask for: parked first, then cached, then live."""

    def __init__(self, spec: Spec, member: Member) -> None:
        self._member = member
        self._held = {"parked": spec.parked, "cached": spec.cached, "live": spec.live}
        assert member.lease(sum(self._held.values()))
        self._publish()

    def _publish(self) -> None:
        self._member.set_parked(self._held["parked"])
        self._member.set_cached(self._held["cached"])

    def _give(self, wanted: int, kinds: tuple[str, ...]) -> None:
        for kind in kinds:
            part = min(wanted, self._held[kind])
            self._held[kind] -= part
            wanted -= part
            self._publish()
            self._member.release(part)
            self._member.count("reclaimed_bytes", part)

    def comply(self) -> None:
        policy = self._member.policy()
        if policy.limit is not None:
            self._give(max(0, sum(self._held.values()) - policy.limit), tuple(self._held))
        if policy.version != policy.observed:
            self._member.observe(policy.version)
        if policy.trim is not None:
            version, num_bytes, cached = policy.trim
            kinds = ("parked", "cached") if cached else ("parked",)
            everything = sum(self._held.values())
            unlimited = num_bytes is None or num_bytes < 0
            self._give(everything if unlimited else num_bytes, kinds)
            self._member.trim_done(version)


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    member = Ledger(spec.ledger, spec.capacity).join(spec.name, guarantee=spec.guarantee)
    complying = Complying(spec, member)
    print("ready", flush=True)
    if spec.deaf:
        sys.stdin.read()
        return
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    seen = member.bell
    while not ended.is_set():
        complying.comply()
        seen = member.wait_bell(seen, 20)


if __name__ == "__main__":
    main()
