//! What one optimizer step does to one element, in float32; `reference.py` says the same in torch.
//!
//! Every operation is rounded by itself: no instruction set fuses a product into a sum, so all give the same bits. Factors
//! that are the same for all elements are made by the caller in float64 and rounded once.

use crate::error::CoreError;

/// State arrays that a rule has at most.
pub const MOST_STATES: usize = 3;

/// An update rule with its factors for one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Adam with decoupled weight decay. States: first moment, second moment.
    AdamW(AdamW),
    /// Sign of an interpolated moment. State: the moment.
    Lion(Lion),
    /// `AdamW` with a second, slower first moment. States: fast moment, second moment, slow moment.
    AdEMAMix(AdEMAMix),
    /// Gradient descent. State: the momentum buffer, where momentum is not 0.
    Sgd(Sgd),
}

/// Factors of [`Rule::AdamW`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// 1 - lr * weight decay.
    pub decay: f32,
    /// 1 - beta 1.
    pub rest1: f32,
    /// Beta 2.
    pub beta2: f32,
    /// 1 - beta 2.
    pub rest2: f32,
    /// Square root of 1 - beta 2 to the step.
    pub correction2: f32,
    /// Added to the denominator.
    pub eps: f32,
    /// lr / (1 - beta 1 to the step).
    pub step_size: f32,
}

/// Factors of [`Rule::Lion`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lion {
    /// 1 - lr * weight decay.
    pub decay: f32,
    /// Beta 1, of the interpolation.
    pub beta1: f32,
    /// 1 - beta 1.
    pub rest1: f32,
    /// Beta 2, of the moment.
    pub beta2: f32,
    /// 1 - beta 2.
    pub rest2: f32,
    /// Learning rate.
    pub lr: f32,
}

/// Factors of [`Rule::AdEMAMix`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdEMAMix {
    /// 1 - lr * weight decay.
    pub decay: f32,
    /// 1 - beta 1.
    pub rest1: f32,
    /// Beta 2.
    pub beta2: f32,
    /// 1 - beta 2.
    pub rest2: f32,
    /// 1 - beta 3.
    pub rest3: f32,
    /// 1 - beta 1 to the step.
    pub correction1: f32,
    /// Square root of 1 - beta 2 to the step.
    pub correction2: f32,
    /// Added to the denominator.
    pub eps: f32,
    /// Weight of the slow moment.
    pub alpha: f32,
    /// Learning rate.
    pub lr: f32,
}

/// Factors of [`Rule::Sgd`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    /// Weight decay, added to the gradient.
    pub weight_decay: f32,
    /// Momentum.
    pub momentum: f32,
    /// 1 - dampening; 1 at a parameter's first step.
    pub rest: f32,
    /// Look ahead along the momentum?
    pub nesterov: bool,
    /// Learning rate.
    pub lr: f32,
}

impl Rule {
    /// The rule of this name, its factors in the order of its fields (a truth as 1 or 0).
    ///
    /// # Errors
    /// [`CoreError::Spec`]: no such rule, or another number of factors.
    pub fn new(name: &str, factors: &[f32]) -> Result<Self, CoreError> {
        Ok(match (name, factors) {
            ("adamw", &[decay, rest1, beta2, rest2, correction2, eps, step_size]) => {
                Self::AdamW(AdamW { decay, rest1, beta2, rest2, correction2, eps, step_size })
            }
            ("lion", &[decay, beta1, rest1, beta2, rest2, lr]) => {
                Self::Lion(Lion { decay, beta1, rest1, beta2, rest2, lr })
            }
            ("ademamix", &[decay, rest1, beta2, rest2, rest3, correction1, correction2, eps, alpha, lr]) => {
                let mix = AdEMAMix { decay, rest1, beta2, rest2, rest3, correction1, correction2, eps, alpha, lr };
                Self::AdEMAMix(mix)
            }
            ("sgd", &[weight_decay, momentum, rest, nesterov, lr]) => {
                Self::Sgd(Sgd { weight_decay, momentum, rest, nesterov: nesterov > 0.0, lr })
            }
            _ => return Err(CoreError::Spec(format!("no update rule {name:?} with {} factors", factors.len()))),
        })
    }

    /// How many state arrays it has.
    #[must_use]
    pub fn states(&self) -> usize {
        match self {
            Self::AdamW(_) => 2,
            Self::Lion(_) => 1,
            Self::AdEMAMix(_) => 3,
            Self::Sgd(rule) => usize::from(rule.momentum != 0.0),
        }
    }
}

/// One step for elements of equal index; states beyond the rule's own are empty. `scale` multiplies the gradient first.
#[inline(always)]
#[allow(clippy::inline_always)] // compiled once for each instruction set, in `simd`
pub(crate) fn update(rule: &Rule, scale: f32, param: &mut [f32], grad: &[f32], states: [&mut [f32]; MOST_STATES]) {
    let [first, second, third] = states;
    match *rule {
        Rule::AdamW(rule) => {
            for (((p, &g), m), v) in param.iter_mut().zip(grad).zip(first).zip(second) {
                let g = g * scale;
                *m += (g - *m) * rule.rest1;
                *v = *v * rule.beta2 + g * g * rule.rest2;
                let denominator = v.sqrt() / rule.correction2 + rule.eps;
                *p = *p * rule.decay - *m / denominator * rule.step_size;
            }
        }
        Rule::Lion(rule) => {
            for ((p, &g), m) in param.iter_mut().zip(grad).zip(first) {
                let g = g * scale;
                let direction = sign(*m * rule.beta1 + g * rule.rest1);
                *p = *p * rule.decay - direction * rule.lr;
                *m = *m * rule.beta2 + g * rule.rest2;
            }
        }
        Rule::AdEMAMix(rule) => {
            for ((((p, &g), m), v), slow) in param.iter_mut().zip(grad).zip(first).zip(second).zip(third) {
                let g = g * scale;
                *m += (g - *m) * rule.rest1;
                *v = *v * rule.beta2 + g * g * rule.rest2;
                *slow += (g - *slow) * rule.rest3;
                let denominator = v.sqrt() / rule.correction2 + rule.eps;
                let mixed = *m / rule.correction1 + *slow * rule.alpha;
                *p = *p * rule.decay - mixed / denominator * rule.lr;
            }
        }
        Rule::Sgd(rule) if rule.momentum == 0.0 => {
            for (p, &g) in param.iter_mut().zip(grad) {
                *p -= (g * scale + *p * rule.weight_decay) * rule.lr;
            }
        }
        Rule::Sgd(rule) => {
            for ((p, &g), buffer) in param.iter_mut().zip(grad).zip(first) {
                let g = g * scale + *p * rule.weight_decay;
                *buffer = *buffer * rule.momentum + g * rule.rest;
                let ahead = g + *buffer * rule.momentum;
                let direction = if rule.nesterov { ahead } else { *buffer };
                *p -= direction * rule.lr;
            }
        }
    }
}

/// -1, 0 or 1; NaN stays NaN.
#[inline(always)]
#[allow(clippy::inline_always)] // as above
fn sign(x: f32) -> f32 {
    if x > 0.0 {
        1.0
    } else if x < 0.0 {
        -1.0
    } else {
        x
    }
}
