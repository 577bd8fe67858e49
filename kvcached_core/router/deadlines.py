# SPDX-License-Identifier: Apache-2.0
"""Which waiting request goes next, so that the fewest miss their deadline. Pure policy."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Literal, Protocol, TypeVar

Order = Literal["slack", "fifo"]


class Job(Protocol):
    """A request in a queue."""

    @property
    def arrived(self) -> float:
        """When it came, in seconds of a monotonic clock."""

    @property
    def due(self) -> float:
        """When its first token should be out, of the same clock."""

    @property
    def work(self) -> float:
        """Seconds the GPU needs until then."""


J = TypeVar("J", bound=Job)


def schedule(jobs: Iterable[J], now: float) -> tuple[list[J], list[J]]:
    """The jobs that can be done in time, in that order, and those that must be late.

    Moore and Hodgson: take the jobs by deadline, and whenever one would be late drop the longest so
    far. No order has fewer late jobs on a machine that does one at a time.
    """
    kept: list[tuple[float, int, J]] = []
    late: list[J] = []
    finish = now
    by_deadline = sorted(jobs, key=lambda job: (job.due, job.arrived))
    for index, job in enumerate(by_deadline):
        heapq.heappush(kept, (-job.work, index, job))
        finish += job.work
        if finish > job.due:
            work, _, longest = heapq.heappop(kept)
            finish += work
            late.append(longest)
    in_time = [job for _, _, job in sorted(kept, key=lambda entry: entry[1])]
    return in_time, sorted(late, key=lambda job: job.arrived)


def next_job(jobs: Iterable[J], now: float, order: Order) -> J | None:
    """The job to do next; None if there is none."""
    if order == "fifo":
        return min(jobs, key=lambda job: job.arrived, default=None)
    in_time, late = schedule(jobs, now)
    return next(iter(in_time or late), None)
