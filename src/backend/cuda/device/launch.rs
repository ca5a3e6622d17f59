//! What a launch asks for beside its blocks and threads.

use cudarc::driver::sys::CUlaunchAttributeID::*;
use cudarc::driver::sys::{
    CUlaunchAttribute, CUlaunchAttributeValue, CUlaunchAttributeValue_union__bindgen_ty_1 as Cluster,
};

use crate::backend::cuda::driver::LaunchConfig;

/// Devices before sm_90 know none of them, not even clusters of one block.
pub(super) fn attributes(config: &LaunchConfig) -> Vec<CUlaunchAttribute> {
    let cluster = CUlaunchAttributeValue { clusterDim: Cluster { x: config.cluster, y: 1, z: 1 } };
    let early = CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
    let asked = [
        (config.cluster > 1, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, cluster),
        (config.dependent, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, early),
    ];
    let asked = asked.into_iter().filter(|(asked, ..)| *asked);
    asked.map(|(_, id, value)| CUlaunchAttribute { id, pad: [0; 4], value }).collect()
}
