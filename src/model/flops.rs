//! How much arithmetic a model's work is: what rates are counted in.

use super::batch::Batch;
use super::config::ModelConfig;
use super::projection::Projection;

/// Multiplications and additions, counted apart, of running `batch` forward and, with `backward`, back to its adapters of `rank`:
/// 2 N per row forward and 2 N for dX (the base is frozen), 2 r Σ(in + out) and twice that for the adapters, the products of
/// attention (2 forward, 5 back) over the pairs that see each other, the head over its rows. The last block's products after
/// attention are wanted of the head's rows alone, and no gradient below the first block's adapters.
pub(crate) fn flops(config: &ModelConfig, batch: &Batch, rank: usize, backward: bool) -> u64 {
    let (rows, read) = (batch.len() as u64, batch.rows.len() as u64);
    let mut total = 0;
    for projection in Projection::ALL {
        let (out, input) = projection.shape(config);
        let (frozen, adapted) = (2 * (out * input) as u64, 2 * (rank * (out + input)) as u64);
        let before = Projection::FUSED[0].contains(&projection);
        let run = (config.layers as u64 - 1) * rows + if before { rows } else { read };
        total += run * (frozen + adapted);
        if backward {
            let to_input = frozen + 2 * (rank * input) as u64;
            total += run * (frozen + 2 * adapted) - if before { rows * to_input } else { 0 };
        }
    }
    let attention = 4 * batch.pairs() * (config.layers * config.heads * config.head_dim) as u64;
    let head = if config.is_causal() { 2 * read * (config.vocab_size * config.hidden_size) as u64 } else { 0 };
    total + if backward { attention * 7 / 2 + 2 * head } else { attention + head }
}

/// Of these, what generation spares itself: of its prompts' last block it wants nothing but keys and values. `prompts` as they are
/// read into the caches.
pub(crate) fn spared(config: &ModelConfig, prompts: &Batch) -> u64 {
    4 * prompts.pairs() * (config.heads * config.head_dim) as u64
}

#[cfg(test)]
mod tests {
    use super::super::batch::{AnswerTokens, Heads};
    use super::*;

    /// Of a single block nothing is left but its q, k and v, and what ends read.
    #[test]
    fn all_but_keys_and_values_of_one_block() {
        let mut config = ModelConfig::open(std::path::Path::new("models/framing/policy")).unwrap();
        (config.layers, config.heads, config.kv_heads, config.head_dim) = (1, 6, 2, 32);
        let mut prompts = Batch::default();
        for rows in [1, 7, 40] {
            prompts.push(&[], &[AnswerTokens::new(&vec![0; rows])], Heads::Ends);
        }
        let (c, f) = (config.hidden_size, config.intermediate_size);
        let ends = 2 * (prompts.rows.len() * (config.vocab_size * c + 6 * 32 * c + 3 * f * c)) as u64;
        let qkv = 2 * (prompts.len() * (6 + 2 * 2) * 32 * c) as u64;
        assert_eq!(flops(&config, &prompts, 0, false), spared(&config, &prompts) + qkv + ends);
    }
}
