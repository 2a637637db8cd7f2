//! Functions that the integration tests share.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

pub mod kernel;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::{Console, ConsoleFlow, PausedVm, RunningVm, Stop, memory_layout};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
/// How long a race is repeated that mostly has the wanted result within a second.
pub const LOST_ONCE: Duration = Duration::from_secs(60);
/// Longer than any step of a test takes on a slow host.
pub const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));

/// Whether guests can run here. If not, it prints so, without the test harness's capture.
pub fn kvm_or_skip(test: &str) -> bool {
    let error = match vmm::probe() {
        Ok(_) => return true,
        Err(error) => error,
    };
    assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{test} needs KVM: {error}");
    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    let line = format!("SKIPPED {test}: {}: {cause}\n", vmm::KVM_DEVICE);
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    false
}

/// Anonymous memory; vm-memory maps it without reserving swap for it.
pub fn guest_memory(memory_bytes: u64) -> Arc<GuestMemoryMmap> {
    let ranges: Vec<_> = memory_layout(memory_bytes)
        .unwrap()
        .iter()
        .map(|range| (GuestAddress(range.gpa), range.len as usize))
        .collect();
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// A console that keeps what the guest writes and pauses it after a number of lines.
#[derive(Clone, Default)]
pub struct Lines {
    inner: Arc<Mutex<(Vec<u8>, usize)>>,
}

impl Lines {
    /// Pauses after each `lines` lines.
    pub fn pausing_after(lines: usize) -> Lines {
        let console = Lines::default();
        console.inner.lock().unwrap().1 = lines;
        console
    }

    /// Takes the complete lines written so far.
    pub fn take(&self) -> Vec<String> {
        let mut inner = self.inner.lock().unwrap();
        let text = String::from_utf8(std::mem::take(&mut inner.0)).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'), "half a line: {text:?}");
        text.lines().map(str::to_owned).collect()
    }

    pub fn pause_after(&self, lines: usize) {
        self.inner.lock().unwrap().1 = lines;
    }
}

impl Console for Lines {
    fn write(&mut self, bytes: &[u8]) -> ConsoleFlow {
        let mut inner = self.inner.lock().unwrap();
        inner.0.extend_from_slice(bytes);
        let newlines = bytes.iter().filter(|&&byte| byte == b'\n').count();
        if newlines == 0 || inner.1 == 0 {
            return ConsoleFlow::Continue;
        }
        inner.1 = inner.1.saturating_sub(newlines);
        if inner.1 == 0 { ConsoleFlow::Pause } else { ConsoleFlow::Continue }
    }
}

/// Runs until the console pauses the guest.
pub fn run_to_pause(vm: PausedVm) -> PausedVm {
    let running = vm.resume().unwrap();
    assert_eq!(stop_of(&running), Stop::ConsolePause);
    running.pause().unwrap()
}

pub fn stop_of(running: &RunningVm) -> Stop {
    running.wait(PATIENCE).expect("the guest stops in time")
}
