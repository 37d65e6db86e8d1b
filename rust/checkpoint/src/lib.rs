//! Files: reads safetensors in slices, quantizes on the way, writes packed checkpoints. Depends on the numbers alone.
//!
//! [`header`] is what a file says of itself, [`plan`] what is to be written where, [`reader`] the one pass over the
//! source, [`hasher`] what proves it, [`writer`] the shards, [`pack`] the pipeline of them all, [`journal`] what of it is
//! finished and [`resume`] what an interrupted run left. [`transpose`] turns what is packed along the other dimension. [`swap`]
//! replaces a whole folder in one step, [`load`] brings tensors from files into other memory.

pub mod error;
pub mod hasher;
pub mod header;
pub mod journal;
pub mod load;
pub mod pack;
pub mod plan;
pub mod reader;
pub mod resume;
pub mod swap;
pub mod transpose;
pub mod writer;

pub use error::CheckpointError;
pub use header::{Header, Tensor};
pub use journal::{Finished, Journal};
pub use load::{FileTargets, LoadError, LoadOptions, Target, load};
pub use pack::{PackOptions, Resumption, pack};
pub use plan::{Plan, PlanRequest};
pub use swap::swap;
