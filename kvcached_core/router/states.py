# SPDX-License-Identifier: Apache-2.0
"""What a model as a whole can be."""

from __future__ import annotations

from enum import Enum


class State(str, Enum):
    """Of a model as a whole."""

    ACTIVE = "active"
    STARTING = "starting"
    """Its engines are launched, or again after they ended."""
    ASLEEP = "asleep"
    WAKING = "waking"
    SLEEPING = "sleeping"
    """On the way to asleep."""
    FAILED = "failed"
    """The last attempt to wake it failed, or no replica is healthy."""


class Busy(Exception):
    """A model is not put to sleep now; the message says why."""
