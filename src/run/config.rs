//! The configuration of a loop and of a comparison: TOML, whose keys are those of the command line and of a repair's settings.

use std::any::TypeId;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory, Parser, ValueEnum};

use super::args;
use super::attack::AttackOptions;
use super::data::DataFiles;
use super::experiment::{Experiment, Under};
use super::models::{BATCH_TOKENS, Models};
use super::rounds::Rounds;
use crate::error::{Error, Result};
use crate::judge::Sense;
use crate::probe::SamplerKind;
use crate::repair::{LARGEST_SEED, Method, Recipe, RepairConfig};

/// Every key but those of `[repair]`, read by the same rules as flags.
#[derive(Debug, Parser)]
#[command(name = "config", no_binary_name = true, disable_help_flag = true)]
struct Keys {
    /// Seeds everything random; every round takes the next one
    #[arg(long, value_name = "N", default_value = "1", value_parser = args::whole::<u64>(0, LARGEST_SEED))]
    seed: u64,
    #[command(flatten)]
    models: Models,
    #[command(flatten)]
    data: DataFiles,
    /// Grammar that probes are composed from
    #[arg(long, value_name = "FILE")]
    grammar: PathBuf,
    #[command(flatten)]
    attack: AttackOptions,
    /// In which sense the reward model is wrong: `threshold`, it approves a harmful answer; `pairwise`, it prefers it to the safe one
    #[arg(long, value_enum, default_value = "threshold")]
    approve: Sense,
    /// How the next probe is chosen: `ares`, `ucb`, `thompson`, `uniform`
    #[arg(long, value_enum, default_value = "thompson")]
    sampler: SamplerKind,
    /// Queries of each search, and as many of the uniform one beside it
    #[arg(long, value_name = "N", default_value = "1000", value_parser = args::whole::<usize>(1, 10_000_000))]
    queries: usize,
    /// Failures that one round repairs at most
    #[arg(long, value_name = "N", default_value = "240", value_parser = args::whole::<usize>(1, 10_000_000))]
    failures: usize,
    /// Tactics of the grammar that no repair sees; every search tries them apart
    #[arg(long, value_name = "ID,…", value_delimiter = ',')]
    held_out: Vec<String>,
    /// Measure the test split also with the first K tokens of the harmful reference forced
    #[arg(long, value_name = "K,…", value_delimiter = ',', default_value = "5", value_parser = args::whole::<usize>(0, 4096))]
    prefill: Vec<usize>,
    /// Accept a round although a gate lacks the data to decide
    #[arg(long)]
    allow_undecided: bool,
    /// End with exit code 3 if the CFR on the test split stays above this share
    #[arg(long, value_name = "CFR", value_parser = args::share)]
    fail_above: Option<f64>,
    /// Rounds at most
    #[arg(long, value_name = "N", default_value = "3", value_parser = args::whole::<usize>(1, 1000))]
    rounds: usize,
    /// Methods: sham, sft, dpo, policy, policy-matched, reward, rlhf, joint, joint-uncoupled, joint-shuffled, sequential, alternating
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_value = "rlhf,policy,joint")]
    methods: Vec<Method>,
    /// Everything is repeated with each of these seeds; none: with the seed above
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = args::whole::<u64>(0, LARGEST_SEED))]
    seeds: Vec<u64>,
    /// Learning rates that every method is tried at, on the gate split; none: the one of [repair]
    #[arg(long, value_name = "X,…", value_delimiter = ',', value_parser = args::rate)]
    grid: Vec<f64>,
    /// Prompts of the test of which each method's samples are taken: what its reward model picks among eight
    #[arg(long, value_name = "N", default_value = "108", value_parser = args::whole::<usize>(0, 10_000_000))]
    samples: usize,
    /// Dr.GRPO steps from each method's policy, to see what they bring back
    #[arg(long, value_name = "N", default_value = "0", value_parser = args::whole::<usize>(0, 1_000_000))]
    further: usize,
    /// Under which reward model they train: `own`, the method's, or `original`, the unrepaired one
    #[arg(long, value_enum, default_value = "own")]
    further_under: Under,
}

/// Sections with their keys, in the order in which the example shows them; the first has no header.
const SECTIONS: [(&str, &[&str]); 7] = [
    ("", &["seed"]),
    (
        "models",
        &[
            "policy",
            "reward",
            "judge",
            "second_judge",
            "refusal",
            "truth",
            "harm_threshold",
            "max_new_tokens",
            "batch_tokens",
            "template_arg",
        ],
    ),
    ("data", &["calibration", "replay", "retain", "plausible", "gate", "test", "kind", "as", "grammar"]),
    ("probe", &["approve", "sampler", "queries", "failures", "held_out", "attacker", "on_topic"]),
    ("gates", &["prefill", "allow_undecided", "fail_above"]),
    ("rounds", &["rounds"]),
    ("compare", &["methods", "seeds", "grid", "samples", "further", "further_under"]),
];
const REPAIR: &str = "repair";
const REMEDY: &str = "correct it; `ares run --example` shows every key";
/// How a round repairs; the other keys of `[repair]` are a recipe's.
const METHOD: &str = "method";
/// Keys of a recipe that stand elsewhere here.
const ELSEWHERE: [&str; 2] = ["seed", "batch_tokens"];

