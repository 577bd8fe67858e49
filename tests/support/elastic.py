# SPDX-License-Identifier: Apache-2.0
"""Settings of the elastic KV cache for tests, and the checks that hold for every run with it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from .watch import LedgerWatch

NAME = "engine"


def ledger_path(folder: Path) -> Path:
    """Where an engine with `elastic_env(folder)` keeps its ledger."""
    return folder / "host-0.ledger"


def elastic_env(folder: Path, **settings: str) -> dict[str, str]:
    """The feature on, with a ledger in `folder`, and nothing kept that is not needed.

    Every freed page is unmapped at once, so that a stray access to it ends the process.

    Args:
        settings: KVCACHED_* variables by their names in lower case.
    """
    values = {
        "ledger_dir": str(folder),
        "name": NAME,
        "capacity": "512MiB",
        "page_size": "64KiB",
        "parked": "0",
        "parked_decay_ms": "0",
        "commit_ahead": "0",
    } | settings
    env = {f"KVCACHED_{name.upper()}": value for name, value in values.items()}
    return env | {"ENABLE_KVCACHED": "true"}


def check_account(watch: LedgerWatch) -> None:
    """The two promises of a ledger: never more leased than there is, or committed than leased."""
    assert watch.samples, f"nothing was ever seen in {watch.path}"
    for sample in watch.samples:
        assert sample.total_leased <= watch.capacity, f"more leased than there is: {sample}"
    for sample, later in pairwise(watch.samples):
        for name, committed in sample.committed.items():
            # Both are read one after the other while they move, so a lease may be seen late.
            leased = max(sample.leased[name], later.leased.get(name, 0))
            assert committed <= leased, f"committed without a lease: {sample}"
