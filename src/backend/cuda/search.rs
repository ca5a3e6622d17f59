//! Where libnvrtc may lie, and what to say when it does not.

use std::fs;
use std::path::{Path, PathBuf};

/// The CUDA version that a driver speaks: what it cannot load must not be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverVersion {
    /// (12, 4)
    pub(crate) cuda: (u32, u32),
    /// `550.54.14`, where the system says.
    pub(crate) release: Option<String>,
}

impl std::fmt::Display for DriverVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let release = self.release.as_deref().and_then(|r| r.split('.').next());
        let (major, minor) = self.cuda;
        match release {
            Some(release) => write!(f, "driver {release} speaks CUDA {major}.{minor}"),
            None => write!(f, "the driver speaks CUDA {major}.{minor}"),
        }
    }
}

/// Majors whose interface is known, newest first: the newest that the driver can follow is taken.
const MAJORS: [u32; 2] = [13, 12];

/// All places of this machine: of each major the loader's path, Python's wheels, the toolkit's folders.
pub(crate) fn installed() -> Vec<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let environments: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(set).collect();
    places(&environments, Path::new("/usr/local"))
}

fn places(environments: &[PathBuf], toolkits: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for environment in environments {
        folders.push(environment.join("lib"));
        for python in children(&environment.join("lib"), "python") {
            folders
                .extend(["cu13", "cuda_nvrtc"].map(|name| python.join("site-packages/nvidia").join(name).join("lib")));
        }
    }
    folders.extend(children(toolkits, "cuda").into_iter().map(|toolkit| toolkit.join("lib64")));
    let mut found = Vec::new();
    for major in MAJORS {
        let name = format!("libnvrtc.so.{major}");
        found.push(PathBuf::from(&name));
        found.extend(folders.iter().map(|folder| folder.join(&name)).filter(|path| path.is_file()));
    }
    found
}

/// A file as it is; of a folder the libraries in it, newest first.
pub(crate) fn named(path: &Path) -> Vec<PathBuf> {
    // A bare name would be looked for in the loader's path.
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    if !path.is_dir() {
        return vec![path.clone()];
    }
    let known = MAJORS.map(|major| path.join(format!("libnvrtc.so.{major}")));
    known.into_iter().filter(|path| path.is_file()).collect()
}

/// The builtins beside a library.
pub(crate) fn builtins(folder: &Path) -> Option<PathBuf> {
    // `libnvrtc-builtins.alt.so…` is another build of the same.
    children(folder, "libnvrtc-builtins.so.").into_iter().next()
}

/// What begins with `prefix`, the last by name first: `cuda-13.0` before `cuda-12.4`.
fn children(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let begins = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(begins).collect();
    found.sort();
    found.reverse();
    found
}

/// Why there is no compiler, and what to do about it.
pub(crate) fn missing(
    named: Option<&Path>,
    driver: Option<&DriverVersion>,
    too_new: Option<(u32, u32)>,
    faults: &[String],
) -> String {
    let wheel = match driver {
        Some(DriverVersion { cuda: (12, _), .. }) => "nvidia-cuda-nvrtc-cu12==12.9.*",
        _ => "nvidia-cuda-nvrtc==13.0.*",
    };
    let faults = if faults.is_empty() { String::new() } else { format!(" ({})", faults.join("; ")) };
    match (driver, too_new, named) {
        (Some(driver), Some((major, minor)), _) => format!(
            "{driver}; libnvrtc {major}.{minor} makes kernels it cannot load: pip install \"{wheel}\", or use --kernels"
        ),
        (_, _, Some(path)) => format!(
            "--nvrtc {}: expected libnvrtc.so.13 or .12, or its folder, found none{faults}; pip install \"{wheel}\"",
            path.display()
        ),
        _ => format!(
            "expected libnvrtc, which compiles the kernels, found none{faults}: pip install \"{wheel}\" into the active \
             environment, name it with --nvrtc, or use --kernels with a file that `ares kernels --pack` made"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }

    #[test]
    fn the_newest_comes_first_and_wheels_before_toolkits() {
        let folder = tempfile::tempdir().unwrap();
        let (venv, local) = (folder.path().join("venv"), folder.path().join("local"));
        let old = venv.join("lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
        let new = venv.join("lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13");
        let toolkits =
            ["cuda-12.4/lib64/libnvrtc.so.12", "cuda-13.0/lib64/libnvrtc.so.13"].map(|name| local.join(name));
        [&old, &new, &toolkits[0], &toolkits[1]].into_iter().for_each(|path| touch(path));
        let [bare_13, bare_12] = MAJORS.map(|major| PathBuf::from(format!("libnvrtc.so.{major}")));
        let expected = [bare_13, new.clone(), toolkits[1].clone(), bare_12, old, toolkits[0].clone()];
        assert_eq!(places(&[venv], &local), expected);
        assert_eq!(named(new.parent().unwrap()), std::slice::from_ref(&new));
        assert_eq!(named(&new), [new]);
        assert_eq!(places(&[], folder.path()), ["libnvrtc.so.13", "libnvrtc.so.12"].map(PathBuf::from));
    }

    #[test]
    fn a_library_that_is_too_new_is_told_apart_from_none() {
        let driver = DriverVersion { cuda: (12, 4), release: Some("550.54.14".into()) };
        assert_eq!(
            missing(None, Some(&driver), Some((13, 0)), &[]),
            "driver 550 speaks CUDA 12.4; libnvrtc 13.0 makes kernels it cannot load: pip install \
             \"nvidia-cuda-nvrtc-cu12==12.9.*\", or use --kernels"
        );
        assert!(missing(None, None, None, &[]).contains("nvidia-cuda-nvrtc==13.0.*"));
        let named = missing(Some(Path::new("/x")), None, None, &["/x: no such file".into()]);
        assert!(named.contains("--nvrtc /x") && named.contains("no such file"), "{named}");
    }
}
