# SPDX-License-Identifier: Apache-2.0
"""Draws what `latency_benefit.py run` wrote: times to first token, and memory over time.

    python benchmarks/plot_latency.py ttft build/latency/cells.jsonl --out docs/ttft.png
    python benchmarks/plot_latency.py memory build/latency/timeline.jsonl --system elastic-mps \
        --pattern stag:24 --out docs/memory-stag.png
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.plot_memory import INK, pyplot
from benchmarks.serving.report import main_phase

COLORS = ("#3b6ea5", "#d98032", "#5a9367", "#a3485a", "#7a6fac", "#8c8c8c")


def lines(path: Path) -> list[str]:
    """Of a file, packed or not."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return text.decode().splitlines()


def values(cells: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """TTFT in ms by system and pattern; the last cell counts where one was measured twice."""
    found: dict[str, dict[str, float]] = {}
    for cell in cells:
        times = None if "error" in cell else cell["phases"][main_phase(cell)]["ttft_ms"]
        if times is not None:
            found.setdefault(cell["system"], {})[cell["pattern"]] = times[key]
    return found


def draw_ttft(cells: Sequence[dict[str, Any]]) -> Any:
    """Mean and 99th percentile of every system, pattern by pattern, on logarithmic axes."""
    plt = pyplot()
    patterns = list(dict.fromkeys(cell["pattern"] for cell in cells))
    figure, axes = plt.subplots(
        2, 1, figsize=(1.6 + 2.0 * len(patterns), 6.4), sharex=True, layout="constrained"
    )
    for axis, key, title in zip(axes, ("mean", "p99"), ("mean", "99th percentile"), strict=True):
        found = values(cells, key)
        width = 0.8 / max(len(found), 1)
        short = [system.partition(":")[0] for system in found]
        labels = short if len(set(short)) == len(found) else list(found)
        for i, (label, by_pattern) in enumerate(zip(labels, found.values(), strict=True)):
            where = [j - 0.4 + width * (i + 0.5) for j, p in enumerate(patterns) if p in by_pattern]
            heights = [by_pattern[p] for p in patterns if p in by_pattern]
            color = COLORS[i % len(COLORS)]
            bars = axis.bar(where, heights, width * 0.92, color=color, label=label)
            axis.bar_label(bars, [f"{height:.0f}" for height in heights], fontsize=7, padding=1)
        axis.set_yscale("log")
        axis.margins(y=0.12)
        least = min((v for one in found.values() for v in one.values()), default=1.0)
        axis.set_ylim(bottom=10 ** math.floor(math.log10(least)))
        axis.set_ylabel(f"time to first token, {title} (ms)")
        axis.set_xticks(range(len(patterns)), patterns)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False
    )
    return figure


def draw_memory(record: dict[str, Any]) -> Any:
    """KV cache committed by every engine, stacked, and the whole device as a line."""
    plt = pyplot()
    rows, names = record["rows"], record["names"]
    at = record["columns"].index("committed")
    times = [row[0] for row in rows]
    held = [[row[2 + i][at] for row in rows] for i in range(len(names))]
    device = [row[1] for row in rows]
    most = max([*device, *(sum(one) for one in zip(*held, strict=True))], default=0)
    unit, scale = ("GiB", 1024) if most >= 4096 else ("MiB", 1)
    figure, axis = plt.subplots(figsize=(8.5, 3.8), layout="constrained")
    if names:
        axis.stackplot(
            times,
            *([value / scale for value in one] for one in held),
            colors=COLORS,
            labels=[f"{name}, KV cache" for name in names],
            alpha=0.9,
            linewidth=0,
        )
    if any(device):
        whole = [value / scale for value in device]
        axis.plot(times, whole, color=INK, linewidth=1.2, label="in use on the device")
    axis.set_ylim(bottom=0)
    axis.set_xlim(times[0], times[-1])
    axis.set_ylabel(f"memory ({unit})")
    axis.set_xlabel("time (s)")
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)
    return figure


def save(figure: Any, path: Path) -> None:
    """No date inside, so that the same numbers give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=metadata)
    print(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Plots of latency_benefit.py's results.")
    commands = parser.add_subparsers(required=True, dest="command")
    ttft = commands.add_parser("ttft", help="of cells.jsonl")
    memory = commands.add_parser("memory", help="of timeline.jsonl")
    for one in (ttft, memory):
        one.add_argument("files", nargs="+", type=Path)
        one.add_argument("--out", nargs="+", type=Path, required=True, help=".png, .svg or .pdf")
    ttft.add_argument("--systems", nargs="*", help="only these, in this order")
    ttft.add_argument("--patterns", nargs="*", help="only these, in this order")
    memory.add_argument("--system", required=True)
    memory.add_argument("--pattern", required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for path in args.files for line in lines(path)]
    if args.command == "ttft":
        for key, wanted in (("system", args.systems), ("pattern", args.patterns)):
            if wanted:
                rows = [row for row in rows if row[key] in wanted]
                rows.sort(key=lambda row, k=key, w=wanted: w.index(row[k]))
        figure = draw_ttft(rows)
    else:
        wanted = (args.system, args.pattern)
        found = [row for row in rows if (row["system"], row["pattern"]) == wanted]
        if not found:
            parser.error(f"there is no {args.pattern} of {args.system}")
        figure = draw_memory(found[-1])
    for path in args.out:
        save(figure, path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
