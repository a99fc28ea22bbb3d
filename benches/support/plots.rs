//! The plots, as SVG: bars of lossless rates and latencies, and lines over the number of downstreams.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::results::{LOSSLESS, MODEST, Results, Row, Table};
use super::suite::OURS;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const OUR_COLOUR: RGBColor = RGBColor(0x1b, 0x6e, 0xc2);
const THEIR_COLOUR: RGBColor = RGBColor(0x9a, 0xa5, 0xb1);
const TAIL_COLOUR: RGBColor = RGBColor(0xd9, 0x82, 0x2b);
const LINE_COLOURS: [RGBColor; 6] = [
    OUR_COLOUR,
    RGBColor(0x4f, 0xb0, 0xe8),
    RGBColor(0x33, 0x33, 0x33),
    RGBColor(0x3a, 0x92, 0x5c),
    TAIL_COLOUR,
    RGBColor(0xb0, 0x3a, 0x48),
];
/// Part of the names of tables with the same load and different numbers of downstreams.
const GROWING: &str = "downstreams-";
const WIDTH: u32 = 900;
/// Width for the names of rows, in pixels.
const NAMES: u32 = 190;

/// Draws all plots.
///
/// # Errors
/// When a file cannot be written.
pub fn draw(results: &Results, directory: &Path) -> Result<()> {
    for table in results.tables.iter().filter(|table| worth_a_plot(table)) {
        rates(table, &directory.join(format!("{}.svg", table.key)))?;
        if table.rows.iter().any(|row| row.median(MODEST[0]).is_some()) {
            latencies(table, &directory.join(format!("{}-latency.svg", table.key)))?;
        }
    }
    if growing(results).next().is_some() {
        lines(results, &directory.join("downstreams.svg"))?;
    }
    Ok(())
}

/// False for tables that are single points of a line plot.
pub fn worth_a_plot(table: &Table) -> bool {
    !table.key.starts_with(GROWING)
}

/// The tables of the line plot, each with its number of downstreams.
pub fn growing(results: &Results) -> impl Iterator<Item = (u32, &Table)> {
    results.tables.iter().filter_map(|table| Some((table.key.strip_prefix(GROWING)?.parse().ok()?, table)))
}

/// One bar: label, value and colour.
struct Bar<'a> {
    name: &'a str,
    value: f64,
    colour: RGBColor,
}

fn rates(table: &Table, path: &Path) -> Result<()> {
    let bar = |row: &'_ Row| -> Option<(String, f64)> { Some((row.name.clone(), row.median(LOSSLESS)? / 1e3)) };
    let found: Vec<(String, f64)> = table.rows.iter().filter_map(bar).collect();
    let bars: Vec<Bar> = found
        .iter()
        .map(|(name, value)| {
            let colour = if name.starts_with(OURS) { OUR_COLOUR } else { THEIR_COLOUR };
            Bar { name, value: *value, colour }
        })
        .collect();
    bar_chart(&table.title, "thousand datagrams a second, none lost", &bars, path)
}

fn latencies(table: &Table, path: &Path) -> Result<()> {
    let mut found = Vec::new();
    for row in &table.rows {
        if let (Some(middle), Some(tail)) = (row.median(MODEST[0]), row.median(MODEST[1])) {
            found.push((format!("{}, p50", row.name), middle, OUR_COLOUR));
            found.push((format!("{}, p99", row.name), tail, TAIL_COLOUR));
        }
    }
    let bars: Vec<Bar> =
        found.iter().map(|(name, value, colour)| Bar { name, value: *value, colour: *colour }).collect();
    bar_chart(&table.title, "microseconds from sender to receiver, at 20,000 datagrams a second", &bars, path)
}

fn bar_chart(title: &str, unit: &str, bars: &[Bar<'_>], path: &Path) -> Result<()> {
    let height = 90 + 26 * u32::try_from(bars.len())?;
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    draw_bars(&area, title, unit, bars).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn draw_bars(area: &Area<'_>, title: &str, unit: &str, bars: &[Bar<'_>]) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let longest = bars.iter().map(|bar| bar.value).fold(1.0, f64::max);
    let rows = bars.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 17))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(NAMES)
        .build_cartesian_2d(0.0..longest * 1.12, rows..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .y_labels(0)
        .x_desc(unit)
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|value| format!("{value:.0}"))
        .draw()?;
    chart.draw_series(bars.iter().enumerate().map(|(at, bar)| {
        let top = at as f64;
        Rectangle::new([(0.0, top + 0.15), (bar.value, top + 0.85)], bar.colour.filled())
    }))?;
    let digits = usize::from(longest < 100.0);
    chart.draw_series(bars.iter().enumerate().map(|(at, bar)| {
        let text = format!("{:.digits$}", bar.value);
        let place = (bar.value + longest * 0.008, at as f64 + 0.32);
        Text::new(text, place, ("sans-serif", 13).into_font())
    }))?;
    let (_, span) = chart.plotting_area().get_pixel_range();
    for (at, bar) in bars.iter().enumerate() {
        let step = f64::from(span.end - span.start) / rows;
        let y = f64::from(span.start) + step * (at as f64 + 0.32);
        area.draw(&Text::new(bar.name.to_owned(), (14, y as i32), ("sans-serif", 13).into_font()))?;
    }
    area.present()?;
    Ok(())
}

fn lines(results: &Results, path: &Path) -> Result<()> {
    let mut series: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for (downstreams, table) in growing(results) {
        for row in &table.rows {
            if let Some(rate) = row.median(LOSSLESS) {
                series.entry(&row.name).or_default().push((f64::from(downstreams), rate / 1e3));
            }
        }
    }
    let area = SVGBackend::new(path, (WIDTH, 420)).into_drawing_area();
    draw_lines(&area, &series).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn draw_lines(area: &Area<'_>, series: &BTreeMap<&str, Vec<(f64, f64)>>) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let highest = series.values().flatten().map(|(_, rate)| *rate).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("Lossless rate by the number of downstreams, one sender, 64 bytes", ("sans-serif", 17))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .margin_right(NAMES)
        .build_cartesian_2d((1.0..1000.0).log_scale(), 0.0..highest * 1.05)?;
    chart
        .configure_mesh()
        .x_desc("downstreams")
        .y_desc("thousand datagrams a second")
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|value| format!("{value:.0}"))
        .draw()?;
    // udp-fanout's lines come first, so that their colours are always the same.
    let mut series: Vec<_> = series.iter().collect();
    series.sort_by_key(|(name, _)| !name.starts_with(OURS));
    for (at, ((name, points), colour)) in series.into_iter().zip(LINE_COLOURS.into_iter().cycle()).enumerate() {
        let line = LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3);
        chart.draw_series(line)?;
        let (x, y) = ((WIDTH - NAMES) as i32 + 10, 50 + 22 * at as i32);
        area.draw(&PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)))?;
        area.draw(&Text::new((*name).to_owned(), (x + 26, y - 6), ("sans-serif", 13).into_font()))?;
    }
    area.present()?;
    Ok(())
}
