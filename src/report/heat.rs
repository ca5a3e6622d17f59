//! Heat maps: what happened in each cell of two named axes.

use std::collections::{BTreeMap, BTreeSet};

use minijinja::{Value, context};

use super::numbers::number;

/// Sum and number of the observations per (row, column).
pub(super) type Grid = BTreeMap<(String, String), (f64, u64)>;

/// Adds one observation.
pub(super) fn add(grid: &mut Grid, row: &str, column: &str, hit: bool) {
    let cell = grid.entry((row.to_string(), column.to_string())).or_default();
    *cell = (cell.0 + f64::from(u8::from(hit)), cell.1 + 1);
}

/// Draws the grids that are not empty, over common axes and one common scale, so that they can be compared. A cell shows the
/// sum of its observations, or with `mean` their rate.
pub(super) fn heats(before: &Grid, after: &Grid, mean: bool) -> Vec<Value> {
    let keys = || before.keys().chain(after.keys());
    let rows: Vec<&String> = keys().map(|(row, _)| row).collect::<BTreeSet<_>>().into_iter().collect();
    let columns: Vec<&String> = keys().map(|(_, column)| column).collect::<BTreeSet<_>>().into_iter().collect();
    let value = |(sum, n): (f64, u64)| if mean { sum / n as f64 } else { sum };
    let hottest = before.values().chain(after.values()).map(|cell| value(*cell)).fold(0.0, f64::max);
    let longest = |names: &[&String]| names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as f64;
    let (left, top) = ((longest(&rows) * 6.4 + 10.0).min(130.0), (longest(&columns) * 5.2 + 14.0).min(90.0));
    let side = ((430.0 - left) / columns.len() as f64).min(26.0);
    let draw = |(title, grid): (&str, &Grid)| {
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
    [("before", before), ("after", after)].into_iter().filter(|(_, grid)| !grid.is_empty()).map(draw).collect()
}
