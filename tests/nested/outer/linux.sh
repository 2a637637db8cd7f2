#!/bin/sh
# linux CPUS [disk]: a stock Debian kernel is created, stored at its line READY, restored eagerly and twice
# lazily; with `disk`, it has a disk with a file system and a source of random numbers. For the cases,
# with the functions of steps.sh.

# ticks NAME: the guest's own checks from READY on, all ok.
ticks() {
    holds "$1" "11 ticks" test "$(grep -c '^tick [0-9]* ok ' "$1.out")" -ge 11
    holds "$1" "none of them bad" sh -c "! grep BAD $1.out"
}

# word KEY NAME: the value of KEY= in the first tick of a run.
word() { grep -m 1 '^tick' "$2.out" | tr ' ' '\n' | sed -n "s/^$1=//p"; }

linux() {
    cpus=$1
    devices='' moved=''
    if [ "${2:-}" = disk ]; then
        truncate -s 16M disk.img
        mke2fs -F disk.img >/dev/null 2>&1 || fail create "no file system on the disk"
        devices='--disk disk.img --rng'
        # The disk as it was at that time stays with the snapshot; each guest gets its copy, whose time of
        # change is its own.
        moved='--disk copy.img --force-disks'
    fi
    # shellcheck disable=SC2086 # words
    step create snap create guest.snap --timeout 280s --kernel /vmlinux --initrd /guest.cpio \
        --memory 160M --cpus "$cpus" --when output:READY $devices \
        --cmdline "console=ttyS0 quiet mitigations=off panic=-1"
    figures create 'guest.snap'
    step verify snap verify guest.snap

    for run in eager lazy clone; do
        case $run in eager) lazily='' ;; *) lazily=--lazy ;; esac
        if [ -n "$moved" ]; then cp disk.img copy.img; fi
        step "$run" sh -c "echo hello | snap restore $lazily guest.snap $moved --until 'tick 12 '"
        figures "$run" 'tick 11|first'
        ticks "$run"
        holds "$run" "its input arrived" grep -q '^heard hello' "$run.out"
        holds "$run" "$cpus CPUs answer" grep -q "^tick 11 .* cpus=$cpus/$cpus" "$run.out"
    done
    holds clone "its random numbers differ from its twin's" \
        test "$(word random lazy)" != "$(word random clone)"
}