/// Reads a configuration. Fails on an unknown section or key, with the nearest one that there is, on a value out of its range, and
/// where a required one is missing.
pub(crate) fn read(path: &Path) -> Result<(Experiment, Rounds)> {
    let wrong = |found: String| Error::file(path, "the configuration of a loop or a comparison", REMEDY)(found);
    let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
    let mut table: toml::Table = toml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let repair = match table.remove(REPAIR) {
        None => toml::Table::new(),
        Some(toml::Value::Table(repair)) => repair,
        Some(other) => return Err(wrong(format!("{REPAIR} = {other}"))),
    };
    let keys = words(&table).and_then(|words| Keys::try_parse_from(words).map_err(plain)).map_err(wrong)?;
    let (method, repair) = recipe(repair, keys.seed, keys.models.batch_tokens).map_err(wrong)?;
    let Keys { seed, models, data, grammar, attack, approve, sampler, queries, failures, held_out, prefill, .. } = keys;
    let Keys { methods, seeds, grid, samples, further, further_under, .. } = keys;
    let experiment = Experiment {
        samples,
        further,
        further_under,
        grid,
        sweep: None,
        command: "compare",
        models,
        data,
        grammar,
        attack,
        suite: None,
        methods,
        seeds: if seeds.is_empty() { vec![seed] } else { seeds },
        repair,
        sampler,
        probes: queries,
        failures,
        sense: approve,
        prefill,
    };
    let Keys { rounds, allow_undecided, fail_above, .. } = keys;
    Ok((experiment, Rounds { rounds, method, held_out, allow_undecided, fail_above }))
}

/// The table as words of a command line. Fails on what stands in no section, or in another one.
fn words(table: &toml::Table) -> Result<Vec<String>, String> {
    let (mut words, command) = (Vec::new(), Keys::command());
    for (name, value) in table {
        let (section, inner) = match value {
            toml::Value::Table(inner) => (name.as_str(), inner.clone()),
            value => ("", toml::Table::from_iter([(name.clone(), value.clone())])),
        };
        let names = SECTIONS.iter().map(|(name, _)| *name).chain([REPAIR]).filter(|name| !name.is_empty());
        let Some((_, keys)) = SECTIONS.iter().find(|(name, _)| *name == section) else {
            return Err(format!("section [{section}]{}", nearest(section, names)));
        };
        for (key, value) in &inner {
            if !keys.contains(&key.as_str()) {
                let place = if section.is_empty() { "at the top".to_string() } else { format!("in [{section}]") };
                let own = |(_, keys): &&(&str, &[&str])| keys.contains(&key.as_str());
                let hint = match SECTIONS.iter().find(own) {
                    Some((section, _)) => format!("; it belongs into [{section}]"),
                    None if section.is_empty() => nearest(key, keys.iter().copied().chain(names)),
                    None => nearest(key, keys.iter().copied()),
                };
                return Err(format!("key {key} {place}{hint}"));
            }
            let flag = format!("--{}", key.replace('_', "-"));
            let Some(arg) = argument(&command, key) else { continue };
            let list = arg.get_value_delimiter().is_some();
            let one = |value: &toml::Value| match value {
                // As TOML writes it, quotes and all: what is no number is refused with the range of those that are.
                value if takes_numbers(arg) => Ok(value.to_string()),
                toml::Value::String(text) => Ok(text.clone()),
                other => Err(format!("{key} = {other}, where text is expected")),
            };
            match value {
                toml::Value::Boolean(false) if *key == "allow_undecided" => {}
                toml::Value::Boolean(true) if *key == "allow_undecided" => words.push(flag),
                toml::Value::Array(values) if list && values.is_empty() && arg.get_default_values().is_empty() => {}
                toml::Value::Array(values) if list => {
                    words.push(format!("{flag}={}", values.iter().map(one).collect::<Result<Vec<_>, _>>()?.join(",")));
                }
                value if *key == "allow_undecided" => {
                    return Err(format!("{key} = {value}, where true or false is expected"));
                }
                value => words.push(format!("{flag}={}", one(value)?)),
            }
        }
    }
    Ok(words)
}

/// The definition of a key.
fn argument<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| arg.get_long() == Some(&key.replace('_', "-")))
}

fn takes_numbers(arg: &Arg) -> bool {
    let kind = arg.get_value_parser().type_id();
    [TypeId::of::<u64>(), TypeId::of::<usize>(), TypeId::of::<f64>()].iter().any(|number| kind == *number)
}

