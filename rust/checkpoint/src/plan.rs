//! What is to be written where: every size is known from the source's headers before a byte of data is read.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use qlora_core::{FloatType, Layout, QuantSpec};
use safetensors::Dtype;

use crate::error::CheckpointError;
use crate::header::{Header, PREFIX_BYTES, Tensor, known_dtype};

/// What the caller wants.
#[derive(Debug, Clone, Copy)]
pub struct PlanRequest<'a> {
    /// Folder of the source.
    pub source: &'a Path,
    /// Its safetensors files, relative to the folder, in the order in which they are read.
    pub files: &'a [String],
    /// Full names of the tensors to quantize; all others are copied.
    pub packed: &'a [String],
    /// Those of them whose matrices are stored transposed, (in, out): they are packed as (out, in).
    pub transposed: &'a [String],
    /// How they are quantized.
    pub spec: &'a QuantSpec,
    /// Bytes of data beyond which a new output file is begun.
    pub max_shard_size: u64,
    /// Recorded in the output.
    pub version: &'a str,
}

/// A place in an output file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Index into [`Plan::shards`].
    pub shard: usize,
    /// Byte offset in the file.
    pub offset: u64,
}

/// A stretch of an output file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins.
    pub slot: Slot,
    /// How long it is.
    pub bytes: u64,
}

/// Where the parts of a packed weight of logical shape (experts, rows, cols) go.
#[derive(Debug, Clone, Copy)]
pub struct PackStep {
    /// Type of the source's elements.
    pub float_type: FloatType,
    /// 1 for a 2-D weight.
    pub experts: usize,
    /// Rows of an expert.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Whether the source holds each matrix as (cols, rows).
    pub transposed: bool,
    /// Sizes of the whole weight.
    pub layout: Layout,
    /// u8 codes.
    pub codes: Slot,
    /// float32 bits, or u8 codes when doubly quantized.
    pub absmax: Slot,
    /// Group scales and offsets, float32 bits, when doubly quantized.
    pub nested: Option<(Slot, Slot)>,
}

/// What happens to one tensor of the source.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// Its bytes are copied.
    Copy(Slot),
    /// It is quantized.
    Pack(PackStep),
}

impl PackStep {
    /// Rows and columns of a matrix as the source holds it.
    #[must_use]
    pub fn stored(&self) -> (usize, usize) {
        if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) }
    }
}

impl Step {
    /// The places of everything that a tensor of `bytes` becomes.
    #[must_use]
    pub fn extents(&self, bytes: u64) -> Vec<Extent> {
        match self {
            Self::Copy(slot) => vec![Extent { slot: *slot, bytes }],
            Self::Pack(step) => {
                let (blocks, groups) = (step.layout.blocks() as u64, step.layout.groups() as u64);
                let scale_bytes = if step.nested.is_some() { 1 } else { 4 };
                let codes = Extent { slot: step.codes, bytes: step.layout.code_bytes() as u64 };
                let mut extents = vec![codes, Extent { slot: step.absmax, bytes: scale_bytes * blocks }];
                if let Some((scale, offset)) = step.nested {
                    extents.push(Extent { slot: scale, bytes: 4 * groups });
                    extents.push(Extent { slot: offset, bytes: 4 * step.experts as u64 });
                }
                extents
            }
        }
    }
}

/// A source file and what happens to its tensors.
#[derive(Debug)]
pub struct Source {
    /// Relative to the source folder.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// What it says of itself.
    pub header: Header,
    /// One per tensor of the header, in its order.
    pub steps: Vec<Step>,
}

impl Source {
    /// The places of everything that a tensor becomes.
    #[must_use]
    pub fn extents(&self, tensor: usize) -> Vec<Extent> {
        self.steps[tensor].extents(self.header.tensors[tensor].bytes())
    }
}

/// An output file.
#[derive(Debug)]
pub struct Shard {
    /// File name.
    pub name: String,
    /// Its tensors in the format's writing order, with offsets from the start of the data.
    pub tensors: Vec<Tensor>,
    /// Where the data begin in the file.
    pub data_start: u64,
}

impl Shard {
    /// Bytes of the data.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.tensors.last().map_or(0, |tensor| tensor.end)
    }
}

