//! The numbers that the specification names.

mod support;

use half::{bf16, f16};
use qlora_core::{
    BLOCK_SIZES, Codebook, Control, CoreError, FloatType, Layout, Nonfinite, Parallel, QuantSpec, QuantType, Scales,
    double_quantize,
};
use support::{FLOAT_TYPES, Random, TRUTH, Way, Weights, bits, dequantize, levels, quantize, spec, specs};

const CANONICAL_NAN: u32 = 0x7fc0_0000;

fn way() -> Way {
    Way { level: levels().last().expect("scalar is always there"), threads: 2 }
}

fn nf4() -> QuantSpec {
    spec(QuantType::Nf4, 64)
}

/// Standard normal quantile by bisection of the distribution's power series, good to 1e-12 for the range used.
fn normal_quantile(probability: f64) -> f64 {
    let distribution = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for k in 1..200 {
            term *= x * x / f64::from(2 * k + 1);
            sum += term;
        }
        0.5 + sum * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
    };
    let (mut low, mut high) = (0.0, 4.0);
    for _ in 0..80 {
        let middle = f64::midpoint(low, high);
        if distribution(middle) < probability { low = middle } else { high = middle }
    }
    low
}

#[test]
fn nf4_values_are_normal_quantiles_as_in_the_paper() {
    let offset = 0.967_708_3;
    let quantiles = |count: u32| {
        (0..count).map(move |k| normal_quantile(offset + (0.5 - offset) * f64::from(k) / f64::from(count)))
    };
    let mut derived: Vec<f64> = quantiles(7).map(|q| -q).chain([0.0]).chain(quantiles(8)).collect();
    derived.sort_by(f64::total_cmp);
    let largest = derived[15];
    let book = Codebook::built_in(QuantType::Nf4).expect("built in");
    for (value, quantile) in book.values().iter().zip(derived) {
        assert!((f64::from(*value) - quantile / largest).abs() < 1e-6, "{value} {}", quantile / largest);
    }
}

#[test]
fn worked_example_of_the_seeds() {
    let spec = QuantSpec::new(QuantType::Codebook, 32, false, Some(&[-1.0, 0.3, 0.5, 1.0])).expect("valid");
    let weights = Weights::F32(vec![10.0, -3.0, 5.0, 4.0]);
    let (codes, absmax) = quantize(&weights, (1, 1, 4), &spec, Nonfinite::Raise, way()).expect("finite");
    assert_eq!((codes.as_slice(), absmax.as_slice()), ([0x31, 0x22].as_slice(), [10.0].as_slice()));
    let out = dequantize(&codes, Scales::Plain(&absmax), (1, 1, 4), &spec, FloatType::F32, way()).expect("own codes");
    assert_eq!(out.widened(), [10.0, 3.0, 5.0, 5.0]);
}

#[test]
fn round_trip_error_on_normal_weights_is_the_known_one() {
    // In millionths.
    let known = [
        (QuantType::Nf4, [67_746, 72_798, 76_831, 80_337, 83_547, 86_610, 89_592, 92_547]),
        (QuantType::Fp4, [88_925, 96_543, 102_969, 108_684, 114_115, 119_333, 124_556, 129_536]),
    ];
    let shape = (1, 64, 8192);
    let len = shape.1 * shape.2;
    let mut random = Random(20);
    let weights: Vec<f32> = (0..len).map(|_| random.normal()).collect();
    let source = Weights::F32(weights.clone());
    for (quant_type, means) in known {
        for (block_size, known) in BLOCK_SIZES.into_iter().zip(means) {
            let spec = spec(quant_type, block_size);
            let (codes, absmax) = quantize(&source, shape, &spec, Nonfinite::Raise, way()).expect("finite");
            let out =
                dequantize(&codes, Scales::Plain(&absmax), shape, &spec, FloatType::F32, way()).expect("own codes");
            let errors: Vec<f64> = weights.iter().zip(out.widened()).map(|(a, b)| f64::from((a - b).abs())).collect();
            let mean = errors.iter().sum::<f64>() / len as f64;
            let variance = errors.iter().map(|error| (error - mean).powi(2)).sum::<f64>() / len as f64;
            // Errors of one block hang together through its absmax: that widens the mean's spread for small counts of
            // blocks, so blocks are counted apart.
            let blocks: Vec<f64> = errors.chunks(block_size).map(|b| b.iter().sum::<f64>() / b.len() as f64).collect();
            let between = blocks.iter().map(|b| (b - mean).powi(2)).sum::<f64>() / blocks.len() as f64;
            let known = f64::from(known) * 1e-6;
            let sigma = (variance / len as f64).sqrt().max((between / blocks.len() as f64).sqrt());
            assert!((mean - known).abs() < 7.0 * sigma, "{quant_type:?} {block_size}: {mean} {known} {sigma}");
        }
    }
}

