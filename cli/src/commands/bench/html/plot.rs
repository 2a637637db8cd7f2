//! Plots as inline SVG, drawn by plotters.
//!
//! Plotters writes colours into the elements. These are the ones of the light theme; the page's style sheet has a rule for
//! each, which wins over the element and knows the dark theme.

use std::ops::Range;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{BoldPoints, DefaultFormatting, KeyPointHint, Ranged};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::commands::bench::mode::Mode;

/// Size of a plot in its own units; the page scales it.
const WIDTH: u32 = 1000;
const HEIGHT: u32 = 320;
const ROW: u32 = 40;
const FONT: (&str, u32) = ("sans-serif", 15);

const INK: RGBColor = RGBColor(0x1d, 0x21, 0x26);
const SOFT: RGBColor = RGBColor(0x5d, 0x66, 0x70);
const LINE: RGBColor = RGBColor(0xe3, 0xe5, 0xe8);
const EDGE: RGBColor = RGBColor(0xd5, 0xd8, 0xdc);

fn colour(mode: Mode) -> RGBColor {
    match mode {
        Mode::Eager => RGBColor(0x5b, 0x7f, 0xb5),
        Mode::Mmap => RGBColor(0xd9, 0x82, 0x2b),
        Mode::Lazy => RGBColor(0xc2, 0x48, 0x5b),
        Mode::LazyOff => RGBColor(0x7d, 0x87, 0x90),
        Mode::LazyHot => RGBColor(0x1f, 0x9a, 0x70),
        Mode::LazyOther => RGBColor(0x8a, 0x7a, 0x55),
        Mode::Shared => RGBColor(0x85, 0x65, 0xb8),
    }
}

/// An axis: its values, how they are written, and what they are.
pub(super) struct Axis<'a> {
    pub(super) scale: Scale,
    pub(super) tick: &'a dyn Fn(f64) -> String,
    pub(super) name: &'a str,
}

/// From values to places. The ticks are the values that are written on the axis.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    range: Range<f64>,
    is_log: bool,
    ticks: Vec<f64>,
}

impl Scale {
    /// From 0 to at least `max`.
    pub(super) fn linear(max: f64) -> Self {
        let range = 0.0..if max > 0.0 { max * 1.02 } else { 1.0 };
        let ticks = RangedCoordf64::from(range.clone()).key_points(BoldPoints(6));
        Self { range, is_log: false, ticks }
    }

    /// From 0 in steps of a power of two, for bytes.
    pub(super) fn bytes(max: f64) -> Self {
        let max = max.max(4096.0);
        let step = 2f64.powf((max / 5.0).log2().ceil());
        let steps = (max / step).ceil().max(1.0);
        let ticks = (0..=steps as u32).map(|number| f64::from(number) * step).collect();
        Self { range: 0.0..steps * step, is_log: false, ticks }
    }

    /// Logarithmic, with ticks at 1, 2 and 5.
    pub(super) fn log(range: Range<f64>) -> Self {
        let start = if range.start > 0.0 { range.start } else { 1e-3 };
        let range = start..range.end.max(start * 2.0);
        let decades = range.start.log10().floor() as i32..=range.end.log10().floor() as i32;
        let ticks = decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|to| to * 10f64.powi(decade)));
        Self { ticks: ticks.filter(|tick| range.contains(tick)).collect(), range, is_log: true }
    }
}

