use super::{Decode, DecodeAttention, KvCache, SlotTable, check, cost};
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::kernels::{self, DecodeParams};
use crate::backend::cuda::usage::Build;
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::attention::cuda::{padded, plain, window};
use crate::ops::{AttentionSpec, Cost, expect};

/// Positions whose sums are one part: it alone, never the batch, decides in which order a row is summed.
const SPLIT: usize = 256;
/// Keys that arrive at a time for a warp, and query heads of a block: one side of a product each.
const STRIP: u32 = 16;

/// How heads of one size are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// Columns in shared memory: the head size, padded.
    wide: u32,
    /// Warps of a block: each has its own two stages of keys and values, which must fit with the others'.
    warps: u32,
}

impl Plan {
    fn new(spec: &AttentionSpec) -> Result<Plan> {
        let wide = padded(spec.head_dim)?;
        Ok(Plan { wide, warps: if wide <= 128 { 4 } else { 2 } })
    }

    fn threads(&self) -> u32 {
        32 * self.warps
    }

    /// Bytes of the query heads, of each warp's strips, and of each warp's maxima and sums.
    fn shared(&self) -> u32 {
        let strip = 2 * STRIP * (self.wide + 8);
        strip + self.warps * (4 * strip + 8 * STRIP)
    }

    fn defines(&self, spec: &AttentionSpec) -> [Define; 6] {
        [
            ("HEAD_DIM", spec.head_dim as u64),
            ("WIDE", self.wide.into()),
            ("SOFTCAP", spec.softcap.is_some().into()),
            ("DECODE_WARPS", self.warps.into()),
            ("SPLIT", SPLIT as u64),
            ("SHARED_BYTES", self.shared().into()),
        ]
    }

    /// A thread per 16 bytes of a key or value.
    fn append(&self, rows: usize, spec: &AttentionSpec) -> LaunchConfig {
        let chunks = rows * 2 * spec.kv_heads * spec.head_dim / 8;
        LaunchConfig::linear((chunks as u32).div_ceil(self.threads()), self.threads())
    }

    /// A block per row, key/value head, 16 of its query heads and part of the cache, however much of it is filled.
    fn attend(&self, rows: usize, length: usize, spec: &AttentionSpec) -> LaunchConfig {
        let parts = ((spec.heads / spec.kv_heads) as u32).div_ceil(STRIP);
        let blocks = (rows * spec.kv_heads * length.div_ceil(SPLIT)) as u32 * parts;
        LaunchConfig::linear(blocks, self.threads()).with_shared(self.shared())
    }

    /// A warp per row and query head.
    fn combine(&self, rows: usize, spec: &AttentionSpec) -> LaunchConfig {
        LaunchConfig::linear(((rows * spec.heads) as u32).div_ceil(self.warps), self.threads())
    }
}

/// Head sizes of the usual families.
pub(crate) fn builds() -> Vec<Build> {
    let sizes = [32, 64, 80, 96, 128, 256].map(|e| plain(2, 1, e));
    let build = |spec: &AttentionSpec| {
        let plan = Plan::new(spec).ok()?;
        // The smallest multiprocessor has 100 KB, of which each block takes one more than it asks for.
        let (shared, blocks) = (plan.shared(), 2.min((100 << 10) / (plan.shared() + 1024)));
        let build = Build::new(&kernels::DECODE, &plan.defines(spec), plan.threads());
        Some(build.with("decode_attention", plan.threads(), shared, blocks))
    };
    let capped = [128, 256].map(|e| AttentionSpec { softcap: Some(1.0), ..plain(2, 1, e) });
    sizes.iter().chain(&capped).filter_map(build).collect()
}

impl Decode for Cuda {
    fn kv_cache(&self, slots: usize, length: usize, spec: AttentionSpec) -> Result<KvCache<Self>> {
        Plan::new(&spec)?;
        let rows = slots * spec.kv_heads;
        let zeros = || Tensor::zeros(self, rows, length * spec.head_dim);
        Ok(KvCache { k: zeros()?, v: zeros()?, slots, length, spec })
    }

