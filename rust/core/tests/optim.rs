//! Optimizer steps: the same bits from every instruction set, thread count and cut.

mod support;

use half::{bf16, f16};
use qlora_core::dynamic_map::DynamicMap;
use qlora_core::optim_step::optimizer_step_at;
use qlora_core::{Floats, FloatsMut, Parallel, Parameter, Rule, SimdLevel, State, squared_norm};
use support::{Random, levels};

/// Longer than a piece, with a short last block.
const LENGTHS: [usize; 6] = [0, 1, 255, 257, 4099, 40_000];

fn rules() -> [Rule; 6] {
    let rule = |name, factors: &[f32]| Rule::new(name, factors).expect("all factors are there");
    [
        rule("adamw", &[0.999, 0.1, 0.999, 0.001, 0.2, 1e-8, 1e-2]),
        rule("lion", &[0.999, 0.9, 0.1, 0.99, 0.01, 1e-3]),
        rule("ademamix", &[0.999, 0.1, 0.999, 0.001, 1e-4, 0.3, 0.2, 1e-8, 5.0, 1e-2]),
        rule("sgd", &[0.01, 0.9, 0.5, 0.0, 0.1]),
        rule("sgd", &[0.0, 0.9, 1.0, 1.0, 0.1]),
        rule("sgd", &[0.01, 0.0, 1.0, 0.0, 0.1]),
    ]
}

#[derive(Clone)]
struct Tensors {
    params: Vec<Vec<f32>>,
    grads: Vec<Vec<f32>>,
    full: Vec<Vec<Vec<f32>>>,
    codes: Vec<Vec<Vec<u8>>>,
    absmax: Vec<Vec<Vec<f32>>>,
}

impl Tensors {
    fn new(rule: &Rule) -> Self {
        let mut random = Random(7);
        let states = rule.states();
        let mut normal = |len: usize, scale: f32| (0..len).map(|_| random.normal() * scale).collect::<Vec<_>>();
        Self {
            params: LENGTHS.iter().map(|&len| normal(len, 1.0)).collect(),
            grads: LENGTHS.iter().map(|&len| normal(len, 1e-3)).collect(),
            full: LENGTHS.iter().map(|&len| vec![vec![0.0; len]; states]).collect(),
            codes: LENGTHS.iter().map(|&len| vec![vec![0; len]; states]).collect(),
            absmax: LENGTHS.iter().map(|&len| vec![vec![0.0; len.div_ceil(256)]; states]).collect(),
        }
    }

    fn step(&mut self, rule: Rule, blockwise: bool, level: SimdLevel, threads: usize) {
        let mut parameters = Vec::new();
        let states = self.full.iter_mut().zip(&mut self.codes).zip(&mut self.absmax);
        for ((param, grad), ((full, codes), absmax)) in self.params.iter_mut().zip(&self.grads).zip(states) {
            let states = if blockwise {
                let maps = [DynamicMap::Signed, DynamicMap::Unsigned, DynamicMap::Signed];
                let parts = codes.iter_mut().zip(absmax).zip(maps);
                parts.map(|((codes, absmax), map)| State::Blockwise { map, codes, absmax }).collect()
            } else {
                full.iter_mut().map(|values| State::Full(values)).collect()
            };
            parameters.push(Parameter {
                rule,
                scale: 0.7,
                param: FloatsMut::F32(param),
                grad: Floats::F32(grad),
                states,
            });
        }
        optimizer_step_at(level, parameters, &Parallel::new(threads)).expect("everything fits");
    }

    fn bits(&self) -> (Vec<u32>, Vec<u8>) {
        let floats = self.params.iter().chain(self.full.iter().flatten()).chain(self.absmax.iter().flatten());
        (floats.flatten().map(|x| x.to_bits()).collect(), self.codes.iter().flatten().flatten().copied().collect())
    }
}

