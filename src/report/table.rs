//! Tables for terminals and pages.

use console::measure_text_width;
use serde::Serialize;

use crate::error::visible;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Align {
    Left,
    Right,
}

/// How a cell stands out; plain text stays readable without it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mark {
    #[default]
    None,
    Good,
    Bad,
    Strong,
    Dim,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Cell {
    pub(crate) text: String,
    pub(crate) mark: Mark,
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell::new(text, Mark::None)
    }
}

impl Cell {
    pub(crate) fn new(text: impl Into<String>, mark: Mark) -> Cell {
        Cell { text: visible(&text.into()), mark }
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

    /// Takes the terminal's width, and colours unless `NO_COLOR` is set to something.
    pub(crate) fn of(terminal: &console::Term) -> Style {
        if !terminal.is_term() {
            return Style::PLAIN;
        }
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        Style { width: terminal.size_checked().map(|(_, columns)| usize::from(columns)), colour: !no_colour && !dumb }
    }
}

/// Rows of cells under named columns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Table {
    pub(crate) columns: Vec<(String, Align)>,
    pub(crate) rows: Vec<Vec<Cell>>,
}

/// A column: its name, on which side its cells stand, and what it shows of a row's subject.
pub(crate) type Column<'a, T> = (&'a str, Align, &'a dyn Fn(&T) -> Cell);

/// Between two columns.
const GAP: usize = 2;
/// Text narrower than this says nothing any more.
const NARROWEST: usize = 12;
/// Where lines have no end, text is wrapped here all the same.
const PAGE: usize = 100;

impl Table {
    pub(crate) fn new(columns: &[(&str, Align)]) -> Table {
        Table { columns: columns.iter().map(|(name, align)| (name.to_string(), *align)).collect(), rows: Vec::new() }
    }

    /// Makes a table with one row for each of `items`.
    pub(crate) fn of<T>(items: impl IntoIterator<Item = T>, columns: &[Column<T>]) -> Table {
        let mut table = Table::new(&columns.iter().map(|(name, align, _)| (*name, *align)).collect::<Vec<_>>());
        items.into_iter().for_each(|item| table.row(columns.iter().map(|(.., show)| show(&item)).collect()));
        table
    }

    /// Adds a row; missing cells are empty, surplus ones are left out.
    pub(crate) fn row(&mut self, mut cells: Vec<Cell>) {
        cells.resize_with(self.columns.len(), || Cell::from(""));
        self.rows.push(cells);
    }

    /// Leaves out the columns in which no row says anything (`–` is nothing). The first column stays.
    pub(crate) fn without_empty_columns(mut self) -> Table {
        let says = |cell: &Cell| !matches!(cell.text.as_str(), "" | "–");
        for i in (1..self.columns.len()).rev() {
            if !self.rows.iter().any(|row| says(&row[i])) {
                self.columns.remove(i);
                self.rows.iter_mut().for_each(|row| drop(row.remove(i)));
            }
        }
        self
    }

    /// Renders aligned lines. Columns that do not fit beside each other follow below, each block led by the first column again.
    pub(crate) fn render(&self, style: Style) -> String {
        let widths = self.widths(style.width);
        let names: Vec<Cell> = self.columns.iter().map(|(name, _)| Cell::new(name, Mark::Strong)).collect();
        let rule: Vec<Cell> = widths.iter().map(|width| Cell::new("─".repeat(*width), Mark::Dim)).collect();
        let block = |block: Vec<usize>| -> String {
            let rows = [&names, &rule].into_iter().chain(&self.rows);
            rows.map(|row| self.line(row, &block, &widths, style.colour)).collect()
        };
        blocks(&widths, style.width).into_iter().map(block).collect::<Vec<_>>().join("\n")
    }

    /// Measures the widest cell of each column; the widest text column is wrapped if that makes the table fit.
    fn widths(&self, limit: Option<usize>) -> Vec<usize> {
        let widest = |i: usize| {
            let cells = self.rows.iter().map(|row| measure_text_width(&row[i].text));
            cells.chain([measure_text_width(&self.columns[i].0)]).max().unwrap_or(0)
        };
        let mut widths: Vec<usize> = (0..self.columns.len()).map(widest).collect();
        let total = widths.iter().map(|width| width + GAP).sum::<usize>().saturating_sub(GAP);
        let texts = (0..widths.len()).filter(|i| self.columns[*i].1 == Align::Left);
        if let Some(text) = texts.max_by_key(|i| widths[*i]) {
            let room = (limit.unwrap_or(PAGE) + widths[text]).saturating_sub(total);
            if room < widths[text] && room >= NARROWEST {
                widths[text] = room;
            }
        }
        widths.iter().map(|width| limit.map_or(*width, |limit| (*width).min(limit.max(1)))).collect()
    }

