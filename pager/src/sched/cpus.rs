//! Sets of CPUs, and the affinity of threads.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::mem;

/// The CPU on which the calling thread runs now.
pub(crate) fn this_cpu() -> usize {
    // SAFETY: takes nothing and has no effect.
    let cpu = unsafe { libc::sched_getcpu() };
    usize::try_from(cpu).unwrap_or(NOWHERE)
}

/// The CPU number of a thread that is bound to no CPU.
pub(crate) const NOWHERE: usize = usize::MAX;

/// A set of CPUs.
#[derive(Clone, Copy)]
pub(crate) struct Cpus(libc::cpu_set_t);

impl Cpus {
    fn none() -> Cpus {
        // SAFETY: all zero bits are an empty cpu_set_t.
        Cpus(unsafe { mem::zeroed() })
    }

    /// The set of one CPU. If the number is too large for a set, the set is empty, and no thread can be bound to it.
    pub(crate) fn one(cpu: usize) -> Cpus {
        let mut cpus = Cpus::none();
        if cpu < libc::CPU_SETSIZE as usize {
            // SAFETY: `cpu` is within the set.
            unsafe { libc::CPU_SET(cpu, &mut cpus.0) };
        }
        cpus
    }

    pub(crate) fn without(mut self, cpu: &usize) -> Cpus {
        if *cpu < libc::CPU_SETSIZE as usize {
            // SAFETY: `cpu` is within the set.
            unsafe { libc::CPU_CLR(*cpu, &mut self.0) };
        }
        self
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count() == 0
    }

    pub(crate) fn count(&self) -> usize {
        // SAFETY: a valid set.
        unsafe { libc::CPU_COUNT(&self.0) as usize }
    }

    /// The CPUs that the calling thread may use.
    ///
    /// # Errors
    /// As sched_getaffinity(2).
    pub(crate) fn of_this_thread() -> io::Result<Cpus> {
        let mut cpus = Cpus::none();
        // SAFETY: 0 is the calling thread; the set is valid and of the given size.
        let result = unsafe { libc::sched_getaffinity(0, mem::size_of_val(&cpus.0), &mut cpus.0) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cpus) }
    }

    /// Restricts the calling thread to these CPUs.
    ///
    /// # Errors
    /// As sched_setaffinity(2).
    pub(crate) fn bind(&self) -> io::Result<()> {
        // SAFETY: 0 is the calling thread; the set is valid and of the given size.
        let result = unsafe { libc::sched_setaffinity(0, mem::size_of_val(&self.0), &self.0) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl fmt::Debug for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // SAFETY: the numbers are within the set.
        let within = |cpu: &usize| unsafe { libc::CPU_ISSET(*cpu, &self.0) };
        f.debug_set().entries((0..libc::CPU_SETSIZE as usize).filter(within)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_cpus_hold_what_fits() {
        let cpus = [Cpus::one(3), Cpus::one(usize::MAX), Cpus::one(3).without(&3)];
        assert_eq!(cpus.map(|cpus| cpus.is_empty()), [false, true, true]);
        assert_eq!(format!("{:?}", Cpus::one(70)), "{70}");
    }
}
