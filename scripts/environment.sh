# Where the scripts keep what they install: outside the clone, and readable by the user `postgres`.
# Sourced by install.sh, .ci/run and the recipes of the Makefile.

if [ -z "${WALRACE_CACHE:-}" ]; then
    if [ "$(id -u)" = 0 ]; then
        WALRACE_CACHE=/var/cache/walrace # root's home is closed to the user postgres
    else
        WALRACE_CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/walrace"
    fi
fi
export WALRACE_CACHE
export PATH="$WALRACE_CACHE/tools/bin:$PATH"
