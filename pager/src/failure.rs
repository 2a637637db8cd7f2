//! What happens if a page cannot be loaded: it never becomes zeros, and no thread waits forever.
#![allow(unsafe_code)]

use std::fmt;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use crate::causes::with_causes;
use crate::source::error::SourceError;
use crate::uffd::Errno;

/// What the pager does with a page that it cannot load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailurePolicy {
    /// Poison that page (`UFFDIO_POISON`, Linux 6.6): a thread that touches it gets SIGBUS, a system call `EFAULT`. The
    /// service of other pages continues. The callback can stop the guest.
    #[default]
    Poison,
    /// Write the failure to stderr and kill this process with SIGKILL, immediately. For memory of another process: call
    /// the callback, then kill that process.
    Kill,
}

/// The first failure of a pager.
#[derive(Debug, thiserror::Error)]
#[error("{}", Self::headline(.source_offset, .host_addr, .thread))]
pub struct Failure {
    /// The offset of the page in the source in bytes, if the failure affects one page.
    pub source_offset: Option<u64>,
    /// The address of the page in memory, if the failure affects one page.
    pub host_addr: Option<u64>,
    /// The number of the demand thread: 0 for `pager0`.
    pub thread: usize,
    /// The cause.
    #[source]
    pub cause: FailureCause,
}

/// Why a page could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FailureCause {
    /// The source has failed, after all retries.
    #[error("the source failed")]
    Source(#[source] SourceError),
    /// The source has returned something that the pager cannot use.
    #[error("the source's answer is unusable: {0}")]
    Answer(&'static str),
    /// The kernel refused to install the page.
    #[error("{ioctl} at {host_addr:#x}")]
    Install {
        /// The ioctl.
        ioctl: &'static str,
        /// The address.
        host_addr: u64,
        /// The error of the ioctl.
        #[source]
        errno: Errno,
    },
    /// The messages of the userfaultfd cannot be read any more.
    #[error("reading the messages of the userfaultfd")]
    Messages(#[source] io::Error),
    /// Paged memory was moved by `mremap`, or an unknown event arrived.
    #[error("an event that cannot be served: {0}")]
    Event(String),
    /// The demand thread has panicked.
    #[error("the pager's thread panicked: {0}")]
    Panic(String),
}

impl Failure {
    fn headline(source_offset: &Option<u64>, host_addr: &Option<u64>, thread: &usize) -> String {
        match (source_offset, host_addr) {
            (Some(offset), Some(addr)) => {
                format!(
                    "pager{thread} cannot load the page at source offset {offset:#x} (host address {addr:#x})"
                )
            }
            _ => format!("pager{thread} cannot continue"),
        }
    }
}

/// Called with the first failure.
pub(crate) type OnFailure = Box<dyn Fn(&Failure) + Send + Sync>;

/// Receives failures from all threads, and keeps the first.
pub(crate) struct FailureReport {
    policy: FailurePolicy,
    /// A pidfd of the process that owns the memory, if that is another process.
    foreign: Option<OwnedFd>,
    on_failure: Option<OnFailure>,
    first: OnceLock<Failure>,
}

impl FailureReport {
    pub(crate) fn new(
        policy: FailurePolicy,
        foreign: Option<OwnedFd>,
        on_failure: Option<OnFailure>,
    ) -> FailureReport {
        FailureReport { policy, foreign, on_failure, first: OnceLock::new() }
    }

    pub(crate) fn first(&self) -> Option<&Failure> {
        self.first.get()
    }

    /// Reports the failure, if it is the first. With [`FailurePolicy::Kill`] and memory of this process, this does not
    /// return.
    pub(crate) fn report(&self, failure: Failure) {
        if self.policy == FailurePolicy::Kill && self.foreign.is_none() {
            kill_this_process(&failure);
        }
        // These failures leave faults unanswered: another process would wait forever.
        let fatal = matches!(failure.cause, FailureCause::Messages(_) | FailureCause::Event(_));
        self.report_first(failure);
        if self.policy == FailurePolicy::Kill || fatal {
            self.kill_foreign();
        }
    }

    /// A page could not even be poisoned: threads of another process would wait forever.
    pub(crate) fn unpoisonable(&self) {
        self.kill_foreign();
    }

    fn kill_foreign(&self) {
        if let Some(process) = &self.foreign {
            // SAFETY: pidfd_send_signal(2) takes a descriptor, a number, no siginfo and no flags. It fails for a
            // process that has ended, which is no problem.
            unsafe {
                libc::syscall(
                    libc::SYS_pidfd_send_signal,
                    process.as_raw_fd(),
                    libc::SIGKILL,
                    std::ptr::null::<libc::siginfo_t>(),
                    0,
                )
            };
        }
    }

    fn report_first(&self, failure: Failure) {
        let mut failure = Some(failure);
        let first = self.first.get_or_init(|| failure.take().expect("taken only here"));
        if failure.is_none()
            && let Some(on_failure) = &self.on_failure
        {
            // The callback belongs to the caller. Its panic must not end this thread, whose answers others wait for.
            let _ = catch_unwind(AssertUnwindSafe(|| on_failure(first)));
        }
    }
}

impl fmt::Debug for FailureReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailureReport")
            .field("policy", &self.policy)
            .field("first", &self.first)
            .finish_non_exhaustive()
    }
}

fn kill_this_process(failure: &Failure) -> ! {
    let words =
        format!("fatal: {}; killing process {}\n", with_causes(failure), std::process::id());
    // Not `eprintln!`: it panics if stderr is closed, and then the process would not be killed.
    let _ = io::stderr().write_all(words.as_bytes());
    // SAFETY: getpid(2) takes nothing.
    let own_id = unsafe { libc::getpid() };
    // SAFETY: kill(2) takes plain numbers.
    unsafe { libc::kill(own_id, libc::SIGKILL) };
    // A signal to the own process is delivered before kill(2) returns, except for the init process of a namespace: its
    // own SIGKILL does not end it.
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn failure(offset: u64) -> Failure {
        let cause = SourceError::permanent("chunk 3: wrong checksum")
            .caused_by(io::Error::from_raw_os_error(libc::EIO));
        Failure {
            source_offset: Some(offset),
            host_addr: Some(0x7000),
            thread: 1,
            cause: FailureCause::Source(cause),
        }
    }

    #[test]
    fn the_callback_is_called_once_and_the_first_failure_is_kept() {
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&calls);
        let on_failure: OnFailure = Box::new(move |failure| {
            assert_eq!(failure.source_offset, Some(0x1000));
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let report = FailureReport::new(FailurePolicy::Poison, None, Some(on_failure));
        report.report(failure(0x1000));
        report.report(failure(0x2000));
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        assert_eq!(report.first().and_then(|first| first.source_offset), Some(0x1000));
    }

    #[test]
    fn the_text_with_causes_says_each_thing_once() {
        let text = with_causes(&failure(0x1000));
        assert_eq!(
            text,
            "pager1 cannot load the page at source offset 0x1000 (host address 0x7000): the source \
             failed: chunk 3: wrong checksum: Input/output error (os error 5)"
        );
    }
}