/// The whole job.
#[derive(Debug)]
pub struct Plan {
    /// In reading order.
    pub sources: Vec<Source>,
    /// In the order of their numbers.
    pub shards: Vec<Shard>,
    version: String,
    /// What the metadata says of weights whose packed parts cannot tell it, by the weight's name: logical shapes, and that
    /// the source had the matrices transposed.
    remarks: HashMap<String, Vec<(&'static str, String)>>,
}

/// Bytes beyond which no output can be: offsets in files are signed, and a header comes before.
const LARGEST_WEIGHT: u64 = 1 << 62;

/// What stands in for a SHA-256 digest until it is known; as long as one.
const NO_DIGEST: &str = "0000000000000000000000000000000000000000000000000000000000000000";

impl Plan {
    /// Read the headers of the source and lay out the output.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] and [`CheckpointError::Format`] from the headers, or where names clash;
    /// [`CheckpointError::Unsupported`] for a tensor that cannot be quantized.
    pub fn new(request: &PlanRequest<'_>) -> Result<Self, CheckpointError> {
        let mut wanted: HashSet<&str> = request.packed.iter().map(String::as_str).collect();
        let mut shards = Shards::new(request.max_shard_size);
        let mut sources = Vec::with_capacity(request.files.len());
        let mut drafts = Vec::with_capacity(request.files.len());
        let transposed: HashSet<&str> = request.transposed.iter().map(String::as_str).collect();
        let mut remarks = HashMap::new();
        for name in request.files {
            let path = request.source.join(name);
            let header = Header::read(&path)?;
            let mut draft = Vec::with_capacity(header.tensors.len());
            for tensor in &header.tensors {
                let packing = if wanted.remove(tensor.name.as_str()) {
                    let turned = transposed.contains(tensor.name.as_str());
                    let packing = Packing::of(&path, tensor, turned, request.spec)?;
                    remarks.insert(tensor.name.clone(), packing.remarks(request.spec));
                    Some(packing)
                } else {
                    None
                };
                let outputs = packing.as_ref().map_or_else(
                    || vec![output(&tensor.name, &tensor.dtype, tensor.shape.clone(), tensor.bytes())],
                    |packing| packing.outputs(&tensor.name),
                );
                shards.add(&path, outputs)?;
                draft.push(packing);
            }
            sources.push(Source { name: name.clone(), path, header, steps: Vec::new() });
            drafts.push(draft);
        }
        if let Some(missing) = request.packed.iter().find(|name| wanted.contains(name.as_str())) {
            let what = format!("tensor {missing:?} is not in its safetensors files");
            return Err(CheckpointError::format(request.source, what));
        }
        let mut plan = Self { sources, shards: shards.finish(), version: request.version.to_owned(), remarks };
        let places = plan.place();
        for (source, draft) in plan.sources.iter_mut().zip(&drafts) {
            let steps = source.header.tensors.iter().zip(draft);
            source.steps = steps.map(|(tensor, packing)| step(tensor, packing.as_ref(), &places)).collect();
        }
        Ok(plan)
    }

    /// The header of a shard, length field included; `digests` are those of [`Plan::sources`], in hexadecimal.
    #[must_use]
    pub fn header_bytes(&self, shard: usize, digests: &[String]) -> Vec<u8> {
        let names = self.sources.iter().map(|source| source.name.as_str());
        let hashes: BTreeMap<&str, &str> = names.zip(digests.iter().map(String::as_str)).collect();
        let mut metadata = BTreeMap::from([
            ("format".to_owned(), "pt".to_owned()),
            ("qlora_rs_version".to_owned(), self.version.clone()),
            ("source_sha256".to_owned(), json(&hashes)),
        ]);
        for Tensor { name, .. } in &self.shards[shard].tensors {
            for (what, value) in self.remarks.get(name).into_iter().flatten() {
                metadata.insert(format!("{name}.{what}"), value.clone());
            }
        }
        let tensors = self.shards[shard].tensors.iter().map(|tensor| {
            let Tensor { name, dtype, shape, start, end } = tensor;
            let (name, dtype, shape) = (json(name), json(dtype), json(shape));
            format!("{name}:{{\"dtype\":{dtype},\"shape\":{shape},\"data_offsets\":[{start},{end}]}}")
        });
        let entries: Vec<String> =
            std::iter::once(format!("\"__metadata__\":{}", json(&metadata))).chain(tensors).collect();
        let mut text = format!("{{{}}}", entries.join(","));
        // The data begin at a multiple of 8, so that every tensor is aligned.
        while !text.len().is_multiple_of(8) {
            text.push(' ');
        }
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }

