# SPDX-License-Identifier: Apache-2.0
"""What an engine is started with: its command and its environment."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..settings import GpuSettings, LaunchSettings, ModelSettings, ReplicaSettings

Recipe = tuple[list[str], dict[str, str]]
"""Command and environment."""
_MODULES = {
    # What `vllm serve` runs; the CPU package has no such command that works.
    "vllm": ("vllm.entrypoints.openai.api_server", "--model"),
    "sglang": ("sglang.launch_server", "--model-path"),
}
_SLEEP_MODE = {
    "vllm": ("--enable-sleep-mode",),
    # The second is for an engine without kvcached, which would lose its weights.
    "sglang": ("--enable-memory-saver", "--enable-weights-cpu-backup"),
}


def command(model: ModelSettings, replica: ReplicaSettings) -> list[str]:
    """Program and arguments of a replica that is launched."""
    launch = _launch(replica)
    if launch.command is not None:
        return [_fill(word, model, launch) for word in launch.command]
    module, flag = _MODULES[replica.engine]
    words = [launch.python, "-m", module, flag, str(launch.model)]
    words += ["--host", "127.0.0.1", "--port", str(launch.port), "--served-model-name", model.name]
    if sleeps_by_itself(model):
        words += _SLEEP_MODE[replica.engine]
    return [*words, *(_fill(word, model, launch) for word in launch.args)]


def environment(
    model: ModelSettings,
    replica: ReplicaSettings,
    gpu: GpuSettings | None,
    base: Mapping[str, str],
    secrets: Collection[str] = (),
) -> dict[str, str]:
    """Its whole environment, without what MPS needs.

    Args:
        model: what it serves.
        replica: the engine.
        gpu: on which it is, if that is known.
        base: the router's own environment.
        secrets: variables that are the router's business alone.
    """
    launch = _launch(replica)
    # Whether it is a client of MPS is decided for each engine, and not by who started the router.
    env = {
        name: value
        for name, value in base.items()
        if name not in secrets and not name.startswith("CUDA_MPS_")
    }
    if gpu is not None and gpu.device is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu.device
    if replica.engine == "vllm" and sleeps_by_itself(model):
        env["VLLM_SERVER_DEV_MODE"] = "1"
    return env | {name: _fill(value, model, launch) for name, value in launch.env.items()}


def sleeps_by_itself(model: ModelSettings) -> bool:
    """Whether its engines' own sleep mode is used without being asked for."""
    sleep = model.sleep
    return sleep.kind == "engine" and (sleep.after is not None or sleep.at_start)


def _launch(replica: ReplicaSettings) -> LaunchSettings:
    assert replica.launch is not None
    return replica.launch


def _fill(word: str, model: ModelSettings, launch: LaunchSettings) -> str:
    # Not str.format: JSON in arguments has braces of its own.
    return word.replace("{port}", str(launch.port)).replace("{name}", model.name)
