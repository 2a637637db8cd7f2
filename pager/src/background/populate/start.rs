//! Starts the loaders.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use super::loader::Loader;
use super::population::Population;
use super::progress::lock;
use crate::mapping::Mapping;
use crate::pager_state::PagerState;
use crate::threads;

/// Called by a demand thread: threads wait so much that loading ahead has to start.
pub(crate) fn on_demand(shared: &Arc<PagerState>) {
    match &shared.population.options.elsewhere {
        Some(elsewhere) => elsewhere.begin(),
        // Without threads for that, only faults load pages.
        None => drop(loaders(shared)),
    }
}

/// Lets the loaders work. The first call starts their threads; that is not done when the pager starts, to save time.
///
/// # Errors
/// As pthread_create(3), if there are no loaders yet and none can be started.
pub(crate) fn loaders(shared: &Arc<PagerState>) -> std::io::Result<()> {
    let progress = &shared.population;
    let mut threads = lock(&progress.threads);
    // While the lock of the threads is held, so that none is started after `Progress::stop`.
    if progress.state().has_ended() || shared.stopping.load(Ordering::SeqCst) {
        return Ok(());
    }
    progress.lock().population = Population::Running;
    progress.active.store(true, Ordering::Relaxed);
    if !threads.is_empty() {
        threads.iter().for_each(|loader| loader.thread().unpark());
        return Ok(());
    }
    for index in 0..progress.loaders + progress.spare_loaders {
        let loader = Loader::new(Arc::clone(shared), index >= progress.loaders);
        match spawn(format!("populate{index}"), index + 1, move || loader.run()) {
            Ok(thread) => threads.push(thread),
            Err(error) if threads.is_empty() => {
                progress.lock().population = Population::Off;
                progress.active.store(false, Ordering::Relaxed);
                return Err(error);
            }
            // Fewer loaders are enough.
            Err(_) => progress.lock().left -= 1,
        }
    }
    Ok(())
}

/// The address space that a loader needs: its stack, memory of the allocator, a part of the file, and its decoded
/// pages.
const LOADER_BYTES: usize = 16 << 20;

/// Starts a thread that loads ahead, if there is address space for this `number` of them (RLIMIT_AS): those that have
/// been started have not used theirs yet. Without this check, an allocation that fails later would end the process.
///
/// # Errors
/// As pthread_create(3), and [`std::io::ErrorKind::OutOfMemory`].
pub(crate) fn spawn(
    name: String,
    number: usize,
    body: impl FnOnce() + Send + 'static,
) -> std::io::Result<thread::JoinHandle<()>> {
    // A mapping, and no allocation: the allocator would keep the address space.
    drop(Mapping::anonymous(LOADER_BYTES * number).map_err(|_| std::io::ErrorKind::OutOfMemory)?);
    threads::spawn(name, body)
}
