//! Which kernel multiplies how many tokens with a packed weight, and on which grid: a pure function of shape and device.
//!
//! The rules were set by measurements on an H100 (132 SMs, 3.0 TB/s of copy), doubly quantized NF4, bf16, graph replay with
//! dependent launch, weights rotated past the L2; microseconds stand beside the rule that they set.
//! A figure of the choice that was not taken may be that of its kernel before its last change.

/// What decides: the shape of `y[M, N] = x[M, K] W[N, K]^T` and whether it has a low-rank term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Tokens, `M`.
    pub tokens: u32,
    /// Output features, `N`.
    pub rows: u64,
    /// Input features, `K`.
    pub columns: u64,
    /// Elements of a block of the weight, a power of two.
    pub block_size: u32,
    /// Whether a low-rank term is added.
    pub lora: bool,
}

/// What the device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Compute capability times ten: 90 for Hopper.
    pub sm: u32,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Most dynamic shared memory that one block may ask for, in bytes.
    pub shared_bytes: u32,
}

/// A launch: `entry` is the kernel's name but for the type (`bf16` or `f16`), which stands between `file` and it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Stem of the kernel file, without the type: `linear_4bit`.
    pub file: &'static str,
    /// What follows the type in the kernel's name: `t4_n1_w8_c4`.
    pub entry: &'static str,
    /// The grid: of `linear_4bit`, CTAs that share the rows, and the tokens; where `grid.2 > 1` it is also the cluster's
    /// extent in z.
    pub grid: (u32, u32, u32),
    /// Threads of a CTA.
    pub threads: u32,
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
}

/// Most tokens that are worth a fused product; above, dequantizing for cuBLAS is at least as fast.
pub const MOST_TOKENS: u32 = 256;

/// Tiles of 128 rows are the grid's second dimension, which ends at 65,535.
const MOST_ROWS: u64 = 65_535 * 128;

/// Up to so many tokens, small weights too are worth a fused product.
const FEW_TOKENS: u32 = 32;
const SMALL_WEIGHT: u64 = 8 << 20;

/// Pair table and dynamic map, which every kernel here keeps in shared memory.
const TABLES: u32 = 32 * 1024 + 1024;

/// Whether the kernels take this shape; the caller dequantizes otherwise. Addresses: codes, x and y lie at multiples of 16
/// bytes, xa and B at multiples of 4.
#[must_use]
pub fn supported(product: &Product, target: &Target) -> bool {
    let Product { tokens, rows, columns, block_size, .. } = *product;
    (1..=MOST_TOKENS).contains(&tokens)
        && target.sm >= 80
        && (1..=MOST_ROWS).contains(&rows)
        && (64..1 << 28).contains(&columns)
        && columns.is_multiple_of(64)
        && block_size.is_power_of_two()
        && (64..=4096).contains(&block_size)
        && rows.next_multiple_of(16) * columns.div_ceil(u64::from(block_size)) < 1 << 31
}

/// Whether the product of a supported shape is faster fused than dequantized and given to cuBLAS.
#[must_use]
pub fn worthwhile(product: &Product) -> bool {
    // 1024 x 4096, 256 tokens: 22.6, dequantized 16.2; 64 tokens: 14.2 and 13.4. 4096 x 4096, 256: 33.6 and 35.5.
    product.tokens <= FEW_TOKENS || product.rows * product.columns > SMALL_WEIGHT
}

/// The launch for a supported product.
#[must_use]
pub fn plan(product: &Product, target: &Target) -> Plan {
    match product.tokens {
        0..=8 => one_token_tile(product, target),
        9..=16 => resident(product, target).unwrap_or_else(|| two_token_tiles(product, target)),
        17..=32 => resident(product, target).unwrap_or_else(|| four_token_tiles(product, target)),
        _ if target.sm == 90 => tiled(
            match product.tokens {
                0..=64 => &WGMMA_64,
                65..=128 => &WGMMA_128,
                _ => &WGMMA_256,
            },
            product,
            target,
        ),
        33..=64 => tiled(&MMA_64, product, target),
        _ => tiled(&MMA_128, product, target),
    }
}

/// A configuration of `linear_4bit`: see `SmallShape` in `kernels/include/linear_4bit.cuh`. Those of chunks of two blocks and
/// up to two token tiles let CTAs share the tokens.
struct Small {
    file: &'static str,
    entry: &'static str,
    row_tiles: u32,
    token_tiles: u32,
    warps: u32,
    blocks: u32,
}

