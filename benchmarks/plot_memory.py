# SPDX-License-Identifier: Apache-2.0
"""Draws what `benchmarks.demo` recorded: who held the memory, and who had work, over time.

python -m benchmarks.plot_memory build/demo.json docs/memory.png docs/memory.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLORS = ("#3b6ea5", "#d98032")
INK, FAINT = "#333333", "#999999"


def pyplot() -> Any:
    """Matplotlib, set up for files."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK,
        "xtick.color": INK, "ytick.color": INK, "svg.hashsalt": "kvcached",
    })  # fmt: skip
    return plt


def draw(recording: dict[str, Any]) -> Any:
    """The figure of one recording."""
    plt = pyplot()
    rows, names = recording["samples"], recording["servers"]
    capacity = recording["capacity"]
    unit, scale = ("GiB", 1 << 30) if capacity >= 4 << 30 else ("MiB", 1 << 20)
    times = [row["t"] for row in rows]
    held = [[row["committed"][name] / scale for row in rows] for name in names]

    figure, (memory, load) = plt.subplots(
        2, 1, figsize=(8.5, 5.0), sharex=True, height_ratios=(3, 1.2), layout="constrained"
    )
    memory.stackplot(times, *held, colors=COLORS, labels=names, alpha=0.9, linewidth=0)
    memory.axhline(capacity / scale, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    memory.annotate(
        f"memory there is: {capacity / scale:.4g} {unit}",
        (times[-1], capacity / scale),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
    )
    memory.set_ylim(0, capacity / scale * 1.12)
    memory.set_ylabel(f"KV cache committed ({unit})")
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(names), frameon=False, fontsize=10
    )
    for name, color in zip(names, COLORS, strict=True):
        running = [row["in_flight"][name] for row in rows]
        load.step(times, running, where="post", color=color, linewidth=1.6)
    load.set_ylim(bottom=0)
    load.set_ylabel("requests in flight")
    load.set_xlabel("time (s)")
    load.set_xlim(times[0], times[-1])
    for axes in (memory, load):
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.align_ylabels((memory, load))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recording", type=Path, help="JSON written by benchmarks.demo")
    parser.add_argument("figures", type=Path, nargs="+", help="files to write: .png, .svg, .pdf")
    args = parser.parse_args()
    figure = draw(json.loads(args.recording.read_text()))
    for path in args.figures:
        path.parent.mkdir(parents=True, exist_ok=True)
        # No date inside, so that the same samples give the same file.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)
        print(path)


if __name__ == "__main__":
    main()
