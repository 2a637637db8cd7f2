//! The devices at I/O ports: serial port, real-time clock, power and reset registers, snapshot trigger.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::acpi::{RESET_VALUE, is_power_off};
use super::address_map::{
    COM1_PORT, COM1_PORTS, RESET_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};
use super::rtc::{self, Rtc, RtcState};
use crate::console::{Console, ConsoleFlow};
use crate::control::Stop;
use crate::devices::NO_DEVICE;
use crate::serial::SerialPort;
use crate::state::Uart;

/// A guest that requests a snapshot of itself writes a byte to this port. From Linux's user space: `printf x | dd
/// of=/dev/port bs=1 seek=1664`.
pub const SNAPSHOT_TRIGGER_PORT: u16 = 0x680;

/// Data and command/status ports of the i8042 keyboard controller.
const I8042_DATA_PORT: u16 = 0x60;
const I8042_COMMAND_PORT: u16 = 0x64;
/// Pulse the CPU's reset line: PC software requests a reset in this way.
const I8042_RESET_CPU: u8 = 0xfe;

/// Everything that the guest reaches by port I/O.
pub(crate) struct IoPorts {
    com1: SerialPort,
    rtc: Rtc,
    console: Box<dyn Console>,
    /// Whether a write to [`SNAPSHOT_TRIGGER_PORT`] stops the guest.
    snapshot_trigger: bool,
}

impl IoPorts {
    /// The devices after a reset.
    pub(crate) fn new(vm: Arc<VmFd>, console: Box<dyn Console>, snapshot_trigger: bool) -> IoPorts {
        IoPorts { com1: SerialPort::new(vm), rtc: Rtc::default(), console, snapshot_trigger }
    }

    /// The devices in their saved state.
    pub(crate) fn restore(
        vm: Arc<VmFd>,
        com1: &Uart,
        rtc: &RtcState,
        console: Box<dyn Console>,
        snapshot_trigger: bool,
    ) -> IoPorts {
        let (com1, rtc) = (SerialPort::restore(vm, com1), Rtc::restore(rtc));
        IoPorts { com1, rtc, console, snapshot_trigger }
    }

    /// Puts the devices back into a saved state. The console stays.
    pub(crate) fn reset(&mut self, vm: &Arc<VmFd>, com1: &Uart, rtc: &RtcState) {
        self.com1 = SerialPort::restore(Arc::clone(vm), com1);
        self.rtc = Rtc::restore(rtc);
        self.console.guest_was_reset();
    }

    /// The state of the serial port and of the real-time clock.
    pub(crate) fn save(&self) -> (Uart, RtcState) {
        (self.com1.state(), self.rtc.state())
    }

    pub(crate) fn serial(&mut self) -> &mut SerialPort {
        &mut self.com1
    }

    /// Handles an exit for a write to a port. `data` holds several items when a string instruction wrote
    /// them together. Returns the reason when the write stops the guest.
    pub(crate) fn port_write(&mut self, port: u16, data: &[u8]) -> Option<Stop> {
        if let Some(offset) = com1_offset(port) {
            for &byte in data {
                self.com1.write(offset, byte);
            }
            return self.flush_console();
        }
        match port {
            I8042_COMMAND_PORT if data.contains(&I8042_RESET_CPU) => Some(Stop::Reset),
            RESET_PORT if data.contains(&RESET_VALUE) => Some(Stop::Reset),
            SLEEP_CONTROL_PORT if data.iter().copied().any(is_power_off) => Some(Stop::PowerOff),
            SNAPSHOT_TRIGGER_PORT if self.snapshot_trigger => Some(Stop::SnapshotTrigger),
            rtc::INDEX_PORT | rtc::DATA_PORT => {
                data.iter().for_each(|&byte| self.rtc.write(port, byte));
                None
            }
            _ => None,
        }
    }

    /// Handles an exit for a read of a port: fills `data`.
    pub(crate) fn port_read(&mut self, port: u16, data: &mut [u8]) {
        if let Some(offset) = com1_offset(port) {
            data.fill_with(|| self.com1.read(offset));
            return;
        }
        match port {
            rtc::INDEX_PORT | rtc::DATA_PORT => data.fill_with(|| self.rtc.read(port)),
            // ACPI's sleep status register: there was no wake-up.
            SLEEP_STATUS_PORT => data.fill(0),
            // There is nothing to read, and there is room for a command. Software polls for that before it resets.
            I8042_DATA_PORT | I8042_COMMAND_PORT => data.fill(0),
            _ => data.fill(NO_DEVICE),
        }
    }

    fn flush_console(&mut self) -> Option<Stop> {
        if self.com1.output().is_empty() {
            return None;
        }
        let flow = self.console.write(self.com1.output());
        self.com1.clear_output();
        (flow == ConsoleFlow::Pause).then_some(Stop::ConsolePause)
    }
}

fn com1_offset(port: u16) -> Option<u8> {
    let offset = port.checked_sub(COM1_PORT)?;
    (offset < COM1_PORTS).then_some(offset as u8)
}
