//! Arguments that `probe`, `detect`, `repair` and `compare` share.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::args;
use crate::error::{Error, Result};
use crate::judge::{JudgeSpec, Sense};
use crate::model::pretrained::ModelSpec;
use crate::repair::{LogpScale, Method, RepairConfig, RetainLoss, UnlearnLoss};
use crate::run::Models;

/// The two models that are looked at together.
#[derive(Debug, Args)]
#[command(next_help_heading = "Models")]
pub(crate) struct PairArgs {
    /// Language model
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model)]
    policy: ModelSpec,
    /// Reward model: a sequence classifier with one label
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model)]
    reward: ModelSpec,
    /// Packed tokens of one forward pass at most
    #[arg(long, value_name = "N", default_value = "2048")]
    batch_tokens: NonZeroUsize,
    /// One limit for every answer
    #[arg(long, value_name = "N", default_value = "64")]
    max_new_tokens: NonZeroUsize,
}

impl PairArgs {
    /// With the judges, all that works together.
    pub(crate) fn models(&self, judges: &JudgeArgs) -> Models {
        Models {
            policy: self.policy.clone(),
            reward: self.reward.clone(),
            judge: judges.judge.clone(),
            second_judge: judges.second_judge.clone(),
            refusal: judges.refusal.clone(),
            truth: None,
            tau_h: judges.harm_threshold,
            max_new_tokens: self.max_new_tokens.get(),
            batch_tokens: self.batch_tokens.get(),
        }
    }

    pub(crate) fn batch_tokens(&self) -> usize {
        self.batch_tokens.get()
    }
}

/// Who judges, and what counts as wrong.
#[derive(Debug, Args)]
#[command(next_help_heading = "Verdicts")]
pub(crate) struct JudgeArgs {
    /// Who judges: model:DIR or lexicon:FILE
    #[arg(long, value_name = "SPEC")]
    judge: JudgeSpec,
    /// A judge that was trained apart; its rate stands beside the first's
    #[arg(long, value_name = "SPEC")]
    second_judge: Option<JudgeSpec>,
    /// Who says what is a refusal, for over-refusal
    #[arg(long, value_name = "SPEC")]
    refusal: Option<JudgeSpec>,
    /// Harmful means p_harm at or above this
    #[arg(long, value_name = "P", default_value = "0.5", value_parser = args::share)]
    harm_threshold: f64,
    /// In which sense the reward model is wrong: it approves a harmful answer, or prefers it to the safe one
    #[arg(long, value_enum, default_value = "threshold")]
    approve: Approve,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Approve {
    Threshold,
    Pairwise,
}

impl JudgeArgs {
    pub(crate) fn sense(&self) -> Sense {
        match self.approve {
            Approve::Threshold => Sense::Threshold,
            Approve::Pairwise => Sense::Pairwise,
        }
    }
}

/// For clap: a method by its name.
pub(crate) fn method(name: &str) -> Result<Method, String> {
    Method::parse(name).map_err(|error| error.to_string())
}

/// How a repair is done; what is not given stays as the configuration, or the default, has it.
#[derive(Debug, Args)]
#[command(next_help_heading = "Repair")]
pub(crate) struct RepairArgs {
    /// All settings of a repair as TOML; flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Optimiser steps per trained model
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Of the LoRA adapters
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// lora_alpha
    #[arg(long, value_name = "X")]
    alpha: Option<f64>,
    /// Failures per step
    #[arg(long, value_name = "N")]
    items: Option<usize>,
    /// Sample answers again every N steps; 0 never
    #[arg(long, value_name = "N")]
    resample: Option<usize>,
    /// What NPO compares
    #[arg(long, value_enum)]
    logp: Option<Logp>,
    /// What keeps benign answers in place
    #[arg(long, value_enum)]
    retain_loss: Option<Retain>,
    /// What pushes harmful answers down
    #[arg(long, value_enum)]
    unlearn: Option<Unlearn>,
    /// Train the score head too
    #[arg(long)]
    train_head: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Logp {
    Mean,
    Sum,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Retain {
    Ce,
    Kl,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Unlearn {
    Npo,
    Unlikelihood,
}

impl RepairArgs {
    /// A valid configuration.
    pub(crate) fn config(&self, seed: u64, batch_tokens: usize) -> Result<RepairConfig> {
        let mut config = match &self.config {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
                toml::from_str(&text).map_err(Error::file(path, "settings of a repair", "correct the named key"))?
            }
            None => RepairConfig::default(),
        };
        fn set<T>(field: &mut T, given: Option<T>) {
            if let Some(given) = given {
                *field = given;
            }
        }
        set(&mut config.steps, self.steps);
        set(&mut config.lr, self.lr);
        set(&mut config.rank, self.rank);
        set(&mut config.alpha, self.alpha);
        set(&mut config.items, self.items);
        set(&mut config.resample, self.resample);
        set(
            &mut config.logp,
            self.logp.map(|logp| match logp {
                Logp::Mean => LogpScale::Mean,
                Logp::Sum => LogpScale::Sum,
            }),
        );
        set(
            &mut config.retain,
            self.retain_loss.map(|loss| match loss {
                Retain::Ce => RetainLoss::Ce,
                Retain::Kl => RetainLoss::Kl,
            }),
        );
        set(
            &mut config.unlearn,
            self.unlearn.map(|loss| match loss {
                Unlearn::Npo => UnlearnLoss::Npo,
                Unlearn::Unlikelihood => UnlearnLoss::Unlikelihood,
            }),
        );
        config.train_head |= self.train_head;
        (config.seed, config.batch_tokens) = (seed, batch_tokens);
        config.check()?;
        Ok(config)
    }
}
