//! Plots as SVG text: scales, a frame with its grid, and the data in it. Colours come from the page's style sheet.

use std::fmt::Write as _;
use std::ops::Range;

/// Size of a plot in its own units; the page scales it.
pub(super) const WIDTH: f64 = 1000.0;
pub(super) const HEIGHT: f64 = 320.0;
/// The part for the data.
const INSIDE_X: Range<f64> = 64.0..970.0;
const INSIDE_Y: Range<f64> = 14.0..272.0;

/// Converts values to positions, and has the ticks of the axis.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    from: f64,
    to: f64,
    is_log: bool,
    pub(super) ticks: Vec<f64>,
}

impl Scale {
    /// From 0 to at least `max`, with about five round ticks.
    pub(super) fn linear(max: f64) -> Self {
        let max = if max > 0.0 { max } else { 1.0 };
        let rough = max / 4.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|factor| factor * power);
        let step = step.into_iter().find(|step| *step >= rough * 0.999).unwrap_or(10.0 * power);
        let steps = (max / step).ceil().max(1.0);
        let ticks = (0..=steps as u32).map(|number| f64::from(number) * step).collect();
        Self { from: 0.0, to: steps * step, is_log: false, ticks }
    }

    /// From 0 in steps of a power of two, for bytes.
    pub(super) fn bytes(max: f64) -> Self {
        let max = max.max(4096.0);
        let step = 2f64.powf((max / 5.0).log2().ceil());
        let steps = (max / step).ceil().max(1.0);
        let ticks = (0..=steps as u32).map(|number| f64::from(number) * step).collect();
        Self { from: 0.0, to: steps * step, is_log: false, ticks }
    }

    /// Logarithmic, over whole thirds of decades (1, 2, 5) around the range.
    pub(super) fn log(range: Range<f64>) -> Self {
        let lowest = if range.start > 0.0 { range.start } else { 1e-3 };
        let highest = range.end.max(lowest * 2.0);
        let decade = lowest.log10().floor() as i32;
        let thirds = (decade..decade + 12)
            .flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(decade)));
        let mut ticks: Vec<f64> = Vec::new();
        for third in thirds {
            if third <= lowest {
                ticks.clear();
            }
            ticks.push(third);
            if third >= highest {
                break;
            }
        }
        let (from, to) = (ticks[0], ticks[ticks.len() - 1]);
        Self { from, to, is_log: true, ticks }
    }

    /// 0 at the beginning of the scale, 1 at its end; values outside are moved to the edge.
    fn place(&self, value: f64) -> f64 {
        let place = match self.is_log {
            true => (value.max(self.from) / self.from).ln() / (self.to / self.from).ln(),
            false => (value - self.from) / (self.to - self.from),
        };
        place.clamp(0.0, 1.0)
    }
}

/// A plot that is being drawn.
pub(super) struct Plot {
    svg: String,
    x: Scale,
    y: Scale,
}

impl Plot {
    /// A frame with grid, ticks and the names of both axes. `title` is for screen readers.
    pub(super) fn new(
        title: &str,
        (x, x_name, x_tick): (Scale, &str, &dyn Fn(f64) -> String),
        (y, y_tick): (Scale, &dyn Fn(f64) -> String),
    ) -> Self {
        let mut plot = Self { svg: open(title, HEIGHT), x, y };
        let (left, right) = (INSIDE_X.start, INSIDE_X.end);
        for tick in plot.y.ticks.clone() {
            let y = plot.y_of(tick);
            plot.push(format_args!(
                "<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left - 8.0,
                y + 4.0,
                y_tick(tick)
            ));
        }
        let bottom = INSIDE_Y.end;
        for tick in plot.x.ticks.clone() {
            let x = plot.x_of(tick);
            plot.push(format_args!(
                "<line class=\"axis\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{bottom}\" y2=\"{:.1}\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                bottom + 5.0,
                bottom + 20.0,
                x_tick(tick)
            ));
        }
        plot.push(format_args!(
            "<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
             <text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            HEIGHT - 8.0,
            escape(x_name)
        ));
        plot
    }

    /// A curve through these points, with a dot at its end.
    pub(super) fn curve(&mut self, class: &str, name: &str, points: &[(f64, f64)]) {
        let mut path = String::new();
        let mut last = None;
        for &(x, y) in points {
            let at = (self.x_of(x), self.y_of(y));
            // Points at the same position only make the page longer.
            if last.is_none_or(|(x, y): (f64, f64)| (x - at.0).abs() + (y - at.1).abs() >= 0.5) {
                let verb = if last.is_none() { 'M' } else { 'L' };
                let _ = write!(path, "{verb}{:.1} {:.1}", at.0, at.1);
                last = Some(at);
            }
        }
        if let Some((x, y)) = points.last().map(|&(x, y)| (self.x_of(x), self.y_of(y))) {
            let name = escape(name);
            self.push(format_args!(
                "<g class=\"{class}\"><title>{name}</title><path class=\"curve stroke\" d=\"{path}\"/>\
                 <circle class=\"fill\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/></g>"
            ));
        }
    }

