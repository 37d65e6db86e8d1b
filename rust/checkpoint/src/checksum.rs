//! What tells bytes that are there from those that should be: XXH3 of 128 bits, in hexadecimal.
//!
//! It guards against power cuts, not against people, and costs a fifteenth of SHA-256. What a format records of its source
//! is SHA-256: [`crate::hasher`].

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use qlora_core::Control;
use twox_hash::XxHash3_128;

use crate::error::CheckpointError;

/// Bytes of a file that are read at a time.
const READ_BYTES: u64 = 1 << 20;

/// A checksum in the making.
#[derive(Default)]
pub struct Checksum(XxHash3_128);

impl Checksum {
    /// Of one piece of memory.
    #[must_use]
    pub fn of(bytes: &[u8]) -> String {
        hexadecimal(XxHash3_128::oneshot(bytes))
    }

    /// Of `bytes` bytes of a file from `start` on, as they are now.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] naming `path`, also where the file is shorter, or the wish to stop.
    pub fn of_file(
        path: &Path,
        file: &File,
        start: u64,
        bytes: u64,
        control: &Control,
    ) -> Result<String, CheckpointError> {
        let mut checksum = Self::default();
        let mut buffer = vec![0u8; bytes.min(READ_BYTES) as usize];
        let mut done = 0;
        while done < bytes {
            control.check()?;
            let part = &mut buffer[..(bytes - done).min(READ_BYTES) as usize];
            file.read_exact_at(part, start + done).map_err(CheckpointError::io(path))?;
            checksum.update(part);
            done += part.len() as u64;
        }
        Ok(checksum.finish())
    }

    /// Take the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    /// Of all bytes so far.
    #[must_use]
    pub fn finish(&self) -> String {
        hexadecimal(self.0.finish_128())
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Checksum").field(&self.finish()).finish()
    }
}

fn hexadecimal(checksum: u128) -> String {
    format!("{checksum:032x}")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn it_is_the_xxh3_of_128_bits_that_others_compute() {
        // By python-xxhash 4.1, which is xxHash 0.8.4 itself.
        assert_eq!(Checksum::of(b""), "99aa06d3014798d86001c324468d497f");
        assert_eq!(Checksum::of(b"abc"), "06b05ab6733a618578af5f94892f3950");
    }

    #[test]
    fn pieces_and_files_have_the_checksum_of_the_whole() {
        let bytes: Vec<u8> = (0..(READ_BYTES as usize + 77)).map(|index| ((index * index) >> 3) as u8).collect();
        let mut file = tempfile::NamedTempFile::new().expect("file");
        file.write_all(&bytes).expect("written");
        for (start, end) in [(0, 0), (5, 6), (1, 241), (0, 5003), (3, bytes.len())] {
            let mut checksum = Checksum::default();
            for piece in bytes[start..end].chunks(769) {
                checksum.update(piece);
            }
            let expected = Checksum::of(&bytes[start..end]);
            assert_eq!(checksum.finish(), expected);
            let of_file = |length: usize| {
                Checksum::of_file(file.path(), file.as_file(), start as u64, length as u64, &Control::default())
            };
            assert_eq!(of_file(end - start).expect("readable"), expected);
            let error = of_file(bytes.len() - start + 1).expect_err("too short");
            assert!(error.to_string().contains(&*file.path().to_string_lossy()), "{error}");
        }
    }
}
