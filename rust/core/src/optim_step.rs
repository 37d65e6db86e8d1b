//! An optimizer's step over many tensors at once: cut into pieces, each decoded, updated and encoded in the cache.

use crate::control::Control;
use crate::dynamic_map::DynamicMap;
use crate::error::CoreError;
use crate::float::{Element, Floats, FloatsMut};
use crate::optim::{MOST_STATES, Rule};
use crate::optimizer_state::{STATE_BLOCK_SIZE, dequantize_state_at, quantize_state_at};
use crate::parallel::Parallel;
use crate::simd::{self, SimdLevel, simd_level};

/// Elements of a piece: a multiple of the state's block, so that no block is cut.
const PIECE: usize = 64 * STATE_BLOCK_SIZE;
/// Elements that are decoded together: with three states they fit the first-level cache.
const CHUNK: usize = 4 * STATE_BLOCK_SIZE;

/// Elements of a gradient whose squares are summed together.
const SQUARES_PIECE: usize = 4096;
/// Sums side by side.
const SUMS: usize = 128;

/// One state array of a parameter.
#[derive(Debug)]
pub enum State<'a> {
    /// One float32 an element.
    Full(&'a mut [f32]),
    /// One code an element, one scale for each 256 of them.
    Blockwise {
        /// What the codes stand for.
        map: DynamicMap,
        /// As many as elements.
        codes: &'a mut [u8],
        /// Scales.
        absmax: &'a mut [f32],
    },
}

/// One parameter in a step.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// How it is updated.
    pub rule: Rule,
    /// What its gradient is multiplied by first.
    pub scale: f32,
    /// Its elements.
    pub param: FloatsMut<'a>,
    /// Its gradient, as many elements of the same type.
    pub grad: Floats<'a>,
    /// As many as the rule has.
    pub states: Vec<State<'a>>,
}

/// Update all parameters and their states. Bits depend neither on the number of threads nor on the instruction set.
///
/// # Errors
/// [`CoreError::Shape`] when lengths, types or the number of states do not fit; nothing has been changed then.
pub fn optimizer_step(parameters: Vec<Parameter<'_>>, parallel: &Parallel) -> Result<(), CoreError> {
    optimizer_step_at(simd_level()?, parameters, parallel)
}

/// [`optimizer_step`] with a given instruction set, which the processor must have.
///
/// # Errors
/// As [`optimizer_step`].
pub fn optimizer_step_at(
    level: SimdLevel,
    parameters: Vec<Parameter<'_>>,
    parallel: &Parallel,
) -> Result<(), CoreError> {
    parameters.iter().enumerate().try_for_each(|(index, parameter)| check(index, parameter))?;
    let mut pieces = Vec::new();
    for parameter in parameters {
        cut(parameter, &mut pieces);
    }
    parallel.for_each(pieces, &Control::default(), |piece| run(level, piece))
}

/// The sum of the gradients' squares, in float64 by a fixed order, which `kernels/optimizer.cu` keeps too: each gradient in
/// pieces of 4096 elements, [`side_by_side`] in each, and again over the sums of all pieces.
///
/// # Errors
/// None but the instruction set's.
pub fn squared_norm(grads: &[Floats<'_>], parallel: &Parallel) -> Result<f64, CoreError> {
    let mut pieces = Vec::new();
    for grad in grads {
        let mut rest = *grad;
        while !rest.is_empty() {
            let (piece, left) = split(rest, PIECE.min(rest.len()));
            pieces.push(piece);
            rest = left;
        }
    }
    let piece_sums = |piece| match piece {
        Floats::F32(values) => squares(values),
        Floats::Bf16(values) => squares(values),
        Floats::F16(values) => squares(values),
    };
    let mut sums = vec![0.0; pieces.iter().map(|piece| piece.len().div_ceil(SQUARES_PIECE)).sum()];
    let mut rest = sums.as_mut_slice();
    let mut work = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let (own, others) = rest.split_at_mut(piece.len().div_ceil(SQUARES_PIECE));
        rest = others;
        work.push((piece, own));
    }
    parallel.for_each(work, &Control::default(), |(piece, sums)| sums.copy_from_slice(&piece_sums(piece)))?;
    Ok(side_by_side(&sums, |&sum| sum))
}

fn squares<T: Element>(values: &[T]) -> Vec<f64> {
    let square = |value: &T| f64::from(value.widen()) * f64::from(value.widen());
    values.chunks(SQUARES_PIECE).map(|piece| side_by_side(piece, square)).collect()
}

