# shellcheck shell=sh
# A stock Debian kernel on two CPUs, which it finds by ACPI.
# shellcheck source=tests/nested/outer/linux.sh
. /linux.sh
linux 2
