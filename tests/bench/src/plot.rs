//! Line charts as SVG: what four plots need and nothing more.

use std::fmt::Write as _;

/// What an axis is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Equal steps from 0.
    Linear,
    /// Powers of ten; what is not above 0 is left away.
    Log,
    /// Percentiles: 0, 90, 99, 99.9 are equally far apart; 100 is left away.
    Percentile,
}

/// An axis.
#[derive(Debug, Clone, Copy)]
pub struct Axis {
    /// What is on it, with its unit.
    pub label: &'static str,
    /// How it is divided.
    pub scale: Scale,
}

/// A line.
#[derive(Debug, Clone)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points, ascending in x.
    pub points: Vec<(f64, f64)>,
}

/// Of the picture, in pixels.
const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 480.0;
/// Of the part with the lines.
const LEFT: f64 = 80.0;
const RIGHT: f64 = 720.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 420.0;
/// Told apart by people who see few colours, too (Okabe and Ito); then dashed.
const COLOURS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#8c8c00"];

impl Scale {
    /// Where a value lies, if it does.
    fn place(self, value: f64) -> Option<f64> {
        match self {
            Self::Linear => Some(value),
            Self::Log => (value > 0.0).then(|| value.log10()),
            Self::Percentile => (value < 100.0).then(|| -(1.0 - value / 100.0).log10()),
        }
    }

    /// Values to mark within these places.
    fn marks(self, from: f64, to: f64) -> Vec<f64> {
        match self {
            Self::Linear => {
                let rough = ((to - from) / 6.0).max(f64::MIN_POSITIVE);
                let power = 10_f64.powf(rough.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
                (0..=20).map(|n| f64::from(n) * step).filter(|v| (from..=to * 1.0001).contains(v)).collect()
            }
            Self::Log => {
                let decades = from.floor() as i32..=to.ceil() as i32;
                let each: &[f64] = if decades.clone().count() > 4 { &[1.0] } else { &[1.0, 2.0, 5.0] };
                let all = decades.flat_map(|d| each.iter().map(move |n| n * 10_f64.powi(d)));
                all.filter(|v| (from - 1e-9..=to + 1e-9).contains(&v.log10())).collect()
            }
            Self::Percentile => [0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999]
                .into_iter()
                .filter(|v| self.place(*v).is_some_and(|at| (from..=to).contains(&at)))
                .collect(),
        }
    }
}

/// Text as it may stand in XML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A number as short as it can be said.
fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{}M", v / 1e6),
        v if v >= 1e4 => format!("{}k", v / 1e3),
        v if v == 0.0 || v >= 0.001 => format!("{}", (v * 1e6).round() / 1e6),
        v => format!("{v:.0e}"),
    }
}

