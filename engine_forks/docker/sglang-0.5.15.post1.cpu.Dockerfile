# syntax=docker/dockerfile:1
# SPDX-License-Identifier: Apache-2.0
# SGLang 0.5.15.post1 with kvcached, for machines without a GPU. From the root of the repository:
#   docker build -f engine_forks/docker/sglang-0.5.15.post1.cpu.Dockerfile -t kvcached/sglang:0.5.15.post1-cpu .
#   docker run -p 30000:30000 kvcached/sglang:0.5.15.post1-cpu --model-path MODEL --max-total-tokens 65536
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
    python -m engine_forks build sglang-0.5.15.post1 --variant cpu --cache /downloads --out /wheels

FROM ${BASE}
# torch and torchvision of PyTorch's own index, which are built for a CPU, go before PyPI's.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url https://download.pytorch.org/whl/cpu /wheels/*.whl
RUN useradd --create-home --uid 1000 engine && install -d -o engine -g engine -m 0700 /run/kvcached
USER engine
WORKDIR /home/engine
ENV SGLANG_USE_CPU_ENGINE=1 \
    ENABLE_KVCACHED=true \
    KVCACHED_LEDGER_DIR=/run/kvcached
EXPOSE 30000
ENTRYPOINT ["python", "-m", "sglang.launch_server", "--device", "cpu", "--host", "0.0.0.0"]
