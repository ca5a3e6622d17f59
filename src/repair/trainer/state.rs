//! Where a repair stands between two steps: saved, and gone on from to the last bit.

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{RepairOutcome, StepMetrics, Trainer};
use crate::error::{Error, Result};
use crate::model::AdapterFile;
use crate::model::adapter_file::HostTensors;
use crate::ops::Ops;
use crate::repair::data::Shuffle;
use crate::repair::prepared::PreparedFailure;

/// All that the next one depends on, but adapters and moments.
#[derive(Serialize, Deserialize)]
struct State {
    outcome: RepairOutcome,
    updates: [u32; 2],
    tokens: [u64; 2],
    failures: Vec<PreparedFailure>,
    shuffles: [Shuffle; 4],
    random: [ChaCha8Rng; 2],
}

impl<B: Ops> Trainer<'_, B> {
    /// Where the repair stands, but for the metrics of its steps: as JSON, and as tensors. Fails where the device does.
    pub fn save(&self) -> Result<(String, HostTensors)> {
        let mut tensors = HostTensors::new();
        for (role, side, model) in
            [("policy", &self.policy, &self.pair.policy), ("reward", &self.reward, &self.pair.reward)]
        {
            let (Some(side), Some(adapter)) = (side, &model.adapter) else { continue };
            let ops = &model.transformer.ops;
            for (what, own) in [("adapter", adapter.to_file(ops)?.tensors), ("moments", side.moments.to_host(ops)?)] {
                tensors.extend(own.into_iter().map(|(name, tensor)| (format!("{role}.{what}.{name}"), tensor)));
            }
        }
        let state = State {
            outcome: RepairOutcome { history: Vec::new(), ..self.outcome.clone() },
            updates: [&self.policy, &self.reward].map(|side| side.as_ref().map_or(0, |side| side.updates)),
            tokens: self.tokens_of(),
            failures: self.data.failures.clone(),
            shuffles: [&self.failures, &self.reward_failures, &self.retain, &self.replay].map(Shuffle::clone),
            random: [self.prefixes.clone(), self.weights.clone()],
        };
        Ok((serde_json::to_string(&state).map_err(|error| fault("a state that JSON holds", error))?, tensors))
    }

    /// Stands where [`Trainer::save`] was called, after the steps of `history`; what follows is the same to the last bit. Fails
    /// unless all of it fits.
    pub fn restore(&mut self, state: &str, tensors: &HostTensors, history: Vec<StepMetrics>) -> Result<()> {
        let state = self.go_on_from(state, tensors)?;
        self.outcome = RepairOutcome { history, ..state.outcome };
        for (side, tokens) in [&mut self.policy, &mut self.reward].into_iter().zip(state.tokens) {
            side.iter_mut().for_each(|side| side.tokens = tokens);
        }
        self.data.failures = state.failures;
        [self.failures, self.reward_failures, self.retain, self.replay] = state.shuffles;
        [self.prefixes, self.weights] = state.random;
        Ok(())
    }

    /// Takes over adapters and moments of another repair of this pair, to train on. Fails unless they fit.
    pub fn continue_from(&mut self, state: &str, tensors: &HostTensors) -> Result<()> {
        self.go_on_from(state, tensors).map(|_| ())
    }

    fn go_on_from(&mut self, state: &str, tensors: &HostTensors) -> Result<State> {
        let state: State = serde_json::from_str(state).map_err(|error| fault("where a repair stood", error))?;
        let (policy, reward) = (&mut self.pair.policy, &mut self.pair.reward);
        for (role, side, model) in [("policy", &mut self.policy, policy), ("reward", &mut self.reward, reward)] {
            let (Some(side), Some(adapter)) = (side, &mut model.adapter) else { continue };
            let own = |what: &str| -> HostTensors {
                let prefix = format!("{role}.{what}.");
                let named =
                    tensors.iter().filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?.to_string(), t.clone())));
                named.collect()
            };
            let transformer = &model.transformer;
            side.moments.load(&transformer.ops, &own("moments"))?;
            let file = AdapterFile { tensors: own("adapter"), ..adapter.to_file(&transformer.ops)? };
            *adapter = transformer.load_adapter(&file)?;
        }
        for (side, updates) in [&mut self.policy, &mut self.reward].into_iter().zip(state.updates) {
            side.iter_mut().for_each(|side| side.updates = updates);
        }
        Ok(state)
    }
}

fn fault(expected: &str, found: serde_json::Error) -> Error {
    Error::Shape { op: "repair", expected: expected.into(), found: found.to_string() }
}
