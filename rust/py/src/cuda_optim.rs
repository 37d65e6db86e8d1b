//! Optimizer steps on device memory; all calls return before the work is done.

use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qlora_cuda::{
    Counter, CudaError, DevicePtr, FactorSet, GroupOptions, Sets, StepRule, StepRun, StepTables, StepTensor,
};

use crate::boundary::{IntoPyErr, Memory, expect};
use crate::cuda::{QueueOf, queue_of};
use crate::optim::{RunOf, SetOf, TensorOf};
use crate::quantize::float_type;

/// Steps of one rule over a list of parameters of one device, which is made once and used for many steps.
///
/// The caller keeps all memory alive, that of the tables included, and tells where parameters and gradients are when they
/// have moved.
#[pyclass(frozen, module = "qlora_rs._core")]
pub struct DeviceStep {
    tables: Mutex<StepTables>,
}

impl DeviceStep {
    fn with(&self, py: Python<'_>, work: impl FnOnce(&mut StepTables) -> Result<(), CudaError> + Send) -> PyResult<()> {
        // Launching can wait for room in the driver's queue.
        py.detach(|| work(&mut self.tables.lock().unwrap_or_else(PoisonError::into_inner)))
            .map_err(IntoPyErr::into_py_err)
    }
}

fn tensors_of(tensors: Vec<TensorOf>) -> PyResult<Vec<StepTensor>> {
    let tensor = |(param, elements, dtype, set): TensorOf| {
        Ok(StepTensor { param: param as DevicePtr, elements, dtype: float_type(dtype)?, set })
    };
    tensors.into_iter().map(tensor).collect()
}

fn pointers(addresses: Vec<usize>) -> Vec<DevicePtr> {
    addresses.into_iter().map(|address| address as DevicePtr).collect()
}

#[pymethods]
impl DeviceStep {
    /// Bytes of device memory, at a multiple of 16, that tables take.
    #[staticmethod]
    fn table_bytes(tensors: Vec<TensorOf>, runs: usize) -> PyResult<usize> {
        Ok(StepTables::bytes(&tensors_of(tensors)?, runs))
    }

    /// Tables in `table` (bytes of device memory), written on the queue. Runs are in the order of their pages.
    #[new]
    #[pyo3(signature = (rule, *, tensors, runs, table, queue))]
    fn new(
        py: Python<'_>,
        rule: &str,
        tensors: Vec<TensorOf>,
        runs: Vec<RunOf>,
        table: Memory,
        queue: QueueOf,
    ) -> PyResult<Self> {
        let rule = StepRule::named(rule).ok_or_else(|| PyValueError::new_err(format!("no update rule {rule:?}")))?;
        let tensors = tensors_of(tensors)?;
        expect("table", table.1, StepTables::bytes(&tensors, runs.len()))?;
        let run = |(tensor, start, elements, page, eight, states): RunOf| StepRun {
            tensor,
            start,
            elements,
            page,
            eight,
            states: states.iter().map(|&(values, absmax, _)| (values as DevicePtr, absmax as DevicePtr)).collect(),
        };
        let runs: Vec<_> = runs.into_iter().map(run).collect();
        let tables = StepTables::new(rule, table.0 as DevicePtr, tensors, &runs).map_err(IntoPyErr::into_py_err)?;
        let step = Self { tables: Mutex::new(tables) };
        // SAFETY: `_bridge.py` passes a live tensor of this device, whose length was checked.
        step.with(py, |tables| unsafe { tables.upload(queue_of(queue)) })?;
        Ok(step)
    }

    /// Where parameters are, and where gradients are; None for what has not changed.
    fn set_addresses(
        &self,
        py: Python<'_>,
        queue: QueueOf,
        params: Option<Vec<usize>>,
        grads: Option<Vec<usize>>,
    ) -> PyResult<()> {
        self.with(py, |tables| {
            // SAFETY: as in `new`, whose table is still alive.
            unsafe {
                if let Some(params) = params {
                    tables.upload_params(queue_of(queue), &pointers(params))?;
                }
                grads.map_or(Ok(()), |grads| tables.upload_grads(queue_of(queue), &pointers(grads)))
            }
        })
    }

    /// What `make_factors` needs: for each parameter the address of its float32 number of steps and its group; for each
    /// group its options, the address of its learning rate (0: it is the last of the options), and is that a float64?
    fn set_counters(
        &self,
        py: Python<'_>,
        queue: QueueOf,
        counters: Vec<(usize, u32)>,
        groups: Vec<([f64; 13], usize, bool)>,
    ) -> PyResult<()> {
        let counters: Vec<_> =
            counters.into_iter().map(|(steps, group)| Counter { steps: steps as u64, group, unused: 0 }).collect();
        let group = |(values, lr, double)| GroupOptions {
            values,
            lr_address: lr as u64,
            lr_is_double: u32::from(double),
            unused: 0,
        };
        let groups: Vec<_> = groups.into_iter().map(group).collect();
        // SAFETY: as in `set_addresses`.
        self.with(py, |tables| unsafe { tables.upload_counters(queue_of(queue), &counters, &groups) })
    }

    /// Count a step of each parameter on the device, and make its factors there.
    fn make_factors(&self, py: Python<'_>, queue: QueueOf) -> PyResult<()> {
        // SAFETY: as in `set_addresses`; `_bridge.py` keeps counters and learning rates alive.
        self.with(py, |tables| unsafe { tables.make_factors(queue_of(queue)) })
    }

    /// Leave at the table's start, as float64, the sum of the gradients' squares and its root, and behind them the factor
    /// that brings the root down to `most`.
    fn clip(&self, py: Python<'_>, queue: QueueOf, most: f64) -> PyResult<()> {
        // SAFETY: as in `set_addresses`; `_bridge.py` keeps the gradients alive until the stream has passed.
        self.with(py, |tables| unsafe { tables.clip(queue_of(queue), most) })
    }

    /// Address of the factor that `clip` leaves, a float32.
    fn clip_factor(&self) -> usize {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner).clip_factor() as usize
    }

    /// Update what is in the pages from `pages[0]` to before `pages[1]`, whose `addresses` are given (page 0 has none).
    /// `sets` None: those of `make_factors`. `clip`: address of a float32 that multiplies all gradients, or None.
    #[pyo3(signature = (queue, *, pages, addresses, sets, clip))]
    fn step(
        &self,
        py: Python<'_>,
        queue: QueueOf,
        pages: (u32, u32),
        addresses: Vec<usize>,
        sets: Option<Vec<SetOf>>,
        clip: Option<usize>,
    ) -> PyResult<()> {
        self.with(py, |tables| {
            let own = sets
                .map(|sets| sets.iter().map(|(factors, scale)| FactorSet::new(factors, *scale)).collect())
                .transpose()?;
            let sets: Sets<'_> = own.as_ref().map_or(Sets::Device, |sets: &Vec<FactorSet>| Sets::Host(sets));
            let clip = clip.map(|address| address as DevicePtr);
            // SAFETY: as in `clip`; pages are acquired, and no two runs overlap.
            unsafe { tables.step(queue_of(queue), pages.0..pages.1, &pointers(addresses), sets, clip) }
        })
    }
}
