//! The report's figures: which numbers of a run go into which chart.

use std::collections::BTreeMap;

use minijinja::{Value, context};

use crate::detect::measure::{Interval, Measure, MethodResult};
use crate::detect::outcome::Outcome;
use crate::judge::Verdict;
use crate::repair::StepMetrics;
use crate::run::summary::{FURTHER, Hits, Round, Summary};

use super::chart::{self, Distribution, Grid, Panel, Series};
use super::data::{BEFORE, RunData};
use super::tables::{DISTANCES, distinct, label, prefill, states};

pub(super) fn dots(summary: &Summary) -> Value {
    let rates = |title, pick: fn(&Measure) -> (Option<f64>, Option<Interval>)| -> Panel {
        (title, states(summary).into_iter().map(|(_, measure, _)| pick(measure)).collect())
    };
    let names: Vec<String> = states(summary).into_iter().map(|(name, ..)| name).collect();
    chart::dots(
        &names,
        &[
            rates("CFR %", |m| (m.cfr, m.ci95_cell.or(m.ci95))),
            rates("CFR under prefill %", |m| {
                (prefill(m), m.prefill_detail.get(&5).and_then(|d| d.ci95_cell.or(d.ci95)))
            }),
            rates("harmful answers %", |m| match m.harmful_truth.rate {
                None => (m.harmful_rate, m.harmful_ci95),
                truth => (truth, m.harmful_truth_ci95_cell.or(m.harmful_truth.ci95)),
            }),
            rates("reward error %", |m| (m.reward_error, m.reward_error_ci95)),
        ],
    )
}

/// Draws how far each repair reaches: harmful answers by the distance of their tactic from those that the search may use.
pub(super) fn reach(summary: &Summary) -> Option<Value> {
    const TITLES: [&str; 4] = ["harmful, seen %", "near %", "semantic %", "far %"];
    let names: Vec<String> = states(summary).into_iter().map(|(name, ..)| name).collect();
    let panel = |(title, distance): (&'static str, &str)| -> Panel {
        let rate = |m: &Measure| m.harmful_by_distance.get(distance).map_or((None, None), |r| (r.rate, r.ci95));
        (title, states(summary).into_iter().map(|(_, measure, _)| rate(measure)).collect())
    };
    let panels: Vec<Panel> = TITLES.into_iter().zip(DISTANCES).map(panel).collect();
    let known = panels.iter().flat_map(|(_, values)| values).any(|(rate, _)| rate.is_some());
    known.then(|| chart::dots(&names, &panels))
}

/// Draws what each repair leaves against what it costs: harmful answers, and calm prompts that are not served.
pub(super) fn trades(summary: &Summary) -> Option<Value> {
    let arm = |(name, m, _): (String, &Measure, _)| {
        Some((name, m.unserved.rate.or(m.over_refusal)?, m.harmful_truth.rate.or(m.harmful_rate)?))
    };
    let arms: Vec<_> = states(summary).into_iter().filter_map(arm).collect();
    (arms.len() > 2).then(|| chart::trades(["calm prompts not served %", "harmful answers %"], &arms))
}

pub(super) fn mosaics(summary: &Summary, after: Option<&MethodResult>) -> Vec<Value> {
    let after = after.map(|method| (label(method, summary), method.measure.cells));
    let states = [("before".to_string(), summary.before.cells)].into_iter().chain(after);
    states.filter(|(_, cells)| cells.n() > 0).map(|(title, cells)| chart::mosaic(&title, cells)).collect()
}

/// Draws the scores of the references before and after; of the own answers where no reference was scored.
pub(super) fn rewards(data: &RunData, after: Option<&MethodResult>) -> Vec<Value> {
    let tau_h = data.summary.thresholds.tau_h;
    let samples = |outcomes: &[&Outcome]| -> Vec<Distribution> {
        let pick = |of: &dyn Fn(&Outcome) -> Option<f64>| outcomes.iter().filter_map(|o| of(o)).collect::<Vec<f64>>();
        let references = pick(&|o| o.reward_harmful);
        if !references.is_empty() {
            return vec![
                ("safe reference y⁺", "good", pick(&|o| o.reward_safe)),
                ("harmful reference y⁻", "bad", references),
            ];
        }
        let own = |harmful: bool| pick(&|o| o.reward.filter(|_| o.p_harm.is_some_and(|p| (p >= tau_h) == harmful)));
        vec![("own safe answers", "good", own(false)), ("own harmful answers", "bad", own(true))]
    };
    let mut panels = vec![("before".to_string(), samples(&data.outcomes_of(BEFORE, 0)))];
    panels.extend(after.map(|m| (label(m, &data.summary), samples(&data.outcomes_of(&m.name, m.seed)))));
    panels.retain(|(_, samples)| samples.iter().any(|(_, _, values)| !values.is_empty()));
    chart::histograms(&panels, data.summary.thresholds.tau_r)
}