/// Item i goes into sum i % 128; the sums are added in halves, the upper to the lower.
fn side_by_side<T>(items: &[T], value: impl Fn(&T) -> f64) -> f64 {
    let mut sums = [0.0f64; SUMS];
    for items in items.chunks(SUMS) {
        for (sum, item) in sums.iter_mut().zip(items) {
            *sum += value(item);
        }
    }
    let mut half = SUMS / 2;
    while half > 0 {
        let (lower, upper) = sums.split_at_mut(half);
        lower.iter_mut().zip(upper).for_each(|(lower, upper)| *lower += *upper);
        half /= 2;
    }
    sums[0]
}

fn check(index: usize, parameter: &Parameter<'_>) -> Result<(), CoreError> {
    let wrong = |what: String| Err(CoreError::Shape(format!("parameter {index}: {what}")));
    let (elements, grad) = (parameter.param.len(), parameter.grad.len());
    if grad != elements {
        return wrong(format!("{elements} elements, {grad} in the gradient"));
    }
    let same_type = matches!(
        (&parameter.param, &parameter.grad),
        (FloatsMut::F32(_), Floats::F32(_))
            | (FloatsMut::Bf16(_), Floats::Bf16(_))
            | (FloatsMut::F16(_), Floats::F16(_))
    );
    if !same_type {
        return wrong("its gradient has another type".into());
    }
    if parameter.states.len() != parameter.rule.states() {
        return wrong(format!("{} states, the rule has {}", parameter.states.len(), parameter.rule.states()));
    }
    for state in &parameter.states {
        let (values, scales) = match state {
            State::Full(values) => (values.len(), elements.div_ceil(STATE_BLOCK_SIZE)),
            State::Blockwise { codes, absmax, .. } => (codes.len(), absmax.len()),
        };
        if values != elements || scales != elements.div_ceil(STATE_BLOCK_SIZE) {
            return wrong(format!("{elements} elements, a state of {values} with {scales} scales"));
        }
    }
    Ok(())
}

fn cut<'a>(parameter: Parameter<'a>, pieces: &mut Vec<Parameter<'a>>) {
    let Parameter { rule, scale, mut param, mut grad, mut states } = parameter;
    while param.len() > PIECE {
        let (head, tail) = split_mut(param, PIECE);
        let (head_grad, tail_grad) = split(grad, PIECE);
        let (head_states, tail_states) = states.into_iter().map(split_state).unzip();
        pieces.push(Parameter { rule, scale, param: head, grad: head_grad, states: head_states });
        (param, grad, states) = (tail, tail_grad, tail_states);
    }
    if !param.is_empty() {
        pieces.push(Parameter { rule, scale, param, grad, states });
    }
}

fn split(values: Floats<'_>, at: usize) -> (Floats<'_>, Floats<'_>) {
    match values {
        Floats::F32(values) => (Floats::F32(&values[..at]), Floats::F32(&values[at..])),
        Floats::Bf16(values) => (Floats::Bf16(&values[..at]), Floats::Bf16(&values[at..])),
        Floats::F16(values) => (Floats::F16(&values[..at]), Floats::F16(&values[at..])),
    }
}

fn split_mut(values: FloatsMut<'_>, at: usize) -> (FloatsMut<'_>, FloatsMut<'_>) {
    match values {
        FloatsMut::F32(values) => {
            let (head, tail) = values.split_at_mut(at);
            (FloatsMut::F32(head), FloatsMut::F32(tail))
        }
        FloatsMut::Bf16(values) => {
            let (head, tail) = values.split_at_mut(at);
            (FloatsMut::Bf16(head), FloatsMut::Bf16(tail))
        }
        FloatsMut::F16(values) => {
            let (head, tail) = values.split_at_mut(at);
            (FloatsMut::F16(head), FloatsMut::F16(tail))
        }
    }
}

fn split_state(state: State<'_>) -> (State<'_>, State<'_>) {
    match state {
        State::Full(values) => {
            let (head, tail) = values.split_at_mut(PIECE);
            (State::Full(head), State::Full(tail))
        }
        State::Blockwise { map, codes, absmax } => {
            let (head, tail) = codes.split_at_mut(PIECE);
            let (head_absmax, tail_absmax) = absmax.split_at_mut(PIECE / STATE_BLOCK_SIZE);
            (
                State::Blockwise { map, codes: head, absmax: head_absmax },
                State::Blockwise { map, codes: tail, absmax: tail_absmax },
            )
        }
    }
}

