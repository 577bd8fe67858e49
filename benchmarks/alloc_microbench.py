# SPDX-License-Identifier: Apache-2.0
"""What the bookkeeping costs on the CPU: instructions and time, no GPU, no driver.

    python benchmarks/alloc_microbench.py --out build/alloc.json --public kvcached-0.1.6

Builds the C++ program and, with `--public`, the released public kvcached's own extension from its
unchanged unpacked sources. Needs cmake, a C++ compiler and valgrind; `--public` needs a torch with
CUDA's headers, and no GPU. A line is printed and the report written after every part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
SOURCES = REPO / "benchmarks" / "alloc"
SIZES = (1, 4, 16, 64, 256, 1024)
POOLS = {
    "mapped": "mapped, all free",
    "half": "mapped, every second block taken",
    "unmapped": "nothing mapped",
}
COMPILE = ["-O2", "-DNDEBUG", "-Wall", "-Wextra"]


def call(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


def build(folder: Path) -> None:
    """Our C++ program and the marks for Python."""
    core = folder / "core"
    call("cmake", "-S", REPO / "csrc", "-B", core, "-DCMAKE_BUILD_TYPE=Release",
         "-DKVCACHED_PYTHON=OFF")  # fmt: skip
    call("cmake", "--build", core, "--target", "kvcached")
    call("c++", *COMPILE, "-std=c++20", "-I", REPO / "csrc/include", SOURCES / "blocks.cpp",
         core / "libkvcached.a", "-lpthread", "-ldl", "-o", folder / "blocks")  # fmt: skip
    call("cc", *COMPILE, "-shared", "-fPIC", SOURCES / "marks.c", "-o", folder / "marks.so")


def build_public(sources: Path, folder: Path) -> Path:
    """The public kvcached as a package, its extension linked to a CUDA that does nothing."""
    import torch
    from torch.utils.cpp_extension import include_paths

    found = Path(torch.__file__).parents[1]
    headers = [*include_paths(), sysconfig.get_path("include"), sources / "csrc/inc"]
    headers += [p.parent for p in sorted(found.glob("nvidia/*/include/cuda_runtime.h"))][:1]
    headers += [p for p in (Path("/usr/local/cuda/include"),) if p.exists()]
    package = folder / "public" / "kvcached"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(sources / "kvcached", package)
    call("cc", *COMPILE, "-shared", "-fPIC", SOURCES / "no_cuda.c", "-o", folder / "no_cuda.so")
    # As its setup.py has them, at the optimisation of ours.
    flags = ["-O2", "-DNDEBUG", "-std=c++17", "-fPIC", "-shared", "-DKVCACHED_USE_CUDA",
             "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY",
             f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
             "-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H"]  # fmt: skip
    lib = Path(torch.__file__).parent / "lib"
    call("c++", *flags, *(f"-I{path}" for path in headers), *sorted(sources.glob("csrc/*.cpp")),
         folder / "no_cuda.so", f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python",
         f"-Wl,-rpath,{lib}", "-o", package / "_C.so")  # fmt: skip
    return package.parent


def rows(text: str) -> dict[str, dict[str, Any]]:
    """What a program printed, by name."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith('{"name"')]
    return {row.pop("name"): row for row in found}


def counts(folder: Path) -> dict[str, int]:
    """Instructions of everything that callgrind dumped there, by name."""
    found = {}
    for path in folder.glob("callgrind.out.*"):
        text = path.read_text(errors="replace")
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M)
        total = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
        if name and total:
            found[name[1]] = int(total[1])
    return found


