# syntax=docker/dockerfile:1
# nla_jax in a container, for GKE (launch/gke.sh), a Cloud TPU VM or a machine with GPUs.
#
#   docker build -t nla_jax .                                       CPU
#   docker build -t nla_jax:tpu  --build-arg EXTRAS=tpu,gcs .       TPU, with buckets
#   docker build -t nla_jax:cuda --build-arg EXTRAS=cuda .          NVIDIA GPUs (docker run --gpus all)
#   docker run --rm -v nla_cache:/cache nla_jax nla explain --text "The cat sat on the"
#
# EXTRAS are extras of setup.py. /cache has downloads and compiled programs. The image holds no token: pass one
# with `docker run --env HF_TOKEN`, which takes it from your environment.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG EXTRAS=""
RUN useradd --home-dir /nla_jax --uid 1000 nla && mkdir /nla_jax /cache && chown nla:nla /nla_jax /cache
USER 1000
WORKDIR /nla_jax
ENV PATH=/nla_jax/.venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    NLA_CACHE=/cache HF_HOME=/cache/huggingface

# The requirements are a layer of their own: a change of the code does not install them again.
COPY --chown=1000 setup.py pyproject.toml README.md LICENSE ./
RUN mkdir nla_jax && touch nla_jax/__init__.py && python -m venv .venv && \
    .venv/bin/pip install --no-cache-dir --editable ".${EXTRAS:+[$EXTRAS]}"

COPY --chown=1000 nla_jax nla_jax
COPY --chown=1000 experiments experiments
COPY --chown=1000 launch launch

VOLUME /cache
CMD ["nla", "--help"]
