# SPDX-License-Identifier: Apache-2.0
"""When requests come to which model, and how long they are. Everything is fixed before a run.

- `stag:P`: the models' ramps start one after another; a ramp is 0 to P to 1 requests a second.
- `over:P`: the ramps of all but the last model start together; the last one has 1 a second.
- `long:N`: N long prompts within a second, to one model after the other, and 1 short one a second.
- `flat:R`: R requests a second to every model.
- `burst:R`: each model now and then has R requests a second for 3 s, and else none.
- `tail:N`: N requests within 2 s to one model after the other, whose answers end at very different
  times: one in 16 goes on long after the others.
- `grow:N`: N long prompts at once to the first model, the others have 1 a second.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

STEP = 2
"""Requests a second by which a ramp grows and falls each second."""
SPACING = 2.25
"""From one staggered ramp to the next, in times that a ramp takes to its peak."""
FLAT_S = 20
BURST_S, BURST_EVERY_S, BURST_WINDOW_S = 3, 20, 60
TAIL_S, TAIL_EACH, TAIL_TIMES, TAIL_SPACING_S = 2, 16, 12, 40
GROW_S = 10
LONG_FIRST_S, LONG_SPACING_S = 2, 12


@dataclass(frozen=True)
class Lengths:
    """Tokens of the requests."""

    prompt: int = 256
    output: int = 256
    long_prompt: int = 6144
    long_output: int = 256


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, in seconds, and how long it is."""

    at: float
    prompt: int
    output: int
    phase: str
    """What the pattern is about: `ramp`, `burst`, ...; or `rest`, which keeps models awake."""


@dataclass(frozen=True)
class Pattern:
    """Requests for every model."""

    name: str
    models: list[list[Arrival]] = field(repr=False)

    @property
    def seconds(self) -> float:
        """From the first second to the end of the last one with requests."""
        return max(int(a.at) + 1 for arrivals in self.models for a in arrivals)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, in and out."""
        return max(a.prompt + a.output for arrivals in self.models for a in arrivals)


def ramp(peak: int) -> list[int]:
    """Requests in each second of a ramp up to the peak and down again."""
    up = list(range(STEP, peak, STEP))
    return [*up, peak, *reversed(up)]


def spread(rates: Sequence[int], start: int) -> Iterator[float]:
    """Times of requests, evenly spaced within each second."""
    for second, rate in enumerate(rates):
        yield from (start + second + i / rate for i in range(rate))


def parse(text: str, models: int = 3, lengths: Lengths | None = None) -> Pattern:
    """The pattern that `kind:number` names.

    Raises:
        ValueError: there is no such pattern.
    """
    kind, _, number = text.partition(":")
    makers = {
        "stag": _staggered,
        "over": _overlapping,
        "long": _long,
        "flat": _flat,
        "burst": _bursts,
        "tail": _tail,
        "grow": _grow,
    }
    if kind not in makers or not number.isdigit() or int(number) < 1:
        raise ValueError(f"{text!r} is no pattern: write e.g. stag:24, over:24, long:24 or flat:4")
    return Pattern(text, makers[kind](int(number), models, lengths or Lengths()))


def _short(times: Iterator[float], phase: str, lengths: Lengths) -> list[Arrival]:
    return [Arrival(at, lengths.prompt, lengths.output, phase) for at in times]


def _ramp_and_rest(peak: int, start: int, end: int, lengths: Lengths) -> list[Arrival]:
    rates = ramp(peak)
    after = start + len(rates)
    return [
        *_short(spread(rates, start), "ramp", lengths),
        *_short(spread([1] * (end - after), after), "rest", lengths),
    ]


def _staggered(peak: int, models: int, lengths: Lengths) -> list[list[Arrival]]:
    to_peak = (peak + STEP - 1) // STEP
    starts = [int(SPACING * to_peak * i) for i in range(models)]
    end = starts[-1] + len(ramp(peak))
    return [_ramp_and_rest(peak, start, end, lengths) for start in starts]


def _overlapping(peak: int, models: int, lengths: Lengths) -> list[list[Arrival]]:
    end = len(ramp(peak))
    ramps = [_ramp_and_rest(peak, 0, end, lengths) for _ in range(max(models - 1, 1))]
    rest = [_short(spread([1] * end, 0), "rest", lengths) for _ in range(models - len(ramps))]
    return ramps + rest


def _long(count: int, models: int, lengths: Lengths) -> list[list[Arrival]]:
    end = LONG_FIRST_S + LONG_SPACING_S * models
    found = []
    for i in range(models):
        times = spread([count], LONG_FIRST_S + LONG_SPACING_S * i)
        burst = [Arrival(at, lengths.long_prompt, lengths.long_output, "burst") for at in times]
        rest = _short(spread([1] * end, 0), "rest", lengths)
        found.append(sorted([*burst, *rest], key=lambda arrival: arrival.at))
    return found


def _flat(rate: int, models: int, lengths: Lengths) -> list[list[Arrival]]:
    return [_short(spread([rate] * FLAT_S, 0), "flat", lengths) for _ in range(models)]


def _bursts(rate: int, models: int, lengths: Lengths) -> list[list[Arrival]]:
    found = []
    for i in range(models):
        rng = random.Random(i)
        rates = [0] * BURST_WINDOW_S
        for start in range(0, BURST_WINDOW_S, BURST_EVERY_S):
            at = start + rng.randrange(BURST_EVERY_S - BURST_S)
            rates[at : at + BURST_S] = [rate] * BURST_S
        found.append(_short(spread(rates, 0), "burst", lengths))
    return found


def _tail(count: int, models: int, lengths: Lengths) -> list[list[Arrival]]:
    found = []
    for i in range(models):
        rng = random.Random(i)
        per_second = [(count + second) // TAIL_S for second in range(TAIL_S)]
        arrivals = []
        for k, at in enumerate(spread(per_second, i * TAIL_SPACING_S)):
            if k % TAIL_EACH == 0:
                arrivals.append(Arrival(at, lengths.prompt, lengths.output * TAIL_TIMES, "tail"))
            else:
                output = rng.randrange(max(lengths.output // 16, 2), lengths.output * 2)
                arrivals.append(Arrival(at, lengths.prompt, output, "short"))
        found.append(arrivals)
    return found


def _grow(count: int, models: int, lengths: Lengths) -> list[list[Arrival]]:
    # Answers long enough that none ends before the last prompt is computed.
    first = [Arrival(0.0, lengths.long_prompt, lengths.output, "grow") for _ in range(count)]
    rest = [_short(spread([1] * GROW_S, 0), "rest", lengths) for _ in range(models - 1)]
    return [first, *rest]