#[test]
fn codes_are_the_nearest_entries() {
    let mut random = Random(4);
    for spec in specs(64) {
        let weights: Vec<f32> = (0..640).map(|_| random.normal()).collect();
        let (codes, absmax) =
            quantize(&Weights::F32(weights.clone()), (1, 1, 640), &spec, Nonfinite::Raise, way()).expect("finite");
        for (index, weight) in weights.iter().enumerate() {
            let code = match spec.codebook().bits() {
                4 if index % 2 == 0 => codes[index / 2] >> 4,
                4 => codes[index / 2] & 15,
                _ => codes[index],
            };
            let x = f64::from(*weight) / f64::from(absmax[index / 64]);
            let distance = |code: u8| (f64::from(spec.codebook().values()[usize::from(code)]) - x).abs();
            let least = (0..spec.codebook().values().len()).map(|code| distance(code as u8)).fold(f64::MAX, f64::min);
            assert!(distance(code) < least + 1e-6, "{:?} {x} {code}", spec.quant_type());
        }
    }
}

#[test]
fn zero_blocks_hold_the_code_of_zero_and_read_as_plus_zero() {
    for spec in specs(32) {
        let zeros: Vec<f32> = (0..33).map(|index| [0.0, -0.0][index % 2]).collect();
        for float_type in FLOAT_TYPES {
            let weights = Weights::new(&zeros, float_type);
            let (codes, absmax) = quantize(&weights, (1, 1, 33), &spec, Nonfinite::Raise, way()).expect("finite");
            let zero = spec.codebook().zero_code();
            let byte = if spec.codebook().bits() == 4 { zero << 4 | zero } else { zero };
            assert!(codes.iter().all(|code| *code == byte));
            assert_eq!(bits(&absmax), [0, 0]);
            for absmax in [[0.0, 0.0], [-0.0, -0.0]] {
                let scales = Scales::Plain(&absmax);
                let out = dequantize(&codes, scales, (1, 1, 33), &spec, float_type, way()).expect("own codes");
                assert!(out.bytes().iter().all(|byte| *byte == 0), "{:?}", spec.quant_type());
            }
        }
    }
}

#[test]
fn odd_rows_are_padded_with_the_code_of_zero() {
    for (quant_type, zero) in [(QuantType::Nf4, 7), (QuantType::Fp4, 0), (QuantType::Int4, 7)] {
        let (codes, _) =
            quantize(&Weights::F32(vec![1.0; 2 * 65]), (1, 2, 65), &spec(quant_type, 64), Nonfinite::Raise, way())
                .expect("finite");
        assert_eq!(codes.len(), 66);
        assert_eq!((codes[32] & 15, codes[65] & 15), (zero, zero));
    }
}

#[test]
fn subnormal_blocks_keep_their_codes() {
    // The same weights at two magnitudes 2^-100 apart, the lower one subnormal but exact.
    let weights: Vec<f32> = (-31..=32).map(|index| index as f32 * 2f32.powi(-30)).collect();
    let tiny: Vec<f32> = weights.iter().map(|weight| weight * 2f32.powi(-115)).collect();
    assert!(tiny.iter().all(|weight| weight.abs() < f32::MIN_POSITIVE));
    for spec in specs(64) {
        let codes_of = |weights: &[f32]| {
            quantize(&Weights::F32(weights.to_vec()), (1, 1, 64), &spec, Nonfinite::Raise, way()).expect("finite").0
        };
        assert_eq!(codes_of(&weights), codes_of(&tiny), "{:?}", spec.quant_type());
    }
}

