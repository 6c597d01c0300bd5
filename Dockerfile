# The server in a container:
#
#   docker build -t tessera .
#   docker run -p 127.0.0.1:8080:8080 -v tessera-data:/data -v "$PWD/run1:/model:ro" tessera
#
# docs/guide/deploy.md has the rest: TLS in front of it, PostgreSQL and S3 behind it, backups.
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1

# PyTorch first: the CPU's wheels are a tenth of the others' size, and this layer stays when the
# code changes.
RUN pip install "torch>=2.13,<3" --index-url https://download.pytorch.org/whl/cpu

WORKDIR /app
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src ./src
RUN pip install ".[serve,text]"

# It writes to /data alone; a volume that is mounted there for the first time takes its owner.
RUN useradd --system --uid 10001 --home-dir /data --shell /usr/sbin/nologin tessera \
    && install -d -o tessera -g tessera -m 0700 /data
USER tessera
WORKDIR /data
VOLUME /data
EXPOSE 8080

HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/v2/health/ready', timeout=4)"]

ENTRYPOINT ["tessera", "serve", "--host", "0.0.0.0", "--port", "8080", "--data", "/data"]
CMD ["--checkpoint", "/model"]
