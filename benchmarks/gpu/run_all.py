# SPDX-License-Identifier: Apache-2.0
"""Runs `tokens_and_throughput.py` for one variant after another and compares them.

A variant is `stock`, `off` or `on`, then options after colons: `v1` or `v2` for the model runner,
and any setting of kvcached's. Name them in the order they shall run, so that stock and patched
runs take turns:

    ENGINE_STOCK=... ENGINE_PATCHED=... python benchmarks/gpu/run_all.py --out build/gpu.jsonl \
        stock:v2 on:v2 on:v2:page_size=2MiB on:v2:layout=layer off:v2 stock:v2

Each is compared with the mean of all stock runs of the same model runner.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Last, so that an installed kvcached_core is found before this repository's sources.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.support.engines import ENVIRONMENT, engine_environment

SCRIPT = "tokens_and_throughput.py"


@dataclass(frozen=True)
class Variant:
    """One engine with its settings, as it was written on the command line."""

    text: str
    kind: str
    runner: str = ""
    settings: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Reads `kind[:v1|:v2][:setting=value]...`."""
        kind, *options = text.split(":")
        if kind not in ("stock", "off", "on"):
            raise argparse.ArgumentTypeError(f"{text!r} begins with none of stock, off, on")
        runner, settings = "", {}
        for option in options:
            name, equals, value = option.partition("=")
            if option in ("v1", "v2"):
                runner = option
            elif equals and kind == "on":
                settings[name] = value
            else:
                raise argparse.ArgumentTypeError(f"{option!r} in {text!r} is not understood")
        return cls(text, kind, runner, settings)

    def environment(self, ledger: Path) -> dict[str, str]:
        """What makes an engine process this variant."""
        env = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        if self.runner:
            env["VLLM_USE_V2_MODEL_RUNNER"] = "1" if self.runner == "v2" else "0"
        if self.kind == "on":
            env |= {"ENABLE_KVCACHED": "true", "KVCACHED_LEDGER_DIR": str(ledger)}
            env |= {f"KVCACHED_{name.upper()}": value for name, value in self.settings.items()}
        return engine_environment("stock" if self.kind == "stock" else "patched", env, fixed=False)


def run(
    script: str, variant: Variant, rest: list[str], limit_s: float, logs: Path
) -> dict[str, Any]:
    """One variant's report; its `error` is set if it gave none."""
    begin = time.monotonic()
    log = logs / f"{time.strftime('%H%M%S')}-{variant.text.replace(':', '_')}.log"
    answer = log.with_suffix(".out")
    path = Path(__file__).with_name(script)
    command = [sys.executable, str(path), "--label", variant.text, *rest]
    with (
        tempfile.TemporaryDirectory() as folder,
        log.open("w") as errors,
        answer.open("w") as output,
    ):
        env = variant.environment(Path(folder) / "ledger")
        if "--tiny" in rest:
            env |= ENVIRONMENT
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            error = f"exit status {process.wait(limit_s)}"
        except subprocess.TimeoutExpired:
            error = f"not done in {limit_s:.0f} s"
        # An engine that failed may leave workers behind, and they would hold the GPU's memory.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for line in answer.read_text().splitlines():
        if line.startswith("REPORT "):
            report: dict[str, Any] = json.loads(line.removeprefix("REPORT "))
            report["wall_s"] = round(time.monotonic() - begin, 1)
            return report
    return {"label": variant.text, "error": f"{error}, see {log}", "tail": _tail(log)}


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def compare(variants: list[Variant], reports: list[dict[str, Any]]) -> str:
    """The table: rates with their ratio to stock, equal answers, and memory."""
    good = [(v, r) for v, r in zip(variants, reports, strict=True) if "error" not in r]
    cells = sorted({cell for _, r in good for cell in r["cells"]})
    lines = []
    for variant, report in good:
        peers = [r for v, r in good if v.kind == "stock" and v.runner == variant.runner]
        parts = [f"{variant.text:32} start {report['start_s']:5.1f} s"]
        for cell in cells:
            if cell not in report["cells"]:
                continue
            best = report["cells"][cell]["best"]
            base = [r["cells"][cell]["best"] for r in peers if cell in r["cells"]]
            ratio = f" ({best / statistics.fmean(base):.3f})" if base else ""
            parts.append(f"{cell} {best:8.1f} tok/s{ratio}")
        parts.append(_same_answers(report, peers))
        memory = report["memory_mib"]
        parts.append(f"MiB idle {memory['idle']} after {memory['after_load']}")
        lines.append("  ".join(part for part in parts if part))
    lines += [f"{r['label']:32} FAILED: {r['error']}\n{r['tail']}" for r in reports if "error" in r]
    return "\n".join(lines)


def _same_answers(report: dict[str, Any], peers: list[dict[str, Any]]) -> str:
    if "tokens" not in report or not any("tokens" in peer for peer in peers):
        return ""
    # Other kernels round otherwise, in an unpatched engine too.
    kernels = report.get("reduction_kernels")
    alike = [p for p in peers if "tokens" in p and p.get("reduction_kernels") == kernels]
    if not alike:
        return "answers not compared: no stock run chose the same kernels"
    pairs = list(zip(report["tokens"], alike[0]["tokens"], strict=True))
    return f"answers {sum(a == b for a, b in pairs)}/{len(pairs)} as stock"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compares engines; arguments after -- go to tokens_and_throughput.py."
    )
    parser.add_argument("variants", nargs="+", type=Variant.parse)
    parser.add_argument("--out", type=Path, default=Path("build/gpu.jsonl"), help="reports")
    parser.add_argument("--script", default=SCRIPT, help="or sglang_engine.py")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one variant")
    own, rest = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    args = parser.parse_args(own)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    reports = []
    with args.out.open("a") as out:
        for variant in args.variants:
            report = run(args.script, variant, rest, args.limit, args.out.parent)
            reports.append(report)
            print(json.dumps(report), file=out, flush=True)
            brief = {k: v for k, v in report.items() if k not in ("tokens", "tail")}
            print(json.dumps(brief), flush=True)
    print(compare(args.variants, reports))
    return 1 if any("error" in report for report in reports) else 0


if __name__ == "__main__":
    raise SystemExit(main())
