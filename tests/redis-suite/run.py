#!/usr/bin/env python3
"""Judges a running server with Redis's own test-suite.

The suite is the Tcl one that ships with Redis's source (fetched into target/redis-src by
scripts/lib/ensure.sh, never committed). It has a mode for a server that it did not start itself: it
connects to a host and port, skips the tests that want to restart, configure or replicate the server,
and runs the rest. This file starts one run per unit, so that every unit has its own counts, its own
deadline and its own list of skips, and a unit that breaks does not take the others with it.

What is skipped, and why, stands in skips.txt beside this file; a skip that no longer matches a test is
an error, so that the list cannot outlive its reasons.

usage: run.py --port PORT [--source DIR] [--show] [UNIT ...]
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# The command groups that a GridKV node serves. The value is the deadline in seconds.
UNITS = {
    "unit/type/string": 180,
    "unit/type/incr": 60,
    "unit/bitops": 120,
    "unit/keyspace": 120,
    "unit/expire": 180,
    "unit/scan": 180,
    "unit/multi": 120,
    "unit/protocol": 120,
    "unit/quit": 60,
    "unit/querybuf": 60,
    "unit/info-command": 60,
    "unit/introspection": 120,
    "unit/introspection-2": 120,
    "unit/slowlog": 60,
    "unit/latency-monitor": 60,
    "unit/other": 120,
}

# Whole classes of tests that ask for what a node does not have: replication, RDB files, HyperLogLogs.
DENIED_TAGS = "-needs:repl -needs:save -needs:pfdebug"

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LINE = re.compile(r"^\[(ok|err|skip|ignore|exception|TIMEOUT)\]: ?(.*)$")


def read_skips(path):
    """skips.txt as {unit: {test name or /pattern: reason}}."""
    skips, unit = {}, None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            unit = line[1:-1]
            skips.setdefault(unit, {})
            continue
        name, separator, reason = line.partition("  # ")
        if unit is None or not separator or not reason.strip():
            sys.exit(f"{path}:{number}: expected `[unit]` or `test name  # reason`")
        skips[unit][name.strip()] = reason.strip()
    return skips


def matches(name, entry):
    return re.search(entry[1:], name) is not None if entry.startswith("/") else name == entry


def run_unit(source, unit, port, skips, deadline, show):
    """One unit; returns its counts and the failures as text."""
    with tempfile.NamedTemporaryFile("w", suffix=".skips", delete=False) as skipfile:
        skipfile.write("\n".join(skips))
    command = ["./runtest", "--host", "127.0.0.1", "--port", str(port), "--single", unit,
               "--singledb", "--ignore-encoding", "--ignore-digest", "--durable",
               "--tags", DENIED_TAGS, "--skipfile", skipfile.name]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=deadline)
        late = False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        late = True
    os.unlink(skipfile.name)

    text = COLOUR.sub("", output.decode("utf-8", "replace"))
    if show:
        print(text)
    counts = {"ok": 0, "err": 0, "skip": 0, "ignore": 0}
    failures, skipped = [], []
    lines = text.splitlines()
    for index, line in enumerate(lines):
        found = LINE.match(line)
        if not found:
            continue
        kind, rest = found.groups()
        if kind == "exception":
            # The suite's word for an error outside of any test; the trace that follows names the line.
            failures.append("outside of a test: " + " ".join(lines[index:index + 6]))
            counts["err"] += 1
        elif kind == "TIMEOUT":
            counts["err"] += 1
        elif kind == "err":
            counts["err"] += 1
            detail = [rest]
            for more in lines[index + 1:index + 12]:
                if LINE.match(more) or more.startswith("["):
                    break
                detail.append("    " + more)
            failures.append("\n".join(detail))
        else:
            counts[kind] += 1
            if kind == "skip":
                skipped.append(rest)
    if late:
        counts["err"] += 1
        failures.append(f"not finished after {deadline} s; the last lines were:\n    "
                        + "\n    ".join(lines[-3:]))
    elif "The End" not in text and counts["err"] == 0:
        counts["err"] += 1
        failures.append("the suite stopped early; the last lines were:\n    " + "\n    ".join(lines[-8:]))

    # A failure early in a unit may hide the tests that a skip names: then say nothing about the skip.
    if counts["err"] == 0:
        for entry in skips:
            if not any(matches(name, entry) for name in skipped):
                counts["err"] += 1
                failures.append(f"skips.txt names `{entry}`, which is not in {unit} (or needs no skip)")
    return counts, failures, time.monotonic() - started


def main():
    arguments = argparse.ArgumentParser(description="Runs Redis's own test-suite against a running server.")
    arguments.add_argument("--port", type=int, required=True)
    arguments.add_argument("--source", default=str(ROOT / "target" / "redis-src" / "redis"),
                           help="unpacked source of Redis (see scripts/lib/ensure.sh)")
    arguments.add_argument("--show", action="store_true", help="print all that the suite prints")
    arguments.add_argument("units", nargs="*", help="only these units")
    given = arguments.parse_args()

    source = Path(given.source)
    if not (source / "runtest").exists():
        sys.exit(f"{source} holds no Redis test-suite; scripts/lib/ensure.sh fetches it")
    if not shutil.which("tclsh8.6") and not shutil.which("tclsh"):
        sys.exit("no tclsh: apt-get install tcl")
    unknown = [unit for unit in given.units if unit not in UNITS]
    if unknown:
        sys.exit(f"not a unit that we run: {' '.join(unknown)}; there are: {' '.join(UNITS)}")

    skips = read_skips(HERE / "skips.txt")
    stale = [unit for unit in skips if unit not in UNITS]
    if stale:
        sys.exit(f"skips.txt has a section for a unit that we do not run: {' '.join(stale)}")

    print(f"{'unit':<30} {'passed':>7} {'failed':>7} {'skipped':>8} {'not for us':>11} {'seconds':>8}")
    total = {"ok": 0, "err": 0, "skip": 0, "ignore": 0}
    everything = []
    for unit in given.units or UNITS:
        counts, failures, seconds = run_unit(source, unit, given.port, skips.get(unit, {}), UNITS[unit], given.show)
        print(f"{unit:<30} {counts['ok']:>7} {counts['err']:>7} {counts['skip']:>8} {counts['ignore']:>11} {seconds:>8.1f}",
              flush=True)
        for key in total:
            total[key] += counts[key]
        everything += [(unit, failure) for failure in failures]
    for unit, failure in everything:
        print(f"\n*** {unit}: {failure}")
    print(f"\nredis-suite: {total['ok']} passed, {total['err']} failed, {total['skip'] + total['ignore']} skipped")
    sys.exit(1 if total["err"] else 0)


if __name__ == "__main__":
    main()
