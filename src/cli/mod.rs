//! Commands: what was typed becomes valid options and one call.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use serde_json::json;

use crate::error::{Error, Result};

mod audit;
mod bench;
mod compare;
mod device;
mod doctor;
mod grammar;
mod inspect;
mod kernels;
mod merge;
mod place;
mod probe;
mod repair;
mod report;
mod rows;
mod rowwise;
mod run;
mod session;
mod watch;

pub(crate) use session::Session;

/// Finds prompts on which a policy and its reward model fail together, repairs both in one joint LoRA step, and proves on
/// held-out prompts that it worked.
#[derive(Debug, Parser)]
#[command(name = "ares", version, propagate_version = true, max_term_width = 110, after_help = AFTER)]
#[command(args_override_self = true)]
pub struct Cli {
    #[command(flatten)]
    session: Session,
    #[command(subcommand)]
    command: Command,
}

const AFTER: &str = "Begin with `ares demo`: the whole method on small models that the program carries with it.\n\
    Exit codes: 0 success, 1 failure, 2 usage, 3 gate not met, 130 interrupted (143 by SIGTERM), 141 reader gone.";

/// One value of it lives, for the length of a command: boxing the large ones would only hide them.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)]
enum Command {
    Demo(compare::Demo),
    Run(run::Run),
    #[command(name = "grammar")]
    MakeGrammar(grammar::MakeGrammar),
    Probe(probe::Probe),
    Detect(rowwise::Detect),
    Repair(repair::Repair),
    Compare(compare::Compare),
    Generate(rowwise::Generate),
    Score(rowwise::Score),
    Logprob(rowwise::Logprob),
    Judge(rowwise::Judge),
    Bench(bench::Bench),
    Inspect(inspect::Inspect),
    Audit(audit::Audit),
    Merge(merge::Merge),
    Kernels(kernels::Kernels),
    Doctor(doctor::Doctor),
    Report(report::Report),
    Completions(Completions),
    Man(Man),
}

/// Reads the command line. Wrong usage ends the process with a message and code 2, `--help` and `--version` with code 0. Fails
/// where a run is to be resumed that cannot be.
pub fn parse() -> Result<Cli> {
    let mut typed = std::env::args_os();
    let program = typed.next().into_iter();
    Ok(Cli::parse_from(program.chain(place::words(typed.collect())?)))
}

/// Does what was asked. Fails as the command does.
pub fn run(cli: Cli) -> Result<()> {
    device::join_pool()?;
    let session = cli.session;
    match cli.command {
        Command::Demo(command) => command.run(&session),
        Command::Run(command) => command.run(&session),
        Command::MakeGrammar(command) => command.run(&session),
        Command::Probe(command) => command.run(&session),
        Command::Detect(command) => command.run(&session),
        Command::Repair(command) => command.run(&session),
        Command::Compare(command) => command.run(&session),
        Command::Generate(command) => command.run(&session),
        Command::Score(command) => command.run(&session),
        Command::Logprob(command) => command.run(&session),
        Command::Judge(command) => command.run(&session),
        Command::Bench(command) => command.run(&session),
        Command::Inspect(command) => command.run(&session),
        Command::Audit(command) => command.run(&session),
        Command::Merge(command) => command.run(&session),
        Command::Kernels(command) => command.run(&session),
        Command::Doctor(command) => command.run(&session),
        Command::Report(command) => command.run(&session),
        Command::Completions(command) => command.run(&session),
        Command::Man(command) => command.run(&session),
    }
}

/// Print the completions of a shell, to be sourced by it
#[derive(Debug, Args)]
pub(crate) struct Completions {
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(self, _: &Session) -> Result<()> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "ares", &mut text);
        session::print(&String::from_utf8_lossy(&text))
    }
}

/// Write the manual: ares.1, and a page for every command
#[derive(Debug, Args)]
pub(crate) struct Man {
    /// Folder for the pages, made where it is not there (`man FOLDER/ares.1` shows one)
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

impl Man {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        std::fs::create_dir_all(&self.folder).map_err(Error::write(&self.folder))?;
        let command = Cli::command().disable_help_subcommand(true);
        clap_mangen::generate_to(command, &self.folder).map_err(Error::write(&self.folder))?;
        session.result(&json!({ "folder": self.folder }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }
}
