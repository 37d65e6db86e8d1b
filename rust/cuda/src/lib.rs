//! The device half of `qlora_rs`. Today it holds the driver probe: what card and driver there are, or why none.

pub mod driver;