def count(command: list[str], rounds: int, **options: Any) -> dict[str, dict[str, float]]:
    """Instructions of one call, less those of the marks around it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call("valgrind", "--tool=callgrind", "--collect-atstart=no", "--instr-atstart=no",
             f"--callgrind-out-file={folder}/callgrind.out.%p", *command,
             **options)  # fmt: skip
        found = counts(folder)
    base = found.pop("nothing", 0)
    return {
        name: {"instructions": round(max(total - base, 0) / rounds, 1)}
        for name, total in found.items()
    }


def joined(
    timed: dict[str, dict[str, Any]], counted: dict[str, dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """Both of every measurement; times less what looking at the clock takes."""
    base = timed.pop("nothing", {}).get("median_s", 0.0)
    for row in timed.values():
        row["median_s"] = max(row["median_s"] - base, 0.0)
    return {name: row | counted.get(name, {}) for name, row in timed.items()}


def cpp(args: argparse.Namespace, folder: Path, shared: Path) -> dict[str, Any]:
    program = str(folder / "blocks")
    for name in ("timed", "counted"):
        (shared / name).mkdir(mode=0o700)
    timed = rows(call(program, shared / "timed", str(args.rounds * 10)).stdout)
    counted = count([program, str(shared / "counted"), str(args.rounds)], args.rounds)
    return joined(timed, counted)


def contend(args: argparse.Namespace, folder: Path, shared: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # Without a pause, and with about 100 leases a second each, which no engine reaches.
    for members, pause_us in ((1, 0), (2, 0), (8, 0), (64, 0), (1, 10000), (64, 10000)):
        options = (str(members), str(args.seconds), str(pause_us))
        found |= rows(call(folder / "blocks", "contend", shared, *options).stdout)
    return found


def python(args: argparse.Namespace, folder: Path, which: str, path: Path) -> dict[str, Any]:
    script = str(SOURCES / "python_blocks.py")
    command = [sys.executable, script, which, "--marks", str(folder / "marks.so"), "--rounds"]
    env = os.environ | {"PYTHONPATH": str(path), "PYTHONHASHSEED": "0"}
    if which == "public":
        env |= {"LD_PRELOAD": str(folder / "no_cuda.so")}
        # Of its own, and gone afterwards.
        env |= {"KVCACHED_IPC_NAME": f"alloc_bench_{os.getpid()}"}
    try:
        timed = rows(call(*command, str(args.rounds * 5), env=env).stdout)
        counted = count([*command, str(args.rounds)], args.rounds, env=env)
    finally:
        Path(f"/dev/shm/alloc_bench_{os.getpid()}").unlink(missing_ok=True)
    return joined(timed, counted)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "instructions" not in row:
        return "-"
    return f"{row['instructions']:,.0f} / {row['median_s'] * 1e6:.2f}"


def table(report: dict[str, Any]) -> str:
    """Markdown: instructions and microseconds of one call."""
    columns = {"cpp": "C++", "python": "Python", "public": "public kvcached"}
    found = {key: name for key, name in columns.items() if key in report}
    lines = []
    for pool, title in POOLS.items():
        heads = [f"{name}, {verb}" for name in found.values() for verb in ("take", "give")]
        lines += [f"| {title} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for n in SIZES:
            cells = [
                _cell(report[key].get(f"{verb} {pool} {n}"))
                for key in found
                for verb in ("take", "give")
            ]
            lines.append(f"| {n} | {' | '.join(cells)} |")
        lines.append("")
    ledger = report.get("cpp", {})
    for members in (1, 64):
        parts = [
            f"{verb} {_cell(ledger.get(f'{verb} {members}'))}" for verb in ("lease", "release")
        ]
        lines.append(f"ledger, {members} member(s), one active: {', '.join(parts)}")
    for name, row in report.get("contend", {}).items():
        _, members, _, pause_us = name.split()
        lines.append(
            f"ledger, {members} process(es), each with pauses of {pause_us} us: "
            f"{row['pairs_per_s']:,.0f} leases and releases a second, a lease "
            f"{row['lease_mean_s'] * 1e6:.1f} us on average, worst process's median "
            f"{row['lease_worst_median_s'] * 1e6:.1f}, p99 {row['lease_worst_p99_s'] * 1e6:.0f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="The CPU's work for blocks and leases.")
    parser.add_argument("--out", type=Path, default=Path("build/alloc.json"))
    parser.add_argument("--build", type=Path, default=Path("build/alloc"), help="a folder")
    parser.add_argument("--public", type=Path, help="the public kvcached's unpacked sdist")
    parser.add_argument("--rounds", type=int, default=200, help="calls counted; more are timed")
    parser.add_argument("--seconds", type=float, default=3, help="of contention")
    parser.add_argument("--parts", nargs="+", help="only these; the rest of --out stays")
    parser.add_argument("--show", type=Path, help="print the table of a report, measure nothing")
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return 0
    folder = args.build.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    report: dict[str, Any] = {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python_version": platform.python_version(),
        "rounds": args.rounds,
    }
    failed = 0
    build(folder)
    with tempfile.TemporaryDirectory(prefix="kvcached-alloc-", dir="/dev/shm") as name:
        shared = Path(name)
        parts = {
            "cpp": lambda: cpp(args, folder, shared),
            "contend": lambda: contend(args, folder, shared),
            "python": lambda: python(args, folder, "ours", REPO),
        }
        if args.public:
            parts["public"] = lambda: python(
                args, folder, "public", build_public(args.public.resolve(), folder)
            )
        if args.parts:
            old = json.loads(args.out.read_text()) if args.out.exists() else {}
            parts = {part: parts[part] for part in args.parts}
            report = old | {f"load at {', '.join(parts)}": report["load"]}
        for part, measure in parts.items():
            begin = time.monotonic()
            try:
                report[part] = measure()
            except (RuntimeError, OSError, ImportError) as error:
                report[f"{part}_error"] = str(error)
                failed += 1
                print(f"{part} failed: {error}", file=sys.stderr)
            print(f"{part}: {time.monotonic() - begin:.1f} s", flush=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