#[test]
fn every_instruction_set_and_thread_count_gives_the_same_bits() {
    for rule in rules() {
        for blockwise in [false, true] {
            let play = |level, threads| {
                let mut tensors = Tensors::new(&rule);
                (0..3).for_each(|_| tensors.step(rule, blockwise, level, threads));
                tensors.bits()
            };
            let truth = play(SimdLevel::Scalar, 1);
            assert_ne!(truth, Tensors::new(&rule).bits());
            for level in levels() {
                for threads in [1, 3] {
                    assert!(play(level, threads) == truth, "{rule:?} {blockwise} {level:?} {threads}");
                }
            }
        }
    }
}

#[test]
fn narrow_parameters_move_as_float32_rounded_once() {
    let rule = rules()[0];
    let mut random = Random(1);
    let values: Vec<f32> = (0..1031).map(|_| random.normal()).collect();
    let grads: Vec<f32> = (0..1031).map(|_| random.normal()).collect();
    macro_rules! check {
        ($float:ty, $variant:ident) => {
            let mut narrow: Vec<$float> = values.iter().map(|&x| <$float>::from_f32(x)).collect();
            let narrow_grads: Vec<$float> = grads.iter().map(|&x| <$float>::from_f32(x)).collect();
            let mut wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
            let wide_grads: Vec<f32> = narrow_grads.iter().map(|x| x.to_f32()).collect();
            let mut states = [[vec![0.0f32; 1031], vec![0.0; 1031]], [vec![0.0; 1031], vec![0.0; 1031]]];
            let [first, second] = &mut states;
            let parameters = vec![
                Parameter {
                    rule,
                    scale: 1.0,
                    param: FloatsMut::$variant(&mut narrow),
                    grad: Floats::$variant(&narrow_grads),
                    states: first.iter_mut().map(|state| State::Full(state)).collect(),
                },
                Parameter {
                    rule,
                    scale: 1.0,
                    param: FloatsMut::F32(&mut wide),
                    grad: Floats::F32(&wide_grads),
                    states: second.iter_mut().map(|state| State::Full(state)).collect(),
                },
            ];
            let level = levels().last().expect("scalar is always there");
            optimizer_step_at(level, parameters, &Parallel::new(2)).expect("everything fits");
            assert_eq!(states[0], states[1]);
            assert_eq!(narrow, wide.iter().map(|&x| <$float>::from_f32(x)).collect::<Vec<_>>());
        };
    }
    check!(bf16, Bf16);
    check!(f16, F16);
}

#[test]
fn squared_norm_is_right_and_the_same_for_every_thread_count() {
    let mut random = Random(3);
    let values: Vec<Vec<f32>> = LENGTHS.iter().map(|&len| (0..len).map(|_| random.normal() * 1e20).collect()).collect();
    let grads: Vec<_> = values.iter().map(|values| Floats::F32(values)).collect();
    let norm = |threads| squared_norm(&grads, &Parallel::new(threads)).expect("no errors");
    let plain: f64 = values.iter().flatten().map(|&x| f64::from(x) * f64::from(x)).sum();
    assert!((norm(1) / plain - 1.0).abs() < 1e-12);
    assert_eq!(norm(1).to_bits(), norm(4).to_bits());
}

#[test]
fn what_does_not_fit_is_refused_before_anything_changes() {
    let rule = rules()[0];
    let (mut param, grad, mut state) = (vec![1.0f32; 5], vec![1.0f32; 5], vec![0.0f32; 5]);
    for (grad, states, reason) in [
        (Floats::F32(&grad[..4]), vec![State::Full(&mut state)], "4 in the gradient"),
        (Floats::Bf16(&[bf16::ONE; 5]), vec![], "another type"),
        (Floats::F32(&grad), vec![], "0 states, the rule has 2"),
    ] {
        let parameter = Parameter { rule, scale: 1.0, param: FloatsMut::F32(&mut param), grad, states };
        let error = optimizer_step_at(SimdLevel::Scalar, vec![parameter], &Parallel::new(1)).expect_err("refused");
        assert!(error.to_string().contains(reason), "{error}");
    }
    assert_eq!(param, [1.0; 5]);
    assert!(Rule::new("adamw", &[1.0]).is_err() && Rule::new("adam", &[]).is_err());
}
