# syntax=docker/dockerfile:1
# SPDX-License-Identifier: Apache-2.0
# vLLM 0.24.0 with kvcached, for NVIDIA GPUs. Build from the root of the repository:
#   docker build -f engine_forks/docker/vllm-0.24.0.cuda.Dockerfile -t kvcached/vllm:0.24.0-cuda .
# Run several on one GPU: they must share the ledger's folder, and the user that owns it.
#   docker run --gpus all -v kvcached-ledger:/run/kvcached kvcached/vllm:0.24.0-cuda MODEL
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
    python -m engine_forks build vllm-0.24.0 --variant cuda --cache /downloads --out /wheels

FROM ${BASE}
# Triton compiles its launchers when the engine runs; the driver comes from the container runtime.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    pip install /wheels/*.whl
RUN useradd --create-home --uid 1000 engine && install -d -o engine -g engine -m 0700 /run/kvcached
USER engine
WORKDIR /home/engine
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ENABLE_KVCACHED=true \
    KVCACHED_LEDGER_DIR=/run/kvcached
EXPOSE 8000
ENTRYPOINT ["vllm", "serve"]
