# SPDX-License-Identifier: Apache-2.0
"""What the SGLang tests share: the forking hosts, and what the stock engine answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from .load import check_complete
from .prompts import Prompt, equal_prompts, mixed_batches, twins
from .server import Answer, burst
from .sglang_server import SglangHost, SglangServer
from .watch import wait_until

PAIRS = 3
PROMPTS = [*mixed_batches(batches=1, batch_size=26)[0], *twins(PAIRS)]
PROMPT_TOKENS = 24
# Many short ones that grow: what is taken from them is taken while they run.
GROWING = equal_prompts(12, 200, seed=900)
GROWING_TOKENS = 120
TIE = 1e-4
"""How a request is batched changes its logits in the last bits, far less than this."""


class Models(Protocol):
    llama: Path


class Scored(SglangServer):
    """Answers with how much better each token was than the next best."""

    def request(self, prompt: Prompt | list[Prompt], max_tokens: int) -> tuple[str, dict[str, Any]]:
        path, body = super().request(prompt, max_tokens)
        return path, body | {"return_logprob": True, "top_logprobs_num": 2}

    def answered(self, answer: dict[str, Any]) -> list[Any]:
        tokens = super().answered(answer)
        best = answer["meta_info"]["output_top_logprobs"]
        gaps = [first[0] - second[0] for first, second in best]
        return list(zip(tokens, gaps, strict=True))


@dataclass(frozen=True)
class Reference:
    """What a stock engine answers to some prompts."""

    prompts: list[Prompt]
    max_tokens: int
    answers: list[list[tuple[int, float]]]
    """Of every prompt the tokens, and how much better each was than the next best."""

    def part(self, first: int, last: int, max_tokens: int) -> Reference:
        """Some of the prompts, with shorter answers."""
        answers = [answer[:max_tokens] for answer in self.answers[first:last]]
        return Reference(self.prompts[first:last], max_tokens, answers)

    def check(self, answers: Sequence[Answer]) -> None:
        """These are the same tokens, up to a choice between two equally good ones."""
        check_complete(answers, self.max_tokens)
        ties = 0
        for index, (expected, answer) in enumerate(zip(self.answers, answers, strict=True)):
            for place, ((token, gap), found) in enumerate(
                zip(expected, answer.tokens, strict=True)
            ):
                if token != found and gap < TIE:
                    ties += 1  # Either is right, and what follows depends on it.
                    break
                assert found == token, f"prompt {index}, token {place} ({gap} better)"
        assert ties <= len(self.answers) // 20, "too many ties to prove anything"


@dataclass(frozen=True)
class References:
    """Of one stock engine."""

    mixed: Reference
    growing: Reference
    series: frozenset[str]
    """Names on its /metrics."""

    def __post_init__(self) -> None:
        answers = [[token for token, _ in answer] for answer in self.mixed.answers]
        twin = answers[-2 * PAIRS :]
        equal = sum(a == b for a, b in zip(twin[::2], twin[1::2], strict=True))
        assert equal == 0, "answers ignore what is far back, and comparing them is for nothing"
        assert len({token for answer in answers for token in answer}) > 300


def ask_stock(
    server: SglangServer,
    growing: tuple[list[Prompt], int] = (GROWING, GROWING_TOKENS),
) -> References:
    """Starts a `Scored` stock server, and stops it once it has answered; requests that grow with so
    many tokens each.
    """
    try:
        server.start().wait_ready()
        mixed = ask(server, PROMPTS, PROMPT_TOKENS)
        return References(mixed, ask(server, *growing), frozenset(server.metrics()))
    finally:
        server.stop()


def ask(server: SglangServer, prompts: list[Prompt], max_tokens: int) -> Reference:
    """What a `Scored` stock server answers."""
    answers = burst(server, prompts, max_tokens)
    check_complete(answers, max_tokens)
    tokens: list[Any] = [answer.tokens for answer in answers]
    return Reference(prompts, max_tokens, tokens)


@pytest.fixture(scope="session")
def sglang_stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangHost]:
    """Servers of the stock engine are forks of this."""
    host = SglangHost("stock", tmp_path_factory.mktemp("sglang-stock"))
    yield host
    host.close()


@pytest.fixture(scope="session")
def sglang_patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangHost]:
    """Servers of the patched engine are forks of this."""
    host = SglangHost("patched", tmp_path_factory.mktemp("sglang-patched"))
    yield host
    host.close()


@pytest.fixture(scope="session")
def _sglang_answers(
    models: Models, sglang_stock: SglangHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[References]]:
    folder = tmp_path_factory.mktemp("sglang-references")
    server = Scored(
        "stock", models.llama, folder, ["--max-total-tokens=60000"], {}, "stock", host=sglang_stock
    )
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(ask_stock, server)


@pytest.fixture(scope="session")
def sglang_references(_sglang_answers: Future[References]) -> Callable[[], References]:
    """The stock engine's answers, waited for when they are needed: they are asked meanwhile."""
    return _sglang_answers.result


Serve = Callable[..., AbstractContextManager[SglangServer]]


@pytest.fixture
def serve(models: Models, sglang_patched: SglangHost, tmp_path: Path) -> Serve:
    """Starts a patched server for a `with`; its name, arguments, environment and, if it is not the
    tiny Llama, model are given.
    """

    @contextmanager
    def started(
        name: str, args: Sequence[str], env: Mapping[str, str], model: Path | None = None
    ) -> Iterator[SglangServer]:
        model = model or models.llama
        server = SglangServer(name, model, tmp_path, args, env, host=sglang_patched)
        try:
            server.start().wait_ready()
            yield server
            check_unhurt(server)
        except BaseException:
            print(f"{name}:\n{server.output()[-6000:]}")
            raise
        finally:
            server.stop()

    return started


def check_unhurt(server: SglangServer) -> None:
    """It still runs, and none of SGLang's checks found anything."""
    assert server.code is None, f"{server.name} ended with {server.code}: {server.output()[-3000:]}"
    output = server.output()
    for sign in ("memory leak", "Mem Leak", "double free", "use-after-free", "Traceback"):
        assert sign not in output, output[output.index(sign) - 1000 :][:4000]


def retracted(server: SglangServer) -> int:
    """Running requests the server has put back into its queue since it started."""
    return int(server.metrics().get("sglang:num_retracted_requests_total", 0))


def wait_retracted(server: SglangServer, more_than: int) -> None:
    wait_until(lambda: retracted(server) > more_than, 60, "requests were retracted")
