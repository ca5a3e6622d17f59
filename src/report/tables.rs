//! The tables of a result: the same rows on the terminal and in the report.

use std::collections::BTreeMap;

use crate::detect::agreement::Calibration;
use crate::detect::audit::Estimate;
use crate::detect::measure::{GateResult, Measure, MethodResult, Rate};
use crate::run::audit::Finding;
use crate::run::summary::Summary;

use super::numbers::{UNKNOWN, count, number, percent, percent_ci};
use super::table::Align::{Left, Right};
use super::table::{Cell, Column, Mark, Table};

pub(crate) use search::{authors, refusals, rounds, search, tactics};

mod search;

/// Names a method: `joint`, or `joint · seed 2` where there are several seeds.
pub(crate) fn label(method: &MethodResult, summary: &Summary) -> String {
    if summary.seeds.len() > 1 { format!("{} · seed {}", method.name, method.seed) } else { method.name.clone() }
}

/// A row of most tables: its name, what was measured, and by which method.
type State<'a> = (String, &'a Measure, Option<&'a MethodResult>);

/// Lists what was measured before any repair, and then under each method.
pub(super) fn states(summary: &Summary) -> Vec<State<'_>> {
    let methods = summary.methods.iter().map(|method| (label(method, summary), &method.measure, Some(method)));
    [("before".to_string(), &summary.before, None)].into_iter().chain(methods).collect()
}

/// Reads the CFR when the answer is forced to begin with the first five tokens of y⁻.
pub(super) fn prefill(measure: &Measure) -> Option<f64> {
    measure.prefill.get(&5).copied().flatten()
}

/// Harmful answers under the same, which fall only if the policy is repaired.
fn prefill_harmful(measure: &Measure) -> Option<f64> {
    let detail = measure.prefill_detail.get(&5)?;
    detail.harmful_truth.or(detail.harmful_rate)
}

/// Lists each name once, in the order in which they first appear.
pub(super) fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut found = Vec::new();
    for name in names {
        if !found.contains(&name) {
            found.push(name);
        }
    }
    found
}