const MANY_ROWS: Small =
    Small { file: "linear_4bit", entry: "t7_n1_w8_c4", row_tiles: 7, token_tiles: 1, warps: 8, blocks: 4 };
const SOME_ROWS: Small =
    Small { file: "linear_4bit", entry: "t4_n1_w8_c4", row_tiles: 4, token_tiles: 1, warps: 8, blocks: 4 };
const FEW_ROWS: Small =
    Small { file: "linear_4bit", entry: "t2_n1_w16_c2", row_tiles: 2, token_tiles: 1, warps: 16, blocks: 2 };
const SIXTEEN_TOKENS: Small =
    Small { file: "linear_4bit", entry: "t4_n2_w8_c2", row_tiles: 4, token_tiles: 2, warps: 8, blocks: 2 };
const SIXTEEN_TOKENS_MANY_ROWS: Small =
    Small { file: "linear_4bit", entry: "t7_n2_w8_c4", row_tiles: 7, token_tiles: 2, warps: 8, blocks: 4 };
const THIRTY_TWO_TOKENS: Small =
    Small { file: "linear_4bit_wide", entry: "t7_n4_w8_c2", row_tiles: 7, token_tiles: 4, warps: 8, blocks: 2 };

impl Small {
    fn on(&self, ctas: u32, product: &Product, target: &Target) -> Plan {
        // Below 9.0 the kernels keep 16 tokens in registers.
        let stages_tokens = self.token_tiles > if target.sm >= 90 { 1 } else { 2 };
        let staged_tokens = if stages_tokens { self.warps * self.token_tiles * 8 * 128 * self.blocks } else { 0 };
        let rings = self.warps * 3 * 16 * 36 * self.blocks + staged_tokens;
        let slice = self.token_tiles * 8 * (16 * self.row_tiles + 4) * 4;
        Plan {
            file: self.file,
            entry: self.entry,
            grid: (ctas, product.tokens.div_ceil(8 * self.token_tiles), 1),
            threads: 32 * self.warps,
            shared_bytes: TABLES + rings.max(self.warps * slice) + if product.lora { slice } else { 0 },
        }
    }
}

/// Tiles of 16 rows. `supported` bounds the rows by 2^31.
fn row_tiles(product: &Product) -> u32 {
    u32::try_from(product.rows.div_ceil(16)).unwrap_or(u32::MAX)
}

fn one_token_tile(product: &Product, target: &Target) -> Plan {
    let tiles = row_tiles(product);
    if tiles <= target.sms {
        return FEW_ROWS.on(tiles, product, target); // 1024 x 4096: 2.7, SOME_ROWS 3.0
    }
    if tiles <= 2 * target.sms {
        return match (product.columns > 8192, product.tokens > 4) {
            (false, _) => SOME_ROWS.on(target.sms, product, target), // 4096 x 4096: 5.6, a tile a CTA 5.9
            (true, false) => SOME_ROWS.on(tiles, product, target),   // 4096 x 14336: 14.0, FEW_ROWS 15.9
            (true, true) => FEW_ROWS.on(target.sms, product, target), // 4096 x 14336: 15.9, SOME_ROWS 18.8
        };
    }
    if tiles <= SOME_ROWS.row_tiles * 2 * target.sms {
        return SOME_ROWS.on(2 * target.sms, product, target); // 14336 x 4096: 12.5, MANY_ROWS 13.5
    }
    MANY_ROWS.on(tiles.div_ceil(MANY_ROWS.row_tiles), product, target) // 28672 x 8192: 44.2, SOME_ROWS 51
}

fn two_token_tiles(product: &Product, target: &Target) -> Plan {
    let tiles = row_tiles(product);
    if tiles * product.tokens.div_ceil(8) <= target.sms {
        // Eight tokens a CTA. 512 x 2048: 2.5, MANY_ROWS 3.2; 1024 x 8192: 7.5 and 8.1; 1024 x 4096: 5.0 and 5.0
        return FEW_ROWS.on(tiles, product, target);
    }
    // 4096 x 4096: 7.7, MANY_ROWS 8.6
    if (target.sms + 1..=2 * target.sms).contains(&tiles) && product.columns <= 8192 {
        return SIXTEEN_TOKENS.on(target.sms, product, target);
    }
    // Whole waves of one CTA an SM. 14336 x 4096: 15.7, SIXTEEN_TOKENS 18.3; 4096 x 14336: 18.5 and 25.6;
    // 28672 x 8192: 59.4 and 70.8
    let waves = tiles.div_ceil(SIXTEEN_TOKENS_MANY_ROWS.row_tiles).next_multiple_of(target.sms).min(tiles);
    let plan = SIXTEEN_TOKENS_MANY_ROWS.on(waves, product, target);
    // 128256 x 4096: 141, MANY_ROWS 150
    if waves <= 4 * target.sms && plan.shared_bytes <= target.shared_bytes {
        return plan;
    }
    let ctas = tiles.div_ceil(SIXTEEN_TOKENS.row_tiles);
    SIXTEEN_TOKENS.on(
        if ctas <= 2 * target.sms { ctas } else { ctas.next_multiple_of(2 * target.sms) },
        product,
        target,
    )
}