impl Ranged for Scale {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    /// What lies outside is moved to the edge.
    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let of = |value: f64| if self.is_log { value.ln() } else { value };
        let Range { start, end } = self.range;
        RangedCoordf64::from(of(start)..of(end)).map(&of(value.clamp(start, end)), limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// What is drawn for a mode.
pub(super) enum Shape {
    /// A line with a dot at its end.
    Curve(Vec<(f64, f64)>),
    /// Bars from the bottom up.
    Bars(Vec<(Range<f64>, f64)>),
}

pub(super) fn plot(x: Axis<'_>, y: Axis<'_>, shapes: &[(Mode, Shape)]) -> Result<String> {
    svg(HEIGHT, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_top(12)
            .margin_right(30)
            .set_label_area_size(LabelAreaPosition::Left, 64)
            .set_label_area_size(LabelAreaPosition::Bottom, 48)
            .build_cartesian_2d(x.scale, y.scale)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(LINE)
            .axis_style(EDGE)
            .y_labels(6)
            .x_label_formatter(&|value| (x.tick)(*value))
            .y_label_formatter(&|value| (y.tick)(*value))
            .label_style(FONT.into_font().color(&SOFT))
            .x_desc(x.name)
            .y_desc(y.name)
            .draw()?;
        for (mode, shape) in shapes {
            let colour = colour(*mode);
            match shape {
                Shape::Curve(points) => {
                    chart.draw_series(LineSeries::new(
                        points.iter().copied(),
                        colour.stroke_width(2),
                    ))?;
                    let end = points.last().map(|&end| Circle::new(end, 4, colour.filled()));
                    chart.draw_series(end)?;
                }
                Shape::Bars(bars) => {
                    chart.draw_series(bars.iter().map(|(over, height)| {
                        let corners = [(over.start, 0.0), (over.end, *height)];
                        Rectangle::new(corners, colour.filled())
                    }))?;
                }
            }
        }
        Ok(())
    })
}

/// A bar that lies on its side: its parts, and how far the runs were apart.
pub(super) struct Lying {
    pub(super) mode: Mode,
    /// Its end, and where its last part begins.
    pub(super) end: f64,
    pub(super) middle: f64,
    pub(super) spread: Range<f64>,
    pub(super) label: String,
}

/// Bars that lie on their side, from 0 on, the first on top.
pub(super) fn lying(bars: &[Lying], tick: &dyn Fn(f64) -> String) -> Result<String> {
    let longest = bars.iter().map(|bar| bar.spread.end.max(bar.end)).fold(0.0, f64::max);
    let rows = bars.len();
    svg(ROW * rows as u32 + 34, |area| {
        let ticks = (0..rows).map(|row| row as f64 + 0.5).collect();
        let y = Scale { range: 0.0..rows as f64, is_log: false, ticks };
        let name = |centre: &f64| {
            let bar = rows.checked_sub(1 + *centre as usize).and_then(|row| bars.get(row));
            bar.map_or(String::new(), |bar| bar.mode.name().to_owned())
        };
        let mut chart = ChartBuilder::on(area)
            .margin_right(170)
            .set_label_area_size(LabelAreaPosition::Left, 92)
            .set_label_area_size(LabelAreaPosition::Bottom, 30)
            .build_cartesian_2d(Scale::linear(longest), y)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(LINE)
            .axis_style(EDGE)
            .x_label_formatter(&|value| tick(*value))
            .y_label_formatter(&name)
            .label_style(FONT.into_font().color(&SOFT))
            .draw()?;
        for (bar, row) in bars.iter().zip((0..rows).rev()) {
            let (colour, row) = (colour(bar.mode), row as f64);
            let (low, centre, high) = (row + 0.2, row + 0.5, row + 0.8);
            let part = |from, to, style| Rectangle::new([(from, low), (to, high)], style);
            let parts = [
                part(0.0, bar.middle, colour.mix(0.4).filled()),
                part(bar.middle, bar.end, colour.filled()),
            ];
            chart.draw_series(parts)?;
            let spread = vec![(bar.spread.start, centre), (bar.spread.end, centre)];
            chart.draw_series([PathElement::new(spread, INK.mix(0.65))])?;
            let style = FONT.into_font().color(&SOFT).pos(Pos::new(HPos::Left, VPos::Center));
            let at = (bar.spread.end.max(bar.end), centre);
            let label = EmptyElement::at(at) + Text::new(bar.label.clone(), (10, 0), style);
            chart.draw_series([label])?;
        }
        Ok(())
    })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn svg(height: u32, draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    draw(&area)?;
    area.present()?;
    drop(area);
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn scales_hold_their_values_and_have_round_ticks() {
        assert_eq!(Scale::linear(3.7).ticks, [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(Scale::linear(0.0).ticks.first(), Some(&0.0));
        assert_eq!(Scale::bytes((37 << 20) as f64).ticks.last(), Some(&((40 << 20) as f64)));
        assert_eq!(Scale::log(1.7..30.0).ticks, [2.0, 5.0, 10.0, 20.0]);
        let scale = Scale::log(1.0..100.0);
        let places = [0.0, 10.0, 1e9].map(|value| scale.map(&value, (0, 1000)));
        assert_eq!(places, [0, 500, 1000]);
        assert!(Scale::log(0.0..0.0).range.end > 0.0);
    }

    #[test]
    fn the_style_sheet_knows_all_colours() {
        let style = include_str!("style.css");
        let modes = Mode::value_variants().iter().map(|mode| (mode.name(), colour(*mode)));
        for (name, RGBColor(red, green, blue)) in modes {
            for attribute in ["fill", "stroke"] {
                let rule = format!("[{attribute}=\"#{red:02X}{green:02X}{blue:02X}\"]");
                assert!(style.contains(&rule), "{name}: {rule}");
            }
        }
    }
}
