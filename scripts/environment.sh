# Where the scripts keep what they install: outside the clone, and readable by the user `postgres`.
# Sourced by install.sh and .ci/run, and printed for the Makefile by `environment.sh` itself.

if [ -z "${WALRACE_CACHE:-}" ]; then
    if [ "$(id -u)" = 0 ]; then
        WALRACE_CACHE=/var/cache/walrace # root's home is closed to the user postgres
    else
        WALRACE_CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/walrace"
    fi
fi
export WALRACE_CACHE
export PATH="$WALRACE_CACHE/tools/bin:$PATH"