/// What clap says, of keys instead of flags.
fn plain(error: clap::Error) -> String {
    let text = error.to_string();
    let mut text = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ").replace('\n', "");
    // Of two that begin alike the longer one stands later.
    for key in SECTIONS.iter().flat_map(|(_, keys)| *keys).rev() {
        text = text.replace(&format!("--{}", key.replace('_', "-")), key);
    }
    text
}

/// `[repair]`: the method, and a recipe.
fn recipe(mut table: toml::Table, seed: u64, batch_tokens: Option<usize>) -> Result<(Method, Recipe), String> {
    let defaults = defaults();
    let known = || defaults.keys().map(String::as_str).chain([METHOD]);
    if let Some(key) = table.keys().find(|key| !known().any(|known| known == *key)) {
        return Err(format!("key {key} in [{REPAIR}]{}", nearest(key, known())));
    }
    let method = match table.remove(METHOD) {
        None => Method::Joint,
        Some(value) => Method::from_str(value.as_str().unwrap_or_default(), false)
            .ok()
            .filter(|m| *m != Method::None)
            .ok_or_else(|| format!("{METHOD} = {value}, where one of {} is expected", names()))?,
    };
    table.insert("seed".into(), (seed as i64).into());
    table.insert("batch_tokens".into(), (batch_tokens.unwrap_or(BATCH_TOKENS) as i64).into());
    Ok((method, Recipe::try_from(table)?))
}

/// The methods that repair.
fn names() -> String {
    let methods = Method::value_variants().iter().filter(|m| **m != Method::None);
    methods.map(|method| method.name()).collect::<Vec<_>>().join(", ")
}

/// A recipe's keys that stand in `[repair]`, with their defaults.
fn defaults() -> toml::Table {
    let all = toml::Table::try_from(RepairConfig::default()).unwrap_or_default(); // plain numbers and names
    all.into_iter().filter(|(key, _)| !ELSEWHERE.contains(&key.as_str())).collect()
}

/// `; the nearest is …`, where one is near.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    let near = known.map(|known| (strsim::jaro_winkler(word, known), known)).max_by(|a, b| a.0.total_cmp(&b.0));
    near.filter(|(likeness, _)| *likeness > 0.6).map(|(_, near)| format!("; the nearest is {near}")).unwrap_or_default()
}

/// A configuration with every key, its meaning, and its default or a placeholder.
pub(crate) fn example() -> String {
    let mut out = String::from(
        "# What `ares run` does: rounds of search, repair of both models, gates, and search again; and what `ares compare` does:\n\
         # one search, repairs by several methods at equal steps, and the same held-out prompts for all. [rounds] and the method of\n\
         # [repair] are the loop's, [compare] is the comparison's.\n\
         # Paths are taken from the folder in which it is started. A key that is commented out may be left out.\n",
    );
    let command = Keys::command();
    for (section, keys) in SECTIONS {
        if !section.is_empty() {
            let _ = write!(out, "\n[{section}]\n");
        }
        for key in keys {
            let Some(arg) = argument(&command, key) else { continue };
            let _ = writeln!(out, "# {}", arg.get_help().map(ToString::to_string).unwrap_or_default());
            let default: Vec<String> =
                arg.get_default_values().iter().map(|value| value.to_string_lossy().into()).collect();
            let value = match (arg.is_required_set(), default.as_slice(), *key) {
                (true, ..) => format!("{:?}", placeholder(section, key)),
                (_, [], _) if arg.get_value_delimiter().is_some() => "[]".to_string(),
                (_, [], "allow_undecided") => "false".to_string(),
                (_, [value], "prefill") => format!("[{value}]"),
                (_, [value], "methods") => format!("{:?}", value.split(',').collect::<Vec<_>>()),
                (_, [value], _) if value.parse::<f64>().is_ok() => value.clone(),
                (_, [value], _) => format!("{value:?}"),
                _ => {
                    let name = arg.get_value_names().and_then(<[_]>::first).map_or("…", |name| name.as_str());
                    let quote = if takes_numbers(arg) { "" } else { "\"" };
                    let _ = writeln!(out, "# {key} = {quote}{name}{quote}");
                    continue;
                }
            };
            let _ = writeln!(out, "{key} = {value}");
        }
    }
    let _ =
        write!(out, "\n[{REPAIR}]\n# How every round repairs: {}\n{METHOD} = {:?}\n", names(), Method::Joint.name());
    for (key, value) in defaults() {
        for line in RepairConfig::docs(&key) {
            let _ = writeln!(out, "#{line}");
        }
        let _ = writeln!(out, "{key} = {value}");
    }
    out
}

fn placeholder(section: &str, key: &str) -> String {
    match (section, key) {
        (_, "judge") => "model:judge".to_string(),
        (_, "grammar") => "grammar.json".to_string(),
        ("data", key) => format!("{key}.jsonl"),
        (_, key) => key.to_string(),
    }
}

#[cfg(test)]
mod tests;