fn four_token_tiles(product: &Product, target: &Target) -> Plan {
    let tiles = row_tiles(product);
    if tiles * product.tokens.div_ceil(8) <= target.sms {
        return FEW_ROWS.on(tiles, product, target); // eight tokens a CTA
    }
    if tiles <= target.sms || tiles <= 2 * target.sms && product.columns <= 8192 {
        // Sixteen tokens a CTA. 1024 x 4096: 7.1, THIRTY_TWO_TOKENS 8.5; 2048 x 4096: 8.0 and 9.2; 1024 x 8192: 12.2 and 14.2;
        // 4096 x 2048: 6.9 and 7.5; 4096 x 4096: 11.3 and 11.4
        return SIXTEEN_TOKENS.on(tiles.min(target.sms), product, target);
    }
    // Whole waves of one CTA an SM. 14336 x 4096: 22.2, MMA_64 about 31; 28672 x 8192: 83.5, about 119
    let ctas = tiles.div_ceil(THIRTY_TWO_TOKENS.row_tiles).next_multiple_of(target.sms).min(tiles);
    let plan = THIRTY_TWO_TOKENS.on(ctas, product, target);
    if plan.shared_bytes <= target.shared_bytes { plan } else { tiled(&MMA_64, product, target) }
}

/// From so many rows on, loading all tokens into shared memory once costs less than loading them again for every few rows.
/// 128256 x 4096, 16 tokens: 120, `SIXTEEN_TOKENS` 142; 28672 x 8192: 67 and 59. 32 tokens, 28672 x 4096: 39,
/// `THIRTY_TWO_TOKENS` 46; 22016 x 4096: 40.3 and 41.6, both before their last change, so that the border is good to some
/// thousands of rows; 14336 x 4096: 25.2 and 22.2.
const RESIDENT_ROWS_16: u64 = 65_536;
const RESIDENT_ROWS_32: u64 = 22_016;

/// `linear_4bit_sm90`: see `ResidentShape` there. Two CTAs share K where one has no room for its columns of all tokens.
fn resident(product: &Product, target: &Target) -> Option<Plan> {
    let (entry, tokens, least_rows) =
        if product.tokens <= 16 { ("n16_s3", 16, RESIDENT_ROWS_16) } else { ("n32_s3", 32, RESIDENT_ROWS_32) };
    if target.sm != 90 || product.rows < least_rows || !product.columns.is_multiple_of(2 * 64) {
        return None;
    }
    let warps = 16;
    let stage = 1024 + if tokens > 16 { 0 } else { 128 };
    let chunks = u32::try_from(product.columns / 128).ok()?;
    let shared_bytes = |ranks: u32| {
        let exchange = if ranks > 1 { warps * (tokens * 32 + 16) } else { 0 };
        let columns = chunks.div_ceil(ranks).saturating_mul(2 * 128 * tokens);
        columns.saturating_add(TABLES + warps * 3 * stage + exchange)
    };
    let ranks = [1, 2].into_iter().find(|&ranks| shared_bytes(ranks) <= target.shared_bytes)?;
    Some(Plan {
        file: "linear_4bit_sm90",
        entry,
        grid: (target.sms / ranks, 1, ranks),
        threads: 32 * warps,
        shared_bytes: shared_bytes(ranks),
    })
}

/// A configuration of `gemm_4bit` or `gemm_4bit_sm90`: 128 rows by `tokens`.
struct Tiled {
    file: &'static str,
    entry: &'static str,
    tokens: u32,
    stages: u32,
    ctas_an_sm: u32,
}

