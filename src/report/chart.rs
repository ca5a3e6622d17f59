//! Geometry of the charts: numbers in, coordinates out. The page's template draws them; colours are its style sheet's.

use serde::Serialize;

use crate::detect::measure::{Cells, Interval};

use super::numbers::{number, percent};

/// Round to a tenth of a pixel: half the file, no visible difference.
fn px(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// From data to pixels, linear.
#[derive(Debug, Clone, Copy)]
struct Scale {
    from: (f64, f64),
    to: (f64, f64),
}

impl Scale {
    fn at(&self, value: f64) -> f64 {
        let share = (value - self.from.0) / (self.from.1 - self.from.0);
        px(self.to.0 + share * (self.to.1 - self.to.0))
    }
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Tick {
    pub(crate) at: f64,
    pub(crate) label: String,
}

/// Round values from `low` to `high`, about `n` of them; the first lies at or below `low`, the last at or above `high`.
fn ticks(low: f64, high: f64, n: usize) -> Vec<f64> {
    let (low, high) = if high > low { (low, high) } else { (low - 0.5, low + 0.5) };
    let raw = (high - low) / n.max(1) as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= raw * 0.999).unwrap_or(raw);
    let (first, last) = ((low / step).floor() as i64, (high / step - 1e-9).ceil() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// As many digits as the step between ticks needs.
fn labelled(values: &[f64], scale: Scale) -> Vec<Tick> {
    let step = if values.len() > 1 { values[1] - values[0] } else { 1.0 };
    let digits = (0..4).find(|d| (step * 10f64.powi(*d)).fract().abs() < 1e-6).unwrap_or(4) as usize;
    values.iter().map(|v| Tick { at: scale.at(*v), label: number(Some(*v), digits) }).collect()
}

/// Rates of all methods, one panel per measure, one line per method.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Dots {
    pub(crate) width: f64,
    pub(crate) height: f64,
    pub(crate) rows: Vec<Tick>,
    pub(crate) panels: Vec<DotPanel>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct DotPanel {
    pub(crate) title: String,
    pub(crate) left: f64,
    pub(crate) right: f64,
    pub(crate) ticks: Vec<Tick>,
    pub(crate) dots: Vec<Dot>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Dot {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) low: Option<f64>,
    pub(crate) high: Option<f64>,
    pub(crate) label: String,
    /// The state before any repair, which the methods are compared with.
    pub(crate) before: bool,
}

/// One measure: its title and, in the order of the rows, value and interval.
pub(crate) type Rates = (String, Vec<Option<(f64, Option<Interval>)>>);

/// `names[0]` is the state before. Panels in which nothing is known are left out.
pub(crate) fn dots(names: &[String], rates: &[Rates]) -> Dots {
    const WIDTH: f64 = 920.0;
    const NAME: f64 = 150.0;
    const GAP: f64 = 26.0;
    const TOP: f64 = 30.0;
    const ROW: f64 = 26.0;
    let known: Vec<&Rates> = rates.iter().filter(|(_, values)| values.iter().any(Option::is_some)).collect();
    let y = |i: usize| TOP + ROW * (i as f64 + 0.5);
    let each = (WIDTH - NAME) / known.len().max(1) as f64;
    let panel = |(place, (title, values)): (usize, &&Rates)| {
        let top = values.iter().flatten().map(|(v, ci)| ci.map_or(*v, |ci| ci[1].max(*v))).fold(0.02, f64::max);
        let left = NAME + each * place as f64 + GAP / 2.0;
        let right = left + each - GAP;
        let marks = ticks(0.0, 100.0 * top, 3);
        let end = marks.last().copied().unwrap_or(100.0);
        let scale = Scale { from: (0.0, end), to: (left, right) };
        let dot = |(i, value): (usize, &Option<(f64, Option<Interval>)>)| {
            let (value, ci) = (*value)?;
            let label = percent(Some(value));
            let [low, high] = [0, 1].map(|end| ci.map(|ci| scale.at(100.0 * ci[end])));
            Some(Dot { x: scale.at(100.0 * value), y: y(i), low, high, label, before: i == 0 })
        };
        let dots = values.iter().enumerate().filter_map(dot).collect();
        DotPanel { title: title.clone(), left: px(left), right: px(right), ticks: labelled(&marks, scale), dots }
    };
    Dots {
        width: WIDTH,
        height: TOP + ROW * names.len() as f64 + 24.0,
        rows: names.iter().enumerate().map(|(i, name)| Tick { at: y(i), label: name.clone() }).collect(),
        panels: known.iter().enumerate().map(panel).collect(),
    }
}

/// The 2×2 as areas: columns by the own answer, within them the reward model's word.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Mosaic {
    pub(crate) title: String,
    pub(crate) width: f64,
    pub(crate) height: f64,
    pub(crate) n: u64,
    pub(crate) tiles: Vec<Tile>,
    /// Boundary between safe (left) and harmful (right) own answers.
    pub(crate) split: f64,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Tile {
    pub(crate) verdict: &'static str,
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) width: f64,
    pub(crate) height: f64,
    pub(crate) count: u64,
    pub(crate) percent: String,
    /// Whether its name and its number fit into it.
    pub(crate) roomy: bool,
}

pub(crate) fn mosaic(title: &str, cells: Cells) -> Mosaic {
    const WIDTH: f64 = 430.0;
    const HEIGHT: f64 = 230.0;
    const GAP: f64 = 2.0;
    let n = cells.n();
    let share = |count: u64, of: u64| if of > 0 { count as f64 / of as f64 } else { 0.0 };
    let split = WIDTH * share(cells.sound + cells.reward, n);
    let mut tiles = Vec::new();
    let columns = [
        (0.0, split, [("reward", cells.reward), ("sound", cells.sound)]),
        (split, WIDTH - split, [("coupled", cells.coupled), ("policy", cells.policy)]),
    ];
    for (x, width, [(upper, above), (lower, below)]) in columns {
        let edge = HEIGHT * share(above, above + below);
        for (verdict, count, y, height) in [(upper, above, 0.0, edge), (lower, below, edge, HEIGHT - edge)] {
            let (width, height) = ((width - GAP).max(0.0), (height - GAP).max(0.0));
            if count > 0 {
                let roomy = width > 78.0 && height > 36.0;
                let percent = percent(Some(share(count, n)));
                let tile =
                    Tile { verdict, x: px(x), y: px(y), width: px(width), height: px(height), count, percent, roomy };
                tiles.push(tile);
            }
        }
    }
    Mosaic { title: title.to_string(), width: WIDTH, height: HEIGHT, n, tiles, split: px(split) }
}

/// Two distributions over one axis, and a threshold.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Histogram {
    pub(crate) title: String,
    pub(crate) width: f64,
    pub(crate) height: f64,
    pub(crate) base: f64,
    pub(crate) ticks: Vec<Tick>,
    pub(crate) series: Vec<Area>,
    pub(crate) threshold: f64,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Area {
    pub(crate) name: String,
    /// Suffix of the style sheet's class.
    pub(crate) class: &'static str,
    pub(crate) path: String,
    pub(crate) n: usize,
    /// Share of the values at or above the threshold.
    pub(crate) above: String,
}

/// Values of one distribution: legend, class, values.
pub(crate) type Sample = (&'static str, &'static str, Vec<f64>);

/// Histograms over one common axis, so that they can be compared: `panels` are title and samples.
pub(crate) fn histograms(panels: &[(String, Vec<Sample>)], threshold: f64) -> Vec<Histogram> {
    const WIDTH: f64 = 430.0;
    const HEIGHT: f64 = 200.0;
    const BINS: usize = 48;
    let all = || panels.iter().flat_map(|(_, s)| s).flat_map(|(_, _, v)| v).copied().chain([threshold]);
    let (low, high) = all().filter(|v| v.is_finite()).fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
    if low >= high {
        return Vec::new();
    }
    let marks = ticks(low, high, 6);
    let (low, high) = (marks[0], marks[marks.len() - 1]);
    let base = HEIGHT - 24.0;
    let x = Scale { from: (low, high), to: (8.0, WIDTH - 8.0) };
    let bins = |values: &[f64]| {
        let mut counts = [0usize; BINS];
        for v in values.iter().filter(|v| v.is_finite()) {
            counts[(((v - low) / (high - low) * BINS as f64) as usize).min(BINS - 1)] += 1;
        }
        counts
    };
    let tallest = panels.iter().flat_map(|(_, s)| s).flat_map(|(_, _, v)| bins(v)).max().unwrap_or(1).max(1);
    let y = Scale { from: (0.0, tallest as f64), to: (base, 18.0) };
    let area = |(name, class, values): &Sample| {
        let mut path = format!("M{} {base}", x.at(low));
        for (i, count) in bins(values).iter().enumerate() {
            let edge = |i: usize| x.at(low + (high - low) * i as f64 / BINS as f64);
            path += &format!("L{} {1}L{2} {1}", edge(i), y.at(*count as f64), edge(i + 1));
        }
        path += &format!("L{} {base}Z", x.at(high));
        let above = values.iter().filter(|v| **v >= threshold).count();
        let above = (!values.is_empty()).then(|| above as f64 / values.len() as f64);
        Area { name: name.to_string(), class, path, n: values.len(), above: percent(above) }
    };
    let draw = |(title, samples): &(String, Vec<Sample>)| Histogram {
        title: title.clone(),
        width: WIDTH,
        height: HEIGHT,
        base,
        ticks: labelled(&marks, x),
        series: samples.iter().map(area).collect(),
        threshold: x.at(threshold),
    };
    panels.iter().map(draw).collect()
}

/// Values over steps.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Lines {
    pub(crate) title: String,
    pub(crate) width: f64,
    pub(crate) height: f64,
    pub(crate) left: f64,
    pub(crate) base: f64,
    pub(crate) x_ticks: Vec<Tick>,
    pub(crate) y_ticks: Vec<Tick>,
    pub(crate) series: Vec<Line>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Line {
    pub(crate) name: String,
    /// Which of the style sheet's series colours.
    pub(crate) colour: usize,
    /// As measured, and its running mean.
    pub(crate) raw: String,
    pub(crate) mean: String,
}

/// Steps and values of one curve.
pub(crate) type Curve = (String, Vec<(u64, f64)>);

/// Curves of one panel, coloured from `first` on; none if nothing finite is there.
pub(crate) fn lines(title: &str, curves: &[Curve], first: usize) -> Option<Lines> {
    const COLOURS: usize = 5;
    const WIDTH: f64 = 290.0;
    const HEIGHT: f64 = 180.0;
    const LEFT: f64 = 38.0;
    const BASE: f64 = HEIGHT - 22.0;
    let points = || curves.iter().flat_map(|(_, points)| points).filter(|(_, v)| v.is_finite());
    let last = points().map(|(step, _)| *step).max()?;
    let (low, high) = points().fold((f64::MAX, f64::MIN), |(l, h), (_, v)| (l.min(*v), h.max(*v)));
    let (marks, steps) = (ticks(low, high, 4), ticks(0.0, last.max(1) as f64, 4));
    let y = Scale { from: (marks[0], marks[marks.len() - 1]), to: (BASE, 10.0) };
    let x = Scale { from: (0.0, last.max(1) as f64), to: (LEFT, WIDTH - 6.0) };
    let polyline = |points: &[(u64, f64)]| {
        let places =
            points.iter().filter(|(_, v)| v.is_finite()).map(|(s, v)| format!("{},{}", x.at(*s as f64), y.at(*v)));
        places.collect::<Vec<_>>().join(" ")
    };
    let draw = |(place, (name, points)): (usize, &Curve)| Line {
        name: name.clone(),
        colour: (first + place) % COLOURS,
        raw: polyline(points),
        mean: polyline(&running_mean(points)),
    };
    let inside: Vec<f64> = steps.into_iter().filter(|step| *step <= last.max(1) as f64).collect();
    Some(Lines {
        title: title.to_string(),
        width: WIDTH,
        height: HEIGHT,
        left: LEFT,
        base: BASE,
        x_ticks: labelled(&inside, x),
        y_ticks: labelled(&marks, y),
        series: curves.iter().enumerate().map(draw).collect(),
    })
}

/// Mean over the finite neighbours within an eighth of the curve: a step's own value is one batch's luck.
fn running_mean(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let finite: Vec<(u64, f64)> = points.iter().copied().filter(|(_, v)| v.is_finite()).collect();
    let reach = finite.len() / 16;
    let mean = |i: usize| {
        let window = &finite[i.saturating_sub(reach)..(i + reach + 1).min(finite.len())];
        (finite[i].0, window.iter().map(|(_, v)| v).sum::<f64>() / window.len() as f64)
    };
    (0..finite.len()).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_data() {
        assert_eq!(ticks(0.0, 16.1, 3), [0.0, 10.0, 20.0]);
        assert_eq!(ticks(-1.2, 3.4, 5), [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(ticks(2.0, 2.0, 2).len(), 3, "one value has room around it");
    }

    #[test]
    fn mosaic_areas_are_the_counts() {
        let mosaic = mosaic("before", Cells { sound: 60, reward: 20, policy: 5, coupled: 15 });
        assert_eq!(mosaic.n, 100);
        let total: f64 = mosaic.width * mosaic.height;
        for tile in &mosaic.tiles {
            // The gap between tiles takes a little from each side.
            let share = (tile.width + 2.0) * (tile.height + 2.0) / total;
            let expected = tile.count as f64 / 100.0;
            assert!((share - expected).abs() <= 0.005, "{}: {share} for {expected}", tile.verdict);
        }
        assert_eq!(super::mosaic("none", Cells::default()).tiles.len(), 0);
    }

    #[test]
    fn histograms_share_an_axis_and_count_what_is_above() {
        let sample = |values: Vec<f64>| vec![("harmful", "bad", values)];
        let panels =
            [("before".to_string(), sample(vec![1.0, 2.0, 3.0])), ("after".to_string(), sample(vec![-3.0; 4]))];
        let drawn = histograms(&panels, 1.5);
        assert_eq!(drawn[0].series[0].above, "66.7");
        assert_eq!(drawn[1].series[0].above, "0.0");
        assert_eq!(drawn[0].threshold, drawn[1].threshold);
        assert!(histograms(&[], 0.0).is_empty(), "nothing to show");
    }

    #[test]
    fn curves_leave_out_what_is_not_finite() {
        let drawn = lines("loss", &[("npo".into(), vec![(1, 1.0), (2, f64::NAN), (3, 2.0)])], 0).unwrap();
        assert_eq!(drawn.series[0].raw.split(' ').count(), 2);
        assert!(lines("none", &[("npo".into(), vec![(1, f64::NAN)])], 0).is_none());
    }
}
