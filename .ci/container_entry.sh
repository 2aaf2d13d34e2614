#!/bin/sh
# Numba reads kept kernels only from a folder that it may write to, so those of the image are copied to one of this container.
set -eu
if ! { cp -R /opt/diffmax/kernels "$NUMBA_CACHE_DIR" && chmod -R u+w "$NUMBA_CACHE_DIR"; } 2>/dev/null; then
    echo "diffmax: $NUMBA_CACHE_DIR cannot be written to, so kernels are compiled anew; run with --tmpfs /tmp" >&2
fi
exec "$@"