/// A column of measures: its name, its value, how that is shown.
type Figure = (&'static str, fn(&Measure) -> Option<f64>, fn(Option<f64>) -> String);

fn thousandths(value: Option<f64>) -> String {
    number(value, 3)
}

/// Sets names on the left and numbers on the right; columns of words come first, then `columns`.
fn headed(words: &[&str], columns: &[Figure]) -> Table {
    let names = words.iter().copied().chain(columns.iter().map(|(name, ..)| *name)).enumerate();
    Table::new(&names.map(|(i, name)| (name, if i == 0 { Left } else { Right })).collect::<Vec<_>>())
}

fn cells(measure: &Measure, columns: &[Figure]) -> impl Iterator<Item = Cell> {
    columns.iter().map(|(_, value, show)| show(value(measure)).into())
}

/// Shows what each method reached: the main table. `before` comes first; a column in which nothing is known is left out.
pub(crate) fn methods(summary: &Summary) -> Table {
    const COLUMNS: [Figure; 9] = [
        ("CFR % [95 %]", |m| m.cfr, percent),
        ("harmful %", |m| m.harmful_rate, percent),
        ("by truth %", |m| m.harmful_truth.rate, percent),
        ("best of 8 %", |m| m.best_of.harmful, percent),
        ("relapse %", |m| m.relapse.harmful, percent),
        ("prefill 5 %", prefill_harmful, percent),
        ("reward error %", |m| m.reward_error, percent),
        ("drift", |m| m.reward_drift, thousandths),
        ("unserved %", |m| m.unserved.rate.or(m.over_refusal), percent),
    ];
    let mut table = headed(&["method"], &COLUMNS);
    table.columns.extend(["policy", "reward model", "system"].map(|name| (name.to_string(), Right)));
    let best = summary.methods.iter().filter_map(|m| m.measure.cfr).min_by(f64::total_cmp);
    for (name, m, method) in states(summary) {
        let is_best = method.is_some() && m.cfr.is_some() && m.cfr == best;
        let mark = if is_best { Mark::Strong } else { Mark::None };
        let mut row = vec![Cell::new(name, mark), Cell::new(percent_ci(m.cfr, m.ci95_cell.or(m.ci95)), mark)];
        row.extend(cells(m, &COLUMNS[1..]));
        let words = |m: &MethodResult| [m.accepted_policy, m.accepted_reward, m.accepted].map(accepted);
        row.extend(method.into_iter().flat_map(words));
        table.row(row);
    }
    for name in distinct(summary.methods.iter().map(|method| method.name.as_str())) {
        let same = summary.methods.iter().filter(|method| method.name == name).map(|method| &method.measure);
        let same: Vec<&Measure> = same.collect();
        if same.len() > 1 {
            let name = [Cell::new(format!("{name}, min–max"), Mark::Dim)];
            table.row(name.into_iter().chain(COLUMNS.iter().map(|column| extremes(column, &same))).collect());
        }
    }
    table.without_empty_columns()
}

/// Shows the smallest and the largest value: a few seeds have no interval.
fn extremes((_, value, show): &Figure, measures: &[&Measure]) -> Cell {
    let Some(values) = measures.iter().map(|m| value(m)).collect::<Option<Vec<f64>>>() else { return UNKNOWN.into() };
    let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
    Cell::new(format!("{}–{}", show(Some(low)), show(Some(high))), Mark::Dim)
}

/// Counts the gates that passed; an undecided gate has not passed.
fn gate_count(method: &MethodResult) -> Cell {
    if method.gates.is_empty() {
        return UNKNOWN.into();
    }
    let passed = method.gates.iter().filter(|gate| gate.pass == Some(true)).count();
    format!("{passed}/{}", method.gates.len()).into()
}

/// Shows what each method cost, and on which data it was spent.
pub(super) fn costs(summary: &Summary) -> Table {
    let tokens = |n: Option<u64>| count(n.map(|n| n as f64)).into();
    let columns: [Column<&MethodResult>; 9] = [
        ("method", Left, &|m| label(m, summary).into()),
        ("steps", Right, &|m| m.steps.to_string().into()),
        ("lr", Right, &|m| m.lr.map_or(UNKNOWN.to_string(), |lr| format!("{lr:e}")).into()),
        ("policy tokens", Right, &|m| tokens(m.tokens_policy)),
        ("reward tokens", Right, &|m| tokens(m.tokens_reward)),
        ("generated", Right, &|m| tokens(m.tokens_generated)),
        ("FLOP", Right, &|m| count(m.flops).into()),
        ("seconds", Right, &|m| number(m.seconds, 1).into()),
        ("data", Left, &|m| m.data.join(", ").into()),
    ];
    Table::of(&summary.methods, &columns).without_empty_columns()
}

/// Shows how much of the failures went away, each time against a base that is named, and CFR as others would count it.
pub(super) fn reductions(summary: &Summary) -> Table {
    let less = |reduction: Option<f64>| match reduction {
        Some(r) if r.abs() < 0.005 => "0 %".into(),
        Some(r) => format!("{}{} %", if r > 0.0 { "−" } else { "+" }, number(Some(100.0 * r.abs()), 0)).into(),
        None => UNKNOWN.into(),
    };
    let difference = |method: Option<&MethodResult>| {
        let difference = method.map(|m| m.cfr_diff_vs_policy).unwrap_or_default();
        percent_ci(difference.value, difference.ci95).into()
    };
    let columns: [Column<State>; 9] = [
        ("method", Left, &|(name, ..)| name.clone().into()),
        ("CFR against before", Right, &|(.., method)| less(method.and_then(|m| m.reduction_vs_before))),
        ("against policy", Right, &|(.., method)| less(method.and_then(|m| m.reduction_vs_policy))),
        ("CFR − CFR(policy), points", Right, &|(.., method)| difference(*method)),
        ("pairwise %", Right, &|(_, m, _)| percent(m.cfr_pairwise.rate).into()),
        ("prefill 5 %", Right, &|(_, m, _)| percent(prefill(m)).into()),
        ("ground truth %", Right, &|(_, m, _)| percent(m.cfr_truth).into()),
        ("second judge %", Right, &|(_, m, _)| percent(m.cfr_second_judge).into()),
        ("recalibrated %", Right, &|(_, m, _)| percent(m.cfr_recalibrated).into()),
    ];
    Table::of(states(summary), &columns).without_empty_columns()
}

/// How far a fault may lie from what the search may use, nearest first.
pub(super) const DISTANCES: [&str; 4] = ["seen", "near", "semantic", "far"];

/// Shows how far a repair reaches beyond what the search could say: harmful answers by truth and coupled failures, by the distance of
/// the tactic.
pub(super) fn distances(summary: &Summary) -> Option<Table> {
    let headers: Vec<String> =
        ["harmful", "CFR"].iter().flat_map(|what| DISTANCES.map(|name| format!("{what}, {name} %"))).collect();
    let names: Vec<&str> = ["method"].into_iter().chain(headers.iter().map(String::as_str)).collect();
    let mut table = headed(&names, &[]);
    for (name, m, _) in states(summary) {
        let rates = [&m.harmful_by_distance, &m.cfr_by_distance].into_iter();
        let rates = rates.flat_map(|by| DISTANCES.map(|name| percent(by.get(name).and_then(|rate| rate.rate))));
        table.row([name].into_iter().chain(rates).map(Cell::from).collect());
    }
    let table = table.without_empty_columns();
    (table.columns.len() > 1).then_some(table)
}

/// Shows what each reward model is worth: pairs kept and mended, calm pairs, whether it reads the prompt; and whether the judge still
/// sees what is harmful.
pub(super) fn preferences(summary: &Summary) -> Table {
    const COLUMNS: [Figure; 8] = [
        ("reward error %", |m| m.reward_error, percent),
        ("calm pairs wrong %", |m| m.calm_error.rate, percent),
        ("pairs kept %", |m| m.pairs_kept, percent),
        ("pairs mended %", |m| m.pairs_mended, percent),
        ("rank corr.", |m| m.spearman, thousandths),
        ("prompt sensitivity", |m| m.prompt_sensitivity, thousandths),
        ("best of 8, all samples %", |m| m.best_of.harmful_samples, percent),
        ("judge agrees with truth %", |m| m.judge_truth.agreement, percent),
    ];
    over_states(summary, &COLUMNS)
}

/// Shows what a repair may have broken.
pub(super) fn side_effects(summary: &Summary) -> Table {
    fn refused(measure: &Measure, kind: &str) -> Option<f64> {
        measure.over_refusal_by_kind.get(kind).and_then(|rate| rate.rate)
    }
    fn unserved(measure: &Measure, kind: &str) -> Option<f64> {
        measure.unserved_by_kind.get(kind).and_then(|rate| rate.rate)
    }
    const COLUMNS: [Figure; 12] = [
        ("unserved benign %", |m| unserved(m, "benign"), percent),
        ("unserved borderline %", |m| unserved(m, "borderline"), percent),
        ("refused benign %", |m| refused(m, "benign"), percent),
        ("refused borderline %", |m| refused(m, "borderline"), percent),
        ("exact match %", |m| m.exact_match, percent),
        ("degenerate %", |m| m.degenerate_rate, percent),
        ("cut %", |m| m.truncated.rate, percent),
        ("benign NLL", |m| m.benign_nll, thousandths),
        ("benign CFR %", |m| m.null_cfr, percent),
        ("drift", |m| m.reward_drift, thousandths),
        ("centred", |m| m.reward_drift_centred, thousandths),
        ("on-policy", |m| m.reward_drift_onpolicy, thousandths),
    ];
    over_states(summary, &COLUMNS)
}

/// Shows whose repair it was: CFR of the four combinations of starting and adapted models.
pub(super) fn attribution(summary: &Summary) -> Option<Table> {
    const COLUMNS: [Figure; 4] = [
        ("both as before %", |m| m.attribution.p0r0, percent),
        ("policy repaired %", |m| m.attribution.p1r0, percent),
        ("reward repaired %", |m| m.attribution.p0r1, percent),
        ("both repaired %", |m| m.attribution.p1r1, percent),
    ];
    let mut table = over_states(summary, &COLUMNS);
    table.rows.remove(0);
    (table.columns.len() > 1 && !table.rows.is_empty()).then_some(table)
}

/// Shows `columns` of every state; those in which nothing is known are left out.
fn over_states(summary: &Summary, columns: &[Figure]) -> Table {
    let mut table = headed(&["method"], columns);
    for (name, measure, _) in states(summary) {
        table.row([name.into()].into_iter().chain(cells(measure, columns)).collect());
    }
    table.without_empty_columns()
}

/// Holds every gate against every method: value and verdict, with the limit and the n of the first method that was asked.
pub(super) fn gates(summary: &Summary) -> Option<Table> {
    let asked: Vec<&MethodResult> = summary.methods.iter().filter(|method| !method.gates.is_empty()).collect();
    let labels: Vec<String> = asked.iter().map(|method| label(method, summary)).collect();
    let words = ["gate", "limit", "n"].into_iter().chain(labels.iter().map(String::as_str));
    let mut table = headed(&words.collect::<Vec<_>>(), &[]);
    for name in distinct(asked.iter().flat_map(|method| &method.gates).map(|gate| gate.name.as_str())) {
        let found: Vec<_> = asked.iter().map(|m| m.gates.iter().find(|gate| gate.name == name)).collect();
        let Some(first) = found.iter().copied().flatten().next() else { continue };
        let n = format!("{}{}", if first.weak { "weak " } else { "" }, first.n);
        let mut row: Vec<Cell> = vec![name.replace('_', " ").into(), number(first.limit, 3).into(), n.into()];
        row.extend(found.into_iter().map(|gate| gate.map_or(UNKNOWN.into(), gate_cell)));
        table.row(row);
    }
    let mut row: Vec<Cell> = vec![Cell::new("accepted", Mark::Strong), "".into(), "".into()];
    row.extend(asked.iter().map(|method| accepted(method.accepted)));
    table.row(row);
    (!asked.is_empty()).then_some(table)
}

fn gate_cell(gate: &GateResult) -> Cell {
    let (sign, mark) = match gate.pass {
        Some(true) => ("✓", Mark::Good),
        Some(false) => ("✗", Mark::Bad),
        None => ("?", Mark::Dim),
    };
    Cell::new(format!("{} {sign}", number(gate.value, 3)), mark)
}

fn accepted(word: Option<bool>) -> Cell {
    match word {
        Some(true) => Cell::new("accepted", Mark::Good),
        Some(false) => Cell::new("no", Mark::Bad),
        None => UNKNOWN.into(),
    }
}

/// Sums up what the rows of `ares detect` say, in both senses.
pub(crate) fn verdicts(measure: &Measure) -> Table {
    let words = ["sense", "n", "sound", "reward", "policy", "coupled", "CFR % [95 %]", "harmful %"];
    let mut table = headed(&words, &[]);
    let pairwise = measure.cfr_pairwise;
    for (sense, cells, cfr, ci95) in [
        ("threshold", measure.cells, measure.cfr, measure.ci95),
        ("pairwise", measure.cells_pairwise, pairwise.rate, pairwise.ci95),
    ] {
        let counts = [cells.n(), cells.sound, cells.reward, cells.policy, cells.coupled].map(|n| n.to_string());
        let rates = [percent_ci(cfr, ci95), percent(cells.harmful_rate())];
        table.row([sense.to_string()].into_iter().chain(counts).chain(rates).map(Cell::from).collect());
    }
    table
}

/// How a judge does against labels.
pub(crate) fn calibration(found: &Calibration) -> Table {
    let mut table = headed(&["of", "rate % [95 %]", "n"], &[]);
    for (name, rate) in [
        ("agreement", found.agreement),
        ("precision: harmful, of what it calls so", found.precision),
        ("sensitivity: found, of what is harmful", found.sensitivity),
        ("specificity: let pass, of what is safe", found.specificity),
    ] {
        table.row(vec![name.into(), percent_ci(rate.rate, rate.ci95).into(), rate.n.to_string().into()]);
    }
    let ends = found.kappa_ci95.map_or_else(String::new, |[low, high]| format!(" [{low:.2}, {high:.2}]"));
    table.row(vec![
        "Cohen's kappa".into(),
        format!("{}{ends}", number(found.kappa, 2)).into(),
        found.n.to_string().into(),
    ]);
    table
}

/// What labels say of each method beside what its judge does. Changes are held against the first.
pub(crate) fn audit(findings: &[Finding]) -> Table {
    fn ends(estimate: &Estimate) -> Cell {
        percent_ci(estimate.value, estimate.ci95).into()
    }
    fn of_judge(estimate: &Estimate) -> Cell {
        percent(estimate.by_judge).into()
    }
    fn of_change(change: &Option<Estimate>) -> Cell {
        change.as_ref().map_or_else(|| UNKNOWN.into(), ends)
    }
    let share = |rate: Rate| Cell::from(percent(rate.rate));
    Table::of(
        findings,
        &[
            ("method", Left, &|found| found.name.as_str().into()),
            ("labelled", Right, &|found| format!("{} of {}", found.harmful.n_labelled, found.harmful.n).into()),
            ("harmful, judge %", Right, &|found| of_judge(&found.harmful)),
            ("harmful, labels % [95 %]", Right, &|found| ends(&found.harmful)),
            ("change [95 %]", Right, &|found| of_change(&found.harmful_change)),
            ("CFR, judge %", Right, &|found| of_judge(&found.cfr)),
            ("CFR, labels % [95 %]", Right, &|found| ends(&found.cfr)),
            ("change [95 %]", Right, &|found| of_change(&found.cfr_change)),
            ("judge agrees %", Right, &|found| share(found.judge.agreement)),
            ("sensitivity %", Right, &|found| share(found.judge.sensitivity)),
            ("specificity %", Right, &|found| share(found.judge.specificity)),
        ],
    )
}

/// Says of each method that the gates do not accept why, and then which they do; and what nobody knows of the judge.
pub(crate) fn verdict(summary: &Summary) -> Vec<String> {
    const UNCALIBRATED: &str =
        "the judge was held against no label and no truth: how often it errs is unknown (`ares judge --labels` tells)";
    let uncalibrated = (summary.before.judge_truth.n == 0).then(|| UNCALIBRATED.to_string());
    accepted_by_gates(summary).into_iter().chain(uncalibrated).collect()
}

fn accepted_by_gates(summary: &Summary) -> Vec<String> {
    let asked = || summary.methods.iter().filter(|method| !method.gates.is_empty());
    let why = |m: &MethodResult| Some(format!("{}: system not accepted: {}", label(m, summary), m.why_not.as_ref()?));
    let good: Vec<String> = asked().filter(|m| m.accepted == Some(true)).map(|method| label(method, summary)).collect();
    let all = match (asked().count(), good.len()) {
        (0, _) => return Vec::new(),
        (_, 0) => "the gates accept none of these repairs".to_string(),
        _ => format!(
            "the gates accept {}: harm, reward error and CFR fall, at costs within their limits",
            good.join(", ")
        ),
    };
    asked().filter_map(why).chain([all]).collect()
}

/// Collects warnings by the method that gave them.
pub(crate) fn warnings(summary: &Summary) -> BTreeMap<String, Vec<String>> {
    let given = summary.methods.iter().filter(|method| !method.warnings.is_empty());
    given.map(|method| (label(method, summary), method.warnings.clone())).collect()
}
