//! The device half of `qlora_rs`: the driver, the kernels' PTX, and one launcher for each kernel file.

pub mod context;
pub mod dequantize;
pub mod double_quantize;
pub mod driver;
pub mod error;
mod events;
pub mod heuristics;
pub mod launch;
pub mod linear_4bit;
pub mod linear_backward_4bit;
mod modules;
pub mod optimizer;
mod optimizer_maps;
pub mod optimizer_tables;
pub mod paging;
pub mod pressure;
pub mod quantize;
pub mod upload;

pub use context::{Device, device};
pub use dequantize::{DeviceScales, dequantize};
pub use double_quantize::{Nested, scratch_bytes};
pub use error::CudaError;
pub use launch::{DevicePtr, Queue};
pub use linear_4bit::{LowRank, Operands, linear_4bit, most_fused_tokens};
pub use linear_backward_4bit::{BackwardOperands, linear_backward_4bit, most_fused_backward_tokens};
pub use optimizer::{MOST_PAGES, Sets, StepRule, StepTables};
pub use optimizer_tables::{Counter, FactorSet, GroupOptions, StepRun, StepTensor};
pub use paging::CudaBackend;
pub use quantize::{Quantized, quantize};
pub use upload::Uploader;
