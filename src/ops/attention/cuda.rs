use super::tables::{TILE, WHOLE};
use super::{Attention, AttentionBackward, AttentionForward, AttentionSpec, Packing, check, costs};
use crate::backend::Cuda;
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::kernels::{self, AttentionBackwardParams, AttentionParams};
use crate::backend::cuda::usage::Build;
use crate::error::{Error, Result};
use crate::ops::Cost;

/// Threads of a block: four warps own 16 rows of a tile each.
const THREADS: u32 = 2 * TILE as u32;

/// How heads of one size are cut. Chosen by the spec alone: the batch must not change a row's bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// Columns in shared memory: the head size, padded.
    wide: u32,
    /// Query heads of a block of forward: two share what is read of k and v, if a block's sums fit the registers.
    heads: u32,
    /// Keys that arrive at a time.
    forward_strip: u32,
    /// Keys or rows that arrive at a time.
    backward_strip: u32,
    /// Threads of a block that sums dk and dv: above 128 columns two warps share them.
    key_threads: u32,
    /// Blocks of forward, of dq, and of dk and dv that must find registers on a multiprocessor. As many as none spills for.
    blocks: [u32; 3],
}

impl Plan {
    fn new(spec: &AttentionSpec) -> Result<Plan> {
        let wide = padded(spec.head_dim)?;
        let group = spec.heads / spec.kv_heads;
        // An odd group leaves one block half idle: worth it from five heads on.
        let heads = if wide <= 80 && group >= 2 && (group.is_multiple_of(2) || group >= 5) { 2 } else { 1 };
        let forward_strip = if wide <= 64 { 64 } else { 32 };
        let backward_strip = if wide <= 128 { 32 } else { 16 };
        let key_threads = if wide <= 128 { THREADS } else { 2 * THREADS };
        let blocks = match (wide, heads) {
            (..=64, _) => [4 - heads, 4, 2],
            (..=128, _) => [4 - heads, 3, 2],
            _ => [2, 2, 1],
        };
        Ok(Plan { wide, heads, forward_strip, backward_strip, key_threads, blocks })
    }

    /// Bytes of `tiles` tiles that stay and of two stages of two strips; rows are padded by eight columns.
    fn shared(&self, tiles: u32, strip: u32) -> u32 {
        2 * (self.wide + 8) * (tiles * TILE as u32 + 4 * strip)
    }

    fn forward_shared(&self) -> u32 {
        self.shared(self.heads, self.forward_strip)
    }

    fn backward_shared(&self) -> u32 {
        self.shared(2, self.backward_strip)
    }

    fn defines(&self, spec: &AttentionSpec) -> [Define; 15] {
        [
            ("HEAD_DIM", spec.head_dim as u64),
            ("WIDE", self.wide.into()),
            ("TILE", TILE as u64),
            ("WHOLE", WHOLE.into()),
            ("CAUSAL", spec.causal.into()),
            ("WINDOWED", spec.window.is_some().into()),
            ("SOFTCAP", spec.softcap.is_some().into()),
            ("FORWARD_BLOCKS", self.blocks[0].into()),
            ("QUERY_BLOCKS", self.blocks[1].into()),
            ("KEY_BLOCKS", self.blocks[2].into()),
            ("FORWARD_HEADS", self.heads.into()),
            ("FORWARD_STRIP", self.forward_strip.into()),
            ("FORWARD_SHARED", self.forward_shared().into()),
            ("BACKWARD_STRIP", self.backward_strip.into()),
            ("BACKWARD_SHARED", self.backward_shared().into()),
        ]
    }

    fn build(&self, spec: &AttentionSpec) -> Build {
        let budget = |build: Build, kernel, threads, shared: u32, blocks: u32| {
            // The smallest multiprocessor has 100 KB, of which each block takes one more than it asks for.
            build.with(kernel, threads, shared, blocks.min((100 << 10) / (shared + 1024)))
        };
        let [forward, queries, keys] = self.blocks;
        let build = Build::new(&kernels::ATTENTION, &self.defines(spec), THREADS);
        let build = budget(build, "attention_forward", THREADS, self.forward_shared(), forward);
        let build = budget(build, "attention_backward_queries", THREADS, self.backward_shared(), queries);
        budget(build, "attention_backward_keys", self.key_threads, self.backward_shared(), keys)
    }