#[test]
fn nonfinite_weights_are_counted_or_spoil_their_block_only() {
    for spec in specs(32) {
        for float_type in FLOAT_TYPES {
            let mut values = vec![0.5f32; 3 * 32 + 5];
            (values[40], values[41], values[100]) = (f32::NEG_INFINITY, -f32::NAN, f32::INFINITY);
            let weights = Weights::new(&values, float_type);
            let shape = (1, 1, values.len());
            let error = quantize(&weights, shape, &spec, Nonfinite::Raise, way()).expect_err("not finite");
            assert_eq!(error, CoreError::NonFinite { count: 3, first: 40 });
            let (codes, absmax) = quantize(&weights, shape, &spec, Nonfinite::Propagate, way()).expect("propagates");
            assert_eq!(bits(&absmax), [0x3f00_0000, CANONICAL_NAN, 0x3f00_0000, 0x7f80_0000]);
            let zero = spec.codebook().zero_code();
            let (first, byte) = if spec.codebook().bits() == 4 { (16, zero << 4 | zero) } else { (32, zero) };
            assert!(codes[first..2 * first].iter().chain(&codes[3 * first..]).all(|code| *code == byte));
            let out = dequantize(&codes, Scales::Plain(&absmax), shape, &spec, float_type, way()).expect("own codes");
            let nan = match float_type {
                FloatType::F32 => Weights::F32(vec![f32::from_bits(CANONICAL_NAN)]),
                FloatType::Bf16 => Weights::Bf16(vec![bf16::from_bits(0x7fc0)]),
                FloatType::F16 => Weights::F16(vec![f16::from_bits(0x7e00)]),
            };
            for (index, element) in out.bytes().chunks(float_type.size()).enumerate() {
                assert_eq!(element == nan.bytes(), (32..64).contains(&index) || index >= 96, "{index} {float_type:?}");
            }
        }
    }
}

#[test]
fn rounding_to_16_bits_is_ieee_and_overflow_is_infinity() {
    let spec = spec(QuantType::Nf4, 32);
    let codes = [0xff; 16];
    // 1.0 times a scale on a tie goes to the even word; subnormal results of f16 and bf16 stay.
    for (scale, brain, half) in [
        (f32::from_bits(0x3f80_8000), 0x3f80u16, 0x3c04u16),
        (f32::from_bits(0x3f81_8000), 0x3f82, 0x3c0c),
        (65_520.0, 0x4780, 0x7c00),
        (f32::MAX, 0x7f80, 0x7c00),
        (6.0e-8, 0x3381, 0x0001),
        (f32::from_bits(0x0001_8000), 0x0002, 0x0000),
    ] {
        for way in levels().map(|level| Way { level, threads: 1 }) {
            let read = |float_type| {
                dequantize(&codes, Scales::Plain(&[scale]), (1, 1, 32), &spec, float_type, way).expect("NF4").bytes()
                    [..2]
                    .try_into()
                    .map(u16::from_le_bytes)
                    .expect("two bytes")
            };
            assert_eq!((read(FloatType::Bf16), read(FloatType::F16)), (brain, half), "{scale:e} {way:?}");
        }
    }
}

#[test]
fn slices_of_rows_give_the_bytes_of_the_whole() {
    let mut random = Random(5);
    for cols in [129, 192] {
        let values: Vec<f32> = (0..7 * cols).map(|_| random.normal()).collect();
        for spec in specs(64) {
            let whole =
                quantize(&Weights::F32(values.clone()), (1, 7, cols), &spec, Nonfinite::Raise, way()).expect("finite");
            let (mut codes, mut absmax) = (Vec::new(), Vec::new());
            for rows in [&values[..2 * cols], &values[2 * cols..3 * cols], &values[3 * cols..]] {
                let shape = (1, rows.len() / cols, cols);
                let slice =
                    quantize(&Weights::F32(rows.to_vec()), shape, &spec, Nonfinite::Raise, way()).expect("finite");
                codes.extend(slice.0);
                absmax.extend(slice.1);
            }
            assert_eq!((codes, absmax), whole);
        }
    }
}

