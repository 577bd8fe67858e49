# SPDX-License-Identifier: Apache-2.0
"""Tables of cells, with ratios to a baseline from the same run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEADER = (
    "pattern", "system", "TTFT mean", "p50", "p99", "mean x", "p99 x", "TPOT mean", "p99",
    "mean x", "failed", "preempted", "tok/s", "idle MiB", "peak", "after", "late ms",
)  # fmt: skip


def main_phase(cell: dict[str, Any]) -> str:
    """What the pattern is about."""
    return next((phase for phase in cell["phases"] if phase != "rest"), "rest")


def _number(values: dict[str, Any] | None, key: str) -> float | None:
    return None if values is None else float(values[key])


def _show(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None or not base else f"{value / base:.3f}"


def _row(
    label: str, part: dict[str, Any], base: dict[str, Any] | None, phase: str
) -> list[str] | None:
    own = part["phases"].get(phase)
    if own is None:
        return None
    other = base["phases"].get(phase) if base is not None else None
    times, tokens = own["ttft_ms"], own["tpot_ms"]
    base_times = other["ttft_ms"] if other else None
    base_tokens = other["tpot_ms"] if other else None
    memory = part.get("memory_mib", {})
    late = part.get("client", {}).get("send_ms")
    return [
        label,
        _show(_number(times, "mean"), 1),
        _show(_number(times, "p50"), 1),
        _show(_number(times, "p99"), 1),
        _ratio(_number(times, "mean"), _number(base_times, "mean")),
        _ratio(_number(times, "p99"), _number(base_times, "p99")),
        _show(_number(tokens, "mean"), 2),
        _show(_number(tokens, "p99"), 2),
        _ratio(_number(tokens, "mean"), _number(base_tokens, "mean")),
        f"{own['failed']}/{own['requests']}",
        str(part["preemptions"]),
        _show(part["output_tok_s"]),
        *(str(memory.get(key, "")) for key in ("idle", "peak", "after")),
        _show(_number(late, "p99"), 1) if late else "",
    ]


def rows(cells: Sequence[dict[str, Any]], baseline: str, models: bool = False) -> list[list[str]]:
    """A line for every cell, pattern by pattern; times in ms, `x` is the ratio to the baseline."""
    found: list[list[str]] = []
    for pattern in dict.fromkeys(cell["pattern"] for cell in cells):
        same = [cell for cell in cells if cell["pattern"] == pattern]
        good = [cell for cell in same if "error" not in cell]
        base = next((cell for cell in good if cell["system"] == baseline), None)
        for cell in same:
            if "error" in cell:
                found.append([pattern, cell["system"], cell["error"].splitlines()[0][:90]])
                continue
            phase = main_phase(cell)
            row = _row(cell["system"], cell, base, phase)
            if row is not None:
                found.append([pattern, *row])
            for index, model in enumerate(cell["models"] if models else []):
                peer = base["models"][index] if base is not None else None
                row = _row(f"- {model['name']}", model, peer, phase)
                if row is not None:
                    found.append(["", *row])
    return found


def table(
    cells: Sequence[dict[str, Any]], baseline: str, models: bool = False, markdown: bool = False
) -> str:
    """The table as text, or as Markdown."""
    lines = [list(HEADER), *rows(cells, baseline, models)]
    if markdown:
        lines.insert(1, ["---"] * len(HEADER))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    full = [line for line in lines if len(line) == len(HEADER)]
    widths = [max(len(line[i]) for line in full) for i in range(len(HEADER))]
    widths[1] = max(len(line[1]) for line in lines)
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=False)).rstrip()
        for line in lines
    )


def brief(cell: dict[str, Any]) -> str:
    """One line, for whoever watches."""
    if "error" in cell:
        return f"{cell['system']} {cell['pattern']}: {cell['error'][:200]}"
    own = cell["phases"][main_phase(cell)]
    times, tokens = own["ttft_ms"] or {}, own["tpot_ms"] or {}
    memory = cell["memory_mib"]
    return (
        f"{cell['system']} {cell['pattern']}: TTFT {times.get('mean')} / {times.get('p50')} / "
        f"{times.get('p99')} ms, TPOT {tokens.get('mean')} / {tokens.get('p99')}, "
        f"{own['failed']} of {own['requests']} failed, {cell['preemptions']} preempted, "
        f"{cell['output_tok_s']} tok/s, MiB {memory['idle']} {memory['peak']} {memory['after']}"
    )
