//! Pictures of measurements, as SVG or PNG, drawn without any library or font of the system.

#![allow(clippy::cast_possible_truncation, reason = "pixels and powers of ten are far inside of an i32")]

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Once;

use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use crate::latency::RoundTrips;
use crate::peer::Outcome;

/// Width and height in pixels.
const SIZE: (u32, u32) = (900, 540);
/// The font's name in the SVG, where the viewer's own sans-serif font stands in for the one that measured the text.
const FONT: &str = "sans-serif";
const BARS: RGBColor = RGBColor(0x3b, 0x6e, 0xa5);
const MARKS: RGBColor = RGBColor(0xb0, 0x3a, 0x2e);

/// A file to draw into; its name says the format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlotFile {
    /// Scalable Vector Graphics.
    Svg(PathBuf),
    /// Portable Network Graphics.
    Png(PathBuf),
}

impl FromStr for PlotFile {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = PathBuf::from(text);
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("svg") => Ok(PlotFile::Svg(path)),
            Some("png") => Ok(PlotFile::Png(path)),
            _ => Err("the name must end in .svg or .png, as in latency.svg"),
        }
    }
}

impl PlotFile {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            PlotFile::Svg(path) | PlotFile::Png(path) => path,
        }
    }

    /// The distribution of half of the round trips: how many of a hundred messages took how long.
    ///
    /// # Errors
    ///
    /// There are no messages to show, or the file cannot be written.
    pub fn latency(&self, title: &str, trips: &RoundTrips) -> Outcome {
        self.draw(&Latency { title, trips })
    }

    /// Bandwidth over message sizes, as pairs of bytes and MB/s (MB = 2^20 bytes).
    ///
    /// # Errors
    ///
    /// There are no points to show, or the file cannot be written.
    pub fn bandwidth(&self, title: &str, points: &[(usize, f64)]) -> Outcome {
        self.draw(&Bandwidth { title, points })
    }

    fn draw(&self, picture: &impl Picture) -> Outcome {
        embedded_font();
        let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", self.path().display());
        match self {
            PlotFile::Svg(path) => {
                let mut text = String::new();
                picture.draw(&SVGBackend::with_string(&mut text, SIZE).into_drawing_area())?;
                std::fs::write(path, text).map_err(|error| failed(&error))?;
            }
            PlotFile::Png(path) => {
                let mut pixels = vec![0; SIZE.0 as usize * SIZE.1 as usize * 3];
                picture.draw(&BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area())?;
                let file = std::fs::File::create(path).map_err(|error| failed(&error))?;
                let mut encoder = png::Encoder::new(std::io::BufWriter::new(file), SIZE.0, SIZE.1);
                encoder.set_color(png::ColorType::Rgb);
                let mut writer = encoder.write_header()?;
                writer.write_image_data(&pixels).map_err(|error| failed(&error))?;
                writer.finish().map_err(|error| failed(&error))?;
            }
        }
        Ok(())
    }
}

/// Text is measured, and in a PNG drawn, with a font that is part of the program.
fn embedded_font() {
    static ONCE: Once = Once::new();
    // The font of the crate is a valid one, so that there is no error to report.
    ONCE.call_once(|| drop(register_font(FONT, FontStyle::Normal, dejavu::sans::regular())));
}

trait Picture {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Outcome
    where
        B::ErrorType: 'static;
}

struct Latency<'a> {
    title: &'a str,
    trips: &'a RoundTrips,
}

impl Picture for Latency<'_> {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Outcome
    where
        B::ErrorType: 'static,
    {
        let half = self.trips.half();
        let buckets = self.trips.buckets(80);
        let (Some(first), Some(last)) = (buckets.first(), buckets.last()) else {
            return Err("there is no measurement to plot".into());
        };
        let share = |count: u64| 100.0 * count as f64 / self.trips.len() as f64;
        let top = buckets.iter().map(|bucket| share(bucket.count)).fold(0.0, f64::max) * 1.15;

        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, (FONT, 20))
            .margin(16)
            .x_label_area_size(52)
            .y_label_area_size(70)
            .build_cartesian_2d(Logarithmic::decimal(first.from, last.to), 0.0..top)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .label_style((FONT, 15))
            .axis_desc_style((FONT, 16))
            .x_desc("half round trip, microseconds (logarithmic)")
            .y_desc("share of messages, %")
            .x_labels(14)
            .y_label_formatter(&|percent| short(*percent))
            .draw()?;
        chart.draw_series(buckets.iter().map(|bucket| {
            let bar = [(bucket.from, 0.0), (bucket.to, share(bucket.count))];
            Rectangle::new(bar, BARS.filled())
        }))?;
        // The names stand below one another, so that marks that are close stay legible.
        for (row, (name, us)) in (1_u8..).zip([("p50", half.p50), ("p99", half.p99), ("p99.9", half.p999)]) {
            chart.draw_series([PathElement::new([(us, 0.0), (us, top)], MARKS.stroke_width(1))])?;
            let text = format!("{name} {}", short(us));
            let height = top * (1.0 - 0.055 * f64::from(row));
            let beyond_the_middle = us.ln() > (first.from.ln() + last.to.ln()) / 2.0;
            let (side, offset) = if beyond_the_middle { (HPos::Right, -5) } else { (HPos::Left, 5) };
            let style = (FONT, 15).into_font().color(&MARKS).pos(Pos::new(side, VPos::Center));
            chart.draw_series([EmptyElement::at((us, height)) + Text::new(text, (offset, 0), style)])?;
        }
        area.present()?;
        Ok(())
    }
}

