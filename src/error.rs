//! One error type. A variant per person who must act; each message holds what was expected, what was found, where, and
//! what to do.

use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint does not hold what its config promises: fix the model files.
    #[error("{file}: tensor {tensor}: expected {expected}, found {found}", file = .file.display())]
    Weights { file: PathBuf, tensor: String, expected: String, found: String },
    /// A file cannot be what it should be: damaged, of another kind, unsupported.
    #[error("{file}: expected {expected}, found {found}; {remedy}", file = .file.display())]
    File { file: PathBuf, expected: String, found: String, remedy: String },
    /// One row of an input file: the row becomes an error row unless `--strict`.
    #[error("{place}: expected {expected}, found {found}")]
    Row { place: String, expected: String, found: String },
    /// What was typed cannot be done.
    #[error("{0}")]
    Usage(String),
    /// No usable GPU or driver: the machine's problem.
    #[error("no usable device: {0}; try --device cpu")]
    NoDevice(String),
    /// The compiler of kernels is missing or does not fit: install or name another.
    #[error("{0}")]
    Compiler(String),
    /// A kernel does not compile: its author's matter.
    #[error("kernels/{file} does not compile for {target}:\n{log}")]
    Kernel { file: String, target: String, log: String },
    /// A device failed, or lacks what was asked of it.
    #[error("{device}: {what}; {remedy}")]
    Device { device: String, what: String, remedy: String },
    /// Reading or writing failed.
    #[error("{path}: cannot {action}: {source}; {remedy}", path = .path.display())]
    Io { path: PathBuf, action: &'static str, source: std::io::Error, remedy: &'static str },
    /// An operation was called with tensors that do not fit together: a fault of the program, not of its user.
    #[error("{op}: expected {expected}, found {found} (a fault in ares: please report it)")]
    Shape { op: &'static str, expected: String, found: String },
    /// A number that must be finite is not.
    #[error("{what}: expected finite numbers, found {found}; {remedy}")]
    NotFinite { what: String, found: String, remedy: String },
    /// The data cannot support what is asked of it (calibration without separation, overlapping splits, …).
    #[error("{what}: expected {expected}, found {found}; {remedy}")]
    Data { what: String, expected: String, found: String, remedy: String },
    /// Another process holds the run directory.
    #[error("{path}: another run holds this directory ({holder}); wait for it or choose another --out", path = .path.display())]
    Busy { path: PathBuf, holder: String },
    /// A gate of the method was not met.
    #[error("{0}")]
    Gate(String),
    /// Ctrl-C or its like; the text says what is kept and how to go on.
    #[error("interrupted{0}")]
    Interrupted(String),
}

impl Error {
    /// Returns the process's exit code: 1 failure, 2 usage, 3 gate not met, 130 interrupted.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Gate(_) => 3,
            Error::Interrupted(_) => 130,
            _ => 1,
        }
    }

    /// Makes an error of reading, for `.map_err(Error::read(path))`.
    pub fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
        Self::io(path, "read", "check that the path is right and readable")
    }

    /// Makes an error of writing, for `.map_err(Error::write(path))`.
    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
        Self::io(path, "write", "check permissions and free disk space")
    }

    /// Makes an error of starting a process, for `.map_err(Error::start(program))`.
    pub(crate) fn start(program: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
        Self::io(program, "start", "check that it is there and that this user may run it")
    }

    /// Makes an error of starting threads, for `.map_err(Error::threads)`.
    pub(crate) fn threads(source: impl std::fmt::Display) -> Error {
        Error::Device {
            device: "this machine".to_string(),
            what: format!("expected to start a thread, found: {source}"),
            remedy: "raise the limit on threads (ulimit -u), or ask for fewer by RAYON_NUM_THREADS".to_string(),
        }
    }

    fn io(path: &Path, action: &'static str, remedy: &'static str) -> impl FnOnce(std::io::Error) -> Error + use<> {
        let path = path.to_path_buf();
        move |source| Error::Io { path, action, source, remedy }
    }

    /// Makes an error of one row.
    pub(crate) fn row(place: &str, expected: impl Into<String>, found: impl ToString) -> Error {
        Error::Row { place: place.to_string(), expected: expected.into(), found: found.to_string() }
    }

    /// Makes an error about a file, for `.map_err(Error::file(path, "what it should be", "what to do"))`: the source's text
    /// becomes `found`.
    pub(crate) fn file<E: std::fmt::Display>(
        path: &Path,
        expected: &str,
        remedy: &str,
    ) -> impl FnOnce(E) -> Error + use<E> {
        let (file, expected, remedy) = (path.to_path_buf(), expected.to_string(), remedy.to_string());
        move |source| Error::File { file, expected, found: source.to_string(), remedy }
    }
}

/// Runs `work` on a thread of its own. Fails where the system starts no more of them.
pub(crate) fn start_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<()> {
    std::thread::Builder::new().spawn(work).map(drop).map_err(Error::threads)
}

/// `text` with what would steer a terminal or turn the order of what is read (ESC, BEL, NUL, marks of direction) written out.
pub fn visible(text: &str) -> String {
    let steers = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(steers) {
        return text.to_string();
    }
    text.chars().map(|c| if steers(c) { c.escape_unicode().to_string() } else { c.to_string() }).collect()
}

/// Fails unless `result` is an error whose message holds `expected`.
#[cfg(test)]
#[track_caller]
pub(crate) fn refused<T>(result: Result<T>, expected: &str) {
    let found = result.err().expect("must be refused").to_string();
    assert!(found.contains(expected), "expected `{expected}`, found `{found}`");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_shown_steers_a_terminal() {
        assert_eq!(visible("a\n\tü 中 👍"), "a\n\tü 中 👍");
        assert_eq!(visible("\x1b[31m\x07\0\u{202e}\u{9b}"), r"\u{1b}[31m\u{7}\u{0}\u{202e}\u{9b}");
    }
}
