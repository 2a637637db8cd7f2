//! On which CPU a demand thread runs. A fault that is answered on the faulting thread's own CPU saves
//! waking another one: an interrupt between processors, and in a virtual machine an exit to its host.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Where demand threads run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placement {
    /// Wherever the scheduler puts them.
    None,
    /// All on this CPU.
    Cpu(usize),
    /// Each on the CPU on which the thread that faults runs, looked up now and then. It pays where
    /// faulting threads are bound to a CPU, as vCPUs often are: measured, 10 us a fault instead of 50. A
    /// thread that is not bound is moved away by the kernel when another CPU is idle: then it makes no
    /// difference. Where following is not possible (no `/proc`, affinity may not be set), the same as
    /// `None`.
    #[default]
    Follow,
    /// Wherever the scheduler puts them, and awake: for a millisecond after each fault they look for the next
    /// one all the time, so that nobody has to be woken to answer it. Costs a CPU while faults come.
    Spin,
}

/// Puts the calling thread where its placement says.
#[derive(Debug)]
pub(crate) struct Follower {
    placement: Placement,
    faults: u64,
    /// The CPU this thread is bound to.
    bound_to: Option<usize>,
    /// The thread that was looked up last, and its `stat` file.
    followed: Option<(u32, File)>,
}

/// After the first few, every so many faults are looked up: some microseconds each.
const LOOK_EVERY: u64 = 64;
const SPIN: Duration = Duration::from_millis(1);

impl Follower {
    pub(crate) fn new(placement: Placement) -> Follower {
        Follower { placement, faults: 0, bound_to: None, followed: None }
    }

    /// In the thread, before it serves.
    pub(crate) fn begin(&mut self) {
        if let Placement::Cpu(cpu) = self.placement {
            // A CPU that is not there or not allowed is a matter of speed only.
            let _ = bind_to(cpu);
        }
    }

    /// How long to look for the next fault before sleeping.
    pub(crate) fn spin(&self) -> Option<Duration> {
        (self.placement == Placement::Spin).then_some(SPIN)
    }

    /// A fault of that thread (0: unknown) was answered: look where it runs, if it is time to.
    pub(crate) fn served(&mut self, thread_id: u32) {
        if self.placement != Placement::Follow || thread_id == 0 {
            return;
        }
        self.faults += 1;
        if self.faults > 4 && !self.faults.is_multiple_of(LOOK_EVERY) {
            return;
        }
        // A thread that has ended meanwhile is not found: the next one will be.
        let Ok(Some(cpu)) = self.cpu_of(thread_id) else {
            self.followed = None;
            return;
        };
        if self.bound_to == Some(cpu) {
            return;
        }
        match bind_to(cpu) {
            Ok(()) => self.bound_to = Some(cpu),
            Err(_) => self.placement = Placement::None,
        }
    }

    /// The CPU on which the thread runs, or ran last.
    fn cpu_of(&mut self, thread_id: u32) -> io::Result<Option<usize>> {
        let stat = match self.followed.take() {
            Some((id, stat)) if id == thread_id => stat,
            _ => File::open(format!("/proc/self/task/{thread_id}/stat"))?,
        };
        let mut text = [0; 1024];
        let len = stat.read_at(&mut text, 0)?;
        self.followed = Some((thread_id, stat));
        Ok(last_cpu(&text[..len]))
    }
}

/// Field 39 of `/proc/<pid>/stat` (proc_pid_stat(5)). The second field, a name in parentheses, may hold anything.
fn last_cpu(stat: &[u8]) -> Option<usize> {
    let after_name = stat.iter().rposition(|&byte| byte == b')')? + 2;
    let field = stat.get(after_name..)?.split(|&byte| byte == b' ').nth(36)?;
    std::str::from_utf8(field).ok()?.trim().parse().ok()
}

fn bind_to(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: all zero bits are an empty cpu_set_t.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: `cpu` is within the set, as checked above.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: 0 is the calling thread; the set is valid and of the given size.
    let result = unsafe { libc::sched_setaffinity(0, mem::size_of_val(&set), &set) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_field_39_whatever_the_name_is() {
        let fields: Vec<String> = (4..=52).map(|field| field.to_string()).collect();
        let stat = format!("7 (a) b) c) S {}\n", fields.join(" "));
        assert_eq!(last_cpu(stat.as_bytes()), Some(39));
        assert_eq!(last_cpu(b"7 (a"), None);
        assert_eq!(last_cpu(b"7 (a) S 1 2 3"), None);
    }

    #[test]
    fn the_followed_cpu_is_that_of_the_thread() {
        std::thread::spawn(|| {
            // SAFETY: takes nothing and has no effect.
            let cpu = unsafe { libc::sched_getcpu() } as usize;
            bind_to(cpu).expect("the CPU it runs on is allowed");
            // SAFETY: takes nothing and has no effect.
            let own_id = unsafe { libc::gettid() } as u32;
            let mut follower = Follower::new(Placement::Follow);
            follower.served(own_id);
            assert_eq!((follower.placement, follower.bound_to), (Placement::Follow, Some(cpu)));
        })
        .join()
        .expect("no assertion failed");
    }

    #[test]
    fn a_thread_that_is_gone_is_followed_no_further() {
        let mut follower = Follower::new(Placement::Follow);
        follower.served(u32::MAX);
        assert_eq!((follower.placement, follower.bound_to), (Placement::Follow, None));
        assert!(follower.followed.is_none());
    }
}
