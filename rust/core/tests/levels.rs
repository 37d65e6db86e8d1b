//! Every instruction set and thread count gives the scalar code's bits.

mod support;

use proptest::prelude::*;
use qlora_core::{BLOCK_SIZES, FloatType, Layout, Nonfinite, QuantType, Scales};
use support::{FLOAT_TYPES, Random, TRUTH, Way, Weights, bits, dequantize, levels, nasty_weights, quantize, specs};

fn compare(shape: (usize, usize, usize), block_size: usize, seed: u64, threads: usize) {
    let len = shape.0 * shape.1 * shape.2;
    for spec in specs(block_size) {
        let mut random = Random(seed);
        let values = nasty_weights(&mut random, len, &spec, true);
        for float_type in FLOAT_TYPES {
            let weights = Weights::new(&values, float_type);
            let (codes, absmax) = quantize(&weights, shape, &spec, Nonfinite::Propagate, TRUTH).expect("propagates");
            let truth = dequantize(&codes, Scales::Plain(&absmax), shape, &spec, float_type, TRUTH).expect("own codes");
            for level in levels() {
                let way = Way { level, threads };
                let (codes_here, absmax_here) =
                    quantize(&weights, shape, &spec, Nonfinite::Propagate, way).expect("same");
                assert_eq!(codes_here, codes, "{shape:?} {way:?} {:?} {float_type:?}", spec.quant_type());
                assert_eq!(bits(&absmax_here), bits(&absmax), "{shape:?} {way:?} {float_type:?}");
                let out = dequantize(&codes, Scales::Plain(&absmax), shape, &spec, float_type, way).expect("own codes");
                assert!(out.bytes() == truth.bytes(), "{shape:?} {way:?} {:?} {float_type:?}", spec.quant_type());
                let raised = |way| quantize(&weights, shape, &spec, Nonfinite::Raise, way).map(|(codes, _)| codes);
                assert_eq!(raised(way), raised(TRUTH));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn levels_and_threads_agree_bit_for_bit(
        experts in 1usize..3,
        rows in 0usize..5,
        cols in prop_oneof![0usize..5, 31usize..34, 63usize..66, Just(127), Just(128), Just(192), Just(257), 1usize..700],
        block in 0usize..4,
        seed in any::<u64>(),
        threads in prop_oneof![Just(1usize), Just(2), Just(3), Just(7)],
    ) {
        compare((experts, rows, cols), BLOCK_SIZES[block], seed, threads);
    }
}

#[test]
fn the_largest_blocks_and_a_weight_cut_into_many_pieces_agree() {
    compare((1, 3, 4096 + 129), 4096, 1, 3);
    compare((1, 1, 1024 + 512), 512, 2, 2);
    let shape = (1, 1, (1 << 18) + 77);
    let spec = support::spec(QuantType::Nf4, 64);
    let weights = Weights::F32(nasty_weights(&mut Random(3), shape.2, &spec, false));
    let truth = quantize(&weights, shape, &spec, Nonfinite::Raise, TRUTH).expect("finite");
    for level in levels() {
        for threads in [1, 2, 3, 7] {
            let way = Way { level, threads };
            assert_eq!(quantize(&weights, shape, &spec, Nonfinite::Raise, way).expect("finite"), truth);
        }
    }
}

/// All 2^16 inputs of the 16-bit types, so that widening, magnitudes and rounding have no gap.
#[test]
fn every_16_bit_float_agrees_as_element_and_as_scale() {
    let words: Vec<u16> = (0..=u16::MAX).collect();
    let shape = (1, 256, 256);
    let spec = support::spec(QuantType::Nf4, 32);
    for weights in [
        Weights::Bf16(words.iter().map(|word| half::bf16::from_bits(*word)).collect()),
        Weights::F16(words.iter().map(|word| half::f16::from_bits(*word)).collect()),
    ] {
        let truth = quantize(&weights, shape, &spec, Nonfinite::Propagate, TRUTH).expect("propagates");
        // Widened, each is also a scale that stored files may hold, negative ones included.
        let scales = weights.widened();
        let codes: Vec<u8> = (0..32 * words.len() / 2).map(|index| (index * 7 % 256) as u8).collect();
        let wide = (1, words.len(), 32);
        for way in levels().map(|level| Way { level, threads: 2 }) {
            let here = quantize(&weights, shape, &spec, Nonfinite::Propagate, way).expect("propagates");
            assert_eq!((here.0, bits(&here.1)), (truth.0.clone(), bits(&truth.1)), "{way:?}");
            for float_type in FLOAT_TYPES {
                let read = |way| dequantize(&codes, Scales::Plain(&scales), wide, &spec, float_type, way).expect("NF4");
                assert!(read(way).bytes() == read(TRUTH).bytes(), "{way:?} {float_type:?}");
            }
        }
    }
}

/// From 16 MiB on, outputs are written past the caches, where rows are aligned; in rows of odd length they are not.
#[test]
fn large_outputs_agree_aligned_or_not() {
    let spec = support::spec(QuantType::Nf4, 64);
    let mut random = Random(9);
    for (float_type, cols) in [(FloatType::F32, 1 << 21), (FloatType::F32, (1 << 21) + 1), (FloatType::Bf16, 3 << 20)] {
        let shape = (1, 3, cols);
        let layout = Layout::new(1, 3, cols, &spec).expect("small");
        assert!(layout.elements() * float_type.size() >= 16 << 20);
        let codes: Vec<u8> = (0..layout.code_bytes()).map(|_| random.word() as u8).collect();
        let absmax: Vec<f32> = (0..layout.blocks()).map(|_| random.normal().abs()).collect();
        let read = |way| dequantize(&codes, Scales::Plain(&absmax), shape, &spec, float_type, way).expect("NF4");
        let truth = read(TRUTH);
        for way in levels().map(|level| Way { level, threads: 2 }) {
            assert!(read(way).bytes() == truth.bytes(), "{way:?} {float_type:?} {cols}");
        }
    }
}