struct Bandwidth<'a> {
    title: &'a str,
    points: &'a [(usize, f64)],
}

impl Picture for Bandwidth<'_> {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Outcome
    where
        B::ErrorType: 'static,
    {
        // A rate that was rounded to nothing has no logarithm.
        let points: Vec<(f64, f64)> =
            self.points.iter().map(|&(size, rate)| (size as f64, rate.max(0.01))).collect();
        let (Some(first), Some(last)) = (points.first(), points.last()) else {
            return Err("there is no measurement to plot".into());
        };
        let lowest = points.iter().map(|point| point.1).fold(f64::MAX, f64::min);
        let highest = points.iter().map(|point| point.1).fold(0.0, f64::max);

        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, (FONT, 20))
            .margin(16)
            .margin_right(28)
            .x_label_area_size(52)
            .y_label_area_size(84)
            .build_cartesian_2d(
                Logarithmic::sizes(first.0, last.0),
                Logarithmic::decimal(lowest / 1.5, highest * 1.5),
            )?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .label_style((FONT, 15))
            .axis_desc_style((FONT, 16))
            .x_desc("message size, bytes (logarithmic)")
            .y_desc("bandwidth, MB/s of 2^20 bytes (logarithmic)")
            .x_labels(12)
            .y_labels(16)
            .draw()?;
        chart.draw_series(LineSeries::new(points.iter().copied(), BARS.stroke_width(2)))?;
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, BARS.filled())))?;
        area.present()?;
        Ok(())
    }
}

/// A logarithmic axis.
struct Logarithmic {
    from: f64,
    to: f64,
    /// Where the axis may have a line and a name; the finest of the lists that fits is taken.
    ticks: Vec<Vec<f64>>,
    name: fn(f64) -> String,
}

impl Logarithmic {
    fn decimal(from: f64, to: f64) -> Logarithmic {
        let digits: [&[f64]; 3] = [&[1.0], &[1.0, 2.0, 5.0], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]];
        let decades = from.log10().floor() as i32..=to.log10().ceil() as i32;
        let ticks = |digits: &[f64]| {
            let all = decades.clone().flat_map(|power| digits.iter().map(move |d| d * 10_f64.powi(power)));
            all.filter(|&value| value >= from && value <= to).collect()
        };
        Logarithmic { from, to, ticks: digits.into_iter().map(ticks).collect(), name: short }
    }

    /// Sizes in bytes, named as people do: 512, 4 Ki, 1 Mi.
    fn sizes(from: f64, to: f64) -> Logarithmic {
        let to = if to > from { to } else { from * 2.0 };
        let every = |step: usize| {
            let powers = (0..).step_by(step).map(|power| from * 2_f64.powi(power));
            powers.take_while(|&size| size <= to * 1.001).collect()
        };
        let name = |size: f64| match size {
            v if v >= 1_048_576.0 => format!("{} Mi", short(v / 1_048_576.0)),
            v if v >= 1024.0 => format!("{} Ki", short(v / 1024.0)),
            v => short(v),
        };
        Logarithmic { from, to, ticks: [4, 2, 1].map(every).into(), name }
    }
}

impl Ranged for Logarithmic {
    type FormatOption = plotters::coord::ranged1d::NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let share = (value / self.from).ln() / (self.to / self.from).ln();
        limit.0 + (f64::from(limit.1 - limit.0) * share).round() as i32
    }

    fn key_points<Hint: plotters::coord::ranged1d::KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        let most = hint.max_num_points();
        self.ticks.iter().rev().find(|ticks| ticks.len() <= most).cloned().unwrap_or_default()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.from..self.to
    }
}

impl ValueFormatter<f64> for Logarithmic {
    fn format_ext(&self, value: &f64) -> String {
        (self.name)(*value)
    }
}

/// As many digits as matter.
fn short(value: f64) -> String {
    match value {
        v if v >= 100.0 || v.fract() == 0.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_name_of_the_file_says_the_format() {
        assert_eq!("a/b.svg".parse(), Ok(PlotFile::Svg("a/b.svg".into())));
        assert_eq!("b.png".parse(), Ok(PlotFile::Png("b.png".into())));
        assert!("b.pdf".parse::<PlotFile>().unwrap_err().contains("latency.svg"));
    }

    #[test]
    fn pictures_have_axes_and_text() {
        let folder = std::env::temp_dir().join(format!("plots-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut trips = RoundTrips::new();
        (1..=1000).for_each(|n| trips.record(Duration::from_nanos(8000 + n * n)));

        let svg = PlotFile::Svg(folder.join("latency.svg"));
        svg.latency("a title", &trips).unwrap();
        let text = std::fs::read_to_string(svg.path()).unwrap();
        for part in ["a title", "microseconds", "share of messages", "p99.9"] {
            assert!(text.contains(part), "no {part:?} in the picture");
        }
        let png = PlotFile::Png(folder.join("bandwidth.png"));
        png.bandwidth("a title", &[(2, 1.0), (1024, 400.0), (1 << 20, 900.5)]).unwrap();
        let file = std::io::BufReader::new(std::fs::File::open(png.path()).unwrap());
        let mut reader = png::Decoder::new(file).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        let dark = pixels.chunks(3).filter(|pixel| pixel.iter().all(|&value| value < 100)).count();
        assert!(dark > 500, "{dark} dark pixels: there is no text");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn nothing_measured_is_said() {
        let file = PlotFile::Svg("never-written.svg".into());
        assert!(file.latency("", &RoundTrips::new()).is_err());
        assert!(file.bandwidth("", &[]).is_err());
    }
}
