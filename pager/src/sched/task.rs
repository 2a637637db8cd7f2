//! What the scheduler knows about a thread: its CPU and state, from `/proc`, and its policy.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The id of the calling thread.
pub(crate) fn own_id() -> libc::pid_t {
    // SAFETY: takes nothing and has no effect.
    unsafe { libc::gettid() }
}

/// The `stat` file of a thread of any process, which can be read many times. `None` if the thread has ended.
pub(crate) fn open(thread: impl Into<i64>) -> Option<File> {
    let thread = thread.into();
    // One of this process, first: a jail may leave it only its own folder.
    let own = File::open(format!("/proc/self/task/{thread}/stat"));
    own.or_else(|_| File::open(format!("/proc/{thread}/stat"))).ok()
}

/// The CPU on which the thread runs, or ran last: field 39.
pub(crate) fn last_cpu(stat: &File) -> Option<usize> {
    with_field(stat, 39, |field| std::str::from_utf8(field).ok()?.trim().parse().ok())
}

/// Whether the thread runs, or waits for a CPU and nothing else: field 3.
pub(crate) fn runs(stat: &File) -> Option<bool> {
    with_field(stat, 3, |field| Some(field == b"R"))
}

fn with_field<T>(stat: &File, number: usize, parse: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
    let mut text = [0; 1024];
    let len = stat.read_at(&mut text, 0).ok()?;
    parse(field(&text[..len], number)?)
}

/// A field of `/proc/<pid>/stat` by its number in proc_pid_stat(5). The second, a name in parentheses, may hold
/// anything.
fn field(stat: &[u8], number: usize) -> Option<&[u8]> {
    let after_name = stat.iter().rposition(|&byte| byte == b')')? + 2;
    stat.get(after_name..)?.split(|&byte| byte == b' ').nth(number.checked_sub(3)?)
}

/// The scheduling policy of a thread of this process (0: the calling thread).
pub(crate) fn policy(thread: libc::pid_t) -> Option<i32> {
    // SAFETY: takes a number.
    let policy = unsafe { libc::sched_getscheduler(thread) };
    (policy >= 0).then_some(policy)
}

/// Sets the policy of a thread of this process (0: the calling thread).
///
/// # Errors
/// As sched_setscheduler(2).
pub(crate) fn set_policy(thread: libc::pid_t, policy: i32) -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: takes a number and a valid structure, and affects only when one thread runs.
    let result = unsafe { libc::sched_setscheduler(thread, policy, &param) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_whatever_the_name_is() {
        let fields: Vec<String> = (4..=52).map(|field| field.to_string()).collect();
        let stat = format!("7 (a) b) c) S {}\n", fields.join(" "));
        assert_eq!(field(stat.as_bytes(), 3), Some(&b"S"[..]));
        assert_eq!(field(stat.as_bytes(), 39), Some(&b"39"[..]));
        assert_eq!(field(b"7 (a", 3), None);
        assert_eq!(field(b"7 (a) S 1 2 3", 39), None);
    }

    #[test]
    fn running_and_waiting_threads_are_distinguished() {
        let own = open(own_id()).expect("there is /proc");
        assert_eq!(runs(&own), Some(true));
        let (id, ids) = std::sync::mpsc::channel();
        let (end, ends) = std::sync::mpsc::channel::<()>();
        let waiting = std::thread::spawn(move || {
            id.send(own_id()).expect("the receiver exists");
            ends.recv()
        });
        let other = open(ids.recv().expect("it comes")).expect("there is /proc");
        while runs(&other) == Some(true) {
            std::thread::yield_now();
        }
        assert_eq!(runs(&other), Some(false));
        drop(end);
        assert!(waiting.join().expect("it does not panic").is_err());
    }
}
