//! An SVG file of what came out.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use lathe_scheduler::simulate::compare::ArrivalFigures;
use lathe_scheduler::simulate::metrics::Sample;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::report::{Report, Row};

/// Width and height of the picture, pixels.
const SIZE: (u32, u32) = (1280, 800);

/// Where the picture goes.
pub struct Target(PathBuf);

type Points = Vec<(f64, f64)>;

/// One picture of the picture: lines with names.
struct Panel<'a> {
    title: &'a str,
    x: &'a str,
    y: &'a str,
    lines: Vec<(String, Points)>,
}

impl Target {
    /// An SVG file in a folder that is there.
    ///
    /// # Errors
    /// When it is not.
    pub fn new(path: &Path) -> anyhow::Result<Self> {
        if path.extension().is_none_or(|extension| extension != "svg") {
            bail!("--plot {}: only SVG is written; end the name in .svg", path.display());
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !folder.is_dir() {
            bail!("--plot {}: there is no folder {}", path.display(), folder.display());
        }
        Ok(Self(path.to_owned()))
    }

    /// Draws and writes.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, report: &Report) -> anyhow::Result<()> {
        let svg = draw(report).map_err(|error| anyhow!("cannot draw: {error}"))?;
        fs::write(&self.0, svg).with_context(|| format!("cannot write {}", self.0.display()))
    }
}

/// The picture as text.
fn draw(report: &Report) -> Result<String, Box<dyn std::error::Error + '_>> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(|error| error.to_string())?;
        let panels = panels(report);
        let rows = panels.len().div_ceil(2);
        for (area, panel) in root.split_evenly((rows, 2)).iter().zip(panels) {
            draw_panel(area, &panel).map_err(|error| error.to_string())?;
        }
        root.present().map_err(|error| error.to_string())?;
    }
    Ok(svg)
}

fn panels(report: &Report) -> Vec<Panel<'static>> {
    if matches!(report.results.first(), Some(Row::Arrivals { .. })) {
        let x = "percent of the GPUs asked for";
        let lines = |of: fn(&ArrivalFigures) -> &Vec<f64>| lines(report, |row| curve(row, of));
        return vec![
            Panel {
                title: "GPUs allocated",
                x,
                y: "percent",
                lines: lines(|row| &row.percent_gpu_allocated),
            },
            Panel {
                title: "GPUs fragmented",
                x,
                y: "percent",
                lines: lines(|row| &row.percent_gpu_fragmented),
            },
        ];
    }
    let over_time = |title, y, value: fn(&Sample) -> f64| Panel {
        title,
        x: "hours",
        y,
        lines: lines(report, |row| samples(row, value)),
    };
    vec![
        over_time("GPUs allocated", "percent", |sample| sample.percent_gpu_allocated),
        over_time("GPUs fragmented", "percent", |sample| sample.percent_gpu_fragmented),
        over_time("Jobs that wait", "jobs", |sample| sample.waiting),
        Panel {
            title: "Completion time",
            x: "percent of the jobs",
            y: "hours",
            lines: lines(report, completion),
        },
    ]
}

fn lines(report: &Report, points: impl Fn(&Row) -> Points) -> Vec<(String, Points)> {
    report.results.iter().map(|row| (name(row), points(row))).collect()
}

fn curve(row: &Row, of: fn(&ArrivalFigures) -> &Vec<f64>) -> Points {
    let Row::Arrivals { figures, .. } = row else { return Points::new() };
    of(figures).iter().enumerate().map(|(percent, &value)| (percent as f64, value)).collect()
}

fn samples(row: &Row, value: fn(&Sample) -> f64) -> Points {
    let Row::Queue { figures, .. } = row else { return Points::new() };
    figures.samples.iter().map(|sample| (sample.time_s / 3600.0, value(sample))).collect()
}

fn completion(row: &Row) -> Points {
    let Row::Queue { figures, .. } = row else { return Points::new() };
    let times = figures.completion_curve_s.iter().enumerate();
    times.map(|(percent, seconds)| (percent as f64, seconds / 3600.0)).collect()
}

/// What tells a result from others.
fn name(row: &Row) -> String {
    match row {
        Row::Arrivals { policy, .. } => (*policy).to_owned(),
        Row::Queue { policy, backfill, estimates, .. } => format!("{policy}, {backfill}, {estimates}"),
    }
}

fn draw_panel<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    panel: &Panel<'_>,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let points = || panel.lines.iter().flat_map(|(_, points)| points.iter().copied());
    let (right, top) = points().fold((0.0_f64, 0.0_f64), |(x, y), point| (x.max(point.0), y.max(point.1)));
    let (right, top) = (if right > 0.0 { right } else { 1.0 }, if top > 0.0 { top * 1.05 } else { 1.0 });
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..right, 0.0..top)?;
    chart.configure_mesh().x_desc(panel.x).y_desc(panel.y).light_line_style(WHITE).draw()?;
    for (at, (name, points)) in panel.lines.iter().enumerate() {
        let color = Palette99::pick(at).to_rgba();
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()
}
