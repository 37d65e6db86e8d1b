//! SHA-256 of the source files, between reading and quantizing: one thread for each file in work.

use std::sync::mpsc::{Receiver, SyncSender};

use sha2::{Digest, Sha256};

use crate::error::CheckpointError;
use crate::reader::{Event, Slice};

/// What the hasher hands on.
#[derive(Debug)]
pub enum Hashed {
    /// The next bytes of the data.
    Slice(Slice),
    /// A file is over.
    Digest {
        /// Index into the plan's sources.
        source: usize,
        /// SHA-256 in hexadecimal.
        digest: String,
    },
}

/// Hash what comes in and hand it on with the number of this `lane`; ends, in silence, once either end is gone.
pub fn hash_all(
    lane: usize,
    incoming: Receiver<Result<Event, CheckpointError>>,
    outgoing: &SyncSender<(usize, Result<Hashed, CheckpointError>)>,
) {
    let mut hash = Sha256::new();
    for event in incoming {
        let hashed = match event {
            Ok(Event::Front(bytes)) => {
                hash.update(&bytes);
                continue;
            }
            Ok(Event::Slice(slice)) => {
                hash.update(slice.buffer.filled());
                Ok(Hashed::Slice(slice))
            }
            Ok(Event::End { source }) => Ok(Hashed::Digest { source, digest: hexadecimal(&hash.finalize_reset()) }),
            Err(error) => Err(error),
        };
        if outgoing.send((lane, hashed)).is_err() {
            return;
        }
    }
}

/// Bytes as lower-case hexadecimal digits.
#[must_use]
pub fn hexadecimal(bytes: &[u8]) -> String {
    let nibbles = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    nibbles.map(|nibble| char::from(b"0123456789abcdef"[usize::from(nibble)])).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn each_file_gets_its_own_digest_of_all_its_bytes() {
        let (events, incoming) = mpsc::sync_channel(8);
        let (outgoing, results) = mpsc::sync_channel(8);
        for event in [
            Event::Front(b"a".to_vec()),
            Event::Front(b"bc".to_vec()),
            Event::End { source: 0 },
            Event::End { source: 3 },
        ] {
            events.send(Ok(event)).expect("room");
        }
        drop(events);
        hash_all(7, incoming, &outgoing);
        drop(outgoing);
        let digests: Vec<(usize, String)> = results
            .iter()
            .map(|result| match result {
                (7, Ok(Hashed::Digest { source, digest })) => (source, digest),
                other => panic!("{other:?}"),
            })
            .collect();
        let (abc, nothing) = (
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        );
        assert_eq!(digests, [(0, abc.to_owned()), (3, nothing.to_owned())]);
    }
}
