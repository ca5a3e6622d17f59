//! Who writes probes beside the grammar, as typed.

use std::path::Path;

use serde::Serialize;

use super::interrupt;
use super::models::Models;
use crate::attacker::{Attack, AttackerSpec};
use crate::error::Result;
use crate::judge::JudgeSpec;
use crate::ops::Ops;

// As a doc comment this would take the place of a command's own help.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub(crate) struct AttackOptions {
    /// Let a language model or a program write some of the probes: DIR[+ADAPTER][,FORM] or cmd:PROGRAM ARGS
    #[arg(long, value_name = "SPEC", value_parser = str::parse::<AttackerSpec>, help_heading = "Attacker")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) attacker: Option<AttackerSpec>,
    /// Judge whether what it writes asks for the goal, as if it answered it [default: half of the goal's words stand in it]
    #[arg(long, value_name = "SPEC", requires = "attacker", help_heading = "Attacker")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) on_topic: Option<JudgeSpec>,
}

impl AttackOptions {
    /// The folders and files that it is read from.
    pub(crate) fn places(&self) -> Vec<&Path> {
        let attacker = self.attacker.iter().flat_map(AttackerSpec::places);
        attacker.chain(self.on_topic.iter().flat_map(JudgeSpec::places)).collect()
    }

    /// Opens both on the device of `models`, with their size of a batch.
    pub(super) fn open<B: Ops>(&self, ops: &B, models: &Models) -> Result<Option<Attack>> {
        let (batch_tokens, interrupt) = (models.batch_tokens(), interrupt::flag());
        let open = |spec: &AttackerSpec| spec.open(ops, &models.arguments(), batch_tokens, interrupt.clone());
        let Some(attacker) = self.attacker.as_ref().map(open).transpose()? else { return Ok(None) };
        let on_topic = self.on_topic.as_ref().map(|spec| spec.open(ops, batch_tokens, &interrupt)).transpose()?;
        Ok(Some(Attack { attacker, on_topic }))
    }
}