const MMA_64: Tiled = Tiled { file: "gemm_4bit", entry: "w8_r1_n8_s4", tokens: 64, stages: 4, ctas_an_sm: 2 };
const MMA_128: Tiled = Tiled { file: "gemm_4bit", entry: "w4_r2_n8_s3", tokens: 128, stages: 3, ctas_an_sm: 1 };
const WGMMA_64: Tiled = Tiled { file: "gemm_4bit_sm90", entry: "n64_s4", tokens: 64, stages: 4, ctas_an_sm: 2 };
const WGMMA_128: Tiled = Tiled { file: "gemm_4bit_sm90", entry: "n128_s6", tokens: 128, stages: 6, ctas_an_sm: 1 };
const WGMMA_256: Tiled = Tiled { file: "gemm_4bit_sm90", entry: "n256_s4", tokens: 256, stages: 4, ctas_an_sm: 1 };

fn tiled(shape: &Tiled, product: &Product, target: &Target) -> Plan {
    const ROWS: u32 = 128;
    let tiles = u32::try_from(product.rows.div_ceil(u64::from(ROWS))).unwrap_or(u32::MAX);
    let token_tiles = product.tokens.div_ceil(shape.tokens);
    let stages = shape.stages * (shape.tokens * 128 + ROWS * 36);
    let sums = shape.tokens * (ROWS + 4) * 4;
    Plan {
        file: shape.file,
        entry: shape.entry,
        grid: (token_tiles, tiles, splits(tiles * token_tiles, shape, product, target)),
        threads: 256,
        shared_bytes: TABLES + stages.max(sums),
    }
}

/// How many CTAs of a cluster share K: as many as leave a tenth of the places free, because clusters do not pack into every
/// processing cluster of the chip. 4096 x 14336, 128 tokens: 3 splits 58, 4 splits (128 of 132 places) 90, 2 splits 79.
fn splits(ctas: u32, shape: &Tiled, product: &Product, target: &Target) -> u32 {
    if target.sm < 90 {
        return 1; // no clusters
    }
    let places = target.sms * shape.ctas_an_sm * 9 / 10;
    let fits = |&splits: &u32| u64::from(ctas) * u64::from(splits) <= u64::from(places);
    let worth = |&splits: &u32| product.columns / 64 / u64::from(splits) >= 4; // stages a CTA
    [8, 6, 4, 3, 2].into_iter().find(|splits| fits(splits) && worth(splits)).unwrap_or(1)
}

/// A configuration of `linear_backward_4bit` or `linear_backward_4bit_sm90`: a tile of `columns` by `tokens`.
struct Backward {
    file: &'static str,
    entry: &'static str,
    columns: u32,
    tokens: u32,
    threads: u32,
    /// Teams of warps that split a CTA's rows, each with a ring of its own.
    teams: u32,
    stages: u32,
    ctas_an_sm: u32,
}

const fn by_mma(entry: &'static str, columns: u32, tokens: u32, stages: u32, threads: u32) -> Backward {
    let (file, teams, ctas_an_sm) = ("linear_backward_4bit", threads / columns, 512 / threads);
    Backward { file, entry, columns, tokens, threads, teams, stages, ctas_an_sm }
}

const fn by_wgmma(entry: &'static str, columns: u32, tokens: u32, stages: u32) -> Backward {
    let file = "linear_backward_4bit_sm90";
    Backward { file, entry, columns, tokens, threads: 256, teams: 1, stages, ctas_an_sm: 1 }
}

const BACKWARD_8: Backward = by_mma("c2_w2_n1_s4_t512", 64, 8, 4, 512);
const BACKWARD_8_PAIR: Backward = by_mma("c2_w2_n1_s4_t256", 64, 8, 4, 256);
const BACKWARD_16: Backward = by_mma("c2_w2_n2_s4_t512", 64, 16, 4, 512);
const BACKWARD_16_PAIR: Backward = by_mma("c2_w2_n2_s3_t256", 64, 16, 3, 256);
const BACKWARD_32: Backward = by_mma("c2_w2_n4_s3_t512", 64, 32, 3, 512);
const BACKWARD_32_WIDE: Backward = by_mma("c2_w4_n4_s4_t512", 128, 32, 4, 512);
const BACKWARD_64: Backward = by_wgmma("n64_t2_s6", 256, 64, 6);
const BACKWARD_128: Backward = by_wgmma("n128_t1_s6", 128, 128, 6);
const BACKWARD_256: Backward = by_wgmma("n256_t1_s4", 128, 256, 4);

