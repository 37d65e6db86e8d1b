//! Files: reads safetensors in slices, quantizes on the way, writes packed checkpoints. Depends on the numbers alone.
//!
//! [`header`] is what a file says of itself, [`plan`] what is to be written where, [`slices`] how a tensor passes, [`reader`]
//! the one pass over the source, [`hasher`] what proves it, [`worker`] what is made of it, [`writer`] the shards, [`behind`]
//! their way to the disk, [`pack`] the pipeline of them all, [`journal`] what of it is finished, [`checksum`] what shows
//! that, and [`resume`] what an interrupted run left. [`transpose`] turns what is packed along the other dimension,
//! [`page_cache`] is left as it was. [`swap`] replaces a whole folder in one step, [`load`] brings tensors from files into
//! other memory.

pub mod behind;
pub mod checksum;
pub mod error;
pub mod hasher;
pub mod header;
pub mod journal;
pub mod load;
pub mod pack;
pub mod page_cache;
pub mod plan;
pub mod reader;
pub mod resume;
pub mod slices;
pub mod swap;
pub mod transpose;
pub mod worker;
pub mod writer;

pub use checksum::Checksum;
pub use error::CheckpointError;
pub use header::{Header, Tensor};
pub use journal::{Finished, Journal};
pub use load::{FileTargets, LoadError, LoadOptions, Target, load};
pub use pack::{PackOptions, Resumption, pack};
pub use plan::{Plan, PlanRequest};
pub use swap::swap;
