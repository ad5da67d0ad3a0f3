# One image for everything of ours and for MLflow's server; docker-compose.yml says which process a container is.
ARG PYTHON=python:3.12-slim
FROM ${PYTHON} AS build
# Without an index: put wheels into ./wheels and build with --build-arg PIP_NO_INDEX=1.
ARG PIP_NO_INDEX=
ENV PIP_NO_INDEX=${PIP_NO_INDEX} PIP_FIND_LINKS=/src/wheels PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml constraints.txt README.md wheel[s] /src/wheels/
RUN mv /src/wheels/pyproject.toml /src/wheels/constraints.txt /src/wheels/README.md /src/
COPY core /src/core
COPY search /src/search
RUN python3 -m venv /opt/sieve && /opt/sieve/bin/pip install -c /src/constraints.txt '/src[postgres,dask]'

FROM ${PYTHON}
RUN groupadd --gid 10001 sieve \
    && useradd --uid 10001 --gid 10001 --home-dir /home/sieve --create-home --shell /usr/sbin/nologin sieve \
    && install -d -o sieve -g sieve /var/lib/sieve /var/lib/mlflow /srv/sieve
COPY --from=build /opt/sieve /opt/sieve
ENV PATH=/opt/sieve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/home/sieve \
    SIEVE_HOME=/var/lib/sieve OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 MPLCONFIGDIR=/tmp/matplotlib
USER 10001:10001
WORKDIR /srv/sieve
CMD ["sieve", "--help"]
