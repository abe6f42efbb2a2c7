# shellcheck shell=bash
# Words that every script here shares: how they speak, how they fail, where things are.
# Sourced, never run. Sets ROOT and changes into it.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$ROOT"

# Cargo reads this too; scripts must agree with it on where binaries end up.
TARGET="${CARGO_TARGET_DIR:-$ROOT/target}"

# A freshly installed toolchain is not on the PATH of the shell that installed it.
if [ -d "${CARGO_HOME:-$HOME/.cargo}/bin" ]; then
    PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
fi

say() { printf '%s\n' "$*"; }

# One line, then stop: what is missing and what to do about it.
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# version_at_least HAVE WANT: dotted numbers.
version_at_least() {
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

# port_taken PORT: does somebody listen there?
port_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# free_port [NOT]: a port, other than NOT, that nobody listens on at this moment. Bash can only ask by connecting: refused
# means free. Below the range from which the kernel gives ports to outgoing connections, which this would not see.
free_port() {
    local port
    for _ in $(seq 1 100); do
        port=$((10000 + (RANDOM ^ BASHPID) % 20000))
        if [ "$port" != "${1:-}" ] && ! port_taken "$port"; then
            say "$port"
            return 0
        fi
    done
    die "found no free port in 100 tries"
}

# wait_for_node PID HTTP_PORT SECONDS LOG: until the node says that it is ready, or the reason why it never will.
wait_for_node() {
    local pid=$1 http=$2 seconds=$3 log=$4 deadline
    deadline=$((SECONDS + seconds))
    while ! http_ok "$http" /readyz; do
        if ! kill -0 "$pid" 2>/dev/null; then
            sed 's/^/  /' "$log" >&2
            die "the node stopped before it was ready; its output stands above"
        fi
        if [ "$SECONDS" -ge "$deadline" ]; then
            sed 's/^/  /' "$log" >&2
            die "the node is not ready after $seconds s; its output stands above"
        fi
        sleep 0.1
    done
}

# http_ok PORT PATH: does it answer 200? Without curl, which a fresh machine may lack.
http_ok() {
    local status
    {
        printf 'GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "$2" >&3 &&
            IFS= read -r -t 2 status <&3
    } 2>/dev/null 3<>"/dev/tcp/127.0.0.1/$1" || return 1
    [[ $status == *" 200 "* ]]
}

# cores_up_to N: how many cores to give a node, N or what this process may use.
cores_up_to() {
    local here
    here=$(nproc)
    say $((here < $1 ? here : $1))
}
