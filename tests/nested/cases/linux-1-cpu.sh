# shellcheck shell=sh
# A stock Debian kernel on one CPU.
# shellcheck source=tests/nested/outer/linux.sh
. /linux.sh
linux 1