#[test]
fn experts_are_quantized_as_if_alone() {
    let mut random = Random(6);
    let spec = nf4();
    let (experts, rows, cols) = (3, 5, 64 * 61);
    let layout = Layout::new(experts, rows, cols, &spec).expect("small");
    let values: Vec<f32> = (0..layout.elements()).map(|_| random.normal()).collect();
    let shape = (experts, rows, cols);
    let (codes, absmax) = quantize(&Weights::F32(values), shape, &spec, Nonfinite::Raise, way()).expect("finite");
    let (blocks, groups) = (layout.blocks_per_expert(), layout.groups_per_expert());
    assert_eq!((blocks, groups), (305, 2));
    let (mut nested, mut scale, mut offset) = (vec![0; 3 * blocks], vec![0.0; 3 * groups], vec![0.0; 3]);
    let (parallel, control) = (Parallel::new(2), Control::default());
    double_quantize(&absmax, blocks, &mut nested, &mut scale, &mut offset, &parallel, &control).expect("fits");
    let scales = Scales::Nested { codes: &nested, scale: &scale, offset: &offset };
    let all = dequantize(&codes, scales, shape, &spec, FloatType::Bf16, way()).expect("own codes");
    let mut apart = Vec::new();
    for expert in 0..experts {
        let absmax = &absmax[expert * blocks..(expert + 1) * blocks];
        let (mut nested, mut scale, mut offset) = (vec![0; blocks], vec![0.0; groups], [0.0]);
        double_quantize(absmax, blocks, &mut nested, &mut scale, &mut offset, &parallel, &control).expect("fits");
        let scales = Scales::Nested { codes: &nested, scale: &scale, offset: &offset };
        let codes = &codes[expert * codes.len() / 3..(expert + 1) * codes.len() / 3];
        let one = dequantize(codes, scales, (1, rows, cols), &spec, FloatType::Bf16, way()).expect("own codes");
        apart.extend_from_slice(one.bytes());
    }
    assert!(all.bytes() == apart);
}

#[test]
fn empty_weights_have_no_bytes_and_no_errors() {
    for shape in [(1, 0, 64), (1, 3, 0), (0, 3, 64), (2, 0, 0)] {
        for spec in specs(64) {
            let (codes, absmax) =
                quantize(&Weights::F32(vec![]), shape, &spec, Nonfinite::Raise, way()).expect("nothing to do");
            assert!(codes.is_empty() && absmax.is_empty());
            let out = dequantize(&codes, Scales::Plain(&absmax), shape, &spec, FloatType::F16, way());
            assert!(out.expect("nothing to do").bytes().is_empty());
            let layout = Layout::new(shape.0, shape.1, shape.2, &spec).expect("small");
            let mut offset = vec![1.0; shape.0];
            let (parallel, control) = (Parallel::new(1), Control::default());
            double_quantize(&[], layout.blocks_per_expert(), &mut [], &mut [], &mut offset, &parallel, &control)
                .expect("nothing to do");
            let scales = Scales::Nested { codes: &[], scale: &[], offset: &offset };
            dequantize(&[], scales, shape, &spec, FloatType::F32, way()).expect("nothing to do");
        }
    }
}

#[test]
fn codes_beyond_the_table_are_an_error_that_says_where() {
    let int4 = spec(QuantType::Int4, 32);
    let mut codes = vec![0x77u8; 2 * 17];
    codes[17 + 16] = 0x7f; // the padding of the second row, behind its last element
    let read = |codes: &[u8], spec: &QuantSpec, shape| {
        dequantize(codes, Scales::Plain(&vec![1.0; shape]), (1, 2, 33), spec, FloatType::F32, way()).map(|_| ())
    };
    assert_eq!(read(&codes, &int4, 4), Err(CoreError::Code { code: 15, first: 65, entries: 15 }));
    codes[3] = 0xf7;
    assert_eq!(read(&codes, &int4, 4), Err(CoreError::Code { code: 15, first: 6, entries: 15 }));
    let mut codes = vec![254u8; 66];
    assert_eq!(read(&codes, &spec(QuantType::Int8, 32), 4), Ok(()));
    codes[65] = 255;
    assert_eq!(
        read(&codes, &spec(QuantType::Int8, 32), 4),
        Err(CoreError::Code { code: 255, first: 65, entries: 255 })
    );
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let spec = nf4();
    let layout = Layout::new(1, 2, 64, &spec).expect("small");
    let (parallel, control) = (Parallel::new(1), Control::default());
    let weights = [0.0f32; 127];
    let outcome = qlora_core::quantize(
        qlora_core::Floats::F32(&weights),
        &layout,
        &spec,
        Nonfinite::Raise,
        &mut [0; 64],
        &mut [0.0; 2],
        &parallel,
        &control,
    );
    assert!(matches!(outcome, Err(CoreError::Shape(_))), "{outcome:?}");
    let outcome = dequantize(&[0; 64], Scales::Plain(&[0.0; 3]), (1, 2, 64), &spec, FloatType::F32, TRUTH);
    assert!(matches!(outcome, Err(CoreError::Shape(_))));
    assert!(matches!(Layout::new(1 << 30, 1 << 30, 1 << 30, &spec), Err(CoreError::Shape(_))));
}
