//! Numbered tasks that several threads do. One thread at a time takes their results in order, and the number
//! of results that are not taken yet is bounded. So all cores work, and the output does not depend on the
//! number of threads.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Results that are not taken yet, for each thread: enough that a slow task does not delay the others.
const WINDOW_PER_THREAD: usize = 3;
/// Most threads for each CPU. More threads would wait for each other and use memory.
const THREADS_PER_CPU: usize = 4;

struct State<T, E> {
    next_task: usize,
    next_result: usize,
    /// Results that wait for an earlier one.
    waiting: BTreeMap<usize, T>,
    /// Results that the sink has taken. Their buffers are reused.
    spare: Vec<T>,
    /// Whether a thread is at the sink.
    sinking: bool,
    error: Option<E>,
    /// Whether a thread has panicked. The others then stop, and the scope propagates the panic.
    panicked: bool,
}

impl<T, E> State<T, E> {
    fn new() -> Self {
        Self {
            next_task: 0,
            next_result: 0,
            waiting: BTreeMap::new(),
            spare: Vec::new(),
            sinking: false,
            error: None,
            panicked: false,
        }
    }

    fn stopped(&self) -> bool {
        self.error.is_some() || self.panicked
    }
}

/// Does tasks `0..tasks`: `work(context, task, result)` on any thread fills a result, and `sink`
/// gets the results in order, one at a time. `context` creates the working data of one thread.
/// After an error no further task is begun; the first error is returned. If the system refuses a thread, fewer
/// threads do the work.
pub(crate) fn run<C, T: Default + Send, E: Send>(
    tasks: usize,
    threads: NonZeroUsize,
    context: impl Fn() -> Result<C, E> + Sync,
    work: impl Fn(&mut C, usize, &mut T) -> Result<(), E> + Sync,
    sink: impl FnMut(&mut T) -> Result<(), E> + Send,
) -> Result<(), E> {
    let cpus = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = threads.get().min(tasks.max(1)).min(cpus * THREADS_PER_CPU);
    let window = threads * WINDOW_PER_THREAD;
    let sink = Mutex::new(sink);
    let changed = Condvar::new();
    let state = Mutex::new(State::new());

    let worker = || -> Result<(), E> {
        let mut context = context()?;
        let mut guard = lock(&state);
        loop {
            let full = |state: &mut State<T, E>| {
                !state.stopped() && (state.next_result + window..tasks).contains(&state.next_task)
            };
            guard = changed.wait_while(guard, full).unwrap_or_else(PoisonError::into_inner);
            if guard.stopped() || guard.next_task >= tasks {
                return Ok(());
            }
            let task = guard.next_task;
            guard.next_task += 1;
            let mut result = guard.spare.pop().unwrap_or_default();
            drop(guard);
            work(&mut context, task, &mut result)?;
            guard = lock(&state);
            guard.waiting.insert(task, result);
            if guard.sinking {
                // That thread will take this result too.
                continue;
            }
            guard.sinking = true;
            while let Some(mut result) = {
                let next = guard.next_result;
                guard.waiting.remove(&next)
            } {
                drop(guard);
                let sunk = lock(&sink)(&mut result);
                guard = lock(&state);
                sunk?;
                guard.next_result += 1;
                guard.spare.push(result);
                changed.notify_all();
            }
            guard.sinking = false;
        }
    };
    let guarded = || {
        let _bell = OnPanic(|| {
            lock(&state).panicked = true;
            changed.notify_all();
        });
        if let Err(error) = worker() {
            lock(&state).error.get_or_insert(error);
            changed.notify_all();
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // The other threads do the work.
            let _ = std::thread::Builder::new().spawn_scoped(scope, guarded);
        }
        guarded();
    });
    match state.into_inner().unwrap_or_else(PoisonError::into_inner).error {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Runs its function if it is dropped by a panic.
struct OnPanic<F: Fn()>(F);

impl<F: Fn()> Drop for OnPanic<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.0)();
        }
    }
}

/// Locks; a panic of another thread is passed on by the scope, not by the lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threads(count: usize) -> NonZeroUsize {
        NonZeroUsize::new(count).unwrap()
    }

    #[test]
    fn results_come_in_order_and_few_are_pending() {
        for count in 1..6 {
            let mut seen = Vec::new();
            let live = std::sync::atomic::AtomicUsize::new(0);
            run(
                500,
                threads(count),
                || Ok::<_, ()>(()),
                |(), task, result: &mut usize| {
                    use std::sync::atomic::Ordering::SeqCst;
                    assert!(live.fetch_add(1, SeqCst) < count * (WINDOW_PER_THREAD + 1));
                    if task % 7 == 0 {
                        std::thread::yield_now();
                    }
                    *result = task;
                    Ok(())
                },
                |result| {
                    live.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    seen.push(*result);
                    Ok(())
                },
            )
            .unwrap();
            assert_eq!(seen, (0..500).collect::<Vec<_>>());
        }
    }

    #[test]
    #[should_panic(expected = "scoped thread panicked")]
    fn a_panic_is_propagated_and_no_thread_waits_forever() {
        let first = std::sync::atomic::AtomicBool::new(true);
        let _ = run(
            1000,
            threads(4),
            || Ok::<_, ()>(()),
            |(), task, _: &mut usize| {
                // Not on the calling thread, whose own message would come instead.
                let main = std::thread::current().name().is_some();
                while main && first.load(std::sync::atomic::Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                first.store(false, std::sync::atomic::Ordering::SeqCst);
                assert!(main || task > 900, "task {task}");
                Ok(())
            },
            |_| Ok(()),
        );
    }

    #[test]
    fn an_error_of_either_side_stops_all() {
        let late = |_: &mut usize| Ok(());
        let failed = run(
            1000,
            threads(4),
            || Ok(()),
            |(), task, _: &mut usize| if task == 17 { Err("work") } else { Ok(()) },
            late,
        );
        assert_eq!(failed, Err("work"));
        let failed = run(
            1000,
            threads(4),
            || Ok(()),
            |(), task, result: &mut usize| {
                *result = task;
                Ok(())
            },
            |result| if *result == 17 { Err("sink") } else { Ok(()) },
        );
        assert_eq!(failed, Err("sink"));
        let failed =
            run(3, threads(2), || Err::<(), _>("context"), |(), _, _: &mut usize| Ok(()), late);
        assert_eq!(failed, Err("context"));
    }
}
