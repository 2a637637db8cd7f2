//! A progress bar for what takes longer than a moment, on a terminal only.

use std::ops::ControlFlow;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use snapfmt::Progress;

use crate::interrupt::Interrupt;

/// A bar on stderr; hidden when stderr is no terminal, when asked to be quiet, and in the first
/// moments of what may soon be over.
pub(crate) struct Bar {
    bar: ProgressBar,
    interrupt: Interrupt,
}

impl Bar {
    pub(crate) fn new(what: &'static str, quiet: bool, interrupt: &Interrupt) -> Self {
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
        Self { bar, interrupt: interrupt.clone() }
    }

    /// Whether anybody sees it.
    pub(crate) fn is_shown(&self) -> bool {
        !self.bar.is_hidden()
    }

    /// Shows how far it is; cancels when the user has interrupted.
    pub(crate) fn update(&self, progress: Progress) -> ControlFlow<()> {
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

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
