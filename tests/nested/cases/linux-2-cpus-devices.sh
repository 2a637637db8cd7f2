# shellcheck shell=sh
# Two CPUs and all devices: their interrupts may go to either CPU, their queues be filled by both.
# shellcheck source=tests/nested/outer/linux.sh
. /linux.sh
linux 2 devices
