//! A chart of rate over cores as SVG: text, no library.
//!
//! Each series is measured points, the curve fitted to them, and a dashed line from the first point in ideal
//! proportion. The chart is complete in itself (fonts of the viewer, colours that differ for most kinds of colour blindness).

use std::fmt::Write;

/// One load over the counts of cores.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    /// (cores, operations per second), at least one.
    pub(crate) points: Vec<(f64, f64)>,
    /// The fitted curve, sampled.
    pub(crate) curve: Vec<(f64, f64)>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 60.0;
/// Okabe and Ito, "Color universal design" (2008).
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

/// Draws the series under a title.
pub(crate) fn svg(title: &str, series: &[Series]) -> String {
    let all = || series.iter().flat_map(|s| s.points.iter().chain(&s.curve));
    let cores = all().map(|p| p.0).fold(1.0, f64::max);
    let ideal = series.iter().filter_map(|s| s.points.first()).map(|&(n, x)| x / n * cores);
    let rate = all().map(|p| p.1).chain(ideal).fold(1e6, f64::max) / 1e6;
    let (step, top) = nice(rate);
    let x = |n: f64| LEFT + n / cores * (WIDTH - LEFT - RIGHT);
    let y = |ops: f64| HEIGHT - BOTTOM - ops / 1e6 / top * (HEIGHT - TOP - BOTTOM);

    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    line(format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">"##
    ));
    line(format!("<title>{}</title>", escape(title)));
    line(format!(r##"<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"##));
    line(format!(r##"<text x="{LEFT}" y="26" font-size="16">{}</text>"##, escape(title)));
    let (right, bottom) = (x(cores), y(0.0));
    for i in 0..=(top / step).round() as usize {
        let (mops, at) = (step * i as f64, y(step * i as f64 * 1e6));
        line(format!(r##"<line x1="{LEFT}" y1="{at:.1}" x2="{right:.1}" y2="{at:.1}" stroke="#dddddd"/>"##));
        let (label_x, label_y) = (LEFT - 8.0, at + 4.0);
        let digits = if step < 1.0 { 1 } else { 0 };
        line(format!(r##"<text x="{label_x:.1}" y="{label_y:.1}" text-anchor="end">{mops:.digits$}</text>"##));
    }
    let every = (cores / 16.0).ceil().max(1.0);
    for i in 0..=(cores / every) as usize {
        let (n, at) = (every * i as f64, x(every * i as f64));
        let (tick, label) = (bottom + 5.0, bottom + 20.0);
        line(format!(r##"<line x1="{at:.1}" y1="{bottom:.1}" x2="{at:.1}" y2="{tick:.1}" stroke="#333333"/>"##));
        line(format!(r##"<text x="{at:.1}" y="{label:.1}" text-anchor="middle">{n:.0}</text>"##));
    }
    line(format!(r##"<path d="M{LEFT} {TOP} V{bottom:.1} H{right:.1}" fill="none" stroke="#333333"/>"##));
    let (middle_x, middle_y) = ((LEFT + right) / 2.0, (TOP + bottom) / 2.0);
    line(format!(r##"<text x="{middle_x:.1}" y="{:.1}" text-anchor="middle">cores</text>"##, bottom + 42.0));
    line(format!(
        r##"<text x="20" y="{middle_y:.1}" text-anchor="middle" transform="rotate(-90 20 {middle_y:.1})">million operations per second</text>"##
    ));
    for (i, series) in series.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        line(format!(r##"<g stroke="{colour}" fill="{colour}">"##));
        if let Some(&(n, ops)) = series.points.first() {
            let (from_x, from_y, to_x, to_y) = (x(n), y(ops), x(cores), y(ops / n * cores));
            line(format!(
                r##"<line x1="{from_x:.1}" y1="{from_y:.1}" x2="{to_x:.1}" y2="{to_y:.1}" stroke-dasharray="4 4" stroke-opacity="0.6"/>"##
            ));
        }
        if series.curve.len() > 1 {
            let path = series.curve.iter().enumerate().fold(String::new(), |mut path, (i, &(n, ops))| {
                let verb = if i == 0 { 'M' } else { 'L' };
                write!(path, "{verb}{:.1} {:.1}", x(n), y(ops)).expect("a string takes all");
                path
            });
            line(format!(r##"<path d="{path}" fill="none" stroke-width="1.5"/>"##));
        }
        for &(n, ops) in &series.points {
            line(format!(r##"<circle cx="{:.1}" cy="{:.1}" r="4" stroke="none"/>"##, x(n), y(ops)));
        }
        let (at, dot, text) = (TOP + 20.0 * i as f64, right + 22.0, right + 34.0);
        line(format!(r##"<circle cx="{dot:.1}" cy="{at:.1}" r="4" stroke="none"/>"##));
        line(format!(
            r##"<text x="{text:.1}" y="{:.1}" stroke="none" fill="#333333">{}</text>"##,
            at + 4.0,
            escape(&series.name)
        ));
        line("</g>".to_owned());
    }
    let note = TOP + 20.0 * series.len() as f64 + 14.0;
    for (i, text) in ["points: measured", "line: fitted law", "dashed: ideal"].into_iter().enumerate() {
        line(format!(
            r##"<text x="{:.1}" y="{:.1}" fill="#777777" font-size="11">{text}</text>"##,
            right + 18.0,
            note + 15.0 * i as f64
        ));
    }
    line("</svg>".to_owned());
    out
}

/// A step of 1, 2 or 5 times a power of ten that cuts `most` into four to ten parts, and its multiple above.
fn nice(most: f64) -> (f64, f64) {
    let power = 10f64.powf((most / 10.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|s| s * power).into_iter().find(|s| most / s <= 10.0).unwrap_or(10.0 * power);
    (step, (most / step).ceil() * step)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of elements still open at the end; panics on a wrong end.
    fn open_elements(text: &str) -> Vec<String> {
        let mut open: Vec<String> = Vec::new();
        for tag in text.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').expect("a tag ends");
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(tag.split_whitespace().next().unwrap().to_owned());
            }
        }
        open
    }

    #[test]
    fn a_chart_is_well_formed_and_holds_every_point() {
        let series = |name: &str, scale: f64| Series {
            name: name.into(),
            points: (1..=8).map(|n| (n as f64, n as f64 * scale)).collect(),
            curve: (10..=80).map(|n| (n as f64 / 10.0, n as f64 / 10.0 * scale)).collect(),
        };
        let text = svg("GET <uniform> & local", &[series("local", 5e6), series("a&b", 2e6)]);
        assert!(open_elements(&text).is_empty());
        assert_eq!(text.matches("r=\"4\"").count(), 2 * (8 + 1));
        assert!(text.contains("GET &lt;uniform&gt; &amp; local") && text.contains("a&amp;b"));
        assert!(!text.contains("NaN") && !text.contains("inf"));
        assert!(open_elements(&svg("nothing", &[])).is_empty());
    }

    #[test]
    fn axes_end_at_round_numbers() {
        assert_eq!(nice(95.0), (10.0, 100.0));
        assert_eq!(nice(7.3), (1.0, 8.0));
        assert_eq!(nice(42.0), (5.0, 45.0));
        assert_eq!(nice(1.0), (0.1, 1.0));
    }
}
