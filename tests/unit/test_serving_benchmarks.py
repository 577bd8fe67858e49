# SPDX-License-Identifier: Apache-2.0
"""The parts of the serving benchmarks that decide what a number means."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="the benchmarks' client, which engines bring")
pytest.importorskip("numpy", reason="the benchmarks' percentiles")

from benchmarks.serving import patterns, report, stats
from benchmarks.serving.client import Job, Run, Sent, bodies, play
from benchmarks.serving.patterns import Arrival, Lengths
from benchmarks.serving.sse import Completion, StreamError
from benchmarks.serving.systems import System

# -- patterns -------------------------------------------------------------------------------------


def test_a_ramp_goes_up_and_down_by_two() -> None:
    assert patterns.ramp(6) == [2, 4, 6, 4, 2]
    assert patterns.ramp(24)[:3] == [2, 4, 6]
    assert max(patterns.ramp(24)) == patterns.ramp(24)[11] == 24
    assert sum(patterns.ramp(24)) == 288
    assert patterns.ramp(5) == [2, 4, 5, 4, 2]
    assert patterns.ramp(1) == [1]


def test_requests_are_even_within_a_second() -> None:
    assert list(patterns.spread([1, 4], 3)) == [3.0, 4.0, 4.25, 4.5, 4.75]


def phases(arrivals: list[Arrival], phase: str) -> list[float]:
    return [arrival.at for arrival in arrivals if arrival.phase == phase]


def test_staggered_ramps() -> None:
    pattern = patterns.parse("stag:24")
    starts = [phases(arrivals, "ramp")[0] for arrivals in pattern.models]
    assert starts == [0, 27, 54]  # 2.25 times the 12 s to the peak
    assert [len(phases(arrivals, "ramp")) for arrivals in pattern.models] == [288] * 3
    assert pattern.seconds == 54 + 23
    # Ended ramps go on at one a second, and nothing comes before a ramp.
    assert phases(pattern.models[0], "rest") == list(range(23, 77))
    assert phases(pattern.models[2], "rest") == []
    assert min(arrival.at for arrival in pattern.models[1]) == 27


def test_overlapping_ramps() -> None:
    pattern = patterns.parse("over:24")
    assert [len(phases(a, "ramp")) for a in pattern.models] == [288, 288, 0]
    assert phases(pattern.models[2], "rest") == list(range(23))


def test_long_bursts() -> None:
    pattern = patterns.parse("long:8", lengths=Lengths(long_prompt=5000, long_output=10))
    for index, arrivals in enumerate(pattern.models):
        burst = [arrival for arrival in arrivals if arrival.phase == "burst"]
        assert [(a.prompt, a.output) for a in burst] == [(5000, 10)] * 8
        assert {int(a.at) for a in burst} == {2 + 12 * index}
        assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert pattern.longest == 5010


@pytest.mark.parametrize("text", ["stag", "stag:0", "stag:x", "other:3", "stag:-1"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no pattern"):
        patterns.parse(text)


# -- streams --------------------------------------------------------------------------------------


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def stream(events: int, tokens: int) -> bytes:
    parts = [event({"choices": [{"text": f"w{i}"}], "usage": None}) for i in range(events)]
    usage = event({"choices": [], "usage": {"completion_tokens": tokens}})
    return b"".join([*parts, usage, b"data: [DONE]\n\n"])


def test_streams_cut_anywhere() -> None:
    rng = random.Random(1)
    whole = b": a comment\n\n" + stream(7, 50)
    for _ in range(50):
        answer, at, seen = Completion(), 0, 0
        while at < len(whole):
            size = rng.randrange(1, 60)
            seen += answer.feed(whole[at : at + size])
            at += size
        assert (seen, answer.events, answer.tokens, answer.done) == (7, 7, 50, True)


def test_a_text_that_looks_like_the_end_is_text() -> None:
    answer = Completion()
    text = 'data: [DONE] "choices":[] {"error"'
    assert answer.feed(event({"choices": [{"text": text}]})) == 1
    assert (answer.tokens, answer.done) == (None, False)


def test_errors_in_a_stream() -> None:
    with pytest.raises(StreamError, match="too long"):
        Completion().feed(event({"error": {"message": "too long"}}))


# -- numbers --------------------------------------------------------------------------------------


def sent(first: float, last: float, tokens: int, phase: str = "ramp", error: str = "") -> Sent:
    return Sent(phase, 0.0, 0.0, first, last, tokens, error)


def test_times_of_requests() -> None:
    rows = [sent(i / 1000, 1 + i / 1000, 101) for i in range(1, 101)]
    found = stats.requests([*rows, sent(-1, -1, 0, error="gone")])
    assert (found["requests"], found["failed"], found["errors"]) == (101, 1, {"gone": 1})
    assert found["ttft_ms"] == {"mean": 50.5, "p50": 50.5, "p99": 99.01, "max": 100.0}
    assert found["tpot_ms"]["mean"] == 10.0
    assert stats.requests([])["ttft_ms"] is None


def test_phases_are_kept_apart() -> None:
    run = Run([sent(0.1, 1, 2), sent(0.9, 1, 2, "rest")], [])
    found = stats.by_phase([run])
    assert found["ramp"]["ttft_ms"]["max"] == 100
    assert found["rest"]["ttft_ms"]["max"] == 900


def test_output_rate_is_over_the_whole_window() -> None:
    run = Run([sent(0.1, 1, 100), sent(0.1, 4, 300), sent(0, 9, 50, error="x")], [])
    assert stats.output_rate([run]) == 100.0


# -- the client -----------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Streams 4 tokens 20 ms apart; a prompt that begins with 1999 is refused."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if len(body["prompt"]) == 13:
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        time.sleep(0.1)
        for i in range(4):
            self.chunk(event({"choices": [{"text": f"{i}"}]}))
            time.sleep(0.02)
        self.chunk(event({"choices": [], "usage": {"completion_tokens": 4}}))
        if len(body["prompt"]) == 17:
            time.sleep(30)
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


def test_clients_measure_what_a_server_does(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/completions"
    arrivals = [Arrival(i / 10, 5, 4, "ramp") for i in range(5)]
    bad = [Arrival(0.0, 13, 4, "ramp"), Arrival(0.1, 17, 4, "ramp"), Arrival(0.2, 5, 9, "ramp")]
    jobs = [
        Job(url, "m", arrivals, str(tmp_path / "a"), drain_s=5),
        Job(url, "m", bad, str(tmp_path / "b"), drain_s=2),
    ]
    try:
        good, failing = play(jobs, 30)
    finally:
        server.shutdown()
    for row, arrival in zip(good.rows, arrivals, strict=True):
        assert row.error == ""
        assert row.tokens == 4
        assert arrival.at <= row.sent < arrival.at + 0.1
        assert 100 <= stats.ttft(row) < 200
        # Three gaps of 20 ms; a first token that was read late shortens them.
        assert 15 <= stats.tpot(row) < 40
    errors = [row.error for row in failing.rows]
    assert errors[0].startswith("503")
    assert errors[1] == "not answered 2 s after the last request"
    assert errors[2] == "4 tokens instead of 9"
    assert good.beats


def test_a_client_that_dies_is_an_error(tmp_path: Path) -> None:
    job = Job("http://127.0.0.1:9", "m", [Arrival(0, 5, 4, "x")], str(tmp_path / "no" / "a"))
    with pytest.raises(RuntimeError, match="ended with 1"):
        play([job], 20)


def test_no_event_loop_is_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


# -- systems and tables ---------------------------------------------------------------------------


def test_systems() -> None:
    system = System.parse("elastic-mps:page_size=4MiB:headroom=1GiB")
    assert (system.kind, system.mps, system.start) == ("elastic", True, "stagger")
    env = system.environment("bob", Path("/l"), {"A": "1"})
    assert env["KVCACHED_PAGE_SIZE"] == "4MiB"
    assert (env["ENABLE_KVCACHED"], env["KVCACHED_NAME"], env["A"]) == ("true", "bob", "1")
    static = System.parse("static")
    assert static.environment("bob", Path("/l"), {}) == {}
    assert static.share(3) == ["--gpu-memory-utilization=0.31"]
    assert (static.start, static.flavor) == ("one", "stock")
    sized = System.parse("static-mps:kv_cache=2GiB")
    assert sized.share(3) == ["--kv-cache-memory-bytes=2147483648", "--gpu-memory-utilization=0.01"]
    assert (sized.start, sized.environment("bob", Path("/l"), {})) == ("all", {})


@pytest.mark.parametrize("text", ["other", "static:x=1", "elastic:x", "mps"])
def test_what_is_no_system_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"none of|not understood"):
        System.parse(text)


def test_the_public_kvcached_needs_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_KVCACHED", raising=False)
    with pytest.raises(ValueError, match="ENGINE_KVCACHED"):
        System.parse("kvcached").environment("bob", Path("/l"), {})
    monkeypatch.setenv("ENGINE_KVCACHED", "/peer")
    env = System.parse("kvcached-mps").environment("bob", Path("/l"), {})
    assert env["PYTHONPATH"].startswith("/peer")
    assert env["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def cell(system: str, mean: float, pattern: str = "stag:4") -> dict[str, Any]:
    times = {"mean": mean, "p50": mean, "p99": 2 * mean, "max": 2 * mean}
    part = {"requests": 9, "failed": 0, "errors": {}, "ttft_ms": times, "tpot_ms": times}
    body: dict[str, Any] = {"phases": {"ramp": part, "rest": part}, "output_tok_s": 5.0}
    return body | {
        "system": system,
        "pattern": pattern,
        "preemptions": 3,
        "models": [body | {"name": "alice", "preemptions": 3}],
        "memory_mib": {"idle": 1, "peak": 2, "after": 1},
        "client": {"send_ms": times, "loop_ms": None},
    }


def test_the_table_has_ratios_to_the_baseline_of_the_same_pattern() -> None:
    cells = [cell("static", 50.0), cell("elastic", 25.0), cell("elastic", 10.0, "over:4")]
    cells.append({"system": "broken", "pattern": "stag:4", "error": "failed: out of luck\nmore"})
    lines = report.rows(cells, "static", models=True)
    assert [line[:2] for line in lines] == [
        ["stag:4", "static"], ["", "- alice"], ["stag:4", "elastic"], ["", "- alice"],
        ["stag:4", "broken"], ["over:4", "elastic"], ["", "- alice"],
    ]  # fmt: skip
    assert lines[2][2:7] == ["25.0", "25.0", "50.0", "0.500", "0.500"]
    assert lines[4][2] == "failed: out of luck"
    assert lines[5][5] == "-"  # no baseline there
    assert "out of luck" in report.table(cells, "static")
    assert report.table(cells, "static", markdown=True).startswith("| pattern |")
    assert "elastic over:4" in report.brief(cells[2])


def test_at_most_so_many_at_a_time(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/completions"
    arrivals = [Arrival(0.0, 5, 4, "flat") for _ in range(6)]
    try:
        (run,) = play([Job(url, "m", arrivals, str(tmp_path / "a"), concurrency=2)], 30)
    finally:
        server.shutdown()
    assert [row.error for row in run.rows] == [""] * 6
    for row in run.rows:
        others = [r for r in run.rows if r is not row and r.sent <= row.sent < r.last]
        assert len(others) <= 1
    # Sent when there is room, not when due: waiting for a turn is no time to first token.
    assert max(row.sent for row in run.rows) > 0.2
    assert max(stats.ttft(row) for row in run.rows) < 200


def test_prompts_share_their_beginning() -> None:
    arrivals = [Arrival(0.0, 100, 4, "flat"), Arrival(0.0, 60, 4, "flat")]
    long, short = (json.loads(body)["prompt"] for body in bodies(Job("", "m", arrivals, "")))
    assert long[0] != short[0] or long[1] != short[1]
    job = Job("", "m", arrivals, "", shared=0.5)
    long, short = (json.loads(body)["prompt"] for body in bodies(job))
    assert (len(long), len(short)) == (100, 60)
    assert long[:30] == short[:30]
    assert long[30:60] != short[30:60]
