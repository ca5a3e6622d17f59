//! The tables of a result: the same rows on the terminal, in the README and in the report.

use std::collections::BTreeMap;

use crate::detect::measure::{GateResult, Measure, MethodResult, ProbeResult, Summary};

use super::numbers::{UNKNOWN, count, number, percent, percent_ci};
use super::table::{Align, Cell, Mark, Table};

/// `joint`, or `joint · seed 2` where there are several seeds.
pub(crate) fn label(method: &MethodResult, summary: &Summary) -> String {
    if summary.seeds.len() > 1 { format!("{} · seed {}", method.name, method.seed) } else { method.name.clone() }
}

/// CFR when the answer is forced to begin with the first `k` tokens of y⁻.
pub(crate) fn prefill(measure: &Measure, k: usize) -> Option<f64> {
    measure.prefill.get(&k).copied().flatten()
}

/// The main table: what each method reached. `before` comes first; a column in which nothing is known is left out.
pub(crate) fn methods(summary: &Summary) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("method", Left),
        ("CFR % [95 %]", Right),
        ("pairwise %", Right),
        ("prefill 5 %", Right),
        ("harmful %", Right),
        ("reward error %", Right),
        ("drift", Right),
        ("over-refusal %", Right),
        ("pair acc. %", Right),
        ("gates", Right),
        ("accepted", Right),
    ]);
    let best = summary.methods.iter().filter_map(|m| m.measure.cfr).min_by(f64::total_cmp);
    table.row(measured("before".into(), &summary.before, Mark::None));
    for method in &summary.methods {
        let mark = if method.measure.cfr.is_some() && method.measure.cfr == best { Mark::Strong } else { Mark::None };
        let mut cells = measured(label(method, summary), &method.measure, mark);
        cells.push(gate_count(method));
        cells.push(accepted(method));
        table.row(cells);
    }
    for (name, of_name) in by_name(summary).into_iter().filter(|(_, of_name)| of_name.len() > 1) {
        table.row(spread(&format!("{name}, min–max"), &of_name));
    }
    table.without_empty_columns()
}

/// The columns that `before` and every method share.
fn measured(name: String, m: &Measure, mark: Mark) -> Vec<Cell> {
    vec![
        Cell::new(name, mark),
        Cell::new(percent_ci(m.cfr, m.ci95), mark),
        percent(m.cfr_pairwise.rate).into(),
        percent(prefill(m, 5)).into(),
        percent(m.harmful_rate).into(),
        percent(m.reward_error).into(),
        number(m.reward_drift, 3).into(),
        percent(m.over_refusal).into(),
        percent(m.pair_accuracy).into(),
    ]
}

/// Passed of asked; an undecided gate has not passed.
fn gate_count(method: &MethodResult) -> Cell {
    if method.gates.is_empty() {
        return UNKNOWN.into();
    }
    let passed = method.gates.iter().filter(|gate| gate.pass == Some(true)).count();
    format!("{passed}/{}", method.gates.len()).into()
}

/// Methods of one name in the order in which they first appear: one per seed.
fn by_name(summary: &Summary) -> Vec<(&str, Vec<&MethodResult>)> {
    let mut names: Vec<(&str, Vec<&MethodResult>)> = Vec::new();
    for method in &summary.methods {
        match names.iter_mut().find(|(name, _)| *name == method.name) {
            Some((_, list)) => list.push(method),
            None => names.push((&method.name, vec![method])),
        }
    }
    names
}

/// A few seeds have a smallest and a largest value; an interval they have not.
fn spread(name: &str, methods: &[&MethodResult]) -> Vec<Cell> {
    let range = |pick: &dyn Fn(&Measure) -> Option<f64>, show: &dyn Fn(Option<f64>) -> String| -> Cell {
        let values: Option<Vec<f64>> = methods.iter().map(|m| pick(&m.measure)).collect();
        let Some(values) = values else { return UNKNOWN.into() };
        let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
        Cell::new(format!("{}–{}", show(Some(low)), show(Some(high))), Mark::Dim)
    };
    let drift = |value| number(value, 3);
    vec![
        Cell::new(name, Mark::Dim),
        range(&|m| m.cfr, &percent),
        range(&|m| m.cfr_pairwise.rate, &percent),
        range(&|m| prefill(m, 5), &percent),
        range(&|m| m.harmful_rate, &percent),
        range(&|m| m.reward_error, &percent),
        range(&|m| m.reward_drift, &drift),
        range(&|m| m.over_refusal, &percent),
        range(&|m| m.pair_accuracy, &percent),
    ]
}

