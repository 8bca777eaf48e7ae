//! Files that appear under their name whole or not at all.

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// A file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: cannot write: {source}")]
pub struct OutputError {
    path: String,
    source: std::io::Error,
}

impl OutputError {
    /// An error about `path`.
    pub fn new(path: &Path, source: std::io::Error) -> Self {
        Self { path: path.display().to_string(), source }
    }
}

/// A file in the making, in the folder of its name; dropped, it is gone.
pub struct PendingFile {
    file: NamedTempFile,
    path: PathBuf,
}

impl PendingFile {
    /// Starts a file that will be `path`.
    pub fn create(path: &Path) -> Result<Self, OutputError> {
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let file = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(folder)
            .map_err(|e| OutputError::new(path, e))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// The name it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file_mut(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Adds bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), OutputError> {
        self.file.write_all(bytes).map_err(|e| OutputError::new(&self.path, e))
    }

    /// Gives the file its name, replacing one that had it.
    pub fn finish(self) -> Result<(), OutputError> {
        let path = self.path;
        self.file.persist(&path).map(drop).map_err(|e| OutputError::new(&path, e.error))
    }
}

/// Says now, rather than after the work, that a file cannot be written.
pub fn check_writable(path: &Path) -> Result<(), OutputError> {
    if path.is_dir() {
        return Err(OutputError::new(path, std::io::ErrorKind::IsADirectory.into()));
    }
    PendingFile::create(path).map(drop)
}

/// Writes a file whole or not at all.
pub fn write_file(path: &Path, content: &str) -> Result<(), OutputError> {
    let mut file = PendingFile::create(path)?;
    file.write(content.as_bytes())?;
    file.finish()
}
