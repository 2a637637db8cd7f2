//! The progress of `snap bench`.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::args::Args;

/// The present step, on stderr.
pub(super) struct Steps(ProgressBar);

impl Steps {
    pub(super) fn new(args: &Args, quiet: bool) -> Self {
        let target = match quiet {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr_with_hz(10),
        };
        let guests = args.sweep.len().max(1) as u64;
        let runs = guests * args.modes.len() as u64 * (u64::from(args.runs) + 1);
        let bar = ProgressBar::with_draw_target(Some(runs), target);
        // A constant; if it were wrong, the bar would look plain.
        if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {pos}/{len} {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(bar)
    }

    pub(super) fn say(&self, what: &str) {
        self.0.set_message(what.to_owned());
        self.0.tick();
    }

    /// Ends the step before.
    pub(super) fn next(&self, what: &str) {
        self.0.set_message(what.to_owned());
        self.0.inc(1);
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
