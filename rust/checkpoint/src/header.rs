//! The header of a safetensors file: read within bounds, checked before anything believes it.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use crate::error::CheckpointError;

/// Bytes of JSON beyond which a header is refused; the format's own limit.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the length field before the JSON.
pub const PREFIX_BYTES: u64 = 8;

/// One tensor as its file describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Full name.
    pub name: String,
    /// The format's name of the type, e.g. `BF16`; may be one that this crate does not know.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// First byte, counted from the start of the data.
    pub start: u64,
    /// One past the last byte, counted likewise.
    pub end: u64,
}

impl Tensor {
    /// Bytes of the data.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// What a file says of itself; the tensors cover its data without gap or overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes of JSON.
    pub length: u64,
    /// In the order of their data.
    pub tensors: Vec<Tensor>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

impl Header {
    /// Read the header of a file; no tensor data is read.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], or [`CheckpointError::Format`] when the file is not whole and consistent.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        Self::read_open(path, &open_source(path)?)
    }

    /// [`Header::read`] of an open file.
    ///
    /// # Errors
    /// As there.
    pub fn read_open(path: &Path, file: &File) -> Result<Self, CheckpointError> {
        let at = CheckpointError::io(path);
        let status = file.metadata().map_err(&at)?;
        if !status.is_file() {
            return Err(CheckpointError::format(path, "not a regular file"));
        }
        let file_bytes = status.len();
        let mut prefix = [0u8; PREFIX_BYTES as usize];
        if file_bytes < PREFIX_BYTES {
            return Err(CheckpointError::format(
                path,
                format!("holds {file_bytes} bytes; a safetensors file begins with 8 that say how long its header is"),
            ));
        }
        file.read_exact_at(&mut prefix, 0).map_err(&at)?;
        let length = u64::from_le_bytes(prefix);
        if length > MAX_HEADER_BYTES || length > file_bytes - PREFIX_BYTES {
            let guess = foreign(prefix).map(|guess| format!("; it looks like {guess}")).unwrap_or_default();
            let limit = MAX_HEADER_BYTES.min(file_bytes - PREFIX_BYTES);
            return Err(CheckpointError::format(
                path,
                format!("not a whole safetensors file: its header says {length} bytes, at most {limit} can be{guess}"),
            ));
        }
        let mut json = vec![0u8; length as usize];
        file.read_exact_at(&mut json, PREFIX_BYTES).map_err(&at)?;
        Self::parse(path, &json, file_bytes - PREFIX_BYTES - length)
    }

    /// Check the JSON of a header against the `data_bytes` that follow it; `path` is for messages.
    ///
    /// # Errors
    /// [`CheckpointError::Format`].
    pub fn parse(path: &Path, json: &[u8], data_bytes: u64) -> Result<Self, CheckpointError> {
        if json.first() != Some(&b'{') {
            return Err(CheckpointError::format(path, "not a safetensors file: its header does not begin with '{'"));
        }
        let raw: RawHeader = serde_json::from_slice(json)
            .map_err(|error| CheckpointError::format(path, format!("its header is not valid: {error}")))?;
        let mut tensors = Vec::with_capacity(raw.tensors.len());
        for (name, raw) in raw.tensors {
            let (start, end) = raw.data_offsets;
            let tensor = Tensor { name, dtype: raw.dtype, shape: raw.shape, start, end };
            check_size(&tensor).map_err(|what| CheckpointError::format(path, what))?;
            tensors.push(tensor);
        }
        tensors.sort_by(|a, b| (a.start, a.end, &a.name).cmp(&(b.start, b.end, &b.name)));
        let mut expected = 0;
        for tensor in &tensors {
            if tensor.start != expected {
                return Err(CheckpointError::format(
                    path,
                    format!(
                        "tensor {:?}: its data begins at byte {}, but the data before it ends at {expected} \
                         ({} bytes of {})",
                        tensor.name,
                        tensor.start,
                        tensor.start.abs_diff(expected),
                        if tensor.start > expected { "nothing" } else { "overlap" },
                    ),
                ));
            }
            expected = tensor.end;
        }
        if expected != data_bytes {
            return Err(CheckpointError::format(
                path,
                format!(
                    "its tensors take {expected} bytes, but {data_bytes} follow the header: {}",
                    if data_bytes < expected { "the file is cut off" } else { "there is something behind the data" }
                ),
            ));
        }
        Ok(Self { length: json.len() as u64, tensors, metadata: raw.metadata })
    }

