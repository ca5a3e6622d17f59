//! Places in a kernel's object as file and line.

use std::path::Path;
use std::process::Command;

/// Replaces each `[+0x12ab]`, the offset just past a call, by `kernels/norm.cu:12`, or for a line of a header by that and who
/// called it. Without addr2line (binutils) the offsets stay.
pub(super) fn resolve(object: &Path, message: &str) -> String {
    let mut rest = message;
    let mut out = String::new();
    while let Some(at) = rest.find("[+0x") {
        out.push_str(&rest[..at]);
        let inner = &rest[at + 4..];
        let end = inner.find(']').unwrap_or(inner.len());
        match u64::from_str_radix(&inner[..end], 16).ok().and_then(|offset| place(object, offset)) {
            Some(place) => out.push_str(&place),
            None => out.push_str(&rest[at..at + 4 + end + 1]),
        }
        rest = &inner[(end + 1).min(inner.len())..];
    }
    out + rest
}

fn place(object: &Path, offset: u64) -> Option<String> {
    // The offset is where the call returns to; the call itself lies before it.
    let address = format!("{:#x}", offset.checked_sub(1)?);
    let output = Command::new("addr2line").arg("-i").arg("-e").arg(object).arg(&address).output().ok()?;
    frames(&String::from_utf8_lossy(&output.stdout))
}

/// From the innermost inlined frame to the kernel's own; the simulator's headers are nobody's line.
fn frames(text: &str) -> Option<String> {
    let frame = |line: &str| {
        let place = &line[line.rfind("kernels/")?..];
        let place = place.split(' ').next().unwrap_or(place);
        let known = !place.starts_with("kernels/sim") && !place.ends_with(":?") && !place.ends_with(":0");
        known.then(|| place.to_string())
    };
    let mut found: Vec<String> = text.lines().filter_map(frame).collect();
    found.dedup();
    let inner = found.first()?.clone();
    match found.last() {
        Some(outer) if *outer != inner => Some(format!("{inner} (called at {outer})")),
        _ => Some(inner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_own_line_is_named() {
        let inlined =
            "/c/e.tmp/kernels/sim.h:93\n/c/e.tmp/kernels/device.cuh:159\n/c/e.tmp/kernels/k.cu:6 (discriminator 2)\n";
        assert_eq!(frames(inlined).unwrap(), "kernels/device.cuh:159 (called at kernels/k.cu:6)");
        assert_eq!(frames("/c/kernels/k.cu:6\n").unwrap(), "kernels/k.cu:6");
        assert_eq!(frames("??:0\n"), None);
    }

    #[test]
    fn what_is_unknown_stays() {
        let nowhere = Path::new("/nonexistent.so");
        assert_eq!(resolve(nowhere, "reads at [+0x12], wrong"), "reads at [+0x12], wrong");
        assert_eq!(resolve(nowhere, "no place"), "no place");
    }
}