    /// Fix where the shards' data begin, and return the place of every output tensor.
    fn place(&mut self) -> HashMap<String, Slot> {
        let mut places = HashMap::new();
        let digests = vec![NO_DIGEST.to_owned(); self.sources.len()];
        for shard in 0..self.shards.len() {
            let data_start = self.header_bytes(shard, &digests).len() as u64;
            self.shards[shard].data_start = data_start;
            for tensor in &self.shards[shard].tensors {
                places.insert(tensor.name.clone(), Slot { shard, offset: data_start + tensor.start });
            }
        }
        places
    }

    /// Bytes of all source files.
    #[must_use]
    pub fn source_bytes(&self) -> u64 {
        self.sources.iter().map(|source| source.header.file_bytes()).sum()
    }
}

fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("strings, integers and maps of strings always serialize")
}

fn output(name: &str, dtype: &str, shape: Vec<u64>, bytes: u64) -> Tensor {
    Tensor { name: name.to_owned(), dtype: dtype.to_owned(), shape, start: 0, end: bytes }
}

/// A weight that can be quantized.
struct Packing {
    float_type: FloatType,
    /// Logical shape: the source's, but for the last two sizes of what is transposed.
    shape: Vec<u64>,
    experts: usize,
    rows: usize,
    cols: usize,
    transposed: bool,
    layout: Layout,
    nested: bool,
}

impl Packing {
    fn of(path: &Path, tensor: &Tensor, transposed: bool, spec: &QuantSpec) -> Result<Self, CheckpointError> {
        let float_type = match known_dtype(&tensor.dtype) {
            Some(Dtype::F32) => FloatType::F32,
            Some(Dtype::BF16) => FloatType::Bf16,
            Some(Dtype::F16) => FloatType::F16,
            _ => {
                return Err(CheckpointError::Unsupported(format!(
                    "{}: tensor {:?} is {}; only F32, BF16 and F16 can be quantized: skip it",
                    path.display(),
                    tensor.name,
                    tensor.dtype
                )));
            }
        };
        let mut shape = tensor.shape.clone();
        if transposed && shape.len() >= 2 {
            let last = shape.len() - 1;
            shape.swap(last - 1, last);
        }
        let (experts, rows, cols) = match *shape {
            [rows, cols] => (1, rows as usize, cols as usize),
            [experts, rows, cols] => (experts as usize, rows as usize, cols as usize),
            _ => {
                return Err(CheckpointError::Unsupported(format!(
                    "{}: tensor {:?} has shape {:?}; only weights of 2 or 3 dimensions can be quantized: skip it",
                    path.display(),
                    tensor.name,
                    tensor.shape
                )));
            }
        };
        let layout = Layout::new(experts, rows, cols, spec)?;
        Ok(Self { float_type, shape, experts, rows, cols, transposed, layout, nested: spec.double_quant() })
    }

    /// What the metadata has to say of it.
    fn remarks(&self, spec: &QuantSpec) -> Vec<(&'static str, String)> {
        let mut remarks = Vec::new();
        if spec.codebook().bits() == 4 && self.cols % 2 == 1 {
            // ceil(cols / 2) bytes cannot tell an odd number of columns from the even one above it.
            let sizes: Vec<String> = self.shape.iter().map(u64::to_string).collect();
            remarks.push(("shape", format!("[{}]", sizes.join(", "))));
        }
        if self.transposed {
            remarks.push(("transposed", "true".to_owned()));
        }
        remarks
    }