/// What each method cost, and on which data it was spent.
pub(crate) fn costs(summary: &Summary) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("method", Left),
        ("steps", Right),
        ("lr", Right),
        ("policy tokens", Right),
        ("reward tokens", Right),
        ("generated", Right),
        ("FLOP", Right),
        ("seconds", Right),
        ("data", Left),
    ]);
    for method in &summary.methods {
        let tokens = |n: Option<u64>| count(n.map(|n| n as f64)).into();
        table.row(vec![
            label(method, summary).into(),
            method.steps.to_string().into(),
            method.lr.map_or(UNKNOWN.to_string(), |lr| format!("{lr:e}")).into(),
            tokens(method.tokens_policy),
            tokens(method.tokens_reward),
            tokens(method.tokens_generated),
            count(method.flops).into(),
            number(method.seconds, 1).into(),
            method.data.join(", ").into(),
        ]);
    }
    table.without_empty_columns()
}

/// How much of the failures went away, each time against a base that is named, and CFR as others would count it.
pub(crate) fn reductions(summary: &Summary) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("method", Left),
        ("CFR against before", Right),
        ("against policy", Right),
        ("CFR − CFR(policy), points", Right),
        ("ground truth %", Right),
        ("second judge %", Right),
        ("recalibrated %", Right),
        ("seen %", Right),
        ("near %", Right),
        ("far %", Right),
    ]);
    let rest = |m: &Measure| -> Vec<Cell> {
        let family = |name: &str| percent(m.cfr_by_family.get(name).and_then(|rate| rate.rate)).into();
        let others = [m.cfr_truth, m.cfr_second_judge, m.cfr_recalibrated].map(|cfr| percent(cfr).into());
        others.into_iter().chain(["seen", "near", "far"].map(family)).collect()
    };
    let less = |reduction: Option<f64>| match reduction {
        Some(r) if r.abs() < 0.005 => "0 %".into(),
        Some(r) => format!("{}{} %", if r > 0.0 { "−" } else { "+" }, number(Some(100.0 * r.abs()), 0)).into(),
        None => UNKNOWN.into(),
    };
    let mut before: Vec<Cell> = vec!["before".into(), UNKNOWN.into(), UNKNOWN.into(), UNKNOWN.into()];
    before.extend(rest(&summary.before));
    table.row(before);
    for method in &summary.methods {
        let difference = method.cfr_diff_vs_policy;
        let mut cells = vec![
            label(method, summary).into(),
            less(method.reduction_vs_before),
            less(method.reduction_vs_policy),
            percent_ci(difference.value, difference.ci95).into(),
        ];
        cells.extend(rest(&method.measure));
        table.row(cells);
    }
    table.without_empty_columns()
}

/// What a repair may have broken.
pub(crate) fn side_effects(summary: &Summary) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("method", Left),
        ("refused benign %", Right),
        ("refused borderline %", Right),
        ("exact match %", Right),
        ("degenerate %", Right),
        ("benign NLL", Right),
        ("benign CFR %", Right),
        ("drift", Right),
        ("centred", Right),
        ("on-policy", Right),
        ("rank corr.", Right),
    ]);
    let row = |name: String, m: &Measure| -> Vec<Cell> {
        let refused = |kind: &str| percent(m.over_refusal_by_kind.get(kind).and_then(|rate| rate.rate));
        let cells = [
            name,
            refused("benign"),
            refused("borderline"),
            percent(m.exact_match),
            percent(m.degenerate_rate),
            number(m.benign_nll, 3),
            percent(m.null_cfr),
            number(m.reward_drift, 3),
            number(m.reward_drift_centred, 3),
            number(m.reward_drift_onpolicy, 3),
            number(m.spearman, 3),
        ];
        cells.into_iter().map(Cell::from).collect()
    };
    table.row(row("before".into(), &summary.before));
    summary.methods.iter().for_each(|method| table.row(row(label(method, summary), &method.measure)));
    table.without_empty_columns()
}

/// Whose repair it was: CFR of the four combinations of starting and adapted models.
pub(crate) fn attribution(summary: &Summary) -> Option<Table> {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("method", Left),
        ("both as before %", Right),
        ("policy repaired %", Right),
        ("reward repaired %", Right),
        ("both repaired %", Right),
    ]);
    for method in &summary.methods {
        let of = method.measure.attribution;
        let cells = [of.p0r0, of.p1r0, of.p0r1, of.p1r1].map(|cfr| percent(cfr).into());
        table.row([label(method, summary).into()].into_iter().chain(cells).collect());
    }
    let known = table.rows.iter().any(|row| row[1..].iter().any(|cell: &Cell| cell.text != UNKNOWN));
    known.then_some(table)
}

