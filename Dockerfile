# diffmax on a CPU: a user without rights, files that nobody writes to, kernels compiled while the image is built. docs/containers.md
FROM python:3.11-slim-bookworm

# Where uv finds torch's CPU build
ARG TORCH="--torch-backend=cpu"

COPY requirements.txt /opt/diffmax/requirements.txt
RUN python -m venv /opt/diffmax/venv && /opt/diffmax/venv/bin/python -m pip install --no-cache-dir "$(grep '^uv==' /opt/diffmax/requirements.txt)"
ENV PATH=/opt/diffmax/venv/bin:$PATH VIRTUAL_ENV=/opt/diffmax/venv
RUN uv pip install --no-cache $TORCH "$(grep '^torch==' /opt/diffmax/requirements.txt)"

COPY diffmax-core /opt/diffmax/source
RUN uv pip install --no-cache --constraint /opt/diffmax/requirements.txt "/opt/diffmax/source[numba]"

COPY .ci/container_check.py /opt/diffmax/check.py
COPY .ci/container_entry.sh /opt/diffmax/entry.sh
ENV NUMBA_CACHE_DIR=/opt/diffmax/kernels
RUN python -c "import diffmax; print(diffmax.warmup())"

ENV NUMBA_CACHE_DIR=/tmp/diffmax-kernels
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["/opt/diffmax/entry.sh"]
CMD ["python", "-m", "diffmax"]
