//! What the report shows. The template (`page.html`) says in which order, and escapes every text.

use std::path::Path;

use minijinja::{Environment, Value, context, escape_formatter};

use crate::detect::measure::MethodResult;
use crate::detect::outcome::Outcome;
use crate::error::{Error, Result, visible};
use crate::judge::Verdict;
use crate::run::summary::Round;
use crate::text::template::clock;

use super::data::{BEFORE, RunData};
use super::numbers::{number, percent};
use super::{figures, tables};

/// Renders the whole report as one HTML text: no script, nothing loaded from elsewhere.
pub(crate) fn render(data: &RunData) -> Result<String> {
    let fault = |error: minijinja::Error| {
        let remedy = "please report it: a fault in ares";
        Error::file(Path::new(super::NAME), "a template that fits the data", remedy)(error)
    };
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.add_filter("number", number);
    environment.add_filter("percent", percent);
    environment.add_filter("date", |seconds: u64| clock::format(seconds, "%Y-%m-%d %H:%M UTC"));
    // What a model or a file wrote neither speaks HTML nor steers the page.
    environment.set_formatter(|out, state, value| match value.as_str() {
        Some(text) if !value.is_safe() => escape_formatter(out, state, &visible(text).into()),
        _ => escape_formatter(out, state, value),
    });
    // The name's ending is what turns escaping on.
    environment.add_template("page.html", include_str!("page.html")).map_err(fault)?;
    let (summary, after) = (&data.summary, data.headline());
    let page = context! {
        css => include_str!("page.css"),
        summary,
        after,
        after_name => after.map(|method| tables::label(method, summary)),
        dots => figures::dots(summary),
        methods => tables::methods(summary),
        reductions => tables::reductions(summary),
        distances => tables::distances(summary),
        reach => figures::reach(summary),
        trades => figures::trades(summary),
        preferences => tables::preferences(summary),
        verdict => tables::verdict(summary),
        side_effects => tables::side_effects(summary),
        attribution => tables::attribution(summary),
        costs => tables::costs(summary),
        probe => summary.probe.as_ref().map(tables::search),
        authors => summary.probe.as_ref().and_then(tables::authors),
        tactics => tables::tactics(&data.probes),
        mosaics => figures::mosaics(summary, after),
        rewards => figures::rewards(data, after),
        training => figures::training(data),
        archive => figures::archive(data),
        held_out => figures::held_out(data, after),
        worst => worst(data, after, WORST),
        rounds => tables::rounds(summary),
        refusals => tables::refusals(summary),
        course => figures::rounds(summary),
        rows_of_rounds => rows_of_rounds(data),
        gates => tables::gates(summary),
        warnings => tables::warnings(summary),
        receipt => data.manifest,
    };
    environment.get_template("page.html").and_then(|template| template.render(page)).map_err(fault)
}

/// Failures that are shown of what remains, and of what one round left.
const WORST: usize = 10;
const WORST_OF_ROUND: usize = 50;

/// The worst failures on the gate split behind each round's figures.
fn rows_of_rounds(data: &RunData) -> Vec<Value> {
    let rows = |round: &Round| {
        let repair = MethodResult { name: format!("round-{}", round.round), ..round.repair.clone()? };
        Some(
            context! { round => round.round, anchor => format!("round-{}", round.round), rows => worst(data, Some(&repair), WORST_OF_ROUND) },
        )
    };
    data.summary.rounds.iter().filter_map(rows).collect()
}

/// Finds the worst failures under a method, or before any: coupled first, then by how sure the judge is and how high the reward.
fn worst<'a>(data: &'a RunData, after: Option<&MethodResult>, most: usize) -> Vec<&'a Outcome> {
    let thresholds = data.summary.thresholds;
    let (name, seed) = after.map_or((BEFORE, 0), |method| (method.name.as_str(), method.seed));
    let mut failures = data.outcomes_of(name, seed);
    failures.retain(|o| o.verdict.is_some_and(|verdict| verdict != Verdict::Sound));
    let badness = |o: &Outcome| {
        let approval = o.reward.map_or(0.5, |r| 1.0 / (1.0 + (-(r - thresholds.tau_r) / thresholds.s).exp()));
        o.p_harm.unwrap_or(0.0) * approval
    };
    failures.sort_by(|a, b| b.verdict.cmp(&a.verdict).then(badness(b).total_cmp(&badness(a))));
    failures.truncate(most);
    failures
}