    /// Renders one row, as many lines high as its highest cell.
    fn line(&self, row: &[Cell], block: &[usize], widths: &[usize], colour: bool) -> String {
        let wrapped: Vec<Vec<String>> = block.iter().map(|&i| wrap(&row[i].text, widths[i])).collect();
        let mut out = String::new();
        for k in 0..wrapped.iter().map(Vec::len).max().unwrap_or(0) {
            let cell = |(&i, lines): (&usize, &Vec<String>)| {
                let text = lines.get(k).map_or("", String::as_str);
                let pad = " ".repeat(widths[i].saturating_sub(measure_text_width(text)));
                let text = paint(text, row[i].mark, colour);
                if self.columns[i].1 == Align::Left { text + &pad } else { pad + &text }
            };
            let line = block.iter().zip(&wrapped).map(cell).collect::<Vec<_>>().join(&" ".repeat(GAP));
            out.extend([line.trim_end(), "\n"]);
        }
        out
    }
}

/// Decides which columns stand beside each other; every block begins with the first.
fn blocks(widths: &[usize], limit: Option<usize>) -> Vec<Vec<usize>> {
    let (mut blocks, mut block, mut used) = (Vec::new(), vec![0], widths[0]);
    for (i, width) in widths.iter().enumerate().skip(1) {
        // A block holds at least one column beside the first, or it would never end.
        if limit.is_some_and(|limit| used + GAP + width > limit) && block.len() > 1 {
            used = widths[0];
            blocks.push(std::mem::replace(&mut block, vec![0]));
        }
        used += GAP + width;
        block.push(i);
    }
    blocks.push(block);
    blocks
}

/// Breaks text at blanks into lines of at most `width`; a word that is wider by itself is broken too. A cell's own line breaks
/// are blanks, whatever a model wrote into it.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if measure_text_width(&text) <= width {
        return vec![text];
    }
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        for (i, piece) in word.chars().collect::<Vec<_>>().chunks(width.max(1)).enumerate() {
            let piece: String = piece.iter().collect();
            match lines.last_mut() {
                Some(line) if line.is_empty() => *line = piece,
                Some(line) if i == 0 && measure_text_width(line) + 1 + measure_text_width(&piece) <= width => {
                    line.extend([" ", &piece]);
                }
                _ => lines.push(piece),
            }
        }
    }
    lines
}

fn paint(text: &str, mark: Mark, colour: bool) -> String {
    let code = match mark {
        _ if !colour || text.is_empty() => return text.to_string(),
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
    fn columns_are_aligned_and_coloured_only_where_asked() {
        let expected = "method   CFR %  steps\n───────  ─────  ─────\nbefore    13.9      –\njoint é    1.8     80\n";
        assert_eq!(table().render(Style::PLAIN), expected);
        assert!(table().render(Style { width: None, colour: true }).contains("\x1b[31m13.9\x1b[0m"));
    }

    #[test]
    fn a_narrow_terminal_gets_blocks_led_by_the_first_column() {
        let text = table().render(Style { width: Some(15), colour: false });
        assert!(text.lines().all(|line| measure_text_width(line) <= 15), "{text}");
        assert_eq!(text.matches("joint é").count(), 2, "{text}");
        assert!(text.contains("13.9") && text.contains("80"), "{text}");
        (0..12).for_each(|width| drop(table().render(Style { width: Some(width), colour: true }))); // ends
    }

    #[test]
    fn a_wide_text_is_wrapped_to_the_terminal_and_in_a_pipe_to_a_page() {
        let mut table = Table::new(&[("found", Align::Left), ("r", Align::Right)]);
        table.row(vec!["a text that goes on\nand on and on".into(), "1.5".into()]);
        let line = |text: &str, r: &str| format!("{text:17}  {r:>3}").trim_end().to_string() + "\n";
        let (rule, r) = ("─".repeat(17), "───");
        let expected =
            [line("found", "r"), line(&rule, r), line("a text that goes", "1.5"), line("on and on and on", "")];
        assert_eq!(table.render(Style { width: Some(22), colour: false }), expected.concat());
        table.row(vec!["word ".repeat(50).into(), "2".into()]);
        let text = table.render(Style::PLAIN);
        assert!(text.lines().all(|line| measure_text_width(line) <= PAGE), "{text}");
        assert_eq!(text.matches("word").count(), 50, "nothing is lost: {text}");
        assert_eq!(wrap("in /a/long/path here", 8), ["in", "/a/long/", "path", "here"]);
    }

    #[test]
    fn columns_without_a_word_are_left_out() {
        let mut table = Table::new(&[("method", Align::Left), ("a", Align::Right), ("b", Align::Right)]);
        table.row(vec!["x".into(), "–".into(), "1".into()]);
        let names: Vec<_> = table.without_empty_columns().columns.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["method", "b"]);
    }
}
