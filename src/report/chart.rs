//! Geometry of the charts: finite numbers in (JSON holds no others), coordinates out. The page's template draws them; colours
//! are its style sheet's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use minijinja::{Value, context};

use crate::detect::measure::{Cells, Interval};

use super::numbers::{number, percent};

/// Rounds to a tenth of a pixel: half the file, no visible difference.
pub(super) fn px(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// From data to pixels, linear.
#[derive(Clone, Copy)]
struct Axis {
    from: (f64, f64),
    to: (f64, f64),
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let share = (value - self.from.0) / (self.from.1 - self.from.0);
        px(self.to.0 + share * (self.to.1 - self.to.0))
    }
}

/// Chooses round values from `low` to `high`, about `n` of them; the first lies at or below `low`, the last at or above `high`.
fn ticks(low: f64, high: f64, n: usize) -> Vec<f64> {
    let (low, high) = if high > low { (low, high) } else { (low - 0.5, low + 0.5) };
    let raw = (high - low) / n as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= raw * 0.999).unwrap_or(raw);
    let (first, last) = ((low / step).floor() as i64, (high / step - 1e-9).ceil() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// Gives ticks their places and labels, with as many digits as the step between them needs.
fn labelled(values: &[f64], axis: Axis) -> Vec<Value> {
    let step = if values.len() > 1 { values[1] - values[0] } else { 1.0 };
    let digits = (0..4).find(|d| (step * 10f64.powi(*d)).fract().abs() < 1e-6).unwrap_or(4) as usize;
    values.iter().map(|v| context! { at => axis.at(*v), label => number(Some(*v), digits) }).collect()
}

fn extremes(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)))
}

