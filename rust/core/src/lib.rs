//! Numbers only: codebooks, blockwise quantization, double quantization, packing. No I/O, no Python, no CUDA.
//!
//! A weight of shape (experts, rows, columns) is cut along its rows into blocks of `block_size`; a block never crosses
//! a row. Scalar code is the truth; [`simd`] gives the same bits faster.

#[cfg(not(target_arch = "x86_64"))]
compile_error!("qlora-core supports x86-64 only");

mod byte_search;
pub mod codebook;
pub mod control;
pub mod dequantize;
pub mod double_quant;
pub mod dynamic_map;
pub mod error;
pub mod float;
pub mod layout;
pub mod matvec;
pub mod optim;
pub mod optim_step;
pub mod optimizer_state;
pub mod pack;
pub mod parallel;
pub mod quantize;
pub mod simd;
pub mod sink;
pub mod spec;

pub use codebook::{Codebook, Search};
pub use control::Control;
pub use dequantize::{Scales, dequantize};
pub use double_quant::double_quantize;
pub use dynamic_map::{DynamicMap, dynamic_map_signed, dynamic_thresholds};
pub use error::CoreError;
pub use float::{FloatType, Floats, FloatsMut};
pub use layout::{Layout, NESTED_BLOCK_SIZE};
pub use matvec::{PackedMatrix, linear, most_fused_tokens};
pub use optim::Rule;
pub use optim_step::{Parameter, State, optimizer_step, squared_norm};
pub use optimizer_state::{STATE_BLOCK_SIZE, dequantize_state, quantize_state};
pub use parallel::Parallel;
pub use quantize::{Nonfinite, quantize};
pub use simd::{SimdLevel, simd_level};
pub use sink::{ByteSink, Piece};
pub use spec::{BLOCK_SIZES, QuantSpec, QuantType};