    /// Where the data begin in the file.
    #[must_use]
    pub fn data_start(&self) -> u64 {
        PREFIX_BYTES + self.length
    }

    /// Bytes of the data.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.tensors.last().map_or(0, |tensor| tensor.end)
    }

    /// Bytes of the file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.data_start() + self.data_bytes()
    }
}

/// Open a file for reading; a pipe in its place does not make us wait for a writer.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn open_source(path: &Path) -> Result<File, CheckpointError> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    options.open(path).map_err(CheckpointError::io(path))
}

/// The type behind its name, where this crate knows it.
#[must_use]
pub fn known_dtype(name: &str) -> Option<Dtype> {
    Dtype::deserialize(de::value::StrDeserializer::<de::value::Error>::new(name)).ok()
}

/// Offsets in order, and as many bytes as dtype and shape ask for. An unknown dtype is taken at its offsets' word.
fn check_size(tensor: &Tensor) -> Result<(), String> {
    let Tensor { name, dtype, shape, start, end } = tensor;
    if start > end {
        return Err(format!("tensor {name:?}: its data ends at byte {end}, before it begins at {start}"));
    }
    let elements = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
    let Some(elements) = elements else {
        return Err(format!("tensor {name:?}: its shape {shape:?} has more elements than can be counted"));
    };
    let Some(known) = known_dtype(dtype) else { return Ok(()) };
    let bits = elements.checked_mul(known.bitsize() as u64).filter(|bits| bits.is_multiple_of(8));
    if bits.map(|bits| bits / 8) != Some(end - start) {
        let expected = bits.map_or_else(|| "no whole number of".to_owned(), |bits| (bits / 8).to_string());
        return Err(format!(
            "tensor {name:?}: {dtype} {shape:?} takes {expected} bytes, but its offsets span {}",
            end - start
        ));
    }
    Ok(())
}

/// What a file that is no safetensors file seems to be, by its first bytes.
fn foreign(prefix: [u8; 8]) -> Option<&'static str> {
    match &prefix {
        [b'P', b'K', 3, 4, ..] => Some("a zip archive, such as a PyTorch .bin file: convert it to safetensors first"),
        [0x80, 2..=5, ..] => Some("a Python pickle, such as an old PyTorch file: convert it to safetensors first"),
        [b'G', b'G', b'U', b'F', ..] => Some("a GGUF file"),
        b"version " => Some("a Git LFS pointer: fetch the real file with `git lfs pull`"),
        [b'<', ..] => Some("a web page: the download failed"),
        _ => None,
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The JSON object, with duplicate names refused: readers would disagree about which one counts.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawHeaderVisitor)
    }
}

struct RawHeaderVisitor;