    /// A bar from the bottom up to `y`, over the given part of a range of `x`.
    pub(super) fn bar(
        &mut self,
        class: &str,
        name: &str,
        over: Range<f64>,
        part: Range<f64>,
        y: f64,
    ) {
        let (from, to) = (self.x_of(over.start), self.x_of(over.end));
        let (x, width) = (from + (to - from) * part.start, (to - from) * (part.end - part.start));
        let (y, name) = (self.y_of(y), escape(name));
        self.push(format_args!(
            "<rect class=\"{class} fill\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" \
             rx=\"1.5\"><title>{name}</title></rect>",
            INSIDE_Y.end - y
        ));
    }

    pub(super) fn finish(self) -> String {
        self.svg + "</svg>\n"
    }

    fn x_of(&self, value: f64) -> f64 {
        INSIDE_X.start + (INSIDE_X.end - INSIDE_X.start) * self.x.place(value)
    }

    fn y_of(&self, value: f64) -> f64 {
        INSIDE_Y.end - (INSIDE_Y.end - INSIDE_Y.start) * self.y.place(value)
    }

    fn push(&mut self, what: std::fmt::Arguments<'_>) {
        let _ = self.svg.write_fmt(what);
    }
}

/// A horizontal bar: its name, its parts, and the spread of the runs.
pub(super) struct Lying<'a> {
    pub(super) class: &'a str,
    pub(super) name: &'a str,
    /// Its end, and where its last part begins.
    pub(super) end: f64,
    pub(super) middle: f64,
    pub(super) spread: Range<f64>,
    pub(super) label: String,
}

/// Horizontal bars, from 0 on.
pub(super) fn lying(title: &str, bars: &[Lying<'_>], tick: &dyn Fn(f64) -> String) -> String {
    const ROW: f64 = 40.0;
    let inside = 84.0..830.0;
    let longest = bars.iter().map(|bar| bar.spread.end.max(bar.end)).fold(0.0, f64::max);
    let scale = Scale::linear(longest);
    let x_of = |value: f64| inside.start + (inside.end - inside.start) * scale.place(value);
    let bottom = ROW * bars.len() as f64 + 4.0;
    let mut svg = open(title, bottom + 26.0);
    for &value in &scale.ticks {
        let x = x_of(value);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{bottom:.1}\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            bottom + 18.0,
            tick(value)
        );
    }
    for (number, bar) in bars.iter().enumerate() {
        let (top, height) = (ROW * number as f64 + 9.0, ROW - 16.0);
        let (middle, end) = (x_of(bar.middle), x_of(bar.end));
        let (low, high, y) = (x_of(bar.spread.start), x_of(bar.spread.end), top + height / 2.0);
        let Lying { class, .. } = bar;
        let _ = write!(
            svg,
            "<text class=\"strong\" x=\"{:.1}\" y=\"{text:.1}\" text-anchor=\"end\">{}</text>\
             <g class=\"{class}\"><rect class=\"fill before\" x=\"{start}\" y=\"{top}\" width=\"{:.1}\" height=\"{height}\"/>\
             <rect class=\"fill\" x=\"{middle:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{height}\"/></g>\
             <line class=\"whisker\" x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{y}\" y2=\"{y}\"/>\
             <text x=\"{:.1}\" y=\"{text:.1}\">{}</text>",
            inside.start - 10.0,
            escape(bar.name),
            middle - inside.start,
            (end - middle).max(1.0),
            high.max(end) + 10.0,
            escape(&bar.label),
            text = y + 4.0,
            start = inside.start,
        );
    }
    svg + "</svg>\n"
}

fn open(title: &str, height: f64) -> String {
    let title = escape(title);
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" xmlns=\"http://www.w3.org/2000/svg\"><title>{title}</title>"
    )
}

/// Text escaped for HTML and SVG, also in quotes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // The name of a file may contain any character.
            control if control.is_control() => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_hold_their_values_and_have_round_ticks() {
        assert_eq!(Scale::linear(3.7).ticks, [0.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(Scale::linear(1000.0).ticks, [0.0, 250.0, 500.0, 750.0, 1000.0]);
        assert_eq!(Scale::linear(0.0).ticks.first(), Some(&0.0));
        assert_eq!(Scale::bytes((37 << 20) as f64).ticks.last(), Some(&((40 << 20) as f64)));
        assert_eq!(Scale::log(1.7..30.0).ticks, [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(Scale::log(0.0..0.0).ticks.len(), 2);
        let scale = Scale::log(1.0..100.0);
        assert!((scale.place(10.0) - 0.5).abs() < 1e-9);
        assert_eq!((scale.place(0.0), scale.place(1e9)), (0.0, 1.0));
    }

    #[test]
    fn text_cannot_break_out() {
        assert_eq!(escape("a<b>\"c\"&'d'\n"), "a&lt;b&gt;&quot;c&quot;&amp;&#39;d&#39;\u{fffd}");
    }
}
