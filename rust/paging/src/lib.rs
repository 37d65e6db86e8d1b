//! Memory under a budget: which pages stay on the device, and when the others come and go.
//!
//! [`Pool`] is policy and bookkeeping, the same for every device; a [`Backend`] has the memory and does the copying.
//! [`HostBackend`] is the one of ordinary memory. Nothing here runs in the background: the same calls lead to the same
//! pages in the same frames.

mod arena;
pub mod backend;
mod buffer;
pub mod error;
mod frames;
mod homes;
pub mod host;
mod placing;
pub mod pool;
pub mod shared;
pub mod stats;
pub mod timeline;
mod trace;

pub use backend::{Backend, HostMemory, HostPlace, Lane};
pub use buffer::{BufferId, Mode};
pub use error::PagingError;
pub use host::{HostBackend, HostError};
pub use pool::{Policy, Pool, Until};
pub use shared::Shared;
pub use stats::Stats;
pub use timeline::{Activity, Span};
