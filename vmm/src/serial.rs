//! The 16550A serial port: the state machine of `vm-superio`, its interrupt, and the queue of its input.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use crate::arch::SERIAL_IRQ;
use crate::state::Uart;

/// Receive buffer register, the port the guest reads input from.
const DATA_OFFSET: u8 = 0;
/// Most input bytes that are kept for a guest that does not read them. More bytes are refused.
const INPUT_QUEUE_BYTES: usize = 64 << 10;
/// Depth of the receive FIFO of `vm-superio`'s UART.
pub(crate) const FIFO_BYTES: usize = 0x40;

/// The serial port, with the bytes that the guest has written and the console has not taken yet.
pub(crate) struct SerialPort {
    uart: Serial<IrqLine, NoEvents, Vec<u8>>,
    /// Input that did not fit into the UART's FIFO yet.
    input: VecDeque<u8>,
}

impl SerialPort {
    pub(crate) fn new(vm: Arc<VmFd>) -> SerialPort {
        SerialPort { uart: Serial::new(IrqLine(vm), Vec::new()), input: VecDeque::new() }
    }

    /// `state` has been validated: its FIFO is not overfull.
    pub(crate) fn restore(vm: Arc<VmFd>, state: &Uart) -> SerialPort {
        let uart_state = SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.iter().copied().take(FIFO_BYTES).collect(),
        };
        // The two ways to fail are an overfull FIFO, cut above, and the trigger, which is infallible.
        let uart = Serial::from_state(&uart_state, IrqLine(vm), NoEvents, Vec::new())
            .unwrap_or_else(|_| unreachable!("the FIFO fits and the trigger cannot fail"));
        SerialPort { uart, input: state.queued_input.iter().copied().collect() }
    }

    pub(crate) fn state(&self) -> Uart {
        let uart = self.uart.state();
        Uart {
            baud_divisor_low: uart.baud_divisor_low,
            baud_divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            queued_input: self.input.iter().copied().collect(),
        }
    }

    pub(crate) fn write(&mut self, offset: u8, value: u8) {
        // The output is a vector and the trigger is infallible: nothing here can fail.
        let _ = self.uart.write(offset, value);
    }

    pub(crate) fn read(&mut self, offset: u8) -> u8 {
        let value = self.uart.read(offset);
        if offset == DATA_OFFSET {
            self.refill();
        }
        value
    }

    /// What the guest has written since [`SerialPort::clear_output`].
    pub(crate) fn output(&self) -> &[u8] {
        self.uart.writer()
    }

    pub(crate) fn clear_output(&mut self) {
        self.uart.writer_mut().clear();
    }

    /// Queues input for the guest; returns how many of the bytes were taken.
    pub(crate) fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(INPUT_QUEUE_BYTES.saturating_sub(self.input.len()));
        self.input.extend(&bytes[..taken]);
        self.refill();
        taken
    }

    fn refill(&mut self) {
        let room = self.uart.fifo_capacity().min(self.input.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = self.input.iter().copied().take(room).collect();
        // In loopback mode the UART takes no input from outside: it stays queued.
        let taken = self.uart.enqueue_raw_bytes(&bytes).unwrap_or(0);
        self.input.drain(..taken);
    }
}

/// The interrupt of the serial port, an edge.
///
/// It uses KVM_IRQ_LINE, not an irqfd: a restore then needs no call for it, and a serial port
/// interrupts too seldom for the difference to matter.
struct IrqLine(Arc<VmFd>);

impl Trigger for IrqLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        // Both fail only without an in-kernel interrupt controller, which every VM here has.
        let _: Result<(), io::Error> = self.0.set_irq_line(SERIAL_IRQ, true).map_err(Into::into);
        let _: Result<(), io::Error> = self.0.set_irq_line(SERIAL_IRQ, false).map_err(Into::into);
        Ok(())
    }
}
