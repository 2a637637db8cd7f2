//! The activity of a guest that writes nothing, which distinguishes a slow guest from a dead one.

use std::fs;
use std::time::{Duration, Instant};

use vmm::{VcpuActivity, VmHandle};

use crate::size;

/// Samples a running guest from time to time.
pub(crate) struct Activity<'a> {
    guest: VmHandle,
    /// Bytes of guest memory that have been touched.
    touched_bytes: &'a dyn Fn() -> Option<u64>,
    last: Look,
}

/// The counters at one moment.
#[derive(Clone, Copy)]
struct Look {
    at: Instant,
    exits: u64,
    /// CPU time of all vCPUs, where it can be read.
    cpu: Option<Duration>,
    touched_bytes: Option<u64>,
}

impl<'a> Activity<'a> {
    pub(crate) fn new(guest: VmHandle, touched_bytes: &'a dyn Fn() -> Option<u64>) -> Self {
        let last = Look::at(&guest, touched_bytes);
        Self { guest, touched_bytes, last }
    }

    /// The guest's activity since the last sample.
    pub(crate) fn describe(&mut self) -> String {
        let now = Look::at(&self.guest, self.touched_bytes);
        now.since(&std::mem::replace(&mut self.last, now))
    }
}

impl Look {
    fn at(guest: &VmHandle, touched_bytes: &dyn Fn() -> Option<u64>) -> Self {
        let vcpus = guest.vcpus();
        Self {
            at: Instant::now(),
            exits: vcpus.iter().map(|vcpu| vcpu.exits).sum(),
            cpu: vcpus.iter().map(cpu_time).sum(),
            touched_bytes: touched_bytes(),
        }
    }

    fn since(&self, before: &Self) -> String {
        let passed = (self.at - before.at).as_secs_f64().max(1e-3);
        let exits = self.exits.saturating_sub(before.exits);
        let cpu = self.cpu.zip(before.cpu).map(|(now, then)| now.saturating_sub(then));
        let percent = cpu.map(|cpu| 100.0 * cpu.as_secs_f64() / passed);
        let new_bytes = self.touched_bytes.zip(before.touched_bytes);
        let new_bytes = new_bytes.map(|(now, then)| now.saturating_sub(then));
        // A guest that sleeps until an interrupt looks the same; both do nothing.
        let is_still = exits == 0 && percent.is_none_or(|p| p < 1.0) && new_bytes.unwrap_or(0) == 0;
        let mut parts = vec![match exits {
            0 => "no exits".into(),
            _ => format!("{:.0} exits/s", (exits as f64 / passed).ceil()),
        }];
        parts.extend(percent.map(|percent| format!("{percent:.0} % of a CPU")));
        parts.extend(self.touched_bytes.map(|all| {
            let new = new_bytes.filter(|bytes| *bytes > 0).map(size::human);
            let new = new.map_or("none of it new".into(), |new| format!("{new} of it new"));
            format!("{} of memory touched, {new}", size::human(all))
        }));
        let verdict = if is_still { "it is idle" } else { "it runs" };
        format!("{verdict} ({})", parts.join(", "))
    }
}

/// CPU time of a vCPU's thread, which has that of the guest in it (proc_pid_stat(5), `utime` and `stime`).
fn cpu_time(vcpu: &VcpuActivity) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/self/task/{}/stat", vcpu.thread_id)).ok()?;
    // The name of the thread is in brackets, and may have some itself.
    let numbers = stat.rsplit_once(')')?.1;
    let field =
        |number: usize| numbers.split_ascii_whitespace().nth(number - 3)?.parse::<u64>().ok();
    let ticks = field(14)? + field(15)?;
    Some(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_and_idle_guests_are_distinguished() {
        let at = Instant::now();
        let look = |seconds, exits, cpu_ms, mib: u64| Look {
            at: at + Duration::from_secs(seconds),
            exits,
            cpu: Some(Duration::from_millis(cpu_ms)),
            touched_bytes: Some(mib << 20),
        };
        let first = look(0, 5, 100, 8);
        assert_eq!(
            look(10, 50_005, 9_800, 12).since(&first),
            "it runs (5000 exits/s, 97 % of a CPU, 12 MiB of memory touched, 4 MiB of it new)"
        );
        // It computes, or it is in an endless loop.
        assert_eq!(
            look(10, 5, 10_100, 8).since(&first),
            "it runs (no exits, 100 % of a CPU, 8 MiB of memory touched, none of it new)"
        );
        assert_eq!(
            look(10, 5, 110, 8).since(&first),
            "it is idle (no exits, 0 % of a CPU, 8 MiB of memory touched, none of it new)"
        );
        let blind = Look { cpu: None, touched_bytes: None, ..look(10, 6, 0, 0) };
        assert_eq!(blind.since(&first), "it runs (1 exits/s)");
    }
}
