//! `ares completions SHELL`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Session, session};
use crate::error::Result;

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
