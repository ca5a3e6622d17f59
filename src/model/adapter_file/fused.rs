//! Adapters of families whose files hold q∣k∣v and gate∣up as one matrix each (Phi-3). PEFT gives such a matrix one A; we give each part
//! its own. Read, the parts have the same A; written, the matrix has the rank of all parts together: their A one below the other, their B
//! along the diagonal. Both are exact.

use super::{AdapterFile, HostTensor, HostTensors, Targets, matrix};
use crate::model::config::ModelConfig;
use crate::model::projection::Projection;

impl AdapterFile {
    /// Cuts fused matrices into their parts. `rank` is what the config says of all: where the columns of B that say anything are no more than
    /// that in each part, as in files that we have written, the others go.
    pub(super) fn split(&mut self, config: &ModelConfig, rank: usize) {
        for layer in 0..config.layers {
            for (path, parts) in Projection::IN_ONE {
                let [a, b] = ['A', 'B'].map(|of| self.tensors.remove(&matrix(layer, path, of)));
                let (Some(a), Some(b)) = (a, b) else { continue };
                let mut rows = b.data.chunks_exact(self.rank);
                for &part in parts {
                    let own = rows.by_ref().take(part.shape(config).0).flatten().copied().collect();
                    self.set_lora(layer, part, a.data.clone(), own);
                }
            }
        }
        let places = (0..config.layers).flat_map(|layer| Projection::ALL.map(|part| (layer, part)));
        let kept: Vec<_> = places.filter_map(|place| Some((place, self.speaking(place)?))).collect();
        if rank >= self.rank || kept.iter().any(|(_, columns)| columns.len() > rank) {
            return;
        }
        let wide = std::mem::replace(&mut self.rank, rank);
        self.lora_alpha *= rank as f64 / wide as f64;
        for ((layer, part), mut columns) in kept {
            // Silent columns fill up what is left: of an adapter that has learned nothing yet, A is kept.
            let silent: Vec<usize> = (0..wide).filter(|column| !columns.contains(column)).collect();
            columns.extend(silent.into_iter().take(rank - columns.len()));
            columns.sort_unstable();
            let Some([a, b]) = self.lora(layer, part) else { continue };
            let cols = a.data.len() / wide;
            let of_a = columns.iter().flat_map(|column| a.data[column * cols..][..cols].to_vec()).collect();
            let of_b = b.data.chunks_exact(wide).flat_map(|row| columns.iter().map(|column| row[*column])).collect();
            self.set_lora(layer, part, of_a, of_b);
        }
    }

    /// The columns of a part's B that are not zero.
    fn speaking(&self, (layer, part): (usize, Projection)) -> Option<Vec<usize>> {
        let [_, b] = self.lora(layer, part)?;
        let speaks = |column: &usize| b.data.iter().skip(*column).step_by(self.rank).any(|x| *x != 0.0);
        Some((0..self.rank).filter(speaks).collect())
    }

    /// The tensors as files of a fused family hold them.
    pub(super) fn joined(&self) -> HostTensors {
        let mut out = self.tensors.clone();
        let layers = |name: &String| name.split(".layers.").nth(1)?.split('.').next()?.parse().ok();
        let layers: Vec<usize> =
            self.tensors.keys().filter_map(layers).max().map_or(Vec::new(), |last| (0..=last).collect());
        for (layer, (path, parts)) in layers.into_iter().flat_map(|layer| Projection::IN_ONE.map(|one| (layer, one))) {
            let found: Option<Vec<_>> = parts.iter().map(|part| self.lora(layer, *part)).collect();
            let Some(found) = found else { continue };
            let (rank, wide) = (self.rank, self.rank * parts.len());
            let a: Vec<f32> = found.iter().flat_map(|[a, _]| a.data.clone()).collect();
            let mut b = Vec::new();
            for (at, [_, own]) in found.iter().enumerate() {
                for row in own.data.chunks_exact(rank) {
                    b.extend(std::iter::repeat_n(0.0, at * rank));
                    b.extend(row);
                    b.extend(std::iter::repeat_n(0.0, wide - (at + 1) * rank));
                }
            }
            for part in parts {
                ['A', 'B'].iter().for_each(|of| {
                    out.remove(&matrix(layer, part.path(), *of));
                });
            }
            let shapes = [vec![wide, a.len() / wide], vec![b.len() / wide, wide]];
            for ((of, data), shape) in [('A', a), ('B', b)].into_iter().zip(shapes) {
                out.insert(matrix(layer, path, of), HostTensor { shape, data });
            }
        }
        out
    }

    /// Rank and alpha of the fused matrices, beside those of all: their scale is the others'.
    pub(super) fn patterns(&self) -> [serde_json::Value; 2] {
        let of = |value: &dyn Fn(usize) -> serde_json::Value| {
            let name = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
            Projection::IN_ONE.iter().map(|(path, parts)| (name(path), value(parts.len()))).collect()
        };
        let alpha = |n: usize| self.lora_alpha * if self.use_rslora { (n as f64).sqrt() } else { n as f64 };
        [of(&|n| (n * self.rank).into()), of(&|n| alpha(n).into())]
    }

    /// The shapes that fused matrices have in the files of `config`, by name; its parts are not there by themselves.
    pub(super) fn fuse_promises(
        &self,
        config: &ModelConfig,
        targets: &Targets,
        all: &mut std::collections::BTreeMap<String, Vec<usize>>,
    ) {
        for layer in 0..config.layers {
            for (path, parts) in Projection::IN_ONE {
                parts.iter().flat_map(|part| ['A', 'B'].map(|of| matrix(layer, part.path(), of))).for_each(|name| {
                    all.remove(&name);
                });
                let [a, b] = ['A', 'B'].map(|of| matrix(layer, path, of));
                let (rank, _) = self.own(targets, super::path(&a));
                all.insert(a, vec![rank, config.hidden_size]);
                all.insert(b, vec![parts.iter().map(|part| part.shape(config).0).sum(), rank]);
            }
        }
    }
}
