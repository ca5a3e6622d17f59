//! Where a run is written, and how one that was stopped goes on.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory};

use super::Cli;
use crate::error::{Error, Result};
use crate::run::args::strip;
use crate::run::{Earlier, Manifest, RunDir};

// As a doc comment this would take the place of a command's own help.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// Directory to write; an earlier run is never overwritten [default: runs/COMMAND]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the run in DIR, as it was typed then
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
}

impl Place {
    /// Makes or takes the directory and does `work` in it. Fails as these do; an interruption says how to go on.
    pub(crate) fn run<T>(&self, command: &str, earlier: Earlier, work: impl FnOnce(&RunDir) -> Result<T>) -> Result<T> {
        let dir = match &self.resume {
            Some(dir) => RunDir::resume(dir)?,
            None => RunDir::create(self.out.as_deref().unwrap_or(&Path::new("runs").join(command)), earlier)?,
        };
        work(&dir).map_err(|error| match error {
            Error::Interrupted(_) => {
                let place = dir.path().display().to_string();
                let quote = if place.contains(char::is_whitespace) { "'" } else { "" };
                let line = format!("ares {command} --resume {quote}{place}{quote}");
                Error::Interrupted(format!("; what was done is kept: go on with `{line}`"))
            }
            other => other,
        })
    }
}

/// What was typed after the program's name; with `--resume DIR` what was typed when that run began, and then this. Fails where DIR
/// holds no run, or one of another command or folder.
pub(super) fn words(typed: Vec<OsString>) -> Result<Vec<OsString>> {
    let (mut beside, Some(dir)) = strip(typed.clone(), "--resume") else { return Ok(typed) };
    let commands = Cli::command();
    let command = typed.iter().find_map(|word| commands.find_subcommand(word)).map(clap::Command::get_name);
    if !command.is_some_and(|command| ["run", "demo", "compare", "probe", "repair"].contains(&command)) {
        return Ok(typed); // of a command that takes rows, where it is a flag
    }
    let (path, manifest) = Manifest::of_run(Path::new(&dir))?;
    match beside.iter().position(|word| *word == *manifest.command) {
        Some(at) => beside.remove(at),
        None => {
            let began = format!("expected `ares {} --resume`, for that is what began it", manifest.command);
            return Err(Error::Usage(format!("{}: {began}", path.display())));
        }
    };
    let begun = Path::new(&manifest.directory);
    if begun.is_dir() && std::env::current_dir().is_ok_and(|here| here != begun) {
        let why = format!("expected to be resumed where it was begun; go to {} first", begun.display());
        return Err(Error::Usage(format!("{}: {why}", path.display())));
    }
    // How much is said is for whoever types now.
    let loudness = ["-q", "--quiet", "-v", "--verbose"];
    let again = manifest.arguments.iter().filter(|word| !loudness.contains(&word.as_str())).map(OsString::from);
    Ok(again.chain(beside).chain(["--resume".into(), dir]).collect())
}