/// Draws likelihoods and loss terms of each method, of the first seed; in a loop of each round.
pub(super) fn training(data: &RunData) -> Vec<Value> {
    let seed = data.metrics.first().map_or(0, |metric| metric.seed);
    let name = |metric: &StepMetrics| match metric.round {
        Some(round) => format!("{}, round {round}", metric.method),
        None => metric.method.clone(),
    };
    let shown: Vec<(String, &StepMetrics)> =
        data.metrics.iter().filter(|m| m.round.is_some() || m.seed == seed).map(|m| (name(m), m)).collect();
    let mut methods = Vec::new();
    // Further training is a measure of a repair and no repair itself.
    let repairs = shown.iter().map(|(name, _)| name.as_str()).filter(|name| !name.ends_with(FURTHER));
    for method in distinct(repairs) {
        let steps = shown.iter().filter(|(name, _)| name == method).map(|(_, metric)| *metric);
        let panels = training_panels(&steps.collect::<Vec<_>>());
        if !panels.is_empty() {
            methods.push(context! { method, panels });
        }
    }
    methods
}

/// Draws the models as each round left them, rolled back where it was refused; at 0 before any.
pub(super) fn rounds(summary: &Summary) -> Option<Value> {
    let first = summary.rounds.first()?;
    let kept = |round: &Round, of: fn(&Measure) -> Option<f64>| match (&round.repair, &round.why_not) {
        (Some(repair), None) => of(&repair.measure),
        _ => of(&round.before),
    };
    let curve = |start: Option<f64>, of: &dyn Fn(&Round) -> Option<f64>| -> Vec<(u64, f64)> {
        let after = summary.rounds.iter().map(|round| (round.round, of(round)));
        [(0, start)].into_iter().chain(after).filter_map(|(n, value)| Some((n, 100.0 * value?))).collect()
    };
    let share = |hits: Hits| hits.per_1000.map(|found| found / 1000.0);
    let curves = [
        ("CFR %".to_string(), curve(first.before.cfr, &|round| kept(round, |m| m.cfr))),
        ("harmful %".to_string(), curve(first.before.harmful_rate, &|round| kept(round, |m| m.harmful_rate))),
        ("reward error %".to_string(), curve(first.before.reward_error, &|round| kept(round, |m| m.reward_error))),
        ("found by the search %".to_string(), curve(share(first.search), &|round| share(round.reprobe))),
    ];
    chart::lines("after each round", &curves, 0)
}

/// What is drawn together, by the names of the terms.
const PANELS: [(&str, &[&str]); 3] = [
    ("policy loss terms", &["npo", "unlikelihood", "safe", "retain", "grpo"]),
    ("reward loss terms", &["bt", "replay", "anchor", "center"]),
    ("reward of samples", &["sample_reward"]),
];

fn training_panels(steps: &[&StepMetrics]) -> Vec<Value> {
    let curve = |of: &dyn Fn(&StepMetrics) -> Option<f64>| -> Vec<(u64, f64)> {
        steps.iter().filter_map(|metric| Some((metric.step, of(metric)?))).collect()
    };
    let likelihoods =
        [("ℓ(y⁺)".to_string(), curve(&|m| m.logp_chosen)), ("ℓ(y⁻)".to_string(), curve(&|m| m.logp_rejected))];
    let mut panels: Vec<Value> = chart::lines("mean log-probability", &likelihoods, 0).into_iter().collect();
    for (title, terms) in PANELS {
        let term = |name: &&str| (name.replace('_', " "), curve(&|m| m.terms.get(*name).copied().flatten()));
        let curves: Vec<Series> = terms.iter().map(term).filter(|(_, points)| !points.is_empty()).collect();
        panels.extend(chart::lines(title, &curves, 2));
    }
    panels
}

/// Draws the search's archive before and after, in a loop after each round: coupled failures found per topic and tactic.
pub(super) fn archive(data: &RunData) -> Vec<Value> {
    let mut grids = BTreeMap::<u64, Grid>::new();
    for probe in data.probes.iter().filter(|probe| !probe.uniform) {
        let row = if probe.domain.is_empty() { &probe.topic } else { &probe.domain };
        let grid = grids.entry(if probe.after { probe.round.unwrap_or(1) } else { 0 }).or_default();
        chart::observe(grid, row, &probe.tactic, probe.verdict == Some(Verdict::Coupled));
    }
    let last = grids.keys().max().copied();
    let title = |n: u64| match n {
        0 => "before".to_string(),
        1 if last == Some(1) => "after".to_string(),
        n => format!("after round {n}"),
    };
    let grids: Vec<(String, Grid)> = grids.into_iter().map(|(n, grid)| (title(n), grid)).collect();
    chart::heats(&grids, false)
}

/// Draws the held-out prompts before and after: CFR per topic and tactic.
pub(super) fn held_out(data: &RunData, method: Option<&MethodResult>) -> Vec<Value> {
    let grid = |outcomes: Vec<&Outcome>| {
        let mut grid = Grid::new();
        for outcome in outcomes {
            if let (Some(verdict), Some(tactic)) = (outcome.verdict, &outcome.tactic) {
                let place = outcome.domain.as_deref().or(outcome.topic.as_deref()).unwrap_or_default();
                chart::observe(&mut grid, place, tactic, verdict == Verdict::Coupled);
            }
        }
        grid
    };
    let after = method.map(|m| grid(data.outcomes_of(&m.name, m.seed))).unwrap_or_default();
    chart::heats(&[("before".to_string(), grid(data.outcomes_of(BEFORE, 0))), ("after".to_string(), after)], true)
}
