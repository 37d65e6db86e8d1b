//! What of an output is finished: a line of JSON for each tensor and each source file, appended as it is.
//!
//! Nothing is synced line by line. A line holds a checksum of what was written, so that an interrupted run can tell what is
//! there from what a power cut took.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::Serialize;

use crate::error::CheckpointError;

/// What an interrupted run says that it finished, by name.
#[derive(Debug, Clone, Default)]
pub struct Finished {
    /// Of the output of source tensors: the checksums of its parts, one after the other.
    pub tensors: HashMap<String, String>,
    /// Of source files that were read to their end: SHA-256 in hexadecimal.
    pub files: HashMap<String, String>,
}

/// An existing journal, open to append lines to.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Entry<'a> {
    Tensor { tensor: &'a str, xxh3_128: &'a str },
    File { file: &'a str, sha256: &'a str },
}

impl Journal {
    /// Open the journal at `path`, which has to exist.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let mut options = OpenOptions::new();
        options.append(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let file = options.open(path).map_err(CheckpointError::io(path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// The output of a source tensor is written.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn add_tensor(&mut self, name: &str, checksums: &str) -> Result<(), CheckpointError> {
        self.add(&Entry::Tensor { tensor: name, xxh3_128: checksums })
    }

    /// A source file was read to its end.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn add_file(&mut self, name: &str, sha256: &str) -> Result<(), CheckpointError> {
        self.add(&Entry::File { file: name, sha256 })
    }

    fn add(&mut self, entry: &Entry<'_>) -> Result<(), CheckpointError> {
        let mut line = serde_json::to_vec(entry).expect("strings always serialize");
        line.push(b'\n');
        // In one piece: a kill leaves a line whole or absent.
        self.file.write_all(&line).map_err(CheckpointError::io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn lines_are_appended_to_what_is_there() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("journal");
        assert!(Journal::open(&path).is_err());
        fs::write(&path, "{}\n").expect("writable");
        let mut journal = Journal::open(&path).expect("there");
        journal.add_tensor("a\n\"b", "00").expect("written");
        journal.add_file("m.safetensors", "ff").expect("written");
        let expected =
            "{}\n{\"tensor\":\"a\\n\\\"b\",\"xxh3_128\":\"00\"}\n{\"file\":\"m.safetensors\",\"sha256\":\"ff\"}\n";
        assert_eq!(fs::read_to_string(&path).expect("readable"), expected);
    }

    #[test]
    fn a_link_in_the_place_of_a_journal_is_not_followed() {
        let folder = tempfile::tempdir().expect("folder");
        fs::write(folder.path().join("precious"), "").expect("writable");
        std::os::unix::fs::symlink("precious", folder.path().join("journal")).expect("linked");
        assert!(Journal::open(&folder.path().join("journal")).is_err());
    }
}
