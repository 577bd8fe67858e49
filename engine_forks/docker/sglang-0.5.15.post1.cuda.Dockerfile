# syntax=docker/dockerfile:1
# SPDX-License-Identifier: Apache-2.0
# SGLang 0.5.15.post1 with kvcached, for NVIDIA GPUs. Build from the root of the repository:
#   docker build -f engine_forks/docker/sglang-0.5.15.post1.cuda.Dockerfile -t kvcached/sglang:0.5.15.post1-cuda .
# Run several on one GPU: they must share the ledger's folder, and the user that owns it.
#   docker run --gpus all -v kvcached-ledger:/run/kvcached -p 30000:30000 kvcached/sglang:0.5.15.post1-cuda --model-path MODEL
ARG BUILD=python:3.12-slim-bookworm
# SGLang compiles many of its kernels when it runs, for which it needs CUDA's compiler; this is the
# CUDA of torch 2.11.0, and Ubuntu's Python is the 3.12 that the wheels are built with.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04

FROM ${BUILD} AS build
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
    python -m engine_forks build sglang-0.5.15.post1 --variant cuda --cache /downloads --out /wheels

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/engine
ENV PATH=/opt/engine/bin:${PATH}
# The release takes any fastapi, and later ones break the server's metrics.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    pip install fastapi==0.136.3 /wheels/*.whl
# The user that the other images have too; Ubuntu's own has its number.
RUN userdel ubuntu && useradd --create-home --uid 1000 engine \
    && install -d -o engine -g engine -m 0700 /run/kvcached
USER engine
WORKDIR /home/engine
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ENABLE_KVCACHED=true \
    KVCACHED_LEDGER_DIR=/run/kvcached
EXPOSE 30000
ENTRYPOINT ["python", "-m", "sglang.launch_server", "--host", "0.0.0.0"]