/// The chart. One without a single point says so.
#[must_use]
pub fn svg(title: &str, x: Axis, y: Axis, all: &[Series]) -> String {
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"16\">{}</text>\n",
        escaped(title)
    );
    let placed: Vec<(&str, Vec<(f64, f64)>)> = all
        .iter()
        .map(|series| {
            let points = series.points.iter().filter_map(|(a, b)| Some((x.scale.place(*a)?, y.scale.place(*b)?)));
            (series.name.as_str(), points.collect())
        })
        .collect();
    let range = |scale: Scale, of: fn(&(f64, f64)) -> f64| {
        let values = placed.iter().flat_map(|(_, points)| points.iter().map(of));
        let (least, most) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        let least = if scale == Scale::Log { least } else { least.min(0.0) };
        (least, if most > least { most } else { least + 1.0 })
    };
    let ((x0, x1), (y0, y1)) = (range(x.scale, |p| p.0), range(y.scale, |p| p.1));
    if x0.is_finite() {
        let at_x = |v: f64| LEFT + (v - x0) / (x1 - x0) * (RIGHT - LEFT);
        let at_y = |v: f64| BOTTOM - (v - y0) / (y1 - y0) * (BOTTOM - TOP);
        for (value, at) in x.scale.marks(x0, x1).into_iter().filter_map(|v| Some((v, at_x(x.scale.place(v)?)))) {
            let text = short(value);
            let _ = writeln!(out, "<path d=\"M{at:.1} {TOP}V{BOTTOM}\" stroke=\"#ddd\"/>");
            let _ = writeln!(out, "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{text}</text>", BOTTOM + 16.0);
        }
        for (value, at) in y.scale.marks(y0, y1).into_iter().filter_map(|v| Some((v, at_y(y.scale.place(v)?)))) {
            let text = short(value);
            let _ = writeln!(out, "<path d=\"M{LEFT} {at:.1}H{RIGHT}\" stroke=\"#ddd\"/>");
            let _ =
                writeln!(out, "<text x=\"{}\" y=\"{at:.1}\" dy=\"4\" text-anchor=\"end\">{text}</text>", LEFT - 6.0);
        }
        for (number, (name, points)) in placed.iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let dashes = if number < COLOURS.len() { "" } else { " stroke-dasharray=\"6 3\"" };
            let line: Vec<String> = points.iter().map(|(a, b)| format!("{:.1},{:.1}", at_x(*a), at_y(*b))).collect();
            let _ = writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>",
                line.join(" ")
            );
            if points.len() < 40 {
                for (a, b) in points {
                    let _ = writeln!(
                        out,
                        "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                        at_x(*a),
                        at_y(*b)
                    );
                }
            }
            let at = TOP + 10.0 + 20.0 * number as f64;
            let (from, to, text) = (RIGHT + 12.0, RIGHT + 36.0, RIGHT + 42.0);
            let _ = writeln!(
                out,
                "<path d=\"M{from} {at}H{to}\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>\
                 <text x=\"{text}\" y=\"{at}\" dy=\"4\">{}</text>",
                escaped(name)
            );
        }
    } else {
        let _ = writeln!(out, "<text x=\"{LEFT}\" y=\"{}\">nothing was measured</text>", f64::midpoint(TOP, BOTTOM));
    }
    let (middle, below) = (f64::midpoint(LEFT, RIGHT), BOTTOM + 40.0);
    let _ = writeln!(out, "<text x=\"{middle}\" y=\"{below}\" text-anchor=\"middle\">{}</text>", escaped(x.label));
    let _ = writeln!(
        out,
        "<text transform=\"translate(20 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n\
         <rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{}\" height=\"{}\" fill=\"none\" stroke=\"#888\"/>\n</svg>",
        f64::midpoint(TOP, BOTTOM),
        escaped(y.label),
        RIGHT - LEFT,
        BOTTOM - TOP
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const X: Axis = Axis { label: "connections", scale: Scale::Log };
    const Y: Axis = Axis { label: "requests/s", scale: Scale::Linear };

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series { name: name.into(), points: points.to_vec() }
    }

    #[test]
    fn all_points_lie_within_the_frame_and_in_order() {
        let picture = svg("t", X, Y, &[series("a", &[(1.0, 10.0), (16.0, 40.0), (64.0, 20.0)])]);
        let line = picture.lines().find(|l| l.starts_with("<polyline")).unwrap();
        let points: Vec<(f64, f64)> = line
            .split('"')
            .nth(1)
            .unwrap()
            .split(' ')
            .map(|p| {
                let (x, y) = p.split_once(',').unwrap();
                (x.parse().unwrap(), y.parse().unwrap())
            })
            .collect();
        assert_eq!(points.len(), 3);
        assert!(points.iter().all(|(x, y)| (LEFT..=RIGHT).contains(x) && (TOP..=BOTTOM).contains(y)), "{points:?}");
        assert!(points[0].0 < points[1].0 && points[1].0 < points[2].0);
        assert!(points[1].1 < points[2].1 && points[2].1 < points[0].1, "larger is higher: {points:?}");
    }

    #[test]
    fn names_cannot_break_the_picture_and_every_tag_is_closed() {
        let picture = svg("a<b", X, Y, &[series("x & <y>", &[(1.0, 1.0)])]);
        assert!(picture.contains("a&lt;b") && picture.contains("x &amp; &lt;y&gt;") && picture.ends_with("</svg>\n"));
        assert_eq!(picture.matches("<text").count(), picture.matches("</text>").count());
        assert!(!picture.contains("NaN") && !picture.contains("inf"), "{picture}");
    }

    #[test]
    fn a_picture_of_nothing_says_so() {
        assert!(svg("t", X, Y, &[series("a", &[(0.0, 1.0)])]).contains("nothing was measured"));
        assert!(svg("t", X, Y, &[]).contains("nothing was measured"));
    }

    #[test]
    fn percentiles_are_stretched_towards_the_end() {
        let at = |v| Scale::Percentile.place(v);
        assert_eq!(at(0.0), Some(0.0));
        assert!((at(90.0).unwrap() - 1.0).abs() < 1e-9 && (at(99.9).unwrap() - 3.0).abs() < 1e-9);
        assert_eq!(at(100.0), None);
        assert_eq!(Scale::Percentile.marks(0.0, 3.1), [0.0, 50.0, 90.0, 99.0, 99.9]);
    }

    #[test]
    fn marks_are_round_numbers() {
        assert_eq!(Scale::Linear.marks(0.0, 55.0), [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]);
        assert_eq!(Scale::Log.marks(0.0, 1.9), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
    }
}
