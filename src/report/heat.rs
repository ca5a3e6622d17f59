//! Heat maps: what happened in each cell of two named axes.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::numbers::number;

/// Sums per (row, column).
#[derive(Debug, Clone, Default)]
pub(crate) struct Grid {
    cells: BTreeMap<(String, String), (f64, u64)>,
}

impl Grid {
    /// Adds one observation.
    pub(crate) fn add(&mut self, row: &str, column: &str, value: f64) {
        let cell = self.cells.entry((row.to_string(), column.to_string())).or_default();
        *cell = (cell.0 + value, cell.1 + 1);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Heat {
    pub(crate) title: String,
    pub(crate) width: f64,
    pub(crate) height: f64,
    pub(crate) left: f64,
    pub(crate) top: f64,
    pub(crate) side: f64,
    pub(crate) rows: Vec<Name>,
    pub(crate) columns: Vec<Name>,
    pub(crate) cells: Vec<HeatCell>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Name {
    pub(crate) text: String,
    pub(crate) at: f64,
}

#[derive(Debug, Clone, Serialize)]
pub struct HeatCell {
    pub(crate) x: f64,
    pub(crate) y: f64,
    /// 0 to 1: how much of the hot colour covers the cell.
    pub(crate) heat: f64,
    pub(crate) hint: String,
}

/// What a cell's heat is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    /// Mean of the observations: a rate.
    Mean,
    /// Their sum: a count.
    Sum,
}

/// Grids over common axes and one common scale, so that they can be compared: title and grid each.
pub(crate) fn heats(grids: &[(String, Grid)], show: Show) -> Vec<Heat> {
    let keys = || grids.iter().flat_map(|(_, grid)| grid.cells.keys());
    let rows: Vec<&String> = keys().map(|(row, _)| row).collect::<BTreeSet<_>>().into_iter().collect();
    let columns: Vec<&String> = keys().map(|(_, column)| column).collect::<BTreeSet<_>>().into_iter().collect();
    if rows.is_empty() {
        return Vec::new();
    }
    let value = |(sum, n): (f64, u64)| if show == Show::Mean { sum / n as f64 } else { sum };
    let top_value = grids.iter().flat_map(|(_, grid)| grid.cells.values()).map(|cell| value(*cell)).fold(0.0, f64::max);
    let longest = |names: &[&String]| names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as f64;
    let (left, top) = ((longest(&rows) * 6.4 + 10.0).min(130.0), (longest(&columns) * 5.2 + 14.0).min(90.0));
    let side = ((430.0 - left) / columns.len() as f64).min(26.0);
    let draw = |(title, grid): &(String, Grid)| {
        let cell = |((row, column), found): (&(String, String), &(f64, u64))| {
            let place = |names: &[&String], name: &String| names.iter().position(|n| *n == name).unwrap_or(0) as f64;
            let shown = value(*found);
            HeatCell {
                x: left + side * place(&columns, column),
                y: top + side * place(&rows, row),
                heat: if top_value > 0.0 { (shown / top_value * 1000.0).round() / 1000.0 } else { 0.0 },
                hint: format!("{row} × {column}: {} (n = {})", number(Some(shown), 2), found.1),
            }
        };
        let names = |names: &[&String], from: f64| {
            let named = names.iter().enumerate();
            named.map(|(i, name)| Name { text: name.to_string(), at: from + side * (i as f64 + 0.5) }).collect()
        };
        Heat {
            title: title.clone(),
            // Slanted column names reach beyond the last cell.
            width: left + side * columns.len() as f64 + 30.0,
            height: top + side * rows.len() as f64 + 4.0,
            left,
            top,
            side,
            rows: names(&rows, top),
            columns: names(&columns, left),
            cells: grid.cells.iter().map(cell).collect(),
        }
    };
    grids.iter().map(draw).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_share_axes_and_scale() {
        let (mut before, mut after) = (Grid::default(), Grid::default());
        before.add("cheat", "plain", 1.0);
        before.add("cheat", "plain", 0.0);
        before.add("take", "leet", 1.0);
        after.add("take", "leet", 0.25);
        let drawn = heats(&[("before".into(), before), ("after".into(), after)], Show::Mean);
        assert_eq!((drawn[0].rows.len(), drawn[0].columns.len()), (2, 2));
        assert_eq!(drawn[0].cells.iter().map(|c| c.heat).collect::<Vec<_>>(), [0.5, 1.0]);
        assert_eq!(drawn[1].cells[0].heat, 0.25);
        assert_eq!((drawn[0].cells[1].x, drawn[0].cells[1].y), (drawn[1].cells[0].x, drawn[1].cells[0].y));
        assert!(heats(&[("none".into(), Grid::default())], Show::Sum).is_empty());
    }
}