impl<'de> Visitor<'de> for RawHeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensor names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut seen = HashSet::new();
        let mut header = RawHeader { tensors: Vec::new(), metadata: BTreeMap::new() };
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                header.metadata = map.next_value()?;
            } else {
                header.tensors.push((name.clone(), map.next_value()?));
            }
            if let Some(name) = seen.replace(name) {
                return Err(de::Error::custom(format!("the name {name:?} occurs twice")));
            }
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(json: &str, data_bytes: u64) -> Result<Header, String> {
        Header::parse(Path::new("x.safetensors"), json.as_bytes(), data_bytes).map_err(|error| error.to_string())
    }

    fn one(dtype: &str, shape: &str, offsets: &str) -> String {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    }

    #[test]
    fn tensors_come_in_the_order_of_their_data() {
        let json = r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[4,7]},
            "b":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},"e":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},
            "__metadata__":{"format":"pt"}}   "#;
        let header = parse(json, 7).expect("valid");
        let names: Vec<_> = header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["b", "e", "a"]);
        assert_eq!(header.metadata["format"], "pt");
    }

    #[test]
    fn an_unknown_dtype_is_taken_at_its_offsets_word() {
        assert_eq!(parse(&one("Q3_K", "[5]", "[0,2]"), 2).expect("valid").tensors[0].dtype, "Q3_K");
    }

    #[test]
    fn headers_that_do_not_fit_their_data_are_refused_with_the_reason() {
        let cases = [
            (one("F32", "[2]", "[0,9]"), 9, "takes 8 bytes"),
            (one("F32", "[2]", "[8,0]"), 8, "before it begins"),
            (one("F32", "[2]", "[0,8]"), 7, "cut off"),
            (one("F32", "[2]", "[0,8]"), 9, "behind the data"),
            (one("F32", "[2]", "[4,12]"), 12, "4 bytes of nothing"),
            (one("F32", "[4294967296,4294967296,2]", "[0,8]"), 8, "more elements than can be counted"),
            (one("F32", "[4611686018427387904]", "[0,0]"), 0, "no whole number of"),
            (one("F4", "[3]", "[0,1]"), 1, "no whole number of"),
            (one("F32", "[-1]", "[0,8]"), 8, "not valid"),
            (one("F32", "[1.5]", "[0,8]"), 8, "not valid"),
            (one("F32", "[2]", "[0,18446744073709551616]"), 8, "not valid"),
            (one("F32", "[2]", "[0,8],\"x\":1"), 8, "unknown field"),
            ("[]".into(), 0, "does not begin with"),
            ("{".into(), 0, "not valid"),
            (String::new(), 0, "does not begin with"),
            ("[".repeat(9000), 0, "does not begin with"),
            (format!("{{\"a\":{}", "[".repeat(9000)), 0, "not valid"),
        ];
        for (json, data_bytes, reason) in cases {
            let message = parse(&json, data_bytes).expect_err(reason);
            assert!(message.contains(reason) && message.contains("x.safetensors"), "{message}");
        }
    }

    #[test]
    fn overlapping_tensors_and_duplicate_names_are_refused() {
        let overlap = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
            "b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
        assert!(parse(overlap, 6).expect_err("refused").contains("2 bytes of overlap"));
        let twice = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
            "a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        assert!(parse(twice, 2).expect_err("refused").contains("occurs twice"));
    }

    proptest! {
        #[test]
        fn a_header_that_parses_covers_its_data_exactly(
            sizes in prop::collection::vec((0u64..9, 0u64..40, 0u64..40), 0..6),
            data_bytes in 0u64..64,
        ) {
            let entries: Vec<String> = sizes.iter().enumerate().map(|(index, (size, start, end))| {
                format!(r#""t{index}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#)
            }).collect();
            if let Ok(header) = parse(&format!("{{{}}}", entries.join(",")), data_bytes) {
                let mut next = 0;
                for tensor in &header.tensors {
                    prop_assert_eq!(tensor.start, next);
                    prop_assert_eq!(tensor.shape.iter().product::<u64>(), tensor.bytes());
                    next = tensor.end;
                }
                prop_assert_eq!(next, data_bytes);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), data in any::<u64>()) {
            let _ = Header::parse(Path::new("x"), &bytes, data);
            bytes.insert(0, b'{');
            let _ = Header::parse(Path::new("x"), &bytes, data);
        }

        #[test]
        fn arbitrary_offsets_and_shapes_never_panic(
            shape in prop::collection::vec(any::<u64>(), 0..4), start in any::<u64>(), end in any::<u64>(),
            data in any::<u64>(),
        ) {
            let _ = parse(&one("BF16", &format!("{shape:?}"), &format!("[{start},{end}]")), data);
        }
    }
}
