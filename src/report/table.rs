//! Tables for terminals and for Markdown.

use std::fmt::Write;

use console::{measure_text_width, truncate_str};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// How a cell stands out; plain text stays readable without it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mark {
    #[default]
    None,
    Good,
    Bad,
    Strong,
    Dim,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Cell {
    pub(crate) text: String,
    pub(crate) mark: Mark,
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell { text: text.into(), mark: Mark::None }
    }
}

impl Cell {
    pub(crate) fn new(text: impl Into<String>, mark: Mark) -> Cell {
        Cell { text: text.into(), mark }
    }
}

/// Where a table goes: how wide that is, and whether it shows colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Style {
    /// In columns of one character; `None` where lines have no end (files, pipes).
    pub(crate) width: Option<usize>,
    pub(crate) colour: bool,
}

impl Style {
    pub(crate) const PLAIN: Style = Style { width: None, colour: false };

    /// For the standard error stream, as everything that is not a result: width of the terminal, colours unless `NO_COLOR` is
    /// set to something.
    pub(crate) fn stderr() -> Style {
        Style::of(&console::Term::stderr())
    }

    pub(crate) fn stdout() -> Style {
        Style::of(&console::Term::stdout())
    }

    fn of(terminal: &console::Term) -> Style {
        if !terminal.is_term() {
            return Style::PLAIN;
        }
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        Style { width: terminal.size_checked().map(|(_, columns)| usize::from(columns)), colour: !no_colour && !dumb }
    }
}

/// Rows of cells under named columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) columns: Vec<(String, Align)>,
    pub(crate) rows: Vec<Vec<Cell>>,
}

/// Between two columns.
const GAP: usize = 2;
/// Text narrower than this says nothing any more.
const NARROWEST: usize = 12;