impl Backward {
    /// As `BackwardShape` and `BackwardWarpgroupShape` in `kernels/include` have it.
    fn shared_bytes(&self) -> u32 {
        let scales = if self.file == "linear_backward_4bit" { self.columns / 64 * 320 } else { self.columns * 4 };
        let stages = self.stages * (self.tokens * 128 + 32 * self.columns + scales);
        TABLES + self.teams * stages.max(self.tokens * (self.columns + 4) * 4)
    }

    fn on(&self, product: &Product, target: &Target) -> Plan {
        let token_tiles = product.tokens.div_ceil(self.tokens);
        let column_tiles = u32::try_from(product.columns.div_ceil(u64::from(self.columns))).unwrap_or(u32::MAX);
        let ctas = u64::from(token_tiles) * u64::from(column_tiles);
        Plan {
            file: self.file,
            entry: self.entry,
            grid: (token_tiles, column_tiles, self.splits(ctas, product, target)),
            threads: self.threads,
            shared_bytes: self.shared_bytes(),
        }
    }

    /// How many CTAs of a cluster share the rows. Pairs fill the chip; larger clusters do not pack into every processing
    /// cluster, and those left over wait for a second round. 14336 x 4096, 32 column tiles, 128 tokens: 3 splits 63.7,
    /// 4 splits (128 of 132 places) 99.4; 16 column tiles, 64 tokens: 6 splits 48.2, 7 splits (112 places) 88.
    fn splits(&self, ctas: u64, product: &Product, target: &Target) -> u32 {
        if target.sm < 90 {
            return 1; // no clusters
        }
        let places = u64::from(target.sms * self.ctas_an_sm);
        let fits = |splits: u32| ctas * u64::from(splits) <= if splits > 2 { places * 3 / 4 } else { places };
        let worth = |splits: u32| product.rows / 64 >= u64::from(splits * self.teams); // a stage for each team
        [6, 4, 3, 2].into_iter().find(|&splits| fits(splits) && worth(splits)).unwrap_or(1)
    }

    /// Thousandths of the chip's places that are taken over all rounds.
    fn taken(&self, product: &Product, target: &Target) -> u64 {
        let (x, y, z) = self.on(product, target).grid;
        let (ctas, places) = (u64::from(x) * u64::from(y) * u64::from(z), u64::from(target.sms * self.ctas_an_sm));
        (ctas * 1000).checked_div(ctas.div_ceil(places) * places).unwrap_or(0)
    }

    /// This, or another where this leaves clearly more of the chip idle.
    fn or_fuller<'a>(&'a self, other: &'a Self, product: &Product, target: &Target) -> &'a Self {
        if other.taken(product, target) * 10 > self.taken(product, target) * 11 { other } else { self }
    }
}

/// Up to so many tokens `linear_backward_4bit` is the kernel, for all devices and any number of rows.
const FEW_BACKWARD_TOKENS: u32 = 32;
/// What wgmma needs to gain on dequantizing: enough tiles of columns to fill the chip, enough work to make up for its start.
const LEAST_BACKWARD_COLUMNS: u64 = 2048;
const LEAST_BACKWARD_WEIGHT: u64 = 16 << 20;
/// And for more tokens than `MANY_BACKWARD_TOKENS`, which it takes as 256.
const MANY_BACKWARD_TOKENS: u32 = 128;
const MANY_BACKWARD_COLUMNS: u64 = 8192;

/// Tiles of 64 columns are the grid's second dimension.
const MOST_BACKWARD_COLUMNS: u64 = 65_535 * 64;

/// Whether the kernels of dx = dy W take this shape, as `supported`; addresses: codes, dy and dx lie at multiples of 16 bytes.
#[must_use]
pub fn backward_supported(product: &Product, target: &Target) -> bool {
    supported(product, target) && product.columns <= MOST_BACKWARD_COLUMNS
}

