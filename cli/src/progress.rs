//! A progress bar for work that takes longer than a moment, only on a terminal.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use snapfmt::Progress;

use crate::interrupt::Interrupt;
use crate::size;
use crate::waits::{Wait, Waiting};

/// A bar on stderr. It is hidden if stderr is not a terminal, with --quiet, and in the first moments of the work.
pub(crate) struct Bar {
    bar: ProgressBar,
    interrupt: Interrupt,
    /// `None` if another process does the work.
    steps: Option<Steps>,
}

impl Bar {
    pub(crate) fn new(what: &'static str, quiet: bool, interrupt: &Interrupt) -> Self {
        let mut bar = Self::of_other(what, quiet, interrupt);
        bar.steps = Some(Steps::begin(what));
        bar
    }

    /// For work that also waits for a server.
    #[cfg(feature = "objects")]
    pub(crate) fn of_transfer(what: &'static str, quiet: bool, interrupt: &Interrupt) -> Self {
        let mut bar = Self::of_other(what, quiet, interrupt);
        bar.steps = Some(Steps::begin_on("the server, the disk or the CPU", what));
        bar
    }

    /// For work that another process does.
    pub(crate) fn of_other(what: &'static str, quiet: bool, interrupt: &Interrupt) -> Self {
        let target = match quiet {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr_with_hz(10),
        };
        let bar = ProgressBar::with_draw_target(None, target);
        let template = "{prefix:10} [{bar:40}] {bytes:>10}/{total_bytes} {bytes_per_sec} {eta}";
        // The template is a constant, checked by the test below; without it the bar looks plain.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what);
        Self { bar, interrupt: interrupt.clone(), steps: None }
    }

    /// Whether it is visible.
    pub(crate) fn is_shown(&self) -> bool {
        !self.bar.is_hidden()
    }

    /// Shows the progress; cancels when the user has interrupted.
    pub(crate) fn update(&self, progress: Progress) -> ControlFlow<()> {
        self.steps.iter().for_each(|steps| steps.moved(progress));
        if self.bar.elapsed() > Duration::from_millis(300) {
            self.bar.set_length(progress.total_bytes);
            self.bar.set_position(progress.done_bytes);
        }
        match self.interrupt.requested() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// Waits for each next step of long work, which a slow disk may delay.
pub(crate) struct Steps {
    waiting: Waiting,
    at: Arc<Mutex<Progress>>,
}

impl Steps {
    /// The work `what` starts now, for example "storing".
    pub(crate) fn begin(what: &'static str) -> Self {
        Self::begin_on("the disk or the CPU", what)
    }

    fn begin_on(resource: &'static str, what: &'static str) -> Self {
        let at = Arc::new(Mutex::new(Progress::new(0, 0)));
        let shared = Arc::clone(&at);
        let wait = Wait::new(move || {
            let Progress { done_bytes, total_bytes, .. } =
                *shared.lock().unwrap_or_else(PoisonError::into_inner);
            let (done, total) = (size::human(done_bytes), size::human(total_bytes));
            format!("{resource}: {what} is at {done} of {total}")
        });
        // The interrupt is checked after `moved`.
        Self { waiting: wait.hears().begin(), at }
    }

    /// A step is done, unless the progress is that of the last call: then the work only checks for an interrupt.
    pub(crate) fn moved(&self, progress: Progress) {
        let last = {
            let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *at, progress)
        };
        if last.done_bytes != progress.done_bytes {
            self.waiting.moved();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
