# A server, or any other command: docker run IMAGE python -m launch.sample --help
#
#   docker build --tag magnet_jax .
#   docker run --rm --publish 127.0.0.1:7860:7860 --volume magnet_jax:/data magnet_jax
#
# For GPUs: --build-arg EXTRA=serve,cuda, and docker run --gpus all; for TPUs EXTRA=serve,tpu.
FROM python:3.11-slim-bookworm

ARG EXTRA=serve
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libsndfile1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 magnet \
    && install --directory --owner magnet /data
WORKDIR /magnet_jax
# The libraries first: they change seldom.
COPY requirements.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --requirement requirements.txt
COPY configs configs
COPY launch launch
COPY magnet_jax magnet_jax
COPY tokenization tokenization
RUN pip install --no-cache-dir --editable ".[${EXTRA}]"

USER 1000
ENV XDG_CACHE_HOME=/data/cache HF_HOME=/data/hub
VOLUME /data
EXPOSE 7860
# Within the container every address is the container's own; --publish above opens it to this
# machine alone, where it is asked as localhost or 127.0.0.1. For more, give keys: --api-key-file,
# or MAGNET_JAX_API_KEY; and --allow-host for each name.
ENTRYPOINT []
CMD ["python", "-u", "-m", "launch.serve", "--checkpoint", "demo", "--host", "0.0.0.0", "--open", "--allow-host", "localhost", "--folder", "/data/served"]
