# shellcheck shell=sh
# The same with disks, a source of random numbers and a vsock.
# shellcheck source=tests/nested/outer/linux.sh
. /linux.sh
linux 1 devices