    fn cache_append(&self, cache: &mut KvCache<Self>, qkv: &Tensor<Self>, table: &SlotTable<Self>) -> Result<()> {
        check(qkv, cache, table)?;
        let spec = cache.spec;
        let params = params(cache, table);
        let plan = Plan::new(&spec)?;
        let (defines, config) = (plan.defines(&spec), plan.append(qkv.rows(), &spec));
        self.charge(|| Cost { flops: 0, bytes: 4 * 2 * (qkv.rows() * spec.kv_heads * spec.head_dim) as u64 });
        // SAFETY: the cache was made of its spec; `check` proved the other shapes, and that slots and positions lie within it.
        unsafe {
            let (k, v) = (&mut cache.k.buffer, &mut cache.v.buffer);
            kernels::cache_append(self, &defines, config, k, v, &qkv.buffer, &params)
        }
    }

    fn decode_attention(&self, operands: DecodeAttention<Self>) -> Result<()> {
        let DecodeAttention { o, qkv, cache, table } = operands;
        check(qkv, cache, table)?;
        let spec = cache.spec;
        let params = params(cache, table);
        expect("decode", "o", o.shape(), (qkv.rows(), spec.heads * spec.head_dim))?;
        let (plan, n) = (Plan::new(&spec)?, qkv.rows());
        let (defines, attend) = (plan.defines(&spec), plan.attend(n, cache.length, &spec));
        // Per row, head and part: a column each, the maximum and the sum.
        let mut scratch = self.scratch(n * spec.heads * cache.length.div_ceil(SPLIT) * (spec.head_dim + 2))?;
        if self.profile().is_on() {
            // How much of the cache is read only the device knows.
            let [positions, leads, common] = [&table.positions, &table.leads, &table.common].map(|c| c.read(self));
            let rows = positions?.into_iter().zip(leads?).zip(common?).enumerate();
            let seen = rows.map(|(row, ((position, lead), common))| {
                let first = (position + 1).saturating_sub(params.window as u32);
                let own = if lead as usize == row { first } else { first.max(common) };
                [position + 1 - first, (position + 1).saturating_sub(own)].map(u64::from)
            });
            let pairs = seen.fold([0; 2], |sum, seen| [sum[0] + seen[0], sum[1] + seen[1]]);
            self.charge(|| cost(n as u64, pairs, &spec, 2));
        }
        let partial = &mut *scratch;
        // SAFETY: the cache was made of its spec; `check` proved the other shapes, that slots and positions lie within it, leads in the table;
        // the scratch was just made as large as all parts.
        unsafe {
            let (k, v) = (&cache.k.buffer, &cache.v.buffer);
            kernels::decode_attention(self, &defines, attend, partial, &qkv.buffer, k, v, &params)?;
            kernels::decode_combine(self, &defines, plan.combine(n, &spec), &mut o.buffer, partial, &params)
        }
    }
}

/// What all kernels read.
fn params<'a>(cache: &KvCache<Cuda>, table: &'a SlotTable<Cuda>) -> DecodeParams<'a> {
    let spec = &cache.spec;
    DecodeParams {
        slots: table.slots.buffer(),
        positions: table.positions.buffer(),
        leads: table.leads.buffer(),
        common: table.common.buffer(),
        rows: table.slots.rows(),
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        length: cache.length,
        window: window(spec),
        scale: spec.scale,
        softcap: spec.softcap.unwrap_or(0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_blocks_fit_a_multiprocessor() {
        for e in (8..=256).step_by(8) {
            let plan = Plan::new(&plain(1, 1, e)).unwrap();
            // 164 KB on sm_80, of which each block takes one more.
            assert!(2 * (plan.shared() + 1024) <= 164 * 1024, "{plan:?}");
            assert!(2 * STRIP * 4 * (plan.wide + 8) >= STRIP * plan.wide * 4, "sums lie where strips lay");
        }
        assert!(Plan::new(&plain(1, 1, 20)).is_err());
    }

    #[test]
    fn grids_cover_the_cache() {
        let plan = Plan::new(&plain(14, 2, 64)).unwrap();
        assert_eq!(plan.attend(3, 257, &plain(14, 2, 64)).grid, [3 * 2 * 2, 1, 1]);
        assert_eq!(plan.attend(3, 256, &plain(34, 2, 64)).grid, [3 * 2 * 2, 1, 1]);
        assert_eq!(plan.combine(3, &plain(14, 2, 64)).grid, [11, 1, 1]);
        assert_eq!(plan.append(3, &plain(14, 2, 64)).grid, [1, 1, 1]);
        assert_eq!(plan.append(5, &plain(14, 2, 64)).grid, [2, 1, 1]);
    }
}
