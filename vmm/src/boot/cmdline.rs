//! The kernel's command line.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Board;
use super::error::LinuxError;
use crate::arch::CMDLINE_GPA;
use crate::devices::{DEVICE_WINDOW_BYTES, device_window};

/// Writes the command line, with the devices appended. Returns its address.
pub(super) fn write(
    given: &str,
    board: Board,
    max: usize,
    memory: &GuestMemoryMmap,
) -> Result<u64, LinuxError> {
    let cmdline = with_devices(given, board.devices);
    if let Some(at) = cmdline.find('\0') {
        return Err(LinuxError::CmdlineZero { at });
    }
    if cmdline.len() > max {
        return Err(LinuxError::CmdlineTooLong { found: cmdline.len(), max });
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE_GPA))?;
    memory.write_slice(&[0], GuestAddress(CMDLINE_GPA + cmdline.len() as u64))?;
    Ok(CMDLINE_GPA)
}

/// `virtio_mmio.device=SIZE@GPA:IRQ` for each device: `drivers/virtio/virtio_mmio.c`. A kernel that has
/// found the device by ACPI refuses the second definition and continues.
fn with_devices(given: &str, devices: usize) -> String {
    // What follows `--` is for init.
    let (kernel, init) = match given.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => (given, None),
    };
    let mut cmdline = kernel.to_owned();
    for (window, irq) in (0..devices).filter_map(device_window) {
        let size = DEVICE_WINDOW_BYTES >> 10;
        cmdline += &format!(" virtio_mmio.device={size}K@{:#x}:{irq}", window.start);
    }
    match init {
        Some(init) => cmdline + " -- " + init,
        None => cmdline,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_come_before_the_arguments_of_init() {
        assert_eq!(with_devices("quiet", 0), "quiet");
        assert_eq!(
            with_devices("quiet -- single", 2),
            "quiet virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 -- single"
        );
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_named() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let board = Board { cpus: 1, devices: 0 };
        let error = write("0123456789", board, 9, &memory).unwrap_err();
        assert_eq!(error.to_string(), "command line of 10 bytes, this kernel takes at most 9");
        assert!(write("012345678", board, 9, &memory).is_ok());
        let error = write("a\0b", board, 9, &memory).unwrap_err();
        assert_eq!(error.to_string(), "command line with a zero byte at 1");
    }
}