    /// Codes, scales and, doubly quantized, scales of scales: dtypes and shapes of the native format.
    fn outputs(&self, name: &str) -> Vec<Tensor> {
        let layout = &self.layout;
        let with_last = |last: usize| {
            let mut shape = self.shape.clone();
            if let Some(size) = shape.last_mut() {
                *size = last as u64;
            }
            shape
        };
        let (scale_dtype, scale_size) = if self.nested { ("U8", 1) } else { ("I32", 4) };
        let mut outputs = vec![
            output(name, "U8", with_last(layout.bytes_per_row()), layout.code_bytes() as u64),
            output(
                &format!("{name}_absmax"),
                scale_dtype,
                with_last(layout.blocks_per_row()),
                scale_size * layout.blocks() as u64,
            ),
        ];
        if self.nested {
            let experts = self.experts as u64;
            let groups = layout.groups_per_expert() as u64;
            let scale_shape = if self.shape.len() == 3 { vec![experts, groups] } else { vec![groups] };
            outputs.push(output(&format!("{name}_absmax_scale"), "I32", scale_shape, 4 * layout.groups() as u64));
            outputs.push(output(&format!("{name}_absmax_offset"), "I32", vec![experts], 4 * experts));
        }
        outputs
    }
}

fn step(tensor: &Tensor, packing: Option<&Packing>, places: &HashMap<String, Slot>) -> Step {
    let place = |suffix: &str| places[&format!("{}{suffix}", tensor.name)];
    let Some(&Packing { float_type, experts, rows, cols, transposed, layout, nested, .. }) = packing else {
        return Step::Copy(place(""));
    };
    Step::Pack(PackStep {
        float_type,
        experts,
        rows,
        cols,
        transposed,
        layout,
        codes: place(""),
        absmax: place("_absmax"),
        nested: nested.then(|| (place("_absmax_scale"), place("_absmax_offset"))),
    })
}

/// Fills output files one after the other; what belongs to one weight stays in one file.
struct Shards {
    limit: u64,
    files: Vec<Vec<Tensor>>,
    bytes: u64,
    names: HashSet<String>,
}

impl Shards {
    fn new(limit: u64) -> Self {
        Self { limit, files: vec![Vec::new()], bytes: 0, names: HashSet::new() }
    }

    fn add(&mut self, path: &Path, outputs: Vec<Tensor>) -> Result<(), CheckpointError> {
        for output in &outputs {
            if !self.names.insert(output.name.clone()) {
                let what = format!(
                    "tensor {:?} would be written twice: the source names it in two files, or already has a tensor of \
                     the name that a packed weight's scales get",
                    output.name
                );
                return Err(CheckpointError::format(path, what));
            }
        }
        // The offsets of experts that hold nothing take as much as their header claims.
        let sum = outputs.iter().try_fold(0u64, |sum, output| sum.checked_add(output.bytes()));
        let Some(bytes) = sum.filter(|bytes| *bytes <= LARGEST_WEIGHT) else {
            let name = outputs.first().map_or("", |output| output.name.as_str());
            return Err(CheckpointError::format(path, format!("tensor {name:?}: its output is too large for a file")));
        };
        if self.bytes > 0 && self.bytes + bytes > self.limit.min(LARGEST_WEIGHT) {
            self.files.push(Vec::new());
            self.bytes = 0;
        }
        self.bytes += bytes;
        if let Some(file) = self.files.last_mut() {
            file.extend(outputs);
        }
        Ok(())
    }

    /// Name the files and put their tensors into the format's writing order: widest dtype first, then by name.
    fn finish(self) -> Vec<Shard> {
        let count = self.files.len();
        let mut shards = Vec::with_capacity(count);
        for (index, mut tensors) in self.files.into_iter().enumerate() {
            let name = if count == 1 {
                "model.safetensors".to_owned()
            } else {
                format!("model-{:05}-of-{count:05}.safetensors", index + 1)
            };
            // NOTE: an unknown dtype sorts last, where it cannot disturb the alignment of others.
            tensors.sort_by(|a, b| known_dtype(&b.dtype).cmp(&known_dtype(&a.dtype)).then_with(|| a.name.cmp(&b.name)));
            let mut next = 0;
            for tensor in &mut tensors {
                (tensor.start, tensor.end) = (next, next + tensor.end);
                next = tensor.end;
            }
            shards.push(Shard { name, tensors, data_start: PREFIX_BYTES });
        }
        shards
    }
}
