//! `ares grammar`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Session;
use crate::error::Result;
use crate::run::goals::{self, Goals};
use crate::text::rows::Format;
use crate::text::write_atomic;

/// Make a grammar for the search from a list of goals
///
/// The list's rows become topics. Forms, personas and tactics are the program's own: a beginning, to be edited for the model at hand.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
    ares grammar --goals harmbench_behaviors_text_all.csv --topics 100 --out grammar.json")]
pub(crate) struct MakeGrammar {
    /// Goals: AdvBench, HarmBench, JailbreakBench, StrongREJECT, or rows with a `prompt`
    #[arg(long, value_name = "FILE")]
    goals: PathBuf,
    /// Take the rows for those of this list, whatever their columns look like
    #[arg(long = "as", value_name = "NAME", value_enum)]
    told: Option<Format>,
    /// Topics at most, evenly spread over the list [default: all]
    #[arg(long, value_name = "N")]
    topics: Option<NonZeroUsize>,
    /// The answer that is right for every goal: a repair trains the policy towards it
    #[arg(long, value_name = "TEXT", default_value = "I'm sorry, but I can't help with that.")]
    safe: String,
    /// Take the list's targets (`Sure, here is …`) for the wrong answers that the reward model is tried on
    #[arg(long)]
    targets: bool,
    /// File to write
    #[arg(long, value_name = "FILE", default_value = "grammar.json")]
    out: PathBuf,
}

impl MakeGrammar {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let (most, safe) = (self.topics.map(NonZeroUsize::get), self.safe.as_str());
        let goals = Goals { file: &self.goals, told: self.told, most, safe, targets: self.targets };
        let made = goals::grammar(&goals, &self.out)?;
        let text = serde_json::to_string_pretty(&made.json).unwrap_or_default() + "\n"; // texts and lists: cannot fail
        write_atomic(&self.out, text.as_bytes())?;
        let grammar = &made.grammar;
        let [topics, domains, tactics] = [grammar.topics.len(), grammar.domains.len(), grammar.tactics.len()];
        let (cells, place, left_out) = (grammar.cells(), self.out.display(), made.left_out);
        session.say(&format!(
            "{topics} topics in {domains} domains, {tactics} tactics: {cells} cells; {left_out} rows left out"
        ));
        session.say(&format!("wrote {place}: look it over, then give it to `ares probe` or `ares run`"));
        session.result(
            &json!({ "out": self.out, "topics": topics, "domains": domains, "tactics": tactics, "left_out": left_out }),
        )
    }
}