impl Table {
    pub(crate) fn new(columns: &[(&str, Align)]) -> Table {
        Table { columns: columns.iter().map(|(name, align)| (name.to_string(), *align)).collect(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty, surplus ones are left out.
    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        let mut cells = cells;
        cells.resize_with(self.columns.len(), || Cell::from(""));
        self.rows.push(cells);
    }

    /// Leaves out the columns in which no row says anything (`–` is nothing). The first column stays.
    pub(crate) fn without_empty_columns(mut self) -> Table {
        let says = |cell: &Cell| !matches!(cell.text.as_str(), "" | "–");
        let keep: Vec<bool> =
            (0..self.columns.len()).map(|i| i == 0 || self.rows.iter().any(|row| says(&row[i]))).collect();
        let mut kept = keep.iter();
        self.columns.retain(|_| *kept.next().unwrap_or(&true));
        for row in &mut self.rows {
            let mut kept = keep.iter();
            row.retain(|_| *kept.next().unwrap_or(&true));
        }
        self
    }

    /// Aligned lines. Columns that do not fit beside each other follow below, each block led by the first column again; text
    /// that is wider than the terminal by itself is cut.
    pub(crate) fn render(&self, style: Style) -> String {
        let widths = self.widths(style.width);
        let blocks = blocks(&widths, style.width);
        let rendered: Vec<String> = blocks.iter().map(|block| self.block(block, &widths, style)).collect();
        rendered.join("\n")
    }

    /// The widest cell of each column; the widest text column gives way if it alone can make the table fit.
    fn widths(&self, limit: Option<usize>) -> Vec<usize> {
        let widest = |i: usize| {
            let cells = self.rows.iter().map(|row| measure_text_width(&row[i].text));
            cells.chain([measure_text_width(&self.columns[i].0)]).max().unwrap_or(0)
        };
        let mut widths: Vec<usize> = (0..self.columns.len()).map(widest).collect();
        let Some(limit) = limit else { return widths };
        let total = widths.iter().map(|width| width + GAP).sum::<usize>().saturating_sub(GAP);
        let texts = (0..widths.len()).filter(|i| self.columns[*i].1 == Align::Left);
        if let Some(text) = texts.max_by_key(|i| widths[*i]) {
            let room = (limit + widths[text]).saturating_sub(total);
            if total > limit && room >= NARROWEST {
                widths[text] = room;
            }
        }
        widths.iter().map(|width| (*width).min(limit.max(1))).collect()
    }

    fn block(&self, block: &[usize], widths: &[usize], style: Style) -> String {
        let mut out = String::new();
        let header = block.iter().map(|i| (*i, self.columns[*i].0.as_str(), Mark::Strong));
        self.line(&mut out, header, widths, style);
        let rule: Vec<String> = block.iter().map(|i| "─".repeat(widths[*i])).collect();
        let _ = writeln!(out, "{}", paint(&rule.join(&" ".repeat(GAP)), Mark::Dim, style.colour));
        for row in &self.rows {
            let cells = block.iter().map(|i| (*i, row[*i].text.as_str(), row[*i].mark));
            self.line(&mut out, cells, widths, style);
        }
        out
    }

    fn line<'a>(
        &self,
        out: &mut String,
        cells: impl Iterator<Item = (usize, &'a str, Mark)>,
        widths: &[usize],
        style: Style,
    ) {
        let mut line = String::new();
        for (place, (i, text, mark)) in cells.enumerate() {
            // A cell is one line, whatever a model wrote into it.
            let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            let text = truncate_str(&text, widths[i], "…");
            let pad = " ".repeat(widths[i].saturating_sub(measure_text_width(&text)));
            let gap = if place > 0 { " ".repeat(GAP) } else { String::new() };
            let text = paint(&text, mark, style.colour);
            match self.columns[i].1 {
                Align::Left => line.extend([gap, text, pad]),
                Align::Right => line.extend([gap, pad, text]),
            }
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
}

/// Which columns stand beside each other; every block begins with the first.
fn blocks(widths: &[usize], limit: Option<usize>) -> Vec<Vec<usize>> {
    let (mut blocks, mut block) = (Vec::new(), Vec::new());
    let mut used = 0;
    for (i, width) in widths.iter().enumerate() {
        let full = limit.is_some_and(|limit| used + GAP + width > limit);
        // A block holds at least one column beside the first, or it would never end.
        if full && block.len() > 1 {
            used = widths[0];
            blocks.push(std::mem::replace(&mut block, vec![0]));
        }
        used += width + if i > 0 { GAP } else { 0 };
        block.push(i);
    }
    blocks.push(block);
    blocks
}

fn paint(text: &str, mark: Mark, colour: bool) -> String {
    let code = match mark {
        _ if !colour => return text.to_string(),
        Mark::None => return text.to_string(),
        Mark::Good => "32",
        Mark::Bad => "31",
        Mark::Strong => "1",
        Mark::Dim => "2",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&[("method", Align::Left), ("CFR %", Align::Right), ("steps", Align::Right)]);
        table.row(vec!["before".into(), Cell::new("13.9", Mark::Bad), "–".into()]);
        table.row(vec!["joint é".into(), Cell::new("1.8", Mark::Strong), "80".into()]);
        table
    }

    #[test]
    fn columns_are_aligned() {
        let expected = "method   CFR %  steps\n───────  ─────  ─────\nbefore    13.9      –\njoint é    1.8     80\n";
        assert_eq!(table().render(Style::PLAIN), expected);
    }

    #[test]
    fn a_narrow_terminal_gets_blocks_led_by_the_first_column() {
        let text = table().render(Style { width: Some(15), colour: false });
        assert!(text.lines().all(|line| measure_text_width(line) <= 15), "{text}");
        assert_eq!(text.matches("joint é").count(), 2, "{text}");
        assert!(text.contains("13.9") && text.contains("80"), "{text}");
    }

    #[test]
    fn a_wide_text_gives_way_before_columns_do() {
        let mut table = Table::new(&[("prompt", Align::Left), ("r", Align::Right)]);
        table.row(vec!["a text that goes on\nand on and on".into(), "1.5".into()]);
        let text = table.render(Style { width: Some(22), colour: false });
        assert!(text.lines().all(|line| measure_text_width(line) <= 22), "{text}");
        assert!(text.contains('…') && text.contains("1.5"), "{text}");
        assert_eq!(text.lines().count(), 3, "a line break in a cell must not break the table: {text}");
    }

    #[test]
    fn the_narrowest_terminal_still_ends() {
        for width in 0..12 {
            table().render(Style { width: Some(width), colour: true });
        }
    }

    #[test]
    fn colours_only_where_asked() {
        assert!(!table().render(Style::PLAIN).contains('\x1b'));
        assert!(table().render(Style { width: None, colour: true }).contains("\x1b[31m13.9\x1b[0m"));
    }

    #[test]
    fn columns_without_a_word_are_left_out() {
        let mut table = Table::new(&[("method", Align::Left), ("a", Align::Right), ("b", Align::Right)]);
        table.row(vec!["x".into(), "–".into(), "1".into()]);
        let names: Vec<_> = table.without_empty_columns().columns.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["method", "b"]);
    }
}
