//! Random values that find more than uniform ones do: boundaries, special floating-point numbers, equal operands.

/// SplitMix64: small, and the same everywhere.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let value = self.next().to_le_bytes();
            chunk.copy_from_slice(&value[..chunk.len()]);
        }
    }

    /// A 64-bit integer.
    pub fn integer(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(65),
            1 => self.below(65).wrapping_neg(),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => {
                let boundary = self.pick(&[
                    0x7f,
                    0x80,
                    0xff,
                    0x7fff,
                    0x8000,
                    0xffff,
                    0x7fff_ffff,
                    0x8000_0000,
                    0xffff_ffff,
                    i64::MAX as u64,
                    i64::MIN as u64,
                    u64::MAX,
                ]);
                boundary.wrapping_add(self.below(3)).wrapping_sub(1)
            }
            5 => self.next() & self.next() & self.next(),
            _ => self.next(),
        }
    }

    fn single(&mut self) -> u32 {
        let sign = (self.next() as u32) & 0x8000_0000;
        let fraction = self.next() as u32 & 0x7f_ffff;
        sign | match self.below(12) {
            0 => 0,
            1 => 0x7f80_0000,
            2 => 0x7fc0_0000 | fraction,
            3 => 0x7f80_0000 | (fraction & 0x3f_ffff) | 1,
            4 => fraction,
            5 => 1,
            6 => 0x0080_0000 | fraction,
            7 => 0x7f7f_ffff,
            8 => 0x3f80_0000,
            9 => (self.below(200) as f32 / 2.0).to_bits(),
            10 => 0x4e00_0000 | ((self.next() as u32) & 0x03ff_ffff),
            _ => self.next() as u32 & 0x7fff_ffff,
        }
    }

    fn double(&mut self) -> u64 {
        let sign = self.next() & (1 << 63);
        let fraction = self.next() & 0xf_ffff_ffff_ffff;
        sign | match self.below(12) {
            0 => 0,
            1 => 0x7ff << 52,
            2 => 0x7ff8 << 48 | fraction,
            3 => 0x7ff << 52 | fraction >> 1 | 1,
            4 => fraction,
            5 => 1,
            6 => 1 << 52 | fraction,
            7 => 0x7fef_ffff_ffff_ffff,
            8 => 0x3ff << 52,
            9 => (self.below(200) as f64 / 2.0).to_bits(),
            10 => (0x41d + self.below(0x22)) << 52 | fraction,
            _ => self.next() & (u64::MAX >> 1),
        }
    }

    /// An 80-bit register of the x87.
    pub fn extended(&mut self) -> [u8; 10] {
        let sign = (self.next() as u16) & 0x8000;
        let fraction = self.next();
        let integer = 1u64 << 63;
        let (exponent, significand) = match self.below(14) {
            0 => (0, 0),
            1 => (0x7fff, integer),
            2 => (0x7fff, integer | 1 << 62 | fraction),
            3 => (0x7fff, integer | (fraction >> 2) | 1),
            4 => (0, fraction >> 1),
            5 => (0, integer | fraction),
            6 => (0x3fff, integer),
            7 => (0x3fff + self.below(70) as u16, integer | fraction),
            8 => (0x3fff - self.below(70) as u16, integer | fraction),
            9 => (0x7ffe, u64::MAX),
            10 => (0x4000 + self.below(8) as u16, integer | fraction & (0xff << 55)),
            // Unnormal and pseudo forms.
            11 => (self.next() as u16 & 0x7fff, fraction >> 1),
            12 => (0x7fff, fraction),
            _ => (self.next() as u16 & 0x7fff, integer | fraction),
        };
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&significand.to_le_bytes());
        bytes[8..].copy_from_slice(&(sign | exponent).to_le_bytes());
        bytes
    }

    /// Fills with lanes of one kind.
    pub fn lanes(&mut self, bytes: &mut [u8]) {
        match self.below(7) {
            0 | 1 => bytes.chunks_mut(4).for_each(|lane| {
                let value = self.single().to_le_bytes();
                lane.copy_from_slice(&value[..lane.len()]);
            }),
            2 | 3 => bytes.chunks_mut(8).for_each(|lane| {
                let value = self.double().to_le_bytes();
                lane.copy_from_slice(&value[..lane.len()]);
            }),
            4 => bytes.chunks_mut(8).for_each(|lane| {
                let value = self.integer().to_le_bytes();
                lane.copy_from_slice(&value[..lane.len()]);
            }),
            5 => {
                let value = self.pick(&[0, 0xff, 0x80, 0x7f, 1]);
                bytes.fill(value);
            }
            _ => self.fill(bytes),
        }
    }
}
