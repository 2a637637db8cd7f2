//! I/O ports and the addresses outside of RAM: which device answers, and what answers where none is.

use crate::boot::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, is_power_off};
use crate::console::{Console, ConsoleFlow};
use crate::control::Stop;
use crate::rtc::{self, Rtc};
use crate::serial::{COM1_PORT, COM1_PORTS, Com1};

/// A guest that wants to be stored writes a byte to this port: from Linux's user space,
/// `printf x | dd of=/dev/port bs=1 seek=1664`.
pub const REQUEST_PORT: u16 = 0x680;

/// Data and command/status ports of the i8042 keyboard controller.
const I8042_DATA_PORT: u16 = 0x60;
const I8042_COMMAND_PORT: u16 = 0x64;
/// Pulse the CPU's reset line: how PC software asks for a reset.
const I8042_RESET_CPU: u8 = 0xfe;
/// What a read finds where no device is: the bus floats high.
const FLOATING_BUS: u8 = 0xff;

/// Everything the guest reaches by port I/O.
pub(crate) struct Bus {
    com1: Com1,
    rtc: Rtc,
    console: Box<dyn Console>,
    /// Whether a write to [`REQUEST_PORT`] stops the guest.
    heeds_requests: bool,
}

impl Bus {
    pub(crate) fn new(
        com1: Com1,
        rtc: Rtc,
        console: Box<dyn Console>,
        heeds_requests: bool,
    ) -> Bus {
        Bus { com1, rtc, console, heeds_requests }
    }

    pub(crate) fn rtc(&self) -> &Rtc {
        &self.rtc
    }

    pub(crate) fn com1(&mut self) -> &mut Com1 {
        &mut self.com1
    }

    /// One port write exit. `data` holds several items when a string instruction wrote them at once.
    ///
    /// Gives the reason when the write stops the guest.
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
            REQUEST_PORT if self.heeds_requests => Some(Stop::Requested),
            rtc::INDEX_PORT | rtc::DATA_PORT => {
                data.iter().for_each(|&byte| self.rtc.write(port, byte));
                None
            }
            _ => None,
        }
    }

    /// One port read exit: fills `data`.
    pub(crate) fn port_read(&mut self, port: u16, data: &mut [u8]) {
        if let Some(offset) = com1_offset(port) {
            data.fill_with(|| self.com1.read(offset));
            return;
        }
        match port {
            rtc::INDEX_PORT | rtc::DATA_PORT => data.fill_with(|| self.rtc.read(port)),
            // No wake-up to tell of: ACPI's sleep status register.
            SLEEP_STATUS_PORT => data.fill(0),
            // Nothing to read, and room for a command: software waits for that before it resets.
            I8042_DATA_PORT | I8042_COMMAND_PORT => data.fill(0),
            _ => data.fill(FLOATING_BUS),
        }
    }

    /// A read outside of RAM, where no device is.
    pub(crate) fn mmio_read(data: &mut [u8]) {
        data.fill(FLOATING_BUS);
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