/// Whether the gradient of x, dx = dy W, of a supported shape is made faster fused than by dequantizing and cuBLAS: on an H200
/// too, whose faster memory favours the latter.
#[must_use]
pub fn backward_worthwhile(product: &Product, target: &Target) -> bool {
    let elements = product.rows * product.columns;
    if product.tokens <= FEW_BACKWARD_TOKENS {
        // 1024 x 4096, 32 tokens: 8.4, dequantized 10.2; 2048 x 2048: 8.8 and 11.6; 4096 x 1024: 16.5 and 12.0.
        return elements > SMALL_WEIGHT || product.rows <= 2 * product.columns;
    }
    // On an H200: 4096 x 4096, 64 tokens: 22.5, dequantized 23.9; 14336 x 4096: 49.2 and 84.4, so that lines through these meet
    // near 15 M weights. 4096 x 4096, 256 tokens: 31.7 and 29.7; 14336 x 4096: 89.8 and 96.9, but 129 tokens take as long;
    // 4096 x 14336: 75.5 and 94.1, 128 tokens dequantized 85.8.
    let least_columns =
        if product.tokens <= MANY_BACKWARD_TOKENS { LEAST_BACKWARD_COLUMNS } else { MANY_BACKWARD_COLUMNS };
    elements >= LEAST_BACKWARD_WEIGHT && product.columns >= least_columns && takes_wgmma(product, target)
}

/// wgmma reads tokens in pieces of 16 bytes.
fn takes_wgmma(product: &Product, target: &Target) -> bool {
    target.sm == 90 && product.rows.is_multiple_of(8)
}