fn run(level: SimdLevel, piece: Parameter<'_>) {
    let Parameter { rule, scale, param, grad, mut states } = piece;
    match (param, grad) {
        (FloatsMut::F32(param), Floats::F32(grad)) => run_wide(level, &rule, scale, param, grad, &mut states),
        (FloatsMut::Bf16(param), Floats::Bf16(grad)) => run_narrow(level, &rule, scale, param, grad, &mut states),
        (FloatsMut::F16(param), Floats::F16(grad)) => run_narrow(level, &rule, scale, param, grad, &mut states),
        _ => unreachable!("`check` saw equal types"),
    }
}

/// float32 parameters are updated in place.
fn run_wide(level: SimdLevel, rule: &Rule, scale: f32, param: &mut [f32], grad: &[f32], states: &mut [State<'_>]) {
    if states.iter().all(|state| matches!(state, State::Full(_))) {
        let mut full = states.iter_mut().map(|state| match state {
            State::Full(values) => &mut **values,
            State::Blockwise { .. } => unreachable!("all are full"),
        });
        let full: [&mut [f32]; MOST_STATES] = std::array::from_fn(|_| full.next().unwrap_or_default());
        simd::update(level, rule, scale, param, grad, full);
        return;
    }
    let mut wide = [[0.0; CHUNK]; MOST_STATES];
    for (chunk, (param, grad)) in param.chunks_mut(CHUNK).zip(grad.chunks(CHUNK)).enumerate() {
        with_states(level, chunk, param.len(), states, &mut wide, |full| {
            simd::update(level, rule, scale, param, grad, full);
        });
    }
}

/// Narrower ones a chunk at a time, rounded to nearest even.
fn run_narrow<T: Element>(
    level: SimdLevel,
    rule: &Rule,
    scale: f32,
    param: &mut [T],
    grad: &[T],
    states: &mut [State<'_>],
) {
    let (mut wide_param, mut wide_grad) = ([0.0; CHUNK], [0.0; CHUNK]);
    let mut wide = [[0.0; CHUNK]; MOST_STATES];
    for (chunk, (param, grad)) in param.chunks_mut(CHUNK).zip(grad.chunks(CHUNK)).enumerate() {
        let count = param.len();
        let (wide_param, wide_grad) = (&mut wide_param[..count], &mut wide_grad[..count]);
        wide_param.iter_mut().zip(&*param).for_each(|(wide, value)| *wide = value.widen());
        wide_grad.iter_mut().zip(grad).for_each(|(wide, value)| *wide = value.widen());
        with_states(level, chunk, count, states, &mut wide, |full| {
            simd::update(level, rule, scale, wide_param, wide_grad, full);
        });
        param.iter_mut().zip(&*wide_param).for_each(|(value, wide)| *value = T::narrow(*wide));
    }
}

/// Lend a chunk of each state as float32, in `wide`, and take it back.
fn with_states(
    level: SimdLevel,
    chunk: usize,
    count: usize,
    states: &mut [State<'_>],
    wide: &mut [[f32; CHUNK]; MOST_STATES],
    work: impl FnOnce([&mut [f32]; MOST_STATES]),
) {
    let range = chunk * CHUNK..chunk * CHUNK + count;
    let blocks = range.start / STATE_BLOCK_SIZE..range.end.div_ceil(STATE_BLOCK_SIZE);
    for (wide, state) in wide.iter_mut().zip(&*states) {
        let wide = &mut wide[..count];
        match state {
            State::Full(values) => wide.copy_from_slice(&values[range.clone()]),
            State::Blockwise { map, codes, absmax } => {
                dequantize_state_at(level, *map, &codes[range.clone()], &absmax[blocks.clone()], wide)
                    .expect("`check` saw that the lengths fit");
            }
        }
    }
    let own = states.len();
    let mut parts = wide.iter_mut().take(own);
    work(std::array::from_fn(|_| parts.next().map(|part| &mut part[..count]).unwrap_or_default()));
    for (wide, state) in wide.iter().zip(states) {
        let wide = &wide[..count];
        match state {
            State::Full(values) => values[range.clone()].copy_from_slice(wide),
            State::Blockwise { map, codes, absmax } => {
                quantize_state_at(level, *map, wide, &mut codes[range.clone()], &mut absmax[blocks.clone()])
                    .expect("`check` saw that the lengths fit");
            }
        }
    }
}
