#!/bin/sh
# steps.sh CASE: runs /cases/CASE.sh, whose functions these are. A failed step ends its case.
case=$1
now() { awk '{ printf "%d\n", $1 * 1000 }' /proc/uptime; }

# step NAME COMMAND...: runs a command with its output in /tmp/CASE/NAME.{out,err}, and prints its result
# and its duration. STEP_S is a guard against hanging.
step() {
    name=$1
    shift
    began=$(now)
    code=0
    timeout "${STEP_S:-300}" "$@" >"$dir/$name.out" 2>"$dir/$name.err" || code=$?
    took=$(($(now) - began))
    if [ "$code" != 0 ]; then fail "$name" "exit code $code after $took ms: $*"; fi
    echo "nested: $case: $name: ok, $took ms"
}

# figures NAME PATTERN: shows the lines of a step's output that match.
figures() { cat "$dir/$1.out" "$dir/$1.err" | grep -E "$2" | sed "s/^/nested: $case: $1:   /"; }

# holds NAME WHAT COMMAND...: a check of the output of a step.
holds() {
    name=$1
    what=$2
    shift 2
    "$@" >/dev/null 2>&1 || fail "$name" "not so: $what ($*)"
    echo "nested: $case: $name: ok, $what"
}

fail() {
    echo "nested: $case: $1: FAILED, $2"
    for file in "$dir/$1.out" "$dir/$1.err"; do
        if [ -s "$file" ]; then
            echo "--- the end of $file"
            tail -n 40 "$file"
        fi
    done
    echo "--- the end of the kernel's messages"
    dmesg | tail -n 20
    exit 1
}

dir=/tmp/$case
mkdir -p "$dir"
cd "$dir" || exit 1
# shellcheck source=/dev/null
. "/cases/$case.sh"
# A snapshot is as big as its guest's memory; the next case needs the room.
rm -rf "$dir"