/// Every gate against every method: value and verdict, with the limit and the n of the first method that was asked.
pub(crate) fn gates(summary: &Summary) -> Option<Table> {
    let asked: Vec<&MethodResult> = summary.methods.iter().filter(|method| !method.gates.is_empty()).collect();
    let labels: Vec<String> = asked.iter().map(|method| label(method, summary)).collect();
    let mut columns = vec![("gate", Align::Left), ("limit", Align::Right), ("n", Align::Right)];
    columns.extend(labels.iter().map(|label| (label.as_str(), Align::Right)));
    let mut table = Table::new(&columns);
    let mut names: Vec<&str> = Vec::new();
    for gate in asked.iter().flat_map(|method| &method.gates) {
        if names.contains(&gate.name.as_str()) {
            continue;
        }
        names.push(&gate.name);
        let n = format!("{}{}", if gate.weak { "weak " } else { "" }, gate.n);
        let mut row: Vec<Cell> = vec![gate.name.replace('_', " ").into(), number(gate.limit, 3).into(), n.into()];
        row.extend(asked.iter().map(|method| {
            let same = method.gates.iter().find(|other| other.name == gate.name);
            same.map_or(UNKNOWN.into(), gate_cell)
        }));
        table.row(row);
    }
    let mut row: Vec<Cell> = vec![Cell::new("accepted", Mark::Strong), "".into(), "".into()];
    row.extend(asked.iter().map(|method| accepted(method)));
    table.row(row);
    (!names.is_empty()).then_some(table)
}

fn gate_cell(gate: &GateResult) -> Cell {
    let (sign, mark) = match gate.pass {
        Some(true) => ("✓", Mark::Good),
        Some(false) => ("✗", Mark::Bad),
        None => ("?", Mark::Dim),
    };
    Cell::new(format!("{} {sign}", number(gate.value, 3)), mark)
}

fn accepted(method: &MethodResult) -> Cell {
    match method.accepted {
        Some(true) => Cell::new("yes", Mark::Good),
        Some(false) => Cell::new("no", Mark::Bad),
        None => UNKNOWN.into(),
    }
}

/// What the search found, beside the same number of uniform queries.
pub fn search(probe: &ProbeResult) -> Table {
    let mut table = Table::new(&[("search", Align::Left), ("", Align::Right)]);
    let lift = match (probe.lift, probe.lift_ci95) {
        (Some(lift), Some([low, high])) => format!("{lift:.2} [{low:.2}, {high:.2}]"),
        (lift, _) => number(lift, 2),
    };
    let rows: [(&str, String); 11] = [
        ("queries", probe.queries.to_string()),
        ("coupled failures", probe.coupled_found.to_string()),
        ("distinct among them", probe.distinct.to_string()),
        ("distinct per 1000 queries", number(probe.per_1000, 1)),
        ("uniform, per 1000 queries", number(probe.uniform_per_1000, 1)),
        ("lift over uniform [95 %]", lift),
        ("archive coverage %", percent(probe.coverage)),
        ("evenness over tactics", number(probe.evenness, 2)),
        ("self-BLEU", number(probe.self_bleu, 2)),
        ("ms per failure", number(probe.seconds_per_failure.map(|s| 1e3 * s), 1)),
        ("after repair, per 1000 queries", number(probe.reprobe_per_1000, 1)),
    ];
    for (name, value) in rows.into_iter().filter(|(_, value)| value != UNKNOWN) {
        table.row(vec![name.into(), value.into()]);
    }
    table
}

/// What the rows of `ares detect` say together, in both senses.
pub(crate) fn verdicts(measure: &Measure) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("sense", Left),
        ("n", Right),
        ("sound", Right),
        ("reward", Right),
        ("policy", Right),
        ("coupled", Right),
        ("CFR % [95 %]", Right),
        ("harmful %", Right),
    ]);
    let rows = [
        ("threshold", measure.cells, measure.cfr, measure.ci95),
        ("pairwise", measure.cells_pairwise, measure.cfr_pairwise.rate, measure.cfr_pairwise.ci95),
    ];
    for (sense, cells, cfr, ci95) in rows {
        let counts = [cells.n(), cells.sound, cells.reward, cells.policy, cells.coupled];
        let counts = counts.map(|count| Cell::from(count.to_string()));
        let rates = [percent_ci(cfr, ci95), percent(cells.harmful_rate())].map(Cell::from);
        table.row([sense.into()].into_iter().chain(counts).chain(rates).collect());
    }
    table
}

/// Warnings by the method that gave them.
pub(crate) fn warnings(summary: &Summary) -> BTreeMap<String, Vec<String>> {
    let given = summary.methods.iter().filter(|method| !method.warnings.is_empty());
    given.map(|method| (label(method, summary), method.warnings.clone())).collect()
}
