# SPDX-License-Identifier: Apache-2.0
"""The router with engines it runs itself: vLLM awake, vLLM with embeddings and SGLang asleep."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from kvcached_core import Ledger
from tests.e2e.conftest import MIB, SERVER_ARGS, SERVER_PAGE, Models
from tests.support.elastic import elastic_env, ledger_path
from tests.support.engines import engine_environment
from tests.support.server import free_port
from tests.support.sglang_server import ARGS as SGLANG_ARGS
from tests.support.sglang_server import QUIET, sglang_environment

pytestmark = pytest.mark.timeout(300)

REPO = Path(__file__).resolve().parents[2]
STREAMS = 60
"""At once on the real engine, which runs 64 at most."""


def changes(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if os.environ.get(name) != value}


def replica(folder: Path, model: Path, name: str, engine: str, args: Any, env: Any) -> Any:
    launch = {"port": free_port(), "model": str(model), "args": list(args), "env": changes(env),
              "log": str(folder / f"{name}.log"), "restart": {"delay": "100ms"},
              "stop_time": "20s"}  # fmt: skip
    return {"engine": engine, "gpu": "host", "launch": launch}


def settings(models: Models, folder: Path) -> dict[str, Any]:
    def elastic(name: str) -> dict[str, str]:
        memory = {"capacity": str(64 * MIB), "page_size": str(SERVER_PAGE), "parked": str(MIB)}
        return elastic_env(folder / "ledger", name=name, **memory)

    local = {"VLLM_HOST_IP": "127.0.0.1"}
    vllm = engine_environment("patched", elastic("alpha") | local)
    vectors = engine_environment("patched", local)
    sglang = sglang_environment("patched", elastic("gamma"))
    # Most of what they hold is the model, which tiny tests have little of: embeddings need no KV.
    pooling = ("--runner=pooling", "--convert=embed", *SERVER_ARGS)
    cold = {"kind": "cold", "at_start": True}
    return {
        "listen": f"127.0.0.1:{free_port()}",
        "ledger_dir": str(folder / "ledger"),
        "gpus": {"host": {"mps": False, "parallel_starts": 2}},
        "health": {"interval": "1s"},
        "models": [
            {"name": "alpha", "queue": {"timeout": "4m"}, "replicas": [
                replica(folder, models.llama, "alpha", "vllm", SERVER_ARGS, vllm)]},
            {"name": "beta", "sleep": cold, "queue": {"timeout": "4m"}, "replicas": [
                replica(folder, models.llama, "beta", "vllm", pooling, vectors)]},
            {"name": "gamma", "sleep": {**cold, "after": "2s"}, "queue": {"timeout": "4m"},
             "replicas": [replica(folder, models.llama, "gamma", "sglang",
                                  (*SGLANG_ARGS, QUIET, f"--nccl-port={free_port()}"), sglang)]},
        ],
    }  # fmt: skip


@dataclass
class Site:
    """A running router."""

    url: str
    folder: Path
    config: dict[str, Any]
    pid: int

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="x", timeout=240, max_retries=0)

    @property
    def openai_async(self) -> openai.AsyncOpenAI:
        url = f"{self.url}/v1"
        return openai.AsyncOpenAI(base_url=url, api_key="x", timeout=240, max_retries=0)

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=30, trust_env=False).json()

    def state(self, model: str) -> str:
        return str(self.get("/sleep/status")["states"][model])

    def process(self, model: str) -> dict[str, Any]:
        return dict(self.get("/health/all")["models"][model]["replicas"][0]["process"])

    def engine(self, model: str) -> str:
        (found,) = (m for m in self.config["models"] if m["name"] == model)
        return f"http://127.0.0.1:{found['replicas'][0]['launch']['port']}"

    def metric(self, name: str) -> float:
        """Of alpha's engine."""
        text = httpx.get(f"{self.engine('alpha')}/metrics", timeout=30, trust_env=False).text
        lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}{{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def running(self) -> float:
        """Requests that alpha's engine works on."""
        return self.metric("num_requests_running")

    def generated(self) -> float:
        """Tokens it has made."""
        return self.metric("generation_tokens_total")

    def log(self) -> str:
        return (self.folder / "router.log").read_text()


@pytest.fixture(scope="module")
def site(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("router")
    config = settings(models, folder)
    path = folder / "router.yaml"
    path.write_text(json.dumps(config))
    with (folder / "router.log").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvcached_core.cli.router", "serve", str(path)],
            cwd=REPO, stdout=out, stderr=out,
        )  # fmt: skip
    found = Site(f"http://{config['listen']}", folder, config, process.pid)
    try:
        wait(lambda: found.get("/health")["status"] == "healthy", "the router answers")
        yield found
        engines = [found.process(model)["pid"] for model in ("alpha", "beta", "gamma")]
        process.terminate()
        process.wait(timeout=60)
        left = [pid for pid in engines if pid and Path(f"/proc/{pid}").exists()]
        assert not left, "engines end with the router"
    finally:
        process.kill()
        process.wait()


def wait(what: Any, said: str, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while True:
        try:
            if what():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end, f"it never came about that {said}"
        time.sleep(0.05)


# The tests go from the first start on, each with what the ones before left.


def test_models_and_a_first_request_while_engines_start(site: Site) -> None:
    client = site.openai
    assert [model.id for model in client.models.list()] == ["alpha", "beta", "gamma"]
    assert site.state("alpha") == "starting"
    assert [site.state(name) for name in ("beta", "gamma")] == ["asleep"] * 2
    answer = client.completions.create(model="alpha", prompt=[5, 6, 7], max_tokens=8)
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    assert site.process("alpha") | {"pid": 0} == {
        "phase": "ready", "pid": 0, "starts": 1, "crashes": 0}  # fmt: skip
    for name in ("beta", "gamma"):
        assert site.process(name) == {"phase": "stopped", "pid": None, "starts": 0, "crashes": 0}


def test_answers_are_the_engines_own(site: Site) -> None:
    direct = openai.OpenAI(base_url=f"{site.engine('alpha')}/v1", api_key="x")
    prompt: Any = {"model": "alpha", "prompt": list(range(100, 140)), "max_tokens": 200,
                   "temperature": 0}  # fmt: skip
    chat: Any = {"model": "alpha", "messages": [{"role": "user", "content": "The License"}],
                 "max_tokens": 200, "temperature": 0}  # fmt: skip
    for client in (direct, site.openai):
        whole = client.completions.create(**prompt).choices[0].text
        pieces = [c.choices[0].text for c in client.completions.create(**prompt, stream=True)]
        said = client.chat.completions.create(**chat).choices[0].message.content
        parts = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**chat, stream=True)
        ]
        assert len(pieces) > 5 and "".join(pieces) == whole
        assert len(parts) > 5 and "".join(parts) == said
        if client is direct:
            wanted = whole, said
    assert (whole, said) == wanted
    with pytest.raises(openai.BadRequestError) as caught:
        site.openai.completions.create(model="alpha", prompt="x", max_tokens=-1)
    assert "max_tokens" in str(caught.value), "the engine's own error"
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'"):
        site.openai.completions.create(model="nobody", prompt="x")


def test_embeddings_wake_a_model_once(site: Site) -> None:
    async def main() -> list[list[float]]:
        async with site.openai_async as client:
            asked = [client.embeddings.create(model="beta", input="one text") for _ in range(8)]
            other = await client.embeddings.create(model="beta", input="another text")
            found = await asyncio.gather(*asked)
        return [each.data[0].embedding for each in (*found, other)]

    *same, other = asyncio.run(main())
    assert len(same[0]) == 256
    for vector in same[1:]:
        # Not to the last bit: batches differ.
        assert vector == pytest.approx(same[0], abs=1e-4)
    assert other != pytest.approx(same[0], abs=1e-2)
    assert site.process("beta")["starts"] == 1
    assert site.state("gamma") == "asleep", "the others sleep on"


def test_sglang_is_woken_once_and_sleeps_when_idle(site: Site) -> None:
    ledger = Ledger(ledger_path(site.folder / "ledger"))

    def members() -> set[str]:
        return {member.name for member in ledger.members()}

    async def main() -> list[int]:
        async with site.openai_async as client:
            # The last one takes longer than the time after which an idle model sleeps.
            lengths = [8, 8, 8, 8, 1200]
            asked = [
                client.completions.create(
                    model="gamma",
                    prompt="The License",
                    max_tokens=n,
                    extra_body={"ignore_eos": True},
                )
                for n in lengths
            ]
            answers = await asyncio.gather(*asked)
        return [answer.usage.completion_tokens for answer in answers if answer.usage]

    assert "gamma" not in members()
    assert asyncio.run(main()) == [8, 8, 8, 8, 1200]
    assert site.process("gamma")["starts"] == 1
    wait(lambda: site.state("gamma") == "asleep", "gamma is idle and sleeps")
    assert site.process("gamma")["phase"] == "stopped"
    wait(lambda: "gamma" not in members(), "its memory is the others' again", 10)
    stats = site.get("/traffic/stats/gamma")["model_stats"]
    assert (stats["successful_requests"], stats["failed_requests"]) == (5, 0)


def test_many_streams_at_once(site: Site) -> None:
    async def one(client: openai.AsyncOpenAI, index: int) -> str:
        stream = await client.completions.create(
            model="alpha", prompt=[index + 10] * 20, max_tokens=32, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with site.openai_async as client:
            return await asyncio.gather(*(one(client, index) for index in range(STREAMS)))

    texts = asyncio.run(main())
    assert all(texts) and len(set(texts)) > STREAMS // 2, "each got the answer to its own prompt"


def test_the_page_shows_what_engines_hold(site: Site) -> None:
    client = site.openai
    body: Any = {"model": "alpha", "max_tokens": 1200, "extra_body": {"ignore_eos": True}}
    streams = [client.completions.create(**body, prompt=[i] * 900, stream=True) for i in range(9)]
    for stream in streams:
        next(stream)
    (ledger,) = site.get("/memory")["ledgers"]
    (alpha,) = (member for member in ledger["members"] if member["name"] == "alpha")
    # 2 KiB of KV a token, of 9 prompts and what has come.
    assert alpha["leased_bytes"] > 9 * 900 * 2048
    target = os.environ.get("KVCACHED_SCREENSHOT")
    if target:  # for the docs
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            args = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=args)
            page = browser.new_page(viewport={"width": 1240, "height": 700})
            page.goto(site.url)
            page.wait_for_selector("#memory :text('alpha')")
            page.screenshot(path=target, full_page=True)
            browser.close()
    for stream in streams:
        stream.close()
    order = {"ledger": ledger["key"], "member": "alpha", "do": "limit", "value": "20MiB"}
    done = httpx.post(f"{site.url}/action/memory", json=order, timeout=30, trust_env=False)
    assert done.json()["success"], done.text
    (ledger,) = site.get("/memory")["ledgers"]
    (alpha,) = (member for member in ledger["members"] if member["name"] == "alpha")
    assert alpha["leased_bytes"] <= alpha["limit_bytes"] == 20 * MIB
    done = httpx.post(f"{site.url}/action/memory", json={**order, "value": "none"}, trust_env=False)
    assert done.status_code == 200


def test_the_engines_bench_client(site: Site, models: Models, tmp_path: Path) -> None:
    # `vllm bench serve`, without the command that asks for a package named vllm.
    script = (
        "from vllm.benchmarks.serve import add_cli_args, main\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())\n"
    )
    args = [
        "--backend=openai", f"--base-url={site.url}", "--endpoint=/v1/completions", "--model=alpha",
        f"--tokenizer={models.llama}", "--dataset-name=random", "--random-input-len=64",
        "--random-output-len=16", "--num-prompts=40", "--request-rate=20", "--ignore-eos",
        "--disable-tqdm", "--save-result", f"--result-dir={tmp_path}", "--result-filename=r.json",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, *args], env=engine_environment("patched"),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (40, 640)


def test_a_client_that_goes_away_ends_its_request_in_the_engine(site: Site) -> None:
    wait(lambda: site.running() == 0, "alpha is idle", 30)
    tokens = 3500
    body = {
        "model": "alpha", "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True,
    }  # fmt: skip

    def given_up() -> bool:
        before = site.generated()
        time.sleep(0.5)
        return site.running() == 0 and site.generated() == before

    # Where the processor is short the answer may be whole before its first line is read.
    for _ in range(5):
        before = site.generated()
        url = f"{site.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as stream:
            assert next(stream.iter_lines()).startswith("data: ")
        begin = time.monotonic()
        wait(given_up, "the engine gave it up", 30)
        print(f"given up {time.monotonic() - begin:.2f} s after the client went")
        if site.generated() - before < tokens:
            break
    else:
        pytest.fail("the engine made all tokens of each of five answers that nobody read")
    assert site.get("/health/all")["models"]["alpha"]["replicas"][0]["requests"] == 0


def test_an_engine_is_killed_mid_stream(site: Site) -> None:
    before = site.process("alpha")
    stream = site.openai.completions.create(
        model="alpha", prompt="x", max_tokens=3500, stream=True, extra_body={"ignore_eos": True}
    )
    with pytest.raises(openai.APIError, match="ended in the middle of its answer"):
        for count, _ in enumerate(stream):
            if count == 5:
                os.kill(before["pid"], signal.SIGKILL)
    begin = time.monotonic()
    # Sent while there is no engine: it waits for the one that comes.
    answer = site.openai.completions.create(model="alpha", prompt=[5, 6, 7], max_tokens=8)
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    print(f"served {time.monotonic() - begin:.1f} s after the kill")
    after = site.process("alpha")
    assert (after["starts"], after["crashes"]) == (2, 1)
    assert after["pid"] != before["pid"]
    assert f"process {before['pid']} ended with signal 9" in site.log()