    fn forward(&self, tiles: usize, spec: &AttentionSpec) -> LaunchConfig {
        let parts = spec.kv_heads as u32 * ((spec.heads / spec.kv_heads) as u32).div_ceil(self.heads);
        LaunchConfig::linear(tiles as u32 * parts, THREADS).with_shared(self.forward_shared())
    }

    /// One block per tile and head.
    fn backward(&self, tiles: usize, heads: usize, threads: u32) -> LaunchConfig {
        LaunchConfig::linear((tiles * heads) as u32, threads).with_shared(self.backward_shared())
    }
}

/// Columns of a head in shared memory: whole products of 16, above 128 of two warps.
pub(crate) fn padded(head_dim: usize) -> Result<u32> {
    match head_dim as u32 {
        e @ 8..=128 if e.is_multiple_of(8) => Ok(e.next_multiple_of(16)),
        e @ 129..=256 if e.is_multiple_of(8) => Ok(e.next_multiple_of(32)),
        e => Err(Error::Data {
            what: "size of an attention head".into(),
            expected: "a multiple of 8, at most 256".into(),
            found: e.to_string(),
            remedy: "this model needs --device cpu".into(),
        }),
    }
}

/// Causal heads of one size, with nothing else about them.
pub(crate) fn plain(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionSpec {
    AttentionSpec { heads, kv_heads, head_dim, scale: 1.0, window: None, softcap: None, causal: true }
}

/// Head sizes of the usual families, with one and with two heads of a block, and every kind of score.
pub(crate) fn builds() -> Vec<Build> {
    let sizes = [32, 64, 80, 96, 128, 256].map(|e| plain(2, 1, e));
    let others = [
        AttentionSpec { causal: false, ..plain(1, 1, 64) },
        AttentionSpec { window: Some(1), causal: false, ..plain(1, 1, 64) },
        AttentionSpec { window: Some(1), softcap: Some(1.0), ..plain(2, 1, 64) },
        AttentionSpec { window: Some(1), softcap: Some(1.0), causal: false, ..plain(2, 1, 128) },
    ];
    // Gemma 2's, of 2B and 9B, and of 27B.
    let capped = [128, 256].map(|e| AttentionSpec { softcap: Some(1.0), ..plain(2, 1, e) });
    let with_window = |spec| AttentionSpec { window: Some(1), ..spec };
    // Every other layer of these; Phi-3 mini, Mistral and OLMo 3, Gemma 3.
    let windowed = capped.into_iter().chain([96, 128, 256].map(|e| plain(2, 1, e))).map(with_window);
    sizes
        .into_iter()
        .chain(others)
        .chain(capped)
        .chain(windowed)
        .filter_map(|spec| Some(Plan::new(&spec).ok()?.build(&spec)))
        .collect()
}

/// A window of no end leaves room to add positions to it.
pub(crate) fn window(spec: &AttentionSpec) -> usize {
    spec.window.map_or(1 << 30, |window| window.min(1 << 30))
}

/// Rows, pairs, heads, key/value heads and head size, as costs count them.
fn sizes(packing: &Packing<Cuda>, spec: &AttentionSpec) -> [u64; 5] {
    let [h, kv, e] = [spec.heads, spec.kv_heads, spec.head_dim].map(|n| n as u64);
    [packing.rows() as u64, packing.pairs(spec), h, kv, e]
}

/// What the kernels of backward are charged: dq; dk and dv. Of its five products both need two, which are charged half to each.
fn backward_shares([rows, pairs, h, kv, e]: [u64; 5]) -> [Cost; 2] {
    let [_, whole] = costs(rows, pairs, h, kv, e, 2);
    let queries = Cost { flops: whole.flops * 2 / 5, bytes: 2 * rows * e * (4 * h + 2 * kv) };
    let keys = Cost { flops: whole.flops - queries.flops, bytes: 2 * rows * e * (2 * h + 4 * kv) };
    [queries, keys]
}

impl Attention for Cuda {
    fn attention_forward(&self, operands: AttentionForward<Self>) -> Result<()> {
        let AttentionForward { o, lse, qkv, packing, spec } = operands;
        check(&[o], lse, &[qkv], packing, &spec)?;
        let plan = Plan::new(&spec)?;
        let (config, defines) = (plan.forward(packing.tiles.queries.rows(), &spec), plan.defines(&spec));
        self.charge(|| {
            let [t, pairs, h, kv, e] = sizes(packing, &spec);
            costs(t, pairs, h, kv, e, 2)[0]
        });
        let params = AttentionParams {
            o: &mut o.buffer,
            lse: &mut lse.buffer,
            qkv: &qkv.buffer,
            tiles: &packing.tiles.queries.buffer,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            window: window(&spec),
            scale: spec.scale,
            softcap: spec.softcap.unwrap_or(0.0),
        };
        // SAFETY: `check` proved the shapes, and that the segments, from which the tiles were made, tile the rows.
        unsafe { kernels::attention_forward(self, &defines, config, &params) }
    }

    fn attention_backward(&self, operands: AttentionBackward<Self>) -> Result<()> {
        let AttentionBackward { dqkv, d_o, o, lse, qkv, packing, spec } = operands;
        check(&[o, d_o], lse, &[qkv, dqkv], packing, &spec)?;
        let plan = Plan::new(&spec)?;
        let (defines, tiles, rows) = (plan.defines(&spec), &packing.tiles, packing.rows());
        let queries = plan.backward(tiles.queries.rows(), spec.heads, THREADS);
        let keys = plan.backward(tiles.keys.rows(), spec.kv_heads, plan.key_threads);
        let sum = LaunchConfig::linear((tiles.shared.rows() * spec.kv_heads) as u32, THREADS);
        let (planes, sums) = (2 * spec.heads * rows, tiles.slots * spec.kv_heads * 2 * TILE * spec.head_dim);
        let mut scratch = self.scratch(planes + sums)?;
        let params = AttentionBackwardParams {
            dqkv: &mut dqkv.buffer,
            planes: &mut scratch,
            d_o: &d_o.buffer,
            o: &o.buffer,
            lse: &lse.buffer,
            qkv: &qkv.buffer,
            query_tiles: &tiles.queries.buffer,
            key_tiles: &tiles.keys.buffer,
            split_tiles: &tiles.shared.buffer,
            positions: packing.positions.buffer(),
            sums: planes as u64,
            rows,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            window: window(&spec),
            scale: spec.scale,
            softcap: spec.softcap.unwrap_or(0.0),
        };
        let shares = || backward_shares(sizes(packing, &spec));
        self.charge(|| shares()[0]);
        // SAFETY: `check` proved the shapes, and that the segments, from which the tiles were made, tile the
        // rows; the scratch was just made as large as the planes and the slots.
        unsafe {
            kernels::attention_backward_queries(self, &defines, queries, &params)?;
            self.charge(|| shares()[1]);
            kernels::attention_backward_keys(self, &defines, keys, &params)?;
            self.charge(|| Cost { flops: sums as u64, bytes: 4 * sums as u64 });
            kernels::attention_backward_sum(self, &defines, sum, &params)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_size_fits_the_smallest_device() {
        for e in (8..=256).step_by(8) {
            for heads in 1..9 {
                let plan = Plan::new(&plain(heads, 1, e)).unwrap();
                assert!(plan.wide as usize >= e && plan.wide < e as u32 + 32);
                assert!((plan.wide * THREADS / plan.key_threads).is_multiple_of(16), "{plan:?}");
                assert!(plan.forward_shared() <= 99 * 1024 && plan.backward_shared() <= 99 * 1024, "{plan:?}");
                // 164 KB on sm_80, of which each block takes one more.
                let pair = 2 * (plan.forward_shared().max(plan.backward_shared()) + 1024);
                assert!(e > 128 || pair <= 164 * 1024, "two blocks find no room: {plan:?}");
                assert_eq!((plan.wide + 8) % 16, 8, "an odd number of 16-byte chunks");
            }
        }
        for e in [0, 4, 12, 264] {
            assert!(Plan::new(&plain(1, 1, e)).is_err(), "{e}");
        }
    }

    #[test]
    fn blocks_cover_all_heads() {
        for (heads, kv_heads, blocks) in [(14, 2, 8), (12, 2, 6), (3, 1, 3), (2, 2, 2), (4, 2, 2)] {
            let spec = plain(heads, kv_heads, 64);
            assert_eq!(Plan::new(&spec).unwrap().forward(5, &spec).grid, [5 * blocks, 1, 1]);
        }
    }

    #[test]
    fn an_endless_window_leaves_room_for_positions() {
        assert_eq!(window(&plain(1, 1, 8)), 1 << 30);
        assert_eq!(window(&AttentionSpec { window: Some(7), ..plain(1, 1, 8) }), 7);
    }
}