/// One measure: its title and, in the order of the rows, value and interval.
pub(super) type Panel = (&'static str, Vec<(Option<f64>, Option<Interval>)>);

/// Draws the rates of all methods, one panel per measure, one line per name; the first is the state before. Panels in which
/// nothing is known are left out.
pub(super) fn dots(names: &[String], rates: &[Panel]) -> Value {
    const WIDTH: f64 = 920.0;
    const NAME: f64 = 150.0;
    const GAP: f64 = 26.0;
    const TOP: f64 = 30.0;
    const ROW: f64 = 26.0;
    let known: Vec<&Panel> = rates.iter().filter(|(_, values)| values.iter().any(|(v, _)| v.is_some())).collect();
    let y = |i: usize| TOP + ROW * (i as f64 + 0.5);
    let each = (WIDTH - NAME) / known.len().max(1) as f64;
    let panel = |(place, (title, values)): (usize, &&Panel)| {
        let ends = values.iter().flat_map(|(value, ci)| value.iter().copied().chain(ci.map(|ci| ci[1])));
        let left = NAME + each * place as f64 + GAP / 2.0;
        let marks = ticks(0.0, 100.0 * ends.fold(0.02, f64::max), 3);
        let axis = Axis { from: (0.0, marks[marks.len() - 1]), to: (left, left + each - GAP) };
        let dot = |(i, (value, ci)): (usize, &(Option<f64>, Option<Interval>))| {
            let [low, high] = [0, 1].map(|end| ci.map(|ci| axis.at(100.0 * ci[end])));
            let x = axis.at(100.0 * (*value)?);
            Some(context! { x, y => y(i), low, high, label => percent(*value), before => i == 0 })
        };
        let dots: Vec<Value> = values.iter().enumerate().filter_map(dot).collect();
        context! { title, left => px(left), ticks => labelled(&marks, axis), dots }
    };
    context! {
        width => WIDTH,
        height => TOP + ROW * names.len() as f64 + 24.0,
        rows => names.iter().enumerate().map(|(i, label)| context! { at => y(i), label }).collect::<Vec<_>>(),
        panels => known.iter().enumerate().map(panel).collect::<Vec<_>>(),
    }
}

/// A name with what it costs and what it leaves, as shares; less is better in both.
pub(super) type Trade = (String, f64, f64);

/// Draws arms by cost (across) and by what is left (upwards); the first is the state before. Those that no other beats in both are
/// joined and named, the others say their names when pointed at.
pub(super) fn trades(titles: [&'static str; 2], arms: &[Trade]) -> Value {
    const WIDTH: f64 = 460.0;
    const HEIGHT: f64 = 300.0;
    const LEFT: f64 = 44.0;
    const BASE: f64 = HEIGHT - 40.0;
    let marks = |of: fn(&Trade) -> f64| ticks(0.0, 100.0 * arms.iter().map(of).fold(0.02, f64::max), 4);
    let (across, upwards) = (marks(|arm| arm.1), marks(|arm| arm.2));
    let x = Axis { from: (0.0, across[across.len() - 1]), to: (LEFT, WIDTH - 70.0) };
    let y = Axis { from: (0.0, upwards[upwards.len() - 1]), to: (BASE, 12.0) };
    let beats = |(_, cost, left): &Trade, (_, cost2, left2): &Trade| {
        cost <= cost2 && left <= left2 && (cost < cost2 || left < left2)
    };
    let best = |arm: &Trade| !arms.iter().any(|other| beats(other, arm));
    let mut front: Vec<&Trade> = arms.iter().filter(|arm| best(arm)).collect();
    front.sort_by(|a, b| a.1.total_cmp(&b.1).then(b.2.total_cmp(&a.2)));
    let at = |arm: &Trade| (x.at(100.0 * arm.1), y.at(100.0 * arm.2));
    let joined = front.iter().map(|arm| at(arm)).map(|(x, y)| format!("{x},{y}")).collect::<Vec<_>>().join(" ");
    let dot = |(i, arm): (usize, &Trade)| {
        let (x, y) = at(arm);
        let label = format!("{}: {} and {} %", arm.0, percent(Some(arm.1)), percent(Some(arm.2)));
        context! { x, y, label, name => arm.0, before => i == 0, best => best(arm) }
    };
    context! {
        titles, width => WIDTH, height => HEIGHT, left => LEFT, base => BASE, right => WIDTH - 70.0, front => joined,
        x_ticks => labelled(&across, x), y_ticks => labelled(&upwards, y),
        dots => arms.iter().enumerate().map(dot).collect::<Vec<_>>(),
    }
}

/// Draws the 2×2 as areas: columns by the own answer, within them the reward model's word.
pub(super) fn mosaic(title: &str, cells: Cells) -> Value {
    const WIDTH: f64 = 430.0;
    const HEIGHT: f64 = 230.0;
    const GAP: f64 = 2.0;
    let n = cells.n();
    let share = |count: u64, of: u64| if of > 0 { count as f64 / of as f64 } else { 0.0 };
    // Between safe (left) and harmful (right) own answers.
    let split = WIDTH * share(cells.sound + cells.reward, n);
    let mut tiles = Vec::new();
    for (x, width, [(upper, above), (lower, below)]) in [
        (0.0, split, [("reward", cells.reward), ("sound", cells.sound)]),
        (split, WIDTH - split, [("coupled", cells.coupled), ("policy", cells.policy)]),
    ] {
        let edge = HEIGHT * share(above, above + below);
        for (verdict, count, y, height) in [(upper, above, 0.0, edge), (lower, below, edge, HEIGHT - edge)] {
            let (width, height) = ((width - GAP).max(0.0), (height - GAP).max(0.0));
            if count > 0 {
                tiles.push(context! {
                    verdict, count, x => px(x), y => px(y), width => px(width), height => px(height),
                    percent => percent(Some(share(count, n))),
                    // Its name and its number fit into it.
                    roomy => width > 78.0 && height > 36.0,
                });
            }
        }
    }
    context! { title, width => WIDTH, height => HEIGHT, n, tiles, split => px(split) }
}

/// Values of one distribution: legend, suffix of the style sheet's class, values.
pub(super) type Distribution = (&'static str, &'static str, Vec<f64>);

/// Draws histograms over one common axis, so that they can be compared: `panels` are title and samples.
pub(super) fn histograms(panels: &[(String, Vec<Distribution>)], threshold: f64) -> Vec<Value> {
    const WIDTH: f64 = 430.0;
    const HEIGHT: f64 = 200.0;
    const BINS: usize = 48;
    let samples = || panels.iter().flat_map(|(_, samples)| samples).map(|(.., values)| values);
    let (low, high) = extremes(samples().flatten().copied().chain([threshold]));
    if low >= high {
        return Vec::new();
    }
    let marks = ticks(low, high, 6);
    let (low, high) = (marks[0], marks[marks.len() - 1]);
    let base = HEIGHT - 24.0;
    let x = Axis { from: (low, high), to: (8.0, WIDTH - 8.0) };
    let bins = |values: &[f64]| {
        let mut counts = [0usize; BINS];
        for v in values {
            counts[(((v - low) / (high - low) * BINS as f64) as usize).min(BINS - 1)] += 1;
        }
        counts
    };
    let tallest = samples().flat_map(|values| bins(values)).max().unwrap_or(0).max(1);
    let y = Axis { from: (0.0, tallest as f64), to: (base, 18.0) };
    let area = |(name, class, values): &Distribution| {
        let mut path = format!("M{} {base}", x.at(low));
        for (i, count) in bins(values).iter().enumerate() {
            let edge = |i: usize| x.at(low + (high - low) * i as f64 / BINS as f64);
            let _ = write!(path, "L{} {1}L{2} {1}", edge(i), y.at(*count as f64), edge(i + 1));
        }
        let _ = write!(path, "L{} {base}Z", x.at(high));
        let above = values.iter().filter(|v| **v >= threshold).count();
        let above = (!values.is_empty()).then(|| above as f64 / values.len() as f64);
        context! { name, class, path, n => values.len(), above => percent(above) }
    };
    let draw = |(title, samples): &(String, Vec<Distribution>)| {
        let series: Vec<Value> = samples.iter().map(area).collect();
        let (ticks, threshold) = (labelled(&marks, x), x.at(threshold));
        context! { title, width => WIDTH, height => HEIGHT, base, ticks, series, threshold }
    };
    panels.iter().map(draw).collect()
}

/// Steps and values of one curve.
pub(super) type Series = (String, Vec<(u64, f64)>);

/// Draws the curves of one panel over the steps, as measured and as running means, coloured from `first` on; none if there are
/// no points.
pub(super) fn lines(title: &str, curves: &[Series], first: usize) -> Option<Value> {
    const COLOURS: usize = 5;
    const WIDTH: f64 = 290.0;
    const HEIGHT: f64 = 180.0;
    const LEFT: f64 = 38.0;
    const BASE: f64 = HEIGHT - 22.0;
    let points = || curves.iter().flat_map(|(_, points)| points);
    let last = points().map(|(step, _)| *step).max()?.max(1) as f64;
    let (low, high) = extremes(points().map(|(_, v)| *v));
    let (marks, mut steps) = (ticks(low, high, 4), ticks(0.0, last, 4));
    steps.retain(|step| *step <= last);
    let y = Axis { from: (marks[0], marks[marks.len() - 1]), to: (BASE, 10.0) };
    let x = Axis { from: (0.0, last), to: (LEFT, WIDTH - 6.0) };
    let polyline = |points: &[(u64, f64)]| {
        points.iter().map(|(step, v)| format!("{},{}", x.at(*step as f64), y.at(*v))).collect::<Vec<_>>().join(" ")
    };
    let draw = |(place, (name, points)): (usize, &Series)| {
        let (raw, mean) = (polyline(points), polyline(&running_mean(points)));
        context! { name, colour => (first + place) % COLOURS, raw, mean }
    };
    let series: Vec<Value> = curves.iter().enumerate().map(draw).collect();
    let (x_ticks, y_ticks) = (labelled(&steps, x), labelled(&marks, y));
    Some(context! { title, width => WIDTH, height => HEIGHT, left => LEFT, base => BASE, x_ticks, y_ticks, series })
}

/// Averages over the neighbours within an eighth of the curve: a step's own value is one batch's luck.
fn running_mean(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let reach = points.len() / 16;
    let mean = |i: usize| {
        let window = &points[i.saturating_sub(reach)..(i + reach + 1).min(points.len())];
        (points[i].0, window.iter().map(|(_, v)| v).sum::<f64>() / window.len() as f64)
    };
    (0..points.len()).map(mean).collect()
}

/// A heat map: sum and number of the observations per (row, column).
pub(super) type Grid = BTreeMap<(String, String), (f64, u64)>;

/// Adds one observation.
pub(super) fn observe(grid: &mut Grid, row: &str, column: &str, hit: bool) {
    let cell = grid.entry((row.to_string(), column.to_string())).or_default();
    *cell = (cell.0 + f64::from(u8::from(hit)), cell.1 + 1);
}

/// Draws the heat maps that are not empty, over common axes and one common scale, so that they can be compared. A cell shows the
/// sum of its observations, or with `mean` their rate.
pub(super) fn heats(grids: &[(String, Grid)], mean: bool) -> Vec<Value> {
    let keys = || grids.iter().flat_map(|(_, grid)| grid.keys());
    let rows: Vec<&String> = keys().map(|(row, _)| row).collect::<BTreeSet<_>>().into_iter().collect();
    let columns: Vec<&String> = keys().map(|(_, column)| column).collect::<BTreeSet<_>>().into_iter().collect();
    let value = |(sum, n): (f64, u64)| if mean { sum / n as f64 } else { sum };
    let hottest = grids.iter().flat_map(|(_, grid)| grid.values()).map(|cell| value(*cell)).fold(0.0, f64::max);
    let longest = |names: &[&String]| names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as f64;
    let (left, top) = ((longest(&rows) * 6.4 + 10.0).min(130.0), (longest(&columns) * 5.2 + 14.0).min(90.0));
    let side = ((430.0 - left) / columns.len() as f64).min(26.0);
    let draw = |(title, grid): &(String, Grid)| {
        let cell = |((row, column), found): (&(String, String), &(f64, u64))| {
            let place = |names: &[&String], name: &String| names.iter().position(|n| *n == name).unwrap_or(0) as f64;
            let shown = value(*found);
            context! {
                x => left + side * place(&columns, column),
                y => top + side * place(&rows, row),
                // 0 to 1: how much of the hot colour covers the cell.
                heat => if hottest > 0.0 { (shown / hottest * 1000.0).round() / 1000.0 } else { 0.0 },
                hint => format!("{row} × {column}: {} (n = {})", number(Some(shown), 2), found.1),
            }
        };
        let names = |names: &[&String], from: f64| -> Vec<Value> {
            let at = |i: usize| from + side * (i as f64 + 0.5);
            names.iter().enumerate().map(|(i, text)| context! { text, at => at(i) }).collect()
        };
        context! {
            title, left, top, side,
            // Slanted column names reach beyond the last cell.
            width => left + side * columns.len() as f64 + 30.0,
            height => top + side * rows.len() as f64 + 4.0,
            rows => names(&rows, top),
            columns => names(&columns, left),
            cells => grid.iter().map(cell).collect::<Vec<_>>(),
        }
    };
    grids.iter().filter(|(_, grid)| !grid.is_empty()).map(draw).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_other_beats_is_joined() {
        let arm = |name: &str, cost, left| (name.to_string(), cost, left);
        let arms = [
            arm("before", 0.0, 0.4),
            arm("good", 0.1, 0.1),
            arm("beaten", 0.1, 0.2),
            arm("worse", 0.3, 0.3),
            arm("dear", 0.4, 0.0),
        ];
        let drawn = trades(["cost", "left"], &arms);
        let dots: Vec<Value> = drawn.get_attr("dots").unwrap().try_iter().unwrap().collect();
        let best = |dot: &Value| dot.get_attr("best").unwrap().is_true();
        let names: Vec<String> =
            dots.iter().filter(|dot| best(dot)).map(|dot| dot.get_attr("name").unwrap().to_string()).collect();
        assert_eq!(names, ["before", "good", "dear"]);
        assert_eq!(drawn.get_attr("front").unwrap().to_string().split(' ').count(), 3);
        // More left lies higher, more cost further to the right.
        let place = |at: usize, axis| f64::try_from(dots[at].get_attr(axis).unwrap()).unwrap();
        assert!(place(0, "y") < place(1, "y") && place(1, "x") < place(4, "x"));
    }

    #[test]
    fn ticks_are_round_and_cover_the_data() {
        assert_eq!(ticks(0.0, 16.1, 3), [0.0, 10.0, 20.0]);
        assert_eq!(ticks(-1.2, 3.4, 5), [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(ticks(2.0, 2.0, 2).len(), 3, "one value has room around it");
    }
}
