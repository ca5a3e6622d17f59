//! How much arithmetic a model's work is: what rates are counted in.

use super::batch::Batch;
use super::config::ModelConfig;
use super::projection::Projection;

/// Multiplications and additions, counted apart, of running `batch` forward and, with `backward`, back to its adapters of `rank`:
/// 2 N per row forward and 2 N for dX (the base is frozen), 2 r Σ(in + out) and twice that for the adapters, the products of
/// attention (2 forward, 5 back) over the pairs that see each other, the head over its rows.
pub(crate) fn flops(config: &ModelConfig, batch: &Batch, rank: usize, backward: bool) -> u64 {
    let (mut frozen, mut adapted) = (0, 0);
    for projection in Projection::ALL {
        let (out, input) = projection.shape(config);
        frozen += (config.layers * out * input) as u64;
        adapted += (config.layers * rank * (out + input)) as u64;
    }
    let rows = batch.len() as u64;
    let attention = 4 * batch.pairs() * (config.layers * config.heads * config.head_dim) as u64;
    let head = 2 * batch.rows.len() as u64 * (config.vocab_size * config.hidden_size) as u64;
    let head = if config.is_causal() { head } else { 0 };
    let forward = 2 * rows * (frozen + adapted) + attention + head;
    if backward { forward + rows * (2 * frozen + 4 * adapted) + attention * 5 / 2 + head } else { forward }
}

/// Of these, what generation spares itself: of its prompts' last block it wants nothing but keys and values. `prompts` as they are
/// read into the caches.
pub(crate) fn spared(config: &ModelConfig, prompts: &Batch) -> u64 {
    let (c, f, heads) = (config.hidden_size, config.intermediate_size, config.heads * config.head_dim);
    2 * prompts.len() as u64 * (heads * c + 3 * f * c) as u64 + 4 * prompts.pairs() * heads as u64
}

#[cfg(test)]
mod tests {
    use super::super::batch::{AnswerTokens, Heads};
    use super::*;

    /// Of a single block nothing is left but its q, k and v.
    #[test]
    fn all_but_keys_and_values_of_one_block() {
        let mut config = ModelConfig::open(std::path::Path::new("models/framing/policy")).unwrap();
        (config.layers, config.heads, config.kv_heads, config.head_dim) = (1, 6, 2, 32);
        let mut prompts = Batch::default();
        for rows in [1, 7, 40] {
            prompts.push(&[], &[AnswerTokens::new(&vec![0; rows])], Heads::Ends);
        }
        let ends = 2 * (prompts.rows.len() * config.vocab_size * config.hidden_size) as u64;
        let qkv = 2 * (prompts.len() * (6 + 2 * 2) * 32 * config.hidden_size) as u64;
        assert_eq!(flops(&config, &prompts, 0, false), spared(&config, &prompts) + qkv + ends);
    }
}
