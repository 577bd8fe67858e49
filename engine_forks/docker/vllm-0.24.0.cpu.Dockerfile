# syntax=docker/dockerfile:1
# SPDX-License-Identifier: Apache-2.0
# vLLM 0.24.0 with kvcached, for machines without a GPU. Build from the root of the repository:
#   docker build -f engine_forks/docker/vllm-0.24.0.cpu.Dockerfile -t kvcached/vllm:0.24.0-cpu .
#   docker run -e VLLM_CPU_KVCACHE_SPACE=4 -p 8000:8000 kvcached/vllm:0.24.0-cpu MODEL
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY csrc csrc
COPY kvcached_core kvcached_core
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
COPY engine_forks engine_forks
COPY patches patches
RUN --mount=type=cache,target=/downloads \
    python -m engine_forks build vllm-0.24.0 --variant cpu --cache /downloads --out /wheels

FROM ${BASE}
# The engine's extension needs libnuma, and torch.compile a C++ compiler when the engine runs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
# The wheel asks for torch's CPU build, which PyTorch's own index has.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url https://download.pytorch.org/whl/cpu /wheels/*.whl
RUN useradd --create-home --uid 1000 engine && install -d -o engine -g engine -m 0700 /run/kvcached
USER engine
WORKDIR /home/engine
ENV ENABLE_KVCACHED=true \
    KVCACHED_LEDGER_DIR=/run/kvcached
EXPOSE 8000
# `vllm serve` asks for a package named vllm, which the CPU package is not.
ENTRYPOINT ["python", "-m", "vllm.entrypoints.openai.api_server"]
