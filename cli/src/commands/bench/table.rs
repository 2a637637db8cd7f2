//! The figures as a table for the terminal: a column a mode.

use std::fmt::Write as _;

use super::figures::{FIGURES, Measured, Ratios};
use super::mode::Mode;

const LABEL_WIDTH: usize = 32;
const COLUMN_WIDTH: usize = 13;

/// The rows of ratios: figure, label, and the mode that the others are compared with.
pub(super) const RATIOS: [(&str, &str, Mode); 7] = [
    ("done_ms", "done, x of mmap", Mode::Mmap),
    ("done_ms", "done, x of lazy", Mode::Lazy),
    ("done_ms", "done, x of lazy-off", Mode::LazyOff),
    ("done_ms", "done, x of eager", Mode::Eager),
    ("run_ms", "run, x of eager", Mode::Eager),
    ("first_instruction_ms", "first instruction, x of lazy", Mode::Lazy),
    ("served_faults", "faults served, x of lazy", Mode::Lazy),
];

pub(super) fn table(all: &[Measured], ratios: &Ratios) -> String {
    let mut text = String::new();
    let mut row = |label: &str, cells: &mut dyn Iterator<Item = String>| {
        let _ = write!(text, "{label:<LABEL_WIDTH$}");
        cells.for_each(|cell| {
            let _ = write!(text, " {cell:>COLUMN_WIDTH$}");
        });
        text.push('\n');
    };
    row("", &mut all.iter().map(|measured| measured.mode.to_string()));
    for figure in FIGURES {
        let medians: Vec<_> = all.iter().map(|measured| measured.median(figure)).collect();
        // A figure that no mode has is left out.
        if medians.iter().any(Option::is_some) {
            let show = |value: Option<f64>| value.map_or("-".into(), |v| figure.unit.show(v));
            row(figure.label, &mut medians.into_iter().map(show));
        }
    }
    for (key, label, base) in RATIOS {
        if all.len() > 1 && all.iter().any(|measured| measured.mode == base) {
            let show = |measured: &Measured| match ratios.get(key, measured.mode, base) {
                _ if measured.mode == base => "1".into(),
                Some(ratio) => format!("{ratio:.2} x"),
                None => "-".into(),
            };
            row(label, &mut all.iter().map(show));
        }
    }
    text
}
