//! Keeps background threads off the CPUs of demand threads.

use std::sync::atomic::Ordering;

use crate::pager_state::PagerState;
use crate::sched::cpus::{Cpus, NOWHERE};

/// Keeps a background thread off the CPUs of demand threads, as long as it may use others.
#[derive(Debug, Default)]
pub(crate) struct AvoidDemandCpus {
    allowed: Option<Cpus>,
    avoided: Vec<usize>,
}

impl AvoidDemandCpus {
    /// Called by the thread before it works.
    pub(crate) fn begin(&mut self) {
        self.allowed = Cpus::of_this_thread().ok();
    }

    /// The same. Until the first step the thread also avoids `cpu`, if it may use others.
    pub(crate) fn begin_off(&mut self, cpu: usize) {
        self.begin();
        let rest = self.allowed.map(|allowed| allowed.without(&cpu));
        if let Some(rest) = rest.filter(|rest| !rest.is_empty()) {
            // A failure costs only speed.
            let _ = rest.bind();
            self.avoided = vec![cpu];
        }
    }

    /// Called by the thread now and then: follows the changes of the demand threads.
    pub(crate) fn step(&mut self, shared: &PagerState) {
        let Some(allowed) = &self.allowed else { return };
        let bound = || {
            let bound = shared.slices.iter().map(|slice| slice.bound_to.load(Ordering::Relaxed));
            bound.filter(|&cpu| cpu != NOWHERE)
        };
        if bound().eq(self.avoided.iter().copied()) {
            return;
        }
        self.avoided.clear();
        self.avoided.extend(bound());
        let rest = self.avoided.iter().fold(*allowed, Cpus::without);
        // A failure costs only speed.
        let _ = if rest.is_empty() { allowed.bind() } else { rest.bind() };
    }
}
