# Two stages: the first builds the environment, the second carries it. Weights are not part of the image: the server
# loads MODEL_AFTER_ID and MODEL_BEFORE_ID into /models at start, or serves the bundled pair if neither is set.
#
#   docker build -t lda-service .
#   docker run -p 50051:50051 -v lda-models:/models \
#     -e MODEL_AFTER_ID=allenai/OLMo-2-0425-1B-Instruct -e MODEL_BEFORE_ID=allenai/OLMo-2-0425-1B-SFT lda-service

FROM python:3.11-slim-bookworm AS build

# PyTorch's index of CPU wheels goes here for an image without CUDA; pip reads it from the environment.
ARG PIP_EXTRA_INDEX_URL

WORKDIR /src
RUN python -m venv /opt/lda
COPY constraints.txt ./
# The large part first, in a layer of its own: it stays while the code changes.
RUN /opt/lda/bin/pip install --no-cache-dir --constraint constraints.txt torch transformers
COPY pyproject.toml README.md LICENSE ./
COPY clients/python clients/python
COPY lda_service lda_service
RUN /opt/lda/bin/pip install --no-cache-dir --constraint constraints.txt ./clients/python .

FROM python:3.11-slim-bookworm

# The C compiler builds the kernels of the CPU path at the first start, for the processor that it runs on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 10001 --create-home lda && install -d -o 10001 -g 10001 /models
COPY --from=build /opt/lda /opt/lda

# HOST: loopback, the default, is not reachable from outside a container. Publish the port to trusted networks only.
ENV PATH=/opt/lda/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/models \
    HOST=0.0.0.0 \
    PORT=50051

USER 10001:10001
WORKDIR /home/lda
VOLUME /models
EXPOSE 50051

# The service is healthy once both models are loaded and a warm-up generation has run; large models take a while.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 CMD ["lda-service", "health"]

ENTRYPOINT ["lda-service"]
CMD ["serve"]
