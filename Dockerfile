# jaxft for NVIDIA GPUs: docker build -t jaxft .   (README.md, "In a container")
# JAX's wheels bring CUDA and cuDNN; of the host comes the driver (580 or newer), through the NVIDIA Container Toolkit.
FROM python:3.12-slim

# Runs write here as this user; a folder of the host that is mounted must belong to the same number.
RUN useradd --uid 1000 --create-home jaxft && mkdir -p /work/runs /cache && chown -R jaxft /work /cache

# What is installed, apart from what is run below: a config that changes does not install 3 GB again.
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY jaxft jaxft
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint=constraints.txt '.[cuda]'

WORKDIR /work
COPY configs configs
COPY assets assets

# Models and data sets of the hub, tokens and compiled programs: kept from one container to the next by a volume.
ENV HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/work/runs", "/cache"]

# By number: Kubernetes does not take a name for a user that is not root (runAsNonRoot).
USER 1000
CMD ["python", "-m", "jaxft.doctor"]
