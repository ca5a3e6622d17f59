//! The report's figures: which numbers of a run go into which chart.

use serde::Serialize;

use crate::detect::measure::{Cells, Interval, Measure, MethodResult, Summary};
use crate::judge::Verdict;
use crate::run::records::Metric;

use super::chart::{self, Curve, Dots, Histogram, Lines, Mosaic, Rates, Sample};
use super::data::{BEFORE, Outcome, RunData};
use super::heat::{self, Grid, Heat, Show};
use super::tables::{label, prefill};

/// What a chart takes of a measure.
type Pick<'a> = &'a dyn Fn(&Measure) -> (Option<f64>, Option<Interval>);

pub(super) fn dots(summary: &Summary) -> Dots {
    let methods = || summary.methods.iter();
    let names: Vec<String> =
        ["before".to_string()].into_iter().chain(methods().map(|method| label(method, summary))).collect();
    let rates = |title: &str, pick: Pick| -> Rates {
        let measures = [&summary.before].into_iter().chain(methods().map(|method| &method.measure));
        let values = measures.map(pick).map(|(value, ci)| value.map(|value| (value, ci))).collect();
        (title.to_string(), values)
    };
    chart::dots(
        &names,
        &[
            rates("CFR %", &|m| (m.cfr, m.ci95)),
            rates("CFR under prefill %", &|m| (prefill(m, 5), m.prefill_detail.get(&5).and_then(|d| d.ci95))),
            rates("harmful answers %", &|m| (m.harmful_rate, m.harmful_ci95)),
            rates("reward error %", &|m| (m.reward_error, m.reward_error_ci95)),
        ],
    )
}

pub(super) fn mosaics(summary: &Summary, after: Option<&MethodResult>) -> Vec<Mosaic> {
    let states = [("before".to_string(), summary.before.cells)];
    let states = states.into_iter().chain(after.map(|method| (label(method, summary), method.measure.cells)));
    states
        .filter(|(_, cells): &(String, Cells)| cells.n() > 0)
        .map(|(title, cells)| chart::mosaic(&title, cells))
        .collect()
}

/// Scores of the references before and after; of the own answers where no reference was scored.
pub(super) fn rewards(data: &RunData, after: Option<&MethodResult>) -> Vec<Histogram> {
    let tau_h = data.summary.thresholds.tau_h;
    let samples = |outcomes: &[&Outcome]| -> Vec<Sample> {
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
    if let Some(method) = after {
        panels.push((label(method, &data.summary), samples(&data.outcomes_of(&method.name, method.seed))));
    }
    panels.retain(|(_, samples)| samples.iter().any(|(_, _, values)| !values.is_empty()));
    chart::histograms(&panels, data.summary.thresholds.tau_r)
}

/// How one method was trained.
#[derive(Serialize)]
pub(super) struct Training {
    method: String,
    panels: Vec<Lines>,
}

/// Likelihoods and loss terms of each method, of the first seed.
pub(super) fn training(data: &RunData) -> Vec<Training> {
    let mut methods: Vec<Training> = Vec::new();
    for metric in &data.metrics {
        if !methods.iter().any(|known| known.method == metric.method) {
            methods.push(Training { method: metric.method.clone(), panels: Vec::new() });
        }
    }
    let seed = data.metrics.first().map_or(0, |metric| metric.seed);
    for training in &mut methods {
        let steps = data.metrics.iter().filter(|metric| metric.method == training.method && metric.seed == seed);
        training.panels = training_panels(&steps.collect::<Vec<_>>());
    }
    methods.retain(|training| !training.panels.is_empty());
    methods
}

/// What is drawn together, by the names of the terms.
const PANELS: [(&str, &[&str]); 3] = [
    ("policy loss terms", &["npo", "unlikelihood", "safe", "retain", "grpo"]),
    ("reward loss terms", &["bt", "replay", "anchor", "center"]),
    ("reward of samples", &["sample_reward"]),
];

fn training_panels(steps: &[&Metric]) -> Vec<Lines> {
    let curve = |of: &dyn Fn(&Metric) -> Option<f64>| -> Vec<(u64, f64)> {
        steps.iter().filter_map(|metric| Some((metric.step, of(metric)?))).collect()
    };
    let likelihoods =
        [("ℓ(y⁺)".to_string(), curve(&|m| m.logp_chosen)), ("ℓ(y⁻)".to_string(), curve(&|m| m.logp_rejected))];
    let mut panels: Vec<Lines> = chart::lines("mean log-probability", &likelihoods, 0).into_iter().collect();
    for (title, terms) in PANELS {
        let term = |name: &&str| (name.replace('_', " "), curve(&|m| m.terms.get(*name).copied().flatten()));
        let curves: Vec<Curve> = terms.iter().map(term).filter(|(_, points)| !points.is_empty()).collect();
        panels.extend(chart::lines(title, &curves, 2));
    }
    panels
}

/// A heat map before and, where it is known, after.
#[derive(Serialize)]
pub(super) struct HeatPair {
    title: &'static str,
    caption: &'static str,
    maps: Vec<Heat>,
}

/// The search's archive: coupled failures found per topic and tactic.
pub(super) fn archive(data: &RunData) -> HeatPair {
    let (mut before, mut after) = (Grid::default(), Grid::default());
    for probe in data.probes.iter().filter(|probe| !probe.uniform) {
        let row = if probe.domain.is_empty() { &probe.topic } else { &probe.domain };
        let grid = if probe.after { &mut after } else { &mut before };
        grid.add(row, &probe.tactic, f64::from(u8::from(probe.verdict == Some(Verdict::Coupled))));
    }
    HeatPair {
        title: "Search archive, coupled failures found",
        caption: "Number of coupled failures that the search found per topic and tactic; grey cells were asked and held, \
                  empty ones were never asked.",
        maps: pair(before, after, Show::Sum),
    }
}

/// Held-out prompts: CFR per topic and tactic.
pub(super) fn outcomes_by_tactic(data: &RunData, method: Option<&MethodResult>) -> HeatPair {
    let grid = |outcomes: Vec<&Outcome>| {
        let mut grid = Grid::default();
        for outcome in outcomes {
            if let (Some(verdict), Some(tactic)) = (outcome.verdict, &outcome.tactic) {
                grid.add(outcome.place(), tactic, f64::from(u8::from(verdict == Verdict::Coupled)));
            }
        }
        grid
    };
    let after = method.map(|m| grid(data.outcomes_of(&m.name, m.seed))).unwrap_or_default();
    HeatPair {
        title: "Held-out prompts, CFR per topic and tactic",
        caption: "Share of held-out prompts on which both fail; both maps share one scale.",
        maps: pair(grid(data.outcomes_of(BEFORE, 0)), after, Show::Mean),
    }
}

fn pair(before: Grid, after: Grid, show: Show) -> Vec<Heat> {
    let mut grids = vec![("before".to_string(), before), ("after".to_string(), after)];
    grids.retain(|(_, grid)| !grid.is_empty());
    heat::heats(&grids, show)
}