/// The launch for the gradient of x of a supported product.
#[must_use]
pub fn backward_plan(product: &Product, target: &Target) -> Plan {
    let room = |shape: &Backward| shape.shared_bytes() <= target.shared_bytes;
    let shape = match product.tokens {
        33..=64 if takes_wgmma(product, target) => &BACKWARD_64,
        65..=128 if takes_wgmma(product, target) => &BACKWARD_128,
        // 14336 x 4096: 89.7 and 89.8; 4096 x 4096: 34.2, BACKWARD_128 31.0; 4096 x 14336: 73 and 104
        129.. if takes_wgmma(product, target) => BACKWARD_256.or_fuller(&BACKWARD_128, product, target),
        // 8 tokens, 14336 x 4096: 30.4, BACKWARD_8 25.2; 4096 x 14336: 26.3 and 32.1; 28672 x 8192: 88.2 and 89.7
        0..=8 if room(&BACKWARD_8) => BACKWARD_8_PAIR.or_fuller(&BACKWARD_8, product, target),
        0..=8 => &BACKWARD_8_PAIR,
        9..=16 if room(&BACKWARD_16) => BACKWARD_16_PAIR.or_fuller(&BACKWARD_16, product, target),
        // 14336 x 4096: 37.4, BACKWARD_32 31.4; 4096 x 14336: 31.5 and 39.6; 28672 x 8192: 103 and 110
        17.. if room(&BACKWARD_32) => BACKWARD_32_WIDE.or_fuller(&BACKWARD_32, product, target),
        _ => &BACKWARD_16_PAIR,
    };
    shape.on(product, target)
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Target = Target { sm: 90, sms: 132, shared_bytes: 227 * 1024 };
    const AMPERE: Target = Target { sm: 86, sms: 84, shared_bytes: 99 * 1024 };

    fn product(tokens: u32, rows: u64, columns: u64) -> Product {
        Product { tokens, rows, columns, block_size: 64, lora: true }
    }

    fn launch(tokens: u32, rows: u64, columns: u64) -> (&'static str, (u32, u32, u32)) {
        let plan = plan(&product(tokens, rows, columns), &H100);
        (plan.entry, plan.grid)
    }

    #[test]
    fn measured_shapes_get_what_was_fastest() {
        assert_eq!(launch(1, 1024, 4096), ("t2_n1_w16_c2", (64, 1, 1)));
        assert_eq!(launch(1, 4096, 4096), ("t4_n1_w8_c4", (132, 1, 1)));
        assert_eq!(launch(4, 4096, 14336), ("t4_n1_w8_c4", (256, 1, 1)));
        assert_eq!(launch(8, 4096, 14336), ("t2_n1_w16_c2", (132, 1, 1)));
        assert_eq!(launch(1, 14336, 4096), ("t4_n1_w8_c4", (264, 1, 1)));
        assert_eq!(launch(1, 28672, 8192), ("t7_n1_w8_c4", (256, 1, 1)));
        assert_eq!(launch(16, 512, 2048), ("t2_n1_w16_c2", (32, 2, 1)));
        assert_eq!(launch(32, 1024, 4096), ("t4_n2_w8_c2", (64, 2, 1)));
        assert_eq!(launch(32, 4096, 4096), ("t4_n2_w8_c2", (132, 2, 1)));
        assert_eq!(launch(16, 4096, 4096), ("t4_n2_w8_c2", (132, 1, 1)));
        assert_eq!(launch(16, 14336, 4096), ("t7_n2_w8_c4", (132, 1, 1)));
        assert_eq!(launch(32, 14336, 4096), ("t7_n4_w8_c2", (132, 1, 1)));
        assert_eq!(launch(32, 28672, 8192), ("t7_n4_w8_c2", (264, 1, 1)));
        assert_eq!(launch(16, 128_256, 4096), ("n16_s3", (132, 1, 1)));
        assert_eq!(launch(32, 128_256, 4096), ("n32_s3", (66, 1, 2)));
        assert_eq!(launch(32, 28672, 4096), ("n32_s3", (66, 1, 2)));
        assert_eq!(launch(32, 128_256, 2048), ("n32_s3", (132, 1, 1)));
        assert_eq!(launch(32, 128_256, 8192).0, "t7_n4_w8_c2");
        assert_eq!(launch(64, 14336, 4096), ("n64_s4", (1, 112, 2)));
        assert_eq!(launch(64, 4096, 14336), ("n64_s4", (1, 32, 6)));
        assert_eq!(launch(128, 4096, 14336), ("n128_s6", (1, 32, 3)));
        assert_eq!(launch(256, 28672, 8192), ("n256_s4", (1, 224, 1)));
    }

    #[test]
    fn every_row_tile_has_a_place_on_every_device() {
        for target in [H100, AMPERE] {
            for rows in [1, 15, 16, 17, 1000, 2112, 4096, 11008, 14336, 28672, 128_256] {
                for tokens in 1..=MOST_TOKENS {
                    let product = product(tokens, rows, 4096);
                    let plan = plan(&product, &target);
                    assert!(plan.shared_bytes <= target.shared_bytes, "{product:?} on {target:?}: {plan:?}");
                    assert!(target.sm >= 90 || plan.grid.2 == 1);
                    if plan.file == "linear_4bit_sm90" {
                        assert!(plan.grid.0 * plan.grid.2 <= target.sms, "{product:?}: {plan:?}");
                    } else if plan.file.starts_with("linear_4bit") {
                        let most = plan.entry[1..2].parse::<u32>().expect("a digit");
                        assert!(row_tiles(&product).div_ceil(plan.grid.0) <= most, "{product:?}: {plan:?}");
                        let at_once = 8 * plan.entry[4..5].parse::<u32>().expect("a digit");
                        assert_eq!(plan.grid.1, tokens.div_ceil(at_once), "{product:?}: {plan:?}");
                        let shares = plan.entry.ends_with("c2") && at_once <= 16;
                        assert!(plan.grid.1 == 1 || shares, "{product:?}: {plan:?}");
                    } else {
                        assert!(u64::from(plan.grid.1) * 128 >= rows);
                    }
                }
            }
        }
    }

    fn backward_launch(tokens: u32, rows: u64, columns: u64) -> (&'static str, (u32, u32, u32)) {
        let plan = backward_plan(&product(tokens, rows, columns), &H100);
        (plan.entry, plan.grid)
    }

    #[test]
    fn measured_gradients_get_what_was_fastest() {
        assert_eq!(backward_launch(8, 14336, 4096), ("c2_w2_n1_s4_t512", (1, 64, 2)));
        assert_eq!(backward_launch(8, 4096, 14336), ("c2_w2_n1_s4_t256", (1, 224, 1)));
        assert_eq!(backward_launch(1, 28672, 8192), ("c2_w2_n1_s4_t256", (1, 128, 2)));
        assert_eq!(backward_launch(16, 4096, 4096), ("c2_w2_n2_s4_t512", (1, 64, 2)));
        assert_eq!(backward_launch(16, 4096, 14336), ("c2_w2_n2_s3_t256", (1, 224, 1)));
        assert_eq!(backward_launch(32, 14336, 4096), ("c2_w2_n4_s3_t512", (1, 64, 2)));
        assert_eq!(backward_launch(32, 4096, 14336), ("c2_w4_n4_s4_t512", (1, 112, 1)));
        assert_eq!(backward_launch(32, 28672, 8192), ("c2_w4_n4_s4_t512", (1, 64, 2)));
        assert_eq!(backward_launch(64, 14336, 4096), ("n64_t2_s6", (1, 16, 6)));
        assert_eq!(backward_launch(64, 28672, 8192), ("n64_t2_s6", (1, 32, 3)));
        assert_eq!(backward_launch(128, 14336, 4096), ("n128_t1_s6", (1, 32, 3)));
        assert_eq!(backward_launch(128, 28672, 8192), ("n128_t1_s6", (1, 64, 2)));
        assert_eq!(backward_launch(256, 4096, 4096), ("n128_t1_s6", (2, 32, 2)));
        assert_eq!(backward_launch(256, 4096, 14336), ("n256_t1_s4", (1, 112, 1)));
    }

    #[test]
    fn every_column_and_token_of_a_gradient_has_a_place_on_every_device() {
        let a100 = Target { sm: 80, sms: 108, shared_bytes: 163 * 1024 };
        for target in [H100, AMPERE, a100, Target { sm: 120, ..AMPERE }] {
            for columns in [64, 128, 192, 1024, 2112, 4096, 14336, MOST_BACKWARD_COLUMNS] {
                for tokens in 1..=MOST_TOKENS {
                    for rows in [1, 17, 1000, 4097, 14336] {
                        let product = product(tokens, rows, columns);
                        let plan = backward_plan(&product, &target);
                        let fitting = plan.shared_bytes <= target.shared_bytes;
                        assert!(fitting, "{product:?} on {target:?}: {plan:?}");
                        assert!(plan.grid.1 <= 65_535 && (target.sm >= 90 || plan.grid.2 == 1));
                        let hopper = plan.file == "linear_backward_4bit_sm90";
                        assert!(!hopper || (target.sm == 90 && rows.is_multiple_of(8) && tokens > 32));
                        let tiles =
                            [64, 128, 256].into_iter().filter(|of| columns.div_ceil(*of) == u64::from(plan.grid.1));
                        assert!(tiles.count() > 0, "{product:?}: {plan:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_of_small_weights_and_of_many_tokens_are_dequantized() {
        for fused in [(32, 1024, 4096), (128, 4096, 4096), (256, 4096, 14336), (256, 28672, 8192), (32, 14337, 4096)] {
            assert!(backward_worthwhile(&product(fused.0, fused.1, fused.2), &H100), "{fused:?}");
        }
        for dequantized in [
            (1, 4096, 1024),
            (33, 1024, 4096),
            (33, 3072, 3072),
            (129, 4096, 4096),
            (129, 14336, 4096),
            (33, 14337, 4096),
            (64, 28672, 1024),
        ] {
            let product = product(dequantized.0, dequantized.1, dequantized.2);
            assert!(!backward_worthwhile(&product, &H100), "{product:?}");
        }
        assert!(!backward_worthwhile(&product(33, 14336, 4096), &AMPERE));
    }

    /// Else a weight that was kept from the forward pass would give other bits than one that was not.
    #[test]
    fn gradients_are_fused_only_where_products_are() {
        let sizes = [64, 1024, 2048, 4096, 8192, 14336, 28672, 128_256];
        for (rows, columns) in sizes.into_iter().flat_map(|rows| sizes.map(|columns| (rows, columns))) {
            for product in (1..=MOST_TOKENS).map(|tokens| product(tokens, rows, columns)) {
                assert!(!backward_worthwhile(&product, &H100) || worthwhile(&product), "{product:?}");
            }
        }
    }

    #[test]
    fn small_weights_are_dequantized_for_many_tokens() {
        assert!(worthwhile(&product(32, 1024, 4096)) && worthwhile(&product(256, 4096, 4096)));
        assert!(!worthwhile(&product(33, 1024, 4096)));
    }

    #[test]
    fn shapes_that_the_kernels_cannot_take_are_refused() {
        assert!(supported(&product(256, 17, 64), &H100));
        for odd in [product(0, 16, 64), product(257, 16, 64), product(1, 0, 64), product(1, 16, 96), product(1, 16, 0)]
        {
            assert!(!supported(&odd, &H100), "{odd:?}");
        }
        // Where 32 bits end: bytes of 16 rows, and scales of whole row tiles.
        assert!(supported(&product(1, 16, (1 << 28) - 64), &H100) && !supported(&product(1, 16, 1 << 28), &H100));
        assert!(supported(&product(1, 65_520, 32_775 * 64), &H100));
        assert!(!supported(&product(1, 65_521, 32_775 * 64), &H100));
        assert!(!supported(&Product { block_size: 32, ..product(1, 16, 64) }, &H100));
        assert!(!supported(&product(1, 16, 64), &Target { sm: 75, ..AMPERE }));
        assert!(backward_supported(&product(256, 17, 64), &H100));
        assert!(!backward_supported(&product(1, 1, 1 << 24), &H100));
    }
}
